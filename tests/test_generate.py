"""Facts about decoding: a row's tokens do not depend on the company it is in."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_np import KVCache, hidden_states, logits
from llama_np.checkpoint import load, load_tokenizer
from llama_np.config import Config
from llama_np.generate import Completion, StopStrings, generate, pad, prefill, stream
from llama_np.sampling import Sampling

CONFIG, WEIGHTS = load("fairytales", np.float64)
ENDLESS = replace(CONFIG, eos_token_id=())
WARM = Sampling(temperature=1.2, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
PROMPTS = st.lists(
    st.lists(st.integers(3, CONFIG.vocab_size - 1), min_size=1, max_size=9), min_size=1, max_size=4
)


def greedy_without_cache(prompt: list[int], config: Config, count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        hidden = hidden_states(np.array([ids]), WEIGHTS, config)
        ids.append(int(logits(hidden[:, -1], WEIGHTS).argmax()))
        if ids[-1] in config.eos_token_id:
            break
    return ids[len(prompt) :]


def test_greedy_decoding_equals_the_model_run_again_for_every_token() -> None:
    prompt = [1, 403, 88, 1207]
    (done,) = generate([prompt], WEIGHTS, ENDLESS, max_new_tokens=12)
    assert done.token_ids == greedy_without_cache(prompt, ENDLESS, 12)
    assert done.finish_reason == "length"


@settings(max_examples=10)
@given(PROMPTS, st.sampled_from([Sampling(), WARM]), st.integers(1, 4))
def test_a_row_of_a_batch_gives_the_same_ids_as_that_row_alone(
    prompts: list[list[int]], sampling: Sampling, batch_size: int
) -> None:
    together = generate(
        prompts, WEIGHTS, CONFIG, max_new_tokens=6, sampling=sampling, batch_size=batch_size
    )
    for i, prompt in enumerate(prompts):
        alone = generate([prompt], WEIGHTS, CONFIG, max_new_tokens=6, sampling=sampling, seeds=[i])
        assert together[i] == alone[0]


def test_rows_that_finish_make_room_for_waiting_prompts() -> None:
    prompts = [[1, 40 + 7 * i, 300 + i] for i in range(7)]
    stops = {generate([p], WEIGHTS, ENDLESS, max_new_tokens=3)[0].token_ids[2] for p in prompts}
    options = {"max_new_tokens": 9, "stop_ids": sorted(stops)}
    queued = generate(prompts, WEIGHTS, ENDLESS, batch_size=2, **options)
    assert queued == [generate([p], WEIGHTS, ENDLESS, **options)[0] for p in prompts]
    assert {done.finish_reason for done in queued} >= {"stop"}


def test_a_seed_decides_the_draw_and_another_seed_changes_it() -> None:
    hot = Sampling(temperature=2.0)
    runs = [
        generate([[1, 99]], WEIGHTS, ENDLESS, max_new_tokens=20, sampling=hot, seeds=[seed])
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_any_of_several_stop_ids_ends_a_row_and_is_part_of_its_ids() -> None:
    (free,) = generate([[1, 403]], WEIGHTS, ENDLESS, max_new_tokens=8)
    stop = free.token_ids[4]
    (done,) = generate([[1, 403]], WEIGHTS, ENDLESS, max_new_tokens=8, stop_ids=[2, stop])
    first = free.token_ids.index(stop)
    assert done.token_ids == free.token_ids[: first + 1]
    assert done.finish_reason == "stop"


def test_decoding_stops_where_the_trained_context_ends() -> None:
    short = replace(ENDLESS, max_position_embeddings=10)
    prompts = [[1] * n for n in (3, 9, 10, 14)]
    done = generate(prompts, WEIGHTS, short, max_new_tokens=100)
    assert [len(row.token_ids) for row in done] == [7, 1, 0, 0]
    assert {row.finish_reason for row in done} == {"length"}


def test_no_new_tokens_may_be_asked_for() -> None:
    assert generate([[1, 5]], WEIGHTS, CONFIG, max_new_tokens=0) == [Completion([1, 5])]


def test_log_probabilities_are_those_of_the_model() -> None:
    (done,) = generate([[1, 403]], WEIGHTS, ENDLESS, max_new_tokens=5, logprobs=3)
    hidden = hidden_states(np.array([[1, 403, *done.token_ids]]), WEIGHTS, ENDLESS)
    scores = logits(hidden, WEIGHTS)[0, 1:-1]
    expected = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    chosen = expected[np.arange(5), done.token_ids]
    np.testing.assert_allclose(done.logprobs, chosen, atol=1e-12)  # float64, other chunking
    for step, top in enumerate(done.top_logprobs):
        assert [i for i, _ in top] == np.argsort(-expected[step], kind="stable")[:3].tolist()


def test_a_cache_spares_the_prefix_and_changes_nothing() -> None:
    prompt = [1, 403, 88, 1207, 19, 640]
    cache = KVCache(CONFIG, dtype=np.float64)
    prefill([prompt[:4]], WEIGHTS, CONFIG, cache)
    (plain,) = generate([prompt], WEIGHTS, ENDLESS, max_new_tokens=6)
    (warm,) = generate([prompt], WEIGHTS, ENDLESS, max_new_tokens=6, cache=cache)
    assert warm == plain
    assert (cache.batch, cache.length) == (1, len(prompt) + 5)  # the last token was never fed


def test_long_prompts_are_prefilled_in_chunks() -> None:
    prompts = [[3 + (7 * i) % 900 for i in range(n)] for n in (300, 256, 257, 2)]
    scores = prefill(prompts, WEIGHTS, CONFIG, KVCache(CONFIG, 4, dtype=np.float64))
    for row, prompt in zip(scores, prompts, strict=True):
        alone = logits(hidden_states(np.array([prompt]), WEIGHTS, CONFIG)[:, -1], WEIGHTS)[0]
        np.testing.assert_allclose(row, alone, atol=1e-10)  # logits of order 10 in float64


def test_padding_stands_right_at_position_minus_one() -> None:
    tokens, positions = pad([[7], [8, 9, 10]])
    np.testing.assert_array_equal(tokens, [[7, 0, 0], [8, 9, 10]])
    np.testing.assert_array_equal(positions, [[0, -1, -1], [0, 1, 2]])


class Letters:
    """A decode stream whose token n is the n-th of these strings."""

    strings = ("a", "ab", "b", "c", "", "x")

    def push(self, index: int) -> str:
        return self.strings[index]

    def flush(self) -> str:
        return ""


@given(
    st.lists(st.integers(0, 5), max_size=12),
    st.lists(st.text("abcx", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_however_tokens_cut_it(
    ids: list[int], stops: list[str]
) -> None:
    writer = StopStrings(Letters(), tuple(stops))  # type: ignore[arg-type]
    whole = ""
    shown = ""
    for index in ids:
        whole += Letters.strings[index]
        text, stopped = writer.push(index)
        shown += text
        assert stopped == any(stop in whole for stop in stops)
        if stopped:
            break
        assert not any(stop in shown for stop in stops)
    shown += writer.flush()
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert shown == (whole[: min(ends)] if ends else whole)


def test_streamed_text_is_the_decoded_text() -> None:
    tokenizer = load_tokenizer("fairytales")
    ids = tokenizer.encode("The king said")
    (done,) = generate([ids], WEIGHTS, ENDLESS, max_new_tokens=30, tokenizer=tokenizer)
    whole = tokenizer.decode(ids + done.token_ids)
    assert tokenizer.decode(ids) + done.text == whole


def test_a_stop_string_ends_the_text_before_it() -> None:
    tokenizer = load_tokenizer("fairytales")
    ids = tokenizer.encode("The king said")
    (free,) = generate([ids], WEIGHTS, ENDLESS, max_new_tokens=30, tokenizer=tokenizer)
    stop = free.text[7:12]
    (done,) = generate(
        [ids], WEIGHTS, ENDLESS, max_new_tokens=30, tokenizer=tokenizer, stop_strings=[stop]
    )
    assert done.text == free.text[: free.text.index(stop)]
    assert done.finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_new_tokens": -1}, ValueError),
        ({"max_new_tokens": 1.5}, TypeError),
        ({"batch_size": 0}, ValueError),
        ({"seeds": [-1]}, ValueError),
        ({"seeds": [0, 1]}, ValueError),
        ({"stop_strings": ["x"]}, ValueError),
        ({"logprobs": -1}, ValueError),
        ({"logprobs": 1.5}, TypeError),
        ({"stop_ids": ["the"]}, TypeError),
        ({"stop_ids": [-1]}, ValueError),
        ({"sampling": {"temperature": 1}}, TypeError),
        ({"tokenizer": "fairytales"}, TypeError),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], error: type[Exception]) -> None:
    name = next(iter(options)).replace("stop_", "stop.").rstrip("s")  # "stop id", "stop strings"
    with pytest.raises(error, match=name):
        generate([[1, 5]], WEIGHTS, CONFIG, **options)


def test_texts_in_place_of_ids_are_refused() -> None:
    for prompts in ("Once", ["Once"]):
        with pytest.raises(TypeError, match="prompts are lists of token ids"):
            generate(prompts, WEIGHTS, CONFIG)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [([], ValueError), ([-1], IndexError), ([CONFIG.vocab_size], IndexError), ([1.5], TypeError)],
)
def test_wrong_prompts_are_refused(prompt: list[int], error: type[Exception]) -> None:
    with pytest.raises(error):
        list(stream([prompt], WEIGHTS, CONFIG))


def test_nan_weights_are_reported_instead_of_sampled() -> None:
    broken = WEIGHTS | {"lm_head.weight": np.full_like(WEIGHTS["lm_head.weight"], np.nan)}
    with pytest.raises(FloatingPointError, match="NaN"):
        generate([[1, 5]], broken, CONFIG)
