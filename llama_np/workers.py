"""Worker processes that share the matrix products of decoding.

NumPy widens bfloat16 on one core, and a Python thread takes longer to wake up (65 us on the
machine of `linear`) than its share of a product takes. Processes that were forked after the
weights were loaded see the same weights, need no lock of the interpreter, and wait for work by
asking again and again for a moment: a product costs 4 us more than its parts. One pass over
135 million bfloat16 weights takes 15 ms instead of 21, two rows of float32 18 instead of 25. Where
BLAS's own threads are slow to meet, small models gain as well: one of 15 million parameters decodes
290 tokens/s instead of 205 on an AMD EPYC (Zen 4); on a faster EPYC it made no difference.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np

from llama_np.linear import (
    SHARED,
    Product,
    float_strategy,
    strategy,
    times_bf16,
    times_few,
    times_one,
    times_unpacked,
)
from llama_np.precision import is_bf16
from llama_np.threads import BLAS_LIMIT, avx512_kernels, cores, set_blas_threads

MOST_ROWS = 32  # of x for which sharing pays; BLAS's own threads do as well for more
MOST_FLOAT_ROWS = 5  # without widening, unless BLAS need not copy the weights (times_unpacked)
MOST_PROCESSES = 4
FEWEST_WEIGHTS = 1 << 16  # a smaller product takes less time than sharing it
FEWEST_BYTES = 1 << 25  # of all weights; fewer are read so fast that sharing does not pay
ATTEMPTS = 5000  # to find work before sleeping: about a millisecond
PATIENCE = 0.5  # seconds between two looks whether the other side still lives


@contextmanager
def share_products(weights: Mapping[str, Any], processes: int | None = None) -> Iterator[int]:
    """Let `processes` processes, this one included, share the products with these weights.

    By default one for each core, 4 at most. Yields how many there are: 1, and nothing changes,
    on one core, for a small model, without threadpoolctl (extra `bench`; it keeps BLAS to one
    thread in each process), and everywhere but on Linux, where a process can be forked safely.
    Results are the same as without, up to the order of summation.
    """
    wanted = min(cores(), MOST_PROCESSES) if processes is None else processes
    shared = [weight for weight in _matrices(weights) if weight.size >= FEWEST_WEIGHTS]
    pays = wanted > 1 and sum(weight.nbytes for weight in shared) >= FEWEST_BYTES
    limitable = BLAS_LIMIT.all_threads() is not None
    if not (pays and limitable and sys.platform == "linux"):
        yield 1
        return
    team = Team(shared, wanted)
    try:
        yield wanted
    finally:
        team.close()


def _matrices(weights: Mapping[str, Any]) -> list[np.ndarray]:
    """Every matrix among the weights once."""
    found: dict[int, np.ndarray] = {}
    for value in weights.values():
        for array in value.values() if isinstance(value, Mapping) else [value]:
            if array.ndim == 2:
                found[id(array)] = array
    return list(found.values())


class Team:
    """Processes of which each multiplies with its share of the rows of every weight.

    Jobs and results travel over one board of shared memory, semaphores say when.
    """

    def __init__(self, weights: list[np.ndarray], processes: int) -> None:
        self.weights = weights
        self.number = {id(weight): number for number, weight in enumerate(weights)}
        self.owner = os.getpid()
        self.board = _Board(weights)
        self.one_at_a_time = threading.Lock()
        self.my_share, *others = [
            [_share(weight, n, processes) for weight in weights] for n in range(processes)
        ]
        self.my_parts = _parts(weights, self.my_share)
        self.workers = [_Worker(weights, share, self.board) for share in others]
        self.busy: list[_Worker] = []
        SHARED.update((key, self.strategy) for key in self.number)
        BLAS_LIMIT.set(True)

    def close(self) -> None:
        """End the workers; products are made by this process alone again."""
        for key in self.number:
            SHARED.pop(key, None)
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
        BLAS_LIMIT.set(False)

    def strategy(self, row_count: int, weight: np.ndarray) -> Product | None:
        """The product of all processes; None when it does not pay for so many rows.

        BLAS has one thread in each process while they share products, otherwise all threads. Its
        threads sleep a moment after their last product only. As the workers begin then, the first
        token after a prompt takes 35 ms instead of 105 (135 million parameters).

        None also in a process that somebody else has forked from this one: it would take the
        workers' answers to this one.
        """
        shared = is_bf16(weight) or avx512_kernels()
        most = MOST_ROWS if shared else MOST_FLOAT_ROWS
        pays = 0 < row_count <= most and os.getpid() == self.owner
        BLAS_LIMIT.set(pays)
        if not pays:
            return None
        if not BLAS_LIMIT.resting():
            return _local(row_count, is_bf16(weight))
        return self.times

    def times(self, rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The product with every process's share of the weight: (M, in), (out, in) -> (M, out)."""
        if rows.dtype.kind != "f" or not self.one_at_a_time.acquire(blocking=False):
            return strategy(len(rows), weight)(rows, weight)  # another thread has the workers
        try:
            product = self._collect(rows, self.number[id(weight)])
        except BaseException:
            self._settle()
            raise
        finally:
            self.one_at_a_time.release()
        if product is None:
            self.close()
            warnings.warn("a worker process has ended; going on with one process", stacklevel=2)
            return strategy(len(rows), weight)(rows, weight)
        return product

    def _collect(self, rows: np.ndarray, number: int) -> np.ndarray | None:
        """This process's share of the product and the others'; None when a worker has ended."""
        given, product = self.board.arrays(number, len(rows), rows.itemsize)
        given[...] = rows
        self.board.put_up(number, len(rows), rows.itemsize)
        self.busy = list(self.workers)
        for worker in self.workers:
            worker.go.release()
        part = self.my_parts[number]
        product[:, self.my_share[number]] = _local(len(rows), is_bf16(part))(rows, part)
        for worker in self.workers:
            while not _taken(worker.done):
                if not worker.process.is_alive():
                    return None
            self.busy.remove(worker)
        return product.copy()

    def _settle(self) -> None:
        """After Ctrl-C: let the workers finish their job, or end them."""
        if not all(_taken(worker.done) for worker in self.busy):
            self.close()


class _Worker:
    """A process forked from this one: it sees the same weights and the same board."""

    def __init__(self, weights: list[np.ndarray], share: list[slice], board: _Board) -> None:
        self.share, self.parent = share, os.getpid()
        context = multiprocessing.get_context("fork")
        self.go, self.done = context.Semaphore(0), context.Semaphore(0)
        self.process = context.Process(target=self._serve, args=(weights, board), daemon=True)
        with warnings.catch_warnings():  # Python 3.12 warns of a fork beside other threads, as
            warnings.simplefilter("ignore", DeprecationWarning)  # their locks stay locked in the
            self.process.start()  # child; this one uses NumPy and semaphores only

    def _serve(self, weights: list[np.ndarray], board: _Board) -> None:
        """Multiply, until this process is killed or its parent is gone."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
        set_blas_threads(1)
        parts = _parts(weights, self.share)
        while os.getppid() == self.parent:
            if _taken(self.go):
                number, M, itemsize = board.job
                rows, product = board.arrays(number, M, itemsize)
                part = parts[number]
                product[:, self.share[number]] = _local(M, is_bf16(part))(rows, part)
                self.done.release()


@cache
def _local(row_count: int, bf16: bool) -> Product:
    """The fastest product for one process whose BLAS has one thread."""
    if bf16:
        return partial(times_bf16, times_wide=_local(row_count, False))
    if row_count == 1:
        return times_one
    if avx512_kernels():
        return times_unpacked
    return times_few if row_count <= MOST_FLOAT_ROWS else float_strategy(row_count)


def _share(weight: np.ndarray, number: int, processes: int) -> slice:
    """The rows of a weight that are one process's share."""
    return slice(len(weight) * number // processes, len(weight) * (number + 1) // processes)


def _parts(weights: list[np.ndarray], shares: list[slice]) -> list[np.ndarray]:
    """One process's share of every weight."""
    return [weight[share] for weight, share in zip(weights, shares, strict=True)]


def _taken(semaphore: Any) -> bool:
    """Wait for a semaphore: first awake, then asleep, for PATIENCE seconds at most."""
    take = semaphore.acquire
    for _ in range(ATTEMPTS):
        if take(False):
            return True
    return bool(take(timeout=PATIENCE))


class _Board:
    """Memory that all processes see: which weight, the rows, and the product."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        self.shapes = [weight.shape for weight in weights]
        self.rows_start = 64  # after three integers
        self.product_start = 64 + 8 * MOST_ROWS * max(width for _, width in self.shapes)
        most_columns = max(columns for columns, _ in self.shapes)
        self.memory = mmap.mmap(-1, self.product_start + 8 * MOST_ROWS * most_columns)
        self.job = memoryview(self.memory)[:24].cast("q")  # faster than an array for single numbers
        self.arrays = cache(self._arrays)  # making arrays takes longer than finding them

    def _arrays(self, number: int, M: int, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows and their product with a weight stand: (M, in) and (M, out)."""
        columns, width = self.shapes[number]
        dtype = f"f{itemsize}"
        rows = np.frombuffer(self.memory, dtype, M * width, self.rows_start)
        product = np.frombuffer(self.memory, dtype, M * columns, self.product_start)
        return rows.reshape(M, width), product.reshape(M, columns)

    def put_up(self, number: int, M: int, itemsize: int) -> None:
        """Say what is to be multiplied: which weight, how many rows, bytes of a number."""
        self.job[0], self.job[1], self.job[2] = number, M, itemsize
