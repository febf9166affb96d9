"""Worker processes that share the matrix products of decoding.

NumPy widens bfloat16 on one core, and a Python thread takes longer to wake up (65 us on the
machine of `linear`) than its share of a product takes. Processes that were forked after the
weights were loaded see the same weights, need no lock of the interpreter, and wait for work by
asking again and again for a moment.

Three things keep the memory busy, which sets the limit. Weights that are multiplied with the same
rows, as those of queries, keys and values, are one job. A worker that waits for its next job reads
the weights of that job already, so that they lie in its cache. And what a job needs besides its
products is prepared once and kept.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from llama_np.linear import (
    SHARED,
    Product,
    float_strategy,
    strategy,
    times,
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
READ_AHEAD = 4 << 20  # bytes of weights that a waiting worker reads: they fit into its caches
LINE = 64  # bytes that the processor reads from memory at once
LINES_AT_ONCE = 1024  # lines read between two looks for work: about 3 us

# Weights of a decoder layer that are multiplied with the same rows, one after the other.
TOGETHER = (
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
)

Job = list[np.ndarray]  # weights that are multiplied with the same rows


@contextmanager
def share_products(weights: Mapping[str, Any], processes: int | None = None) -> Iterator[int]:
    """Let `processes` processes, this one included, share the products with these weights.

    By default one for each core, 4 at most. Yields how many there are: 1, and nothing changes,
    on one core, for a small model, without threadpoolctl (extra `bench`; it keeps BLAS to one
    thread in each process), and everywhere but on Linux, where a process can be forked safely.
    Results are the same as without, up to the order of summation.
    """
    wanted = min(cores(), MOST_PROCESSES) if processes is None else processes
    jobs = [job for job in _jobs(weights) if sum(w.size for w in job) >= FEWEST_WEIGHTS]
    pays = wanted > 1 and sum(w.nbytes for job in jobs for w in job) >= FEWEST_BYTES
    limitable = BLAS_LIMIT.all_threads() is not None
    if not (pays and limitable and sys.platform == "linux"):
        yield 1
        return
    team = Team(jobs, wanted)
    try:
        yield wanted
    finally:
        team.close()


def _jobs(weights: Mapping[str, Any]) -> list[Job]:
    """Every matrix among the weights once, those that belong together in one job."""
    jobs: dict[int, Job] = {}
    for value in weights.values():
        layer = value if isinstance(value, Mapping) else {"": value}
        groups = [[layer[name] for name in names if name in layer] for names in TOGETHER]
        for job in [*groups, *([array] for array in layer.values())]:
            if all(w.ndim == 2 and id(w) not in jobs for w in job):
                jobs.update((id(w), job) for w in job)
    return list({id(job): job for job in jobs.values()}.values())


class Team:
    """Processes of which each multiplies with its share of the rows of every job's weights.

    Jobs and results travel over one board of shared memory, semaphores say when. The products of
    a job are computed when the first of them is asked for; the others are kept until they are
    asked for with the same rows.
    """

    def __init__(self, jobs: list[Job], processes: int) -> None:
        self.job_of = {id(w): number for number, job in enumerate(jobs) for w in job}
        self.most_rows = [_most_rows(job) for job in jobs]
        self.owner = os.getpid()
        self.board = _Board(jobs)
        self.one_at_a_time = threading.Lock()
        self.desk = _Desk(self.board, jobs, 0, processes)
        self.workers = [
            _Worker(_Desk(self.board, jobs, number, processes)) for number in range(1, processes)
        ]
        self.busy: list[_Worker] = []
        self.rows: object = None  # what the kept products were computed for
        self.kept: dict[int, np.ndarray] = {}
        SHARED.update((key, self.times) for key in self.job_of)
        BLAS_LIMIT.set(True)

    def close(self) -> None:
        """End the workers; products are made by this process alone again."""
        for key in self.job_of:
            SHARED.pop(key, None)
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
        BLAS_LIMIT.set(False)

    def times(self, rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The product with every process's share of the weight: (M, in), (out, in) -> (M, out).

        For more rows than pay, this process multiplies alone. BLAS has one thread in each process
        while they share products, otherwise all threads. Its threads sleep a moment after their
        last product only. As the workers begin then, the first token after a prompt takes 35 ms
        instead of 105 (135 million parameters).
        """
        number = self.job_of[id(weight)]
        pays = 0 < len(rows) <= self.most_rows[number] and self._is_free(rows)
        BLAS_LIMIT.set(pays)
        if not pays:
            return strategy(len(rows), weight)(rows, weight)
        if not BLAS_LIMIT.resting():
            return _local(len(rows), is_bf16(weight))(rows, weight)
        with self.one_at_a_time:
            found = self._kept_or_new(rows, weight, number)
        if found is None:
            self.close()
            warnings.warn("a worker process has ended; going on with one process", stacklevel=2)
            return strategy(len(rows), weight)(rows, weight)
        return found

    def _is_free(self, rows: np.ndarray) -> bool:
        """Whether the workers can answer: not while they do for another thread, and never to a
        process that somebody else has forked from this one, as it would take this one's answers.
        """
        mine = os.getpid() == self.owner and rows.dtype.kind == "f"
        return mine and not self.one_at_a_time.locked()

    def _kept_or_new(self, rows: np.ndarray, weight: np.ndarray, number: int) -> np.ndarray | None:
        given = (rows.tobytes(), rows.shape, rows.dtype)
        if given != self.rows or id(weight) not in self.kept:
            self.rows = None
            try:
                products = self._collect(rows, number)
            except BaseException:  # Ctrl-C: let the workers finish their job, or end them
                if not all(_taken(worker.done) for worker in self.busy):
                    self.close()
                raise
            if products is None:
                return None
            self.rows, self.kept = given, products
        return self.kept.pop(id(weight))

    def _collect(self, rows: np.ndarray, number: int) -> dict[int, np.ndarray] | None:
        """The products of a job by id(weight); None when a worker has ended."""
        task = self.desk.task(number, len(rows), rows.itemsize)
        task.rows[...] = rows
        self.board.put_up(number, len(rows), rows.itemsize)
        self.busy = list(self.workers)
        for worker in self.workers:
            worker.go.release()
        task.do()
        for worker in self.workers:
            while not _taken(worker.done):
                if not worker.process.is_alive():
                    return None
            self.busy.remove(worker)
        return {key: product.copy() for key, product in task.products.items()}


def _most_rows(job: Job) -> int:
    """How many rows of x pay for sharing the products with these weights."""
    return MOST_ROWS if avx512_kernels() or all(map(is_bf16, job)) else MOST_FLOAT_ROWS


class _Worker:
    """A process forked from this one: it sees the same weights and the same board."""

    def __init__(self, desk: _Desk) -> None:
        self.desk, self.parent = desk, os.getpid()
        context = multiprocessing.get_context("fork")
        self.go, self.done = context.Semaphore(0), context.Semaphore(0)
        self.process = context.Process(target=self._serve, daemon=True)
        with warnings.catch_warnings():  # Python 3.12 warns of a fork beside other threads, as
            warnings.simplefilter("ignore", DeprecationWarning)  # their locks stay locked in the
            self.process.start()  # child; this one uses NumPy and semaphores only

    def _serve(self) -> None:
        """Multiply, until this process is killed or its parent is gone."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
        set_blas_threads(1)
        ahead = _ReadAhead(self.desk)
        while os.getppid() == self.parent:
            if _taken(self.go, ahead.after_last()):
                number, M, itemsize = self.desk.board.job
                self.desk.task(number, M, itemsize).do()
                self.done.release()
                ahead.done(number)


class _ReadAhead:
    """Reads what a process will need next, so that it lies in the caches when it is asked for.

    Jobs come in the same order for every token, which is learned from the last one.
    """

    def __init__(self, desk: _Desk) -> None:
        self.lines = [[_lines(part) for _, part in pieces] for pieces in desk.pieces]
        self.last: int | None = None
        self.next_of: dict[int, int] = {}
        self.left = 0

    def done(self, number: int) -> None:
        """Say which job was the last one."""
        if self.last is not None:
            self.next_of[self.last] = number
        self.last, self.left = number, READ_AHEAD // LINE

    def after_last(self) -> Iterator[None]:
        """Read the next jobs' weights, a few lines with every step."""
        number = None if self.last is None else self.next_of.get(self.last)
        while number is not None and self.left > 0:
            for lines in self.lines[number]:
                for start in range(0, min(len(lines), self.left), LINES_AT_ONCE):
                    np.maximum.reduce(lines[start : start + LINES_AT_ONCE])
                    yield
                self.left -= len(lines)
            number = self.next_of.get(number)


def _lines(part: np.ndarray) -> np.ndarray:
    """One byte of every line of the processor's cache."""
    return part.reshape(-1).view(np.uint8)[::LINE]


@cache
def _local(row_count: int, bf16: bool) -> Product:
    """The fastest product for one process whose BLAS has one thread."""
    if bf16:
        wide = times if row_count == 1 else _local(row_count, False)
        return partial(times_bf16, times_wide=wide)
    if row_count == 1:
        return times_one
    if avx512_kernels():
        return times_unpacked
    return times_few if row_count <= MOST_FLOAT_ROWS else float_strategy(row_count)


def _taken(semaphore: Any, meanwhile: Iterable[None] = ()) -> bool:
    """Wait for a semaphore: first awake, then asleep, for PATIENCE seconds at most."""
    take = semaphore.acquire
    for _ in meanwhile:
        if take(False):
            return True
    for _ in range(ATTEMPTS):
        if take(False):
            return True
    return bool(take(timeout=PATIENCE))


class _Board:
    """Memory that all processes see: which job, the rows, and the products."""

    def __init__(self, jobs: list[Job]) -> None:
        rows, product = (8 * MOST_ROWS * max(map(size, jobs)) for size in (_width, _height))
        self.rows_start, self.product_start = 64, 64 + rows  # after three integers
        self.memory = mmap.mmap(-1, 64 + rows + product)
        self.job = memoryview(self.memory)[:24].cast("q")  # faster than an array for single numbers

    def put_up(self, number: int, M: int, itemsize: int) -> None:
        """Say what is to be multiplied: which job, how many rows, bytes of a number."""
        self.job[0], self.job[1], self.job[2] = number, M, itemsize

    def rows(self, M: int, width: int, itemsize: int) -> np.ndarray:
        """Where the rows stand: (M, width)."""
        found = np.frombuffer(self.memory, f"f{itemsize}", M * width, self.rows_start)
        return found.reshape(M, width)

    def product(self, M: int, first: int, columns: int, itemsize: int) -> np.ndarray:
        """Where the product stands with a weight before which the job has `first` columns."""
        start = self.product_start + M * first * itemsize
        return np.frombuffer(self.memory, f"f{itemsize}", M * columns, start).reshape(M, columns)


def _width(job: Job) -> int:
    return job[0].shape[1]


def _height(job: Job) -> int:
    return sum(map(len, job))


@dataclass(frozen=True)
class _Task:
    """What one process does for a job, prepared: its products, and where everything stands."""

    rows: np.ndarray
    products: dict[int, np.ndarray]
    steps: list[tuple[Product, np.ndarray, np.ndarray]]

    def do(self) -> None:
        """Multiply the rows with this process's pieces of the weights."""
        for multiply, part, product in self.steps:
            product[...] = multiply(self.rows, part)


class _Desk:
    """One process's place at the board: its pieces of every job's weights."""

    def __init__(self, board: _Board, jobs: list[Job], number: int, processes: int) -> None:
        self.board, self.jobs = board, jobs
        self.cuts = [_cuts(job, number, processes) for job in jobs]
        self.pieces = [
            [(cut, weight[cut]) for cut, weight in zip(cuts, job, strict=True)]
            for cuts, job in zip(self.cuts, jobs, strict=True)
        ]
        self.task = cache(self._task)  # making arrays takes longer than finding them

    def _task(self, number: int, M: int, itemsize: int) -> _Task:
        job, board = self.jobs[number], self.board
        rows, products, steps, first = board.rows(M, _width(job), itemsize), {}, [], 0
        for weight, (cut, part) in zip(job, self.pieces[number], strict=True):
            product = board.product(M, first, len(weight), itemsize)
            products[id(weight)] = product
            if len(part):
                steps.append((_local(M, is_bf16(part)), part, product[:, cut]))
            first += len(weight)
        return _Task(rows, products, steps)


def _cuts(job: Job, number: int, processes: int) -> list[slice]:
    """One process's rows of every weight: an equal share of all rows of the job."""
    total, first, cuts = _height(job), 0, []
    begin, end = total * number // processes, total * (number + 1) // processes
    for weight in job:
        cuts.append(slice(max(begin - first, 0), max(min(end - first, len(weight)), 0)))
        first += len(weight)
    return cuts
