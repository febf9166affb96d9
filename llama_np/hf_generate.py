"""generate() of the documented classes: greedy, sampled, beamed, contrastive, speculative.

The same options in the same order of effects as transformers 4.37.2, which means the same ids.
Where 4.37.2 is plainly wrong, this is not:
* `eos_token_id=None` really switches the end-of-text token off (4.37.2: the model's is used);
* `position_ids` go on counting after the prompt (4.37.2: reused at every step);
* a bad word is found also when it is one token longer than the text so far;
* beam search writes an end-of-text token only where one was generated;
* `max_length` of a call wins over a `max_new_tokens` that only the model's defaults set;
* exponential_decay_length_penalty leaves a forbidden eos forbidden (4.37.2: NaN), and
  encoder_repetition_penalty works with beams (4.37.2: on some of the rows only);
* whole-number temperatures and penalties are accepted; NaN logits are a FloatingPointError, and a
  step at which every token is forbidden is a ValueError instead of token 0;
* stopping criteria may answer for each row.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_np import hf_processors, sampling
from llama_np.hf_beams import Beams
from llama_np.hf_generation_config import GenerationConfig
from llama_np.hf_outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, past_of
from llama_np.hf_session import Session
from llama_np.layers import softmax
from llama_np.model import check_tokens
from llama_np.speculate import Draft, DraftModel, PromptLookup, Speculation

_MODEL_INPUTS = (
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "params",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)


@dataclass
class Run:
    """One call of generate(): what has been written, and everything that decides what follows."""

    options: GenerationConfig
    ids: np.ndarray  # (R, S), prompt included
    session: Session
    processors: list[hf_processors.Processor]
    warpers: list[hf_processors.Processor]
    criteria: list[Callable[[np.ndarray, Any], Any]]
    streamer: Any
    rng: np.random.Generator
    unfinished: np.ndarray  # (R,)
    deadline: float
    past: Any  # what was given as past_key_values
    scores: list[np.ndarray] = field(default_factory=list)

    def processed(self, scores: np.ndarray) -> np.ndarray:
        """The scores (R, V) after everything that the options ask for."""
        scores = hf_processors.apply(self.processors, self.ids, scores)
        scores = hf_processors.apply(self.warpers, self.ids, scores)
        sampling.check_drawable(scores[self.unfinished])
        return scores

    def keep(self, scores: np.ndarray) -> None:
        """Remember a step's scores, if they were asked for."""
        if self.options.return_dict_in_generate and self.options.output_scores:
            self.scores.append(scores)

    def write(self, scores: np.ndarray) -> np.ndarray:
        """Choose and append one token per row from scores (R, V): (R,)."""
        scores = self.processed(scores)
        self.keep(scores)
        if self.options.do_sample:
            return self.append(sampling.draw(scores, self.rng.random(len(scores))))
        return self.append(scores.argmax(axis=-1))

    def append(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token per row; finished rows get padding instead. Returns what was written."""
        pad = self.options.pad_token_id
        tokens = np.where(self.unfinished, tokens, 0 if pad is None else pad)
        self.ids = np.concatenate([self.ids, tokens[:, None]], axis=1)
        if self.streamer is not None:
            self.streamer.put(tokens)
        self.unfinished &= ~np.isin(tokens, self.options.eos_token_id or [])
        self.unfinished &= ~self.stopped()
        return tokens

    def stopped(self) -> np.ndarray:
        """Which rows must stop: for length, for time, or because a criterion says so: (R,)."""
        rows = np.zeros(len(self.ids), bool)
        if self.ids.shape[1] >= self.options.max_length or time.monotonic() > self.deadline:
            rows[:] = True
        kept = tuple(self.scores) if self.scores else None
        for criterion in self.criteria:
            rows |= np.asarray(criterion(self.ids, kept), bool)
        return rows

    def finished(self) -> bool:
        """Whether no row goes on."""
        return not self.unfinished.any()


def generate(
    model: Any,
    inputs: Any = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Iterable[hf_processors.Processor] | None = None,
    stopping_criteria: Iterable[Callable[[np.ndarray, Any], Any]] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], list[int]] | None = None,
    assistant_model: Any = None,
    streamer: Any = None,
    rng: np.random.Generator | int | None = None,
    **kwargs: Any,
) -> Any:
    """See `LlamaForCausalLM.generate`."""
    options, given = resolve_options(model, generation_config, kwargs)
    ids, embedded = _prompt(model, inputs, given, options)
    _set_length(options, ids.shape[1])
    options.validate()
    session = _session(model, given, ids, embedded, options)
    _warn_of_right_padding(ids, session, options)
    prompt = np.repeat(ids, _rows_per_prompt(options), axis=0)
    asked = hf_processors.processors(options, ids, prefix_allowed_tokens_fn, logits_processor or [])
    run = Run(
        options=options,
        ids=prompt,
        session=session,
        processors=[*_guidance(model, session, given, options), *asked],
        warpers=hf_processors.warpers(options) if options.do_sample else [],
        criteria=_criteria(stopping_criteria),
        streamer=streamer,
        rng=np.random.default_rng(rng),
        unfinished=np.ones(len(prompt), bool),
        deadline=time.monotonic() + (np.inf if options.max_time is None else options.max_time),
        past=given.get("past_key_values"),
    )
    _fill_endings(options, model.generation_config, kwargs)
    _warn_beyond_context(model, options)
    if streamer is not None and options.num_beams > 1:
        raise ValueError("`streamer` cannot be used with beam search (yet!). Set `num_beams` to 1.")
    if streamer is not None:
        streamer.put(ids)
    draft = _draft(model, assistant_model, run)
    return _answer(run, _decode(run, ids, embedded, draft))


class Guidance:
    """Classifier-free guidance (arXiv:2306.17806): away from what the text alone would say.

    `scale` times the log-probabilities' distance from those without the prompt, or with the
    negative one. A processor that reads along, token by token.
    """

    def __init__(self, session: Session, scale: float, prompt: np.ndarray | None) -> None:
        self.session, self.scale, self.prompt = session, scale, prompt

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        first = self.session.length == 0 and self.prompt is not None
        new = self.prompt if first else ids[:, -1:]
        without = sampling.log_softmax(self.session.feed(new)[:, -1])
        return self.scale * (sampling.log_softmax(scores) - without) + without


def _guidance(
    model: Any, session: Session, given: Mapping[str, Any], options: GenerationConfig
) -> list[hf_processors.Processor]:
    """The guiding processor, if one was asked for."""
    if options.guidance_scale in (None, 1):
        return []
    prompt, mask = given.get("negative_prompt_ids"), given.get("negative_prompt_attention_mask")
    rows = len(session.mask) * _rows_per_prompt(options)
    seen = np.zeros((rows, 0), np.int64)
    if prompt is not None:
        prompt = check_tokens(prompt, model.vocab_size)
        seen = np.ones_like(prompt) if mask is None else np.asarray(mask)
        prompt, seen = (np.repeat(a, rows // len(prompt), axis=0) for a in (prompt, seen))
    beside = Session(model, session.weights, seen, model.new_cache(rows))
    return [Guidance(beside, float(options.guidance_scale), prompt)]


def _criteria(given: Any) -> list[Callable[[np.ndarray, Any], Any]]:
    if given is None:
        return []
    return [given] if callable(given) else list(given)


def _decode(
    run: Run, ids: np.ndarray, embedded: np.ndarray | None, draft: Draft | None
) -> Beams | None:
    """Prefill once per prompt, copy the rows if several are wanted, then write."""
    new = ids[:, -run.session.unread() :]
    scores = run.session.feed(None if embedded is not None else new, embedded)[:, -1]
    count = _rows_per_prompt(run.options)
    run.session.repeat(count)
    scores = np.repeat(scores, count, axis=0)
    if run.options.num_beams > 1:
        return _search(run, scores)
    if draft is not None:
        _speculate(run, scores, draft)
        return None
    if run.options.contrasts():
        _contrast(run, scores)
        return None
    tokens = run.write(scores)
    while not run.finished():
        tokens = run.write(run.session.feed(tokens[:, None])[:, -1])
    return None


def _rows_per_prompt(options: GenerationConfig) -> int:
    return options.num_beams if options.num_beams > 1 else options.num_return_sequences


def _search(run: Run, scores: np.ndarray) -> Beams:
    """Beam search, or with `do_sample` beam sampling, over all beams of all prompts at once."""
    beams = Beams(run.options, run.ids)
    while True:
        rows, tokens = _next_beams(run, beams, sampling.log_softmax(scores))
        beams.advance(rows)
        run.ids = np.concatenate([run.ids[rows], tokens[:, None]], axis=1)
        run.session.reorder(rows)
        if beams.done or run.stopped().all():
            return beams
        scores = run.session.feed(tokens[:, None])[:, -1]


def _next_beams(run: Run, beams: Beams, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let group after group choose: (rows to go on from, tokens), both (R,).

    From the second group on, tokens that earlier groups of the prompt chose cost a penalty each
    (arXiv:1610.02424).
    """
    rows, tokens = np.zeros(len(run.ids), np.int64), np.zeros(len(run.ids), np.int64)
    chosen = np.zeros((len(run.ids) // run.options.num_beams, logprobs.shape[1]))  # (B, V)
    processed = np.empty_like(logprobs)
    for group in range(beams.groups):
        searches = beams.searches(group)
        mine = beams.rows(searches)
        scores = logprobs[mine]
        if group:
            penalty = run.options.diversity_penalty * np.repeat(chosen, beams.count, axis=0)
            scores = scores - penalty.astype(scores.dtype)
        scores = hf_processors.apply(run.processors, run.ids[mine], scores)
        processed[mine] = scores = hf_processors.apply(run.warpers, run.ids[mine], scores)
        rows[mine], tokens[mine] = beams.step(run.ids, scores, searches, run.rng)
        np.add.at(chosen, (mine // run.options.num_beams, tokens[mine]), 1)
    run.keep(processed)
    return rows, tokens


def _contrast(run: Run, scores: np.ndarray) -> None:
    """Contrastive search (arXiv:2202.06417): likely tokens that do not repeat what was said.

    Of the top_k candidates the one with the largest (1 - alpha) * probability - alpha * (largest
    cosine between its hidden state and those of the text so far) is written.
    """
    k, alpha = min(run.options.top_k, scores.shape[1]), float(run.options.penalty_alpha)
    said = run.session.hidden  # (R, S, D)
    while not run.finished():
        scores = run.processed(scores)
        run.keep(scores)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (R, k)
        likely = np.take_along_axis(softmax(scores), best, axis=1)  # (R, k)
        run.session.select(np.repeat(np.arange(len(best)), k))
        every = run.session.feed(best.reshape(-1, 1))[:, -1]  # (R * k, V)
        heard = run.session.hidden.reshape(*best.shape, -1)  # (R, k, D)
        cosines = _unit(heard) @ _unit(said).swapaxes(1, 2)  # (R, k, S)
        chosen = ((1 - alpha) * likely - alpha * cosines.max(axis=2)).argmax(axis=1)  # (R,)
        row = np.arange(len(best))
        run.session.select(row * k + chosen)
        run.session.select_traced(row * k + chosen)
        said = np.concatenate([said, heard[row, chosen][:, None]], axis=1)  # (R, S, D)
        scores = every[row * k + chosen]  # (R, V)
        run.append(best[row, chosen])
    run.session.forget_last()  # as everywhere, the last token written has not been read


def _unit(x: np.ndarray) -> np.ndarray:
    """Vectors of length 1: (..., D) -> (..., D)."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _speculate(run: Run, scores: np.ndarray, draft: Draft) -> None:
    """Check several guessed tokens in one pass; what is written is what is written without."""
    ahead = Speculation(run.session, draft, run.session.model.config.core())
    run.write(scores)
    while not run.finished():
        most = run.options.max_length - run.ids.shape[1] - 1
        run.write(ahead.after(run.ids[0], most))
    ahead.settle()


def _answer(run: Run, beams: Beams | None) -> Any:
    """The ids, or with `return_dict_in_generate` everything that was asked for."""
    if run.streamer is not None:
        run.streamer.end()
    result = None if beams is None else beams.finish(run.ids)
    if not run.options.return_dict_in_generate:
        return run.ids if result is None else result.sequences
    traced = run.session
    common = {
        "scores": tuple(run.scores) if run.options.output_scores else None,
        "attentions": None if traced.attentions is None else tuple(traced.attentions),
        "hidden_states": None if traced.hidden_states is None else tuple(traced.hidden_states),
        "past_key_values": past_of(run.past, traced.cache),
    }
    if result is None:
        return GenerateDecoderOnlyOutput(sequences=run.ids, **common)
    asked = run.options.output_scores
    return GenerateBeamDecoderOnlyOutput(
        sequences=result.sequences,
        sequences_scores=result.scores if asked else None,
        scores=common.pop("scores"),
        beam_indices=result.beam_indices if asked else None,
        **common,
    )


# ------------------------------------------------------------------------------ preparation


def resolve_options(
    model: Any, generation_config: GenerationConfig | None, kwargs: Mapping[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Merge the model's options with those given: (options, inputs of the model).

    Errors: ValueError for a keyword that is neither.
    """
    chosen = model.generation_config if generation_config is None else generation_config
    options = copy.deepcopy(chosen)
    if options.bos_token_id is None:
        options.bos_token_id = model.generation_config.bos_token_id
    rest = options.update(**kwargs)
    given = {name: rest.pop(name) for name in (*_MODEL_INPUTS, "input_ids") if name in rest}
    if rest:
        raise ValueError(
            f"The following `model_kwargs` are not used by the model: {sorted(rest)} (note: typos "
            "in the generate arguments will also show up in this list)"
        )
    if kwargs.get("max_length") is not None and kwargs.get("max_new_tokens") is None:
        options.max_new_tokens = None
    _pad_with_eos(options)
    return options, given


def _pad_with_eos(options: GenerationConfig) -> None:
    eos = hf_processors.as_ids(options.eos_token_id)
    options.eos_token_id = eos or None
    if options.pad_token_id is None and eos:
        options.pad_token_id = eos[0]


def _fill_endings(
    options: GenerationConfig, defaults: GenerationConfig, kwargs: Mapping[str, Any]
) -> None:
    """Where a given GenerationConfig says nothing, the model's ids end a text and pad it.

    They do not decide which tokens are padding in the prompt, nor what is done to scores.
    """
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(options, name) is None and name not in kwargs:
            setattr(options, name, getattr(defaults, name))
    _pad_with_eos(options)


def _prompt(
    model: Any, inputs: Any, given: dict[str, Any], options: GenerationConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """The ids to go on from (B, P), and vectors to start with instead, if they were given.

    Without ids there is one BOS token per row, as in 4.37.2.
    """
    ids, embedded = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    if inputs is not None and ids is not None:
        raise ValueError("the prompt was given twice: as `inputs` and as `input_ids`")
    ids = inputs if ids is None else ids
    vectors = None
    if embedded is not None:
        vectors = model.embed(None, embedded, model.weights)
    if ids is None or np.size(ids) == 0:
        if options.bos_token_id is None:
            raise ValueError("`bos_token_id` has to be defined when no `input_ids` are provided.")
        rows = len(np.asarray(ids)) if ids is not None else 1 if vectors is None else len(vectors)
        ids = np.full((rows, 1), options.bos_token_id)
    return check_tokens(ids, model.vocab_size), vectors


def _set_length(options: GenerationConfig, prompt_length: int) -> None:
    """`max_new_tokens` wins over `max_length`, which counts the prompt.

    At least one token is always written, as in 4.37.2, with a UserWarning where none fits.
    """
    new = options.max_new_tokens
    if new is not None:
        if isinstance(new, bool) or not isinstance(new, int | np.integer) or new < 0:
            raise ValueError(f"`max_new_tokens` must be an integer of at least 0, but is {new!r}")
        options.max_length = prompt_length + int(new)
    if options.max_length is None:
        raise ValueError("`max_length` is None: how long may the text become?")
    if options.max_length <= prompt_length:
        warnings.warn(
            f"Input length of input_ids is {prompt_length}, but `max_length` is set to "
            f"{options.max_length}: one token is generated. Consider `max_new_tokens`.",
            stacklevel=4,
        )
    _warn_of_unreachable_minimum(options, prompt_length)


def _warn_of_unreachable_minimum(options: GenerationConfig, prompt_length: int) -> None:
    for name, before in (("min_length", 0), ("min_new_tokens", prompt_length)):
        least = getattr(options, name)
        if isinstance(least, int) and before + least > options.max_length:
            warnings.warn(
                f"`{name}` is {least}, which takes a text of {before + least} tokens, prompt "
                f"included, but it ends after {options.max_length}. Decrease it, or increase "
                "`max_new_tokens`.",
                stacklevel=5,
            )


def _warn_of_right_padding(ids: np.ndarray, session: Session, options: GenerationConfig) -> None:
    """The text would go on from the padding."""
    pad = options.pad_token_id
    if (session.mask[:, -1] == 0).any() or (pad is not None and (ids[:, -1] == pad).any()):
        warnings.warn(
            "A decoder-only architecture is being used, but right-padding was detected! For "
            "correct results, set `padding_side='left'` when initializing the tokenizer.",
            stacklevel=4,
        )


def _warn_beyond_context(model: Any, options: GenerationConfig) -> None:
    trained = model.config.max_position_embeddings
    if options.max_length > trained:
        warnings.warn(
            f"The text may become {options.max_length} tokens long, the model was trained on "
            f"{trained}: expect nonsense beyond.",
            stacklevel=4,
        )


def _session(
    model: Any,
    given: dict[str, Any],
    ids: np.ndarray,
    embedded: np.ndarray | None,
    options: GenerationConfig,
) -> Session:
    """The rows of the prompts, before anything is fed."""
    B, P = ids.shape if embedded is None else embedded.shape[:2]
    if not B:
        raise ValueError(f"the prompts have shape {(B, P)}: there is no row to continue")
    mask = given.get("attention_mask")
    mask = _inferred_mask(ids, options) if mask is None and embedded is None else mask
    mask = np.ones((B, P), np.int64) if mask is None else np.asarray(mask)
    past = given.get("past_key_values")
    if mask.ndim != 2 or len(mask) != B or mask.shape[1] < P:
        raise ValueError(f"Attention mask should be of size {(B, P)}, but is {mask.shape}")
    if options.contrasts() and not options.use_cache:
        raise ValueError("Contrastive search requires `use_cache=True`")
    cache = model.memory(past, B)
    if cache is None and (options.use_cache or embedded is not None):
        cache = model.new_cache(B)
    if cache is not None and mask.shape[1] > P:  # the ids are new ones only
        cache_length, P = cache.length, mask.shape[1]
        if cache_length + ids.shape[1] != P:
            raise ValueError(f"Attention mask should cover {cache_length + ids.shape[1]} tokens")
    positions = given.get("position_ids")
    if positions is not None:
        positions = np.broadcast_to(np.asarray(positions), mask.shape)
    wanted = options.return_dict_in_generate
    traced = (
        bool(wanted and options.output_attentions),
        bool(wanted and options.output_hidden_states),
    )
    weights = model.with_params(given.get("params"))
    return Session(model, weights, mask, cache, positions, traced)


def _inferred_mask(ids: np.ndarray, options: GenerationConfig) -> np.ndarray:
    """Padding is not seen, if it can be told from the end of a text."""
    pad = options.pad_token_id
    told = pad is not None and pad not in (options.eos_token_id or [])
    return (ids != pad).astype(np.int64) if told else np.ones(ids.shape, np.int64)


def _draft(model: Any, assistant: Any, run: Run) -> Draft | None:
    """What guesses the next tokens, if speculation was asked for and can help."""
    options = run.options
    if assistant is None and options.prompt_lookup_num_tokens is None:
        return None
    if options.num_beams > 1 or options.contrasts() or options.guidance_scale not in (None, 1):
        raise NotImplementedError("no speculation with beams, contrastive search or guidance_scale")
    if len(run.ids) > 1:
        raise ValueError("assisted generate is only supported for batch_size = 1")
    if run.session.cache is None:
        raise ValueError("assisted generate requires `use_cache=True`")
    if run.session.attentions is not None or run.session.hidden_states is not None:
        return None  # steps are traced one by one; the ids are the same
    if assistant is None:
        ngram = options.max_matching_ngram_size or 2
        return PromptLookup(options.prompt_lookup_num_tokens, ngram)
    if assistant.vocab_size != model.vocab_size:
        raise ValueError(
            f"the assistant knows {assistant.vocab_size} tokens, the model {model.vocab_size}"
        )
    session = Session(assistant, assistant.weights, run.session.mask, assistant.new_cache(1))
    return DraftModel(session, options.num_assistant_tokens, options.num_assistant_tokens_schedule)


def transition_scores(
    sequences: np.ndarray,
    scores: Sequence[np.ndarray],
    beam_indices: np.ndarray | None,
    normalize_logits: bool,
) -> np.ndarray:
    """The score of every generated token: (R, new tokens). See `compute_transition_scores`."""
    steps = np.stack(list(scores))  # (new tokens, B * beams, V)
    if normalize_logits:
        steps = sampling.log_softmax(steps)
    rows = np.arange(steps.shape[1])[:, None] if beam_indices is None else beam_indices
    if beam_indices is not None:
        rows = rows[:, : int((rows >= 0).sum(axis=1).max())]
    count = len(steps) if beam_indices is None else rows.shape[1]
    generated = sequences[:, sequences.shape[1] - count :]
    chosen = steps[np.arange(count), np.maximum(rows, 0), generated]
    return np.where(rows < 0, 0, chosen)
