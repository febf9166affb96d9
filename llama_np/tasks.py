"""What each process does when products are shared: its task for a job, and what it does before.

A job is a list of weights that are multiplied with the same rows. Every process has the same
rows of these weights each time. Numbers travel over a board of shared memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from llama_np.linear import (
    BF16_BLOCK,
    FEW_ALONE,
    Product,
    blocks_to_widen,
    cached_strategy,
    strategy,
)
from llama_np.memory import LINE, Scratch
from llama_np.precision import is_bf16
from llama_np.threads import avx512_kernels

MOST_ROWS = 32  # of x for which sharing pays; BLAS's own threads do as well for more
MOST_FLOAT_ROWS = FEW_ALONE[-1]  # the same for float weights, if BLAS has to copy them

READ_AHEAD = 4 << 20  # bytes of weights that a waiting process reads: they fit into its caches
LINES_AT_ONCE = 1024  # lines read between two looks for work: about 3 us

Job = list[np.ndarray]
Step = Callable[[], object]


def most_rows(job: Job) -> int:
    """How many rows of x pay for sharing the products with these weights."""
    return MOST_ROWS if avx512_kernels() or all(map(is_bf16, job)) else MOST_FLOAT_ROWS


class Board:
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


@dataclass(frozen=True, eq=False)
class Task:
    """What one process does for a job, prepared: its products, and where everything stands."""

    rows: np.ndarray
    products: list[tuple[int, np.ndarray]]  # of all processes, with id(weight)
    weights: list[np.ndarray]  # this process's share
    steps: list[Step]  # that multiply the rows with them

    def do(self) -> None:
        """Multiply the rows with this process's share of the weights."""
        for step in self.steps:
            step()


def steps(
    rows: np.ndarray, weights: np.ndarray, product: np.ndarray, scratch: Scratch
) -> Iterator[Step]:
    """What multiplies whatever will stand in `rows` with the weights, into `product`.

    All views of memory are made beforehand: with 135 million weights in bfloat16 a token takes
    29 ms instead of 33 (Intel Xeon, two cores).
    """
    M, width = len(rows), weights.shape[1]
    if not is_bf16(weights):
        yield _into(product, strategy(M, weights), np.vecdot, rows, weights)
        return
    for part, places, wide in blocks_to_widen(M, weights, scratch):
        yield partial(np.copyto, places, weights[part])
        yield _into(product[:, part], cached_strategy(M, width), np.dot, rows, wide)


def _into(
    product: np.ndarray,
    multiply: Product,
    multiply_one: Callable[..., object],
    rows: np.ndarray,
    weights: np.ndarray,
) -> Step:
    """A product into memory; one row needs no other function than NumPy's."""
    if len(rows) == 1:
        row, result = rows[0], product[0]
        return partial(multiply_one, weights, row, out=result)
    return partial(_multiply_into, product, multiply, rows, weights)


def _multiply_into(
    product: np.ndarray, multiply: Product, rows: np.ndarray, weights: np.ndarray
) -> None:
    product[...] = multiply(rows, weights)


class Desk:
    """One process's place at the board, where it finds its tasks."""

    def __init__(self, board: Board, jobs: list[Job], number: int, processes: int) -> None:
        self.board, self.jobs, self.number, self.processes = board, jobs, number, processes
        self.scratch = Scratch(2 * BF16_BLOCK + 2)
        self.task = cache(self._task)  # making arrays takes longer than finding them

    def _task(self, number: int, M: int, itemsize: int) -> Task:
        job, first = self.jobs[number], 0
        rows = self.board.rows(M, _width(job), itemsize)
        products, shares, todo = [], [], list[Step]()
        for weight, cut in zip(job, self.cuts(job), strict=True):
            product = self.board.product(M, first, len(weight), itemsize)
            products.append((id(weight), product))
            if cut.start < cut.stop:
                shares.append(weight[cut])
                todo += steps(rows, weight[cut], product[:, cut], self.scratch)
            first += len(weight)
        return Task(rows, products, shares, todo)

    def cuts(self, job: Job) -> list[slice]:
        """This process's rows of every weight: an equal share of all rows of the job."""
        total = _height(job)
        begin, end = (total * n // self.processes for n in (self.number, self.number + 1))
        cuts, first = [], 0
        for weight in job:
            cuts.append(slice(max(begin - first, 0), min(end - first, len(weight))))
            first += len(weight)
        return cuts


class ReadAhead:
    """Reads what a process will need next, so that it lies in the caches when it is asked for.

    Tasks come in the same order for every token, which is learned from the last one.
    """

    def __init__(self) -> None:
        self.last: Task | None = None
        self.next_of: dict[Task | None, Task] = {}
        self.steps: Iterator[None] = iter(())

    def is_done(self, task: Task) -> None:
        """Say what was done last; from now on, each of the `steps` reads a little."""
        self.next_of[self.last], self.last = task, task
        self.steps = self._read()

    def _read(self) -> Iterator[None]:
        task, left = self.next_of.get(self.last), READ_AHEAD // LINE
        while task is not None and left > 0:
            for weights in task.weights:
                if weights.flags.c_contiguous:  # to flatten others would mean to copy them
                    lines = weights.reshape(-1).view(np.uint8)[::LINE]  # one byte of each
                    for start in range(0, min(len(lines), left), LINES_AT_ONCE):
                        np.maximum.reduce(lines[start : start + LINES_AT_ONCE])
                        yield
                left -= -(-weights.nbytes // LINE)
            task = self.next_of.get(task)
