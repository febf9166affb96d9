"""Where arrays lie: memory that is used again, and blocks of memory for many small arrays."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

Key = TypeVar("Key")

KEPT_BYTES = 31 << 20  # glibc adapts to freed blocks of up to 32 MiB (mallopt(3))
LINE = 64  # bytes that the processor reads from memory at once


def keep_freed_memory() -> None:
    """Let the C library keep up to 62 MiB of freed memory for the next arrays.

    A forward pass makes the same temporary arrays in every layer. By default glibc hands each of
    them back to the system, which has to fill its pages with zeros when it is made again: 48,000
    page faults, a third of the time, for 128 tokens through a model of 135 million parameters.
    Freeing one block raises the limit to twice its size (M_MMAP_THRESHOLD in mallopt(3)); the
    block is never written to, so it costs no memory. Other C libraries ignore it.
    """
    block = np.empty(KEPT_BYTES, np.uint8)
    del block


def empty_in_one_block(
    kinds: Mapping[Key, tuple[tuple[int, ...], np.dtype]],
) -> dict[Key, np.ndarray]:
    """Arrays of these shapes and dtypes, one behind the other in one block of memory.

    For a large array NumPy asks Linux for large pages, for a small one it does not. Large ones take
    the processor fewer look-ups of addresses: a model of 135 million parameters decodes 4 to 10 %
    faster.
    """
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (shape, dtype) in kinds.items()}
    starts, end = {}, 0
    for key, size in sizes.items():
        starts[key], end = end, end + -(-size // LINE) * LINE
    block = np.empty(end, np.uint8)
    return {
        key: block[starts[key] : starts[key] + sizes[key]].view(dtype).reshape(shape)
        for key, (shape, dtype) in kinds.items()
    }


class Scratch(threading.local):
    """Each thread's memory for widened bfloat16: piece after piece, then again from the start.

    A piece is good until the memory has been handed out once. It consists of zeros, or of what
    was widened there before: zeros in every lower half, which are the same for all pieces.
    Whether pieces had better come back soon, so that they stay in the second-level cache, is the
    caller's to say.
    """

    def __init__(self, count: int) -> None:
        self.room, self.start = np.zeros(count, np.uint16), 0

    def take(self, count: int, within: int) -> np.ndarray:
        """The next `count` numbers of 16 bits, from the beginning of a line of the cache.

        Once `within` numbers have been handed out, it begins again from the start.
        """
        if count > len(self.room):
            self.room = np.zeros(count, np.uint16)
        if self.start + count > min(within, len(self.room)):
            self.start = 0
        piece = self.room[self.start : self.start + count]
        self.start += -(-2 * count // LINE) * (LINE // 2)
        return piece
