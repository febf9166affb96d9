"""Rotary position embedding (RoPE, arXiv:2104.09864): frequencies and tables.

A head's H channels form H/2 pairs (channel j with channel j + H/2). Pair j turns by the angle
position * frequency[j], so that the product of a query and a key depends on their distance only.
Scalings change the frequencies so that a model reaches beyond the length it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from llama_np.config import Config
from llama_np.tap import NO_TAP, Tap


def tables(
    positions: np.ndarray, length: np.ndarray, config: Config, dtype: np.dtype, tap: Tap = NO_TAP
) -> tuple[np.ndarray, np.ndarray]:
    """The cosines and sines that `layers.rotate` multiplies with.

    positions (B, T); length (B, 1) or (1, 1): how far the text reaches, which the "dynamic" and
    "longrope" scalings look at. Returns two arrays (B, 1, T, H) of `dtype`. The angles are
    computed in `config.rope_angles` and rounded once, here.
    """
    frequencies = SCALINGS[config.rope_scaling["rope_type"]](config, length)  # (1|B, H/2)
    half = positions[:, :, None].astype(frequencies.dtype) * frequencies[:, None]  # (B, T, H/2)
    angles = np.concatenate([half, half], axis=-1)  # (B, T, H)
    scale = attention_factor(config)
    cos = tap("model.rotary_emb.cos", (np.cos(angles) * scale).astype(dtype))  # (B, T, H)
    sin = tap("model.rotary_emb.sin", (np.sin(angles) * scale).astype(dtype))  # (B, T, H)
    return cos[:, None], sin[:, None]


def frequencies_of(config: Config, theta: float | np.ndarray) -> np.ndarray:
    """theta^(-2j/H) for j = 0 ... H/2 - 1: (1|B, H/2) in `config.rope_angles`.

    For float32 the exponent and the result are rounded where PyTorch rounds them, the power
    itself is not; that matches transformers to the last bit in almost every entry.
    """
    H, dtype = config.head_dim, np.dtype(config.rope_angles)
    exponents = np.arange(0, H, 2).astype(dtype) / dtype.type(H)  # (H/2,)
    powers = np.power(theta, exponents.astype(np.float64))  # (1|B, H/2) or (H/2,)
    return np.atleast_2d(1 / powers.astype(dtype))


def default(config: Config, length: np.ndarray) -> np.ndarray:
    """Unscaled frequencies, for every length."""
    return frequencies_of(config, config.rope_theta)


def linear(config: Config, length: np.ndarray) -> np.ndarray:
    """Position interpolation (arXiv:2306.15595): every frequency divided by `factor`."""
    return frequencies_of(config, config.rope_theta) / config.rope_scaling["factor"]


def dynamic(config: Config, length: np.ndarray) -> np.ndarray:
    """NTK-aware base that grows with the text, once it is longer than the trained length.

    theta' = theta * (factor * n / L - (factor - 1)) ** (H / (H - 2)), as in transformers.
    """
    factor, H = float(config.rope_scaling["factor"]), config.head_dim
    trained = config.max_position_embeddings
    growth = factor * np.maximum(length, trained) / trained - (factor - 1)  # (1|B, 1)
    return frequencies_of(config, config.rope_theta * growth ** (H / (H - 2)))


def llama3(config: Config, length: np.ndarray) -> np.ndarray:
    """Llama 3.1: short waves stay, long waves are divided by `factor`, a blend in between."""
    scaling = config.rope_scaling
    plain = frequencies_of(config, config.rope_theta)  # (1, H/2)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original_length(config) * plain / (2 * math.pi)  # (1, H/2): in the original length
    keep = np.clip((turns - low) / (high - low), 0, 1)  # (1, H/2)
    return (1 - keep) * plain / scaling["factor"] + keep * plain


def yarn(config: Config, length: np.ndarray) -> np.ndarray:
    """YaRN (arXiv:2309.00071): a linear ramp over the pairs from kept to divided frequencies."""
    scaling = config.rope_scaling
    plain = frequencies_of(config, config.rope_theta)  # (1, H/2)
    bounds = [_pair_with_turns(config, scaling.get(name) or turns) for name, turns in _YARN_BETAS]
    rounded = [math.floor(bounds[0]), math.ceil(bounds[1])]
    first, last = rounded if scaling.get("truncate", True) else bounds
    first, last = max(first, 0), min(last, config.head_dim - 1)
    width = (last - first) or 0.001  # keeps the ramp defined when both ends coincide
    pairs = np.arange(config.head_dim // 2, dtype=plain.dtype)  # (H/2,)
    divide = np.clip((pairs - first) / width, 0, 1)  # (H/2,)
    return plain / stretch(config) * divide + plain * (1 - divide)


_YARN_BETAS = (("beta_fast", 32.0), ("beta_slow", 1.0))


def _pair_with_turns(config: Config, turns: float) -> float:
    """The (fractional) pair index that makes `turns` turns within the original length."""
    waves = original_length(config) / (2 * math.pi * turns)
    return config.head_dim * math.log(waves) / (2 * math.log(config.rope_theta))


def longrope(config: Config, length: np.ndarray) -> np.ndarray:
    """LongRoPE (arXiv:2402.13753): a divisor per pair, one list for short and one for long text."""
    scaling = config.rope_scaling
    plain = frequencies_of(config, config.rope_theta)  # (1, H/2)
    is_long = np.asarray(length) > original_length(config)  # (1|B, 1)
    divisors = np.where(is_long, scaling["long_factor"], scaling["short_factor"])  # (1|B, H/2)
    return plain / divisors.astype(plain.dtype)


SCALINGS: dict[str, Callable[[Config, np.ndarray], np.ndarray]] = {
    "default": default,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}


def steady_length(config: Config, length: int) -> float:
    """How long a text of `length` tokens can become before new tokens are rotated differently.

    Tokens that are fed together are rotated alike. One by one, they would not be where a scaling
    looks at the length.
    """
    match config.rope_scaling["rope_type"]:
        case "dynamic":
            return max(config.max_position_embeddings, length)
        case "longrope" if length <= original_length(config):
            return original_length(config)
    return math.inf


def original_length(config: Config) -> int:
    """The length that the model was trained on before its frequencies were scaled."""
    length = config.rope_scaling.get("original_max_position_embeddings")
    return int(length or config.max_position_embeddings)


def stretch(config: Config) -> float:
    """How many times longer the reach became: `factor`, or the ratio of the two lengths."""
    given = config.rope_scaling.get("factor")
    return float(given or config.max_position_embeddings / original_length(config))


def attention_factor(config: Config) -> float:
    """What cosines and sines are multiplied with: 1 but for "yarn" and "longrope"."""
    scaling = config.rope_scaling
    computed = _ATTENTION_FACTORS.get(scaling["rope_type"], _no_attention_factor)
    return float(scaling.get("attention_factor") or computed(config))


def _no_attention_factor(config: Config) -> float:
    return 1.0


def _yarn_attention(config: Config) -> float:
    scaling, factor = config.rope_scaling, stretch(config)
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    above, below = (above, below) if above and below else (1.0, 0.0)
    growth = 0.1 * math.log(max(factor, 1.0))
    return float((growth * above + 1) / (growth * below + 1))


def _longrope_attention(config: Config) -> float:
    growth = math.log(max(stretch(config), 1.0)) / math.log(original_length(config))
    return math.sqrt(1 + growth)


_ATTENTION_FACTORS = {"yarn": _yarn_attention, "longrope": _longrope_attention}
