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
