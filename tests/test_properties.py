"""Facts about the whole model that hold for every text, cut, batch and padding.

Tolerance: in float64 a sum's rounding is about 1e-16 of its terms. Three layers of sums over
some dozen terms reach 1e-14 (measured); TIGHT leaves a factor of 100.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import QUICK, SCALINGS, T, random_tokens, random_weights, tiny_config, tiny_model

from llama_np import KVCache, hidden_states, logits
from llama_np.model import classify

TIGHT = 1e-12
CONFIG, WEIGHTS = tiny_model()
V = CONFIG.vocab_size


def run(tokens: Any, weights: Any = WEIGHTS, config: Any = CONFIG, **keywords: Any) -> np.ndarray:
    """Logits of every token."""
    return logits(hidden_states(np.asarray(tokens), weights, config, **keywords), weights)


def same(a: np.ndarray, b: np.ndarray, tolerance: float = TIGHT) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def chunkings(length: int) -> st.SearchStrategy[list[slice]]:
    """Ways to cut `length` tokens into chunks, empty chunks included."""
    return st.lists(st.integers(0, length), max_size=6).map(
        lambda places: [slice(a, b) for a, b in itertools.pairwise([0, *sorted(places), length])]
    )


# "dynamic" and "longrope" belong here too as long as the text keeps within the length that
# their frequencies depend on. Beyond it (see below) one pass turns *all* keys by the final
# frequencies, while cached keys keep those that were in force when they were stored.
WITHIN = {"dynamic": 32, "longrope": 16}


@pytest.mark.parametrize("kind", SCALINGS)
@QUICK
@given(data=st.data())
def test_any_chunking_equals_one_pass(kind: str, data: st.DataObject) -> None:
    config = tiny_config(rope_scaling=SCALINGS[kind])
    length = data.draw(st.integers(1, min(40, WITHIN.get(kind, 40))))
    chunks = data.draw(chunkings(length))
    capacity = data.draw(st.sampled_from([None, length, length + 3]))
    tokens = random_tokens(config, 2, length, seed=length)
    cache = KVCache(config, 2, capacity, np.float64)
    parts = [run(tokens[:, chunk], config=config, cache=cache) for chunk in chunks]
    same(np.concatenate(parts, axis=1), run(tokens, config=config))
    assert cache.length == length


@pytest.mark.parametrize("kind", WITHIN)
def test_cached_keys_keep_the_rotation_of_their_time(kind: str) -> None:
    """Beyond the trained length the last logits of a cached run differ from one pass."""
    config = tiny_config(rope_scaling=SCALINGS[kind])
    tokens = random_tokens(config, 1, 40)
    cache = KVCache(config, 1, dtype=np.float64)
    parts = [run(tokens[:, [t]], config=config, cache=cache) for t in range(40)]
    cached, at_once = np.concatenate(parts, axis=1), run(tokens, config=config)
    assert np.abs(cached - at_once).max() > 1e-2
    short = tokens[:, : WITHIN[kind]]
    same(cached[:, : WITHIN[kind]], run(short, config=config))


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_forward_pass_leaves_no_state_behind(kind: str) -> None:
    config = tiny_config(rope_scaling=SCALINGS[kind])
    short, long = random_tokens(config, 1, 5), random_tokens(config, 1, 50)
    before = run(short, config=config)
    run(long, config=config)
    np.testing.assert_array_equal(run(short, config=config), before)


@st.composite
def ragged_batches(draw: st.DrawFn) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Rows of different lengths, and the batch: tokens with random padding, positions.

    Padding (position below 0, content arbitrary) stands left, right, on both sides or anywhere.
    """
    token = st.integers(0, V - 1)
    rows = draw(st.lists(st.lists(token, min_size=1, max_size=8), min_size=1, max_size=4))
    width = max(map(len, rows)) + draw(st.integers(0, 3))
    tokens = np.array(draw(st.lists(token, min_size=width, max_size=width)))[None].repeat(
        len(rows), axis=0
    )
    positions = np.full((len(rows), width), -1)
    for i, row in enumerate(rows):
        places = sorted(draw(st.permutations(range(width)))[: len(row)])
        side = draw(st.sampled_from(["left", "right", "anywhere"]))
        slots = {
            "left": list(range(width - len(row), width)),
            "right": list(range(len(row))),
            "anywhere": places,
        }[side]
        tokens[i, slots] = row
        positions[i, slots] = range(len(row))
        padding = positions[i] < 0
        positions[i, padding] = draw(st.integers(-50, -1))
    return rows, tokens, positions


@pytest.mark.parametrize("kind", SCALINGS)
@QUICK
@given(batch=ragged_batches())
def test_a_batch_row_equals_that_row_alone(kind: str, batch: Any) -> None:
    rows, tokens, positions = batch
    config = tiny_config(rope_scaling=SCALINGS[kind])
    together = run(tokens, config=config, positions=positions)
    assert np.isfinite(together).all()
    for i, row in enumerate(rows):
        same(together[i, positions[i] >= 0], run([row], config=config)[0])


@QUICK
@given(batch=ragged_batches(), steps=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_ragged_batch_keeps_equal_to_its_rows_while_decoding(
    batch: Any, steps: int, seed: int
) -> None:
    rows, tokens, positions = batch
    later = random_tokens(CONFIG, len(rows), steps, seed)
    cache = KVCache(CONFIG, len(rows), dtype=np.float64)
    run(tokens, cache=cache, positions=positions)
    lengths = np.array([[len(row)] for row in rows])
    for step in range(steps):
        together = run(later[:, [step]], cache=cache, positions=lengths + step)
        for i, row in enumerate(rows):
            alone = run([[*row, *later[i, : step + 1].tolist()]])
            same(together[i, -1], alone[0, -1])


@QUICK
@given(batch=ragged_batches())
def test_decoding_continues_each_row_where_its_own_text_ended(batch: Any) -> None:
    """Without positions a cache continues after a row's last token, not after its padding."""
    rows, tokens, positions = batch
    cache = KVCache(CONFIG, len(rows), dtype=np.float64)
    run(tokens, cache=cache, positions=positions)
    together = run(np.full((len(rows), 2), 3), cache=cache)
    for i, row in enumerate(rows):
        same(together[i], run([[*row, 3, 3]])[0, -2:])


@QUICK
@given(batch=ragged_batches(), seed=st.integers(0, 99))
def test_what_stands_in_the_padding_never_reaches_a_valid_row(batch: Any, seed: int) -> None:
    """Bit for bit: a masked weight is exactly 0, and adding 0 times anything changes no bit."""
    _, tokens, positions = batch
    padding = positions < 0
    other = np.where(padding, random_tokens(CONFIG, len(tokens), tokens.shape[1], seed), tokens)
    a, b = (run(ids, positions=positions)[~padding] for ids in (tokens, other))
    np.testing.assert_array_equal(a, b)


@QUICK
@given(rows=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=8), max_size=4))
def test_left_padding_equals_right_padding(rows: list[list[int]]) -> None:
    width = max(map(len, rows), default=1) + 1
    shape = (len(rows), width)
    left, right = np.zeros(shape, int), np.zeros(shape, int)
    left_positions, right_positions = np.full(shape, -1), np.full(shape, -1)
    for i, row in enumerate(rows):
        left[i, width - len(row) :], left_positions[i, width - len(row) :] = row, range(len(row))
        right[i, : len(row)], right_positions[i, : len(row)] = row, range(len(row))
    a = run(left, positions=left_positions)
    b = run(right, positions=right_positions)
    for i, row in enumerate(rows):
        same(a[i, width - len(row) :], b[i, : len(row)])
    same(
        classify(left, WEIGHTS, CONFIG, left_positions),
        classify(right, WEIGHTS, CONFIG, right_positions),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@QUICK
@given(data=st.data())
def test_a_later_token_changes_no_bit_of_earlier_rows(dtype: Any, data: st.DataObject) -> None:
    weights = random_weights(CONFIG, dtype=dtype)
    tokens = np.array([data.draw(st.lists(st.integers(0, V - 1), min_size=2, max_size=12))])
    t = data.draw(st.integers(1, tokens.shape[1] - 1))
    changed = tokens.copy()
    changed[0, t] = (changed[0, t] + data.draw(st.integers(1, V - 1))) % V
    before, after = run(tokens, weights), run(changed, weights)
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(axis=-1).all()  # and every later row notices


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
@QUICK
@given(shift=st.integers(-3, 4000))
def test_only_distances_between_positions_matter(kind: str, shift: int) -> None:
    """Tolerance: cos and sin of an angle near 4000 are known to 4000 * 2e-16, about 1e-12."""
    config = tiny_config(rope_scaling=SCALINGS[kind])
    tokens = random_tokens(config, 2)
    positions = np.arange(3, 3 + T)
    moved = run(tokens, config=config, positions=positions + shift)
    same(moved, run(tokens, config=config, positions=positions), 1e-10)


@QUICK
@given(seed=st.integers(0, 999))
def test_the_order_of_the_slots_does_not_matter(seed: int) -> None:
    """Positions say who sees whom, so a shuffled text gives the shuffled logits."""
    tokens, order = random_tokens(CONFIG, 1), np.random.default_rng(seed).permutation(T)
    shuffled = run(tokens[:, order], positions=order)
    same(shuffled, run(tokens)[:, order])


@QUICK
@given(seed=st.integers(0, 999))
def test_the_order_of_the_rows_does_not_matter(seed: int) -> None:
    tokens = random_tokens(CONFIG)
    order = np.random.default_rng(seed).permutation(len(tokens))
    same(run(tokens[order]), run(tokens)[order])


@QUICK
@given(seed=st.integers(0, 99), layer=st.integers(0, 2))
def test_swapping_equal_roles_changes_nothing(seed: int, layer: int) -> None:
    """MLP channels have no order: permute gate, up and the columns of down together."""
    order = np.random.default_rng(seed).permutation(CONFIG.intermediate_size)
    name = f"model.layers.{layer}"
    w = dict(WEIGHTS[name])
    for module in ("gate_proj", "up_proj"):
        for kind in ("weight", "bias"):
            w[f"mlp.{module}.{kind}"] = w[f"mlp.{module}.{kind}"][order]
    w["mlp.down_proj.weight"] = w["mlp.down_proj.weight"][:, order]
    tokens = random_tokens(CONFIG, 1)
    same(run(tokens, WEIGHTS | {name: w}), run(tokens))
