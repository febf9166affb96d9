"""In what way an array differs from what it should be.

Arithmetic that is wrong leaves traces: rows that a kernel never wrote, a factor that was
forgotten, the end of a sum that does not fill a block. Everything here is (rows, channels).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama_np.experiment import PEAK, error
from llama_np.precision import round_bf16, round_f16

CLEAR = 0.1  # a pattern explains a difference if no more than this part of it remains
FEW = 20  # scattered channels are named if they are no more than one in FEW
OUTPUTS = 256  # of a product, looked at to find where its sum ends
FORMATS = {"bfloat16": round_bf16, "float16": round_f16}
NAMED = 8  # numbers in a list


def wrong_rows(mine: np.ndarray, gold: np.ndarray, limit: float) -> np.ndarray:
    """The rows whose relative error is above the limit: their indices."""
    norms = np.linalg.norm(gold, axis=1)
    return np.flatnonzero(
        np.linalg.norm(mine - gold, axis=1) / np.where(norms > 0, norms, 1) > limit
    )


def wrong_channels(mine: np.ndarray, gold: np.ndarray, limit: float) -> tuple[int, ...]:
    """The channels that hold the whole error, if they are few, or up to half in one piece."""
    C = gold.shape[1]
    usual = np.linalg.norm(gold) / np.sqrt(C) or 1.0
    wrong = np.flatnonzero(np.linalg.norm(mine - gold, axis=0) > PEAK * limit * usual)
    one_piece = len(wrong) > 0 and wrong[-1] - wrong[0] + 1 == len(wrong) <= C // 2
    return tuple(wrong.tolist()) if one_piece or len(wrong) <= C // FEW else ()


def traces(mine: np.ndarray, gold: np.ndarray, limit: float, width: int = 0) -> Iterator[str]:
    """What the wrong rows have in common, in words.

    limit: the relative error that honest arithmetic stays below; width: of a head, where a row
    consists of heads that are computed one by one.
    """
    wrong = wrong_rows(mine, gold, limit)
    a, r = mine[wrong], gold[wrong]
    size = error(a, r)
    if not len(wrong) or not np.isfinite(size):
        return
    off = np.abs(a - r) > PEAK * limit * np.sqrt(np.square(r).mean())
    if off.any() and not a[off].any():
        yield "what is wrong is 0: never written?"
        return
    yield from _factors(a, r, CLEAR * size, width or gold.shape[1])
    for name, rounded in FORMATS.items() if len(np.unique(a)) > NAMED else ():
        if (rounded(a) == a).all() and not (rounded(r.astype(np.float32)) == r).all():
            yield f"holds {name} numbers"
            return


def _factors(a: np.ndarray, r: np.ndarray, rest: float, width: int) -> Iterator[str]:
    """Whether one factor, or one per vector of that width, leaves no more than `rest`."""
    one = _factor(a.reshape(1, -1), r.reshape(1, -1))
    if error(a, one * r) <= rest:
        yield f"{_near_one(one.item())} times what it should be"
        return
    a, r = a.reshape(-1, width), r.reshape(-1, width)  # shorter than 3, anything nearly fits
    each = _factor(a, r)
    if width > 2 and error(a, each * r) <= rest:
        yield (
            f"every vector is off by its own factor, {_near_one(each.min())} to "
            f"{_near_one(each.max())}: look at what it is divided by"
        )


def _near_one(factor: float) -> str:
    """A factor in five digits, or its distance from 1 where these would hide it."""
    off = factor - 1
    return f"1 {'-' if off < 0 else '+'} {abs(off):.1e}" if 0 < abs(off) < 1e-3 else f"{factor:.5g}"


def _factor(a: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The numbers c with which c * r is closest to a, one per row: (rows, 1)."""
    squares = (r * r).sum(axis=1, keepdims=True)
    return np.asarray((a * r).sum(axis=1, keepdims=True) / np.where(squares > 0, squares, 1))


def end_of_sum(x: np.ndarray, weight: np.ndarray, output: np.ndarray, limit: float) -> int:
    """How many of the inputs a product x @ weight.T has summed over; 0 if that explains nothing.

    x (rows, inputs), weight (outputs, inputs), output (rows, outputs).
    """
    sums = np.cumsum(x[-1] * weight[:OUTPUTS], axis=1)
    off = np.linalg.norm(sums - output[-1, : len(sums), None], axis=0)
    n = int(off.argmin()) + 1
    return n if n < x.shape[1] and error(output, x[:, :n] @ weight[:, :n].T) <= limit else 0


def listed(what: str, numbers: tuple[int, ...]) -> str:
    """Indices for people: "channel 3", "channels 3, 7", "channels 192 to 239"."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    if len(numbers) > 2 and numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{what}s {numbers[0]} to {numbers[-1]}"
    more = ", ..." if len(numbers) > NAMED else ""
    return f"{what}s {', '.join(map(str, numbers[:NAMED]))}{more}"
