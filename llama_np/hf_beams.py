"""Beam search: keep the most likely texts instead of the most likely next tokens.

The n beams of a prompt are neighbouring rows. Per step all beams and all words compete at once;
only closing a hypothesis, which is rare, looks at single candidates.

Rules such as prefix_allowed_tokens_fn may leave fewer texts than beams: what is forbidden, or
goes on from a beam that was never filled, closes nothing, and a search whose beams are all of
that kind is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llama_np import sampling

UNBORN = -1e9  # score of the beams that a prompt does not have yet: the first step fills them
DEAD = UNBORN / 2  # what scores less goes on from such a beam, or is forbidden


@dataclass
class Hypothesis:
    """A text that will not grow: tokens without the eos that closed it, if one did."""

    score: float
    tokens: np.ndarray
    origins: np.ndarray  # for each generated token, the row whose scores it was chosen from
    closed: bool


@dataclass
class Best:
    """The best n texts of one prompt so far."""

    size: int
    length_penalty: float
    early_stopping: bool | str
    longest: int  # generated tokens that fit
    texts: list[Hypothesis] = field(default_factory=list)

    def add(self, total: float, length: int, text: Hypothesis) -> None:
        """Take the text in if it is among the best; `length` generated tokens, eos included."""
        text.score = total / length**self.length_penalty
        if len(self.texts) < self.size or text.score > self.worst:
            self.texts.append(text)
            if len(self.texts) > self.size:
                self.texts.remove(min(self.texts, key=lambda text: text.score))

    @property
    def worst(self) -> float:
        """The lowest score among the best."""
        return min(text.score for text in self.texts)

    def complete(self, best_total: float, length: int) -> bool:
        """Whether no beam can become better than the worst of the texts."""
        if len(self.texts) < self.size:
            return False
        if self.early_stopping is True:
            return True
        optimistic = self.early_stopping == "never" and self.length_penalty > 0
        reach = self.longest if optimistic else length
        return self.worst >= best_total / reach**self.length_penalty


@dataclass
class Found:
    """The result of a search: (B * kept, S) ids, their scores, and where each token came from."""

    sequences: np.ndarray
    scores: np.ndarray
    beam_indices: np.ndarray


class Beams:
    """The state of a beam search: B prompts with n beams each, in one or several groups.

    A group is a search of its own, with n / groups beams; only the diversity penalty connects the
    groups of a prompt. R = B * n rows, the groups of a prompt are neighbours.
    """

    def __init__(self, options: Any, ids: np.ndarray) -> None:
        self.options = options
        self.groups = options.num_beam_groups or 1
        self.count = options.num_beams // self.groups
        self.prompt_length = ids.shape[1]
        searches = len(ids) // self.count
        self.totals = np.zeros((searches, self.count), np.float32)
        if not options.do_sample:
            self.totals[:, 1:] = UNBORN
        self.origins = np.zeros((len(ids), 0), np.int64)
        longest = options.max_length - self.prompt_length
        self.best = [
            Best(self.count, options.length_penalty, options.early_stopping, max(longest, 1))
            for _ in range(searches)
        ]
        self.complete = np.zeros(searches, bool)

    @property
    def done(self) -> bool:
        """Whether every search has its texts."""
        return bool(self.complete.all())

    def searches(self, group: int) -> np.ndarray:
        """The searches of one group, one for each prompt: (B,)."""
        return np.arange(group, len(self.best), self.groups)

    def rows(self, searches: np.ndarray) -> np.ndarray:
        """The rows of these searches: (B * n / groups,)."""
        return (searches[:, None] * self.count + np.arange(self.count)).reshape(-1)

    def advance(self, rows: np.ndarray) -> None:
        """Remember from which row each row goes on, once all groups have chosen."""
        self.origins = np.concatenate([self.origins[rows], rows[:, None]], axis=1)

    def step(
        self, ids: np.ndarray, logprobs: np.ndarray, searches: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose the next beams of some searches from the log-probabilities of their rows.

        ids: all rows. Returns (rows to go on from, their tokens). An eos closes a hypothesis if
        it is among the n best candidates, and is dropped if not.
        """
        B, V = len(searches), logprobs.shape[1]
        totals = logprobs.reshape(B, self.count, V) + self.totals[searches, :, None]  # (B, n, V)
        flat = totals.reshape(B, -1)  # (B, n * V)
        idle = self.complete[searches].copy()
        flat[idle] = 0  # whatever they go on with is never read
        sampling.check_no_nan(flat)
        chosen = self._candidates(flat, rng)  # (B, candidates)
        scores = np.take_along_axis(flat, chosen, axis=1)
        rows = chosen // V + searches[:, None] * self.count
        tokens = chosen % V
        going_on = self._going_on(ids, searches, rows, tokens, scores)  # (B, n) candidates
        rows, tokens = (np.take_along_axis(a, going_on, axis=1) for a in (rows, tokens))
        self.totals[searches] = np.take_along_axis(scores, going_on, axis=1)
        tokens[idle], rows[idle] = self.options.pad_token_id or 0, 0
        return rows.reshape(-1), tokens.reshape(-1)

    def _candidates(self, flat: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The best (or drawn) continuations of each prompt, best first: enough to lose some to eos.

        Drawing without replacement: the largest of log-probability plus Gumbel noise.
        """
        eos = self.options.eos_token_id or []
        wanted = min(max(2, 1 + len(eos)) * self.count, flat.shape[1])
        keys = flat
        if self.options.do_sample:
            keys = flat + rng.gumbel(size=flat.shape)
        best = np.sort(np.argpartition(-keys, wanted - 1, axis=1)[:, :wanted], axis=1)
        order = np.argsort(-np.take_along_axis(flat, best, axis=1), axis=1, kind="stable")
        return np.take_along_axis(best, order, axis=1)

    def _going_on(
        self,
        ids: np.ndarray,
        searches: np.ndarray,
        rows: np.ndarray,
        tokens: np.ndarray,
        scores: np.ndarray,
    ) -> np.ndarray:
        """The first n candidates of each search that are no eos; each eos closes a hypothesis."""
        ends = np.isin(tokens, self.options.eos_token_id or [])  # (B, candidates)
        going_on = np.argsort(ends, axis=1, kind="stable")[:, : self.count]
        length = ids.shape[1] + 1 - self.prompt_length
        for b, search in enumerate(searches):
            if self.complete[search]:
                continue
            best = self.best[search]
            alive = scores[b] > DEAD
            for rank in np.flatnonzero((ends[b] & alive)[: self.count]):
                row = rows[b, rank]
                origins = np.append(self.origins[row], row)
                text = Hypothesis(0.0, ids[row], origins, closed=True)
                best.add(float(scores[b, rank]), length, text)
            stuck = not alive[going_on[b]].any()
            if stuck and not best.texts:
                raise ValueError("every token is forbidden: all beams end without a text")
            self.complete[search] = stuck or best.complete(float(scores[b].max()), length)
        return going_on

    def finish(self, ids: np.ndarray) -> Found:
        """Add the unfinished beams (R, S) and give back the best texts of each prompt.

        Where fewer exist than were asked for, the last one fills up, with a score of -inf.
        """
        for search in np.flatnonzero(~self.complete):
            self._add_unfinished(int(search), ids)
        kept: list[Hypothesis] = []
        wanted = self.options.num_return_sequences
        for first in range(0, len(self.best), self.groups):
            texts = [text for best in self.best[first : first + self.groups] for text in best.texts]
            ranked = sorted(texts, key=lambda text: text.score)[::-1]
            kept += ranked[:wanted]
            kept += [replace(ranked[-1], score=-np.inf)] * (wanted - len(ranked))
        return self._padded(kept)

    def _add_unfinished(self, search: int, ids: np.ndarray) -> None:
        length = ids.shape[1] - self.prompt_length
        for n in np.flatnonzero(self.totals[search] > DEAD):
            total, row = self.totals[search, n], search * self.count + int(n)
            text = Hypothesis(0.0, ids[row], self.origins[row], closed=False)
            self.best[search].add(float(total), length, text)

    def _padded(self, texts: list[Hypothesis]) -> Found:
        """Texts of different lengths as one array; a closed one is followed by the first eos."""
        width = max(len(text.tokens) + text.closed for text in texts)
        pad = self.options.pad_token_id
        sequences = np.full((len(texts), width), 0 if pad is None else pad)
        beam_indices = np.full((len(texts), width), -1)
        for i, text in enumerate(texts):
            n = len(text.tokens)
            sequences[i, :n] = text.tokens
            if text.closed:
                sequences[i, n] = self.options.eos_token_id[0]
            beam_indices[i, : len(text.origins)] = text.origins
        return Found(sequences, np.array([t.score for t in texts], np.float32), beam_indices)
