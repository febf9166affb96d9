"""Text from a model: prefill, then vectorized decoding of a ragged batch.

Rows that finished leave the batch, waiting prompts take their places; a row's tokens do not
depend on the company it is in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_np.cache import KVCache
from llama_np.chunks import hidden_in_chunks
from llama_np.config import Config
from llama_np.model import ModelWeights, check_tokens, hidden_states, logits
from llama_np.sampling import (
    Sampling,
    check_drawable,
    check_number,
    draw,
    log_softmax,
    seen_tokens,
    warp,
)
from llama_np.speculate import Draft, Speculation
from llama_np.tokenizer import DecodeStream, Tokenizer

BATCH_SIZE = 32  # rows decoded together; more are queued


@dataclass(frozen=True)
class Token:
    """One step of one row, as `stream` reports it.

    `row` is the index of the prompt, `text` what may be shown now (whole characters, nothing
    that could become a stop string), `finish_reason` None, "stop" or "length". A row that may
    not generate anything reports `id` None once. `logprob` is the natural logarithm of the
    token's probability before any warping; `top_logprobs` the likeliest (id, logprob) pairs.
    """

    row: int
    id: int | None
    text: str = ""
    finish_reason: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """What a prompt led to: ids (a final stop id included), text (without it), and why it ended."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)


def generate(
    prompts: Sequence[Sequence[int]], weights: ModelWeights, config: Config, **options: object
) -> list[Completion]:
    """Complete every prompt; prompts are lists of token ids. Options: see `stream`."""
    _check_prompts(prompts)
    completions = [Completion([int(i) for i in prompt]) for prompt in prompts]
    for token in stream(prompts, weights, config, **options):  # type: ignore[arg-type]
        done = completions[token.row]
        done.text += token.text
        if token.id is not None:
            done.token_ids.append(token.id)
        if token.logprob is not None:
            done.logprobs.append(token.logprob)
            done.top_logprobs.append(token.top_logprobs)
        done.finish_reason = token.finish_reason or done.finish_reason
    return completions


def stream(
    prompts: Sequence[Sequence[int]],
    weights: ModelWeights,
    config: Config,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    logprobs: int | None = None,
    batch_size: int = BATCH_SIZE,
    cache: KVCache | None = None,
    draft: Draft | None = None,
) -> Iterator[Token]:
    """Complete every prompt and report each token as soon as it is chosen.

    stop_ids: by default the configuration's eos ids. stop_strings need a `tokenizer`, which
    also fills `Token.text`. seeds: one per prompt (default 0, 1, 2, ...); a prompt with its
    seed draws the same tokens alone and in any batch. logprobs: report the chosen token's
    log-probability, and that many of the likeliest. A row ends after `max_new_tokens`, or when
    prompt and completion fill the trained context, with finish_reason "length".
    cache: for a single prompt, a cache that already holds its first tokens.
    draft: for a single prompt, what guesses tokens to be checked in one pass (`speculate`);
    the result is the same up to the order of summation.
    Errors: ValueError for an empty prompt, a number out of range or missing tokenizer;
    TypeError for arguments of another kind; IndexError for an unknown id; FloatingPointError for
    NaN logits.
    """
    _check_prompts(prompts)
    _check_numbers(max_new_tokens, batch_size, logprobs)
    _check_kinds(sampling, tokenizer)
    if stop_strings and tokenizer is None:
        raise ValueError("stop strings need a tokenizer")
    if any(not text for text in stop_strings):
        raise ValueError("a stop string is empty")
    for name, given in (("cache", cache), ("draft", draft)):
        if given is not None and len(prompts) != 1:
            raise ValueError(f"a {name} can be handed in for a single prompt only")
    if cache is not None and cache.batch != 1:
        raise ValueError(f"the cache holds {cache.batch} rows, expected one")
    stops = frozenset(config.eos_token_id if stop_ids is None else _checked_stops(stop_ids))
    room = config.max_position_embeddings
    rows = _rows(prompts, seeds, config, tokenizer, tuple(stop_strings))
    for row in rows:
        row.limit = max(0, min(max_new_tokens, room - len(row.prompt)))
        if not row.limit:
            yield Token(row.index, None, finish_reason="length")
    waiting = deque(row for row in rows if row.limit)
    ahead = None
    if draft is not None and waiting:
        reader = TextReader(weights, config, cache)
        cache, ahead = reader.cache, Speculation(reader, draft, config)
    try:
        yield from _decode(
            waiting, weights, config, sampling, stops, logprobs, batch_size, cache, ahead
        )
    finally:
        if ahead is not None:
            ahead.settle()


def _check_prompts(prompts: Any) -> None:
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(
            "prompts are lists of token ids: encode texts first, tokenizer.encode(text)"
        )


def _check_numbers(max_new_tokens: int, batch_size: int, logprobs: int | None) -> None:
    wanted = {"max_new_tokens": (max_new_tokens, 0), "batch_size": (batch_size, 1)}
    if logprobs is not None:
        wanted["logprobs"] = (logprobs, 0)
    for name, (value, least) in wanted.items():
        check_number(name, value, (int,))
        if value < least:
            raise ValueError(f"{name} = {value!r}: expected at least {least}")


def _check_kinds(sampling: Any, tokenizer: Any) -> None:
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling is a {type(sampling).__name__}, expected Sampling(...)")
    if tokenizer is not None and getattr(tokenizer, "decode_stream", None) is None:
        found = type(tokenizer).__name__
        raise TypeError(f"tokenizer is a {found}, expected what load_tokenizer(...) returns")


def _checked_stops(ids: Sequence[int]) -> list[int]:
    for token in ids:
        check_number("stop id", token, (int,))
        if token < 0:
            raise ValueError(f"stop id = {token!r}: expected at least 0")
    return [int(token) for token in ids]


@dataclass
class _Row:
    """A prompt on its way: what it has said and what it may still say."""

    index: int
    prompt: list[int]
    random: np.random.Generator
    writer: StopStrings | None
    limit: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """The prompt and what followed."""
        return self.prompt + self.token_ids

    @property
    def position(self) -> int:
        """The position of the latest token."""
        return len(self.prompt) + len(self.token_ids) - 1


def _rows(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None,
    config: Config,
    tokenizer: Tokenizer | None,
    stop_strings: tuple[str, ...],
) -> list[_Row]:
    rows = []
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        ids = check_tokens(np.asarray(prompt)[None], config.vocab_size)[0].tolist()
        if not ids:
            raise ValueError(f"prompt {index} is empty: begin with the BOS token")
        check_number("seed", seed, (int,))
        if seed < 0:
            raise ValueError(f"seed = {seed!r}: expected at least 0")
        writer = None
        if tokenizer is not None:
            writer = StopStrings(tokenizer.decode_stream(prompt_ids=ids), stop_strings)
        rows.append(_Row(index, ids, np.random.default_rng(int(seed)), writer))
    return rows


def _decode(
    waiting: deque[_Row],
    weights: ModelWeights,
    config: Config,
    sampling: Sampling,
    stops: frozenset[int],
    logprobs: int | None,
    batch_size: int,
    cache: KVCache | None,
    ahead: Speculation | None,
) -> Iterator[Token]:
    """The loop: admit waiting prompts, choose a token for every row, let finished rows go."""
    rows: list[_Row] = []
    scores = np.empty((0, config.vocab_size))
    while rows or waiting:
        if waiting and len(rows) < batch_size:
            newcomers = [
                waiting.popleft() for _ in range(min(batch_size - len(rows), len(waiting)))
            ]
            cache, scores = _admit(newcomers, rows, scores, weights, config, cache)
        tokens = _choose(scores, rows, sampling, config.vocab_size)
        reports = [
            _report(row, int(token), stops, score, logprobs)
            for row, token, score in zip(rows, tokens, scores, strict=True)
        ]
        yield from reports
        kept = [i for i, report in enumerate(reports) if report.finish_reason is None]
        if not kept:  # the next prompts begin afresh, and a caller's cache stays as it is
            rows, cache = [], None
            continue
        if len(kept) < len(rows):
            rows = [rows[i] for i in kept]
            _memory(cache).select(np.array(kept, np.int64))
        if ahead is None:
            scores = _step(rows, weights, config, _memory(cache))
        else:
            scores = ahead.after(np.array(rows[0].ids), rows[0].limit - len(rows[0].token_ids) - 1)


def _memory(cache: KVCache | None) -> KVCache:
    assert cache is not None, "rows are admitted before they are decoded"
    return cache


def _admit(
    newcomers: list[_Row],
    rows: list[_Row],
    scores: np.ndarray,
    weights: ModelWeights,
    config: Config,
    cache: KVCache | None,
) -> tuple[KVCache, np.ndarray]:
    """Prefill new prompts and put them beside the rows that are being decoded."""
    prompts = [row.prompt for row in newcomers]
    if rows and cache is not None:
        fresh = KVCache(config, len(prompts), dtype=cache.keys[0].dtype)
        first = prefill(prompts, weights, config, fresh)
        cache.join(fresh)
        scores = np.concatenate([scores, first])
    else:
        if cache is None or cache.batch != len(prompts):
            cache = KVCache(config, len(prompts), dtype=activation_dtype(weights))
        scores = prefill(prompts, weights, config, cache)
    rows.extend(newcomers)
    return cache, scores


def activation_dtype(weights: ModelWeights) -> np.dtype:
    """The dtype that the model computes in: that of its norms, which never rest in two bytes."""
    return weights["model.norm.weight"].dtype


def prefill(
    prompts: Sequence[Sequence[int]], weights: ModelWeights, config: Config, cache: KVCache
) -> np.ndarray:
    """Run ragged prompts through the model in one batch: the next-token logits (B, V).

    Padding gets position -1. A cache that is not empty holds the first tokens of a single
    prompt; only the rest is computed.
    """
    known = min(cache.length, min(len(prompt) for prompt in prompts) - 1)
    cache.crop(known)
    tokens, positions = pad([prompt[known:] for prompt in prompts], known)
    lengths = (positions >= 0).sum(axis=1)
    hidden = hidden_in_chunks(tokens, weights, config, cache, positions)  # (B, T, D)
    last = hidden[np.arange(len(hidden)), lengths - 1]  # (B, D)
    return logits(last[:, None], weights)[:, 0]


def pad(prompts: Sequence[Sequence[int]], start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts as tokens and positions, both (B, T): padding stands right, at -1."""
    T = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((len(prompts), T), np.int64)
    positions = np.full((len(prompts), T), -1, np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(start, start + len(prompt))
    return tokens, positions


def _step(rows: list[_Row], weights: ModelWeights, config: Config, cache: KVCache) -> np.ndarray:
    """Feed every row's latest token: the next-token logits (B, V)."""
    cache.compact_if_sparse()
    tokens = np.array([[row.token_ids[-1]] for row in rows])
    positions = np.array([[row.position] for row in rows])
    hidden = hidden_states(tokens, weights, config, cache, positions)
    return logits(hidden, weights)[:, 0]


class TextReader:
    """One text on its way through a model, chunk by chunk: what a `Speculation` feeds.

    Without a cache it begins with an empty one.
    """

    def __init__(self, weights: ModelWeights, config: Config, cache: KVCache | None = None) -> None:
        self.weights, self.config = weights, config
        self.cache = KVCache(config, dtype=activation_dtype(weights)) if cache is None else cache

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        return self.cache.length

    def feed(self, tokens: np.ndarray, *, keep: int = 1) -> np.ndarray:
        """Read new tokens (1, T): the scores of what follows the last `keep`, (1, keep, V)."""
        positions = self.cache.continuation(*tokens.shape)
        hidden = hidden_in_chunks(tokens, self.weights, self.config, self.cache, positions)
        return logits(hidden[:, -keep:], self.weights)

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on."""
        self.cache.crop(length)


def _choose(
    scores: np.ndarray, rows: list[_Row], sampling: Sampling, vocab_size: int
) -> np.ndarray:
    """One token per row: (B, V) -> (B,)."""
    seen = None
    if sampling.repetition_penalty != 1:
        seen = seen_tokens((row.ids for row in rows), vocab_size)
    warped = warp(scores, sampling, seen)
    check_drawable(warped)
    if sampling.temperature == 0:
        return warped.argmax(axis=-1)
    return draw(warped, np.array([row.random.random() for row in rows]))


def _report(
    row: _Row, token: int, stops: frozenset[int], scores: np.ndarray, logprobs: int | None
) -> Token:
    """Add the token to its row and say what that means for the text and the end."""
    row.token_ids.append(token)
    reason = "stop" if token in stops else None
    text = ""
    if row.writer is not None:
        text, stopped = ("", False) if reason else row.writer.push(token)
        reason = "stop" if stopped else reason
    if reason is None and len(row.token_ids) >= row.limit:
        reason = "length"
    if row.writer is not None and reason is not None:
        text += row.writer.flush()
    if logprobs is None:
        return Token(row.index, token, text, reason)
    every = log_softmax(scores.astype(np.float64))
    best = np.argsort(-every, kind="stable")[:logprobs]
    top = tuple((int(i), float(every[i])) for i in best)
    return Token(row.index, token, text, reason, float(every[token]), top)


class StopStrings:
    """Holds back text that could still become a stop string, which may span tokens."""

    def __init__(self, stream: DecodeStream, stops: tuple[str, ...]) -> None:
        self.stream = stream
        self.stops = stops
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        """The text that may be shown after this token, and whether a stop string is complete."""
        self.held += self.stream.push(token)
        return self._release()

    def _release(self) -> tuple[str, bool]:
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            text, self.held, self.stopped = self.held[: min(found)], "", True
            return text, True
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        split = len(self.held) - keep
        text, self.held = self.held[:split], self.held[split:]
        return text, False

    def flush(self) -> str:
        """The rest, once no further token can come."""
        if self.stopped:
            return ""
        self.held += self.stream.flush()
        text, stopped = self._release()
        rest, self.held = self.held, ""
        return text if stopped else text + rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
