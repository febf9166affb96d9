"""Worker processes that share the matrix products of decoding.

NumPy widens bfloat16 on one core, and a Python thread takes longer to wake up (65 us on the
machine of `linear`) than its share of a product takes. Processes that were forked after the
weights were loaded see the same weights, need no lock of the interpreter, and wait for work by
asking again and again for a moment.

Two things keep the memory busy, which sets the limit. Weights that are multiplied with the same
rows, as those of queries, keys and values, are one job. And a worker that waits for its next job
reads its weights already (`tasks.ReadAhead`). Together they make 7 to 11 % (135 million
parameters, one text, in pairs of runs).

On two cores of an AMD EPYC (Zen 4), one pass over 135 million weights takes 16 ms instead of 25 in
float32 and instead of 27 in bfloat16, two rows of float32 21 instead of 35.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from llama_np.linear import SHARED, strategy
from llama_np.tasks import Board, Desk, Job, ReadAhead, most_rows
from llama_np.threads import BLAS_LIMIT, cores, set_blas_threads

MOST_PROCESSES = 4
FEWEST_WEIGHTS = 1 << 16  # a smaller product takes less time than sharing it
FEWEST_BYTES = 1 << 25  # of all weights; fewer are read so fast that sharing does not pay
FEWEST_MULTIPLICATIONS = 4 * 10**9  # alone, for which it pays to wake up BLAS's threads
ATTEMPTS = 5000  # to find work before sleeping: about a millisecond
PATIENCE = 0.5  # seconds between two looks whether the other side still lives

# Weights of a decoder layer that are multiplied with the same rows, one after the other.
TOGETHER = (
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
)


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
    BLAS_LIMIT.look()  # at the start of a program BLAS's threads sleep already
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
            fits = all(w.ndim == 2 and id(w) not in jobs for w in job)
            if fits and len({w.shape[1] for w in job}) == 1:
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
        self.most_rows = [most_rows(job) for job in jobs]
        self.size = sum(w.size for job in jobs for w in job)
        self.alone = 0  # multiplications since the last product that was shared
        self.owner = os.getpid()
        self.board = Board(jobs)
        self.one_at_a_time = threading.Lock()
        self.desk = Desk(self.board, jobs, 0, processes)
        self.workers = [
            _Worker(Desk(self.board, jobs, number, processes)) for number in range(1, processes)
        ]
        self.waiting_for: list[_Worker] = []
        self.kept: tuple[object, dict[int, np.ndarray]] = None, {}  # rows, and their products
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
        while they share products. A large prompt gets all threads, which keep the cores busy for
        a moment after their last product; only then the workers take part again. As they are not
        in each other's way, the first token after a prompt takes 35 ms instead of 105 (135 million
        parameters). After a small prompt, for which BLAS keeps to one thread, they take part at
        once: of 15 million parameters, 128 tokens take 22 ms instead of 18, but each of the 40
        tokens after them 2.1 instead of 3.1.
        """
        given, products = self.kept
        if id(weight) in products and _content(rows) == given:
            kept = products.pop(id(weight), None)
            if kept is not None:  # another thread may have taken it
                return kept
        number, M = self.job_of[id(weight)], len(rows)
        pays = 0 < M <= self.most_rows[number] and os.getpid() == self.owner
        pays = pays and not BLAS_LIMIT.holders  # Python threads that keep every core busy
        BLAS_LIMIT.set(pays or self._is_little(M, weight))
        together = pays and rows.dtype.kind == "f" and BLAS_LIMIT.resting()
        if not together or not self.one_at_a_time.acquire(False):
            return strategy(M, weight)(rows, weight)
        try:
            return self._collect(rows, number).pop(id(weight))
        except _WorkerEnded:
            self.close()
            warnings.warn("a worker process has ended; going on with one process", stacklevel=2)
            return strategy(M, weight)(rows, weight)
        except BaseException:
            self._settle()
            raise
        finally:
            self.one_at_a_time.release()

    def _is_little(self, M: int, weight: np.ndarray) -> bool:
        """Whether a product alone belongs to little work, by all that is known.

        That is the whole pass over the weights, and what was multiplied alone before.
        """
        self.alone += M * weight.size
        return max(M * self.size, self.alone) < FEWEST_MULTIPLICATIONS

    def _collect(self, rows: np.ndarray, number: int) -> dict[int, np.ndarray]:
        """The products of a job, by id(weight); they are kept."""
        self.alone = 0
        task = self.desk.task(number, len(rows), rows.itemsize)
        task.rows[...] = rows
        self.board.put_up(number, len(rows), rows.itemsize)
        self.waiting_for = self.workers
        for worker in self.workers:
            worker.go.release()
        task.do()
        for count, worker in enumerate(self.workers, 1):
            while not _taken(worker.done):
                if not worker.process.is_alive():
                    raise _WorkerEnded
            self.waiting_for = self.workers[count:]
        products = {key: product.copy() for key, product in task.products}
        self.kept = _content(rows), products
        return products

    def _settle(self) -> None:
        """After an error or Ctrl-C: let the workers finish their job, or end them."""
        if not all(_taken(worker.done) for worker in self.waiting_for):
            self.close()


def _content(rows: np.ndarray) -> tuple[np.dtype, int, bytes]:
    """What must be equal for two products with a weight to be equal."""
    return rows.dtype, len(rows), rows.tobytes()


class _WorkerEnded(Exception):
    """A worker process does not answer any more."""


class _Worker:
    """A process forked from this one: it sees the same weights and the same board."""

    def __init__(self, desk: Desk) -> None:
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
        ahead = ReadAhead()
        while True:
            if _taken(self.go, ahead.steps):
                task = self.desk.task(*self.desk.board.job)
                task.do()
                self.done.release()
                ahead.is_done(task)
            elif os.getppid() != self.parent:
                return


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
