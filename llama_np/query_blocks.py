"""Attention for some of the queries at a time: the same attention with less work and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import numpy as np

from llama_np.tap import NO_TAP, Tap

Attend = Callable[..., np.ndarray]

BLOCK = 64  # queries; with 32 or 128 attention takes up to a quarter longer


def in_query_blocks(attend: Attend) -> Attend:
    """Let `layers.attend` handle a block of queries at a time, with only the keys that they see.

    The causal mask hides half of a prompt's scores, which then need not be computed, and the
    scores of one block stay in the cache of the processor: 512 tokens in one layer with 9 heads
    take 5 ms instead of 10. Memory grows with T instead of T x T. A tap looks at whole arrays, so
    with a tap nothing is divided. The results differ only by rounding.
    """

    @wraps(attend)
    def attend_in_blocks(
        q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, tap: Tap = NO_TAP
    ) -> np.ndarray:
        T = q.shape[2]
        if T <= BLOCK or tap is not NO_TAP:
            return attend(q, k, v, visible, tap)
        blocks = []
        for start in range(0, T, BLOCK):
            rows = slice(start, start + BLOCK)
            S = _reach(visible[:, :, rows])
            block = attend(q[:, :, rows], k[:, :, :S], v[:, :, :S], visible[:, :, rows, :S])
            blocks.append(block)
        return np.concatenate(blocks, axis=1)

    return attend_in_blocks


def _reach(visible: np.ndarray) -> int:
    """How many of the first keys contain all that is visible: (B, 1, T, S) -> 0 ... S.

    All of them for a query that sees nothing (padding): it weighs every key equally.
    """
    S = visible.shape[3]
    if not visible.any(axis=3).all():
        return S
    seen = np.logical_or.reduce(visible, axis=(0, 1, 2))
    return S - int(seen[::-1].argmax())
