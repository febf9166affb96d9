"""The activation functions that `hidden_act` can name, with the formulas of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x)."""
    return 1 / _one_plus_exp(-x)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), the activation of LLaMA's MLP (arXiv:1702.03118)."""
    return x / _one_plus_exp(-x)


def _one_plus_exp(x: np.ndarray) -> np.ndarray:
    """1 + e^x; infinite where that is too large a number, which the callers divide by."""
    with np.errstate(over="ignore"):
        e = np.exp(x)
    e += 1
    return e


def gelu(x: np.ndarray) -> np.ndarray:
    """x * Phi(x) with the exact normal distribution function (arXiv:1606.08415)."""
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of GELU (arXiv:1606.08415, section 2)."""
    return x * (1 + np.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x**3))) / 2


def quick_gelu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(1.702 x)."""
    return x * sigmoid(1.702 * x)


def laplace(x: np.ndarray) -> np.ndarray:
    """The normal distribution function with mean sqrt(1/2) and deviation sqrt(1/(4 pi))."""
    return (1 + erf((x - 0.707107) / (0.282095 * math.sqrt(2)))) / 2


def mish(x: np.ndarray) -> np.ndarray:
    """x * tanh(softplus(x)) (arXiv:1908.08681)."""
    return x * np.tanh(np.logaddexp(x, x.dtype.type(0)))


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0)."""
    return np.maximum(x, 0)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, which NumPy lacks, to the last digits of float64.

    Source: W. J. Cody, Rational Chebyshev approximations for the error function,
    Mathematics of Computation 23 (1969): three ranges, one ratio of polynomials each.
    """
    wide = np.abs(x).astype(np.float64)
    small = wide * _ratio(np.minimum(wide, 0.46875) ** 2, _SMALL)
    medium = 1 - np.exp(-(wide**2)) * _ratio(np.clip(wide, 0.46875, 4), _MEDIUM)
    far = np.clip(wide, 4, 7)  # erf(7) is 1 in float64
    tail = far**-2 * _ratio(far**-2, _LARGE)
    large = 1 - np.exp(-(far**2)) * (1 / math.sqrt(math.pi) - tail) / far
    magnitude = np.where(wide <= 0.46875, small, np.where(wide <= 4, medium, large))
    return np.copysign(magnitude, x).astype(x.dtype)


def _ratio(x: np.ndarray, coefficients: tuple[list[float], list[float]]) -> np.ndarray:
    numerator, denominator = coefficients
    ratio: np.ndarray = np.polyval(numerator, x) / np.polyval(denominator, x)
    return ratio


# Cody's coefficients, highest power first.
_SMALL = (
    [
        1.85777706184603153e-1,
        3.16112374387056560e00,
        1.13864154151050156e02,
        3.77485237685302021e02,
        3.20937758913846947e03,
    ],
    [
        1.0,
        2.36012909523441209e01,
        2.44024637934444173e02,
        1.28261652607737228e03,
        2.84423683343917062e03,
    ],
)
_MEDIUM = (
    [
        2.15311535474403846e-8,
        5.64188496988670089e-1,
        8.88314979438837594e00,
        6.61191906371416295e01,
        2.98635138197400131e02,
        8.81952221241769090e02,
        1.71204761263407058e03,
        2.05107837782607147e03,
        1.23033935479799725e03,
    ],
    [
        1.0,
        1.57449261107098347e01,
        1.17693950891312499e02,
        5.37181101862009858e02,
        1.62138957456669019e03,
        3.29079923573345963e03,
        4.36261909014324716e03,
        3.43936767414372164e03,
        1.23033935480374942e03,
    ],
)
_LARGE = (
    [
        1.63153871373020978e-2,
        3.05326634961232344e-1,
        3.60344899949804439e-1,
        1.25781726111229246e-1,
        1.60837851487422766e-2,
        6.58749161529837803e-4,
    ],
    [
        1.0,
        2.56852019228982242e00,
        1.87295284992346725e00,
        5.27905102951428412e-1,
        6.05183413124413191e-2,
        2.33520497626869185e-3,
    ],
)

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": gelu,
    "gelu_10": lambda x: np.clip(gelu(x), -10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": laplace,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": mish,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "relu2": lambda x: relu(x) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": sigmoid,
    "silu": silu,
    "swish": silu,
    "tanh": np.tanh,
}
