"""The key/value cache: what it keeps, how it grows, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import QUICK, B, T, random_tokens, tiny_model

from llama_np import KVCache, hidden_states
from llama_np.cache import FIRST_CAPACITY, NoCache
from llama_np.tap import record

CONFIG, WEIGHTS = tiny_model()
LAYERS, K, H = CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.head_dim
TIGHT = 1e-12  # three layers of float64 sums reach 2e-14 (measured)


def fresh(batch: int = B, capacity: int | None = None) -> KVCache:
    return KVCache(CONFIG, batch, capacity, np.float64)


def run(tokens: np.ndarray, cache: KVCache | None = None, **keywords: Any) -> np.ndarray:
    return hidden_states(tokens, WEIGHTS, CONFIG, cache, **keywords)


def same(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=TIGHT)


def copy(cache: KVCache) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(k.copy(), v.copy()) for k, v in cache]


def test_without_a_cache_the_store_returns_its_arguments() -> None:
    k, v = np.zeros((B, K, T, H)), np.ones((B, K, T, H))
    keys, values = NoCache().store(0)(k, v)
    assert keys is k and values is v
    np.testing.assert_array_equal(NoCache().continuation(2, 3), [[0, 1, 2], [0, 1, 2]])


def test_a_cache_holds_rotated_keys_and_plain_values() -> None:
    cache, trace = fresh(), dict[str, np.ndarray]()
    run(random_tokens(CONFIG), cache, tap=record(trace))
    assert len(cache) == LAYERS and cache.length == T and cache.batch == B
    for i, (k, v) in enumerate(cache):
        name = f"model.layers.{i}.self_attn."
        np.testing.assert_array_equal(k, trace[name + "k_rot"])
        plain = trace[name + "v_proj"].reshape(B, T, K, H).swapaxes(1, 2)
        np.testing.assert_array_equal(v, plain)
        assert k.shape == v.shape == (B, K, T, H)
        np.testing.assert_array_equal(cache[i][0], k)


def test_storing_gives_back_everything_stored_so_far() -> None:
    cache = fresh()
    rng, keys = np.random.default_rng(0), []
    for length in (3, 0, 1, 70, 2):
        keys.append(rng.normal(size=(B, K, length, H)))
        cache.extend(np.zeros((B, length), int))
        for layer in range(LAYERS):
            k, v = cache.store(layer)(keys[-1] + layer, keys[-1] - layer)
            np.testing.assert_array_equal(k, np.concatenate(keys, axis=2) + layer)
            np.testing.assert_array_equal(v, np.concatenate(keys, axis=2) - layer)


def test_a_cache_without_a_capacity_grows_by_doubling() -> None:
    cache = fresh(1)
    capacities = []
    for _ in range(5 * FIRST_CAPACITY):
        cache.extend(np.zeros((1, 1), int))
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [FIRST_CAPACITY * 2**n for n in range(4)]
    assert cache.nbytes == 2 * LAYERS * K * H * 8 * cache.capacity


def test_one_large_chunk_grows_the_cache_at_once() -> None:
    cache, tokens = fresh(1), random_tokens(CONFIG, 1, 5 * FIRST_CAPACITY)
    same(run(tokens, cache), run(tokens))
    assert cache.capacity == cache.length == 5 * FIRST_CAPACITY


def test_a_preallocated_cache_is_filled_to_the_last_slot_and_not_beyond() -> None:
    tokens = random_tokens(CONFIG)
    cache = fresh(capacity=T)
    run(tokens[:, :-1], cache)
    with pytest.raises(ValueError, match=rf"room for {T} tokens, {T + 1} are needed"):
        run(tokens[:, -2:], cache)
    # The refused chunk has left no trace.
    same(run(tokens[:, -1:], cache), run(tokens)[:, -1:])
    with pytest.raises(ValueError, match="room"):
        run(tokens[:, :1], cache)
    assert cache.length == cache.capacity == T


def test_another_number_of_rows_is_refused() -> None:
    cache = fresh()
    run(random_tokens(CONFIG), cache)
    for rows in (1, B - 1, B + 1):
        with pytest.raises(ValueError, match=f"holds {B} rows, the input has {rows}"):
            run(random_tokens(CONFIG, rows), cache)
    with pytest.raises(ValueError, match="holds 1 rows, the input has 2"):
        run(random_tokens(CONFIG, 2), KVCache(CONFIG, dtype=np.float64))


def test_another_dtype_is_refused_because_it_would_round_silently() -> None:
    with pytest.raises(ValueError, match="holds float32, the model computes in float64"):
        run(random_tokens(CONFIG), KVCache(CONFIG, B, dtype=np.float32))


# select, crop, join, from_pairs


@QUICK
@given(rows=st.lists(st.integers(0, B - 1), max_size=6))
def test_selected_rows_go_on_as_if_they_had_been_alone(rows: list[int]) -> None:
    tokens, more = random_tokens(CONFIG), random_tokens(CONFIG, len(rows), 2, seed=8)
    cache = fresh()
    run(tokens, cache)
    cache.select(np.array(rows, int))
    assert cache.batch == len(rows)
    whole = np.concatenate([tokens[rows], more], axis=1)
    same(run(more, cache), run(whole)[:, T:])


@QUICK
@given(length=st.integers(0, T + 3))
def test_a_cropped_cache_has_forgotten_the_rest(length: int) -> None:
    tokens, more = random_tokens(CONFIG), random_tokens(CONFIG, B, 2, seed=8)
    cache = fresh()
    run(tokens, cache)
    cache.crop(length)
    assert cache.length == min(length, T)
    whole = np.concatenate([tokens[:, :length], more], axis=1)
    same(run(more, cache), run(whole)[:, -2:])


def test_what_was_cropped_does_not_come_back_with_joined_or_compacted_rows() -> None:
    tokens, more = random_tokens(CONFIG, 3, 90), random_tokens(CONFIG, 3, 2, seed=8)
    short, long = fresh(2), fresh(1)
    run(tokens[:2], short)
    run(tokens[2:], long)
    short.crop(5)
    short.join(long)
    together = run(more, short)
    for i, length in enumerate([5, 5, 90]):
        same(together[i], run(np.concatenate([tokens[i, :length], more[i]])[None])[0, -2:])
    short.crop(64)
    short.select(np.array([0, 1]))
    short.compact_if_sparse()
    assert short.length == 5
    same(run(more[:2], short), run(np.hstack([tokens[:2, :5], more[:2]]))[:, -2:])


def test_cropping_to_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        fresh().crop(-1)


@QUICK
@given(above=st.integers(0, 90), below=st.integers(0, 90), rows=st.integers(0, 3))
def test_joined_rows_go_on_as_if_they_had_been_alone(above: int, below: int, rows: int) -> None:
    texts = [random_tokens(CONFIG, 2, above), random_tokens(CONFIG, rows, below, seed=3)]
    caches = [fresh(2), fresh(rows)]
    for text, cache in zip(texts, caches, strict=True):
        run(text, cache)
    caches[0].join(caches[1])
    more = random_tokens(CONFIG, 2 + rows, 2, seed=8)
    together = run(more, caches[0])
    for i, row in enumerate([*texts[0], *texts[1]]):
        same(together[i], run(np.concatenate([row, more[i]])[None])[0, -2:])


@QUICK
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4), right=st.booleans())
def test_compacting_keeps_every_row(lengths: list[int], right: bool) -> None:
    width = max(lengths) + 60
    slots = np.arange(width) - (0 if right else width - np.array(lengths)[:, None])
    positions = np.where((slots >= 0) & (slots < np.array(lengths)[:, None]), slots, -1)
    tokens, more = random_tokens(CONFIG, len(lengths), width), random_tokens(CONFIG, 4, 2)
    cache = fresh(len(lengths))
    run(tokens, cache, positions=positions)
    cache.compact_if_sparse()
    assert cache.length == (max(lengths) if 2 * max(lengths) < width >= FIRST_CAPACITY else width)
    together = run(more[: len(lengths)], cache)
    for i, position in enumerate(positions):
        alone = np.concatenate([tokens[i, position >= 0], more[i]])[None]
        same(together[i], run(alone)[0, -2:])


def test_pairs_of_one_cache_make_another() -> None:
    tokens, more = random_tokens(CONFIG), random_tokens(CONFIG, B, 2, seed=8)
    cache = fresh()
    run(tokens, cache)
    other = KVCache.from_pairs(CONFIG, list(cache))
    same(run(more, other), run(more, cache))


def test_given_pairs_are_copied_and_may_be_read_only() -> None:
    cache = fresh()
    run(random_tokens(CONFIG), cache)
    pairs = copy(cache)
    for array in (array for pair in pairs for array in pair):
        array.flags.writeable = False
    other = KVCache.from_pairs(CONFIG, tuple(pairs))
    run(random_tokens(CONFIG, B, 70, seed=3), other)
    for (k, v), (kept_k, kept_v) in zip(copy(cache), pairs, strict=True):
        np.testing.assert_array_equal(k, kept_k)
        np.testing.assert_array_equal(v, kept_v)


def test_pairs_keep_their_dtype() -> None:
    for dtype in (np.float32, np.float64):
        pairs = [(np.ones((2, K, 3, H), dtype), np.ones((2, K, 3, H), dtype))] * LAYERS
        assert KVCache.from_pairs(CONFIG, pairs).keys[0].dtype == dtype


def test_pairs_may_be_empty_texts() -> None:
    empty = [(np.ones((2, K, 0, H)), np.ones((2, K, 0, H)))] * LAYERS
    cache = KVCache.from_pairs(CONFIG, empty)
    tokens = random_tokens(CONFIG, 2)
    same(run(tokens, cache), run(tokens))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (LAYERS - 1, (B, K, T, H)),
        (LAYERS + 1, (B, K, T, H)),
        (LAYERS, (B, K + 1, T, H)),
        (LAYERS, (B, K, T, H + 1)),
        (LAYERS, (K, T, H)),
    ],
)
def test_pairs_that_do_not_fit_are_refused(layers: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected|layers"):
        KVCache.from_pairs(CONFIG, [(np.ones(shape), np.ones(shape))] * layers)


def test_pairs_of_unequal_shapes_are_refused() -> None:
    pair = (np.ones((B, K, T, H)), np.ones((B, K, T, H)))
    for other in [(pair[0], pair[1][:, :, 1:]), (pair[0][1:], pair[1][1:])]:
        with pytest.raises(ValueError, match="expected"):
            KVCache.from_pairs(CONFIG, [pair, other, pair])


# What it leaves alone


def test_recorded_arrays_do_not_change_while_decoding_goes_on() -> None:
    """Also not when the cache grows, is cropped and written again, or compacted."""
    cache = fresh()
    traces: list[dict[str, np.ndarray]] = [{}, {}]
    for trace, length in zip(traces, (10, 3), strict=True):
        run(random_tokens(CONFIG, length=length), cache, tap=record(trace))
    before = [{name: array.copy() for name, array in trace.items()} for trace in traces]
    run(random_tokens(CONFIG, length=FIRST_CAPACITY, seed=3), cache)
    cache.crop(4)
    run(random_tokens(CONFIG, length=9, seed=4), cache)
    cache.compact_if_sparse()
    for trace, copies in zip(traces, before, strict=True):
        for name, array in trace.items():
            np.testing.assert_array_equal(array, copies[name])


def test_two_caches_do_not_know_of_each_other() -> None:
    tokens = random_tokens(CONFIG)
    first, second = fresh(), fresh()
    run(tokens, first)
    kept = copy(first)
    run(random_tokens(CONFIG, seed=9), second)
    for (k, v), (kept_k, kept_v) in zip(first, kept, strict=True):
        np.testing.assert_array_equal(k, kept_k)
        np.testing.assert_array_equal(v, kept_v)


def test_keys_and_values_of_all_layers_lie_in_one_block_of_memory() -> None:
    cache = KVCache(CONFIG, 2)
    other = KVCache(CONFIG, 1)
    changes: list[Callable[[], None]] = [
        lambda: cache.crop(0),
        lambda: cache.select(np.array([1, 0])),
        lambda: cache.join(other),
        lambda: cache._reallocate(200, 0),
    ]
    for change in changes:
        change()
        assert cache.pairs.flags.c_contiguous
        assert all(np.shares_memory(a, cache.pairs) for a in [*cache.keys, *cache.values])
        assert cache.nbytes == sum(a.nbytes for a in [*cache.keys, *cache.values])
