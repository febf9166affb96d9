"""GenerationConfig: the options of generate(), as attributes and as generation_config.json."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.checkpoint import locate
from llama_np.config import read_json
from llama_np.files import write_atomically
from llama_np.hf_loading import FORMAT_VERSION, refuse_upload, split_options

DEFAULTS: dict[str, Any] = {
    # how long
    "max_length": 20,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "early_stopping": False,
    "max_time": None,
    # which strategy
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "use_cache": True,
    # what happens to the scores
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "renormalize_logits": False,
    "constraints": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_decoder_ids": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "low_memory": None,
    # what is returned
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "return_dict_in_generate": False,
    # special tokens
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    # encoder-decoder models, kept for their files
    "encoder_no_repeat_ngram_size": 0,
    "decoder_start_token_id": None,
    # speculative decoding
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "prompt_lookup_num_tokens": None,
    "max_matching_ngram_size": None,
}

# Options of transformers that change the result and are missing: any other value is refused.
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "force_words_ids": (None,),
    "constraints": (None,),
}
_SAMPLING_ONLY = (
    "temperature", "top_k", "top_p", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
_BEAMS_ONLY = ("early_stopping", "length_penalty")
_NO_OPTIONS = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
    "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask",
)  # fmt: skip
_METADATA = ("_from_model_config", "transformers_version")
FILE = "generation_config.json"


class GenerationConfig:
    """The options of generate(); unknown keywords become attributes, as in transformers.

    Errors: ValueError for options that contradict each other.
    """

    max_length: Any
    max_new_tokens: Any
    num_beams: Any
    bos_token_id: int | None
    eos_token_id: Any
    pad_token_id: int | None

    def __init__(self, **kwargs: Any) -> None:
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, copy.copy(default)))
        self._from_model_config = bool(kwargs.pop("_from_model_config", False))
        kwargs.pop("transformers_version", None)
        if not self._from_model_config:  # what else a model's configuration holds is none
            for name, value in kwargs.items():
                setattr(self, name, value)
        self._check_values()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"GenerationConfig has no option {name!r}")

    @classmethod
    def from_model_config(cls, model_config: Any) -> GenerationConfig:
        """The defaults that an old checkpoint keeps in its config.json."""
        values = {name: value for name, value in vars(model_config).items() if name in DEFAULTS}
        return cls(**values, _from_model_config=True)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        config_file_name: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read generation_config.json, or another file, of a checkpoint; keywords override.

        revision, subfolder, cache_dir, token, local_files_only and force_download say where.
        return_unused_kwargs as in `from_dict`. Errors: OSError; ConfigError; ValueError.
        """
        place, rest = split_options(kwargs)
        folder = locate(pretrained_model_name, weights=False, **place)
        return cls.from_dict(read_json(folder / (config_file_name or FILE)), **rest)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The options of a generation_config.json; keywords override.

        With `return_unused_kwargs` the result is (options, keywords that did not become any).
        """
        options = cls(**{**config_dict, **kwargs})
        unused = options.update(**kwargs)
        return (options, unused) if return_unused_kwargs else options

    def to_dict(self) -> dict[str, Any]:
        """All options, and the version of the format."""
        return {**copy.deepcopy(vars(self)), "transformers_version": FORMAT_VERSION}

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that are not at their defaults: what the file holds."""
        values = self.to_dict()
        changed = {k: v for k, v in values.items() if k not in DEFAULTS or v != DEFAULTS[k]}
        if not self._from_model_config:
            changed.pop("_from_model_config")
        return changed

    def to_json_string(self, use_diff: bool = True, ignore_metadata: bool = False) -> str:
        """JSON with sorted keys, indented by 2, ending in a newline."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        if ignore_metadata:
            values = {name: value for name, value in values.items() if name not in _METADATA}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_json_string` into a file, all of it or nothing."""
        text = self.to_json_string(use_diff)
        write_atomically(json_file_path, text.encode("utf-8"), overwrite=True)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        config_file_name: str | os.PathLike[str] | None = None,
        push_to_hub: bool = False,
    ) -> None:
        """Write generation_config.json, or another file, into a folder, which is created.

        Errors: NotImplementedError for `push_to_hub`; OSError.
        """
        refuse_upload(push_to_hub)
        os.makedirs(save_directory, exist_ok=True)
        self.to_json_file(Path(save_directory) / (config_file_name or FILE))

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set known options; returns the keywords that are none."""
        unused = {}
        for name, value in kwargs.items():
            if name in vars(self):
                setattr(self, name, value)
            else:
                unused[name] = value
        return unused

    def validate(self) -> None:
        """Errors: ValueError for options that contradict each other, NotImplementedError.

        Options that have no effect without `do_sample`, or with one beam, give a UserWarning.
        """
        for name, allowed in _NOT_IMPLEMENTED.items():
            if getattr(self, name) not in allowed:
                raise NotImplementedError(f"generate() has no {name} here")
        if self.num_beams is None:
            self.num_beams = 1
        for name in ("num_beams", "num_return_sequences"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"`{name}` has to be an integer of at least 1, but is {value!r}")
        self._check_values()
        self._check_groups()
        if self.guidance_scale not in (None, 1) and self.num_beams > 1:
            raise NotImplementedError("guidance_scale works with one beam only")
        self._warn_of_idle_options()

    def contrasts(self) -> bool:
        """Whether these options ask for contrastive search."""
        alone = self.num_beams == 1 and not self.do_sample
        return bool(alone and (self.penalty_alpha or 0) > 0 and self.top_k and self.top_k > 1)

    def _check_values(self) -> None:
        """What 4.37.2 checks at once, before the options are used.

        A group penalty that one beam ignores does not matter until then.
        """
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"`early_stopping` must be a boolean or 'never', but is {self.early_stopping}."
            )
        if self.num_beams not in (None, 1):
            self._check_groups()
        if self.num_beams == 1 and not self.do_sample and self.num_return_sequences > 1:
            raise ValueError(
                "Greedy methods without beam search do not support `num_return_sequences` "
                f"different than 1 (got {self.num_return_sequences})."
            )
        if self.num_beams not in (None, 1) and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"`num_return_sequences` ({self.num_return_sequences}) has to be smaller or equal "
                f"to `num_beams` ({self.num_beams})."
            )
        for name in _NO_OPTIONS:
            if name in vars(self):
                raise ValueError(
                    f"Argument `{name}` is not a valid argument of `GenerationConfig`. It should "
                    "be passed to `generate()` directly."
                )

    def _check_groups(self) -> None:
        groups, penalty = self.num_beam_groups or 1, self.diversity_penalty or 0.0
        if groups == 1 and not penalty:
            return
        if self.do_sample:
            raise ValueError("group beam search does not draw: `do_sample` must be False")
        if groups < 1 or groups > self.num_beams or self.num_beams % groups:
            raise ValueError("`num_beams` should be divisible by `num_beam_groups`")
        if not penalty > 0 or groups == 1:
            raise ValueError(
                "`diversity_penalty` should be greater than 0.0 if there are several "
                "`num_beam_groups`, and 0.0 if not: otherwise your groups will be identical"
            )

    def _warn_of_idle_options(self) -> None:
        idle = [] if self.do_sample else [n for n in _SAMPLING_ONLY if self._differs(n)]
        for name in idle:
            if name == "top_k" and self.penalty_alpha is not None:
                continue  # contrastive search has that many candidates
            warnings.warn(
                f"`do_sample` is False, but `{name}` is {getattr(self, name)}: it has an effect "
                "only when tokens are drawn at random. Set `do_sample=True`, or leave it out.",
                stacklevel=5,
            )
        idle = [] if self.num_beams > 1 else [n for n in _BEAMS_ONLY if self._differs(n)]
        for name in idle:
            warnings.warn(
                f"`num_beams` is 1, but `{name}` is {getattr(self, name)}: it has an effect only "
                "in beam search. Set `num_beams` to more, or leave it out.",
                stacklevel=5,
            )

    def _differs(self, name: str) -> bool:
        return getattr(self, name) not in (None, DEFAULTS[name])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationConfig):
            return False
        mine, theirs = ({**vars(c), "_from_model_config": None} for c in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __repr__(self) -> str:
        return f"GenerationConfig {self.to_json_string(ignore_metadata=True)}"
