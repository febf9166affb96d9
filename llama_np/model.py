"""The whole model: tokens in, hidden states, logits or class scores out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_np import rope
from llama_np.cache import KVCache, NoCache, undone_on_error
from llama_np.config import Config
from llama_np.layers import decoder_layer, embed, project, rms_norm
from llama_np.tap import NO_TAP, Tap, within

ModelWeights = Mapping[str, Any]  # arrays, and one mapping of arrays for each "model.layers.{i}"


def hidden_states(
    tokens: np.ndarray,
    weights: ModelWeights,
    config: Config,
    cache: KVCache | None = None,
    positions: np.ndarray | None = None,
    visible: np.ndarray | None = None,
    tap: Tap = NO_TAP,
) -> np.ndarray:
    """Run the model up to its final norm: (B, T) -> (B, T, D).

    positions (B, T): integers, negative = padding; by default they continue the cache.
    visible (B, 1, T, S): True where a query sees a key; by default every key at the same or an
    earlier position that is not padding.
    Errors: IndexError for an id outside the vocabulary; TypeError and ValueError for arrays of
    another kind or shape. The cache is then as it was before.
    """
    ids = check_tokens(tokens, config.vocab_size)  # (B, T)
    rows = embed(ids, weights["model.embed_tokens.weight"])  # (B, T, D)
    _check_precision(rows)
    embedded = tap("model.embed_tokens", rows)  # (B, T, D)
    return transform(embedded, weights, config, cache, positions, visible, tap)  # (B, T, D)


@undone_on_error
def transform(
    embedded: np.ndarray,
    weights: ModelWeights,
    config: Config,
    cache: KVCache | None = None,
    positions: np.ndarray | None = None,
    visible: np.ndarray | None = None,
    tap: Tap = NO_TAP,
) -> np.ndarray:
    """Everything after the embedding: (B, T, D) -> (B, T, D). Arguments as `hidden_states`."""
    memory = NoCache() if cache is None else cache
    positions = _positions(positions, embedded.shape[:2], memory)  # (B, T)
    key_positions = memory.extend(positions)  # (B, S)
    if visible is None:
        visible = causal(positions, key_positions)  # (B, 1, T, S)
        length = key_positions.max(axis=1, keepdims=True, initial=-1) + 1  # (B, 1)
    else:
        length = _length_of(visible, positions, key_positions)  # (1, 1)
    rotations = rope.tables(positions, length, config, embedded.dtype, tap)  # (B, 1, T, H) x2
    x = embedded
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}"
        w, inside, store = weights[name], within(name + ".", tap), memory.store(i)
        output = decoder_layer(x, w, rotations, visible, config, store, inside)  # (B, T, D)
        x = tap(name, output)  # (B, T, D)
    return rms_norm("model.norm", x, weights, config.rms_norm_eps, tap)  # (B, T, D)


def causal(positions: np.ndarray, key_positions: np.ndarray) -> np.ndarray:
    """Who sees whom: (B, T) queries, (B, S) keys -> (B, 1, T, S).

    One comparison is the causal mask, the offset of cached tokens and the padding at once.
    """
    queries = positions[:, None, :, None]  # (B, 1, T, 1)
    keys = key_positions[:, None, None, :]  # (B, 1, 1, S)
    return (keys >= 0) & (keys <= queries)  # (B, 1, T, S)


def logits(hidden: np.ndarray, weights: ModelWeights, tap: Tap = NO_TAP) -> np.ndarray:
    """One score per word of the vocabulary: (B, T, D) -> (B, T, V)."""
    return project("lm_head", hidden, weights, tap)  # (B, T, V)


def classify(
    tokens: np.ndarray,
    weights: ModelWeights,
    config: Config,
    positions: np.ndarray | None = None,
    tap: Tap = NO_TAP,
) -> np.ndarray:
    """One score per class, read at each row's last token: (B, T) -> (B, C).

    The last token is the one at the highest position, so padding may stand on either side.
    Errors: ValueError for texts without tokens, and as `hidden_states`.
    """
    ids = check_tokens(tokens, config.vocab_size)  # (B, T)
    if not ids.shape[1]:
        raise ValueError("a text without tokens has no class")
    positions = _positions(positions, ids.shape, NoCache())  # (B, T)
    hidden = hidden_states(ids, weights, config, positions=positions, tap=tap)  # (B, T, D)
    last = hidden[np.arange(len(ids)), positions.argmax(axis=1)]  # (B, D)
    return project("score", last, weights, tap)  # (B, C)


def check_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Token ids as a (B, T) integer array; NumPy alone would let -1 mean the last word."""
    ids = np.asarray(tokens)  # (B, T)
    if ids.ndim != 2:
        raise ValueError(f"token ids have shape {ids.shape}, expected (B, T)")
    if not np.issubdtype(ids.dtype, np.integer) and ids.size:
        raise TypeError(f"token ids are {ids.dtype}, expected integers")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(f"token id {wrong} is outside the vocabulary of {vocab_size}")
    return ids.astype(np.int64, copy=False)


def _check_precision(embedded: np.ndarray) -> None:
    """Refuse float16, in which the squares of a norm overflow above 255."""
    if embedded.dtype.kind != "f" or embedded.dtype.itemsize < 4:
        raise TypeError(
            f"the embedding is {embedded.dtype}, expected float32 or float64: convert the weights "
            "with .astype(np.float32), or read them with llama_np.load"
        )


def _length_of(visible: np.ndarray, positions: np.ndarray, key_positions: np.ndarray) -> np.ndarray:
    """How many tokens a given mask is about: (1, 1). A mask to be added to scores is refused."""
    if visible.dtype != np.bool_:
        raise TypeError(f"visible is {visible.dtype}, expected bool: True where a query sees a key")
    (B, T), S = positions.shape, key_positions.shape[1]
    if visible.shape not in ((B, 1, T, S), (1, 1, T, S)):
        raise ValueError(f"visible has shape {visible.shape}, expected {(B, 1, T, S)}")
    return np.full((1, 1), S)


def _positions(
    positions: np.ndarray | None, shape: tuple[int, ...], memory: NoCache | KVCache
) -> np.ndarray:
    """The given positions as (B, T) integers, or those that continue what is remembered."""
    if positions is None:
        return memory.continuation(*shape)
    given = np.asarray(positions)  # (B, T) or (T,)
    if not np.issubdtype(given.dtype, np.integer) and given.size:
        raise TypeError(f"positions are {given.dtype}, expected integers")
    if given.shape[-1:] != shape[-1:]:
        raise ValueError(f"positions have shape {given.shape}, expected (B, T) = {shape}")
    return np.broadcast_to(given.astype(np.int64, copy=False), shape)
