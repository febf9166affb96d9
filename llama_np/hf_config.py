"""LlamaConfig: the configuration object that the Hugging Face documentation describes.

It is a bag of attributes that reads and writes config.json as transformers 4.37.2 does, and also
reads what newer versions write (`rope_parameters`, `dtype`, `head_dim`, `mlp_bias`). `core()`
turns it into the frozen, checked `Config` that the forward pass uses.

Better than 4.37.2 on purpose: the factor of `rope_scaling` may be a whole number, the newer rope
types and spellings are understood, `head_dim` is honoured, values set after construction are
checked when a model is built, and head counts that do not divide are refused at once.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llama_np.checkpoint import locate, read_values
from llama_np.config import DEFAULTS, NOT_IMPLEMENTED, Config, config_from_dict, read_json
from llama_np.errors import ConfigError
from llama_np.files import write_atomically
from llama_np.hf_loading import FORMAT_VERSION, refuse_upload, split_options

# Attributes that every configuration of transformers has, besides LLaMA's own.
INHERITED: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "torch_dtype": None,
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "tie_word_embeddings": True,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "architectures": None,
    "finetuning_task": None,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "tokenizer_class": None,
    "prefix": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "task_specific_params": None,
    "problem_type": None,
    "_name_or_path": "",
    "model_type": "",
}

# Defaults of generate() that old checkpoints keep in config.json.
GENERATION_FIELDS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
ATTENTION = ("eager", "sdpa", "flash_attention_2")  # names for one and the same computation
TORCH_DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "double",
    "float",
    "half",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
]
_NOT_SAVED = ("_attn_implementation", "_head_dim", "mlp_bias", "transformers_version")
_NEEDED_BY_CORE = {
    *DEFAULTS,
    *NOT_IMPLEMENTED,
    "architectures",
    "id2label",
    "model_type",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "rope_scaling",
}


class LlamaConfig:
    """Every documented field of a LLaMA configuration, as attributes.

    Unknown keywords become attributes too, as in transformers. `attention_dropout`,
    `initializer_range` and `pretraining_tp` cannot change an evaluation: the first acts in
    training only, the second only on random initialisation, and slicing a product into
    `pretraining_tp` parts gives the same product.
    Errors: ConfigError (a ValueError) for a malformed `rope_scaling`, heads that do not divide,
    an unknown `problem_type` or `torch_dtype`, labels that are no dict.
    """

    model_type: str = "llama"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    # Set from INHERITED, as every configuration of transformers has them.
    return_dict: bool
    torchscript: bool
    output_attentions: bool
    output_hidden_states: bool
    torch_dtype: str | None
    architectures: list[str] | None
    problem_type: str | None

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pretraining_tp: int = 1,
        tie_word_embeddings: bool = False,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        *,
        mlp_bias: bool = False,
        head_dim: int | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._set_inherited(dict(kwargs))
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        groups = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.num_key_value_heads = groups
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pretraining_tp = pretraining_tp
        self.tie_word_embeddings = tie_word_embeddings
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        self._head_dim = head_dim
        self._set_rope(rope_theta, rope_scaling, rope_parameters)
        self._check_heads()

    def _set_inherited(self, given: dict[str, Any]) -> None:
        """Attributes of every transformers configuration, then whatever else was given."""
        dtype = given.pop("dtype", None)
        given.setdefault("torch_dtype", dtype)
        given["torch_dtype"] = dtype_name(given["torch_dtype"])
        self._attn_implementation = given.pop("attn_implementation", None) or "eager"
        self._attn_implementation = given.pop("_attn_implementation", None) or (
            self._attn_implementation
        )
        self._name_or_path = str(given.pop("name_or_path", given.pop("_name_or_path", "")))
        given.pop("transformers_version", None)
        kind = given.pop("model_type", None)
        if kind not in (None, self.model_type):
            self.model_type = kind  # refused when a model is built
        for name, default in (INHERITED | GENERATION_FIELDS).items():
            if name not in ("id2label", "label2id", "model_type", "_name_or_path"):
                setattr(self, name, given.pop(name, copy.copy(default)))
        self._set_labels(given)
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(
                f"The config parameter `problem_type` was not understood: received "
                f"{self.problem_type!r}, expected one of {', '.join(PROBLEM_TYPES)}"
            )
        for name, value in given.items():
            setattr(self, name, value)

    def _set_labels(self, given: dict[str, Any]) -> None:
        names, numbers = given.pop("id2label", None), given.pop("label2id", None)
        count = given.pop("num_labels", None)
        for what, labels in (("id2label", names), ("label2id", numbers)):
            if labels is not None and not isinstance(labels, Mapping):
                raise ConfigError(f"{what} = {labels!r}: expected a dictionary")
        if names is None:
            self.num_labels = 2 if count is None else count
        else:
            self.id2label = {int(i): name for i, name in names.items()}
            self.label2id = {name: i for i, name in self.id2label.items()}
        if numbers is not None:
            self.label2id = dict(numbers)

    def _set_rope(
        self,
        theta: float,
        scaling: Mapping[str, Any] | None,
        parameters: Mapping[str, Any] | None,
    ) -> None:
        """Accept the spelling of 4.37.2 and those of later versions."""
        if scaling is not None and parameters is not None and scaling != parameters:
            raise ConfigError("both rope_scaling and rope_parameters are given, and they differ")
        chosen = scaling if parameters is None else parameters
        if isinstance(chosen, Mapping):
            chosen = dict(chosen)
            theta = chosen.pop("rope_theta", theta)
            if parameters is not None and not chosen:
                chosen = None
        self.rope_theta = theta
        self.rope_scaling = checked_rope_scaling(chosen)

    def _check_heads(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        whole = all(type(n) is int and n > 0 for n in (self.hidden_size, heads, groups))
        if whole and self._head_dim is None and self.hidden_size % heads:
            raise ConfigError(
                f"hidden_size must be divisible by num_heads (got `hidden_size`: "
                f"{self.hidden_size} and `num_heads`: {heads})."
            )
        if whole and heads % groups:
            raise ConfigError(
                f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head: as given, or hidden_size / num_attention_heads."""
        return self._head_dim or self.hidden_size // self.num_attention_heads

    @head_dim.setter
    def head_dim(self, value: int | None) -> None:
        self._head_dim = value

    @property
    def dtype(self) -> str | None:
        """The newer name of `torch_dtype`."""
        return self.torch_dtype

    @dtype.setter
    def dtype(self, value: Any) -> None:
        self.torch_dtype = dtype_name(value)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The rotary parameters in the spelling of transformers 5."""
        rest = dict(self.rope_scaling or {"rope_type": "default"})
        kind = rest.pop("type", None)
        return {"rope_theta": self.rope_theta, "rope_type": kind or "default"} | rest

    @rope_parameters.setter
    def rope_parameters(self, value: Mapping[str, Any] | None) -> None:
        self._set_rope(self.rope_theta, None, value)

    @property
    def num_labels(self) -> int:
        """How many classes there are; setting it names them LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if "id2label" not in vars(self) or len(self.id2label) != count:
            self.id2label = {i: f"LABEL_{i}" for i in range(count)}
            self.label2id = {name: i for i, name in self.id2label.items()}

    @property
    def name_or_path(self) -> str:
        """Where the configuration was read from."""
        return self._name_or_path

    @property
    def use_return_dict(self) -> bool:
        """Whether models answer with output objects rather than tuples."""
        return bool(self.return_dict and not self.torchscript)

    def core(self, rope_angles: str = "float64") -> Config:
        """The checked, frozen configuration that the functions of llama_np take.

        Errors: ConfigError names the field, its value and the rule; NotImplementedError.
        """
        values = {name: value for name, value in vars(self).items() if name in _NEEDED_BY_CORE}
        values |= {"mlp_bias": self.mlp_bias, "head_dim": self._head_dim}
        values["rope_scaling"] = checked_rope_scaling(self.rope_scaling)
        if self._attn_implementation not in ATTENTION:
            raise ConfigError(
                f"attn_implementation = {self._attn_implementation!r}: expected one of {ATTENTION}"
            )
        where = f"the configuration of {self._name_or_path!r}" if self._name_or_path else "config"
        return replace(config_from_dict(values, where), rope_angles=rope_angles)

    @classmethod
    def from_core(cls, config: Config) -> LlamaConfig:
        """The documented object for a `Config` of the functional core."""
        from llama_np.config import config_to_dict

        values = config_to_dict(config)
        standard = config.hidden_size // config.num_attention_heads == config.head_dim
        if standard and config.hidden_size % config.num_attention_heads == 0:
            values.pop("head_dim")
        return cls(**values)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Read config.json of a folder, a bundled checkpoint, or a JSON file.

        revision, subfolder, cache_dir, token, local_files_only and force_download say where.
        Other keywords are set as attributes afterwards; with `return_unused_kwargs=True` the
        result is (config, those that no attribute is called). Errors: OSError, ConfigError.
        """
        values, rest = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(values, **rest)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The content of config.json, and the keywords that do not say where it is."""
        place, rest = split_options(kwargs)
        path = locate(pretrained_model_name_or_path, weights=False, **place)
        return read_json(path) if path.suffix == ".json" else read_values(path), rest

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """A configuration from the content of a config.json; keywords as `from_pretrained`."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        config = cls(**config_dict)
        count = kwargs.get("num_labels")
        labels = kwargs.get("id2label")
        if count is not None and labels is not None and count != len(labels):
            raise ConfigError(f"num_labels = {count}, but id2label names {len(labels)} labels")
        unused = {}
        for name, value in kwargs.items():
            known = name in vars(config) or name in ("num_labels", "head_dim", "dtype")
            if known or name in ("rope_parameters", "attn_implementation"):
                config._override(name, value)
            else:
                unused[name] = value
        return (config, unused) if return_unused else config

    def _override(self, name: str, value: Any) -> None:
        """Set an attribute after construction, in the form that the constructor gives it."""
        if name == "rope_scaling":
            value = checked_rope_scaling(value)
        elif name == "torch_dtype":
            value = dtype_name(value)
        elif name == "id2label":
            value = {int(i): label for i, label in value.items()}
            self.label2id = {label: i for i, label in value.items()}
        setattr(self, "_attn_implementation" if name == "attn_implementation" else name, value)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> LlamaConfig:
        """A configuration from a JSON file."""
        return cls(**read_json(Path(json_file)))

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Set every entry as an attribute."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """All attributes, ready for JSON; `head_dim` and `mlp_bias` only where they matter."""
        values = {k: copy.deepcopy(v) for k, v in vars(self).items() if k not in _NOT_SAVED}
        values["model_type"] = self.model_type
        values["transformers_version"] = FORMAT_VERSION
        if self._head_dim is not None:
            values["head_dim"] = self._head_dim
        if self.mlp_bias:
            values["mlp_bias"] = self.mlp_bias
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The entries that a reader cannot guess: what config.json holds."""
        inherited = INHERITED | GENERATION_FIELDS
        defaults = LlamaConfig().to_dict()
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in inherited
            or value != inherited[name]
            or (name in defaults and value != defaults[name])
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON with sorted keys, indented by 2, ending in a newline."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_json_string` into a file, all of it or nothing."""
        text = self.to_json_string(use_diff)
        write_atomically(json_file_path, text.encode("utf-8"), overwrite=True)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False
    ) -> None:
        """Write config.json into a folder, which is created; an old one is replaced.

        Errors: NotImplementedError for `push_to_hub`; OSError.
        """
        refuse_upload(push_to_hub)
        os.makedirs(save_directory, exist_ok=True)
        self.to_json_file(Path(save_directory) / "config.json")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LlamaConfig) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def sets_generation_options(config: LlamaConfig) -> bool:
    """Whether an option of generate() is set there, where old checkpoints keep them."""
    known = GENERATION_FIELDS.items()
    return any(getattr(config, name, default) != default for name, default in known)


def checked_rope_scaling(scaling: Any) -> dict[str, Any] | None:
    """A well-formed `rope_scaling`, or None where nothing is scaled.

    Scalings that 4.37.2 knows are brought into its spelling, {"type", "factor"}.
    Errors: ConfigError with the messages of 4.37.2.
    """
    if scaling is None:
        return None
    two_fields = "`rope_scaling` must be a dictionary with with two fields, `type` and `factor`"
    if not isinstance(scaling, Mapping) or not scaling:
        raise ConfigError(f"{two_fields}, got {scaling!r}")
    rest = dict(scaling)
    old, new = rest.pop("type", None), rest.pop("rope_type", None)
    if new is None and old not in ("default", "llama3", "yarn", "longrope"):  # as 4.37.2 has it
        if len(scaling) != 2:
            raise ConfigError(f"{two_fields}, got {scaling!r}")
        if old not in ("linear", "dynamic"):
            raise ConfigError(
                f"`rope_scaling`'s type field must be one of ['linear', 'dynamic'], got {old}"
            )
    kind = new or old
    if kind in ("linear", "dynamic") and not rest.keys() - {"factor"}:
        return {"type": kind, "factor": _checked_factor(rest.get("factor"), new is not None)}
    return None if kind == "default" else dict(scaling)


def _checked_factor(factor: Any, newer_spelling: bool) -> float:
    """Newer versions of transformers allow any positive factor, 4.37.2 only those above 1."""
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not number or not factor > (0 if newer_spelling else 1) or math.isinf(factor):
        raise ConfigError(f"`rope_scaling`'s factor field must be a float > 1, got {factor}")
    return float(factor)


def dtype_name(dtype: Any) -> str | None:
    """The name "float32" for "float32", "torch.float32", np.float32 and np.dtype("float32").

    Errors: ConfigError for a name that PyTorch does not know.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else str(dtype)
    if isinstance(dtype, type | np.dtype):
        name = np.dtype(dtype).name
    name = name.removeprefix("torch.")
    if name not in TORCH_DTYPES:
        raise ConfigError(f"torch_dtype = {dtype!r}: expected one of {', '.join(TORCH_DTYPES)}")
    return name
