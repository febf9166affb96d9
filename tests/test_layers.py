"""Facts about single layers.

Tolerance of float64 comparisons: 1e-13, a thousand roundings of a number near 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import QUICK, B, T, tiny_model
from slow_llama import slow_mlp, slow_norm, slow_softmax

from llama_np import rope
from llama_np.cache import NoCache
from llama_np.layers import (
    attend,
    decoder_layer,
    embed,
    merge_heads,
    mlp,
    project,
    rms_norm,
    rotate,
    self_attention,
    softmax,
    split_heads,
)
from llama_np.linear import linear
from llama_np.model import causal
from llama_np.precision import to_bf16, widen_bf16
from llama_np.tap import record

CONFIG, WEIGHTS = tiny_model()
LAYER = WEIGHTS["model.layers.1"]
D, F, H = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.head_dim
N, K = CONFIG.num_attention_heads, CONFIG.num_key_value_heads
G = N // K
keep = NoCache().store(0)


def normal(*shape: int, seed: int = 5, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape)


def same(a: np.ndarray, b: Any, tolerance: float = 1e-13) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def tables(positions: Any, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    positions = np.broadcast_to(positions, (B, np.shape(positions)[-1]))
    return rope.tables(positions, np.ones((1, 1)), CONFIG, np.dtype(dtype))


def everyone(T: int, S: int) -> np.ndarray:
    return np.ones((1, 1, T, S), bool)


# embed, project, linear


def test_embed_looks_up_rows() -> None:
    table = normal(41, D)
    tokens = np.array([[3, 0, 40], [7, 7, 1]])
    np.testing.assert_array_equal(embed(tokens, table)[1, 2], table[1])
    assert embed(tokens, table).shape == (2, 3, D)


def test_embed_widens_bfloat16_rows_exactly() -> None:
    bits = to_bf16(normal(41, D))
    tokens = np.array([[3, 0, 40]])
    np.testing.assert_array_equal(embed(tokens, bits), widen_bf16(bits)[tokens])


@pytest.mark.parametrize("shape", [(D,), (T, D), (B, T, D), (B, 0, D), (0, T, D)])
def test_linear_is_the_product_with_the_transposed_weight(shape: tuple[int, ...]) -> None:
    x, weight, bias = normal(*shape), normal(F, D), normal(F)
    same(linear(x, weight, bias), np.einsum("...i,oi->...o", x, weight) + bias)


def test_linear_takes_any_memory_layout() -> None:
    x, weight = normal(B, D, T).swapaxes(1, 2), np.asfortranarray(normal(F, D))
    same(linear(x, weight), linear(x.copy(), weight.copy()))
    same(linear(x[:, ::2], weight[::-1]), linear(x, weight)[:, ::2, ::-1])


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bfloat16_weights_give_the_product_of_their_values(rows: int, dtype: Any) -> None:
    """Tolerance: 20 float32 products of numbers near 1, each rounded to 6e-8."""
    x, bits = normal(B, T, D).astype(dtype), to_bf16(normal(rows, D))
    product = linear(x, bits)
    assert product.dtype == dtype
    same(product, linear(x, widen_bf16(bits).astype(dtype)), 2e-6)


def test_project_adds_the_bias_that_the_weights_have() -> None:
    x = normal(B, T, D)
    without = {"up.weight": LAYER["mlp.up_proj.weight"]}
    biased = without | {"up.bias": LAYER["mlp.up_proj.bias"]}
    same(project("up", x, biased), project("up", x, without) + biased["up.bias"])


# rms_norm


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return rms_norm("norm", x, {"norm.weight": weight}, eps)


@QUICK
@given(scale=st.floats(1e-3, 1e6), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 99))
def test_rms_norm_is_scale_free_up_to_eps(scale: float, sign: int, seed: int) -> None:
    x, weight = normal(B, T, D, seed=seed), normal(D)
    same(norm(sign * scale * x, weight, 1e-300), sign * norm(x, weight, 1e-300))


def test_rms_norm_makes_the_root_mean_square_1() -> None:
    y = norm(normal(B, T, D, scale=30), np.ones(D), 1e-300)
    same(np.sqrt((y**2).mean(axis=-1)), np.ones((B, T)))


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.3])
def test_rms_norm_adds_eps_under_the_root(eps: float) -> None:
    x, weight = normal(D, scale=1e-3), normal(D)
    same(norm(x[None, None], weight, eps)[0, 0], slow_norm(x.tolist(), weight, eps))


def test_rms_norm_of_zeros_is_zero() -> None:
    np.testing.assert_array_equal(norm(np.zeros((1, 2, D)), normal(D), 1e-6), 0)


def test_rms_norm_does_not_subtract_the_mean() -> None:
    x = np.full((1, 1, D), 7.0)
    same(norm(x, np.ones(D), 1e-300), np.ones((1, 1, D)))


# softmax


@QUICK
@given(st.lists(st.floats(-1000, 1000), min_size=1, max_size=9))
def test_softmax_equals_the_formula_written_out(scores: list[float]) -> None:
    same(softmax(np.array(scores)), slow_softmax(scores))


@QUICK
@given(shift=st.floats(-1e4, 1e4))
def test_softmax_does_not_notice_a_shift(shift: float) -> None:
    """Tolerance: adding 1e4 rounds every score to 1e-12."""
    x = normal(B, 9, scale=5)
    same(softmax(x + shift), softmax(x), 1e-11)


def test_softmax_rows_sum_to_1_and_never_overflow() -> None:
    x = np.array([[1e308, -1e308, 0.0], [-1e308, -1e308, -1e308]])
    with np.errstate(all="raise", under="ignore"):
        y = softmax(x / 2)
    same(y, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])


def test_softmax_of_nothing_is_nothing() -> None:
    assert softmax(np.zeros((2, 3, 0))).shape == (2, 3, 0)


# rotate, split_heads, merge_heads


@QUICK
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_rotated_products_depend_on_the_distance_only(a: int, b: int, shift: int) -> None:
    """Tolerance: the angle 1000 is known to 1e-13, products of 6 channels sum to about 10."""
    q, k = normal(B, N, 1, H), normal(B, N, 1, H, seed=6)

    def product(at_q: int, at_k: int) -> np.ndarray:
        return (rotate(q, *tables([at_q])) * rotate(k, *tables([at_k]))).sum(axis=-1)

    same(product(a, b), product(a + shift, b + shift), 1e-11)


def test_position_0_is_not_rotated() -> None:
    x = normal(B, N, 1, H)
    np.testing.assert_array_equal(rotate(x, *tables([0])), x)


def test_rotating_keeps_the_length_of_every_pair() -> None:
    x = normal(B, N, T, H)
    y = rotate(x, *tables(np.arange(T)))
    a, b = (np.hypot(z[..., : H // 2], z[..., H // 2 :]) for z in (x, y))
    same(a, b)


def test_rotating_forth_and_back_is_nothing() -> None:
    x, positions = normal(B, N, T, H), np.arange(T)
    same(rotate(rotate(x, *tables(positions)), *tables(-positions)), x)


def test_heads_are_consecutive_channels() -> None:
    x = normal(B, T, N * H)
    np.testing.assert_array_equal(split_heads(x, H)[1, 2, 3], x[1, 3, 2 * H : 3 * H])
    np.testing.assert_array_equal(merge_heads(split_heads(x, H)), x)


# attend


def qkv(S: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return normal(B, N, T, H, scale=2), normal(B, K, S, H, seed=6), normal(B, K, S, H, seed=7)


def test_attend_equals_the_formula_with_einsum() -> None:
    q, k, v = qkv()
    visible = np.random.default_rng(8).random((B, 1, T, 9)) < 0.5
    visible[..., 0] = True
    wide_k, wide_v = k.repeat(G, axis=1), v.repeat(G, axis=1)
    scores = np.einsum("bnth,bnsh->bnts", q, wide_k) / math.sqrt(H)
    weights = np.exp(scores) * visible
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bnts,bnsh->btnh", weights, wide_v).reshape(B, T, N * H)
    same(attend(q, k, v, visible), expected)


def test_grouped_queries_equal_repeated_keys() -> None:
    q, k, v = qkv()
    visible = causal(np.arange(2, 2 + T)[None], np.arange(9)[None])
    repeated = attend(q, k.repeat(G, axis=1), v.repeat(G, axis=1), visible)
    same(attend(q, k, v, visible), repeated)


def test_one_key_head_serves_every_query_head() -> None:
    q, k, v = qkv()
    one = attend(q, k[:, :1], v[:, :1], everyone(T, 9))
    for n in range(N):
        alone = attend(q[:, [n]], k[:, :1], v[:, :1], everyone(T, 9))
        same(one[..., n * H : (n + 1) * H], alone)


def test_as_many_key_heads_as_query_heads_is_multi_head_attention() -> None:
    q, k, v = normal(B, N, T, H), normal(B, N, 9, H, seed=6), normal(B, N, 9, H, seed=7)
    together = attend(q, k, v, everyone(T, 9))
    for n in range(N):
        alone = attend(q[:, [n]], k[:, [n]], v[:, [n]], everyone(T, 9))
        same(together[..., n * H : (n + 1) * H], alone)


def test_a_token_that_sees_one_key_copies_its_value() -> None:
    q, k, v = qkv()
    only = np.zeros((B, 1, T, 9), bool)
    only[..., 4] = True
    copied = v[:, None, :, 4].repeat(G, axis=2).reshape(B, 1, N * H)
    same(attend(q, k, v, only), copied.repeat(T, axis=1))


def test_a_row_that_sees_nothing_is_the_mean_of_all_values() -> None:
    """As in transformers' eager attention: all scores are equal, so the weights are uniform."""
    q, k, v = qkv()
    nothing = np.zeros((B, 1, T, 9), bool)
    trace: dict[str, np.ndarray] = {}
    mixed = attend(q, k, v, nothing, record(trace))
    same(trace["self_attn.weights"], np.full((B, N, T, 9), 1 / 9))
    same(mixed[:, 0, :H], v[:, 0].mean(axis=1))


def test_hidden_keys_weigh_exactly_nothing() -> None:
    q, k, v = qkv()
    visible = np.ones((B, 1, T, 9), bool)
    visible[..., 5:] = False
    clean = attend(q, k, v, visible)
    k[:, :, 5:], v[:, :, 5:] = 1e30, -1e30
    np.testing.assert_array_equal(attend(q, k, v, visible), clean)


def test_hidden_keys_weigh_nothing_however_low_the_visible_scores_are() -> None:
    """A mask that adds -10000 would let them through."""
    q, k, v = qkv()
    visible = np.ones((B, 1, T, 9), bool)
    visible[..., 5:] = False
    far = attend(1e9 * q, k, v, visible)
    same(far, attend(1e9 * q, k[:, :, :5], v[:, :, :5], visible[..., :5]))


def test_recorded_scores_are_scaled_and_not_yet_masked() -> None:
    """Masked scores would hide a missing mask, and would become -inf when rounded to bfloat16."""
    q, k, v = qkv()
    trace: dict[str, np.ndarray] = {}
    attend(q, k, v, np.zeros((B, 1, T, 9), bool), record(trace))
    expected = np.einsum("bnth,bnsh->bnts", q, k.repeat(G, axis=1)) / math.sqrt(H)
    same(trace["self_attn.scores"], expected)


def test_the_order_of_the_keys_does_not_matter() -> None:
    q, k, v = qkv()
    order = np.random.default_rng(3).permutation(9)
    visible = causal(np.arange(2, 2 + T)[None], np.arange(9)[None])
    shuffled = attend(q, k[:, :, order], v[:, :, order], visible[..., order])
    same(shuffled, attend(q, k, v, visible))


@pytest.mark.parametrize(("rows", "length", "keys"), [(0, T, 9), (B, 0, 9), (B, 0, 0)])
def test_attend_takes_empty_batches_and_empty_texts(rows: int, length: int, keys: int) -> None:
    q, kv = np.zeros((rows, N, length, H)), np.zeros((rows, K, keys, H))
    visible = np.ones((rows, 1, length, keys), bool)
    assert attend(q, kv, kv, visible).shape == (rows, length, N * H)


# mlp, self_attention, decoder_layer


def test_mlp_equals_the_formula_number_by_number() -> None:
    x = normal(2, 3, D)
    for row, result in zip(x.reshape(-1, D), mlp(x, LAYER, CONFIG).reshape(-1, D), strict=True):
        same(result, slow_mlp(row.tolist(), LAYER))


def test_gate_and_up_play_different_roles() -> None:
    swapped = dict(LAYER)
    for kind in ("weight", "bias"):
        swapped[f"mlp.gate_proj.{kind}"] = LAYER[f"mlp.up_proj.{kind}"]
        swapped[f"mlp.up_proj.{kind}"] = LAYER[f"mlp.gate_proj.{kind}"]
    x = normal(B, T, D)
    assert np.abs(mlp(x, swapped, CONFIG) - mlp(x, LAYER, CONFIG)).max() > 0.1


def layer(x: np.ndarray, w: Any) -> np.ndarray:
    positions = np.broadcast_to(np.arange(T), (B, T))
    return decoder_layer(x, w, tables(np.arange(T)), causal(positions, positions), CONFIG, keep)


def test_a_layer_with_zero_outputs_is_the_identity() -> None:
    silent = {
        name: array * 0 if "o_proj" in name or "down_proj" in name else array
        for name, array in LAYER.items()
    }
    x = normal(B, T, D)
    np.testing.assert_array_equal(layer(x, silent), x)


def test_a_layer_adds_attention_of_the_norm_then_mlp_of_the_norm() -> None:
    x, eps = normal(B, T, D), CONFIG.rms_norm_eps
    positions = np.broadcast_to(np.arange(T), (B, T))
    visible, turns = causal(positions, positions), tables(np.arange(T))
    read = rms_norm("input_layernorm", x, LAYER, eps)
    middle = x + self_attention(read, LAYER, turns, visible, CONFIG, keep)
    read = rms_norm("post_attention_layernorm", middle, LAYER, eps)
    same(layer(x, LAYER), middle + mlp(read, LAYER, CONFIG))


def test_self_attention_hands_rotated_keys_and_plain_values_to_the_store() -> None:
    x, turns = normal(B, T, D), tables(np.arange(T))
    seen: list[np.ndarray] = []

    def store(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.extend([k, v])
        return k, v

    self_attention(x, LAYER, turns, everyone(T, T), CONFIG, store)
    plain = {m: split_heads(project(f"self_attn.{m}_proj", x, LAYER), H) for m in "kv"}
    np.testing.assert_array_equal(seen[0], rotate(plain["k"], *turns))
    np.testing.assert_array_equal(seen[1], plain["v"])
    assert seen[0].shape == (B, K, T, H)
