"""The catalogue: every mistake changes the model, and says how to mend it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from golden_models import IDS, golden, plain, tiny
from models import SCALINGS, tiny_model

from llama_np.experiment import Run, error, evaluate, one_call
from llama_np.mistakes import BY_ID, CATALOGUE, Mistake, variants
from llama_np.trace import make_run

REQUIRED = """
rope_interleaved rope_not_applied rope_reversed rope_theta rope_scaling_ignored rope_low_precision
rope_full_dim_exponent position_plus_one_decode position_zero_decode position_restart gqa_tile
kv_head_modulo attn_scale_missing attn_scale_d_model causal_mask_missing causal_mask_strict
causal_mask_not_offset cache_hole left_pad_positions softmax_low_precision gate_up_swapped act_gelu
act_gelu_tanh act_relu act_missing gate_missing rms_eps rms_eps_outside rms_layernorm
rms_weight_missing rms_weight_plus_one norms_swapped final_norm_missing residual_from_norm
residual_missing q_proj_transposed o_proj_transposed qkv_bias_dropped head_untied embedding_scaled
bos_missing bos_doubled logits_row_shift weights_truncated_bf16
""".split()

# What the tiny model and its 16 positions cannot show.
NEEDS_MORE = {
    "position_low_precision": "positions above 256",
    "left_pad_positions": "a padded batch",
    "padding_attended": "a padded batch",
    "rope_scaling_ignored": "a scaled model",
    "k_permuted_for_query_heads": "head widths that divide",
    "qk_swapped": "as many key heads as query heads",
    "act_silu": "a model with another activation",
}


@pytest.mark.parametrize("name", REQUIRED)
def test_the_contract_is_kept(name: str) -> None:
    assert name in BY_ID


@pytest.mark.parametrize("mistake", CATALOGUE, ids=lambda m: m.id)
def test_every_mistake_says_what_it_is(mistake: Mistake) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]+", mistake.id) and mistake.variations
    assert mistake.cause.endswith(".") and mistake.advice
    assert all(re.fullmatch(r"[\w./-]+#\d+", thread) for thread in mistake.threads)


def test_names_are_unique() -> None:
    assert len(BY_ID) == len(CATALOGUE)


@pytest.mark.parametrize("mistake", CATALOGUE, ids=lambda m: m.id)
def test_every_mistake_changes_some_array(mistake: Mistake) -> None:
    runs = variants(mistake, plain())
    if mistake.id in NEEDS_MORE:
        assert not runs or mistake.id == "position_low_precision"
        return
    assert runs
    for run in runs:
        trace, _ = evaluate(one_call(run))
        assert any(error(trace[n], golden().tensors[n]) > 1e-6 for n in trace)


@pytest.mark.parametrize("mistake", CATALOGUE, ids=lambda m: m.id)
def test_one_call_shows_a_mistake_as_many_calls_do(mistake: Mistake) -> None:
    for run in variants(mistake, plain()):
        single, _ = evaluate(one_call(run))
        stepwise, _ = evaluate(run)
        worst = max(error(single[name], stepwise[name]) for name in single)
        assert worst < 1e-12  # float64 sums in another order


@pytest.mark.parametrize("mistake", CATALOGUE, ids=lambda m: m.id)
def test_a_mistake_leaves_the_given_weights_alone(mistake: Mistake) -> None:
    before = {name: array.copy() for name, array in tiny()[1]["model.layers.0"].items()}
    for run in variants(mistake, plain()):
        evaluate(one_call(run), names=frozenset(["lm_head"]))
    for name, array in tiny()[1]["model.layers.0"].items():
        assert np.array_equal(array, before[name])


def logits(run: Run) -> np.ndarray:
    return evaluate(one_call(run), names=frozenset(["lm_head"]))[0]["lm_head"]


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaling_can_be_ignored(kind: str) -> None:
    run = make_run(tiny_model(rope_scaling=SCALINGS[kind]), IDS)
    forms = variants(BY_ID["rope_scaling_ignored"], run)
    assert forms and all(error(logits(form), logits(run)) > 1e-3 for form in forms)


def test_padding_mistakes_touch_only_the_padded_row() -> None:
    run = make_run(tiny(), [IDS, IDS[:5]], decode=3)
    run = replace(run, tokens=evaluate(run)[1])
    right = logits(run)
    for name in ("left_pad_positions", "padding_attended"):
        for form in variants(BY_ID[name], run)[:2]:
            wrong = logits(form)
            assert error(wrong[:1], right[:1]) < 1e-12 and error(wrong[1:], right[1:]) > 1e-3


def test_counting_all_padding_as_positions_is_equivalent() -> None:
    run = make_run(tiny(), [IDS, IDS[:5]], decode=3)
    run = replace(run, tokens=evaluate(run)[1])
    shifted = variants(BY_ID["left_pad_positions"], run)[2]
    assert error(logits(shifted), logits(run)) < 1e-12


def test_keys_can_be_permuted_for_the_wrong_number_of_heads() -> None:
    run = make_run(tiny_model(num_attention_heads=6, num_key_value_heads=3, head_dim=8), IDS)
    (form,) = variants(BY_ID["k_permuted_for_query_heads"], run)
    assert error(logits(form), logits(run)) > 1e-3


def test_bfloat16_positions_collapse_above_256() -> None:
    config, weights = tiny_model(np.float64)
    run = make_run((config, weights), [1] * 262)
    (form,) = variants(BY_ID["position_low_precision"], run)
    trace, _ = evaluate(form, names=frozenset(["model.rotary_emb.cos"]))
    cos = trace["model.rotary_emb.cos"][0]
    assert np.array_equal(cos[256], cos[257]) and not np.array_equal(cos[255], cos[256])


def test_mistakes_can_be_combined() -> None:
    (one,) = variants(BY_ID["act_relu"], plain())
    both = variants(BY_ID["causal_mask_strict"], one)[0]
    other = variants(BY_ID["causal_mask_strict"], plain())[0]
    assert error(logits(both), logits(one)) > 1e-3 and error(logits(both), logits(other)) > 1e-3


def weights(name: str, form: int = 0) -> np.ndarray:
    """Attention weights of the first layer and head: 16 tokens, the prompt in calls of 7 and 5."""
    key = "model.layers.0.self_attn.weights"
    run = variants(BY_ID[name], plain())[form]
    return evaluate(one_call(run), names=frozenset([key]))[0][key][0, 0]


def test_masks_hide_what_they_say() -> None:
    seen = weights("causal_mask_one_ahead") > 0
    assert seen[2, 3] and not seen[2, 4] and not seen[6, 7] and not seen[13, 14]
    alone = weights("causal_mask_one_ahead", 1) > 0
    assert alone[6, 7] and alone[13, 14] and not alone[6, 8]
    assert (weights("causal_mask_missing", 1) > 0).all()
    assert (weights("sliding_window")[15] > 0).tolist() == [False] * 8 + [True] * 8
    assert (weights("cache_oldest_lost", 1)[14] > 0).tolist() == [False] * 3 + [True] * 12 + [False]
    assert weights("causal_mask_strict", 3)[:2, :2].tolist() == [[1, 0], [1, 0]]


def test_weights_need_not_sum_to_one() -> None:
    right = evaluate(plain(), names=frozenset(["model.layers.0.self_attn.weights"]))[0]
    right = right["model.layers.0.self_attn.weights"][0, 0]
    after = weights("causal_mask_after_softmax")
    assert after[0].sum() < 1 and np.allclose(after[6], right[6]) and not np.triu(after, 1).any()
    fewer = weights("softmax_off_by_one")
    assert np.allclose(fewer, right / (1 + right.max(axis=-1, keepdims=True)))


def test_slots_are_shown_where_they_were_written() -> None:
    by_slot, by_token = weights("cache_slot_too_early"), weights("cache_slot_too_early", 1)
    assert np.array_equal(by_slot[:12], by_token[:12])  # the prompt has 12 tokens
    assert not by_token[12:, 11].any() and not by_slot[12, 12:].any()
    assert np.array_equal(by_slot[14, 11:14], by_token[14, 12:15])


def first_layer(run: Run, *names: str) -> list[np.ndarray]:
    keys = [f"model.layers.0.{name}" for name in names]
    trace = evaluate(one_call(run), names=frozenset(keys))[0]
    return [trace[key][0] for key in keys]


def test_tokens_are_mixed_within_their_call_only() -> None:
    config = tiny()[0]
    forms = variants(BY_ID["heads_untransposed"], plain())
    right = first_layer(plain(), "self_attn.q_rot")[0]
    for form, calls in zip(forms, ((7, 5, 1, 1, 1, 1), (16,)), strict=True):
        (mixed,) = first_layer(form, "self_attn.q_rot")
        assert np.allclose(mixed[:, 15], right[:, 15]) == (calls[-1] == 1)
        q = first_layer(form, "self_attn.q_proj")[0][: calls[0]]
        unrotated = q.reshape(config.num_attention_heads, calls[0], config.head_dim)
        assert np.allclose(mixed[:, 0], unrotated[:, 0])  # position 0 is not rotated


def test_merged_heads_are_read_in_the_order_of_memory() -> None:
    form = variants(BY_ID["heads_merged_untransposed"], plain())[1]
    right, wrong = (first_layer(run, "self_attn.context")[0] for run in (plain(), form))
    H = tiny()[0].head_dim
    by_head = right.reshape(16, -1, H).swapaxes(0, 1)
    assert np.allclose(wrong.ravel(), by_head.ravel())


def test_a_part_of_a_head_keeps_its_numbers() -> None:
    config = tiny()[0]
    half = config.head_dim // 2
    q = first_layer(plain(), "self_attn.q_proj")[0].reshape(16, -1, config.head_dim)
    for form, kept in zip(
        variants(BY_ID["rope_partial"], plain()),
        (slice(half, None), slice(half), slice(config.head_dim // 4 * 2, None)),
        strict=False,
    ):
        (turned,) = first_layer(form, "self_attn.q_rot")
        assert np.allclose(turned.swapaxes(0, 1)[..., kept], q[..., kept])
        assert not np.allclose(turned.swapaxes(0, 1)[3], q[3])


def test_unrotated_keys_reach_decode_steps_only() -> None:
    right = first_layer(plain(), "self_attn.scores")[0]
    late, cached, all_cached = (
        first_layer(run, "self_attn.scores")[0]
        for run in variants(BY_ID["cache_unrotated"], plain())
    )
    for wrong in (late, cached, all_cached):
        assert np.allclose(wrong[:, :12], right[:, :12])  # the prompt has 12 tokens
    assert np.allclose(late[:, 13, :12], right[:, 13, :12])
    assert not np.allclose(cached[:, 13, 1:12], right[:, 13, 1:12])
    assert np.allclose(cached[:, 13, 13], right[:, 13, 13])
    assert not np.allclose(all_cached[:, 13, 13], right[:, 13, 13])
