"""The random models of the recorded cases: sizes, weights, and nothing but NumPy.

The weights make mistakes visible. Norm weights lie far from 1 and some are negative, attention
nearly picks single tokens, biases are not zero, and no two sizes of a model agree, so that a
swapped norm, a missing scale or a wrong reshape changes the outputs by a lot.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Config = dict[str, Any]
Arrays = dict[str, np.ndarray]

COMMON: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "max_position_embeddings": 48,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "torch_dtype": "float32",
}


def _sizes(d: int, f: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Config:
    return (
        COMMON
        | {
            "hidden_size": d,
            "intermediate_size": f,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }
        | more
    )


def _classifier(**more: Any) -> Config:
    names = {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    return _sizes(48, 56, 2, 6, 2, **names, **more)


def _labels(count: int) -> Config:
    names = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


# The order fixes the seeds: append, never insert.
MODELS: dict[str, Config] = {
    "gqa": _sizes(48, 56, 4, 6, 2),
    "mha": _sizes(40, 56, 2, 5, 5, rope_theta=100.0, rms_norm_eps=1e-6),
    "mqa": _sizes(40, 52, 3, 4, 1, rope_theta=500000.0, rms_norm_eps=0.05),
    "attention_bias": _sizes(48, 56, 2, 6, 2, attention_bias=True),
    "tied": _sizes(48, 56, 2, 6, 3, tie_word_embeddings=True),
    "half": _sizes(48, 56, 2, 6, 2),
    "labels3": _classifier(**_labels(3)),
    "labels1": _classifier(**_labels(1)),
    "labels5_bias": _classifier(**_labels(5), attention_bias=True),
    "head_dim": _sizes(48, 56, 2, 6, 2, head_dim=12),
    "mlp_bias": _sizes(40, 52, 2, 4, 1, head_dim=14, mlp_bias=True, attention_bias=True),
    "loud": _sizes(40, 56, 2, 5, 5, rope_theta=100.0),
}


def head_dim(config: Config) -> int:
    """H: as the config says, else hidden_size over heads."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every weight of the checkpoint with its shape, in Hugging Face's names and order."""
    d, f, h = config["hidden_size"], config["intermediate_size"], head_dim(config)
    n, k = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, out, width in (("q", n, d), ("k", k, d), ("v", k, d), ("o", d, n)):
            found[f"{layer}self_attn.{name}_proj.weight"] = (out, width)
            if config["attention_bias"]:
                found[f"{layer}self_attn.{name}_proj.bias"] = (out,)
        for name, out, width in (("gate", f, d), ("up", f, d), ("down", d, f)):
            found[f"{layer}mlp.{name}_proj.weight"] = (out, width)
            if config.get("mlp_bias"):
                found[f"{layer}mlp.{name}_proj.bias"] = (out,)
        found[f"{layer}input_layernorm.weight"] = (d,)
        found[f"{layer}post_attention_layernorm.weight"] = (d,)
    found["model.norm.weight"] = (d,)
    if config["architectures"] == ["LlamaForSequenceClassification"]:
        found["score.weight"] = (len(config["id2label"]), d)
    elif not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], d)
    return found


def seed(model: str) -> int:
    """The seed of a model's weights."""
    return 1000 + list(MODELS).index(model)


def weights(model: str) -> Arrays:
    """The weights of a model, the same on every machine (RandomState's stream is frozen)."""
    random = np.random.RandomState(seed(model))
    arrays = {name: _weight(random, name, shape) for name, shape in shapes(MODELS[model]).items()}
    if model == "loud":  # gates beyond 10, where relu6 and gelu_10 show
        return {k: v * np.float32(1 + 3 * ("gate_proj" in k)) for k, v in arrays.items()}
    return {k: _exact_in_half(v) for k, v in arrays.items()} if model == "half" else arrays


def _weight(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    normal = random.standard_normal(shape)
    if "norm" in name:
        array = random.uniform(0.4, 2.0, shape) * np.where(random.uniform(size=shape) < 0.2, -1, 1)
    elif name.endswith("bias"):
        array = 0.5 * normal
    elif "embed" in name:
        array = normal
    else:
        sharp = 1.4 if "q_proj" in name or "k_proj" in name else 1.0
        array = sharp * normal / np.sqrt(shape[-1])
    return array.astype(np.float32)


def _exact_in_half(array: np.ndarray) -> np.ndarray:
    """Values that float32, bfloat16 and float16 all hold exactly: 8 bits, not too small."""
    mantissa, exponent = np.frexp(array)
    short = np.ldexp(np.round(mantissa * 128) / 128, exponent)
    return np.asarray(np.round(short * 2**20) / 2**20, dtype=np.float32)
