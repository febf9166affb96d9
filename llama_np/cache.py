"""The key/value cache: a function that remembers.

A layer hands over the keys and values of the new tokens and gets all of them back, old and new.
Which of them a query may see is decided by positions alone, so the order of the slots, padding
and holes do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import numpy as np

from llama_np.config import Config

Store = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

FIRST_CAPACITY = 64  # slots of a growing cache; doubled whenever they are full


class NoCache:
    """Remembers nothing: every forward pass stands alone."""

    def continuation(self, B: int, T: int) -> np.ndarray:
        """Every text starts at position 0: (B, T)."""
        return np.broadcast_to(np.arange(T), (B, T))

    def extend(self, positions: np.ndarray) -> np.ndarray:
        """The keys that can be attended to are the new tokens' own: (B, T) -> (B, T)."""
        return positions

    def store(self, layer: int) -> Store:
        """A function that returns its two arguments."""
        return lambda k, v: (k, v)


class KVCache:
    """Rotated keys, values and positions of all tokens seen so far, for B rows.

    With `capacity` the memory is allocated once and a longer text is an error; without, it grows
    by doubling, so that every slot is copied at most twice on average. All layers share one array:
    NumPy asks Linux for large pages for a large one only, with which a step is up to 2 % faster.
    """

    def __init__(
        self,
        config: Config,
        batch: int = 1,
        capacity: int | None = None,
        dtype: np.typing.DTypeLike = np.float32,
    ) -> None:
        self.fixed = capacity is not None
        slots = FIRST_CAPACITY if capacity is None else capacity
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        self._hold(np.zeros((config.num_hidden_layers, 2, *shape), dtype))
        self.positions = np.full((batch, slots), -1, np.int64)
        self.length = 0

    def _hold(self, pairs: np.ndarray) -> None:
        """Remember in `pairs`: (layers, 2, B, K, slots, H)."""
        self.pairs = pairs
        self.keys, self.values = list(pairs[:, 0]), list(pairs[:, 1])  # per layer (B, K, slots, H)

    @classmethod
    def from_pairs(cls, config: Config, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> KVCache:
        """A cache that holds the given (key, value) pairs, one per layer, each (B, K, S, H).

        The pairs are copied. Positions are taken to be 0 ... S-1, as nothing else is known.
        Errors: ValueError for a wrong number of layers or a shape that does not fit `config`.
        """
        if len(pairs) != config.num_hidden_layers:
            raise ValueError(f"{len(pairs)} key/value pairs for {config.num_hidden_layers} layers")
        B, _, S, _ = np.shape(pairs[0][0])
        expected = (B, config.num_key_value_heads, S, config.head_dim)
        cache = cls(config, B, dtype=pairs[0][0].dtype)
        cache.extend(np.broadcast_to(np.arange(S), (B, S)))
        for layer, (k, v) in enumerate(pairs):
            for array in (k, v):
                if np.shape(array) != expected:
                    raise ValueError(f"cached array {np.shape(array)}, expected {expected}")
            cache.store(layer)(k, v)
        return cache

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return self.positions.shape[0]

    @property
    def capacity(self) -> int:
        """How many slots are allocated."""
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes taken by keys and values."""
        return self.pairs.nbytes

    def continuation(self, B: int, T: int) -> np.ndarray:
        """Positions of T more tokens: every row goes on where its own text ended, (B, T).

        Errors: ValueError when the rows do not match.
        """
        self._check_rows(B)
        ends = self.positions[:, : self.length].max(axis=1, keepdims=True, initial=-1)
        return ends + np.arange(1, T + 1)

    def _check_rows(self, B: int) -> None:
        if self.batch != B:
            raise ValueError(f"the cache holds {self.batch} rows, the input has {B}")

    def extend(self, positions: np.ndarray) -> np.ndarray:
        """Reserve slots for new tokens at `positions` (B, T); returns all positions (B, S).

        Errors: ValueError when the rows do not match or a preallocated cache is full.
        """
        B, T = positions.shape
        self._check_rows(B)
        start, self.length = self.length, self.length + T
        if self.length > self.capacity:
            self._grow(start)
        self.positions[:, start : self.length] = positions
        self._new = slice(start, self.length)
        return self.positions[:, : self.length]

    def store(self, layer: int) -> Store:
        """The function that remembers one layer's new keys and values, each (B, K, T, H).

        Errors: ValueError for another dtype than the cache's, which would round silently.
        """

        def store(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            keys, values = self.keys[layer], self.values[layer]
            if k.dtype != keys.dtype:
                raise ValueError(f"the cache holds {keys.dtype}, the model computes in {k.dtype}")
            keys[:, :, self._new] = k
            values[:, :, self._new] = v
            return keys[:, :, : self.length], values[:, :, : self.length]

        return store

    def _grow(self, used: int) -> None:
        if self.fixed:
            needed, self.length = self.length, used
            raise ValueError(f"the cache has room for {self.capacity} tokens, {needed} are needed")
        self._reallocate(max(2 * self.capacity, self.length), used)

    def _reallocate(self, slots: int, used: int) -> None:
        *outer, _, H = self.pairs.shape
        pairs = np.zeros((*outer, slots, H), self.pairs.dtype)
        pairs[..., :used, :] = self.pairs[..., :used, :]
        self._hold(pairs)
        positions = np.full((self.batch, slots), -1, np.int64)
        positions[:, :used] = self.positions[:, :used]
        self.positions = positions

    def select(self, rows: np.ndarray) -> None:
        """Keep the given rows, in the given order; a row may be taken more than once."""
        self._hold(np.take(self.pairs, rows, axis=2))
        self.positions = self.positions[rows]

    def join(self, other: KVCache) -> None:
        """Put the rows of another cache below this one's."""
        slots = max(self.length, other.length)
        for cache in (self, other):
            if cache.capacity < slots:
                cache._reallocate(slots, cache.length)
        slots_of_both = min(self.capacity, other.capacity)
        both = [cache.pairs[..., :slots_of_both, :] for cache in (self, other)]
        self._hold(np.concatenate(both, axis=2))
        self.positions = np.concatenate([c.positions[:, :slots_of_both] for c in (self, other)])
        self.length = slots

    def compact_if_sparse(self) -> None:
        """Close the gaps once no row fills half of the slots, as when a long row has left."""
        filled = int((self.positions[:, : self.length] >= 0).sum(axis=1).max(initial=0))
        if 2 * filled >= self.length or self.length < FIRST_CAPACITY:
            return
        order = np.argsort(self.positions < 0, axis=1, kind="stable")
        index = order[:, None, :filled, None]
        for array in [*self.keys, *self.values]:
            array[:, :, :filled] = np.take_along_axis(array, index, axis=2)
        self.positions = np.take_along_axis(self.positions, order, axis=1)
        self.length = filled

    def crop(self, length: int) -> None:
        """Forget every slot from `length` on."""
        if length < 0:
            raise ValueError(f"crop to {length} tokens: expected 0 or more")
        self.length = min(self.length, length)
        self.positions[:, self.length :] = -1

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self[layer] for layer in range(len(self)))


Transform = Callable[..., np.ndarray]


def undone_on_error(transform: Transform) -> Transform:
    """Let a forward pass that fails, or is interrupted, leave its cache as it was."""

    @wraps(transform)
    def run(
        embedded: np.ndarray,
        weights: Any,
        config: Config,
        cache: KVCache | None = None,
        *more: Any,
        **options: Any,
    ) -> np.ndarray:
        start = 0 if cache is None else cache.length
        try:
            return transform(embedded, weights, config, cache, *more, **options)
        except BaseException:
            if cache is not None:
                cache.crop(start)
            raise

    return run
