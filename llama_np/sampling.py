"""Choosing the next token: functions from logits to logits, and a draw.

Every function takes logits (..., V) and returns new ones; what may not be drawn becomes -inf.
Ties and boundaries follow transformers 4.37.2, so that the Hugging Face classes share them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_np.layers import softmax


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults switch everything off: the likeliest token, always.

    temperature 0 means greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 mean off.
    Errors: ValueError for a number out of range, TypeError for something that is no number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            check_number(name, getattr(self, name), (int, float))
        check_number("top_k", self.top_k, (int,))
        _require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "> 0")


def check_number(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Errors: TypeError for another type (bool included), ValueError for NaN and infinity."""
    allowed: Any = (*kinds, np.integer) if float not in kinds else (*kinds, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise TypeError(f"{name} = {value!r}: expected a number ({kinds[-1].__name__})")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} = {value!r}: expected a finite number")


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value!r}: expected {rule}")


def temperature(logits: np.ndarray, t: float) -> np.ndarray:
    """Divide by t > 0: below 1 the distribution becomes sharper, above 1 flatter.

    In a row whose largest logit would become infinite, it becomes 0 first.
    """
    t = max(float(t), float(np.finfo(logits.dtype).tiny))
    best = logits.max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        too_large = np.isfinite(best) & np.isinf(best / t)
        return np.where(too_large, logits - best, logits) / t


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Keep the k largest logits, and all that equal the smallest of them."""
    k = min(k, logits.shape[-1])
    threshold = np.partition(logits, -k, axis=-1)[..., -k, None]
    return np.where(logits < threshold, -np.inf, logits).astype(logits.dtype, copy=False)


def top_p(logits: np.ndarray, p: float, min_keep: int = 1) -> np.ndarray:
    """Keep the smallest set of likeliest tokens whose probabilities reach p (arXiv:1904.09751).

    Seen from below: tokens whose cumulative probability, ascending, is at most 1 - p go.
    """
    order = np.argsort(logits, axis=-1, kind="stable")
    ascending = np.take_along_axis(logits, order, axis=-1)
    dropped = np.cumsum(softmax(ascending), axis=-1) <= 1 - p
    dropped[..., -min_keep:] = False
    return _drop_sorted(logits, order, dropped)


def min_p(logits: np.ndarray, p: float, min_keep: int = 1) -> np.ndarray:
    """Drop tokens less likely than p times the likeliest one (arXiv:2407.01082)."""
    probabilities = softmax(logits)
    dropped = probabilities < p * probabilities.max(axis=-1, keepdims=True)
    best = np.argsort(logits, axis=-1, kind="stable")[..., -min_keep:]
    np.put_along_axis(dropped, best, False, axis=-1)
    return np.where(dropped, -np.inf, logits).astype(logits.dtype, copy=False)


def typical_p(logits: np.ndarray, p: float, min_keep: int = 1) -> np.ndarray:
    """Keep tokens whose surprise is closest to the entropy, up to mass p (arXiv:2202.00666)."""
    logprobs = log_softmax(logits)
    probabilities = np.exp(logprobs)
    finite = np.where(np.isneginf(logprobs), 0, logprobs)
    entropy = -(finite * probabilities).sum(axis=-1, keepdims=True)
    order = np.argsort(np.abs(-logprobs - entropy), axis=-1, kind="stable")
    ordered = np.take_along_axis(logits, order, axis=-1)
    mass = np.cumsum(softmax(ordered), axis=-1)
    last = np.minimum((mass < p).sum(axis=-1, keepdims=True), logits.shape[-1] - 1)
    threshold = np.take_along_axis(np.abs(-logprobs - entropy), order, axis=-1)
    limit = np.take_along_axis(threshold, last, axis=-1)
    dropped = threshold > limit
    dropped[..., :min_keep] = False
    return _drop_sorted(logits, order, dropped)


def epsilon_cutoff(logits: np.ndarray, epsilon: float, min_keep: int = 1) -> np.ndarray:
    """Drop tokens less likely than epsilon (arXiv:2210.15191)."""
    return _drop_unlikely(logits, softmax(logits), epsilon, min_keep)


def eta_cutoff(logits: np.ndarray, epsilon: float, min_keep: int = 1) -> np.ndarray:
    """Drop tokens less likely than min(epsilon, sqrt(epsilon) e^-entropy) (arXiv:2210.15191)."""
    probabilities = softmax(logits)
    surprise = -np.where(np.isneginf(logits), 0, log_softmax(logits))
    entropy = (probabilities * surprise).sum(axis=-1, keepdims=True)
    limit = np.minimum(epsilon, epsilon**0.5 * np.exp(-entropy))
    return _drop_unlikely(logits, probabilities, limit, min_keep)


def _drop_unlikely(
    logits: np.ndarray, probabilities: np.ndarray, limit: float | np.ndarray, min_keep: int
) -> np.ndarray:
    """Drop what is less likely than `limit`, but never the `min_keep` likeliest."""
    k = min(min_keep, logits.shape[-1])
    threshold = np.partition(logits, -k, axis=-1)[..., -k, None]
    dropped = (probabilities < limit) & (logits < threshold)
    return np.where(dropped, -np.inf, logits).astype(logits.dtype, copy=False)


def _drop_sorted(logits: np.ndarray, order: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Set to -inf what `dropped` marks in the order that `order` describes."""
    mask = np.empty_like(dropped)
    np.put_along_axis(mask, order, dropped, axis=-1)
    return np.where(mask, -np.inf, logits).astype(logits.dtype, copy=False)


def repetition_penalty(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Make tokens that occurred before less likely (arXiv:1909.05858): seen (..., V) bool.

    A positive logit is divided by the penalty, a negative one multiplied.
    """
    penalized = np.where(logits < 0, logits * float(penalty), logits / float(penalty))
    return np.where(seen, penalized, logits)


def seen_tokens(rows: Iterable[Iterable[int]], vocab_size: int) -> np.ndarray:
    """Which words of the vocabulary occur in each row: (B, V) bool."""
    lists = [np.fromiter(row, np.int64) for row in rows]
    seen = np.zeros((len(lists), vocab_size), bool)
    for mask, ids in zip(seen, lists, strict=True):
        mask[ids] = True
    return seen


def no_repeat_ngram(
    logits: np.ndarray, rows: np.ndarray, size: int, history: np.ndarray | None = None
) -> np.ndarray:
    """Forbid every token that would complete an n-gram which the row already holds.

    logits (B, V), rows (B, S). history (B, S'): where n-grams are looked up, by default `rows`.
    """
    result = logits.copy()
    if rows.shape[1] + 1 < size:
        return result
    known = rows if history is None else history
    for scores, row, text in zip(result, rows, known, strict=True):
        if len(text) >= size:
            grams = np.lib.stride_tricks.sliding_window_view(text, size)
            begun = (grams[:, :-1] == row[len(row) - size + 1 :]).all(axis=1)
            scores[grams[begun, -1]] = -np.inf
    return result


def sequence_bias(
    logits: np.ndarray, rows: np.ndarray, biases: Mapping[tuple[int, ...], float]
) -> np.ndarray:
    """Add each bias to the last token of its sequence, in rows (B, S) that end in the others."""
    result = logits.copy()
    for sequence, bias in biases.items():
        *prefix, last = sequence
        if len(prefix) <= rows.shape[1]:
            ends = rows[:, rows.shape[1] - len(prefix) :]
            result[(ends == prefix).all(axis=1), last] += bias
    return result


def forbid(logits: np.ndarray, tokens: Iterable[int]) -> np.ndarray:
    """The same logits with -inf for the given tokens."""
    result = logits.copy()
    result[..., list(tokens)] = -np.inf
    return result


def force(logits: np.ndarray, tokens: Iterable[int]) -> np.ndarray:
    """0 for the given tokens and -inf for all others."""
    result = np.full_like(logits, -np.inf)
    result[..., list(tokens)] = 0
    return result


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def warp(logits: np.ndarray, sampling: Sampling, seen: np.ndarray | None = None) -> np.ndarray:
    """Apply everything that `sampling` switches on, in the order of transformers."""
    if sampling.repetition_penalty != 1 and seen is not None:
        logits = repetition_penalty(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits
    if sampling.temperature != 1:
        logits = temperature(logits, sampling.temperature)
    if sampling.top_k:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = min_p(logits, sampling.min_p)
    return logits


def check_drawable(logits: np.ndarray) -> None:
    """Errors: FloatingPointError for NaN logits, ValueError when nothing may be drawn."""
    check_no_nan(logits)
    if np.isneginf(logits.max(axis=-1)).any():
        raise ValueError("every token is forbidden: all logits are -inf")


def check_no_nan(logits: np.ndarray) -> None:
    """Errors: FloatingPointError for NaN logits."""
    if np.isnan(logits).any():
        raise FloatingPointError("the logits hold NaN: the weights or the inputs are broken")


def draw(logits: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Draw one token per row: logits (..., V), uniform numbers in [0, 1) (...) -> (...) ids.

    The cumulative distribution is inverted in float64, so a row's draw depends on its own
    logits and its own number only.
    """
    cumulative = np.cumsum(softmax(logits.astype(np.float64)), axis=-1)
    target = uniform[..., None] * cumulative[..., -1:]
    return (cumulative <= target).sum(axis=-1)
