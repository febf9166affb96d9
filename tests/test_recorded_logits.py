"""The functional core against what transformers computed, recorded in `reference_outputs/`.

Tolerance: 2e-5 relative, in float32 and in float64. The recorded numbers are float32 themselves:
when every weight moves by half a unit in the last place they move by up to 2e-6. Measured here:
1.7e-6 at most; other BLAS libraries sum in other orders and get a factor of ten.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import QUICK
from recorded import TOLERANCE, Recorded, ids, one, recorded

from llama_np import KVCache, classify, logits
from llama_np.checkpoint import canonical_names, group_by_layer, read_folder
from llama_np.config import Config, config_from_dict
from llama_np.layers import embed
from llama_np.model import hidden_states, transform
from llama_np.tap import record

DTYPES = [np.float32, np.float64]
CASES = [
    case
    for call in ("forward", "chunks")
    for case in recorded(call)
    if case.entry["class"] != "LlamaForSequenceClassification"
]
CLASSIFIED = [
    case
    for case in recorded("forward", class_name="LlamaForSequenceClassification")
    if "input_ids" in case.inputs() and "attention_mask" not in case.inputs()
]
# Cases of token ids alone: free to be cut and padded in any way.
PLAIN = [
    case.name
    for case in recorded("forward", class_name="LlamaForCausalLM")
    if case.inputs().keys() == {"input_ids"} and "logits_to_keep" not in case.arguments
]


@cache
def model(name: str, dtype: Any) -> tuple[Config, dict[str, Any]]:
    case = one(name)
    config = config_from_dict(case.config)
    tensors = canonical_names(read_folder(case.weights_folder), config)
    arrays = {name: tensor.widened().astype(dtype) for name, tensor in tensors.items()}
    return config, group_by_layer(arrays, config)


def visible_columns(mask: Any, columns: slice) -> np.ndarray:
    """Who sees whom as transformers has it: by column, where the mask is 1; 4-D as it stands."""
    if mask is not None and mask.ndim == 4:
        return np.asarray(mask == 1)
    queries, keys = np.arange(columns.start, columns.stop)[:, None], np.arange(columns.stop)
    causal = (keys <= queries)[None, None]
    return causal if mask is None else causal & (mask[:, None, None, : columns.stop] == 1)


def run(case: Recorded, dtype: Any) -> dict[str, np.ndarray]:
    """Everything that the case could have recorded, computed by `transform` with a cache."""
    config, weights = model(case.name, dtype)
    given = case.call_inputs()
    embedded = given.get("inputs_embeds")
    if embedded is None:
        embedded = embed(given["input_ids"], weights["model.embed_tokens.weight"])
    embedded = embedded.astype(dtype)
    B, T = embedded.shape[:2]
    pairs = [(k.astype(dtype), v.astype(dtype)) for k, v in given.get("past_key_values", ())]
    memory = KVCache.from_pairs(config, pairs) if pairs else KVCache(config, B, None, dtype)
    past, hidden, trace = memory.length, [], dict[str, np.ndarray]()
    positions = given.get("position_ids", np.arange(past, past + T)[None])
    for size in case.entry.get("chunks") or [T]:
        columns = slice(memory.length, memory.length + size)
        new = slice(columns.start - past, columns.stop - past)
        visible = visible_columns(given.get("attention_mask"), columns)
        x, at, tap = embedded[:, new], positions[:, new], record(trace)
        hidden.append(transform(x, weights, config, memory, at, visible, tap))
    return named(np.concatenate(hidden, axis=1), embedded, weights, config, memory, trace)


def named(
    hidden: np.ndarray,
    embedded: np.ndarray,
    weights: Any,
    config: Config,
    memory: KVCache,
    trace: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The results under the names of the recorded outputs."""
    L = config.num_hidden_layers
    found = {"last_hidden_state": hidden, "hidden_states.0": embedded, f"hidden_states.{L}": hidden}
    if "lm_head.weight" in weights:
        found["logits"] = logits(hidden, weights)
    for i in range(L):
        layer = f"model.layers.{i}"
        found[f"attentions.{i}"] = trace[layer + ".self_attn.weights"]
        found.setdefault(f"hidden_states.{i + 1}", trace[layer])
        found[f"past_key_values.{i}.key"], found[f"past_key_values.{i}.value"] = memory[i]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_every_output_equals_what_transformers_recorded(case: Recorded, dtype: Any) -> None:
    found = run(case, dtype)
    kept = case.arguments.get("logits_to_keep", 0)
    for name in case.outputs().keys() - {"loss"}:
        assert found[name].dtype == dtype
        case.assert_close(name, found[name][:, -kept:] if name == "logits" else found[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CLASSIFIED, ids=ids(CLASSIFIED))
def test_class_scores_equal_what_transformers_recorded(case: Recorded, dtype: Any) -> None:
    """transformers reads the token before the first pad, or the last one if there is none."""
    config, weights = model(case.name, dtype)
    tokens = case.inputs()["input_ids"]
    T = tokens.shape[1]
    pads = tokens == (-1 if config.pad_token_id is None else config.pad_token_id)
    last = (pads.argmax(axis=1) - 1) % T
    positions = np.where(np.arange(T) <= last[:, None], np.arange(T), -1)
    scores = classify(tokens, weights, config, positions)
    assert scores.dtype == dtype
    case.assert_close("logits", scores)


@st.composite
def layouts(draw: st.DrawFn, rows: int, length: int) -> tuple[np.ndarray, list[slice]]:
    """Positions (rows, width) with padding anywhere, and a way to cut the columns."""
    width = length + draw(st.integers(0, 4))
    positions = np.full((rows, width), -1)
    for row in positions:
        places = draw(st.permutations(range(width)))[:length]
        row[sorted(places)] = np.arange(length)
    cuts = draw(st.lists(st.integers(0, width), max_size=4).map(sorted))
    return positions, [
        slice(a, b) for a, b in zip([0, *cuts], [*cuts, width], strict=True) if a < b
    ]


def depends_on_the_length(config: Config) -> bool:
    """One pass turns all keys by the final length's frequencies, cached keys keep their own."""
    return config.rope_scaling["rope_type"] in ("dynamic", "longrope")


@settings(QUICK, max_examples=100)
@given(data=st.data(), name=st.sampled_from(PLAIN), dtype=st.sampled_from(DTYPES))
def test_any_chunking_and_padding_gives_the_recorded_logits(
    data: st.DataObject, name: str, dtype: Any
) -> None:
    case, (config, weights) = one(name), model(name, dtype)
    tokens = case.inputs()["input_ids"]
    positions, chunks = data.draw(layouts(*tokens.shape))
    if depends_on_the_length(config):
        chunks = [slice(0, positions.shape[1])]
    padded = np.random.default_rng(0).integers(0, config.vocab_size, positions.shape)
    padded[positions >= 0] = tokens.ravel()
    capacity = data.draw(st.sampled_from([None, padded.shape[1], padded.shape[1] + 9]))
    memory = KVCache(config, len(tokens), capacity, dtype)
    hidden = [
        hidden_states(padded[:, part], weights, config, memory, positions[:, part])
        for part in chunks
    ]
    found = logits(np.concatenate(hidden, axis=1), weights)[positions >= 0]
    assert found.dtype == dtype
    case.assert_close("logits", found.reshape(*tokens.shape, config.vocab_size))


@pytest.mark.parametrize("name", PLAIN)
def test_float32_stays_as_close_to_float64_as_its_rounding_allows(name: str) -> None:
    """The yardstick of every comparison above: our own float32 against our own float64."""
    tokens, results = one(name).inputs()["input_ids"], []
    for dtype in DTYPES:
        config, weights = model(name, dtype)
        results.append(logits(hidden_states(tokens, weights, config), weights))
    low, high = results
    assert np.linalg.norm(low - high) <= TOLERANCE / 4 * np.linalg.norm(high)
