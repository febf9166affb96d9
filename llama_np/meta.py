"""Meta's own layout: params.json and consolidated.NN.pth, a tensor cut into one piece per file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.config import Config
from llama_np.errors import CheckpointError, ConfigError
from llama_np.files import read_bounded
from llama_np.tiktoken_model import looks_like_tiktoken, tokenizer_json
from llama_np.weights import Source, Stored, pairs_from_halves, reorder_heads

MAX_TOKENIZER_BYTES = 64 << 20
ROWS, COLUMNS, WHOLE = 0, 1, None  # how a tensor is cut

MODEL_NAMES = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", COLUMNS),
    "norm.weight": ("model.norm.weight", WHOLE),
    "output.weight": ("lm_head.weight", ROWS),
}
LAYER_NAMES = {
    "attention.wq": ("self_attn.q_proj", ROWS),
    "attention.wk": ("self_attn.k_proj", ROWS),
    "attention.wv": ("self_attn.v_proj", ROWS),
    "attention.wo": ("self_attn.o_proj", COLUMNS),
    "feed_forward.w1": ("mlp.gate_proj", ROWS),
    "feed_forward.w2": ("mlp.down_proj", COLUMNS),
    "feed_forward.w3": ("mlp.up_proj", ROWS),
    "attention_norm": ("input_layernorm", WHOLE),
    "ffn_norm": ("post_attention_layernorm", WHOLE),
}
# Scaled frequencies of LLaMA 3.1; the factor is not in params.json, so it follows the models.
SCALED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def meta_source(
    params: Mapping[str, Any], shards: Sequence[Mapping[str, Stored]], folder: Path
) -> Source:
    """The checkpoint under Hugging Face's names; pieces are joined when a tensor is asked for.

    Errors: CheckpointError, ConfigError.
    """
    names = set().union(*shards)
    for number, shard in enumerate(shards):
        if names - shard.keys():
            lost = min(names - shard.keys())
            raise CheckpointError(f"shard {number} of {str(folder)!r} lacks {lost!r}", folder, lost)
    dim = _whole(params, "dim")
    joined = {
        name: _join(name, [shard[name] for shard in shards], dim)
        for name in sorted(names)
        if name != "rope.freqs"
    }
    config = _config(params, joined, folder)
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    renamed = {_hugging_face_name(name): tensor for name, tensor in joined.items()}
    tensors = {name: reorder_heads(name, tensor, *heads) for name, tensor in renamed.items()}
    return Source(config, tensors, lambda: _tokenizer_files(folder) | _generation_file(config))


def _hugging_face_name(name: str) -> str:
    parts = re.fullmatch(r"layers\.(\d{1,5})\.([\w.]+)\.(weight|bias)", name)
    if parts and parts[2] in LAYER_NAMES:
        return f"model.layers.{int(parts[1])}.{LAYER_NAMES[parts[2]][0]}.{parts[3]}"
    return MODEL_NAMES[name][0] if name in MODEL_NAMES else name


def _cut(name: str) -> int | None:
    """Along which axis Meta cuts a tensor."""
    if name in MODEL_NAMES:
        return MODEL_NAMES[name][1]
    parts = re.fullmatch(r"layers\.\d+\.([\w.]+)\.weight", name)
    return LAYER_NAMES[parts[1]][1] if parts and parts[1] in LAYER_NAMES else WHOLE


def _join(name: str, pieces: list[Stored], dim: int) -> Stored:
    first, axis = pieces[0], _cut(name)
    if len(pieces) == 1 or axis is None:
        return first
    if len(first.shape) == 2 and name == "tok_embeddings.weight" and first.shape[1] == dim:
        axis = ROWS  # LLaMA 3 cuts its embedding by words
    for piece in pieces:
        if piece.dtype != first.dtype or piece.shape != first.shape or len(piece.shape) != 2:
            what = f"{piece.dtype} {piece.shape} and {first.dtype} {first.shape}"
            raise CheckpointError(f"the pieces of {name!r} do not fit: {what}", None, name)
    shape = list(first.shape)
    shape[axis] *= len(pieces)
    return Stored(
        first.dtype, lambda: np.concatenate([p.array for p in pieces], axis=axis), tuple(shape)
    )


def _config(
    params: Mapping[str, Any], tensors: Mapping[str, Stored], folder: Path
) -> dict[str, Any]:
    dim, heads = _whole(params, "dim"), _whole(params, "n_heads")
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise CheckpointError(f"{str(folder)!r} lacks {name!r}", folder, name)
    hidden = tensors["layers.0.feed_forward.w1.weight"].shape[0]
    expected = hidden_size_of(params, dim)
    if expected not in (None, hidden):
        raise CheckpointError(
            f"{str(folder)!r}: params.json makes the MLP {expected} wide, in the file it is "
            f"{hidden}: do they belong together?",
            folder,
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["tok_embeddings.weight"].shape[0],
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": _whole(params, "n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(params, "n_kv_heads") if params.get("n_kv_heads") else heads,
        "hidden_act": "silu",
        "max_position_embeddings": _context(params),
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
    }
    if params.get("use_scaled_rope"):
        factor = params.get("rope_scaling_factor") or (8.0 if dim >= 4096 else 32.0)
        config["rope_scaling"] = {**SCALED, "factor": factor}
    llama3 = config["vocab_size"] == 128256
    config["bos_token_id"] = 128000 if llama3 else 1
    config["eos_token_id"] = [128001, 128008, 128009] if llama3 else 2
    return config


def _whole(params: Mapping[str, Any], key: str) -> int:
    value = params.get(key)
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise ConfigError(f"params.json: {key} = {value!r:.100}: expected a positive whole number")
    return value


def hidden_size_of(params: Mapping[str, Any], dim: int) -> int | None:
    """The width of the MLP by Meta's formula, or None if params.json lacks its numbers."""
    multiple, scale = params.get("multiple_of"), params.get("ffn_dim_multiplier") or 1
    if type(multiple) is not int or multiple < 1:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1000:
        raise ConfigError(f"params.json: ffn_dim_multiplier = {scale!r:.100}: expected a number")
    return multiple * math.ceil(int(scale * int(8 * dim / 3)) / multiple)


def _context(params: Mapping[str, Any]) -> int:
    """The trained length, which params.json does not say, recognized by what else differs."""
    given = params.get("max_seq_len")
    if type(given) is int and given > 0:
        return given
    if params.get("use_scaled_rope"):
        return 131072  # LLaMA 3.1 and later
    theta = params.get("rope_theta", 10000.0)
    if theta == 500000.0:
        return 8192  # LLaMA 3
    if theta == 1000000.0:
        return 16384  # Code Llama
    first = params.get("norm_eps") == 1e-6 or (
        params.get("dim") == 8192 and "n_kv_heads" not in params
    )
    return 2048 if first else 4096  # LLaMA 1, LLaMA 2


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    """tokenizer.model from the folder or the one above it, where Meta's download puts it."""
    for place in (folder, folder.parent):
        if (place / "tokenizer.model").exists():
            content = read_bounded(place / "tokenizer.model", MAX_TOKENIZER_BYTES)
            if looks_like_tiktoken(content):
                return tokenizer_json(content, repr(str(place / "tokenizer.model")))
            return {"tokenizer.model": content} | _tokenizer_settings()
    return {}


def _tokenizer_settings() -> dict[str, bytes]:
    """What transformers writes beside the tokenizer.model of LLaMA 1 and 2."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    settings |= {"add_bos_token": True, "add_eos_token": False}
    return {
        "tokenizer_config.json": _json(settings | names),
        "special_tokens_map.json": _json(names),
    }


def _generation_file(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Defaults of generate(), marked as what follows from the configuration anyway."""
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    return {"generation_config.json": _json({"_from_model_config": True} | ids)}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")


def params_of(config: Config) -> dict[str, Any]:
    """The content of a params.json. Errors: NotImplementedError for what Meta's code lacks."""
    scaling = dict(config.rope_scaling)
    kind, factor = scaling.pop("rope_type"), scaling.pop("factor", None)
    scaled = kind == "llama3" and {"rope_type": "llama3", **scaling} == SCALED
    fits = {
        "hidden_act": config.hidden_act in ("silu", "swish"),
        "attention_bias": not config.attention_bias,
        "mlp_bias": not config.mlp_bias,
        "head_dim": config.head_dim * config.num_attention_heads == config.hidden_size,
        "rope_scaling": scaled or kind == "default",
    }
    for name, holds in fits.items():
        if not holds:
            what = f"{name} = {getattr(config, name)!r}"
            raise NotImplementedError(f"Meta's layout cannot describe a model with {what}")
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_seq_len": config.max_position_embeddings,
    }
    if scaled:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": factor}
    return params | _mlp_width(config.hidden_size, config.intermediate_size)


def _mlp_width(dim: int, hidden: int) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier that make this width by Meta's formula."""
    for multiple in (256, 1024, 4096, 64, 32, 16, 8, 4, 2, 1):
        if hidden % multiple:
            continue
        for scale in (1.0, round(hidden / int(8 * dim / 3), 2), hidden / int(8 * dim / 3)):
            params = {"multiple_of": multiple, "ffn_dim_multiplier": scale}
            if hidden_size_of(params, dim) == hidden:
                return params
    scale = (hidden + 0.5) / int(8 * dim / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": scale}


def meta_tensors(
    tensors: Mapping[str, Stored], config: Config, shards: int
) -> list[dict[str, Stored]]:
    """The pieces of every file, under Meta's names. Errors: ValueError for uneven pieces."""
    heads = config.num_attention_heads, config.num_key_value_heads
    parts: list[dict[str, Stored]] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        meta_name = _meta_name(name)
        if meta_name is None:
            raise NotImplementedError(f"Meta's layout has no place for {name!r}")
        ordered = reorder_heads(name, tensor, *heads, pairs_from_halves)
        axis = _cut(meta_name)
        if axis is not None and tensor.shape[axis] % shards:
            raise ValueError(f"{name!r} of shape {tensor.shape} cannot be cut into {shards} pieces")
        for number, part in enumerate(parts):
            part[meta_name] = _piece(ordered, axis, number, shards)
    return parts


def _meta_name(name: str) -> str | None:
    parts = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight)", name)
    layer_names = {ours: theirs for theirs, (ours, _) in LAYER_NAMES.items()}
    if parts and parts[2] in layer_names:
        return f"layers.{parts[1]}.{layer_names[parts[2]]}.weight"
    return {ours: theirs for theirs, (ours, _) in MODEL_NAMES.items()}.get(name)


def _piece(tensor: Stored, axis: int | None, number: int, shards: int) -> Stored:
    if axis is None or shards == 1:
        return tensor
    width = tensor.shape[axis] // shards
    cut = (slice(None),) * axis + (slice(number * width, (number + 1) * width),)
    shape = (*tensor.shape[:axis], width, *tensor.shape[axis + 1 :])
    return tensor.apply(lambda array: array[cut], shape)
