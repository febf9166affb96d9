"""Guessing several tokens at once, to be checked by the model in a single pass.

A guess changes how fast a text appears, never which text: every token is chosen from the scores
that the model gives it, as without a guess. A right guess has spared a pass; after a wrong one,
everything behind it is forgotten.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from llama_np.cache import KVCache
from llama_np.config import Config
from llama_np.rope import steady_length


class Reader(Protocol):
    """One text on its way through a model, as `generate.TextReader` and `hf_session.Session`."""

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        ...

    @property
    def cache(self) -> KVCache | None:
        """What remembers them."""
        ...

    def feed(self, tokens: np.ndarray, *, keep: int = 1) -> np.ndarray:
        """Read new tokens (1, T): the scores of what follows the last `keep`, (1, keep, V)."""
        ...

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on."""
        ...


class Draft:
    """Something that guesses how a text goes on; it counts its guesses."""

    def __init__(self) -> None:
        self.guessed = 0  # tokens so far
        self.accepted = 0  # those that were right and spared a pass

    def guess(self, ids: np.ndarray) -> np.ndarray:
        """Tokens that may follow ids (S,): (n,)."""
        raise NotImplementedError

    def learn(self, accepted: int, guessed: int) -> None:
        """What became of the last guess, which may have been cut to `guessed` tokens."""
        self.guessed += guessed
        self.accepted += accepted


LONGEST_PAUSE = 7  # tokens without a guess after many wrong ones


class PromptLookup(Draft):
    """Guess that what followed the latest n-gram before follows it again.

    The longest n-gram that occurred before counts, and its first occurrence. After a guess of
    which nothing was right the next 1, 3 and then 7 tokens are not guessed: in a text that does
    not repeat itself guessing then costs a tenth of the speed, not a quarter.
    """

    def __init__(self, count: int, max_ngram: int = 2) -> None:
        super().__init__()
        if count < 1 or max_ngram < 1:
            raise ValueError(
                f"prompt lookup of {count} tokens after {max_ngram}: expected 1 or more"
            )
        self.count, self.max_ngram = count, max_ngram
        self.pause = self.waiting = 0

    def guess(self, ids: np.ndarray) -> np.ndarray:
        """The tokens that followed: up to `count`, none where nothing matches or in a pause."""
        if self.waiting:
            self.waiting -= 1
            return ids[:0]
        for size in range(min(self.max_ngram, len(ids) - 1), 0, -1):
            grams = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
            found = np.flatnonzero((grams == ids[-size:]).all(axis=1))
            if found.size:
                start = found[0] + size
                return ids[start : start + self.count]
        return ids[:0]

    def learn(self, accepted: int, guessed: int) -> None:
        """Pause after a wrong guess, longer after several of them."""
        super().learn(accepted, guessed)
        self.pause = 0 if accepted else min(2 * self.pause + 1, LONGEST_PAUSE)
        self.waiting = self.pause


class DraftModel(Draft):
    """Let a smaller model with the same vocabulary write ahead, greedily.

    With the schedule "heuristic" it writes two tokens more after a fully accepted guess and one
    less after any other, as transformers does; with "constant" always the same number.
    """

    def __init__(self, reader: Reader, count: int = 5, schedule: str = "heuristic") -> None:
        super().__init__()
        if schedule not in ("heuristic", "constant"):
            raise ValueError(f"num_assistant_tokens_schedule = {schedule!r}")
        self.reader, self.count, self.schedule = reader, count, schedule
        self.fed = np.zeros(0, np.int64)  # what the smaller model has read

    def guess(self, ids: np.ndarray) -> np.ndarray:
        """What the smaller model would write: (count,)."""
        shared = min(len(self.fed), len(ids) - 1)
        differing = np.flatnonzero(self.fed[:shared] != ids[:shared])
        known = int(differing[0]) if differing.size else shared
        self.fed = ids[:known]
        if known < self.reader.length:
            self.reader.rewind(known)
        scores = self.reader.feed(ids[None, known:])
        guessed = [int(scores[0, -1].argmax())]
        while len(guessed) < self.count:
            scores = self.reader.feed(np.array([guessed[-1:]]))
            guessed.append(int(scores[0, -1].argmax()))
        self.fed = np.concatenate([ids, guessed[:-1]]).astype(np.int64)
        return np.array(guessed)

    def learn(self, accepted: int, guessed: int) -> None:
        """Write more ahead if everything was right, less if not."""
        super().learn(accepted, guessed)
        if self.schedule == "heuristic":
            self.count = self.count + 2 if accepted == guessed else max(1, self.count - 1)


class Speculation:
    """The scores after each token of one text, several of them from one pass."""

    def __init__(self, reader: Reader, draft: Draft, config: Config) -> None:
        self.reader, self.draft, self.config = reader, draft, config
        self.guess = np.zeros(0, np.int64)  # (n,)
        self.scores = np.zeros((1, 1, 0))  # (1, n + 1, V)
        self.accepted = 0
        self.start = 0  # what the reader had read before the latest pass

    def after(self, ids: np.ndarray, most: int) -> np.ndarray:
        """The scores of what follows ids (S,), of which all but the last were read: (1, V).

        most: how many tokens may be guessed, as no more are wanted.
        """
        if self.accepted < len(self.guess) and ids[-1] == self.guess[self.accepted]:
            self.accepted += 1
            return self.scores[:, self.accepted]
        self.settle()
        room = min(most, self._room())
        guess = self.draft.guess(ids)[:room] if room > 0 else ids[:0]
        start = self.reader.length
        fed = np.concatenate([ids[-1:], guess])[None]  # (1, n + 1)
        self.scores = self.reader.feed(fed, keep=fed.shape[1])
        self.guess, self.accepted, self.start = guess, 0, start
        return self.scores[:, 0]

    def settle(self) -> None:
        """Forget what was guessed wrong: the reader has then read what it would have without."""
        if len(self.guess):
            self.draft.learn(self.accepted, len(self.guess))
            self.reader.rewind(self.start + 1 + self.accepted)
        self.guess = self.guess[:0]

    def _room(self) -> float:
        """How many tokens can be read together with the next one as if one by one."""
        length, cache = self.reader.length + 1, self.reader.cache
        slots = cache.capacity if cache is not None and cache.fixed else np.inf
        return min(slots, steady_length(self.config, length)) - length
