"""Guessing several tokens at once, to be checked by the model in a single pass.

A guess changes how fast a text appears, never which text: a wrong token is replaced by the
model's own, and everything after it is forgotten.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from llama_np.hf_session import Session


class Draft(Protocol):
    """Something that guesses how a text goes on."""

    def guess(self, ids: np.ndarray) -> np.ndarray:
        """Tokens that may follow ids (S,): (n,)."""
        ...

    def learn(self, accepted: int, guessed: int) -> None:
        """What became of the last guess."""


class PromptLookup:
    """Guess that what followed the latest n-gram before follows it again.

    The longest n-gram that occurred before counts, and its first occurrence.
    """

    def __init__(self, count: int, max_ngram: int = 2) -> None:
        if count < 1 or max_ngram < 1:
            raise ValueError("prompt_lookup_num_tokens and max_matching_ngram_size must be >= 1")
        self.count, self.max_ngram = count, max_ngram

    def guess(self, ids: np.ndarray) -> np.ndarray:
        """The tokens that followed: up to `count`, none where nothing matches."""
        for size in range(min(self.max_ngram, len(ids) - 1), 0, -1):
            grams = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
            found = np.flatnonzero((grams == ids[-size:]).all(axis=1))
            if found.size:
                start = found[0] + size
                return ids[start : start + self.count]
        return ids[:0]

    def learn(self, accepted: int, guessed: int) -> None:
        """Nothing: the next guess depends on the text only."""


class DraftModel:
    """Let a smaller model with the same vocabulary write ahead, greedily.

    With the schedule "heuristic" it writes two tokens more after a fully accepted guess and one
    less after any other, as transformers does; with "constant" always the same number.
    """

    def __init__(self, session: Session, count: int, schedule: str) -> None:
        if schedule not in ("heuristic", "constant"):
            raise ValueError(f"num_assistant_tokens_schedule = {schedule!r}")
        self.session, self.count, self.schedule = session, count, schedule
        self.fed = np.zeros(0, np.int64)

    def guess(self, ids: np.ndarray) -> np.ndarray:
        """What the smaller model would write: (count,)."""
        shared = min(len(self.fed), len(ids) - 1)
        differing = np.flatnonzero(self.fed[:shared] != ids[:shared])
        known = int(differing[0]) if differing.size else shared
        if known < len(self.fed):
            self.session.rewind(known)
        scores = self.session.feed(ids[None, known:])
        guessed = [int(scores[0, -1].argmax())]
        while len(guessed) < self.count:
            scores = self.session.feed(np.array([guessed[-1:]]))
            guessed.append(int(scores[0, -1].argmax()))
        self.fed = np.concatenate([ids, guessed[:-1]]).astype(np.int64)
        return np.array(guessed)

    def learn(self, accepted: int, guessed: int) -> None:
        """Write more ahead if everything was right, less if not."""
        if self.schedule == "heuristic":
            self.count = self.count + 2 if accepted == guessed else max(1, self.count - 1)
