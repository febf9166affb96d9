"""The whole model against a slow second implementation, its edges, and what it leaves alone.

Tolerance in float64: three layers of sums over some dozen terms reach 2e-14 (measured).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import (
    QUICK,
    SCALINGS,
    B,
    T,
    at_rest_in_bf16,
    every_array,
    map_weights,
    random_tokens,
    random_weights,
    read_only,
    tiny_config,
    tiny_model,
)
from slow_llama import slow_hidden_states, slow_logits

from llama_np import KVCache, classify, hidden_states, logits
from llama_np.model import transform
from llama_np.precision import is_bf16, widen_bf16
from llama_np.tap import record

TIGHT = 1e-12
CONFIG, WEIGHTS = tiny_model()
V = CONFIG.vocab_size


def run(tokens: Any, weights: Any = WEIGHTS, config: Any = CONFIG, **keywords: Any) -> np.ndarray:
    return logits(hidden_states(tokens, weights, config, **keywords), weights)


def same(a: Any, b: Any, tolerance: float = TIGHT) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


# Against the slow loops


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("length", [1, 7, 17, 40])
def test_logits_equal_the_slow_loops(kind: str, length: int) -> None:
    """17 lies beyond the length before scaling, 40 beyond the trained length."""
    config = tiny_config(rope_scaling=SCALINGS[kind])
    tokens = random_tokens(config, 1, length)
    same(run(tokens, config=config)[0], slow_logits(tokens[0].tolist(), WEIGHTS, config))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None},
        {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2},
        {"attention_bias": False},
        {"mlp_bias": False},
        {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True},
        {"rms_norm_eps": 0.5},
        {"rope_theta": 1e6},
        {"num_hidden_layers": 1},
        {"vocab_size": 1},
    ],
    ids=str,
)
def test_every_architecture_equals_the_slow_loops(changes: dict[str, Any]) -> None:
    config, weights = tiny_model(seed=3, **changes)
    tokens = random_tokens(config, 2)
    for row, result in zip(tokens.tolist(), run(tokens, weights, config), strict=True):
        same(result, slow_logits(row, weights, config))


@QUICK
@given(seed=st.integers(0, 10**6), tokens=st.lists(st.integers(0, V - 1), min_size=1, max_size=9))
def test_random_weights_equal_the_slow_loops(seed: int, tokens: list[int]) -> None:
    weights = random_weights(CONFIG, seed)
    same(
        hidden_states(np.array([tokens]), weights, CONFIG)[0],
        slow_hidden_states(tokens, weights, CONFIG),
    )


def test_float32_equals_the_slow_loops_to_its_precision() -> None:
    """Tolerance: float32 rounds to 6e-8; sums and sharp attention make that 20 times larger."""
    tokens = random_tokens(CONFIG, 2)
    for row, result in zip(
        tokens.tolist(), run(tokens, random_weights(CONFIG, 0, np.float32)), strict=True
    ):
        slow = slow_logits(row, WEIGHTS, CONFIG)
        assert np.linalg.norm(result - slow) <= 2e-6 * np.linalg.norm(slow)


# Weights


def test_bfloat16_at_rest_equals_the_widened_weights() -> None:
    """Tolerance: both runs compute in float32, in another order of summation."""
    resting = at_rest_in_bf16(WEIGHTS)
    widened = map_weights(lambda a: widen_bf16(a) if is_bf16(a) else a, resting)
    tokens = random_tokens(CONFIG)
    a, b = run(tokens, resting), run(tokens, widened)
    assert a.dtype == b.dtype == np.float32
    assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


def test_a_tied_head_is_the_embedding() -> None:
    _, weights = tiny_model(tie_word_embeddings=True)
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    hidden = hidden_states(random_tokens(CONFIG), weights, CONFIG)
    same(logits(hidden, weights), hidden @ weights["model.embed_tokens.weight"].T)


def test_read_only_inputs_are_taken_and_nothing_is_changed() -> None:
    weights, tokens = read_only(WEIGHTS), random_tokens(CONFIG)
    positions, visible = np.arange(T)[None].repeat(B, axis=0), np.ones((B, 1, T, T), bool)
    for array in (tokens, positions, visible):
        array.flags.writeable = False
    before = [array.copy() for array in every_array(weights)]
    cache = KVCache(CONFIG, B, dtype=np.float64)
    run(tokens, weights, cache=cache, positions=positions)
    run(tokens, weights, positions=positions, visible=visible)
    classify(tokens, weights, CONFIG, positions)
    for old, new in zip(before, every_array(weights), strict=True):
        np.testing.assert_array_equal(old, new)


def test_writable_inputs_are_not_written_to() -> None:
    weights = map_weights(np.copy, WEIGHTS)
    embedded = WEIGHTS["model.embed_tokens.weight"][random_tokens(CONFIG)]
    arrays = [embedded, *every_array(weights)]
    before = [array.copy() for array in arrays]
    logits(transform(embedded, weights, CONFIG, KVCache(CONFIG, B, dtype=np.float64)), weights)
    for old, new in zip(before, arrays, strict=True):
        np.testing.assert_array_equal(old, new)


def test_four_threads_share_one_model() -> None:
    batches = [random_tokens(CONFIG, seed=seed) for seed in range(24)]
    weights = read_only(WEIGHTS)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda tokens: run(tokens, weights), batches))
    for tokens, result in zip(batches, together, strict=True):
        np.testing.assert_array_equal(result, run(tokens, weights))


# Visibility and positions


def test_the_default_visibility_is_causal() -> None:
    tokens = random_tokens(CONFIG)
    causal = np.tril(np.ones((T, T), bool))[None, None]
    np.testing.assert_array_equal(run(tokens), run(tokens, visible=causal))


def test_a_given_visibility_decides_alone() -> None:
    """Two texts packed into one row: each sees only itself and restarts at position 0."""
    first, second = random_tokens(CONFIG, 1, 4), random_tokens(CONFIG, 1, 5, seed=9)
    document = np.array([0] * 4 + [1] * 5)
    visible = np.tril(document[:, None] == document)[None, None]
    positions = np.array([*range(4), *range(5)])
    packed = run(np.hstack([first, second]), positions=positions, visible=visible)
    same(packed, np.hstack([run(first), run(second)]))


def test_without_a_causal_part_every_token_sees_the_future() -> None:
    tokens = random_tokens(CONFIG, 1)
    changed = tokens.copy()
    changed[0, -1] = (changed[0, -1] + 1) % V
    everyone = np.ones((1, 1, T, T), bool)
    difference = run(tokens, visible=everyone) != run(changed, visible=everyone)
    assert difference.any(axis=-1).all()


def test_rows_that_see_nothing_stay_finite() -> None:
    tokens = random_tokens(CONFIG)
    positions = np.full((B, T), -1)
    positions[1:, 2:] = np.arange(T - 2)
    result = run(tokens, positions=positions)
    assert np.isfinite(result).all()
    same(result[1:, 2:], run(tokens[1:, 2:]))


def test_positions_may_come_in_any_integer_type() -> None:
    tokens = random_tokens(CONFIG)
    for dtype in (np.uint8, np.int16, np.int32, np.uint64):
        np.testing.assert_array_equal(run(tokens, positions=np.arange(T, dtype=dtype)), run(tokens))


def test_positions_beyond_the_trained_length_are_computed() -> None:
    far = run(random_tokens(CONFIG), positions=np.arange(T) + 10**6)
    assert np.isfinite(far).all()


# Edges


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (0, 0), (3, 0)])
@pytest.mark.parametrize("kind", SCALINGS)
def test_empty_texts_and_empty_batches_give_empty_logits(shape: tuple[int, int], kind: str) -> None:
    config = tiny_config(rope_scaling=SCALINGS[kind])
    assert run(np.zeros(shape, int), config=config).shape == (*shape, V)
    cache = KVCache(config, shape[0], dtype=np.float64)
    run(np.zeros((shape[0], 2), int), config=config, cache=cache)
    assert run(np.zeros(shape, int), config=config, cache=cache).shape == (*shape, V)


def test_an_empty_list_is_an_empty_text() -> None:
    assert run([[]]).shape == (1, 0, V)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_ids_may_come_in_any_integer_type(dtype: Any) -> None:
    tokens = random_tokens(CONFIG)
    np.testing.assert_array_equal(run(tokens.astype(dtype)), run(tokens))
    np.testing.assert_array_equal(run(tokens.tolist()), run(tokens))


@pytest.mark.parametrize("wrong", [-1, V, V + 10, -V, 2**40, 2**63])
@pytest.mark.parametrize("call", [hidden_states, classify])
def test_an_id_outside_the_vocabulary_is_an_index_error_that_names_it(
    call: Any, wrong: int
) -> None:
    tokens = np.array([[0, 1], [1, wrong]], np.uint64 if wrong == 2**63 else np.int64)
    with pytest.raises(IndexError, match=rf"token id {wrong} .* {V}\b"):
        call(tokens, WEIGHTS, CONFIG)


@pytest.mark.parametrize(
    "wrong", [[[1.0, 2.0]], [[True, False]], [["a", "b"]], [[None]], [[1, None]]], ids=str
)
@pytest.mark.parametrize("call", [hidden_states, classify])
def test_ids_that_are_not_integers_are_a_type_error(call: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected integers"):
        call(wrong, WEIGHTS, CONFIG)


@pytest.mark.parametrize("wrong", [5, [1, 2], [[[1]]], [[1, 2], [3]]], ids=str)
@pytest.mark.parametrize("call", [hidden_states, classify])
def test_ids_that_are_not_a_matrix_are_a_value_error(call: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="shape"):
        call(wrong, WEIGHTS, CONFIG)


@pytest.mark.parametrize("wrong", [np.arange(T) / 2, np.ones(T, bool)], ids=["float", "bool"])
def test_positions_that_are_not_integers_are_a_type_error(wrong: np.ndarray) -> None:
    with pytest.raises(TypeError, match="positions"):
        run(random_tokens(CONFIG), positions=wrong)


def test_positions_of_another_shape_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="shape"):
        run(random_tokens(CONFIG), positions=np.arange(T + 1))


# Classification


def test_classify_reads_the_last_token_of_every_row() -> None:
    tokens = random_tokens(CONFIG)
    hidden = hidden_states(tokens, WEIGHTS, CONFIG)
    same(classify(tokens, WEIGHTS, CONFIG), hidden[:, -1] @ WEIGHTS["score.weight"].T)


@QUICK
@given(lengths=st.lists(st.integers(1, T), min_size=1, max_size=4), left=st.booleans())
def test_classify_is_blind_to_padding(lengths: list[int], left: bool) -> None:
    tokens = random_tokens(CONFIG, len(lengths))
    slots = np.arange(T) - (T - np.array(lengths)[:, None]) * left
    positions = np.where((slots >= 0) & (slots < np.array(lengths)[:, None]), slots, -1)
    together = classify(tokens, WEIGHTS, CONFIG, positions)
    for row, position, scores in zip(tokens, positions, together, strict=True):
        same(scores, classify(row[None, position >= 0], WEIGHTS, CONFIG)[0])


def test_a_classifier_needs_no_language_head() -> None:
    headless = {name: value for name, value in WEIGHTS.items() if name != "lm_head.weight"}
    assert classify(random_tokens(CONFIG), headless, CONFIG).shape == (B, CONFIG.num_labels)


# Names


def test_the_trace_has_the_names_of_hugging_face_modules() -> None:
    trace: dict[str, np.ndarray] = {}
    hidden = hidden_states(random_tokens(CONFIG), WEIGHTS, CONFIG, tap=record(trace))
    logits(hidden, WEIGHTS, record(trace))
    attention = ["q_proj", "k_proj", "v_proj", "q_rot", "k_rot"]
    attention += ["scores", "weights", "context", "o_proj"]
    mlp = ["gate_proj", "act_fn", "up_proj", "hidden", "down_proj"]
    inside = {"input_layernorm", "self_attn", "middle", "post_attention_layernorm", "mlp"}
    inside |= {f"self_attn.{name}" for name in attention} | {f"mlp.{name}" for name in mlp}
    outside = "model.embed_tokens model.rotary_emb.cos model.rotary_emb.sin model.norm lm_head"
    layers = [f"model.layers.{i}" for i in range(CONFIG.num_hidden_layers)]
    expected = {*outside.split(), *layers, *(f"{a}.{b}" for a in layers for b in inside)}
    assert trace.keys() == expected
    classify(random_tokens(CONFIG), WEIGHTS, CONFIG, tap=record(trace))
    assert trace.keys() == expected | {"score"}


# What is refused


def test_a_mask_to_be_added_is_refused() -> None:
    tokens = random_tokens(CONFIG, 2)
    B, T = tokens.shape
    seen = np.tri(T, dtype=bool)[None, None]
    expected = hidden_states(tokens, WEIGHTS, CONFIG)
    same(hidden_states(tokens, WEIGHTS, CONFIG, visible=seen), expected)
    with pytest.raises(TypeError, match="expected bool: True where a query sees a key"):
        hidden_states(tokens, WEIGHTS, CONFIG, visible=np.where(seen, 0.0, -np.inf))
    for wrong in (seen[0], seen[..., :-1], np.repeat(seen, B + 1, axis=0)):
        with pytest.raises(ValueError, match=r"visible has shape .*expected \(2, 1, "):
            hidden_states(tokens, WEIGHTS, CONFIG, visible=wrong)


def test_one_position_does_not_stand_for_all_tokens() -> None:
    tokens = random_tokens(CONFIG, 2)
    for wrong in (np.array(3), np.array([3]), np.array([[3], [4]])):
        with pytest.raises(ValueError, match=r"positions have shape .*, expected \(B, T\) = \(2, "):
            hidden_states(tokens, WEIGHTS, CONFIG, positions=wrong)


def test_float16_weights_are_refused() -> None:
    half = random_weights(CONFIG, 0, np.float16)
    with pytest.raises(TypeError, match=r"the embedding is float16, .* \.astype\(np\.float32\)"):
        hidden_states(random_tokens(CONFIG, 1), half, CONFIG)


@pytest.mark.parametrize("problem", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["model.layers.0", "model.layers.1", "model.norm"])
def test_a_pass_that_fails_leaves_the_cache_as_it_was(
    problem: type[BaseException], name: str
) -> None:
    tokens = random_tokens(CONFIG, 2)
    cache = KVCache(CONFIG, len(tokens), dtype=np.float64)
    hidden_states(tokens[:, :2], WEIGHTS, CONFIG, cache)

    def broken(place: str, array: np.ndarray) -> np.ndarray:
        if place == name:
            raise problem
        return array

    with pytest.raises(problem):
        hidden_states(tokens[:, 2:], WEIGHTS, CONFIG, cache, tap=broken)
    assert cache.length == 2
    expected = hidden_states(tokens, WEIGHTS, CONFIG)[:, 2:]
    same(hidden_states(tokens[:, 2:], WEIGHTS, CONFIG, cache), expected)


def test_a_text_without_tokens_has_no_class() -> None:
    with pytest.raises(ValueError, match="no class"):
        classify(np.zeros((2, 0), np.int64), WEIGHTS, CONFIG)
