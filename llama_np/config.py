"""The configuration of a LLaMA, read strictly from a Hugging Face `config.json`.

A key that would change the numbers and is not implemented is an error, never ignored.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llama_np.activations import ACTIVATIONS
from llama_np.errors import CheckpointError, ConfigError
from llama_np.files import read_bounded

MAX_CONFIG_BYTES = 1 << 20
MAX_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 24
MAX_LAYERS = 1024


@dataclass(frozen=True)
class Config:
    """Everything that the forward pass needs to know besides the weights.

    Field names are Hugging Face's. `rope_scaling` always has a `rope_type` ("default" when the
    checkpoint scales nothing). `rope_angles` is the dtype in which rotary angles are computed:
    "float64" is exact, "float32" reproduces transformers. `sources` says for each field where
    its value came from.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any]
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    id2label: Mapping[int, str]
    architectures: tuple[str, ...] = ()
    rope_angles: str = "float64"
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_labels(self) -> int:
        """How many classes the classification head tells apart."""
        return len(self.id2label)

    def __post_init__(self) -> None:
        _check(self)


# What transformers assumes for a key that config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

# Keys that cannot change an evaluation: bookkeeping, training, and defaults of generate().
HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "add_cross_attention",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "length_penalty",
        "max_length",
        "max_sequence_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)

# Keys that name a different model; any value but "off" is refused.
NOT_IMPLEMENTED = frozenset(
    [
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "layer_types",
        "logits_scaling",
        "no_rope_layers",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "partial_rotary_factor",
        "pruned_heads",
        "quantization_config",
        "residual_multiplier",
        "rope_interleaved",
        "sliding_window",
        "use_sliding_window",
        "use_qk_norm",
        "attention_multiplier",
        "embedding_multiplier",
    ]
)
_NEUTRAL: dict[str, Any] = {
    "partial_rotary_factor": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
}

# rope_type -> (required parameters, optional parameters)
ROPE_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "yarn": (
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "attention_factor", "original_max_position_embeddings"),
    ),
}


def read_config(folder: str | os.PathLike[str]) -> Config:
    """Read `config.json` of a checkpoint folder.

    Errors: FileNotFoundError; ConfigError (malformed, wrong, unknown); NotImplementedError for
    a known option that llama_np lacks.
    """
    path = Path(folder) / "config.json"
    return config_from_dict(read_json(path), where=repr(str(path)))


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a bounded JSON object without NaN, Infinity or duplicate keys.

    Errors: OSError as the operating system says; ConfigError for everything malformed.
    """
    try:
        text = read_bounded(path, limit)
    except CheckpointError as problem:
        raise ConfigError(str(problem)) from problem
    try:
        content = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{str(path)!r} is not valid JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} holds a {type(content).__name__}, expected an object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"duplicate key {key!r:.100}")
        content[key] = value
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def config_from_dict(values: Mapping[str, Any], where: str = "the configuration") -> Config:
    """Build a Config from the content of a config.json.

    Errors: ConfigError names the key, the value and the rule; NotImplementedError names what
    the configuration asks for and llama_np lacks.
    """
    try:
        return _from_dict(dict(values), where)
    except ConfigError as problem:
        if str(problem).startswith(where):
            raise
        raise ConfigError(f"{where}: {problem}") from problem


def _from_dict(values: dict[str, Any], where: str) -> Config:
    sources: dict[str, str] = {}
    _refuse_other_models(values, where)
    rope = _rope(values, sources)
    known: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        given = name in values and (values[name] is not None or name.endswith("token_id"))
        known[name] = values.pop(name) if given else default
        values.pop(name, None)
        sources.setdefault(name, "config.json" if given else "default of transformers")
    known.update(_derived(values, known, sources))
    known.update(rope)
    known["eos_token_id"] = _token_ids(known["eos_token_id"])
    known["id2label"] = _labels(values, sources)
    architectures = _names("architectures", values.pop("architectures", None))
    _refuse_unknown(values, where)
    return Config(**known, architectures=architectures, sources=sources)


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | None) or not all(type(n) is str for n in value or ()):
        raise ConfigError(f"{key} = {value!r}: expected a list of names or null")
    return tuple(value or ())


def _refuse_other_models(values: dict[str, Any], where: str) -> None:
    model_type = values.get("model_type", "llama")
    if not isinstance(model_type, str):
        raise ConfigError(f"model_type = {model_type!r}: expected 'llama'")
    if model_type != "llama":
        raise NotImplementedError(f"{where}: model_type is {model_type!r}, expected 'llama'")
    for name in NOT_IMPLEMENTED & values.keys():
        value = values.pop(name)
        if value not in (None, False, 0, [], {}, _NEUTRAL.get(name)):
            raise NotImplementedError(
                f"{where} asks for {name} = {value!r}, which llama_np does not implement"
            )


def _derived(
    values: dict[str, Any], known: dict[str, Any], sources: dict[str, str]
) -> dict[str, Any]:
    """Head counts and widths, which follow from others when they are left out."""
    heads = _whole("num_attention_heads", known["num_attention_heads"], MAX_WIDTH)
    width = _whole("hidden_size", known["hidden_size"], MAX_WIDTH)
    derived = {}
    for name, rule, value in (
        ("num_key_value_heads", "= num_attention_heads", heads),
        ("head_dim", "= hidden_size / num_attention_heads", width // heads),
    ):
        given = values.pop(name, None)
        derived[name] = value if given is None else given
        sources[name] = rule if given is None else "config.json"
        if given is None and name == "head_dim" and width % heads:
            raise ConfigError(
                f"hidden_size = {width} is not a multiple of num_attention_heads = {heads}"
            )
    return derived


def _rope(values: dict[str, Any], sources: dict[str, str]) -> dict[str, Any]:
    """Bring the three spellings of the rotary parameters into one.

    transformers 4.37 writes rope_theta and rope_scaling {"type", "factor"}; the hub's newer
    files use "rope_type"; transformers 5 puts all of it under rope_parameters.
    """
    scaling = values.pop("rope_scaling", None)
    parameters = values.pop("rope_parameters", None)
    if scaling is not None and parameters is not None and scaling != parameters:
        raise ConfigError("both rope_scaling and rope_parameters are given, and they differ")
    chosen = parameters if parameters is not None else scaling
    if chosen is not None and not isinstance(chosen, Mapping):
        raise ConfigError(f"rope_scaling = {chosen!r}: expected an object or null")
    rope = dict(chosen or {})
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
    old, new = rope.pop("type", None), rope.pop("rope_type", None)
    if old is not None and new is not None and old != new:
        raise ConfigError(f"rope_scaling has type = {old!r} and rope_type = {new!r}")
    kind = old if new is None else new
    if kind is None and not rope:
        kind = "default"
    if rope.get("partial_rotary_factor", 1.0) == 1.0:
        rope.pop("partial_rotary_factor", None)
    sources["rope_scaling"] = "config.json" if chosen else "default of transformers"
    length = values.pop("original_max_position_embeddings", None)
    if length is not None and kind in ("llama3", "yarn", "longrope", "dynamic"):
        rope["original_max_position_embeddings"] = length
    return {"rope_scaling": {"rope_type": kind, **rope}}


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _labels(values: dict[str, Any], sources: dict[str, str]) -> dict[int, str]:
    labels, count = values.pop("id2label", None), values.pop("num_labels", None)
    sources["id2label"] = "default of transformers" if labels is None else "config.json"
    if labels is None:
        count = 2 if count is None else _whole("num_labels", count, MAX_WIDTH)
        return {i: f"LABEL_{i}" for i in range(count)}
    try:
        return {int(i): str(name) for i, name in labels.items()}
    except (AttributeError, TypeError, ValueError) as problem:
        raise ConfigError(f"id2label = {labels!r:.200}: expected an object of names") from problem


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if name in HARMLESS or value in (None, False, 0, "", [], {}):
            continue
        raise ConfigError(
            f"{where} sets {name!r} = {value!r:.200}, which llama_np does not know; "
            "remove the key if it does not change the numbers"
        )


def _check(config: Config) -> None:
    """Every value has its type and lies within bounds, and the values fit together."""
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
        _whole(name, getattr(config, name), MAX_WIDTH)
    _whole("vocab_size", config.vocab_size, MAX_VOCABULARY)
    _whole("num_hidden_layers", config.num_hidden_layers, MAX_LAYERS)
    _whole("max_position_embeddings", config.max_position_embeddings, 1 << 40)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    _whole("num_key_value_heads", groups, MAX_WIDTH)
    if heads % groups:
        raise ConfigError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim = {config.head_dim} is odd; rotation needs pairs")
    _positive("rms_norm_eps", config.rms_norm_eps)
    _positive("rope_theta", config.rope_theta)
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} = {getattr(config, name)!r}: expected true or false")
    if type(config.hidden_act) is not str or config.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(f"hidden_act = {config.hidden_act!r}: expected one of {known}")
    if config.rope_angles not in ("float32", "float64"):
        raise ConfigError(f"rope_angles = {config.rope_angles!r}: expected float32 or float64")
    _check_token_ids(config)
    _check_rope(config)


def _check_token_ids(config: Config) -> None:
    optional = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    ids = {name: value for name, value in optional.items() if value is not None}
    ids |= {f"eos_token_id[{i}]": value for i, value in enumerate(config.eos_token_id)}
    for name, value in ids.items():
        if type(value) is not int or not -1 <= value < MAX_VOCABULARY:
            raise ConfigError(f"{name} = {value!r}: expected a token id or null")


def _check_rope(config: Config) -> None:
    rope = dict(config.rope_scaling)
    kind = rope.pop("rope_type", None)
    if not isinstance(kind, str) or kind not in ROPE_PARAMETERS:
        if isinstance(kind, str) and kind:
            raise NotImplementedError(
                f"rope_type {kind!r} is not implemented; known: {', '.join(ROPE_PARAMETERS)}"
            )
        raise ConfigError(f"rope_scaling = {dict(config.rope_scaling)!r}: expected a rope_type")
    required, optional = ROPE_PARAMETERS[kind]
    for name in required:
        if rope.get(name) is None:
            raise ConfigError(f"rope_scaling of type {kind!r} needs {name!r}")
    for name, value in rope.items():
        if name not in required + optional:
            raise ConfigError(f"rope_scaling of type {kind!r} has no parameter {name!r}")
        _check_rope_parameter(config, name, value)
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ConfigError("rope_scaling: low_freq_factor must be below high_freq_factor")
    if kind == "yarn" and config.rope_theta <= 1:  # its formula divides by log(theta)
        raise ConfigError(f"rope_theta = {config.rope_theta!r}: 'yarn' needs more than 1")
    if kind == "dynamic" and config.head_dim == 2:  # its exponent is H / (H - 2)
        raise ConfigError("head_dim = 2: rope_scaling of type 'dynamic' needs 4 or more")


def _check_rope_parameter(config: Config, name: str, value: Any) -> None:
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple) or len(value) != config.head_dim // 2:
            raise ConfigError(
                f"rope_scaling: {name} must be a list of head_dim / 2 = "
                f"{config.head_dim // 2} numbers"
            )
        for entry in value:
            _positive(f"rope_scaling: {name}", entry)
    elif name == "truncate":
        if not isinstance(value, bool):
            raise ConfigError(f"rope_scaling: truncate = {value!r}: expected true or false")
    elif value is not None:
        _positive(f"rope_scaling: {name}", value)


def _whole(name: str, value: Any, largest: int) -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise ConfigError(f"{name} = {value!r}: expected a whole number from 1 to {largest}")
    return value


def _positive(name: str, value: Any) -> None:
    if type(value) not in (int, float):  # a NumPy scalar would promote float32 arrays
        raise ConfigError(f"{name} = {value!r}: expected a number")
    if not 0 < value < sys.float_info.max:  # false for NaN too; integers may be huge
        raise ConfigError(f"{name} = {value!r}: expected a finite number above 0")


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as a JSON object that transformers reads back the same."""
    names = [f.name for f in fields(config) if f.name not in ("sources", "rope_angles")]
    values = {name: getattr(config, name) for name in names}
    eos = values["eos_token_id"]
    values["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    values["id2label"] = {str(i): name for i, name in config.id2label.items()}
    values["label2id"] = {name: i for i, name in config.id2label.items()}
    values["architectures"] = list(config.architectures) or None
    values["rope_scaling"] = _oldest_spelling(config.rope_scaling)
    values["model_type"] = "llama"
    return values


def _oldest_spelling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling as the oldest reader that knows it expects it.

    transformers 4.37 knows "linear" and "dynamic", as exactly `type` and a float `factor`.
    """
    if rope["rope_type"] in ("linear", "dynamic") and rope.keys() == {"rope_type", "factor"}:
        return {"type": rope["rope_type"], "factor": float(rope["factor"])}
    return None if rope["rope_type"] == "default" else dict(rope)
