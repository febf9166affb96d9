"""generate() of the documented classes: recorded runs of transformers, definitions, promises."""

from __future__ import annotations

import io
import threading
from contextlib import redirect_stdout
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import QUICK
from recorded import Recorded, ids, one, recorded

from llama_np import (
    GenerationConfig,
    KVCache,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
    TextStreamer,
    sampling,
)

GENERATED = recorded("generate")
FIRST_SCORES = recorded("first_scores")
PROCESSORS = recorded("processors")
V = 23


@cache
def loaded(name: str) -> LlamaForCausalLM:
    case = one(name)
    return LlamaForCausalLM(LlamaConfig.from_dict(case.config), case.weights())


@cache
def tiny(seed: int = 0, layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        **changes,
    )
    return LlamaForCausalLM(config, seed=seed, dtype=np.float64)


def prompts(rows: int = 2, length: int = 5, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, V, (rows, length))


# ------------------------------------------------------------------ against transformers


@pytest.mark.filterwarnings("ignore:Input length")
@pytest.mark.filterwarnings("ignore:The text may become")
@pytest.mark.parametrize("case", GENERATED, ids=ids(GENERATED))
def test_ids_and_scores_equal_what_transformers_recorded(case: Recorded) -> None:
    out = loaded(case.name).generate(**case.call_inputs(), **case.arguments)
    truth = case.outputs()
    np.testing.assert_array_equal(out.sequences, truth["sequences"])
    if "scores" in truth:
        case.assert_close("scores", np.stack(out.scores))
    if "sequences_scores" in truth:
        case.assert_close("sequences_scores", out.sequences_scores)
        case.assert_close("beam_indices", out.beam_indices)


@pytest.mark.filterwarnings("ignore:`min_new_tokens` is")
@pytest.mark.parametrize("case", FIRST_SCORES, ids=ids(FIRST_SCORES))
def test_scores_before_a_draw_equal_what_transformers_recorded(case: Recorded) -> None:
    out = loaded(case.name).generate(**case.call_inputs(), **case.arguments, rng=0)
    case.assert_close("scores", out.scores[0])


# Each processor of transformers as ours: (ids, scores, its options) -> scores.
OURS: dict[str, Any] = {
    "TemperatureLogitsWarper": lambda i, s, o: sampling.temperature(s, o["temperature"]),
    "TopKLogitsWarper": lambda i, s, o: sampling.top_k(
        s, max(o["top_k"], o.get("min_tokens_to_keep", 1))
    ),
    "TopPLogitsWarper": lambda i, s, o: sampling.top_p(
        s, o["top_p"], o.get("min_tokens_to_keep", 1)
    ),
    "MinPLogitsWarper": lambda i, s, o: sampling.min_p(
        s, o["min_p"], o.get("min_tokens_to_keep", 1)
    ),
    "TypicalLogitsWarper": lambda i, s, o: sampling.typical_p(s, o["mass"]),
    "RepetitionPenaltyLogitsProcessor": lambda i, s, o: sampling.repetition_penalty(
        s, sampling.seen_tokens(i, s.shape[1]), o["penalty"]
    ),
    "NoRepeatNGramLogitsProcessor": lambda i, s, o: sampling.no_repeat_ngram(s, i, o["ngram_size"]),
    "NoBadWordsLogitsProcessor": lambda i, s, o: sampling.sequence_bias(
        s, i, {tuple(word): -np.inf for word in o["bad_words_ids"]}
    ),
    "MinLengthLogitsProcessor": lambda i, s, o: (
        sampling.forbid(s, [o["eos_token_id"]]) if i.shape[1] < o["min_length"] else s
    ),
    "MinNewTokensLengthLogitsProcessor": lambda i, s, o: (
        sampling.forbid(s, o["eos_token_id"])
        if i.shape[1] - o["prompt_length_to_skip"] < o["min_new_tokens"]
        else s
    ),
}


@pytest.mark.parametrize("case", PROCESSORS, ids=ids(PROCESSORS))
def test_every_processor_equals_what_transformers_recorded(case: Recorded) -> None:
    tokens, scores = case.inputs()["input_ids"], case.inputs()["scores"]
    for name, options in case.arguments["processors"]:
        scores = OURS[name](tokens, scores, options)
    truth = case.outputs()["scores"]
    for mine, theirs, before in zip(scores, truth, case.inputs()["scores"], strict=True):
        ties = "Warper" in str(case.arguments) and len(np.unique(before)) < len(before)
        view = np.sort if ties else np.asarray  # PyTorch's order of ties is arbitrary
        np.testing.assert_allclose(view(mine), view(theirs), rtol=1e-6)  # a few roundings


# ------------------------------------------------------------------ greedy


@settings(QUICK, max_examples=15)
@given(
    pads=st.lists(st.integers(0, 4), min_size=2, max_size=2),
    options=st.fixed_dictionaries(
        {},
        optional={
            "use_cache": st.just(False),
            "repetition_penalty": st.sampled_from([1.5, 2]),
            "no_repeat_ngram_size": st.sampled_from([1, 2]),
            "min_new_tokens": st.just(3),
            "eos_token_id": st.just([5, 7, 9]),
            "num_beams": st.just(3),
        },
    ),
)
def test_a_row_says_the_same_alone_and_in_a_padded_batch(pads: list[int], options: Any) -> None:
    model, words = tiny(), prompts()
    if "repetition_penalty" in options or "no_repeat_ngram_size" in options:
        pads = [0, 0]  # padding counts as text there, as in transformers
    alone = [model.generate(row[None], max_new_tokens=6, **options)[0] for row in words]
    width = max(pads) + words.shape[1]
    batch, mask = np.full((2, width), 2), np.zeros((2, width), int)
    for i, row in enumerate(words):
        batch[i, width - max(pads) - 5 + max(pads) :] = row
        start = width - 5
        batch[i, start:], mask[i, start:] = row, 1
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, **options)
    for i, expected in enumerate(alone):
        new = expected[5:]
        np.testing.assert_array_equal(together[i, width : width + len(new)], new)
        assert (together[i, width + len(new) :] == (options.get("eos_token_id", [2]))[0]).all()


def test_greedy_feeds_the_likeliest_token_back() -> None:
    model, text = tiny(), prompts()
    expected = text
    for _ in range(4):
        likeliest = model(expected).logits[:, -1].argmax(axis=1)
        expected = np.concatenate([expected, likeliest[:, None]], axis=1)
    for use_cache in (True, False):
        found = model.generate(text, max_new_tokens=4, eos_token_id=None, use_cache=use_cache)
        np.testing.assert_array_equal(found, expected)


def test_lengths_count_as_documented() -> None:
    model, text = tiny(), prompts()
    never: dict[str, Any] = {"eos_token_id": None}
    assert model.generate(text, **never).shape == (2, 20)  # max_length, prompt included
    assert model.generate(text, max_length=9, **never).shape == (2, 9)
    assert model.generate(text, max_length=9, max_new_tokens=2, **never).shape == (2, 7)
    config = GenerationConfig(max_new_tokens=3, eos_token_id=1)
    assert model.generate(text, config, max_length=8, **never).shape == (2, 8)
    too_short: list[dict[str, Any]] = [{"max_length": 5}, {"max_length": 1}, {"max_new_tokens": 0}]
    for options in too_short:
        with pytest.warns(UserWarning, match="one token is generated"):
            assert model.generate(text, **options, **never).shape == (2, 6)


def test_beyond_the_trained_context_there_is_one_warning() -> None:
    with pytest.warns(UserWarning, match="trained on 64") as warnings:
        assert tiny().generate(prompts(), max_length=70, eos_token_id=None).shape == (2, 70)
    assert len(warnings) == 1


def test_eos_ends_a_row_and_is_kept_and_none_switches_it_off() -> None:
    model, text = tiny(), prompts()
    free = model.generate(text, max_new_tokens=8, eos_token_id=None)
    stop = int(free[0, 7])
    first = int(np.flatnonzero(free[0, 5:] == stop)[0])
    found = model.generate(text, max_new_tokens=8, eos_token_id=[stop, 1], pad_token_id=0)
    np.testing.assert_array_equal(found[0, : 6 + first], free[0, : 6 + first])
    assert (found[0, 6 + first :] == 0).all()
    model.generation_config.eos_token_id = stop
    try:
        assert (model.generate(text[:1], max_new_tokens=8)[0, -1]) == stop
        longer = model.generate(text, max_new_tokens=8, eos_token_id=None)
        np.testing.assert_array_equal(longer, free)
    finally:
        model.generation_config.eos_token_id = 2


def test_without_a_prompt_the_text_begins_with_bos() -> None:
    assert tiny().generate(max_new_tokens=2)[0, 0] == 1
    with pytest.raises(ValueError, match="bos_token_id"):
        tiny(bos_token_id=None).generate()


def test_pads_are_told_from_the_prompt_unless_pad_is_eos() -> None:
    model, text = tiny(), prompts(1)
    padded = np.concatenate([np.zeros((1, 3), int), text], axis=1)
    never: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}
    expected = model.generate(text, **never)[0, 5:]
    np.testing.assert_array_equal(model.generate(padded, pad_token_id=0, **never)[0, 8:], expected)
    seen = model.generate(padded, pad_token_id=0, max_new_tokens=4, eos_token_id=[0])
    mask = np.ones_like(padded)
    as_text = model.generate(padded, attention_mask=mask, max_new_tokens=4, eos_token_id=[0])
    np.testing.assert_array_equal(seen, as_text)


def test_past_keys_spare_the_tokens_that_they_stand_for() -> None:
    model, text = tiny(), prompts()
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}
    expected = model.generate(text, **options)
    pairs = model(text[:, :3]).past_key_values
    cache = KVCache(model.config.core(), 2, dtype=np.float64)
    model(text[:, :3], past_key_values=cache)
    for past in (pairs, cache):
        np.testing.assert_array_equal(
            model.generate(text, past_key_values=past, **options), expected
        )
    assert cache.length == 8  # all but the last token
    mask = np.ones((2, 5))
    all_cached = model(text).past_key_values
    again = model.generate(text, past_key_values=all_cached, **options)
    np.testing.assert_array_equal(again, expected)
    continued = model.generate(text[:, 3:], past_key_values=pairs, attention_mask=mask, **options)
    np.testing.assert_array_equal(continued[:, 2:], expected[:, 5:])


def test_given_positions_go_on_counting() -> None:
    model, text = tiny(), prompts()
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}
    shifted = model.generate(text, position_ids=np.arange(7, 12)[None], **options)
    np.testing.assert_array_equal(shifted, model.generate(text, **options))


def test_vectors_start_a_text_of_new_tokens_behind_bos() -> None:
    model, text = tiny(), prompts()
    vectors = model.get_input_embeddings()(text)
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}
    expected = model.generate(text, **options)
    found = model.generate(inputs_embeds=vectors, **options)
    assert (found[:, 0] == 1).all()
    np.testing.assert_array_equal(found[:, 1:], expected[:, 5:])
    both = model.generate(text, inputs_embeds=vectors, **options)
    np.testing.assert_array_equal(both, expected)


def test_other_weights_can_be_used_for_one_call() -> None:
    model, other, text = tiny(), tiny(seed=7), prompts()
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}
    found = model.generate(text, params=other.params, **options)
    np.testing.assert_array_equal(found, other.generate(text, **options))


def test_everything_that_was_computed_can_be_returned() -> None:
    out = tiny().generate(
        prompts(), max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True,
        output_scores=True, output_attentions=True, output_hidden_states=True,
    )  # fmt: skip
    assert list(out) == ["sequences", "scores", "attentions", "hidden_states", "past_key_values"]
    assert [a[0].shape for a in out.attentions] == [(2, 4, 5, 5), (2, 4, 1, 6), (2, 4, 1, 7)]
    assert [h[0].shape for h in out.hidden_states] == [(2, 5, 24), (2, 1, 24), (2, 1, 24)]
    assert len(out.hidden_states[0]) == 3
    assert out.past_key_values[1][0].shape == (2, 2, 7, 6)
    scores = tiny().compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    logits = tiny()(out.sequences).logits
    expected = sampling.log_softmax(logits)[:, 4:-1]
    chosen = np.take_along_axis(expected, out.sequences[:, 5:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores, chosen, rtol=1e-9)  # float64 run


# ------------------------------------------------------------------ what shapes the scores


def test_bans_hold() -> None:
    model, text = tiny(), prompts(3)
    free = model.generate(text, max_new_tokens=12, eos_token_id=None)
    pairs = [row[4:7].tolist() for row in free[:, 1:]]
    banned = [[int(free[0, 6])], *pairs, list(range(3, 9))]
    found = model.generate(text, max_new_tokens=12, eos_token_id=None, bad_words_ids=banned)
    assert not (found[:, 5:] == free[0, 6]).any()
    for word, row in product(pairs, found.tolist()):
        assert all(row[i : i + 3] != word for i in range(3, len(row) - 2))
    unique = model.generate(text, max_new_tokens=12, eos_token_id=None, no_repeat_ngram_size=2)
    for row in unique.tolist():
        assert len(set(pairwise(row))) == len(row) - 1


def test_a_bad_word_that_is_longer_than_the_text_is_found() -> None:
    text = prompts(1, 1)
    following = tiny().generate(text, max_new_tokens=1, eos_token_id=None)[0]
    found = tiny().generate(text, max_new_tokens=1, bad_words_ids=[following.tolist()])
    assert found[0, 1] != following[1]


def test_custom_functions_see_and_change_the_scores() -> None:
    def only_seven(tokens: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert tokens.shape[0] == scores.shape[0]
        scores[:] = -np.inf
        scores[:, 7] = 1
        return scores

    found = tiny().generate(prompts(), max_new_tokens=2, logits_processor=[only_seven])
    assert (found[:, 5:] == 7).all()
    listed = tiny().generate(
        prompts(), max_new_tokens=3, prefix_allowed_tokens_fn=lambda row, tokens: [9 + row]
    )
    assert listed[:, 5:].tolist() == [[9] * 3, [10] * 3]


def test_stopping_criteria_stop_all_rows_or_one() -> None:
    model, text = tiny(), prompts()
    options: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
    all_rows = model.generate(text, stopping_criteria=[lambda i, s: i.shape[1] == 8], **options)
    assert all_rows.shape == (2, 8)
    one_row = model.generate(
        text, stopping_criteria=[lambda i, s: np.array([i.shape[1] == 7, False])], **options
    )
    assert one_row.shape == (2, 14)
    assert (one_row[0, 7:] == 0).all()
    np.testing.assert_array_equal(one_row[:, :7], all_rows[:, :7])
    for none_left in (1e-9, 0.0, 0):
        assert model.generate(text, max_time=none_left, **options).shape == (2, 6)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": 0.0, "do_sample": True}, ValueError),
        ({"temperature": -1.0, "do_sample": True}, ValueError),
        ({"top_k": -1, "do_sample": True}, ValueError),
        ({"top_k": 1.5, "do_sample": True}, ValueError),
        ({"top_p": -0.1, "do_sample": True}, ValueError),
        ({"min_p": 1.5, "do_sample": True}, ValueError),
        ({"typical_p": 0.0, "do_sample": True}, ValueError),
        ({"repetition_penalty": 0.0}, ValueError),
        ({"repetition_penalty": "2"}, ValueError),
        ({"no_repeat_ngram_size": 1.5}, ValueError),
        ({"bad_words_ids": []}, ValueError),
        ({"bad_words_ids": [[-1]]}, ValueError),
        ({"bad_words_ids": [3]}, ValueError),
        ({"bad_words_ids": [[99]]}, ValueError),
        ({"sequence_bias": {3: 1.0}}, ValueError),
        ({"max_new_tokens": -1}, ValueError),
        ({"max_new_tokens": 1.5}, ValueError),
        ({"max_length": None}, ValueError),
        ({"num_beams": 0}, ValueError),
        ({"num_return_sequences": 2}, ValueError),
        ({"num_beams": 2, "num_return_sequences": 3}, ValueError),
        ({"num_beams": 2, "streamer": TextStreamer(None)}, ValueError),
        ({"early_stopping": "sometimes", "num_beams": 2}, ValueError),
        ({"nonsense": 1}, ValueError),
        ({"attention_mask": np.ones((2, 4))}, ValueError),
        ({"input_ids": np.ones((2, 4), int)}, ValueError),
        ({"penalty_alpha": 0.6, "use_cache": False}, ValueError),
        ({"force_words_ids": [[3]], "num_beams": 2}, NotImplementedError),
        ({"guidance_scale": 1.5, "num_beams": 2}, NotImplementedError),
        ({"num_beams": 4, "num_beam_groups": 2}, ValueError),  # no diversity_penalty
        ({"num_beams": 5, "num_beam_groups": 2, "diversity_penalty": 1.0}, ValueError),
        ({"num_beams": 4, "diversity_penalty": 1.0}, ValueError),
        ({"prompt_lookup_num_tokens": 2}, ValueError),  # several rows
        ({"prompt_lookup_num_tokens": 2, "num_beams": 2}, NotImplementedError),
        ({"prompt_lookup_num_tokens": 2, "guidance_scale": 1.5}, NotImplementedError),
        (
            {"prompt_lookup_num_tokens": 2, "penalty_alpha": 0.5, "top_k": 4},
            NotImplementedError,
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        tiny().generate(prompts(), **options)


def test_idle_options_are_pointed_out() -> None:
    sampling_only: list[dict[str, Any]] = [{"temperature": 0.5}, {"top_k": 3}]
    beams_only: list[dict[str, Any]] = [{"early_stopping": True}, {"length_penalty": 0.5}]
    for options, switch in ((sampling_only, "do_sample"), (beams_only, "num_beams")):
        for option in options:
            with pytest.warns(UserWarning, match=switch):
                tiny().generate(prompts(), max_new_tokens=1, **option)
    tiny().generate(prompts(), max_new_tokens=1, penalty_alpha=0.5, top_k=3)  # not idle there


def test_broken_logits_and_forbidden_vocabularies_are_errors() -> None:
    state = tiny().state_dict() | {"model.norm.weight": np.full(24, np.nan)}
    with pytest.raises(FloatingPointError, match="NaN"):
        tiny().generate(prompts(), params=state)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="forbidden"):
            tiny().generate(prompts(), suppress_tokens=range(V), num_beams=beams)


# ------------------------------------------------------------------ drawing


def test_the_same_seed_draws_the_same_text() -> None:
    draw: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": None}
    first = tiny().generate(prompts(), rng=3, **draw)
    np.testing.assert_array_equal(first, tiny().generate(prompts(), rng=3, **draw))
    generator = np.random.default_rng(3)
    np.testing.assert_array_equal(first, tiny().generate(prompts(), rng=generator, **draw))
    assert (first != tiny().generate(prompts(), rng=generator, **draw)).any()
    several = tiny().generate(prompts(), rng=3, num_return_sequences=3, **draw)
    assert several.shape == (6, 13)
    np.testing.assert_array_equal(several[:, :5], np.repeat(prompts(), 3, axis=0))


def test_drawing_at_random_follows_the_warped_distribution() -> None:
    """Chi-square over 4,000 draws; 60 is far beyond the 99.99 % point for <= 22 degrees."""
    text = np.repeat(prompts(1), 4_000, axis=0)
    options: dict[str, Any] = {"temperature": 1.7, "top_k": 12, "top_p": 0.9}
    out = tiny().generate(
        text, do_sample=True, max_new_tokens=1, rng=0, output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    expected = np.exp(sampling.log_softmax(out.scores[0][0])) * 4_000
    counts = np.bincount(out.sequences[:, -1], minlength=V)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 5
    assert ((counts - expected) ** 2 / np.where(likely, expected, 1))[likely].sum() < 60


def test_top_k_1_and_tiny_top_p_are_greedy() -> None:
    greedy = tiny().generate(prompts(), max_new_tokens=6)
    sharp: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
    for options in [*sharp, {"temperature": 1e-4}]:
        drawn = tiny().generate(prompts(), do_sample=True, max_new_tokens=6, rng=1, **options)
        np.testing.assert_array_equal(drawn, greedy)


@pytest.mark.parametrize("negative", [None, [[4, 5, 6]]])
def test_guidance_leads_away_from_what_the_text_alone_would_say(negative: Any) -> None:
    model, text, scale = tiny(), prompts(1), 2.5
    out = model.generate(
        text, guidance_scale=scale, negative_prompt_ids=negative, max_new_tokens=4,
        eos_token_id=None, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    before = text[:, -1:] if negative is None else np.array(negative)
    for step, scores in enumerate(out.scores):
        said = out.sequences[:, 5 : 5 + step]
        with_prompt, without = (
            sampling.log_softmax(model(np.concatenate([start, said], axis=1)).logits[:, -1])
            for start in (text, before)
        )
        expected = without + scale * (with_prompt - without)
        np.testing.assert_allclose(scores, expected, rtol=1e-9)  # float64 run


# ------------------------------------------------------------------ contrastive search


def test_contrastive_search_weighs_probability_against_repetition() -> None:
    """Computed again from the definition, one candidate and one whole text at a time."""
    model, alpha, k = tiny(), 0.6, 4
    text = prompts(1)[0].tolist()
    for _ in range(6):
        scores = model(np.array([text])).logits[0, -1]
        probabilities = np.exp(sampling.log_softmax(scores))
        worth = {}
        for token in np.argsort(-scores)[:k].tolist():
            hidden = model.model(np.array([[*text, token]])).last_hidden_state[0]
            hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
            degeneration = (hidden[:-1] @ hidden[-1]).max()
            worth[token] = (1 - alpha) * probabilities[token] - alpha * degeneration
        text.append(max(worth, key=worth.__getitem__))
    both = np.stack([prompts(1)[0], prompts(1, seed=2)[0]])
    found = model.generate(both, penalty_alpha=alpha, top_k=k, max_new_tokens=6, eos_token_id=None)
    assert found[0].tolist() == text
    greedy = model.generate(both, max_new_tokens=6, eos_token_id=None)
    assert (found != greedy).any()


def test_contrastive_search_returns_what_the_model_computed_for_the_written_text() -> None:
    options: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    out = tiny().generate(
        prompts(), penalty_alpha=0.6, top_k=4, max_new_tokens=4, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    plain = tiny()(out.sequences[:, :-1], **options)
    assert len(out.scores) == len(out.attentions) == len(out.hidden_states) == 4
    for layer in range(3):
        steps = [step[layer] for step in out.hidden_states]
        whole = np.concatenate(steps, axis=1)
        np.testing.assert_allclose(whole, plain.hidden_states[layer], rtol=1e-9)  # float64 run
    for layer, whole in enumerate(plain.attentions):
        for step, found in enumerate(out.attentions):
            rows = slice(5) if step == 0 else slice(4 + step, 5 + step)
            np.testing.assert_allclose(found[layer], whole[:, :, rows, : 5 + step], rtol=1e-9)
    assert out.past_key_values[0][0].shape[2] == 8  # all but the last token, as with greedy
    np.testing.assert_allclose(out.past_key_values[1][0], plain.past_key_values[1][0], rtol=1e-9)


# ------------------------------------------------------------------ beams


def test_as_many_beams_as_texts_find_the_likeliest_text() -> None:
    """With V beams of length 2 the search is exhaustive: compare with every pair of tokens."""
    model, text = tiny(), prompts(1)
    first = sampling.log_softmax(model(text).logits[0, -1])
    both = np.repeat(text, V, axis=0)
    grown = np.concatenate([both, np.arange(V)[:, None]], axis=1)
    totals = first[:, None] + sampling.log_softmax(model(grown).logits[:, -1])
    best = np.argsort(-totals, axis=None)[:3]
    out = model.generate(
        text, num_beams=V, num_return_sequences=3, max_new_tokens=2, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert (out.sequences[:, 5] * V + out.sequences[:, 6]).tolist() == best.tolist()
    # Scores are kept as float32.
    np.testing.assert_allclose(out.sequences_scores, totals.flat[best] / 2, rtol=1e-6)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_sequence_scores_are_the_sums_of_their_tokens_scores(early_stopping: Any) -> None:
    model = tiny()
    out = model.generate(
        prompts(), num_beams=3, num_return_sequences=3, max_new_tokens=7, length_penalty=0.8,
        eos_token_id=list(range(3, 9)), pad_token_id=0, early_stopping=early_stopping,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    chosen = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    lengths = (out.beam_indices >= 0).sum(axis=1)
    closed = out.sequences[np.arange(6), 4 + lengths]
    first_eos = np.isin(closed, [3])  # whichever eos closed a text, the first one is written
    exact = ~first_eos
    expected = chosen.sum(axis=1) / lengths**0.8
    np.testing.assert_allclose(out.sequences_scores[exact], expected[exact], rtol=1e-5)


def test_group_scores_are_the_sums_of_their_tokens_scores() -> None:
    model = tiny()
    out = model.generate(
        prompts(), num_beams=6, num_beam_groups=3, diversity_penalty=1.0, num_return_sequences=6,
        max_new_tokens=7, length_penalty=0.0, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    chosen = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    # Totals are kept as float32.
    np.testing.assert_allclose(out.sequences_scores, chosen.sum(axis=1), rtol=1e-5)


def test_no_text_ends_with_an_eos_that_was_not_generated() -> None:
    found = tiny().generate(
        prompts(1), num_beams=2, max_new_tokens=9, pad_token_id=0, eos_token_id=22,
        bad_words_ids=[[1]], suppress_tokens=[22], stopping_criteria=lambda i, s: i.shape[1] == 8,
    )  # fmt: skip
    assert found.shape == (1, 8)
    assert found[0, -1] != 22


def test_beam_sampling_draws_likely_texts_and_repeats_with_its_seed() -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 4, "eos_token_id": None, "num_beams": 4, "num_return_sequences": 4,
        "do_sample": True, "top_k": 8,
    }  # fmt: skip
    drawn = tiny().generate(prompts(), rng=0, **options)
    np.testing.assert_array_equal(drawn, tiny().generate(prompts(), rng=0, **options))
    assert (drawn != tiny().generate(prompts(), rng=1, **options)).any()
    scores = tiny()(drawn).logits[:, 4:-1]
    chosen = np.take_along_axis(scores, drawn[:, 5:, None], axis=-1)
    assert ((scores > chosen).sum(axis=-1) < 8).all()


def listed(*texts: tuple[int, ...]) -> Any:
    """A prefix_allowed_tokens_fn that allows these texts behind a prompt of 5, and no other."""

    def allowed(row: int, tokens: np.ndarray) -> list[int]:
        said = tuple(tokens[5:].tolist())
        return [t[len(said)] for t in texts if t[: len(said)] == said and len(t) > len(said)]

    return allowed


TEXTS: tuple[tuple[int, ...], ...] = ((5, 6, 2), (5, 7, 8, 2), (9, 2))


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_beams", [3, 5])
def test_of_listed_texts_beams_find_the_likeliest(num_beams: int, early_stopping: Any) -> None:
    model, prompt = tiny(), prompts(1)
    scores = {}
    for text in TEXTS:
        whole = np.concatenate([prompt[0], text])
        logprobs = sampling.log_softmax(model(whole[None, :-1]).logits[0, 4:])
        scores[text] = logprobs[np.arange(len(text)), list(text)].mean()
    best = sorted(TEXTS, key=scores.__getitem__, reverse=True)
    out = model.generate(
        prompt, prefix_allowed_tokens_fn=listed(*TEXTS), num_beams=num_beams, max_new_tokens=8,
        early_stopping=early_stopping, num_return_sequences=3, pad_token_id=0, eos_token_id=2,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found = [tuple(row[row > 0].tolist()) for row in out.sequences[:, 5:]]
    assert found == best
    expected = [scores[text] for text in best]
    np.testing.assert_allclose(out.sequences_scores, expected, rtol=1e-6)  # kept as float32


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_search_with_fewer_texts_than_beams_gives_those_and_one_without_is_an_error(
    do_sample: bool,
) -> None:
    options: dict[str, Any] = {"num_beams": 3, "do_sample": do_sample, "rng": 0, "eos_token_id": 2}
    out = tiny().generate(
        prompts(), prefix_allowed_tokens_fn=listed((9, 2)), num_return_sequences=2,
        max_new_tokens=8, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    assert out.sequences[:, 5:].tolist() == [[9, 2]] * 4
    if not do_sample:  # draws may begin with the same token in every beam
        assert np.isneginf(out.sequences_scores).tolist() == [False, True] * 2
    forced = tiny().generate(prompts(), forced_decoder_ids=[[5, 9], [6, 2]], **options)
    assert forced[:, 5:].tolist() == [[9, 2]] * 2
    for nothing in (listed(), listed((9,))):
        with pytest.raises(ValueError, match="every token is forbidden"):
            tiny().generate(prompts(), prefix_allowed_tokens_fn=nothing, **options)


def test_groups_of_beams_avoid_each_others_tokens() -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None, "num_beams": 6}
    out = tiny().generate(
        prompts(), num_beam_groups=3, diversity_penalty=1e6, num_return_sequences=6,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    for texts, rows in zip(np.split(out.sequences, 2), np.split(out.beam_indices, 2), strict=True):
        groups = rows[:, 4] % 6 // 2  # the row that the last token was chosen from
        for step in range(5, 10):
            said = [set(texts[groups == group, step].tolist()) for group in range(3)]
            assert not (said[0] & said[1] or said[0] & said[2] or said[1] & said[2])
    alone = tiny().generate(prompts(), max_new_tokens=5, eos_token_id=None, num_beams=2)
    first_groups = tiny().generate(prompts(), num_beam_groups=3, diversity_penalty=1e6, **options)
    np.testing.assert_array_equal(first_groups, alone)  # the first group is a plain search


# ------------------------------------------------------------------ speculation


@pytest.mark.filterwarnings("ignore:`min_new_tokens` is", "ignore:`do_sample` is False")
@settings(QUICK, max_examples=20)
@given(
    seed=st.integers(0, 50),
    draft=st.sampled_from(["same", "other", 1, 3, 8]),
    options=st.fixed_dictionaries(
        {"max_new_tokens": st.sampled_from([1, 7, 20])},
        optional={
            "eos_token_id": st.just([5, 11]),
            "repetition_penalty": st.just(1.4),
            "no_repeat_ngram_size": st.just(3),
            "min_new_tokens": st.just(4),
            "num_assistant_tokens": st.sampled_from([1, 4]),
            "num_assistant_tokens_schedule": st.just("constant"),
            "do_sample": st.booleans(),
            "top_k": st.just(9),
        },
    ),
    pads=st.integers(0, 2),
)
def test_speculation_never_changes_the_text(
    seed: int, draft: Any, options: dict[str, Any], pads: int
) -> None:
    model, text = tiny(), np.tile(prompts(1, 4, seed), 2)
    mask = np.ones_like(text)
    mask[:, :pads] = 0
    expected = model.generate(text, attention_mask=mask, rng=seed, **options)
    guesser: dict[str, Any] = {"prompt_lookup_num_tokens": draft}
    if isinstance(draft, str):
        assistant = model if draft == "same" else tiny(seed=9, layers=1)
        guesser = {"assistant_model": assistant}
    out = model.generate(
        text, attention_mask=mask, return_dict_in_generate=True, output_scores=True, rng=seed,
        **options, **guesser,
    )  # fmt: skip
    np.testing.assert_array_equal(out.sequences, expected)
    assert len(out.scores) == expected.shape[1] - 8
    assert out.past_key_values[0][0].shape[2] == expected.shape[1] - 1


@pytest.mark.filterwarnings("ignore:The text may become")
@pytest.mark.parametrize("guesser", ["assistant_model", "prompt_lookup_num_tokens"])
def test_speculation_works_where_rotations_change_with_every_token(guesser: str) -> None:
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "eos_token_id": None}
    config = LlamaConfig.from_dict(tiny().config.to_dict() | scaling)
    model = LlamaForCausalLM(config, tiny().weights)
    text = np.tile(prompts(1, 10), 6)  # of 60 tokens, the model was trained on 64
    draft: Any = model if guesser == "assistant_model" else 3
    plain = model.generate(text, max_new_tokens=30)
    np.testing.assert_array_equal(
        model.generate(text, max_new_tokens=30, **{guesser: draft}), plain
    )


def test_speculation_goes_on_from_a_given_cache() -> None:
    model, text = tiny(), np.tile(prompts(1, 6), 2)
    whole = model.generate(text, max_new_tokens=12, eos_token_id=None)
    past = model(text[:, :8]).past_key_values
    rest = model.generate(
        text[:, 8:], past_key_values=past, attention_mask=np.ones((1, 12), int),
        max_new_tokens=12, eos_token_id=None, prompt_lookup_num_tokens=3,
    )  # fmt: skip
    np.testing.assert_array_equal(rest, whole[:, 8:])


def test_a_perfect_assistant_saves_passes() -> None:
    model = tiny()
    passes = []
    original = model.run

    def counting(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs["input_ids"].shape[1])
        return original(*args, **kwargs)

    model.run = counting  # type: ignore[method-assign]
    try:
        model.generate(
            prompts(1), max_new_tokens=12, eos_token_id=None, assistant_model=tiny(seed=0, layers=2)
        )
    finally:
        del model.run
    assert max(passes[1:]) > 1


def test_an_assistant_must_know_the_same_words() -> None:
    small = LlamaForCausalLM(LlamaConfig(9, 8, 8, 1, 2))
    with pytest.raises(ValueError, match="assistant knows 9"):
        tiny().generate(prompts(1), assistant_model=small)


# ------------------------------------------------------------------ streams and files


class Letters:
    """A tokenizer for streams: every id is a letter, 3 a space, 4 a line break."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join({3: " ", 4: "\n"}.get(i, chr(92 + i)) for i in tokens)


def test_streamers_show_the_text_word_by_word() -> None:
    streamer = TextStreamer(Letters())
    written = io.StringIO()
    seen = []
    with redirect_stdout(written):
        streamer.put(np.array([[5, 6, 3]]))
        for token in (7, 8, 3, 9, 4, 10):
            streamer.put(np.array([token]))
            seen.append(written.getvalue())
        streamer.end()
    assert seen == ["ab ", "ab ", "ab cd ", "ab cd ", "ab cd e\n", "ab cd e\n"]
    assert written.getvalue() == "ab cd e\nf\n"
    with pytest.raises(ValueError, match="batch size 1"):
        streamer.put(np.zeros((2, 3), int))


def test_an_iterator_streams_from_another_thread() -> None:
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
    expected = tiny().generate(prompts(1), **options)[0, 5:]
    thread = threading.Thread(
        target=tiny().generate, args=(prompts(1),), kwargs={"streamer": streamer, **options}
    )
    thread.start()
    first = next(streamer)
    assert first + "".join(streamer) == Letters().decode(expected.tolist())
    thread.join()
    assert streamer.text_queue.empty()


def test_every_token_is_a_piece_of_text_even_if_nothing_can_be_shown_yet() -> None:
    """As in 4.37.2: a user's streamer may count the calls."""
    pieces = []

    class Mine(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append((text, stream_end))

    streamer = Mine(Letters())
    for tokens in ([[5, 6]], [7], [3], [4]):
        streamer.put(np.array(tokens))
    streamer.end()
    assert pieces == [("", False), ("", False), ("abc ", False), ("\n", False), ("", True)]


def test_options_live_in_files_in_the_model_and_in_the_call(tmp_path: Path) -> None:
    model = LlamaForCausalLM(tiny().config, tiny().weights)
    model.generation_config.max_new_tokens = 4
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=np.float64)
    assert again.generation_config.max_new_tokens == 4
    assert again.generate(prompts()).shape == (2, 9)
    assert again.generate(prompts(), max_new_tokens=2).shape == (2, 7)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 4
    assert GenerationConfig.from_dict({"top_k": 3}, top_p=0.5).top_k == 3
    given_config = GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert again.generate(prompts(), generation_config=given_config).shape[1] <= 8
    with pytest.raises(AttributeError):
        _ = given_config.nonsense
    assert given_config == GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert "max_new_tokens" in repr(given_config)


def test_defaults_in_config_json_count_as_in_old_checkpoints() -> None:
    model = LlamaForCausalLM(LlamaConfig.from_dict(tiny().config.to_dict()), tiny().weights)
    for length in (7, 9):
        model.config.max_length = length  # type: ignore[attr-defined]
        assert model.generate(prompts(), eos_token_id=None).shape == (2, length)
    model.generation_config.max_length = 8
    model.config.max_length = 12  # type: ignore[attr-defined]
    assert model.generate(prompts(), eos_token_id=None).shape == (2, 8)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": 9, "pad_token_id": 0},
        {"num_beams": 3},
        {"repetition_penalty": 1.7},
        {"max_length": 9},
        {"return_dict_in_generate": True, "output_hidden_states": True},
    ],
    ids=str,
)
def test_options_given_to_from_pretrained_are_defaults_of_generate(
    saved: Path, options: dict[str, Any]
) -> None:
    without_file = LlamaForCausalLM(tiny().config, tiny().weights)
    padded = np.concatenate([np.zeros((2, 2), int), prompts()], axis=1)  # seen, if no pad is known
    expected = without_file.generate(padded, **options)
    model = LlamaForCausalLM.from_pretrained(saved, dtype=np.float64, **options)
    assert {name: getattr(model.generation_config, name) for name in options} == options
    found = model.generate(padded)
    assert type(found) is type(expected)
    if isinstance(found, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert list(found) == list(expected)
    assert not np.array_equal(without_file.generate(padded), found)


def test_a_file_that_was_derived_from_the_configuration_follows_it_until_someone_changes_it(
    saved: Path,
) -> None:
    model = LlamaForCausalLM.from_pretrained(saved, dtype=np.float64)
    assert model.generation_config._from_model_config
    model.config.max_length = 9
    assert model.generate(prompts(), eos_token_id=None).shape == (2, 9)
    model.config.max_length = 11
    assert model.generate(prompts(), eos_token_id=None).shape == (2, 11)
    model.generation_config.max_length = 8
    model.config.max_length = 12
    assert model.generate(prompts(), eos_token_id=None).shape == (2, 8)
    GenerationConfig(max_length=7, eos_token_id=22).save_pretrained(saved)
    model = LlamaForCausalLM.from_pretrained(saved, dtype=np.float64)
    model.config.max_length = 9
    assert model.generate(prompts(), eos_token_id=None).shape == (2, 7)


def test_what_spoils_a_text_is_pointed_out() -> None:
    model, text = tiny(), prompts()
    masked: dict[str, Any] = {"attention_mask": [[1] * 5, [1, 1, 1, 1, 0]]}
    short = np.concatenate([text, [[3], [0]]], axis=1)
    padded: dict[str, Any] = {"pad_token_id": 0}
    for words, options in ((text, masked), (short, padded)):
        with pytest.warns(UserWarning, match="right-padding was detected"):
            model.generate(words, max_new_tokens=2, eos_token_id=None, **options)
    least: list[dict[str, Any]] = [{"min_length": 8}, {"min_new_tokens": 3}]
    for options in least:
        with pytest.warns(UserWarning, match="takes a text of 8 tokens"):
            model.generate(text, max_new_tokens=2, **options)


def test_inputs_for_the_next_step_leave_out_what_is_cached() -> None:
    model, text = tiny(), prompts()
    mask = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    first = model.prepare_inputs_for_generation(text, attention_mask=mask)
    assert first["position_ids"].tolist() == [[1, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    past = model(text[:, :4]).past_key_values
    then = model.prepare_inputs_for_generation(text, past_key_values=past, attention_mask=mask)
    assert then["input_ids"].tolist() == text[:, 4:].tolist()
    assert then["position_ids"].tolist() == [[3], [4]]
    assert model(**then).logits.shape == (2, 1, V)


# ------------------------------------------------------------------ what is off, and what follows


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": None},
        {"do_sample": None},
        {"min_length": -1},
        {"min_new_tokens": -1},
        {"no_repeat_ngram_size": -1},
        {"encoder_no_repeat_ngram_size": -1},
        {"penalty_alpha": -0.6, "top_k": 4},
        {"num_return_sequences": np.int64(1)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`do_sample` is False")
def test_what_transformers_takes_as_off_is_off(options: dict[str, Any]) -> None:
    model = tiny(eos_token_id=2)
    plain = model.generate(prompts(), max_new_tokens=6)
    np.testing.assert_array_equal(model.generate(prompts(), max_new_tokens=6, **options), plain)


@pytest.mark.parametrize("options", [{"epsilon_cutoff": 1.5}, {"eta_cutoff": 2.0}], ids=str)
def test_cutoffs_from_one_on_are_off(options: dict[str, Any]) -> None:
    call: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "rng": 3}
    plain = tiny().generate(prompts(), **call)
    np.testing.assert_array_equal(tiny().generate(prompts(), **call, **options), plain)


def test_the_models_ids_end_a_text_but_do_not_change_scores() -> None:
    free = tiny(eos_token_id=None)
    text = prompts(1)
    said = free.generate(text, max_new_tokens=6)[0, 5:].tolist()
    ends = LlamaForCausalLM(free.config, free.weights)
    ends.generation_config = GenerationConfig(eos_token_id=said[2], pad_token_id=int(text[0, 0]))
    config = GenerationConfig(max_new_tokens=6, min_new_tokens=5)
    # no minimum without an eos in the same options, and no token of the prompt taken for padding
    found = ends.generate(text, generation_config=config)
    np.testing.assert_array_equal(found[0, 5:], said[: said.index(said[2]) + 1])


def test_special_tokens_alone_do_not_change_the_options_of_a_model() -> None:
    text = prompts(1)
    plain = tiny(layers=1).generate(text, max_new_tokens=6)
    model = LlamaForCausalLM(LlamaConfig(**tiny(layers=1).config.to_dict()), dtype=np.float64)
    model.config.pad_token_id = int(text[0, 0])
    model.config.eos_token_id = int(plain[0, 6])
    np.testing.assert_array_equal(model.generate(text, max_new_tokens=6), plain)
    model.config.update({"min_length": 1})  # an option of generate(): now they are made again
    assert model.generation_config.eos_token_id == int(plain[0, 6])


def test_first_tokens_are_suppressed_after_the_last_forced_one() -> None:
    text = prompts(1)
    model = tiny(eos_token_id=None)
    forced = [[8, 22], [6, 21]]
    plain = model.generate(text, max_new_tokens=6, forced_decoder_ids=forced)
    # counted from the prompt's end, the last entry's place: 5 + 6 is beyond the text
    found = model.generate(
        text, max_new_tokens=7, forced_decoder_ids=forced, begin_suppress_tokens=list(range(3, 23))
    )
    np.testing.assert_array_equal(found[:, :11], plain)
    assert found[0, 11] < 3


def test_a_cache_that_was_given_is_given_back() -> None:
    model = tiny(eos_token_id=None)
    memory = model.new_cache(2)
    options: dict[str, Any] = {"max_new_tokens": 2, "return_dict_in_generate": True}
    out = model.generate(prompts(), past_key_values=memory, **options)
    assert out.past_key_values is memory
    assert memory.length == 6
    assert isinstance(model.generate(prompts(), **options).past_key_values, tuple)
