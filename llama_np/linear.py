"""The one matrix product of the model, and every speed trick that it needs.

Decoding is bound by memory: a token costs one pass over all weights. What the tricks bring is
said beside them, in weights per second and core (NumPy 2.4, OpenBLAS 0.3.31, one thread, an
x86-64 machine; `tests/bench_linear.py` measures it again).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llama_np.precision import is_bf16, widen_bf16

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]

BLOCK_BYTES = 1 << 19  # of weights; a block stays in the second-level cache between two uses
BF16_BLOCK_ROWS = 256
FEW = range(2, 8)  # rows for which BLAS's matrix-matrix product is slower than its matrix-vector


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x @ weight.T + bias: (..., in), (out, in), (out,) -> (..., out), in the dtype of x.

    The weight is stored as (out, in), as in every checkpoint; bfloat16 bits are widened exactly.
    """
    rows = x.reshape(-1, x.shape[-1])  # one large product instead of many small ones
    product = strategy(len(rows), weight)(rows, weight)
    if bias is not None:
        product += bias
    return product.reshape(*x.shape[:-1], weight.shape[0])


def strategy(row_count: int, weight: np.ndarray) -> Product:
    """The product that is fastest for so many rows and this kind of weight."""
    if is_bf16(weight):
        return times_bf16
    return times_few if row_count in FEW else times


def times(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The plain product: (M, in), (out, in) -> (M, out).

    For one row NumPy passes it to the matrix-vector product, which reads weights as fast as the
    memory delivers them (7 G/s out of memory, 17 G/s out of the cache).
    """
    return rows @ weight.T


def times_few(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product for 2 to 7 rows: block after block of weights, and each block row by row.

    A block is read from memory once and from the cache afterwards. Against the plain product:
    2 rows 5.5 instead of 2.2 G/s, 4 rows 3.6 instead of 2.5, 6 rows 2.8 instead of 2.0; at 8
    rows the plain product is as fast.
    """
    product = np.empty((len(rows), len(weight)), np.result_type(rows, weight))
    step = max(1, BLOCK_BYTES // (weight.shape[1] * weight.itemsize))
    for start in range(0, len(weight), step):
        block = weight[start : start + step]
        for row, result in zip(rows, product, strict=True):
            np.dot(block, row, out=result[start : start + step])
    return product


def times_bf16(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product with weights that rest in two bytes, widened block by block in the cache.

    One row: 5 G/s, against 7 G/s for float32 weights, which take twice the memory; from 8 rows
    on there is no difference, as the arithmetic takes longer than the widening.
    """
    product = np.empty((len(rows), len(weight)), rows.dtype)
    inner = times_few if len(rows) in FEW else times
    for start in range(0, len(weight), BF16_BLOCK_ROWS):
        stop = start + BF16_BLOCK_ROWS
        product[:, start:stop] = inner(rows, widen_bf16(weight[start:stop]))
    return product
