"""The one matrix product of the model, and every speed trick that it needs."""

from __future__ import annotations

import numpy as np

from llama_np.precision import is_bf16, widen_bf16

BLOCK_ROWS = 256  # rows of bfloat16 weights that are widened at a time


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x @ weight.T + bias: (..., in), (out, in), (out,) -> (..., out), in the dtype of x.

    The weight is stored as (out, in), as in every checkpoint; bfloat16 bits are widened exactly.
    """
    rows = x.reshape(-1, x.shape[-1])  # one large product instead of many small ones
    product = _times_bf16(rows, weight) if is_bf16(weight) else rows @ weight.T
    if bias is not None:
        product += bias
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _times_bf16(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product with weights that rest in two bytes, widened block by block."""
    product = np.empty((len(rows), len(weight)), rows.dtype)
    for start in range(0, len(weight), BLOCK_ROWS):
        block = widen_bf16(weight[start : start + BLOCK_ROWS])
        product[:, start : start + BLOCK_ROWS] = rows @ block.T
    return product
