"""LlamaModel, LlamaForCausalLM and LlamaForSequenceClassification as the documentation has them.

Thin objects over the functions of `model`: they translate arguments (masks, past keys, labels)
into positions, visibility and taps, and results into output objects. Arrays are NumPy's; the
Flax classes' ways (`params=`, `init_cache`, `dtype=`) work on the same objects.

Where transformers 4.37.2 is plainly wrong, these classes are not:
* dynamic NTK scaling leaves no state behind: a long call does not change later short ones;
* position ids may exceed the length of the text; float64 models run, with float64 logits;
* `use_cache=False` together with past keys uses the past (4.37.2: an error, or wrong logits);
* a boolean 4-D mask works; a 2-D mask of the wrong length or a 3-D mask is a ValueError, always;
* `pretraining_tp` > 1 drops neither biases nor columns;
* a `problem_type` that was inferred is inferred again for the next labels, and whole-number
  labels of shape (B, C) are taken for several labels per text.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_np import losses
from llama_np.config import Config
from llama_np.hf_base import LlamaPreTrainedModel
from llama_np.hf_config import LlamaConfig, sets_generation_options
from llama_np.hf_generate import generate, transition_scores
from llama_np.hf_generation_config import DEFAULTS as GENERATION_OPTIONS
from llama_np.hf_generation_config import FILE as GENERATION_FILE
from llama_np.hf_generation_config import GenerationConfig
from llama_np.hf_loading import refuse
from llama_np.hf_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    SequenceClassifierOutputWithPast,
)
from llama_np.layers import project
from llama_np.model import logits

Array = np.ndarray


class LlamaModel(LlamaPreTrainedModel):
    """The decoder without a head: token ids in, hidden states after the final norm out."""

    @property
    def base_model(self) -> LlamaModel:
        """The model itself, which is what a head stands on."""
        return self

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the model: ids (B, T), or inputs_embeds (B, T, D), give last_hidden_state (B, T, D).

        attention_mask: (B, P + T) with 1 for tokens that may be seen (P is the length of the
        past), or (B, 1, T, P + T) with 1 where a query sees a key and no causal rule added.
        position_ids (B, T): only rotate; by default P, P + 1, ..., with padding counted.
        past_key_values: pairs of (B, K, P, H) arrays, which are not changed and give pairs back,
        or a KVCache, which is extended and given back.
        params: other weights for this call. return_dict=False gives a tuple.
        Errors: ValueError for shapes that do not fit; IndexError for an unknown id; TypeError.
        """
        out = self.run(
            self.with_params(params),
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        return _answer(out, return_dict, self.config)


FlaxLlamaModel = LlamaModel  # NumPy arrays are what Flax users hand over, too


class _WithHead(LlamaPreTrainedModel):
    """A model with something on top of the decoder."""

    @property
    def model(self) -> LlamaModel:
        """The decoder alone; it shares these weights."""
        base = LlamaModel(self.config, dtype=self._precision.name)
        base._core, base._weights = self._core, self._weights
        return base

    base_model = model

    def get_decoder(self) -> LlamaModel:
        """The same as `model`."""
        return self.model


class LlamaForCausalLM(_WithHead):
    """The language model: token ids in, a score for every possible next token out."""

    _head = "lm_head.weight"

    _generation_config: GenerationConfig
    _derived: GenerationConfig | None  # what was made of the configuration

    def __init__(self, config: LlamaConfig | Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._derive_generation_config()

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        params: Mapping[str, Any] | None = None,
        logits_to_keep: int | Array = 0,
    ) -> Any:
        """Run the model: logits (B, T, V), and the loss where labels (B, T) are given.

        The logits at t are compared with the label at t + 1; labels of -100 do not count, and
        padding counts unless it is labelled -100. logits_to_keep = n: the logits of the last n
        tokens only (0: all), or of the columns in an array. All else as in `LlamaModel.forward`.
        """
        weights = self.with_params(params)
        base = self.run(
            weights,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        whole = isinstance(logits_to_keep, int)
        columns = slice(-logits_to_keep, None) if whole else np.asarray(logits_to_keep)
        hidden, loss = base.last_hidden_state, None
        if labels is None:
            scores = logits(hidden[:, columns], weights, self.rounding)  # (B, kept, V)
        else:
            scores = logits(hidden, weights, self.rounding)  # (B, T, V)
            loss = losses.next_token_loss(scores, np.asarray(labels))
            scores = scores[:, columns]  # (B, kept, V)
        out = CausalLMOutputWithPast(loss=loss, logits=scores, **_without_hidden(base))
        return _answer(out, return_dict, self.config)

    # ------------------------------------------------------------------ generating text

    @property
    def generation_config(self) -> GenerationConfig:
        """The defaults of generate(); change its attributes, or replace it.

        Unless that happened, or the checkpoint brought some of its own, they are made from
        `config`, where old checkpoints keep them, and made again once an option of generate() is
        set there, as in 4.37.2; ids of special tokens alone are none.
        """
        if self._generation_config == self._derived and sets_generation_options(self.config):
            self._derive_generation_config()
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._generation_config, self._derived = value, None

    def _derive_generation_config(self) -> None:
        self._derived = GenerationConfig.from_model_config(self.config)
        self._generation_config = copy.deepcopy(self._derived)

    def _read_generation_config(self, folder: Path, options: Mapping[str, Any]) -> None:
        if (folder / GENERATION_FILE).exists():
            given = {name: value for name, value in options.items() if name in GENERATION_OPTIONS}
            self.generation_config = read = GenerationConfig.from_pretrained(folder, **given)
            if read._from_model_config:
                self._derived = copy.deepcopy(read)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As the other models, and generation_config.json."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.generation_config.save_pretrained(save_directory)

    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, Array], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: LlamaForCausalLM | None = None,
        streamer: Any = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        *,
        rng: np.random.Generator | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts: ids (B, P) give ids (B, S), prompts included and rows padded right.

        Every attribute of GenerationConfig is a keyword: max_new_tokens, max_length (20 tokens
        with the prompt, if nothing is said), do_sample with temperature, top_k, top_p, ...,
        num_beams (in num_beam_groups with a diversity_penalty), penalty_alpha (contrastive
        search), guidance_scale, num_return_sequences, repetition_penalty, bad_words_ids,
        eos_token_id (an id, several, or None for none), output_scores and
        return_dict_in_generate, and the rest.
        attention_mask: by default padding is not seen, if pad_token_id is set and no eos id;
        batches are padded on the left. inputs_embeds, past_key_values, params as in `forward`.
        rng: a generator or a seed for do_sample. Custom logits processors are functions
        (ids, scores) -> scores; stopping criteria functions (ids, scores) -> bool, or one per row.
        assistant_model (a smaller LlamaForCausalLM) or prompt_lookup_num_tokens: faster, with
        the same output. Beyond the trained context there is one UserWarning.
        Errors: ValueError, NotImplementedError (an option that is not there), IndexError,
        FloatingPointError (NaN logits).
        """
        refuse("generate", {"synced_gpus": False}, {"synced_gpus": bool(synced_gpus)})
        return generate(
            self,
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            assistant_model,
            streamer,
            rng,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            **kwargs,
        )

    def compute_transition_scores(
        self,
        sequences: Array,
        scores: Sequence[Array],
        beam_indices: Array | None = None,
        normalize_logits: bool = False,
    ) -> Array:
        """The score of each generated token, from what generate() returned: (R, new tokens).

        normalize_logits: as log-probabilities. beam_indices: after beam search, whose scores
        are log-probabilities already.
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)

    def prepare_inputs_for_generation(
        self,
        input_ids: Array,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward` for the next step: tokens not cached yet, positions by mask."""
        known = 0
        if past_key_values is not None and len(past_key_values):
            known = past_key_values[0][0].shape[2]
            input_ids = input_ids[:, known:] if known < input_ids.shape[1] else input_ids[:, -1:]
        positions = kwargs.get("position_ids")
        if attention_mask is not None and positions is None:
            seen = np.asarray(attention_mask) == 1
            positions = np.where(seen, seen.cumsum(axis=1) - 1, 1)
            positions = positions[:, -input_ids.shape[1] :] if known else positions
        first = inputs_embeds is not None and not known
        return {
            **({"inputs_embeds": inputs_embeds} if first else {"input_ids": input_ids}),
            "position_ids": positions,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }


FlaxLlamaForCausalLM = LlamaForCausalLM


class LlamaForSequenceClassification(_WithHead):
    """The classifier: token ids in, one score per class out, read at each row's last token."""

    _head = "score.weight"
    _inferred: str | None = None

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return self._core.num_labels

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the model: logits (B, C), and the loss where labels are given.

        The last token is the one before the first `config.pad_token_id`; the last column where
        there is none, or where vectors are given instead of ids. labels: numbers (C = 1), class
        numbers (B), or 0/1 for each class (B, C); see `config.problem_type`.
        Errors: ValueError for several rows without a pad token id, and as in LlamaModel.
        """
        weights = self.with_params(params)
        base = self.run(
            weights,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        hidden = base.last_hidden_state  # (B, T, D)
        last = _last_tokens(input_ids, self.config.pad_token_id, *hidden.shape[:2])  # (B,)
        chosen = hidden[np.arange(len(hidden)), last]  # (B, D)
        scores = project("score", chosen, weights, self.rounding)  # (B, C)
        loss = None if labels is None else self._loss(scores, np.asarray(labels))
        out = SequenceClassifierOutputWithPast(loss=loss, logits=scores, **_without_hidden(base))
        return _answer(out, return_dict, self.config)

    def _loss(self, scores: Array, labels: Array) -> np.floating:
        """Infer the problem's type where nobody set it, and leave it in the configuration."""
        if self.config.problem_type is None or self.config.problem_type == self._inferred:
            self._inferred = losses.infer_problem_type(labels, self.num_labels)
            self.config.problem_type = self._inferred
        return losses.classification_loss(scores, labels, self.config.problem_type)


def _last_tokens(input_ids: Any, pad: int | None, B: int, T: int) -> Array:
    """Where each row is read: (first pad - 1) mod T, which is the last column without a pad."""
    if T == 0:
        raise ValueError("a text without tokens has no class")
    if pad is None and B != 1:
        raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
    if pad is None or input_ids is None:
        return np.full(B, T - 1)
    return (np.argmax(np.asarray(input_ids) == pad, axis=1) - 1) % T  # argmax of no pad is 0


def _without_hidden(base: BaseModelOutputWithPast) -> dict[str, Any]:
    return {name: value for name, value in base.items() if name != "last_hidden_state"}


def _answer(out: ModelOutput, return_dict: bool | None, config: LlamaConfig) -> Any:
    keep = config.use_return_dict if return_dict is None else return_dict
    return out if keep else out.to_tuple()
