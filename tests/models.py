"""Tiny random models whose sizes all differ, as the nested dictionaries that `load` returns.

The weights are nastier than trained ones: norm weights of both signs and far from 1, biases,
attention that nearly picks single tokens. What holds here does not hold by luck.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings

from llama_np.checkpoint import expected_shapes, group_by_layer
from llama_np.config import Config, config_from_dict
from llama_np.precision import to_bf16

# No two sizes agree, products of heads included, so that a wrong reshape cannot pass by luck.
SIZES: dict[str, Any] = {
    "vocab_size": 41,  # V
    "hidden_size": 20,  # D
    "intermediate_size": 28,  # F
    "num_hidden_layers": 3,
    "num_attention_heads": 8,  # N, so that G = 4
    "num_key_value_heads": 2,  # K
    "head_dim": 6,  # H, with N*H = 48 and K*H = 12
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,  # pairs turn at clearly different speeds within a few tokens
    "attention_bias": True,
    "mlp_bias": True,
    "num_labels": 5,
}
B, T = 4, 7  # the batch and the length that go with them

# Twenty-five texts, cuts or paddings per fact; runs on a busy machine may be slow.
QUICK = settings(max_examples=25, deadline=None)

# One of each rotary scaling; the trained length is 32, before the scaling 16.
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 2.0,
        "beta_slow": 0.25,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.25, 1.5],
        "long_factor": [1.5, 2.5, 6.0],
        "original_max_position_embeddings": 16,
    },
}


def tiny_config(**changes: Any) -> Config:
    """A configuration of the sizes above, with changes under the keys of config.json."""
    return config_from_dict(SIZES | changes)


def random_weights(
    config: Config, seed: int = 0, dtype: np.typing.DTypeLike = np.float64
) -> dict[str, Any]:
    """Every tensor that `config` calls for, both heads included."""
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(config)
    arrays = {name: _draw(rng, name, shape).astype(dtype) for name, shape in shapes.items()}
    if config.tie_word_embeddings:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    return group_by_layer(arrays, config)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("norm.weight"):
        return rng.uniform(0.3, 2.5, shape) * rng.choice([-1, 1], shape)
    if name.endswith("bias"):
        return rng.normal(0, 0.5, shape)
    spread = 2.0 if "q_proj" in name else 1.0  # large queries make sharp attention
    return rng.normal(0, spread / shape[-1] ** 0.5, shape)


def random_tokens(config: Config, rows: int = B, length: int = T, seed: int = 1) -> np.ndarray:
    """(rows, length) token ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length))


def tiny_model(
    dtype: np.typing.DTypeLike = np.float64, seed: int = 0, **changes: Any
) -> tuple[Config, dict[str, Any]]:
    """(config, weights), as `load` returns them."""
    config = tiny_config(**changes)
    return config, random_weights(config, seed, dtype)


def map_weights(function: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """The same nested dictionary with every array passed through `function`."""
    return {
        name: map_weights(function, value) if isinstance(value, dict) else function(value)
        for name, value in weights.items()
    }


def at_rest_in_bf16(weights: dict[str, Any]) -> dict[str, Any]:
    """Matrices as bfloat16 bits, vectors as float32: what `load(dtype="bfloat16")` returns."""
    return map_weights(
        lambda array: to_bf16(array) if array.ndim == 2 else array.astype(np.float32), weights
    )


def every_array(weights: dict[str, Any]) -> list[np.ndarray]:
    """All arrays of the nested dictionary."""
    arrays: list[np.ndarray] = []
    for value in weights.values():
        arrays.extend(every_array(value) if isinstance(value, dict) else [value])
    return arrays


def read_only(weights: dict[str, Any]) -> dict[str, Any]:
    """Copies that refuse to be written to, like weights of a mapped file."""

    def locked(array: np.ndarray) -> np.ndarray:
        copy = array.copy()
        copy.flags.writeable = False
        return copy

    return map_weights(locked, weights)
