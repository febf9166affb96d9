"""A batch of rows on its way through a model: what generate() feeds, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_np.cache import KVCache
from llama_np.model import ModelWeights, logits


class Session:
    """Rows of one model with their cache, mask and positions; R rows, S tokens so far.

    mask (R, S) has 1 for tokens that may be seen. Positions count the tokens that are seen, so
    that left padding changes nothing; masked tokens get 1, as in transformers.
    """

    def __init__(
        self,
        model: Any,
        weights: ModelWeights,
        mask: np.ndarray,
        cache: KVCache | None,
        positions: np.ndarray | None = None,
        traced: tuple[bool, bool] = (False, False),
    ) -> None:
        self.model, self.weights, self.cache = model, weights, cache
        self.mask = np.asarray(mask == 1, np.int64)  # (R, S)
        self.positions = self._counted() if positions is None else positions  # (R, S)
        self.following = self.mask.sum(axis=1, keepdims=True)  # (R, 1)
        if positions is not None:
            self.following = positions[:, -1:] + 1
        self.attentions: list[tuple[np.ndarray, ...]] | None = [] if traced[0] else None
        self.hidden_states: list[tuple[np.ndarray, ...]] | None = [] if traced[1] else None
        self.hidden = np.zeros((len(self.mask), 0, 0))  # final hidden states of the latest tokens
        self._embedded: np.ndarray | None = None  # everything fed so far, where nothing is cached

    def _counted(self) -> np.ndarray:
        return np.where(self.mask == 1, self.mask.cumsum(axis=1) - 1, 1)

    @property
    def length(self) -> int:
        """How many tokens have been fed."""
        if self.cache is not None:
            return self.cache.length
        return 0 if self._embedded is None else self._embedded.shape[1]

    def unread(self) -> int:
        """How many columns of the mask have not been fed; the last one is fed again if need be."""
        if self.cache is not None and self.length >= self.mask.shape[1]:
            self.cache.crop(self.mask.shape[1] - 1)
        return self.mask.shape[1] - self.length

    def feed(
        self, tokens: np.ndarray | None, embedded: np.ndarray | None = None, keep: int = 1
    ) -> np.ndarray:
        """Run new tokens (R, T), or vectors (R, T, D): the logits of the last `keep`, (R, keep, V).

        Without a cache everything so far is run again.
        """
        new = embedded if tokens is None else tokens
        assert new is not None, "tokens or vectors"
        start, end = self.length, self.length + new.shape[1]
        self._extend(end)
        if self.cache is None:
            embedded, tokens, start = self._remember(tokens, embedded), None, 0
        out = self.model.run(
            self.weights,
            input_ids=tokens,
            inputs_embeds=embedded,
            attention_mask=self.mask[:, :end],
            position_ids=self.positions[:, start:end],
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            output_attentions=self.attentions is not None,
            output_hidden_states=self.hidden_states is not None,
        )
        if self.attentions is not None:
            self.attentions.append(out.attentions)
        if self.hidden_states is not None:
            self.hidden_states.append(out.hidden_states)
        self.hidden = out.last_hidden_state  # (R, T, D)
        return logits(self.hidden[:, -keep:], self.weights, self.model.rounding)

    def _extend(self, end: int) -> None:
        """Make room for columns that are fed for the first time; they are all seen."""
        count = end - self.mask.shape[1]
        if count > 0:
            new = self.following + np.arange(count)  # (R, count)
            self.mask = np.concatenate([self.mask, np.ones_like(new)], axis=1)
            self.positions = np.concatenate([self.positions, new], axis=1)
            self.following = self.following + count

    def _remember(self, tokens: np.ndarray | None, embedded: np.ndarray | None) -> np.ndarray:
        new = self.model.embed(tokens, embedded, self.weights)
        before = [] if self._embedded is None else [self._embedded]
        self._embedded = np.concatenate([*before, new], axis=1)
        return self._embedded

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on, which must lie behind the prompt."""
        if length < self.mask.shape[1]:
            self.following = self.positions[:, length, None]
            self.mask, self.positions = self.mask[:, :length], self.positions[:, :length]
        if self.cache is not None:
            self.cache.crop(length)

    def reorder(self, rows: np.ndarray) -> None:
        """Let every row go on from what another row of the same prompt has read."""
        if np.array_equal(rows, np.arange(len(self.mask))):
            return  # nothing to copy
        if self.cache is not None:
            self.cache.select(rows)
        if self._embedded is not None:
            self._embedded = self._embedded[rows]

    def select(self, rows: np.ndarray) -> None:
        """Keep the given rows, in the given order; a row may be taken more than once."""
        self.reorder(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.following = self.following[rows]

    def select_traced(self, rows: np.ndarray) -> None:
        """Keep the given rows of what was traced in the latest pass."""
        for steps in (self.attentions, self.hidden_states):
            if steps is not None:
                steps[-1] = tuple(array[rows] for array in steps[-1])

    def forget_last(self) -> None:
        """Forget the latest pass over one token: its keys, values and traces."""
        if self.cache is not None:
            self.cache.crop(self.cache.length - 1)
        for steps in (self.attentions, self.hidden_states):
            if steps is not None:
                steps.pop()

    def repeat(self, count: int) -> None:
        """Every row `count` times, neighbours of each other; what was traced, too."""
        self.select(np.repeat(np.arange(len(self.mask)), count))
        for steps in (self.attentions, self.hidden_states):
            if steps is not None and count > 1:
                steps[:] = [tuple(np.repeat(a, count, axis=0) for a in step) for step in steps]
