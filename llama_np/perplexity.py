"""How likely a model finds given texts: exact log-likelihoods, many texts at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_np.cache import KVCache
from llama_np.chunks import hidden_in_chunks
from llama_np.config import Config
from llama_np.generate import activation_dtype, pad
from llama_np.model import ModelWeights, logits
from llama_np.sampling import log_softmax

BATCH_TOKENS = 2048  # tokens per forward pass, padding included; bounds the memory
MOST_PADDING = 32  # tokens of padding in a batch; another forward pass costs about as much


@dataclass(frozen=True)
class Likelihood:
    """What the model thinks of one text: the natural logarithm of its probability.

    The first token is given, not predicted; `token_count` are the predicted ones.
    """

    log_likelihood: float
    token_count: int

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise per token; NaN if nothing was predicted."""
        if not self.token_count:
            return math.nan
        return math.exp(-self.log_likelihood / self.token_count)


def batches(
    lengths: Sequence[int], limit: int = BATCH_TOKENS, padding: int = MOST_PADDING
) -> Iterator[list[int]]:
    """Indices of texts of similar length: every batch has at most `padding` tokens of padding.

    Lines of 4 to 100 tokens take half the time that they take without that bound.
    """
    batch: list[int] = []
    total = 0  # tokens of the batch
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        total += lengths[index]
        padded = (len(batch) + 1) * lengths[index]
        if batch and (padded > limit or padded - total > padding):
            yield batch
            batch, total = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch


def score(rows: Sequence[Sequence[int]], weights: ModelWeights, config: Config) -> list[Likelihood]:
    """The likelihood of every text, given as token ids; batched by length, in the given order.

    Errors: ValueError for an empty row or one beyond the trained context, IndexError for an
    unknown id.
    """
    for place, row in enumerate(rows):
        if not 1 <= len(row) <= config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"text {place} has {len(row)} tokens, expected 1 to {limit}")
    found: list[Likelihood | None] = [None] * len(rows)
    for batch in batches([len(row) for row in rows]):
        results = score_batch([rows[i] for i in batch], weights, config)
        for index, result in zip(batch, results, strict=True):
            found[index] = result
    return [result for result in found if result is not None]


def score_batch(
    rows: Sequence[Sequence[int]], weights: ModelWeights, config: Config
) -> list[Likelihood]:
    """The likelihood of every row of one ragged batch."""
    tokens, positions = pad(rows)
    B, T = tokens.shape
    cache = KVCache(config, B, T, activation_dtype(weights))
    hidden = hidden_in_chunks(tokens, weights, config, cache, positions)
    results = []
    for row, states in zip(rows, hidden, strict=True):  # the logits of all rows would not fit
        scores = logits(states[None, : len(row) - 1], weights)[0].astype(np.float64)
        following = np.array(row[1:], np.int64)[:, None]
        chosen = np.take_along_axis(log_softmax(scores), following, axis=1)
        results.append(Likelihood(float(chosen.sum()), len(row) - 1))
    return results
