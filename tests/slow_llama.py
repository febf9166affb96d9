"""LLaMA a second time, one token, one head and one number at a time, straight from the papers.

Nothing here is shared with the package: it exists to disagree. Rotation multiplies complex
numbers, softmax is written out, every query head looks up its own key/value head, and the
rotary scalings are loops over the pairs. Slow on purpose.
"""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np

Vector = list[float]


def slow_logits(tokens: list[int], weights: Any, config: Any) -> np.ndarray:
    """One row of token ids at positions 0, 1, 2, ... -> (T, V)."""
    hidden = slow_hidden_states(tokens, weights, config)
    head = weights["lm_head.weight"]
    return np.array([product(head, h) for h in hidden])


def slow_hidden_states(tokens: list[int], weights: Any, config: Any) -> list[Vector]:
    """The final norm's output for every token."""
    frequencies = slow_frequencies(config, len(tokens))
    stream = [list(map(float, weights["model.embed_tokens.weight"][t])) for t in tokens]
    for i in range(config.num_hidden_layers):
        stream = slow_layer(stream, weights[f"model.layers.{i}"], frequencies, config)
    eps = config.rms_norm_eps
    return [slow_norm(x, weights["model.norm.weight"], eps) for x in stream]


def slow_layer(stream: list[Vector], w: Any, frequencies: Vector, config: Any) -> list[Vector]:
    """h = x + attention(norm(x)); h + mlp(norm(h)), token after token."""
    eps = config.rms_norm_eps
    normed = [slow_norm(x, w["input_layernorm.weight"], eps) for x in stream]
    attention = slow_attention(normed, w, frequencies, config)
    middle = [add(x, a) for x, a in zip(stream, attention, strict=True)]
    result = []
    for x in middle:
        y = slow_norm(x, w["post_attention_layernorm.weight"], eps)
        result.append(add(x, slow_mlp(y, w)))
    return result


def slow_norm(x: Vector, weight: Any, eps: float) -> Vector:
    """RMSNorm, arXiv:1910.07467, equation 4, with eps under the root."""
    scale = math.sqrt(math.fsum(v * v for v in x) / len(x) + eps)
    return [float(g) * v / scale for g, v in zip(weight, x, strict=True)]


def slow_mlp(x: Vector, w: Any) -> Vector:
    """SwiGLU, arXiv:2002.05202, equation 6: (swish(x W) * (x V)) W2."""
    gate = module("mlp.gate_proj", x, w)
    up = module("mlp.up_proj", x, w)
    return module(
        "mlp.down_proj", [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)], w
    )


def slow_attention(xs: list[Vector], w: Any, frequencies: Vector, config: Any) -> list[Vector]:
    """Causal attention, arXiv:1706.03762, equation 1, with one softmax per token and head."""
    H = config.head_dim
    per_group = config.num_attention_heads // config.num_key_value_heads
    scale = slow_attention_factor(config)
    queries, keys, values = [], [], []
    for position, x in enumerate(xs):
        q, k, v = (heads(module(f"self_attn.{m}_proj", x, w), H) for m in "qkv")
        queries.append([turn(head, position, frequencies, scale) for head in q])
        keys.append([turn(head, position, frequencies, scale) for head in k])
        values.append(v)
    result = []
    for t in range(len(xs)):
        context: Vector = []
        for n in range(config.num_attention_heads):
            shared = n // per_group
            scores = [dot(queries[t][n], keys[s][shared]) / math.sqrt(H) for s in range(t + 1)]
            weights = slow_softmax(scores)
            for channel in range(H):
                context.append(
                    math.fsum(weights[s] * values[s][shared][channel] for s in range(t + 1))
                )
        result.append(module("self_attn.o_proj", context, w))
    return result


def slow_softmax(scores: Vector) -> Vector:
    powers = [math.exp(score - max(scores)) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def turn(head: Vector, position: int, frequencies: Vector, scale: float = 1.0) -> Vector:
    """RoPE, arXiv:2104.09864, section 3.2: pair j is a complex number times e^(i m theta_j).

    The checkpoint layout of Hugging Face pairs channel j with channel j + H/2.
    """
    half = len(head) // 2
    turned = [
        complex(head[j], head[j + half]) * cmath.exp(1j * position * frequencies[j]) * scale
        for j in range(half)
    ]
    return [z.real for z in turned] + [z.imag for z in turned]


def slow_frequencies(config: Any, length: int) -> Vector:
    """The angle per token of every pair, for a text of `length` tokens."""
    H, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    kind, trained = scaling["rope_type"], config.max_position_embeddings
    original = scaling.get("original_max_position_embeddings", trained)
    if kind == "dynamic" and length > trained:
        factor = scaling["factor"]
        theta *= (factor * length / trained - (factor - 1)) ** (H / (H - 2))
    result = []
    for j in range(H // 2):
        f = theta ** (-2 * j / H)
        if kind == "linear":
            f /= scaling["factor"]
        if kind == "llama3":
            f = _llama3(f, scaling, original)
        if kind == "yarn":
            f = _yarn(f, j, config, original)
        if kind == "longrope":
            f /= scaling["long_factor" if length > original else "short_factor"][j]
        result.append(f)
    return result


def _llama3(f: float, scaling: Any, original: int) -> float:
    wavelength = 2 * math.pi / f
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < original / high:
        return f
    if wavelength > original / low:
        return f / scaling["factor"]
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * f / scaling["factor"] + smooth * f


def _yarn(f: float, j: int, config: Any, original: int) -> float:
    """arXiv:2309.00071, section 3.2, with the ramp over pair indices that its code uses."""
    scaling = config.rope_scaling

    def pair(rotations: float) -> float:
        wavelengths = original / (rotations * 2 * math.pi)
        return config.head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    ramp = min(max((j - low) / (high - low), 0.0), 1.0)
    return f / scaling["factor"] * ramp + f * (1 - ramp)


def slow_attention_factor(config: Any) -> float:
    """What rotated queries and keys are multiplied with (yarn and longrope)."""
    scaling = config.rope_scaling
    kind = scaling["rope_type"]
    if scaling.get("attention_factor"):
        return float(scaling["attention_factor"])
    if kind == "yarn":
        return 0.1 * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0
    if kind == "longrope":
        original = scaling["original_max_position_embeddings"]
        factor = scaling.get("factor", config.max_position_embeddings / original)
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0


def module(name: str, x: Vector, w: Any) -> Vector:
    y = product(w[name + ".weight"], x)
    return add(y, w[name + ".bias"]) if name + ".bias" in w else y


def product(matrix: Any, x: Vector) -> Vector:
    return [dot(row, x) for row in matrix.tolist()]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def add(a: Any, b: Any) -> Vector:
    return [float(x) + float(y) for x, y in zip(a, b, strict=True)]


def heads(x: Vector, H: int) -> list[Vector]:
    return [x[start : start + H] for start in range(0, len(x), H)]
