"""Every name that `hidden_act` may have, against its formula and transformers' values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models import QUICK

from llama_np.activations import ACTIVATIONS, erf


def phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def tanh_gelu(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: float) -> float:
    return x * sigmoid(x)


FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: x * phi(x),
    "gelu_10": lambda x: max(-10, min(10, x * phi(x))),
    "gelu_accurate": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_new": tanh_gelu,
    "gelu_python": lambda x: x * phi(x),
    "gelu_pytorch_tanh": tanh_gelu,
    "laplace": lambda x: (1 + math.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))) / 2,
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "linear": lambda x: x,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
    "relu6": lambda x: min(max(x, 0), 6),
    "sigmoid": sigmoid,
    "silu": silu,
    "swish": silu,
    "tanh": math.tanh,
}

# What transformers 4.37.2 computes, to six digits, at -2, -0.5, 0.5, 2, 12.
RECORDED: dict[str, list[float]] = {
    "gelu": [-0.0455003, -0.154269, 0.345731, 1.9545, 12],
    "gelu_10": [-0.0455003, -0.154269, 0.345731, 1.9545, 10],
    "gelu_new": [-0.045402, -0.154286, 0.345714, 1.954598, 12],
    "gelu_fast": [-0.045402, -0.154286, 0.345714, 1.954598, 12],
    "silu": [-0.238406, -0.18877, 0.31123, 1.761594, 11.999926],
}


def test_every_name_has_a_formula() -> None:
    assert ACTIVATIONS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", FORMULAS)
@QUICK
@given(x=arrays(np.float64, 20, elements=st.floats(-30, 30)))
def test_every_activation_equals_its_formula(name: str, x: np.ndarray) -> None:
    """Tolerance: gelu far left is x times a difference of numbers near 1, so 30 * 1e-16."""
    expected = [FORMULAS[name](v) for v in x.tolist()]
    np.testing.assert_allclose(ACTIVATIONS[name](x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", RECORDED)
def test_activations_equal_what_transformers_computes(name: str) -> None:
    x = np.array([-2, -0.5, 0.5, 2, 12])
    np.testing.assert_allclose(ACTIVATIONS[name](x), RECORDED[name], atol=6e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_activation_overflows(name: str, dtype: Any) -> None:
    """Hidden values of real models reach some thousands."""
    x = np.array([-1e4, -1000, -89, -88, 0, 88, 89, 1000, 1e4], dtype)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y = ACTIVATIONS[name](x)
    assert np.isfinite(y).all()
    expected = [FORMULAS[name](v) if abs(v) < 700 else np.nan for v in x.tolist()]
    np.testing.assert_allclose(y, np.where(np.isnan(expected), y, expected), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_leave_their_input_alone(name: str, dtype: Any) -> None:
    x = np.linspace(-3, 3, 7, dtype=dtype)
    x.flags.writeable = False
    assert ACTIVATIONS[name](x).shape == x.shape
    assert ACTIVATIONS[name](x[::2]).dtype == dtype
    assert ACTIVATIONS[name](x[:0]).shape == (0,)
    assert ACTIVATIONS[name](x[3:4].reshape(())) == ACTIVATIONS[name](x)[3]


@QUICK
@given(arrays(np.float64, 50, elements=st.floats(-10, 10)))
def test_erf_is_exact_to_the_last_digits(x: np.ndarray) -> None:
    np.testing.assert_allclose(erf(x), [math.erf(v) for v in x.tolist()], rtol=1e-15, atol=0)


def test_erf_is_smooth_where_its_ranges_meet() -> None:
    for edge in (0.46875, 4.0, 7.0):
        x = edge + np.arange(-50, 51) * 1e-15
        np.testing.assert_allclose(erf(x), [math.erf(v) for v in x.tolist()], rtol=1e-15)
        np.testing.assert_array_equal(erf(-x), -erf(x))


def test_erf_of_the_ends_and_of_nan() -> None:
    np.testing.assert_array_equal(erf(np.array([np.inf, -np.inf, 0.0])), [1, -1, 0])
    assert np.isnan(erf(np.array([np.nan]))).all()
