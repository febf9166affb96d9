"""The documented model classes: against recorded outputs of transformers, and as they promise.

Tolerance against recordings: that of `recorded.py`. Where two of our own float32 runs are
compared, 2e-5 relative too: they sum in different orders, as two programs do.
"""

from __future__ import annotations

import copy
import pickle
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import QUICK
from recorded import TOLERANCE, Recorded, ids, one, recorded

import llama_np
from llama_np import (
    KVCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    hf,
)
from llama_np.errors import CheckpointError, ConfigError
from llama_np.hf_base import LlamaPreTrainedModel
from llama_np.hf_weights import size_in_bytes
from llama_np.precision import round_bf16, round_f16
from llama_np.weights import read_header

DTYPES = [np.float32, np.float64]
FORWARD = recorded("forward")
CHUNKED = recorded("chunks")
PLAIN = [
    case.name
    for case in recorded("forward", class_name="LlamaForCausalLM")
    if case.inputs().keys() == {"input_ids"} and "logits_to_keep" not in case.arguments
]
# Sizes that all differ, so that a wrong shape cannot pass by luck.
SIZES: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "num_labels": 5,
}


def tiny(name: str = "LlamaForCausalLM", seed: int = 0, dtype: Any = None, **changes: Any) -> Any:
    return getattr(hf, name)(LlamaConfig(**(SIZES | changes)), seed=seed, dtype=dtype)


def random_ids(rows: int = 3, length: int = 7) -> np.ndarray:
    return np.random.default_rng(1).integers(1, SIZES["vocab_size"], (rows, length))


@cache
def loaded(name: str, dtype: Any) -> Any:
    case = one(name)
    model = getattr(hf, case.entry["class"])
    return model(LlamaConfig.from_dict(case.config), case.weights(), dtype=dtype)


def assert_same(mine: Any, other: Any, tolerance: float = TOLERANCE) -> None:
    assert np.shape(mine) == np.shape(other)
    error = np.linalg.norm(np.subtract(mine, other)) / np.linalg.norm(other)
    assert error <= tolerance, f"off by {error:.1e}"


def flat(out: Any) -> dict[str, np.ndarray]:
    """Every array of an output under the recorded names."""
    found: dict[str, np.ndarray] = {}
    for name, value in out.items():
        if name == "past_key_values":
            for i, (key, keys_value) in enumerate(value):
                found[f"{name}.{i}.key"], found[f"{name}.{i}.value"] = key, keys_value
        elif isinstance(value, tuple):
            found |= {f"{name}.{i}": array for i, array in enumerate(value)}
        else:
            found[name] = value
    return found


# ------------------------------------------------------------------ against transformers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FORWARD, ids=ids(FORWARD))
def test_every_output_equals_what_transformers_recorded(case: Recorded, dtype: Any) -> None:
    out = flat(loaded(case.name, dtype)(**case.call_inputs(), **case.arguments))
    for name in case.outputs():
        assert out[name].dtype == dtype, name
        case.assert_close(name, out[name])


@pytest.mark.parametrize("case", FORWARD, ids=ids(FORWARD))
def test_outputs_that_were_not_asked_for_are_absent(case: Recorded) -> None:
    out = loaded(case.name, np.float32)(**case.call_inputs(), **case.arguments)
    asked = case.arguments
    assert ("hidden_states" in out) == bool(asked.get("output_hidden_states"))
    assert ("attentions" in out) == bool(asked.get("output_attentions"))
    assert ("loss" in out) == ("labels" in case.inputs())
    assert ("past_key_values" in out) == asked.get("use_cache", True)


@pytest.mark.parametrize("case", CHUNKED, ids=ids(CHUNKED))
@pytest.mark.parametrize("as_pairs", [True, False])
def test_a_text_read_in_pieces_equals_what_transformers_recorded(
    case: Recorded, as_pairs: bool
) -> None:
    model, given = loaded(case.name, np.float32), case.inputs()
    past: Any = None if as_pairs else KVCache(model.config.core(), len(given["input_ids"]))
    logits, start = [], 0
    for size in case.entry["chunks"]:
        part = slice(start, start + size)
        arguments = {name: array[:, part] for name, array in given.items()}
        if "attention_mask" in given:
            arguments["attention_mask"] = given["attention_mask"][:, : part.stop]
        out = model(**arguments, past_key_values=past, **case.arguments)
        past, start = out.past_key_values, part.stop
        logits.append(out.logits)
    case.assert_close("logits", np.concatenate(logits, axis=1))
    for name, array in flat({"past_key_values": past}).items():
        case.assert_close(name, array)


@st.composite
def batches(draw: st.DrawFn, rows: int, length: int) -> tuple[Any, Any, list[slice], Any]:
    """An order of rows, how many pads stand on the left, pieces to read, and a dtype."""
    order = draw(st.permutations(range(rows)))
    pads = draw(st.integers(0, 3))
    width = length + pads
    cuts = draw(st.lists(st.integers(1, width), max_size=3).map(lambda c: sorted({0, width, *c})))
    pieces = [slice(a, b) for a, b in pairwise(cuts)]
    return list(order), pads, pieces, draw(st.sampled_from(DTYPES))


@settings(QUICK, max_examples=60)
@given(data=st.data(), name=st.sampled_from(PLAIN))
def test_any_order_padding_and_chunking_gives_the_recorded_logits(
    data: st.DataObject, name: str
) -> None:
    case = one(name)
    tokens = case.inputs()["input_ids"]
    order, pads, pieces, dtype = data.draw(batches(*tokens.shape))
    model = loaded(name, dtype)
    scaling = model.config.rope_scaling or {}
    if {scaling.get("type"), scaling.get("rope_type")} & {"dynamic", "longrope"}:
        pads, pieces = 0, [slice(0, tokens.shape[1])]  # their frequencies depend on the length
    padded = np.pad(tokens[order], ((0, 0), (pads, 0)), constant_values=3)
    mask = np.pad(np.ones_like(tokens), ((0, 0), (pads, 0)))
    past, logits = None, []
    for part in pieces:
        out = model(padded[:, part], mask[:, : part.stop], past_key_values=past)
        past = out.past_key_values
        logits.append(out.logits)
    found = np.concatenate(logits, axis=1)[:, pads:]
    case.assert_close("logits", found[np.argsort(order)])


# ------------------------------------------------------------------ arguments


def test_a_call_is_forward_and_positions_of_arguments_are_documented() -> None:
    model, tokens = tiny(), random_ids()
    mask = np.ones_like(tokens)
    mask[0, :2] = 0
    whole = model.forward(tokens, mask, np.arange(7)[None])
    assert_same(model(input_ids=tokens, attention_mask=mask).logits, whole.logits, 0)


def test_outputs_are_attributes_keys_and_positions() -> None:
    out = tiny()(random_ids(), labels=random_ids())
    assert out.loss is out["loss"] is out[0]
    assert out.logits is out["logits"] is out[1] is out[-2]
    assert out[:2] == (out.loss, out.logits)
    assert out.hidden_states is None
    assert "hidden_states" not in out
    assert list(out) == ["loss", "logits", "past_key_values"]
    assert len(out.to_tuple()) == 3
    with pytest.raises(KeyError):
        out["attentions"]
    with pytest.raises(AttributeError):
        _ = out.nonsense


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForCausalLM"])
def test_return_dict_false_gives_the_tuple_in_order(name: str) -> None:
    model, tokens = tiny(name), random_ids()
    asked = {"output_hidden_states": True, "output_attentions": True}
    out = model(tokens, **asked)
    values = model(tokens, return_dict=False, **asked)
    assert isinstance(values, tuple)
    assert len(values) == 4
    assert_same(values[0], out[0], 0)
    model.config.torchscript = True
    assert isinstance(model(tokens), tuple)
    assert len(model(tokens, use_cache=False)) == 1


def test_hidden_states_end_after_the_final_norm() -> None:
    model, tokens = tiny(), random_ids()
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4
    assert len(out.attentions) == 3
    assert out.attentions[0].shape == (3, 4, 7, 7)
    assert_same(out.hidden_states[0], model.get_input_embeddings()(tokens), 0)
    assert_same(out.hidden_states[-1], model.model(tokens).last_hidden_state, 0)
    assert_same(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)


def test_defaults_of_the_configuration_are_defaults_of_the_call() -> None:
    model = tiny(output_hidden_states=True, use_cache=False)
    out = model(random_ids())
    assert out.hidden_states is not None
    assert out.past_key_values is None
    assert model(random_ids(), output_hidden_states=False, use_cache=True).hidden_states is None


def test_only_ones_attend_and_a_4d_mask_is_used_as_it_is() -> None:
    model, tokens = tiny(), random_ids(2, 5)
    mask = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
    expected = model(tokens, mask).logits
    for other in (mask.astype(bool), mask.astype(np.float32), np.where(mask == 1, 1, 2)):
        assert_same(model(tokens, other).logits, expected, 0)
    full = np.tril(np.ones((5, 5)))[None, None] * mask[:, None, None, :]
    for as_type in (np.int64, np.float32, bool):
        assert_same(model(tokens, full.astype(as_type)).logits, expected, 0)
    both_ways = model(tokens, np.ones((2, 1, 5, 5))).logits
    assert np.abs(both_ways[:, 0] - expected[:, 0]).max() > 1e-3


@pytest.mark.parametrize(
    "shape", [(2, 4), (2, 6), (1, 5), (3, 5), (2, 5, 5), (2, 1, 5, 4), (1, 1, 5, 5), (5,)]
)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Attention mask should be of size"):
        tiny()(random_ids(2, 5), np.ones(shape))


def test_an_additive_mask_is_refused() -> None:
    mask = np.where(np.tril(np.ones((5, 5))), 0, np.finfo(np.float32).min)
    with pytest.raises(ValueError, match="additive"):
        tiny()(random_ids(2, 5), np.broadcast_to(mask, (2, 1, 5, 5)))


def test_positions_only_rotate() -> None:
    model, tokens = tiny(), random_ids(2, 5)
    shifted = model(tokens, position_ids=np.arange(100, 105)).logits
    assert_same(shifted, model(tokens).logits)  # rotation is relative, and defined everywhere
    permuted = model(tokens, position_ids=np.array([[4, 3, 2, 1, 0]]))
    assert np.abs(permuted.logits - model(tokens).logits).max() > 1e-3
    with pytest.raises(ValueError, match="position_ids"):
        model(tokens, position_ids=np.arange(4))
    with pytest.raises(TypeError, match="integers"):
        model(tokens, position_ids=np.arange(5.0))


def test_vectors_in_place_of_ids_give_the_same_logits() -> None:
    model, tokens = tiny(), random_ids()
    vectors = model.get_input_embeddings()(tokens)
    vectors.flags.writeable = False
    assert_same(model(inputs_embeds=vectors).logits, model(tokens).logits, 0)
    with pytest.raises(ValueError, match="both"):
        model(tokens, inputs_embeds=vectors)
    with pytest.raises(ValueError, match="either"):
        model()
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=vectors[..., 1:])


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([[1, -1]], IndexError),
        ([[1, 41]], IndexError),
        ([[1.0, 2.0]], TypeError),
        ([[True, False]], TypeError),
        ([1, 2], ValueError),
        ([[[1]]], ValueError),
    ],
)
def test_ids_that_are_none_are_refused(tokens: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        tiny()(np.array(tokens))


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_empty_inputs_work(shape: tuple[int, int]) -> None:
    assert tiny()(np.zeros(shape, np.int32)).logits.shape == (*shape, 41)


def test_no_row_and_no_token_are_refused_where_they_have_no_answer() -> None:
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="there is no row to continue"):
            tiny().generate(np.zeros((0, 3), np.int64), max_new_tokens=2, **options)
    classifier = LlamaForSequenceClassification(tiny().config)
    with pytest.raises(ValueError, match="a text without tokens has no class"):
        classifier(np.zeros((1, 0), np.int64))


def test_given_pairs_are_never_changed_and_give_pairs_back() -> None:
    model, tokens = tiny(), random_ids()
    past = model(tokens[:, :4]).past_key_values
    before = [(key.copy(), value.copy()) for key, value in past]
    for key, value in past:
        key.flags.writeable = value.flags.writeable = False
    whole = model(tokens).logits
    for given_past in (past, list(past)):
        out = model(tokens[:, 4:], past_key_values=given_past)
        assert isinstance(out.past_key_values, tuple)
        assert_same(out.logits, whole[:, 4:])
    assert all((a == b).all() for pair, old in zip(past, before, strict=True)
               for a, b in zip(pair, old, strict=True))  # fmt: skip
    assert past[1][0].shape == (3, 2, 4, 6)


def test_a_cache_is_extended_and_given_back() -> None:
    model, tokens = tiny(), random_ids()
    cache = model.init_cache(3, 9)
    first = model(tokens[:, :4], past_key_values=cache, attention_mask=np.ones((3, 9)))
    assert first.past_key_values is cache
    assert cache.length == 4
    second = model(tokens[:, 4:], past_key_values=cache)
    assert_same(second.logits, model(tokens).logits[:, 4:])
    with pytest.raises(ValueError, match="room"):
        model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="rows"):
        model(tokens[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="float64"):
        tiny(dtype=np.float64)(tokens, past_key_values=model.init_cache(3, 9))


def test_the_past_counts_without_use_cache_too() -> None:
    model, tokens = tiny(), random_ids()
    past = model(tokens[:, :4]).past_key_values
    out = model(tokens[:, 4:], past_key_values=past, use_cache=False)
    assert_same(out.logits, model(tokens).logits[:, 4:])
    assert out.past_key_values is None
    cache = model.init_cache(3, 9)
    model(tokens[:, :4], past_key_values=cache)
    for _ in range(2):  # the cache is read, not extended
        out = model(tokens[:, 4:], past_key_values=cache, use_cache=False)
        assert_same(out.logits, model(tokens).logits[:, 4:])


def test_dynamic_scaling_leaves_no_state_behind() -> None:
    model = tiny(max_position_embeddings=8, rope_scaling={"type": "dynamic", "factor": 2.0})
    before = model(random_ids(1, 5)).logits
    model(random_ids(1, 20))
    assert_same(model(random_ids(1, 5)).logits, before, 0)


def test_logits_to_keep_keeps_the_last() -> None:
    model, tokens = tiny(), random_ids()
    assert_same(model(tokens, logits_to_keep=2).logits, model(tokens).logits[:, -2:])
    some = model(tokens, logits_to_keep=np.array([0, 3])).logits
    assert_same(some, model(tokens).logits[:, [0, 3]])
    labelled = model(tokens, labels=tokens, logits_to_keep=2)
    assert labelled.logits.shape == (3, 2, 41)
    assert_same(labelled.loss, model(tokens, labels=tokens).loss, 0)


def test_classifier_needs_a_pad_id_for_several_rows() -> None:
    model = tiny("LlamaForSequenceClassification", pad_token_id=None)
    assert model(random_ids(1)).logits.shape == (1, 5)
    with pytest.raises(ValueError, match="no padding token"):
        model(random_ids(2))


def test_problem_type_is_inferred_for_each_call_unless_it_is_set() -> None:
    model, tokens = tiny("LlamaForSequenceClassification"), random_ids()
    assert model(tokens, labels=np.array([1, 4, 2])).loss > 0
    assert model.config.problem_type == "single_label_classification"
    several = np.eye(5)[:3]
    as_floats = model(tokens, labels=several).loss
    assert model.config.problem_type == "multi_label_classification"
    assert model(tokens, labels=several.astype(np.int64)).loss == as_floats
    model.config.problem_type = "regression"
    assert model(tokens, labels=several).loss != as_floats
    with pytest.raises(ValueError, match="labels"):
        model(tokens, labels=several[:2])


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_array_has_the_dtype_of_the_model(dtype: Any) -> None:
    out = tiny(dtype=dtype)(
        random_ids(), labels=random_ids(), output_attentions=True, output_hidden_states=True
    )
    assert {array.dtype for array in flat(out).values()} == {np.dtype(dtype)}
    assert tiny(dtype=dtype).dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "rounded", "error"),
    [("bfloat16", round_bf16, 0.1), (np.float16, round_f16, 0.02)],
)
def test_emulated_precisions_hold_rounded_numbers(dtype: Any, rounded: Any, error: float) -> None:
    """Errors: eight and eleven bits, amplified by three layers of large random weights."""
    model, exact = tiny(dtype=dtype), tiny()
    out = model(random_ids(), output_attentions=True, output_hidden_states=True)
    for name, array in flat(out).items():
        assert array.dtype == np.float32, name
        np.testing.assert_array_equal(array, rounded(array), err_msg=name)
    found = out.logits - exact(random_ids()).logits
    assert 1e-5 < np.abs(found).max() < error * np.abs(out.logits).max()


@pytest.mark.parametrize("name", ["half-bfloat16", "half-float16"])
def test_emulated_precisions_are_as_close_as_two_such_programs_can_be(name: str) -> None:
    """transformers rounds at other places too; both are some roundings away from the truth."""
    case = one(name)
    model = loaded(name, case.entry["dtype"])
    step = 2.0**-8 if "bfloat16" in name else 2.0**-11
    assert case.error("logits", model(**case.call_inputs()).logits) < 16 * step


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        tiny(dtype=np.int8)
    with pytest.raises(ValueError, match="nonsense"):
        tiny(dtype="nonsense")


# ------------------------------------------------------------------ weights


def test_random_weights_depend_on_the_seed_and_follow_the_configuration() -> None:
    one_model, same, other = tiny(), tiny(), tiny(seed=1)
    state = one_model.state_dict()
    assert all((state[name] == array).all() for name, array in same.state_dict().items())
    name = "model.layers.1.mlp.up_proj.weight"
    assert (state[name] != other.state_dict()[name]).all()
    assert abs(float(state[name].std()) - 0.4) < 0.05
    assert (state["model.embed_tokens.weight"][0] == 0).all()  # the padding token's row
    assert (state["model.norm.weight"] == 1).all()
    biased = tiny(attention_bias=True).state_dict()
    assert (biased["model.layers.0.self_attn.q_proj.bias"] == 0).all()


def test_a_large_random_model_costs_nothing_until_it_runs() -> None:
    assert LlamaModel(LlamaConfig()).num_parameters() == 6_607_343_616


def test_weights_are_taken_in_every_layout() -> None:
    model, tokens = tiny(), random_ids()
    expected, state = model(tokens).logits, model.state_dict()
    tree: dict[str, Any] = {}
    for name, array in state.items():
        *folders, leaf = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        matrix = array.ndim == 2
        leaf = "embedding" if "embed_tokens" in name else "kernel" if matrix else leaf
        node[leaf] = array.T if leaf == "kernel" else array
    layouts = (state, model.weights, model.params, tree, {"params": tree})
    for layout in layouts:
        assert_same(LlamaForCausalLM(model.config, layout)(tokens).logits, expected, 0)
        assert_same(tiny(seed=5)(tokens, params=layout).logits, expected, 0)
    config, weights = llama_np.load("fairytales")
    assert LlamaForCausalLM(config, weights).num_parameters() > 1e6


def test_weights_that_rest_in_two_bytes_stay_there(tmp_path: Path) -> None:
    small = tiny(dtype="bfloat16")
    model = LlamaForCausalLM(small.config, small.weights)
    assert model.dtype == np.float32
    assert model.weights["lm_head.weight"] is small.weights["lm_head.weight"]
    widened = LlamaForCausalLM(small.config, small.state_dict())
    assert_same(model(random_ids()).logits, widened(random_ids()).logits)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(again(random_ids()).logits, widened(random_ids()).logits, 0)


def test_weights_that_do_not_fit_are_refused() -> None:
    state = tiny().state_dict()
    wrong = state | {"model.norm.weight": np.ones(7, np.float32)}
    with pytest.raises(CheckpointError, match="expected \\(24,\\)"):
        LlamaForCausalLM(LlamaConfig(**SIZES), wrong)
    state.pop("lm_head.weight")
    with pytest.raises(CheckpointError, match="lm_head"):
        LlamaForCausalLM(LlamaConfig(**SIZES), state)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", ["5GB", 3000, "2KB"])
def test_saving_and_loading_keeps_every_bit(tmp_path: Path, dtype: str, shard: Any) -> None:
    model, tokens = tiny(dtype=dtype), random_ids()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size=shard)  # over the first one
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    again = LlamaForCausalLM.from_pretrained(tmp_path, torch_dtype="auto")
    assert again.dtype == model.dtype
    assert again.config.torch_dtype == dtype
    assert_same(again(tokens).logits, model(tokens).logits, 0)
    if shard == "5GB":
        assert LlamaForCausalLM.from_pretrained(tmp_path).dtype == np.float32


def test_a_tied_head_is_stored_once_and_shared() -> None:
    model = tiny(tie_word_embeddings=True)
    assert model.weights["lm_head.weight"] is model.weights["model.embed_tokens.weight"]
    assert model.num_parameters() == tiny().num_parameters() - 41 * 24
    state = model.state_dict()
    assert (state["lm_head.weight"] == state["model.embed_tokens.weight"]).all()


def test_a_tied_head_survives_saving(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    names = read_header(tmp_path / "model.safetensors")[0]
    assert "lm_head.weight" not in names
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(again(random_ids()).logits, model(random_ids()).logits, 0)
    with pytest.warns(UserWarning, match="newly initialized"):
        LlamaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)


def test_a_bare_model_and_a_model_with_a_head_load_into_each_other(tmp_path: Path) -> None:
    whole, tokens = tiny(), random_ids()
    whole.save_pretrained(tmp_path / "whole")
    base, info = LlamaModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert info["unexpected_keys"] == ["lm_head.weight"]
    assert_same(base(tokens).last_hidden_state, whole.model(tokens).last_hidden_state, 0)
    base.save_pretrained(tmp_path / "base")
    assert not any(name.startswith("model.") for name in base.state_dict())
    with pytest.warns(UserWarning, match="newly initialized.*lm_head"):
        headed, info = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", output_loading_info=True, seed=3
        )
    assert info["missing_keys"] == ["lm_head.weight"]
    assert_same(headed.model(tokens).last_hidden_state, base(tokens).last_hidden_state, 0)
    with pytest.warns(UserWarning, match="score"):
        judge = LlamaForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=4)
    assert judge(tokens).logits.shape == (3, 4)


def test_shapes_that_differ_are_refused_or_drawn_anew(tmp_path: Path) -> None:
    tiny("LlamaForSequenceClassification").save_pretrained(tmp_path)
    load = LlamaForSequenceClassification.from_pretrained
    with pytest.raises(CheckpointError, match="score"):
        load(tmp_path, num_labels=4)
    with pytest.warns(UserWarning, match="newly initialized"):
        model, info = load(
            tmp_path, num_labels=4, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert model(random_ids()).logits.shape == (3, 4)
    assert info["mismatched_keys"] == [("score.weight", (5, 24), (4, 24))]


def test_unknown_keywords_and_formats_are_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="nonsense"):
        LlamaForCausalLM.from_pretrained(tmp_path, nonsense=1)
    LlamaForCausalLM.from_pretrained(tmp_path, device_map="auto", low_cpu_mem_usage=True)
    with pytest.raises(NotImplementedError):
        tiny().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ConfigError, match="attn_implementation"):
        LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="nonsense")
    with pytest.raises(FileNotFoundError):
        LlamaForCausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_shard_size"):
        tiny().save_pretrained(tmp_path, max_shard_size="many")


def test_embeddings_can_be_resized_and_replaced() -> None:
    model, tokens = tiny(), random_ids()
    before = model(tokens).logits
    embedding = model.resize_token_embeddings(44)
    assert embedding.weight.shape == (44, 24)
    assert model.config.vocab_size == 44
    assert_same(model(tokens).logits[..., :41], before)
    assert model(np.array([[43]])).logits.shape == (1, 1, 44)
    assert model.resize_token_embeddings(41, pad_to_multiple_of=16).weight.shape == (48, 24)
    assert_same(model.resize_token_embeddings(41).weight, tiny().get_input_embeddings().weight, 0)
    model.set_input_embeddings(np.zeros((41, 24)))
    assert (model.model(tokens).last_hidden_state == 0).all()
    model.set_output_embeddings(embedding)
    with pytest.raises(ValueError, match="expected"):
        model.set_input_embeddings(np.zeros((41, 23)))
    tied = tiny(tie_word_embeddings=True)
    tied.resize_token_embeddings(50)
    assert tied.weights["lm_head.weight"] is tied.weights["model.embed_tokens.weight"]
    assert tiny("LlamaModel").get_output_embeddings() is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_embedding_is_assigned_and_never_lost(dtype: str) -> None:
    model, tokens = tiny(dtype=dtype), random_ids()
    module = model.get_input_embeddings()
    if dtype == "bfloat16":
        for copy in (module.weight, model.state_dict()["model.embed_tokens.weight"]):
            with pytest.raises(ValueError, match="read-only"):
                copy[5] = 0
    changed = module.weight.copy()
    changed[5] = 0
    module.weight = changed
    assert_same(model.get_input_embeddings().weight, changed, 0)
    assert (model(tokens * 0 + 5, output_hidden_states=True).hidden_states[0] == 0).all()


def test_weights_can_be_tied_later() -> None:
    model = tiny()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.weights["lm_head.weight"] is model.weights["model.embed_tokens.weight"]
    assert model.num_parameters() == tiny(tie_word_embeddings=True).num_parameters()


def test_params_can_be_assigned() -> None:
    model, other, tokens = tiny(), tiny(seed=5), random_ids()
    model.params = other.params
    assert_same(model(tokens).logits, other(tokens).logits, 0)
    with pytest.raises(CheckpointError, match="lm_head"):
        model.params = tiny("LlamaModel").params


def test_what_torch_models_have_does_no_harm() -> None:
    model = tiny()
    assert model.eval() is model.train() is model.to("cpu") is model.to(device="cpu") is model
    assert model.device == "cpu" and model.training is False
    assert model.can_generate() and not LlamaModel.can_generate()
    base = model.model
    assert base.base_model is base
    assert model.get_decoder().weights is model.base_model.weights is model.weights
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - 41 * 24
    assert llama_np.FlaxLlamaForCausalLM is LlamaForCausalLM
    assert llama_np.FlaxLlamaModel is LlamaModel


def test_a_model_knows_where_it_came_from(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).name_or_path == str(tmp_path)
    drawn = llama_np.AutoModelForCausalLM.from_config(tiny().config, torch_dtype="float64")
    assert (drawn.name_or_path, drawn.dtype) == ("", np.float64)


def test_keys_that_change_the_numbers_are_not_ignored(tmp_path: Path) -> None:
    tiny(sliding_window=None, my_note=None).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="my_note"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="sliding_window"):
        tiny(sliding_window=5)


# ------------------------------------------------------------------ copies, configurations, Flax


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_copy_of_a_model_has_weights_of_its_own(used: bool, given: bool, tmp_path: Path) -> None:
    model = tiny()
    if given:
        model.save_pretrained(tmp_path)
        model = LlamaForCausalLM.from_pretrained(tmp_path)
    before = model(random_ids()).logits if used else None
    twin = copy.deepcopy(model)
    twin.resize_token_embeddings(50)
    twin.set_input_embeddings(np.zeros((50, 24), np.float32))
    after = model(random_ids()).logits
    assert after.shape[-1] == model.vocab_size == 41
    np.testing.assert_array_equal(after, tiny()(random_ids()).logits if before is None else before)


def test_models_can_be_pickled(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    for one_model in (model, LlamaForCausalLM.from_pretrained(tmp_path)):
        twin = pickle.loads(pickle.dumps(one_model))
        np.testing.assert_array_equal(twin(random_ids()).logits, model(random_ids()).logits)
        assert twin.weights["lm_head.weight"] is twin.weights["model.embed_tokens.weight"]


def test_a_given_configuration_stays_the_callers_own(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, config=config, attn_implementation="flash_attention_2"
    )
    assert model.config._attn_implementation == "flash_attention_2"
    model.resize_token_embeddings(50)
    assert (config.vocab_size, config._attn_implementation) == (41, "eager")
    LlamaForCausalLM.from_pretrained(tmp_path, config=config)


def test_the_embedding_decides_which_tokens_there_are() -> None:
    model = tiny()
    base = model.model
    model.resize_token_embeddings(50)
    assert base(np.array([[49]])).last_hidden_state.shape == (1, 1, 24)
    other = tiny()
    other.model.resize_token_embeddings(50)
    assert other(np.array([[49]])).logits.shape == (1, 1, 41)
    with pytest.raises(IndexError):
        other(np.array([[50]]))


def flax_names(model: Any) -> dict[str, np.ndarray]:
    """A state dict under Flax's names, with Flax's (in, out) kernels."""
    named = {}
    for name, array in model.state_dict().items():
        if name.endswith("embed_tokens.weight"):
            named[name.replace("weight", "embedding")] = array
        elif array.ndim == 2:
            named[name.replace("weight", "kernel")] = np.ascontiguousarray(array.T)
        else:
            named[name] = array
    return named


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_safetensors_of_flax_are_read(shard: str, tmp_path: Path) -> None:
    model = tiny(num_key_value_heads=4)
    model.save_pretrained(tmp_path)
    LlamaPreTrainedModel.save_pretrained(
        model, tmp_path, state_dict=flax_names(model), max_shard_size=shard
    )
    for dtype in ("float32", "bfloat16"):
        read = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        direct = LlamaForCausalLM(model.config, model.weights, dtype=dtype)
        np.testing.assert_array_equal(read(random_ids()).logits, direct(random_ids()).logits)
    _, weights = llama_np.load(tmp_path)
    expected = model.weights["model.layers.1"]["mlp.up_proj.weight"]
    np.testing.assert_array_equal(weights["model.layers.1"]["mlp.up_proj.weight"], expected)


def test_msgpack_of_flax_is_named(tmp_path: Path) -> None:
    tiny().config.save_pretrained(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack.*safe_serialization=True"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_given_parameters_are_saved(tmp_path: Path) -> None:
    model, other = tiny(), tiny(seed=1)
    model.save_pretrained(tmp_path, params=other.params)
    read = LlamaForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(read(random_ids()).logits, other(random_ids()).logits)


def test_a_preallocated_cache_does_not_start_a_second_text() -> None:
    model = tiny()
    memory = model.init_cache(3, 16)
    arguments: dict[str, Any] = {"past_key_values": memory, "position_ids": np.arange(7)[None]}
    model(random_ids(), **arguments)
    with pytest.raises(ValueError, match="holds 7 tokens, up to position 6"):
        model(random_ids(), **arguments)
    assert memory.length == 7
    one_more: dict[str, Any] = {"past_key_values": memory, "position_ids": np.array([[7]])}
    model(random_ids()[:, :1], **one_more)
    with pytest.raises(ValueError, match="extended in place"):
        model(random_ids()[:, 1:2], **one_more)


def test_a_left_padded_text_goes_on_in_a_preallocated_cache() -> None:
    model = tiny()
    memory = model.init_cache(2, 16)
    mask = np.ones((2, 16), int)
    mask[:, :2] = 0
    mask[0, 2] = 0
    positions = np.maximum(mask[:, :7].cumsum(axis=1) - 1, 0)
    arguments: dict[str, Any] = {"past_key_values": memory, "attention_mask": mask}
    model(random_ids(2), position_ids=positions, **arguments)
    model(random_ids(2, 1), position_ids=positions[:, -1:] + 1, **arguments)
    assert memory.length == 8


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_only_a_language_model_generates(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}.*LlamaForCausalLM"):
        tiny(name).generate(random_ids())


def test_what_is_put_into_an_output_can_be_read() -> None:
    out = tiny()(random_ids())
    out.mine = 3
    assert (out.mine, out["mine"], out[-1]) == (3, 3, 3)
    with pytest.raises(AttributeError):
        _ = out.yours


def test_a_small_b_means_bits() -> None:
    assert [size_in_bytes(size) for size in ("40KB", "40Kb", "4KiB", "4kib")] == [
        40_000,
        5_000,
        4_096,
        4_096,
    ]
