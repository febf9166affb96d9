"""Replay: every faulty op, no other op, whatever was captured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from golden_models import dump, golden, mistaken, plain, tiny
from models import tiny_model
from test_mistakes import NEEDS_MORE
from test_verify import interleaved

from llama_np.experiment import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INPUT_OF,
    Place,
    Precision,
    honest_runs,
    split_name,
)
from llama_np.mistakes import BY_ID, CATALOGUE, variants
from llama_np.replay import Replayed, replay
from llama_np.trace import make_run

Dump = dict[str, np.ndarray]


def replayed(arrays: Dump, **options: object) -> Replayed:
    return replay(arrays, tiny(), **options)  # type: ignore[arg-type]


def ops(found: Replayed) -> set[str]:
    return {split_name(fault.op)[1] for fault in found.faulty}


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16, FLOAT16])
def test_honest_runs_have_no_faulty_op(precision: Precision) -> None:
    for run in honest_runs(plain()):
        found = replayed(dump(run, precision))
        assert found.verdict == "pass" and len(found.checked) == 66
        assert found.precision == precision.name


def one_by_one(array: np.ndarray, place: Place, local: str) -> np.ndarray:
    """A linear layer whose products are added one after another, as the plainest loop does."""
    x, w = place.seen[INPUT_OF[local]], place.w[local + ".weight"]
    total = np.zeros_like(array)
    for i in range(w.shape[1]):
        total += x[..., i, None] * w[:, i]
    return total + place.w.get(local + ".bias", np.zeros(1, array.dtype))


def test_the_plainest_loops_have_no_faulty_op() -> None:
    model = tiny_model(np.float32, hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    ops_of = {local: partial(one_by_one, local=local) for local in INPUT_OF}
    run = make_run(model, [1, 17, 23, 8, 40, 31])
    found = replay(dump(run.with_op_map(ops_of)), model)
    assert found.verdict == "pass" and len(found.checked) == 26


FAULTY = {
    "rope_interleaved": {"self_attn.q_rot", "self_attn.k_rot"},
    "rope_theta": {"model.rotary_emb.cos", "model.rotary_emb.sin"},
    "rms_eps_outside": {"input_layernorm", "post_attention_layernorm", "model.norm"},
    "attn_scale_missing": {"self_attn.scores"},
    "attn_scale_inverse": {"self_attn.scores"},
    "causal_mask_missing": {"self_attn.weights"},
    "gqa_tile": {"self_attn.scores", "self_attn.context"},
    "o_proj_transposed": {"self_attn.o_proj"},
    "residual_missing": {"middle", "block"},
    "act_gelu": {"mlp.act_fn"},
    "gate_missing": {"mlp.hidden"},
    "norms_swapped": {"input_layernorm", "post_attention_layernorm"},
    "final_norm_missing": {"model.norm"},
    "head_untied": {"lm_head"},
    "embedding_scaled": {"model.embed_tokens"},
}


@pytest.mark.parametrize("name", FAULTY)
def test_exactly_the_faulty_ops_are_listed(name: str) -> None:
    assert ops(replayed(mistaken(name))) == FAULTY[name]


@pytest.mark.parametrize("name", ["gqa_tile", "act_gelu", "final_norm_missing", "rope_interleaved"])
def test_the_same_ops_are_faulty_at_bfloat16(name: str) -> None:
    assert ops(replayed(mistaken(name, precision=BFLOAT16))) == FAULTY[name]


def test_every_layer_is_listed() -> None:
    faults = replayed(mistaken("act_relu")).faulty
    assert [f.op for f in faults] == [f"model.layers.{i}.mlp.act_fn" for i in range(3)]


def test_two_mistakes_are_both_found() -> None:
    names = [n for n in FAULTY if n not in ("embedding_scaled", "norms_swapped")]
    rng = np.random.default_rng(0)
    for _ in range(12):
        one, two = rng.choice(names, 2, replace=False)
        first = variants(BY_ID[one], plain())[0]
        second = variants(BY_ID[two], first)[0]
        assert ops(replayed(dump(second))) == FAULTY[one] | FAULTY[two], (one, two)


def test_gaps_are_bridged_by_the_finest_interval() -> None:
    few = ("block", "self_attn.context", "model.norm", "lm_head")
    arrays = mistaken("act_relu")
    kept = {n: a for n, a in arrays.items() if split_name(n)[1] in few or n == "input_ids"}
    assert [f.op for f in replayed(kept).faulty] == [f"model.layers.{i}" for i in range(3)]
    clean = {n: a for n, a in dump(plain()).items() if n in kept}
    assert replayed(clean).verdict == "pass"


def test_logits_alone_are_one_interval() -> None:
    arrays = mistaken("rms_eps")
    found = replayed({"input_ids": arrays["input_ids"], "lm_head": arrays["lm_head"]})
    assert [f.op for f in found.faulty] == ["lm_head"]
    assert "only lm_head could be recomputed" in found.notes[0]


def test_decode_faults_begin_at_the_decode_steps() -> None:
    fault = replayed(mistaken("cache_prompt_lost")).faulty[0]
    assert (fault.op, fault.position) == ("model.layers.0.self_attn.weights", 12)


def test_an_interleaved_dump_is_read_as_it_is() -> None:
    found = replayed(interleaved(dump(plain())))
    assert found.verdict == "pass" and found.notes == ("rotary pairs are interleaved",)
    assert ops(replayed(interleaved(mistaken("act_gelu")))) == {"mlp.act_fn"}


def test_weights_in_the_other_layout_are_a_fault_of_the_projections() -> None:
    assert ops(replayed(mistaken("rope_interleaved", form=1))) == {
        "self_attn.q_proj",
        "self_attn.k_proj",
    }


def test_shifted_positions_are_equivalent() -> None:
    run = plain()
    found = replayed(dump(replace(run, positions=run.positions + 3)))
    assert found.verdict == "pass" and "shifted by 3" in found.notes[0]


def test_without_ids_the_captured_embedding_is_the_beginning() -> None:
    arrays = mistaken("act_relu")
    del arrays["input_ids"]
    assert ops(replayed(arrays)) == {"mlp.act_fn"}
    del arrays["model.embed_tokens"]
    assert ops(replayed(arrays, golden=golden())) == {"mlp.act_fn"}
    with pytest.raises(ValueError, match="input_ids"):
        replayed(arrays)


def test_nan_is_the_fault_of_the_op_that_makes_it() -> None:
    found = replayed(mistaken("causal_mask_strict", form=2))
    assert [f.op for f in found.faulty] == ["model.layers.0.self_attn.weights"]
    without_ids = {n: a * np.nan for n, a in dump(plain()).items() if n != "input_ids"}
    assert replayed(without_ids).faulty[0].op == "model.embed_tokens"


def test_broken_dumps_do_not_pass() -> None:
    arrays = dump(plain())
    ids = {"input_ids": arrays["input_ids"]}
    assert replayed(ids).verdict == "fail"
    assert replayed(ids | {"what": np.ones(3, np.float32)}).verdict == "fail"
    assert (
        replayed(arrays | {"model.layers.1": arrays["model.layers.1"] * np.nan}).verdict == "fail"
    )
    assert replayed(arrays | {"model.norm": arrays["model.norm"][..., 1:]}).verdict == "fail"
    with pytest.raises((ValueError, TypeError)):
        replayed(arrays | {"input_ids": arrays["input_ids"] + 1000})


def test_another_models_dump_fails() -> None:
    assert replay(dump(plain()), tiny_model(np.float32, seed=3)).verdict == "fail"


def test_the_outcome_is_json() -> None:
    text = json.dumps(replayed(mistaken("act_gelu")).as_dict(), allow_nan=False)
    assert {"op", "error", "limit"} <= json.loads(text)["faulty"][0].keys()


@pytest.mark.parametrize("name", [m.id for m in CATALOGUE if m.id not in NEEDS_MORE][::4])
def test_a_mistake_is_a_faulty_op_unless_it_only_feeds_other_tokens(name: str) -> None:
    expected = "pass" if name.startswith("bos_") else "fail"
    assert replayed(mistaken(name)).verdict == expected


def test_channels_permuted_everywhere_are_equivalent() -> None:
    arrays, half = dump(plain()), np.array([2, 0, 1])
    order = np.concatenate([half, half + 3])
    for name, array in arrays.items():
        if name.endswith(("cos", "sin", "q_rot", "k_rot")):
            arrays[name] = array[..., order]
        if name.endswith(("q_proj", "k_proj")):
            arrays[name] = array.reshape(1, 16, -1, 6)[..., order].reshape(array.shape)
    assert replayed(arrays).verdict == "pass"
    clean = dump(plain())
    tables = {name: clean[name] for name in ("model.rotary_emb.cos", "model.rotary_emb.sin")}
    assert replayed(arrays | tables).verdict == "fail"


RIGHT_WITH = {  # what is found for the first faulty ops
    "gate_up_swapped": ["0.mlp.up_proj.weight", "0.mlp.gate_proj.weight", "1.mlp.up_proj.weight"],
    "norms_swapped": [
        "0.post_attention_layernorm.weight",
        "0.input_layernorm.weight",
        "1.post_attention_layernorm.weight",
    ],
    "gate_proj_transposed": [f"{i}.mlp.gate_proj.weight read as (in, out)" for i in range(3)],
    "act_relu": ["", "", ""],
}


@pytest.mark.parametrize("name", RIGHT_WITH)
@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_the_weight_with_which_an_op_is_right_is_named(name: str, precision: Precision) -> None:
    found = replayed(mistaken(name, precision=precision))
    fits = [f.right_with.removeprefix("model.layers.") for f in found.faulty]
    assert fits[:3] == RIGHT_WITH[name]
    assert all(f"right with {f.right_with}" in str(found) for f in found.faulty if f.right_with)


def test_a_head_that_should_be_tied_or_not_is_named() -> None:
    (fault,) = replayed(mistaken("head_untied")).faulty
    assert (fault.op, fault.right_with) == ("lm_head", "model.embed_tokens.weight")


def rounded_rows(matrix: np.ndarray, steps: int) -> np.ndarray:
    scale = np.abs(matrix).max(axis=1, keepdims=True) / steps
    return np.asarray(np.round(matrix / scale) * scale, matrix.dtype)


@pytest.mark.parametrize("steps", [127, 7])  # weights of 8 and 4 bits
def test_quantized_weights_are_suspected(steps: int) -> None:
    def quantized(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {k: rounded_rows(a, steps) if a.ndim == 2 else a for k, a in value.items()}

    (note,) = replayed(dump(plain().with_weights(quantized))).notes
    assert "every matrix product, and nothing else, is off" in note


def test_one_wrong_product_is_not_taken_for_quantized_weights() -> None:
    for name in ("gate_up_swapped", "head_untied", "weights_rounded_f16"):
        assert not replayed(mistaken(name)).notes


def test_quantized_weights_of_one_layer_are_suspected() -> None:
    def quantized(name: str, value: Any) -> Any:
        if name != "model.layers.1":
            return value
        mlp = [key for key in value if key.startswith("mlp") and value[key].ndim == 2]
        return {**value, **{key: rounded_rows(value[key], 127) for key in mlp}}

    found = replayed(dump(plain().with_weights(quantized)))
    assert [f.op for f in found.faulty] == [
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    (note,) = found.notes
    assert "down_proj alone: off by" in note and "quantized weights" in note


@pytest.mark.parametrize(
    ("module", "wrong"),
    [("mlp.up_proj", (5, 0)), ("self_attn.o_proj", (3, 1)), ("input_layernorm", (7,))],
)
def test_the_channel_that_one_wrong_weight_spoils_is_named(
    module: str, wrong: tuple[int, ...]
) -> None:
    def flipped(name: str, value: Any) -> Any:
        if name != "model.layers.1":
            return value
        changed = value[f"{module}.weight"].copy()
        changed[wrong] *= -1
        return {**value, f"{module}.weight": changed}

    found = replayed(dump(plain().with_weights(flipped)))
    (fault,) = found.faulty
    assert (fault.op, fault.channels) == (f"model.layers.1.{module}", wrong[:1])
    assert not found.notes and f"only in channel {wrong[0]}" in str(found)
    assert found.as_dict()["faulty"][0]["channels"] == [wrong[0]]


def test_scores_before_the_scaling_are_not_faulty() -> None:
    arrays = dump(plain())
    factor = golden().config.head_dim ** 0.5
    for name in [name for name in arrays if name.endswith("self_attn.scores")]:
        arrays[name] = arrays[name] * factor
    found = replayed(arrays)
    assert found.verdict == "pass"
    assert found.notes == ("the scores were captured before the scaling",)
    assert ops(replayed(mistaken("attn_scale_missing"))) == {"self_attn.scores"}
