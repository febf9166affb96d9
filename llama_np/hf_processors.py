"""What generate() does to the scores of the next token, in the order of transformers 4.37.2.

A processor is a function (ids (R, S), scores (R, V)) -> scores. Processors always act, warpers
only when tokens are drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from llama_np import sampling

Processor = Callable[[np.ndarray, np.ndarray], np.ndarray]


def apply(processors: Iterable[Processor], ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Pass the scores through every processor."""
    for processor in processors:
        scores = np.asarray(processor(ids, scores))
    return scores


def processors(
    options: Any, prompt: np.ndarray, prefix_allowed_tokens_fn: Any, custom: Iterable[Processor]
) -> list[Processor]:
    """Everything that `options` (a GenerationConfig) asks for, in order; prompt (R, P)."""
    found = [*_repetition(options, prompt), *_lengths(options, prompt.shape[1])]
    if prefix_allowed_tokens_fn is not None:
        beams = options.num_beams // (options.num_beam_groups or 1)
        found.append(_allowed(prefix_allowed_tokens_fn, beams))
    found += [*_endings(options, prompt.shape[1]), *_suppressed(options, prompt.shape[1])]
    found += custom
    if options.renormalize_logits:
        found.append(lambda ids, scores: sampling.log_softmax(scores))
    return found


def _repetition(options: Any, prompt: np.ndarray) -> Iterator[Processor]:
    """Biases, penalties and bans that look at what was said."""
    if options.sequence_bias is not None:
        biases = _checked_biases(options.sequence_bias)
        yield lambda ids, scores: sampling.sequence_bias(scores, ids, _fitting(biases, scores))
    if options.encoder_repetition_penalty not in (None, 1):
        inverse = 1 / _positive("encoder_repetition_penalty", options.encoder_repetition_penalty)
        yield lambda ids, scores: _penalize(scores, _like(prompt, scores), inverse)
    if options.repetition_penalty not in (None, 1):
        penalty = _positive("repetition_penalty", options.repetition_penalty)
        yield lambda ids, scores: _penalize(scores, ids, penalty)
    if size := _count("no_repeat_ngram_size", options):
        yield lambda ids, scores: sampling.no_repeat_ngram(scores, ids, size)
    if n := _count("encoder_no_repeat_ngram_size", options):
        yield lambda ids, scores: sampling.no_repeat_ngram(scores, ids, n, _like(prompt, scores))
    if options.bad_words_ids is not None:
        words = _checked_words(options.bad_words_ids, options.eos_token_id)
        yield lambda ids, scores: sampling.sequence_bias(scores, ids, _fitting(words, scores))


def _penalize(scores: np.ndarray, ids: np.ndarray, penalty: float) -> np.ndarray:
    seen = np.zeros(scores.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    return sampling.repetition_penalty(scores, seen, penalty)


def _like(prompt: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The prompt once for every row of scores: beams of one prompt are neighbours."""
    return np.repeat(prompt, len(scores) // len(prompt), axis=0)


def _lengths(options: Any, prompt_length: int) -> Iterator[Processor]:
    """No eos before the text is long enough."""
    eos = options.eos_token_id
    if eos is None:
        return
    if least := _count("min_length", options):
        yield _forbid_while(eos, lambda length: length < least)
    if new := _count("min_new_tokens", options):
        until = prompt_length + new
        yield _forbid_while(eos, lambda length: length < until)


def _forbid_while(tokens: Iterable[int], holds: Callable[[int], bool]) -> Processor:
    def processor(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return sampling.forbid(scores, tokens) if holds(ids.shape[1]) else scores

    return processor


def _force_while(tokens: Iterable[int], holds: Callable[[int], bool]) -> Processor:
    def processor(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return sampling.force(scores, tokens) if holds(ids.shape[1]) else scores

    return processor


def _allowed(function: Callable[[int, np.ndarray], list[int]], num_beams: int) -> Processor:
    """Only what `function(batch index, ids of the row)` lists."""

    def processor(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        result = np.full_like(scores, -np.inf)
        for i, row in enumerate(ids):
            allowed = list(function(i // num_beams, row))
            result[i, allowed] = scores[i, allowed]
        return result

    return processor


def _endings(options: Any, prompt_length: int) -> Iterator[Processor]:
    """Forced first and last tokens, repaired scores, and an eos that grows ever likelier."""
    if options.forced_bos_token_id is not None:
        yield _force_while([options.forced_bos_token_id], lambda length: length == 1)
    if options.forced_eos_token_id is not None:
        last = options.max_length - 1
        yield _force_while(as_ids(options.forced_eos_token_id), lambda length: length == last)
    if options.remove_invalid_values:
        yield lambda ids, scores: np.nan_to_num(scores, nan=0.0)
    if options.exponential_decay_length_penalty is not None:
        start, factor = options.exponential_decay_length_penalty
        yield _hurry(as_ids(options.eos_token_id), start + prompt_length, float(factor))


def _hurry(eos: list[int], start: int, factor: float) -> Processor:
    def processor(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        beyond = ids.shape[1] - start
        if beyond <= 0:
            return scores
        result, old = scores.copy(), scores[:, eos]
        growth = np.where(np.isfinite(old), np.abs(old), 0) * (factor**beyond - 1)
        result[:, eos] = old + growth.astype(scores.dtype)  # what is forbidden stays forbidden
        return result

    return processor


def _suppressed(options: Any, prompt_length: int) -> Iterator[Processor]:
    """Tokens that are never said, not said first, or said at given places."""
    listed = list(options.forced_decoder_ids or [])
    forced = dict(listed)
    if options.suppress_tokens is not None:
        yield _forbid_while(options.suppress_tokens, lambda length: True)
    if options.begin_suppress_tokens is not None:
        one_more = prompt_length <= 1 and options.forced_bos_token_id is not None
        begin = prompt_length + int(one_more) + (listed[-1][0] if listed else 0)
        yield _forbid_while(options.begin_suppress_tokens, lambda length: length == begin)
    for place, token in forced.items():
        if token is not None:
            yield _force_while([token], lambda length, at=place: length == at)  # type: ignore[misc]


def warpers(options: Any) -> list[Processor]:
    """Everything that reshapes the distribution before a draw, in order."""
    eos = options.eos_token_id
    keep = 1 if options.num_beams == 1 else 2 if eos is None else len(eos) + 1
    return list(_warpers(options, keep))


def _warpers(options: Any, keep: int) -> Iterator[Processor]:
    if options.temperature not in (None, 1):
        t = _positive("temperature", options.temperature)
        yield lambda ids, scores: sampling.temperature(scores, t)
    if options.top_k not in (None, 0):
        k = max(_whole("top_k", options.top_k), keep)
        yield lambda ids, scores: sampling.top_k(scores, k)
    if options.top_p is not None and options.top_p < 1:
        nucleus = _within("top_p", options.top_p, lowest_allowed=True)
        yield lambda ids, scores: sampling.top_p(scores, nucleus, keep)
    if options.min_p:
        ratio = _within("min_p", options.min_p, lowest_allowed=True)
        yield lambda ids, scores: sampling.min_p(scores, ratio, keep)
    if options.typical_p is not None and options.typical_p < 1:
        mass = _within("typical_p", options.typical_p)
        yield lambda ids, scores: sampling.typical_p(scores, mass, keep)
    if options.epsilon_cutoff and options.epsilon_cutoff < 1:
        epsilon = _within("epsilon_cutoff", options.epsilon_cutoff)
        yield lambda ids, scores: sampling.epsilon_cutoff(scores, epsilon, keep)
    if options.eta_cutoff and options.eta_cutoff < 1:
        eta = _within("eta_cutoff", options.eta_cutoff)
        yield lambda ids, scores: sampling.eta_cutoff(scores, eta, keep)
    if options.renormalize_logits:
        yield lambda ids, scores: sampling.log_softmax(scores)


# ---------------------------------------------------------------------------------- checks


def as_ids(value: Any) -> list[int]:
    """One id, several, or None as a list."""
    if value is None:
        return []
    return [int(i) for i in value] if isinstance(value, list | tuple | np.ndarray) else [int(value)]


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise ValueError(f"`{name}` has to be a strictly positive float, but is {value}")
    return float(value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"`{name}` has to be a non-negative integer, but is {value}")
    return int(value)


def _count(name: str, options: Any) -> int:
    """An option that is a number of tokens; 0 where it is off: None, or negative as in 4.37.2."""
    value = getattr(options, name) or 0
    negative = isinstance(value, int | np.integer) and value < 0
    return 0 if negative else _whole(name, value)


def _within(name: str, value: Any, lowest_allowed: bool = False) -> float:
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not (0 < value <= 1 or (lowest_allowed and value == 0)):
        raise ValueError(f"`{name}` has to be a float > 0 and < 1, but is {value}")
    return float(value)


def _checked_words(words: Any, eos: Iterable[int] | None) -> dict[tuple[int, ...], float]:
    """Bad words as biases of -inf; a bad word that is just an eos is ignored, as documented."""
    listed = isinstance(words, list | tuple) and len(words) > 0
    if not listed or any(not isinstance(word, list | tuple) or not word for word in words):
        raise ValueError(f"`bad_words_ids` has to be a non-empty list of lists, but is {words}")
    _check_ids("bad_words_ids", words)
    alone = {(i,) for i in eos or ()}
    return {tuple(word): -np.inf for word in words if tuple(word) not in alone}


def _checked_biases(biases: Any) -> dict[tuple[int, ...], float]:
    if not isinstance(biases, dict) or not biases or any(not isinstance(k, tuple) for k in biases):
        raise ValueError(f"`sequence_bias` has to be a dict with tuples as keys, but is {biases}")
    _check_ids("sequence_bias", biases)
    return {sequence: float(bias) for sequence, bias in biases.items()}


def _check_ids(name: str, sequences: Iterable[Iterable[Any]]) -> None:
    for sequence in sequences:
        for token in sequence:
            if not isinstance(token, int | np.integer) or token < 0:
                raise ValueError(f"`{name}` holds {token!r}, expected token ids")


def _fitting(
    biases: dict[tuple[int, ...], float], scores: np.ndarray
) -> dict[tuple[int, ...], float]:
    """Errors: ValueError for a token outside the vocabulary."""
    V = scores.shape[-1]
    beyond = [token for sequence in biases for token in sequence if token >= V]
    if beyond:
        raise ValueError(
            f"The model vocabulary size is {V}, but these tokens were being biased: {beyond}"
        )
    return biases
