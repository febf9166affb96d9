"""Number formats that NumPy lacks: bfloat16 and the two 8-bit floats, as bits and as float32."""

from __future__ import annotations

import sys

import numpy as np

PIECE = 1 << 14  # numbers that are rounded at a time: the intermediate results stay in the cache


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """Turn bfloat16 bits (uint16) into the float32 numbers that they stand for, exactly.

    A bfloat16 is the upper half of a float32: same sign, same exponent, 7 bits of fraction. As a
    uint32 it is the lower half. So numbers are converted to uint32 in place of the float32, but
    two bytes beside it: every upper half receives its bits and every lower half zeros. For 135
    million numbers that takes 12 ms, where a conversion and a shift by 16 take 19.
    """
    halves = np.empty(2 * bits.size + 2, np.uint16)
    halves[0] = halves[-1] = 0  # the lower half that no conversion reaches, at one end
    places, numbers = places_to_widen(bits.shape, halves)
    places[...] = bits
    return numbers


def places_to_widen(shape: tuple[int, ...], halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where to put bfloat16 bits, and the float32 numbers of that shape that they are there.

    halves: memory of 2 * size + 2 uint16 with zeros at both ends.
    """
    numbers = halves[:-2] if sys.byteorder == "little" else halves[2:]
    return halves[1:-1].view(np.uint32).reshape(shape), numbers.view(np.float32).reshape(shape)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; returns the bits (uint16).

    NaN stays NaN, and what rounds beyond the largest bfloat16 becomes infinity (IEEE 754).
    """
    with np.errstate(over="ignore"):  # a float64 may be too large for a float32
        numbers = np.asarray(x, dtype=np.float32, order="C")
    rounded = np.empty(numbers.shape, np.uint16)
    source, target = numbers.reshape(-1), rounded.reshape(-1)
    for start in range(0, source.size, PIECE):
        target[start : start + PIECE] = _nearest_bf16(source[start : start + PIECE])
    return rounded


def _nearest_bf16(x: np.ndarray) -> np.ndarray:
    """Float32 to bfloat16 bits, still in 32 bits wide integers."""
    bits = x.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(x), quiet_nan, rounded)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16 value and keep the dtype (float64 goes through float32)."""
    return widen_bf16(to_bf16(x)).astype(x.dtype, copy=False)


def round_f16(x: np.ndarray) -> np.ndarray:
    """Round to the nearest float16 value and keep the dtype; beyond 65504 becomes infinity."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(x.dtype, copy=False)


def _float8_table(exponent_bits: int, has_infinity: bool) -> np.ndarray:
    """The 256 values of an 8-bit float with the given number of exponent bits, as float32."""
    fraction_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    code = np.arange(256)
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent = (code >> fraction_bits) & (2**exponent_bits - 1)
    fraction = (code & (2**fraction_bits - 1)) / 2**fraction_bits
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    values = sign * np.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)
    top = exponent == 2**exponent_bits - 1
    if has_infinity:
        values[top] = np.where(fraction[top] == 0, sign[top] * np.inf, np.nan)
    else:  # E4M3FN spends the top exponent on numbers and keeps one NaN of each sign
        values[(code & 0x7F) == 0x7F] = np.nan
    return values.astype(np.float32)


FLOAT8_E4M3 = _float8_table(exponent_bits=4, has_infinity=False)
FLOAT8_E5M2 = _float8_table(exponent_bits=5, has_infinity=True)


def is_bf16(array: np.ndarray) -> bool:
    """True for weights that rest as bfloat16 bits: uint16 is used for nothing else here."""
    return array.dtype == np.uint16


def widen(array: np.ndarray) -> np.ndarray:
    """Return the array as it is, or as float32 when it rests as bfloat16 bits."""
    return widen_bf16(array) if is_bf16(array) else array
