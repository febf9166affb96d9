"""Memory that is used again: what the C library keeps, and scratch for widened weights."""

from __future__ import annotations

import threading

import numpy as np

KEPT_BYTES = 31 << 20  # glibc adapts to freed blocks of up to 32 MiB (mallopt(3))
CACHE_LINE = 32  # numbers of 16 bits


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


class Scratch(threading.local):
    """Each thread's memory for widened bfloat16: piece after piece, then again from the start.

    A piece is good until the memory has been handed out once. Pieces in always the same place
    would stay in the second-level cache, and writing there slows down the reading of weights from
    memory: one row through a model of 135 million parameters, with two worker processes, then
    takes 18 ms instead of 15.
    """

    def __init__(self, count: int) -> None:
        self.room, self.start = np.empty(count, np.uint16), 0

    def take(self, count: int) -> np.ndarray:
        """The next `count` numbers of 16 bits, from the beginning of a line of the cache."""
        if count > len(self.room):
            self.room = np.empty(count, np.uint16)
        if self.start + count > len(self.room):
            self.start = 0
        piece = self.room[self.start : self.start + count]
        self.start += -(-count // CACHE_LINE) * CACHE_LINE
        return piece
