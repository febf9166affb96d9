"""Every layer of LLaMA as a function of arrays.

Axes: B batch, T new tokens, S tokens attended to, D model width, F MLP width, V vocabulary,
N query heads, K key/value heads, G = N/K, H head width. `w` holds one decoder layer's weights
under the checkpoint's own names; `tap` looks at every array that has a name (see tap.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from llama_np.activations import ACTIVATIONS
from llama_np.cache import Store
from llama_np.config import Config
from llama_np.linear import linear, matmul
from llama_np.precision import widen
from llama_np.query_blocks import in_query_blocks
from llama_np.tap import NO_TAP, Tap

Weights = Mapping[str, np.ndarray]


def embed(tokens: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look up one row per token: (B, T), (V, D) -> (B, T, D)."""
    return widen(table[tokens])  # (B, T, D)


def project(module: str, x: np.ndarray, w: Weights, tap: Tap = NO_TAP) -> np.ndarray:
    """Apply the linear module of that name, with its bias if it has one."""
    return tap(module, linear(x, w[module + ".weight"], w.get(module + ".bias")))


def rms_norm(module: str, x: np.ndarray, w: Weights, eps: float, tap: Tap = NO_TAP) -> np.ndarray:
    """Scale every token to root mean square 1, then by the weight (arXiv:1910.07467)."""
    mean_square = np.vecdot(x, x)[..., None] / x.shape[-1]  # (B, T, 1)
    normalized = x / np.sqrt(mean_square + eps)  # (B, T, D)
    return tap(module, normalized * w[module + ".weight"])  # (B, T, D)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis; subtracting the maximum prevents overflow."""
    e = x - x.max(axis=-1, keepdims=True, initial=-math.inf)  # (..., S)
    np.exp(e, out=e)
    e /= e.sum(axis=-1, keepdims=True)
    return e


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn channel pair (j, j + H/2) of every head by its position's angle (RoPE)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]  # (..., H/2) x2
    turned = np.concatenate([-second, first], axis=-1)  # (..., H)
    return x * cos + turned * sin


def split_heads(x: np.ndarray, H: int) -> np.ndarray:
    """(B, T, heads*H) -> (B, heads, T, H)."""
    B, T, width = x.shape
    return x.reshape(B, T, width // H, H).swapaxes(1, 2)


def merge_heads(x: np.ndarray) -> np.ndarray:
    """(B, N, T, H) -> (B, T, N*H)."""
    B, N, T, H = x.shape
    return x.swapaxes(1, 2).reshape(B, T, N * H)  # (B, T, N*H)


@in_query_blocks
def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, tap: Tap = NO_TAP
) -> np.ndarray:
    """Scaled dot-product attention; each key/value head serves G consecutive query heads.

    q (B, N, T, H); k, v (B, K, S, H); visible (B, 1, T, S) -> (B, T, N*H). Source:
    arXiv:1706.03762, equation 1; grouping: arXiv:2305.13245.
    """
    B, N, T, H = q.shape
    K, S = k.shape[1:3]
    G = N // K
    grouped = (q / math.sqrt(H)).reshape(B, K, G * T, H)  # (B, K, G*T, H)
    dots = matmul(grouped, k.swapaxes(2, 3))  # (B, K, G*T, S)
    scores = tap("self_attn.scores", dots.reshape(B, N, T, S))  # (B, N, T, S)
    # The smallest number instead of -inf: rows that see nothing (padding) stay finite. Taking the
    # lower of a score and its ceiling is a ninth of the work of a selection over all heads.
    lowest, highest = np.finfo(scores.dtype).min, scores.dtype.type(np.inf)
    ceiling = np.where(visible, highest, lowest)  # (B, 1, T, S)
    masked = np.fmin(scores, ceiling)  # (B, N, T, S)
    weights = tap("self_attn.weights", softmax(masked))  # (B, N, T, S)
    mixed = matmul(weights.reshape(B, K, G * T, S), v)  # (B, K, G*T, H)
    return tap("self_attn.context", merge_heads(mixed.reshape(B, N, T, H)))  # (B, T, N*H)


def self_attention(
    x: np.ndarray,
    w: Weights,
    rope: tuple[np.ndarray, np.ndarray],
    visible: np.ndarray,
    config: Config,
    store: Store,
    tap: Tap = NO_TAP,
) -> np.ndarray:
    """Let every token read from the tokens that it sees."""
    H = config.head_dim
    q = split_heads(project("self_attn.q_proj", x, w, tap), H)  # (B, N, T, H)
    k = split_heads(project("self_attn.k_proj", x, w, tap), H)  # (B, K, T, H)
    v = split_heads(project("self_attn.v_proj", x, w, tap), H)  # (B, K, T, H)
    q_rot = tap("self_attn.q_rot", rotate(q, *rope))  # (B, N, T, H)
    k_rot = tap("self_attn.k_rot", rotate(k, *rope))  # (B, K, T, H)
    keys, values = store(k_rot, v)  # (B, K, S, H) x2
    context = attend(q_rot, keys, values, visible, tap)  # (B, T, N*H)
    return tap("self_attn", project("self_attn.o_proj", context, w, tap))  # (B, T, D)


def mlp(x: np.ndarray, w: Weights, config: Config, tap: Tap = NO_TAP) -> np.ndarray:
    """down(act(gate(x)) * up(x)), which with SiLU is SwiGLU (arXiv:2002.05202)."""
    gate = project("mlp.gate_proj", x, w, tap)  # (B, T, F)
    activated = tap("mlp.act_fn", ACTIVATIONS[config.hidden_act](gate))  # (B, T, F)
    up = project("mlp.up_proj", x, w, tap)  # (B, T, F)
    hidden = tap("mlp.hidden", activated * up)  # (B, T, F)
    return tap("mlp", project("mlp.down_proj", hidden, w, tap))  # (B, T, D)


def decoder_layer(
    x: np.ndarray,
    w: Weights,
    rope: tuple[np.ndarray, np.ndarray],
    visible: np.ndarray,
    config: Config,
    store: Store,
    tap: Tap = NO_TAP,
) -> np.ndarray:
    """Attention, then MLP; each reads the normalized stream and adds to it."""
    eps = config.rms_norm_eps
    attention_input = rms_norm("input_layernorm", x, w, eps, tap)  # (B, T, D)
    attention = self_attention(attention_input, w, rope, visible, config, store, tap)  # (B, T, D)
    middle = tap("middle", x + attention)  # (B, T, D)
    mlp_input = rms_norm("post_attention_layernorm", middle, w, eps, tap)  # (B, T, D)
    return middle + mlp(mlp_input, w, config, tap)  # (B, T, D)
