"""Rotary frequencies of all six scalings: formulas, published values, tables.

Tolerance in float64: 1e-13 relative; a power and a few products, each rounded to 1e-16.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from models import QUICK, SCALINGS, tiny_config
from slow_llama import slow_attention_factor, slow_frequencies, turn

from llama_np import rope
from llama_np.config import Config
from llama_np.layers import rotate


def rope_config(H: int, theta: float = 1e4, length: int = 64, **scaling: Any) -> Config:
    return tiny_config(
        head_dim=H, rope_theta=theta, max_position_embeddings=length, rope_scaling=scaling or None
    )


def frequencies(config: Config, length: int = 1) -> np.ndarray:
    kind = config.rope_scaling["rope_type"]
    return rope.SCALINGS[kind](config, np.array([[length]]))[0]


def close(a: Any, b: Any, tolerance: float = 1e-13) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=0)


# Against the formulas, for any parameters

factors = st.floats(0.5, 64)
lengths = st.integers(8, 10**6)


@st.composite
def scalings(draw: st.DrawFn, H: int) -> dict[str, Any]:
    kind = draw(st.sampled_from(list(SCALINGS)))
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        scaling["factor"] = draw(factors)
    if kind in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = draw(lengths)
    if kind == "llama3":
        scaling["low_freq_factor"] = low = draw(st.floats(0.1, 4))
        scaling["high_freq_factor"] = low + draw(st.floats(0.1, 8))
    if kind == "yarn":
        scaling |= draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "beta_fast": st.floats(8, 64),
                    "beta_slow": st.floats(0.5, 4),
                    "truncate": st.booleans(),
                    "attention_factor": st.floats(0.5, 2),
                },
            )
        )
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            scaling[name] = draw(st.lists(factors, min_size=H // 2, max_size=H // 2))
    return scaling


@QUICK
@given(data=st.data(), theta=st.floats(100, 1e7), H=st.sampled_from([4, 6, 64, 128]))
def test_every_scaling_equals_its_formula(data: st.DataObject, theta: float, H: int) -> None:
    """Tolerance: yarn's ramp divides by the width of a range, which may be as small as 0.001."""
    trained, length = data.draw(lengths), data.draw(st.integers(1, 2 * 10**6))
    config = rope_config(H, theta, trained, **data.draw(scalings(H)))
    close(frequencies(config, length), slow_frequencies(config, length), 1e-11)
    close(rope.attention_factor(config), slow_attention_factor(config))


# Check values: transformers 4.37.2 (linear, dynamic) and 5.23.0 (llama3, yarn, longrope), which
# compute in float32. Tolerance: two float32 roundings.
FLOAT32 = 2e-7


def test_default_frequencies_are_powers_of_theta() -> None:
    close(frequencies(rope_config(8)), [1, 0.1, 0.01, 0.001])


def test_linear_divides_every_frequency() -> None:
    config = rope_config(4, rope_type="linear", factor=2.0)
    close(frequencies(config), [0.5, 0.005])
    cos, _ = rope.tables(np.array([[1]]), np.ones((1, 1)), config, np.dtype(float))
    close(cos[0, 0, 0], np.cos([0.5, 0.005, 0.5, 0.005]))


def test_dynamic_raises_theta_beyond_the_trained_length_only() -> None:
    config = rope_config(4, length=8, rope_type="dynamic", factor=2.0)
    for length in (1, 7, 8):
        close(frequencies(config, length), [1, 0.01])
    close(frequencies(config, 20), [1, 0.0025])


def test_llama3_equals_the_published_values() -> None:
    published: dict[str, Any] = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    small = rope_config(
        16, 5e5, rope_type="llama3", original_max_position_embeddings=64, **published
    )
    expected = [1, 0.079403013, 0.0047007538, 9.11583134e-4, 1.76776681e-4, 3.42810235e-5]
    close(frequencies(small), [*expected, 6.64786967e-6, 1.28917316e-6], FLOAT32)
    large = rope_config(
        128, 5e5, rope_type="llama3", original_max_position_embeddings=8192, **published
    )
    expected = [3.21144611e-3, 2.16657063e-3, 1.37189368e-3, 8.56751460e-4]
    close(frequencies(large)[28:32], expected, FLOAT32)
    assert rope.attention_factor(small) == 1


def test_yarn_equals_the_published_values() -> None:
    config = rope_config(16, rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    expected = [1, 0.237170815, 0.05, 0.00790569466, 0.0025]
    close(frequencies(config)[:5], expected, FLOAT32)
    close(rope.attention_factor(config), 1.138629436, 1e-9)


def test_longrope_equals_the_published_values() -> None:
    config = rope_config(
        4,
        rope_type="longrope",
        short_factor=[1.0, 2.0],
        long_factor=[4.0, 8.0],
        original_max_position_embeddings=32,
    )
    close(rope.attention_factor(config), 1.0954451, FLOAT32)
    close(frequencies(config, 32), [1, 0.005])
    close(frequencies(config, 33), [0.25, 0.00125])
    close(frequencies(config, 32), [1, 0.005])  # and back again


def test_yarn_attention_factors() -> None:
    def factor(**scaling: Any) -> float:
        return rope.attention_factor(rope_config(8, rope_type="yarn", **scaling))

    assert factor(factor=1.0) == factor(factor=0.5) == 1
    close(factor(factor=4.0), 0.1 * math.log(4) + 1)
    assert factor(factor=4.0, attention_factor=0.7) == 0.7
    close(
        factor(factor=4.0, mscale=0.8, mscale_all_dim=0.5),
        (0.08 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
    )
    close(factor(factor=4.0, mscale=0.8), 0.1 * math.log(4) + 1)  # one of the two is ignored


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    config = rope_config(64, rope_type="yarn", factor=4.0, original_max_position_embeddings=4096)
    ratio = frequencies(config) / frequencies(rope_config(64))
    assert ratio[0] == 1
    close(ratio[-1], 0.25)
    assert (np.diff(ratio) <= 1e-15).all()


@pytest.mark.parametrize("original", [2, 4, 4096, 10**9])
def test_yarn_with_an_unusual_length_is_what_transformers_computes(original: int) -> None:
    """Its range of pairs ends before it starts, so the ramp runs backwards; or beyond them."""
    config = rope_config(
        8, 100.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=original
    )
    close(frequencies(config), slow_frequencies(config, 1))


def test_a_missing_original_length_is_the_trained_length() -> None:
    for kind in ("llama3", "yarn", "longrope"):
        scaling = dict(SCALINGS[kind])
        scaling.pop("original_max_position_embeddings")
        config = tiny_config(rope_scaling=scaling)
        assert rope.original_length(config) == config.max_position_embeddings
        named = tiny_config(rope_scaling=scaling | {"original_max_position_embeddings": 32})
        close(frequencies(config, 40), frequencies(named, 40))


def test_a_missing_factor_is_the_ratio_of_the_lengths() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    named = tiny_config(rope_scaling=scaling | {"factor": 2.0})
    close(frequencies(tiny_config(rope_scaling=scaling)), frequencies(named))


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_factor_of_1_scales_nothing(kind: str) -> None:
    config = tiny_config(rope_scaling=SCALINGS[kind] | {"factor": 1.0})
    close(frequencies(config, 100), frequencies(tiny_config()))
    assert rope.attention_factor(config) == 1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_every_row_has_the_frequencies_of_its_own_length(kind: str) -> None:
    config = tiny_config(rope_scaling=SCALINGS[kind])
    lengths = [[3], [40], [300], [16], [17]]
    together = rope.SCALINGS[kind](config, np.array(lengths))
    for row, (length,) in zip(together, lengths, strict=True):
        close(row, frequencies(config, length))


# Tables


@pytest.mark.parametrize("kind", SCALINGS)
def test_tables_rotate_like_multiplication_with_complex_numbers(kind: str) -> None:
    """Tolerance: angles up to 40, known to 1e-14."""
    config = tiny_config(rope_scaling=SCALINGS[kind])
    positions, length = np.array([[0, 1, 7, 39], [5, 5, 0, 2]]), np.array([[40], [6]])
    cos, sin = rope.tables(positions, length, config, np.dtype(float))
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6))
    y, scale = rotate(x, cos, sin), slow_attention_factor(config)
    for b in range(2):
        turns = slow_frequencies(config, int(length[b, 0]))
        for n in range(3):
            for t in range(4):
                expected = turn(x[b, n, t].tolist(), int(positions[b, t]), turns, scale)
                np.testing.assert_allclose(y[b, n, t], expected, rtol=0, atol=1e-12)


def test_tables_are_as_wide_as_a_head_and_repeat_their_half() -> None:
    config, positions = tiny_config(), np.arange(14).reshape(2, 7)
    for table in rope.tables(positions, np.ones((1, 1)), config, np.dtype(float)):
        assert table.shape == (2, 1, 7, 6)
        np.testing.assert_array_equal(table[..., :3], table[..., 3:])


@QUICK
@given(position=st.integers(0, 2**40))
def test_float64_angles_are_exact_at_far_positions(position: int) -> None:
    """cos and sin of the angle that float64 holds, rounded once to float32."""
    config = replace(tiny_config(), head_dim=2)
    cos, sin = rope.tables(np.array([[position]]), np.ones((1, 1)), config, np.dtype("f4"))
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(cos.ravel(), math.cos(position), atol=6e-8)
    np.testing.assert_allclose(sin.ravel(), math.sin(position), atol=6e-8)


def test_float32_angles_follow_the_recipe_of_transformers() -> None:
    """Exponent in float32, power in float64, rounded, its inverse and the angle in float32."""
    config = replace(tiny_config(rope_theta=5e5), head_dim=128, rope_angles="float32")
    positions = np.arange(5000, dtype=np.float32)
    exponents = np.arange(0, 128, 2, dtype=np.float32) / np.float32(128)
    inverse = np.float32(1) / (5e5 ** exponents.astype(float)).astype(np.float32)
    angles = positions[:, None] * inverse
    assert angles.dtype == np.float32
    cos, sin = rope.tables(np.arange(5000)[None], np.ones((1, 1)), config, np.dtype("f4"))
    np.testing.assert_array_equal(cos[0, 0, :, :64], np.cos(angles))
    np.testing.assert_array_equal(sin[0, 0, :, 64:], np.sin(angles))


def test_float32_angles_lose_digits_at_far_positions() -> None:
    """Why float64 is the default: the angle 131071 is known to 0.004 in float32."""
    exact = tiny_config(head_dim=128, rope_theta=5e5)
    position, dtype = np.array([[131071]]), np.dtype(float)
    a, _ = rope.tables(position, np.ones((1, 1)), exact, dtype)
    b, _ = rope.tables(position, np.ones((1, 1)), replace(exact, rope_angles="float32"), dtype)
    assert 1e-3 < np.abs(a - b).max() < 8e-3


@QUICK
@given(a=st.integers(0, 10**5), b=st.integers(0, 10**5), shift=st.integers(-(10**5), 10**5))
def test_products_depend_on_the_distance_only(a: int, b: int, shift: int) -> None:
    """Tolerance: angles up to 2e5 are known to 3e-11."""
    assume(min(a, b) + shift >= 0)
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 6))

    def product(at_q: int, at_k: int) -> float:
        turned = [
            rotate(
                x, *rope.tables(np.array([[at]]), np.ones((1, 1)), tiny_config(), np.dtype(float))
            )
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert abs(product(a, b) - product(a + shift, b + shift)) < 1e-9
