"""What llama.cpp's metadata says about a LLaMA, in Hugging Face's words.

Names, the order of query and key rows, rotary scaling, and the vocabulary as a tokenizer file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_np.errors import CheckpointError, ConfigError, TokenizerError
from llama_np.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, Piece, build_model
from llama_np.weights import Source, Stored, reorder_heads

MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
MAX_VOCABULARY = 1 << 24


def gguf_source(metadata: Mapping[str, Any], tensors: Mapping[str, Stored], path: str) -> Source:
    """The checkpoint that a GGUF file holds, under Hugging Face's names.

    Errors: CheckpointError, ConfigError; NotImplementedError for another architecture. Asking
    for the tokenizer's files: TokenizerError.
    """
    config = hugging_face_config(metadata, tensors, path)
    renamed = hugging_face_tensors(tensors, config)
    return Source(config, renamed, lambda: hugging_face_files(metadata, path))


def hugging_face_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, Stored], path: str
) -> dict[str, Any]:
    """The content of a config.json. Errors: CheckpointError, ConfigError, NotImplementedError."""
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise NotImplementedError(f"{path!r}: architecture {kind!r:.100}, expected 'llama'")
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise NotImplementedError(
            f"{path!r} is one part of {parts!r:.20}; join them: llama-gguf-split --merge"
        )
    if metadata.get("llama.expert_count"):
        raise NotImplementedError(f"{path!r}: a mixture of experts is not implemented")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{path!r} lacks 'token_embd.weight'", path, "token_embd.weight")
    heads = _needed(metadata, "attention.head_count", path)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": _needed(metadata, "embedding_length", path),
        "intermediate_size": _needed(metadata, "feed_forward_length", path),
        "num_hidden_layers": _needed(metadata, "block_count", path),
        "num_attention_heads": heads,
        "num_key_value_heads": _plain(metadata.get("llama.attention.head_count_kv", heads)),
        "hidden_act": "silu",
        "max_position_embeddings": _needed(metadata, "context_length", path),
        "rms_norm_eps": _shortest(_needed(metadata, "attention.layer_norm_rms_epsilon", path)),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", 1),
        "eos_token_id": _ends(metadata),
        "torch_dtype": "float32",
    }
    config |= _head_width(metadata, config, path)
    return config | _rope(metadata, tensors, config, path)


def _needed(metadata: Mapping[str, Any], key: str, path: str) -> Any:
    if f"llama.{key}" not in metadata:
        raise CheckpointError(f"{path!r} lacks the key 'llama.{key}'", path)
    return _plain(metadata[f"llama.{key}"])


def _plain(value: Any) -> Any:
    """A number; some writers repeat it for every layer."""
    if isinstance(value, np.ndarray) and value.size:
        if (value != value[0]).any():
            raise NotImplementedError(f"layers of different sizes: {value[:8].tolist()} ...")
        return value[0].item()
    return value


def _shortest(value: Any) -> Any:
    """The shortest decimal that is this float32: 1e-05 for 9.99999974e-06."""
    if isinstance(value, float) and math.isfinite(value) and abs(value) < 3e38:
        return float(str(np.float32(value)))
    return value


def _ends(metadata: Mapping[str, Any]) -> Any:
    """All ids that end a text: eos, and end of turn where it is another."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = list(dict.fromkeys(metadata[key] for key in keys if key in metadata))
    return (ids[0] if len(ids) == 1 else ids) if ids else 2


def _head_width(
    metadata: Mapping[str, Any], config: Mapping[str, Any], path: str
) -> dict[str, int]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if not isinstance(heads, int) or heads < 1 or not isinstance(width, int):
        raise ConfigError(f"{path!r}: {heads!r} heads of a width of {width!r}")
    size = metadata.get("llama.attention.key_length", width // heads)
    value = metadata.get("llama.attention.value_length", size)
    rotated = metadata.get("llama.rope.dimension_count", size)
    if size != value or size != rotated:
        raise NotImplementedError(
            f"{path!r}: head widths {size!r}, {value!r}, of which {rotated!r} are rotated"
        )
    return {"head_dim": size}


def _rope(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    path: str,
) -> dict[str, Any]:
    """How the rotary frequencies are scaled, in Hugging Face's words."""
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1.0))
    length = metadata.get("llama.rope.scaling.original_context_length")
    if ROPE_FACTORS in tensors:
        return {"rope_scaling": _scaling_of_factors(tensors[ROPE_FACTORS], config, path)}
    if kind == "none" and factor in (0.0, 1.0):
        return {}
    if kind in ("none", "linear"):
        return {"rope_scaling": {"rope_type": "linear", "factor": _shortest(factor)}}
    if kind != "yarn":
        raise NotImplementedError(f"{path!r}: rotary scaling {kind!r:.100} is not implemented")
    yarn = {"rope_type": "yarn", "factor": _shortest(factor)}
    return {"rope_scaling": yarn | ({"original_max_position_embeddings": length} if length else {})}


def _scaling_of_factors(tensor: Stored, config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """LLaMA-3.1 scaling: llama.cpp stores the divisor of each frequency, not how it is made.

    If the published recipe gives the same divisors, its name is used; otherwise the divisors
    themselves, which Hugging Face's "longrope" takes as they are.
    """
    pairs = config["head_dim"] // 2
    if tensor.dtype != "F32" or tensor.shape != (pairs,):
        raise CheckpointError(f"{path!r}: {ROPE_FACTORS!r} is no float32 ({pairs},)", path)
    divisors = tensor.array.astype(np.float64)
    if not np.isfinite(divisors).all() or (divisors <= 0).any():
        raise CheckpointError(f"{path!r}: {ROPE_FACTORS!r} holds numbers that cannot divide", path)
    recipe = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = config["rope_theta"]
    if isinstance(theta, float) and theta > 0:
        expected = _llama3_divisors(theta ** (-np.arange(pairs) / pairs), recipe)
        if np.allclose(expected, divisors, rtol=1e-5, atol=0):
            return recipe
    factors = divisors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
    }


def _llama3_divisors(frequencies: np.ndarray, recipe: Mapping[str, Any]) -> np.ndarray:
    """By what LLaMA-3.1 divides each frequency: 1 if fast, `factor` if slow, between: a blend."""
    turns = recipe["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = recipe["low_freq_factor"], recipe["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - blend) / recipe["factor"] + blend)


def hugging_face_tensors(
    tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> dict[str, Stored]:
    """The tensors under Hugging Face's names, query and key rows in its order."""
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    renamed = {_hugging_face_name(n): t for n, t in tensors.items() if n != ROPE_FACTORS}
    return {name: reorder_heads(name, tensor, *heads) for name, tensor in renamed.items()}


def _hugging_face_name(name: str) -> str:
    parts = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name)
    if parts and parts[2] in LAYER_NAMES:
        return f"model.layers.{int(parts[1])}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    stem, _, ending = name.rpartition(".")
    return f"{MODEL_NAMES[stem]}.{ending}" if stem in MODEL_NAMES else name


# How byte-level vocabularies cut text before merging, by llama.cpp's name for the rule.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ONE_DIGIT = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "default": ([], GPT2),
    "gpt-2": ([], GPT2),
    "gpt2": ([], GPT2),
    "smollm": ([ONE_DIGIT], GPT2),
    "llama3": ([], LLAMA3),
    "llama-v3": ([], LLAMA3),
    "llama-bpe": ([], LLAMA3),
}


def hugging_face_files(metadata: Mapping[str, Any], path: str) -> dict[str, bytes]:
    """The tokenizer's files: tokenizer.model or tokenizer.json, and tokenizer_config.json.

    Errors: TokenizerError for a vocabulary that makes no sense; NotImplementedError for a kind
    of vocabulary that LLaMA models do not have.
    """
    texts, kinds = _vocabulary(metadata, path)
    named = {
        f"{what}_token": texts[index]
        for what in ("bos", "eos")
        if (index := _special_id(metadata, what, len(texts), path)) is not None
    }
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", **named}
    settings |= {
        f"add_{what}_token": bool(metadata[f"tokenizer.ggml.add_{what}_token"])
        for what in ("bos", "eos")
        if f"tokenizer.ggml.add_{what}_token" in metadata
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        files = {"tokenizer.model": _sentencepiece(metadata, texts, kinds, settings, path)}
    elif kind == "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = {"tokenizer.json": _byte_level(metadata, texts, kinds, path)}
    else:
        raise NotImplementedError(f"{path!r}: vocabulary of the kind {kind!r:.100}")
    return files | {"tokenizer_config.json": json.dumps(settings, indent=2).encode("utf-8")}


def _vocabulary(metadata: Mapping[str, Any], path: str) -> tuple[list[str], list[int]]:
    texts = metadata.get("tokenizer.ggml.tokens")
    if texts is None:
        raise FileNotFoundError(2, "no vocabulary (tokenizer.ggml.tokens) in this file", path)
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise TokenizerError(f"{path!r}: tokenizer.ggml.tokens is no list of texts")
    kinds = metadata.get("tokenizer.ggml.token_type")
    kinds = [1] * len(texts) if kinds is None else [int(kind) for kind in kinds]
    if len(kinds) != len(texts) or not all(1 <= kind <= 6 for kind in kinds):
        raise TokenizerError(f"{path!r}: {len(texts)} tokens, but {len(kinds)} kinds of 1 to 6")
    return texts, kinds


def _special_id(metadata: Mapping[str, Any], what: str, size: int, path: str) -> int | None:
    index = metadata.get(f"tokenizer.ggml.{what}_token_id")
    if index is not None and (type(index) is not int or not 0 <= index < size):
        raise TokenizerError(f"{path!r}: {what}_token_id is {index!r}, the vocabulary has {size}")
    return index


def _sentencepiece(
    metadata: Mapping[str, Any],
    texts: list[str],
    kinds: list[int],
    settings: dict[str, Any],
    path: str,
) -> bytes:
    """The serialized SentencePiece model; GGUF numbers the kinds of pieces as that does.

    What the vocabulary calls user-defined becomes a control piece that is shown: SentencePiece
    would otherwise find it in any text, and a user's text must not become a control token.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    scores = [0.0] * len(texts) if scores is None else [float(score) for score in scores]
    if len(scores) != len(texts):
        raise TokenizerError(f"{path!r}: {len(texts)} tokens, but {len(scores)} scores")
    shown = [i for i, k in enumerate(kinds) if k == USER_DEFINED and texts[i].strip(" \u2581\n\t")]
    settings["added_tokens_decoder"] = {
        str(i): {"content": texts[i], "special": False} for i in shown
    }
    for i in shown:
        kinds[i] = CONTROL
    pieces = [Piece(*piece) for piece in zip(texts, scores, kinds, strict=True)]
    unk = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
    bos = _special_id(metadata, "bos", len(texts), path)
    eos = _special_id(metadata, "eos", len(texts), path)
    space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return build_model(
        pieces, unk, 1 if bos is None else bos, 2 if eos is None else eos, prefix_space=space
    )


def _byte_level(
    metadata: Mapping[str, Any], texts: list[str], kinds: list[int], path: str
) -> bytes:
    """A tokenizer.json for the byte-level byte-pair vocabularies of LLaMA-3 and its kin."""
    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule not in PRE_TOKENIZERS:
        raise NotImplementedError(f"{path!r}: text is cut by the rule {rule!r:.100}")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
        raise TokenizerError(f"{path!r} holds no merges (tokenizer.ggml.merges)")
    controls = {
        i: kind != USER_DEFINED
        for i, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    }
    bos = _special_id(metadata, "bos", len(texts), path)
    llama3 = PRE_TOKENIZERS[rule][1] == LLAMA3
    if not metadata.get("tokenizer.ggml.add_bos_token", llama3):
        bos = None
    spec = byte_level_spec(texts, merges, controls, bos, rule)
    return json.dumps(spec, ensure_ascii=False).encode("utf-8")


def byte_level_spec(
    texts: list[str],
    merges: list[str],
    controls: Mapping[int, bool],
    bos: int | None,
    rule: str = "llama-bpe",
) -> dict[str, Any]:
    """The content of a tokenizer.json for a byte-level byte-pair vocabulary.

    `controls`: id -> whether it is special (hidden when text is decoded). `bos`: the id that is
    put in front of every text, or None. `rule`: how text is cut, by llama.cpp's name.
    """
    first, pattern = PRE_TOKENIZERS[rule]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [*first, split | {"invert": False}, bytes_ | {"use_regex": False}]
    added = [
        {"id": i, "content": texts[i], "special": special, **_PLAIN}
        for i, special in controls.items()
    ]
    vocab = {text: i for i, text in enumerate(texts) if i not in controls}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None if bos is None else _beginning(texts[bos], bos),
        "decoder": bytes_ | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "ignore_merges": pattern == LLAMA3,
        },
    }


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _beginning(text: str, bos: int) -> dict[str, Any]:
    """The post-processor that puts the BOS in front."""
    token = {"SpecialToken": {"id": text, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [token, sequence],
        "pair": [token, sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
    }
