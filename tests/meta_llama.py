"""LLaMA in Meta's convention, written as plainly as possible: the truth for conversions.

Queries and keys rotate as complex numbers made of neighbouring channels, weights have Meta's
names, and nothing of llama_np is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def random_meta_model(
    params: Mapping[str, Any], hidden: int, vocabulary: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random float32 weights under Meta's names."""
    rng = np.random.default_rng(seed)
    dim, heads = params["dim"], params["n_heads"]
    keys = params.get("n_kv_heads", heads) * (dim // heads)
    layer = {
        "attention.wq": (dim, dim),
        "attention.wk": (keys, dim),
        "attention.wv": (keys, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocabulary, dim)}
    for i in range(params["n_layers"]):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"norm.weight": (dim,), "output.weight": (vocabulary, dim)}
    return {name: _draw(rng, shape) for name, shape in shapes.items()}


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return rng.uniform(0.5, 2, shape).astype(np.float32)
    return (rng.standard_normal(shape) * 1.5 / shape[-1] ** 0.5).astype(np.float32)


def shards_of(weights: Mapping[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    """The weights as Meta cuts them for `count` processors."""
    columns = ("tok_embeddings", "attention.wo", "feed_forward.w2")
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(count)]
    for name, array in weights.items():
        whole = array.ndim == 1
        axis = 1 if any(key in name for key in columns) else 0
        for part, piece in zip(
            parts, [array] * count if whole else np.split(array, count, axis), strict=True
        ):
            part[name] = np.ascontiguousarray(piece)
    return parts


def meta_logits(
    tokens: list[int], params: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> np.ndarray:
    """(T,) -> (T, V), in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    heads, eps = params["n_heads"], params["norm_eps"]
    groups, width = params.get("n_kv_heads", heads), params["dim"] // heads
    x = w["tok_embeddings.weight"][tokens]
    frequencies = params.get("rope_theta", 10000.0) ** (-np.arange(0, width, 2) / width)
    turn = np.exp(1j * np.outer(np.arange(len(tokens)), frequencies))  # (T, width/2)
    for i in range(params["n_layers"]):
        p = f"layers.{i}."
        y = _norm(x, w[p + "attention_norm.weight"], eps)
        q = _rotate((y @ w[p + "attention.wq.weight"].T).reshape(-1, heads, width), turn)
        k = _rotate((y @ w[p + "attention.wk.weight"].T).reshape(-1, groups, width), turn)
        v = (y @ w[p + "attention.wv.weight"].T).reshape(-1, groups, width)
        context = np.zeros((len(tokens), heads, width))
        for head in range(heads):
            group = head // (heads // groups)
            for t in range(len(tokens)):
                scores = k[: t + 1, group] @ q[t, head] / width**0.5
                shares = np.exp(scores - scores.max())
                context[t, head] = shares @ v[: t + 1, group] / shares.sum()
        x = x + context.reshape(len(tokens), -1) @ w[p + "attention.wo.weight"].T
        y = _norm(x, w[p + "ffn_norm.weight"], eps)
        gate = y @ w[p + "feed_forward.w1.weight"].T
        up = y @ w[p + "feed_forward.w3.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "feed_forward.w2.weight"].T
    return _norm(x, w["norm.weight"], eps) @ w["output.weight"].T


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _rotate(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Channels (0, 1), (2, 3), ... are the complex numbers that turn."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
