"""A prompt in chunks, as many of them at once as there are cores.

Layer by layer, a token needs the keys and values of the tokens before it, and nothing else of
them. So a chunk need not wait until the one before it is done: each has a Python thread of its
own and waits, in every layer, only until the one before has stored its keys and values there.
BLAS keeps to one thread; norms, rotations, attention, activations and the widening of bfloat16,
too, then use every core, and where it pays products are made without copies of the weights
(`linear.times_unpacked`). On two cores of an AMD EPYC (Zen 4), in medians of pairs, a model of
135 million parameters reads 64 tokens 1.1 times, 128 tokens 1.17 times, 512 tokens 1.4 times and
1,500 tokens 1.2 times as fast, one of 1.1 billion in bfloat16 64 tokens 1.15 times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import pairwise

import numpy as np

from llama_np.cache import KVCache, Store
from llama_np.config import Config
from llama_np.linear import TILE
from llama_np.model import ModelWeights, hidden_states
from llama_np.processor import halves_avx512
from llama_np.rope import steady_length
from llama_np.threads import BLAS_LIMIT, avx512_kernels

Compute = Callable[[slice, KVCache], np.ndarray]

CHUNK = 256  # tokens of each row; bounds the memory for activations and attention scores
FEWEST_ROWS = 64  # of a matrix product for which a thread of its own pays
FEWEST_ROWS_UNPACKED = 32  # the same where products without copies of the weights pay
WORK = 5 * 10**8  # multiplications with weights, about 5 ms, for which it pays
WORK_WHILE_AWAKE = 30 * WORK  # the same while BLAS's own threads may keep the cores busy
WORK_WHILE_LIMITED = 10 * WORK  # the same if they will sleep then, so that later prompts gain
ATTENTION = 1.6  # the time of a multiplication of attention, in multiplications with weights


def hidden_in_chunks(
    tokens: np.ndarray,
    weights: ModelWeights,
    config: Config,
    cache: KVCache,
    positions: np.ndarray,
) -> np.ndarray:
    """`model.hidden_states` of tokens (B, T) at positions (B, T), chunk by chunk: (B, T, D)."""

    def compute(part: slice, memory: KVCache) -> np.ndarray:
        return hidden_states(tokens[:, part], weights, config, memory, positions[:, part])

    return in_chunks(compute, positions, config, cache)


def in_chunks(
    compute: Compute, positions: np.ndarray, config: Config, cache: KVCache
) -> np.ndarray:
    """Compute new tokens at `positions` (B, T) chunk by chunk: (B, T, D).

    compute(columns, cache): the hidden states (B, t, D) of these t columns, given a cache that
    holds everything before them. The results are those of compute(all columns), up to the order
    of summation. After an error the cache is as it was before.
    """
    B, T = positions.shape
    start, threads = cache.length, threads_that_pay(B * T, config)
    growth = _growth(config)
    columns = chunks(T, threads, start, growth)
    if len(columns) < threads:  # some cores would have nothing to do
        threads, columns = 1, chunks(T, 1, start, growth)
    if start + T > steady_length(config, start + 1):  # rotated by the length of the whole
        columns = [slice(0, T)]
    try:
        if threads == 1 or len(columns) == 1:
            return np.concatenate([compute(part, cache) for part in columns], axis=1)
        return _at_once(compute, columns, positions, cache, threads)
    except BaseException:
        cache.crop(start)
        raise


def threads_that_pay(rows: int, config: Config) -> int:
    """How many chunks to compute at once: as many as BLAS has threads, or 1.

    More than one needs threadpoolctl (extra `bench`).
    """
    threads = BLAS_LIMIT.all_threads() or 1
    work = rows * config.num_hidden_layers * _weights_of_a_layer(config) / threads
    fewest = FEWEST_ROWS_UNPACKED if avx512_kernels() and halves_avx512() else FEWEST_ROWS
    if threads == 1 or rows / threads < fewest or work < WORK:
        return 1
    least = WORK_WHILE_LIMITED if BLAS_LIMIT.limited else WORK_WHILE_AWAKE
    return threads if work >= least or BLAS_LIMIT.resting() or BLAS_LIMIT.look() else 1


def _weights_of_a_layer(config: Config) -> int:
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    per_channel = heads * config.head_dim + 3 * config.intermediate_size
    return config.hidden_size * per_channel


def _growth(config: Config) -> float:
    """What an earlier token adds to the time that a token takes, in parts of its time alone."""
    attention = 2 * config.num_attention_heads * config.head_dim  # a score, a weighted value
    return ATTENTION * attention / _weights_of_a_layer(config)


def chunks(T: int, threads: int, start: int, growth: float) -> list[slice]:
    """T columns after `start` others in chunks, as many for every thread.

    Chunks that are computed at once take the same time: the later ones are shorter, as attention
    to more tokens takes longer.
    """
    count = -(-max(T, 1) // (CHUNK * threads))  # of chunks for each thread
    ends = np.linspace(0, T, count + 1)
    parts = [_equal_parts(a, b, threads, start, growth) for a, b in pairwise(ends)]
    edges = [min(TILE * round(edge / TILE), T) for part in parts for edge in part[:-1]]
    return [slice(a, b) for a, b in pairwise([*edges, T]) if a < b] or [slice(0, T)]


def _equal_parts(first: float, last: float, count: int, start: int, growth: float) -> list[float]:
    """Edges of `count` parts of equal work, where a token after n others takes 1 + growth * n.

    The work of the first n tokens is n + growth * n^2 / 2, which is solved for n.
    """
    n = start + np.array([first, last])
    before, after = n + growth * n**2 / 2
    work = np.linspace(before, after, count + 1)
    edges: list[float] = (2 * work / (1 + np.sqrt(1 + 2 * growth * work)) - start).tolist()
    return edges


def _at_once(
    compute: Compute, columns: list[slice], positions: np.ndarray, cache: KVCache, threads: int
) -> np.ndarray:
    """Every chunk in a thread, each with a cache that ends where the chunk begins."""
    start, turns = cache.length, _Turns(len(columns))
    cache.extend(positions)
    caches = [_ChunkCache(cache, start + part.start, n, turns) for n, part in enumerate(columns)]
    with BLAS_LIMIT.held(), ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(copy_context().run, compute, part, memory)
            for part, memory in zip(columns, caches, strict=True)
        ]
        try:
            return np.concatenate([job.result() for job in jobs], axis=1)
        except BaseException:  # Ctrl-C, too
            turns.stop()
            pool.shutdown(cancel_futures=True)
            raise


class _ChunkCache(KVCache):
    """The arrays of a whole cache, for a chunk: it ends where the chunk begins."""

    def __init__(self, whole: KVCache, length: int, number: int, turns: _Turns) -> None:
        vars(self).update(vars(whole))
        self.length, self.number, self.turns = length, number, turns

    def store(self, layer: int) -> Store:
        """As in every cache; returns when the chunks before this one have stored theirs."""
        store = super().store(layer)

        def store_in_turn(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            stored = store(k, v)
            self.turns.wait(self.number, layer)
            return stored

        return store_in_turn


class _Turns:
    """How many layers each chunk, and every chunk before it, has stored."""

    def __init__(self, count: int) -> None:
        self.layers = [0] * count
        self.changed = threading.Condition()
        self.stopped = False

    def wait(self, number: int, layer: int) -> None:
        """Say that a chunk has stored this layer, and wait for the chunk before it."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self._is_turn(number, layer))
            if self.stopped:
                raise RuntimeError("another chunk has failed")
            self.layers[number] = layer + 1
            self.changed.notify_all()

    def _is_turn(self, number: int, layer: int) -> bool:
        return number == 0 or self.layers[number - 1] > layer

    def stop(self) -> None:
        """Let nobody wait any longer."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
