"""Number formats, and that no function changes the precision of what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models import (
    QUICK,
    SCALINGS,
    B,
    T,
    at_rest_in_bf16,
    random_tokens,
    random_weights,
    tiny_config,
)

from llama_np import KVCache, activations, cache, layers, linear, model, rope
from llama_np.activations import ACTIVATIONS
from llama_np.cache import NoCache
from llama_np.precision import (
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    is_bf16,
    round_bf16,
    round_f16,
    to_bf16,
    widen,
    widen_bf16,
)
from llama_np.tap import each, record

PATTERNS = np.arange(1 << 16, dtype=np.uint16)
BFLOAT16 = PATTERNS.view(ml_dtypes.bfloat16)


def bits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


# bfloat16, float16 and the 8-bit floats


def test_every_bfloat16_is_widened_exactly() -> None:
    """All 65,536 patterns, NaN payloads included."""
    expected = (PATTERNS.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(bits(widen_bf16(PATTERNS)), bits(expected))
    np.testing.assert_array_equal(widen_bf16(PATTERNS), BFLOAT16.astype(np.float32))


def test_every_bfloat16_survives_the_way_there_and_back() -> None:
    back = to_bf16(widen_bf16(PATTERNS))
    nan = np.isnan(widen_bf16(PATTERNS))
    np.testing.assert_array_equal(back[~nan], PATTERNS[~nan])
    assert np.isnan(widen_bf16(back[nan])).all()


def test_rounding_agrees_around_every_bfloat16() -> None:
    """Each value, its midpoint to the next (ties to even), and one float32 on either side."""
    base = bits(widen_bf16(PATTERNS))
    for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (base + np.uint32(offset)).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            theirs = x.astype(ml_dtypes.bfloat16)
        ours, number = to_bf16(x), ~np.isnan(x)
        np.testing.assert_array_equal(ours[number], theirs.view(np.uint16)[number])
        assert np.isnan(widen_bf16(ours[~number])).all()


@QUICK
@given(arrays(np.float32, 50, elements=st.floats(width=32)))
def test_random_floats_round_as_ml_dtypes_rounds_them(x: np.ndarray) -> None:
    np.testing.assert_array_equal(round_bf16(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_what_lies_beyond_the_largest_number_becomes_infinity() -> None:
    for dtype in (np.float32, np.float64):
        x = np.array([3.4e38, -3.4e38, 1.0], dtype)
        np.testing.assert_array_equal(round_bf16(x), [np.inf, -np.inf, 1])
        np.testing.assert_array_equal(round_f16(x), [np.inf, -np.inf, 1])
    np.testing.assert_array_equal(round_bf16(np.array([1e300, -1e300])), [np.inf, -np.inf])


def test_every_float16_survives_rounding() -> None:
    x = PATTERNS.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(round_f16(x), x)


def test_rounding_to_float16_is_to_the_nearest_even() -> None:
    one, step = np.float32(1), np.float32(2**-10)
    x = np.array([one + step / 2, one + 3 * step / 2, one + step * 0.51], np.float32)
    np.testing.assert_array_equal(round_f16(x), [one, one + 2 * step, one + step])


@pytest.mark.parametrize("rounding", [round_bf16, round_f16])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_rounding_keeps_shape_and_dtype(rounding: Any, dtype: Any, shape: Any) -> None:
    x = np.full(shape, 1.001, dtype)
    assert rounding(x).shape == shape
    assert rounding(x).dtype == dtype


def test_rounding_takes_strided_arrays_and_leaves_them_alone() -> None:
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    kept = x.copy()
    np.testing.assert_array_equal(round_bf16(x.T[::2]), round_bf16(x).T[::2])
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize(
    ("table", "dtype"),
    [(FLOAT8_E4M3, ml_dtypes.float8_e4m3fn), (FLOAT8_E5M2, ml_dtypes.float8_e5m2)],
)
def test_all_256_values_of_the_8_bit_floats(table: np.ndarray, dtype: Any) -> None:
    expected = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(table, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(table[number]), np.signbit(expected[number]))
    assert table.dtype == np.float32


def test_only_bfloat16_bits_are_widened() -> None:
    x = np.ones(3, np.float64)
    assert widen(x) is x and not is_bf16(x)
    assert is_bf16(PATTERNS) and widen(PATTERNS).dtype == np.float32


# dtype out = dtype in, for every public function of the core

CONFIG = tiny_config()
D, H = CONFIG.hidden_size, CONFIG.head_dim
N, K = CONFIG.num_attention_heads, CONFIG.num_key_value_heads
TOKENS = random_tokens(CONFIG)
POSITIONS = np.broadcast_to(np.arange(T), (B, T))
VISIBLE = model.causal(POSITIONS, POSITIONS)

Case = Callable[[Any, Any], Any]  # (array maker, weights) -> whatever the function returns


def turns(array: Any, w: Any) -> Any:
    return rope.tables(POSITIONS, np.full((1, 1), T), CONFIG, array(1).dtype)


def stored(array: Any, w: Any) -> Any:
    memory = KVCache(CONFIG, B, dtype=array(1).dtype)
    memory.extend(POSITIONS)
    return [*memory.store(0)(array(B, K, T, H), array(B, K, T, H)), *memory[0]]


def from_pairs(array: Any, w: Any) -> Any:
    pairs = [(array(B, K, T, H), array(B, K, T, H))] * CONFIG.num_hidden_layers
    return [array for pair in KVCache.from_pairs(CONFIG, pairs) for array in pair]


def cached(array: Any, w: Any) -> Any:
    memory = KVCache(CONFIG, B, dtype=array(1).dtype)
    return [model.hidden_states(TOKENS, w, CONFIG, memory) for _ in range(2)]


def of_layer(function: Any, name: str = "model.layers.0") -> Case:
    def case(array: Any, w: Any) -> Any:
        x, store = array(B, T, D), NoCache().store(0)
        return function(x, w[name], turns(array, w), VISIBLE, CONFIG, store)

    return case


def product(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Case:
    return lambda array, w: function(array(T, D), widen(w["lm_head.weight"]))


def activation(function: Callable[[np.ndarray], np.ndarray]) -> Case:
    return lambda array, w: function(array(T))


FUNCTIONS: dict[str, Case] = {
    "activations.erf": activation(activations.erf),
    **{
        f"activations.{function.__name__}": activation(function)
        for function in ACTIVATIONS.values()
        if function.__name__ not in ("<lambda>", "tanh")
    },
    "cache.KVCache": stored,
    "cache.NoCache": lambda array, w: NoCache().store(0)(array(2), array(2)),
    "layers.attend": lambda array, w: layers.attend(
        array(B, N, T, H), array(B, K, T, H), array(B, K, T, H), VISIBLE
    ),
    "layers.decoder_layer": of_layer(layers.decoder_layer),
    "layers.embed": lambda array, w: layers.embed(TOKENS, w["model.embed_tokens.weight"]),
    "layers.merge_heads": lambda array, w: layers.merge_heads(array(B, N, T, H)),
    "layers.mlp": lambda array, w: layers.mlp(array(B, T, D), w["model.layers.0"], CONFIG),
    "layers.project": lambda array, w: layers.project("lm_head", array(B, T, D), w),
    "layers.rms_norm": lambda array, w: layers.rms_norm("model.norm", array(B, T, D), w, 1e-5),
    "layers.rotate": lambda array, w: layers.rotate(array(B, N, T, H), *turns(array, w)),
    "layers.self_attention": of_layer(layers.self_attention),
    "layers.softmax": lambda array, w: layers.softmax(array(B, T)),
    "layers.split_heads": lambda array, w: layers.split_heads(array(B, T, N * H), H),
    "linear.linear": lambda array, w: linear.linear(array(T, D), w["lm_head.weight"]),
    "linear.matmul": lambda array, w: linear.matmul(array(B, T, D), array(B, D, H)),
    "linear.times": product(linear.times),
    "linear.times_bf16": lambda array, w: linear.times_bf16(array(T, D), to_bf16(array(9, D))),
    "linear.times_few": product(linear.times_few),
    "linear.times_one": lambda array, w: linear.times_one(array(1, D), w["lm_head.weight"]),
    "linear.times_padded": product(linear.times_padded),
    "linear.times_transposed": product(linear.times_transposed),
    "linear.times_unpacked": product(linear.times_unpacked),
    "model.classify": lambda array, w: model.classify(TOKENS, w, CONFIG),
    "model.hidden_states": cached,
    "model.logits": lambda array, w: model.logits(array(B, T, D), w),
    "model.transform": lambda array, w: model.transform(array(B, T, D), w, CONFIG),
    "rope.tables": turns,
}
# Functions of whole numbers, truth values and Python floats, tested below or elsewhere.
NOT_ABOUT_FLOATS = {
    "cache.undone_on_error",
    "linear.blocks_to_widen",
    "linear.cached_strategy",
    "linear.strategy",
    "model.causal",
    "model.check_tokens",
    "rope.attention_factor",
    "rope.original_length",
    "rope.steady_length",
    "rope.stretch",
    *(f"rope.{name}" for name in ("frequencies_of", *SCALINGS)),
}


def public(module: ModuleType) -> set[str]:
    short = module.__name__.split(".")[-1]
    return {
        f"{short}.{name}"
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
        and thing.__module__ == module.__name__
    }


def test_no_function_is_forgotten() -> None:
    core = (activations, cache, layers, linear, model, rope)
    assert set().union(*map(public, core)) == FUNCTIONS.keys() | NOT_ABOUT_FLOATS


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_keeps_the_dtype(name: str, dtype: Any) -> None:
    result = FUNCTIONS[name](_maker(dtype), random_weights(CONFIG, dtype=dtype))
    for array in result if isinstance(result, list | tuple) else [result]:
        assert array.dtype == dtype


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith(("l", "m", "r"))])
def test_weights_that_rest_in_bfloat16_compute_in_float32(name: str) -> None:
    result = FUNCTIONS[name](_maker(np.float32), at_rest_in_bf16(random_weights(CONFIG)))
    for array in result if isinstance(result, list | tuple) else [result]:
        assert array.dtype == np.float32


def _maker(dtype: Any) -> Callable[..., np.ndarray]:
    rng = np.random.default_rng(0)
    return lambda *shape: rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": act} for act in ACTIVATIONS]
    + [{"rope_scaling": scaling} for scaling in SCALINGS.values()],
    ids=str,
)
def test_every_named_array_of_a_run_has_the_dtype_of_the_weights(
    changes: dict[str, Any], dtype: Any
) -> None:
    config = tiny_config(num_hidden_layers=1, **changes)
    weights, trace = random_weights(config, dtype=dtype), dict[str, np.ndarray]()
    hidden = model.hidden_states(TOKENS, weights, config, tap=record(trace))
    model.logits(hidden, weights, record(trace))
    assert {array.dtype for array in trace.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("angles", ["float32", "float64"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_are_in_the_precision_that_the_config_asks_for(kind: str, angles: str) -> None:
    config = replace(tiny_config(rope_scaling=SCALINGS[kind]), rope_angles=angles)
    for length in (3, 100):
        frequencies = rope.SCALINGS[kind](config, np.full((2, 1), length))
        assert frequencies.dtype == angles
        assert frequencies.shape in {(1, H // 2), (2, H // 2)}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scalars_are_python_numbers(kind: str) -> None:
    """A np.float64 scalar would promote every float32 array that it meets."""
    config = tiny_config(rope_scaling=SCALINGS[kind])
    assert type(rope.attention_factor(config)) is float
    assert type(rope.stretch(config)) is float
    assert type(rope.original_length(config)) is int
    assert type(config.rms_norm_eps) is float


def test_float64_really_computes_in_float64() -> None:
    """Rounding any named array to float32 on the way shows in the result."""
    weights = random_weights(CONFIG)
    exact = model.hidden_states(TOKENS, weights, CONFIG)
    through_float32 = each(lambda array: array.astype(np.float32).astype(np.float64))
    rounded = model.hidden_states(TOKENS, weights, CONFIG, tap=through_float32)
    assert 1e-9 < np.abs(exact - rounded).max() < 1e-4
