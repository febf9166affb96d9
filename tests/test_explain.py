"""Naming mistakes: from everything a port may show, alone and in pairs, and never too eagerly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_models import dump, golden, mistaken, plain, tiny
from models import tiny_model
from test_mistakes import NEEDS_MORE
from test_verify import interleaved, response, top

from llama_np.experiment import (
    BFLOAT16,
    FLOAT32,
    Precision,
    Run,
    only_in_layer,
    split_name,
)
from llama_np.explain import Explanation, explain, less
from llama_np.mistakes import BY_ID, CATALOGUE, variants
from llama_np.variations import window

Dump = dict[str, np.ndarray]
TWINS = [{"gqa_tile", "kv_head_modulo"}]
VISIBLE = [m.id for m in CATALOGUE if m.id not in NEEDS_MORE]


def explained(arrays: Dump, precision: str | None = None, **options: object) -> Explanation:
    return explain(golden(), arrays, tiny(), precision=precision, **options)  # type: ignore[arg-type]


def named(found: Explanation) -> list[str]:
    return [cause.mistake for cause in found.causes]


def only(arrays: Dump, *locals_: str) -> Dump:
    return {name: a for name, a in arrays.items() if split_name(name)[1] in locals_}


@pytest.mark.parametrize("name", VISIBLE)
def test_every_mistake_is_named(name: str) -> None:
    found = explained(mistaken(name))
    assert found.verdict == "explained" and name in named(found)
    assert {name} == set(named(found)) or set(named(found)) in TWINS


FORMS = [(name, i) for name in VISIBLE for i in range(1, len(variants(BY_ID[name], plain())))]
FORMS.remove(("softmax_low_precision", 9))  # float16 throughout: rounding tips single numbers over


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_of_a_mistake_is_named(name: str, form: int) -> None:
    assert named(explained(mistaken(name, form))) == [name]


@pytest.mark.parametrize("size", [1, 5, 11])
def test_any_width_of_a_window_is_found(size: int) -> None:
    run = window(lambda run: size)(plain())
    assert run is not None
    (cause,) = explained(dump(run)).causes
    assert cause.mistake == "sliding_window" and f"The width {size} fits." in cause.cause


def test_any_penalty_of_a_soft_mask_is_found() -> None:
    (cause,) = explained(dump(less(3.25)(plain()) or plain())).causes
    assert cause.mistake == "causal_mask_soft" and "The value 3.25 fits." in cause.cause


def test_without_ids_the_tokens_are_read_from_the_embedding() -> None:
    run = plain()
    tokens = run.tokens.copy()
    tokens[0, 2] = (tokens[0, 2] + 7) % run.config.vocab_size
    arrays = dump(replace(run, tokens=tokens))
    del arrays["input_ids"]
    found = explained(arrays)
    assert found.verdict == "explained" and named(found) == ["token_ids"]
    assert "from position 2 on" in found.notes[0]


def test_nothing_is_close_to_numbers_that_are_not_finite() -> None:
    arrays = dump(plain())
    arrays["model.layers.1"] = arrays["model.layers.1"].copy()
    arrays["model.layers.1"][0, 4, 3] = np.inf
    for name in ("model.layers.2", "model.norm", "lm_head"):
        arrays[name] = np.full_like(arrays[name], np.nan)
    found = explained(arrays)
    assert found.verdict == "unexplained" and not found.closest


def test_ids_alone_are_said_to_be_all() -> None:
    found = explained({"input_ids": golden().tokens})
    assert found.verdict == "clean" and "only token ids" in found.notes[0]


@pytest.mark.parametrize(
    "name",
    ["rope_theta", "rms_eps", "gqa_tile", "cache_hole", "norms_swapped", "causal_mask_one_ahead",
     "cache_oldest_lost", "heads_untransposed", "norm_bypassed", "layer_weights_shifted"],
)  # fmt: skip
@pytest.mark.parametrize("points", [("block",), ("lm_head",)])
def test_fewer_points_are_enough(name: str, points: tuple[str, ...]) -> None:
    assert name in named(explained(only(mistaken(name), *points)))


@pytest.mark.parametrize("name", ["act_gelu", "rms_eps", "rope_reversed", "bos_missing"])
def test_five_log_probabilities_of_one_token_are_enough(name: str) -> None:
    assert named(explained(top(mistaken(name))))[0] == name


def test_a_servers_response_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "response.json"
    path.write_text(json.dumps(response(mistaken("rms_weight_missing"), "chat")))
    found = explain(golden(), path, tiny())
    assert named(found)[0] == "rms_weight_missing"


def test_greedy_ids_lead_to_the_mistake() -> None:
    wrong = mistaken("rope_not_applied")["lm_head"].argmax(axis=-1)
    found = explained({"greedy_ids": wrong})
    assert "rope_not_applied" in named(found)


@pytest.mark.parametrize("name", ["rope_interleaved", "act_relu", "rms_layernorm", "gate_missing"])
def test_mistakes_are_named_at_bfloat16(name: str) -> None:
    found = explained(mistaken(name, precision=BFLOAT16))
    assert found.report.precision == "bfloat16" and named(found)[0] == name


def test_what_drowns_in_bfloat16_is_listed() -> None:
    found = explained(dump(plain(), BFLOAT16))
    assert found.verdict == "clean" and not found.causes
    assert {"softmax_low_precision", "head_low_precision"} <= set(found.hidden)
    assert "gqa_tile" not in found.hidden


def test_a_clean_dump_has_no_cause() -> None:
    found = explained(dump(plain()))
    assert found.verdict == "clean" and found.hidden == ("position_low_precision",)


@pytest.mark.parametrize("name", VISIBLE[::6])
def test_a_mistake_outside_the_catalogue_is_unexplained(name: str) -> None:
    # Any scale of the scores and any base of the angles can be fitted: these are taken out too.
    twins = {name, "attn_scale_other", "rope_theta"} | next((t for t in TWINS if name in t), set())
    rest = [m for m in CATALOGUE if m.id not in twins]
    found = explained(mistaken(name), catalogue=rest, pairs=False)
    assert found.verdict == "unexplained" and not found.causes
    assert found.closest or "do not follow from their own inputs" in found.notes[0]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(
    "name", ["act_gelu_tanh", "o_proj_transposed", "gate_up_swapped", "residual_missing"]
)
@pytest.mark.parametrize("only_blocks", [False, True])
def test_a_mistake_in_one_layer_alone_is_named(name: str, layer: int, only_blocks: bool) -> None:
    run = only_in_layer(variants(BY_ID[name], plain())[0], layer, plain())
    assert run is not None
    arrays = dump(run)
    (cause,) = explained(only(arrays, "block") if only_blocks else arrays).causes
    assert cause.mistake == name and cause.cause.startswith(f"In layer {layer} alone: ")


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("only_blocks", [False, True])
def test_a_layer_with_the_weights_of_the_one_before_is_named(layer: int, only_blocks: bool) -> None:
    _, weights = tiny()
    twice = {**weights, f"model.layers.{layer}": weights[f"model.layers.{layer - 1}"]}
    arrays = dump(replace(plain(), weights=twice))
    (cause,) = explained(only(arrays, "block") if only_blocks else arrays).causes
    assert cause.mistake == "layer_weights_shifted"
    assert cause.cause.startswith(f"In layer {layer} alone: ")


def test_a_layer_left_out_in_the_middle_is_named_from_logits() -> None:
    assert named(explained(only(mistaken("layer_missing", 2), "lm_head"))) == ["layer_missing"]


def test_what_is_no_change_of_layers_cannot_be_in_one_layer() -> None:
    for name in ("bos_doubled", "rope_theta", "final_norm_missing"):
        assert only_in_layer(variants(BY_ID[name], plain())[0], 1, plain()) is None


def test_a_weight_of_another_layer_is_named_by_the_replay() -> None:
    _, weights = tiny()
    layer = dict(weights["model.layers.2"])
    layer["input_layernorm.weight"] = weights["model.layers.1"]["input_layernorm.weight"]
    found = explained(dump(replace(plain(), weights={**weights, "model.layers.2": layer})))
    assert found.verdict == "unexplained"
    count, op = found.notes
    assert count.endswith("1 of 66 ops do not follow from their own inputs")
    weight = "model.layers.1.input_layernorm.weight"
    assert op == f"  model.layers.2.input_layernorm: right with {weight}"


def test_an_unknown_bug_is_unexplained() -> None:
    _, weights = tiny()
    layer = weights["model.layers.1"]
    changed = {**layer, "mlp.up_proj.weight": layer["mlp.up_proj.weight"] * np.float32(1.01)}
    run = plain()
    broken = Run(**{**vars(run), "weights": {**weights, "model.layers.1": changed}})
    found = explained(dump(broken))
    assert found.verdict == "unexplained" and "gqa_tile" in found.ruled_out


@pytest.mark.parametrize(
    "pair", [("rope_reversed", "act_gelu"), ("rms_eps_outside", "final_norm_missing"),
             ("gqa_tile", "causal_mask_strict")],
)  # fmt: skip
def test_two_mistakes_are_named_together(pair: tuple[str, str]) -> None:
    first = variants(BY_ID[pair[0]], plain())[0]
    found = explained(dump(variants(BY_ID[pair[1]], first)[0]))
    assert found.verdict == "explained"
    assert set(pair) <= set(named(found))
    assert all(cause.together_with for cause in found.causes)


def test_a_dump_in_the_interleaved_layout_is_explained_too() -> None:
    assert named(explained(interleaved(mistaken("act_gelu")))) == ["act_gelu"]


def test_decoded_tokens_of_its_own_do_not_hide_the_mistake() -> None:
    run = variants(BY_ID["act_relu"], plain())[0]
    free = Run(**{**vars(run), "tokens": np.where(np.arange(16) < 12, run.tokens, -1)})
    assert named(explained(dump(free))) == ["act_relu"]


def test_other_token_ids_are_a_cause_of_their_own() -> None:
    run = plain()
    tokens = run.tokens.copy()
    tokens[0, 3] = 9
    found = explained(dump(Run(**{**vars(run), "tokens": tokens})))
    assert named(found) == ["token_ids"]


def test_causes_bring_everything_down_to_the_yardstick() -> None:
    (cause,) = explained(mistaken("rms_weight_plus_one")).causes
    assert cause.residual <= 4 * cause.yardstick and cause.advice and cause.threads
    text = json.dumps(explained(mistaken("rms_weight_plus_one")).as_dict(), allow_nan=False)
    assert set(json.loads(text)["causes"][0]) >= {"mistake", "residual", "yardstick", "advice"}


def test_broken_dumps_are_unexplained() -> None:
    arrays = dump(plain())
    arrays["model.layers.1"] = arrays["model.layers.1"] * np.nan
    assert explained(arrays, pairs=False).verdict == "unexplained"
    assert explained({}, pairs=False).verdict == "unexplained"


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("form", [0, 1, 2])  # what sees nothing: uniform weights, zeros, NaN
def test_a_row_that_sees_nothing_is_named(precision: Precision, form: int) -> None:
    arrays = mistaken("causal_mask_strict", form, precision)
    assert named(explained(arrays)) == ["causal_mask_strict"]
    assert named(explained(only(arrays, "block"))) == ["causal_mask_strict"]


@pytest.mark.parametrize("recorded", [0.0, -np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("name", ["causal_mask_reversed", "cache_prompt_lost"])
def test_scores_of_keys_that_a_mistake_hides_may_be_anything(name: str, recorded: float) -> None:
    run, arrays = variants(BY_ID[name], plain())[0], mistaken(name)
    for array in only(arrays, "self_attn.scores"):
        arrays[array] = np.where(run.visible, arrays[array], np.float32(recorded))
    assert named(explained(arrays)) == [name]


def test_missing_rows_are_no_mistake_of_the_catalogue() -> None:
    arrays = dump(plain())
    arrays["model.layers.1.mlp"] = arrays["model.layers.1.mlp"][:, :14]
    found = explained(arrays)
    assert found.verdict == "unexplained" and "all numbers" in found.notes[0]


def test_nothing_but_nan_is_not_named() -> None:
    arrays = only(mistaken("causal_mask_strict", form=2), "lm_head")
    assert np.isnan(arrays["lm_head"]).all()
    assert explained(arrays).verdict == "unexplained"


def test_another_models_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="other weights"):
        explain(golden(), dump(plain()), tiny_model(np.float32, seed=9))


@pytest.mark.parametrize(
    ("name", "change"),
    [("rope_theta", {"rope_theta": 137.5}), ("rms_eps", {"rms_norm_eps": 3e-4})],
)
def test_any_value_of_a_wrong_constant_is_found(name: str, change: dict[str, float]) -> None:
    (cause,) = explained(dump(plain().with_config(**change))).causes
    assert cause.mistake == name and f"{next(iter(change.values())):.4g}" in cause.cause


def with_head(head: np.ndarray) -> Dump:
    run, (_, weights) = plain(), tiny()
    return dump(Run(**{**vars(run), "weights": {**weights, "lm_head.weight": head}}))


def test_a_head_that_was_never_loaded_is_recognized() -> None:
    shape = tiny()[1]["lm_head.weight"].shape
    head = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert named(explained(with_head(head), pairs=False)) == ["head_untied"]


def test_other_wrong_heads_are_not_mistaken_for_it() -> None:
    head = tiny()[1]["lm_head.weight"]
    assert explained(with_head(head * np.float32(1.1)), pairs=False).verdict == "unexplained"
    noise = dump(plain())
    noise["lm_head"] = np.random.default_rng(0).normal(size=noise["lm_head"].shape)
    assert explained(noise, pairs=False).verdict == "unexplained"
