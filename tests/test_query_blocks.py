"""Attention in blocks of queries gives what attention as a whole gives."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_np.layers import attend
from llama_np.query_blocks import BLOCK
from llama_np.tap import record

WHOLE = attend.__wrapped__  # type: ignore[attr-defined]
K, G, H = 2, 3, 4


def arrays(B: int, T: int, S: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    q = random.standard_normal((B, K * G, T, H))
    k, v = random.standard_normal((2, B, K, S, H))
    return q, k, v


def causal(T: int, S: int) -> np.ndarray:
    """The last T of S tokens see themselves and what stands before them."""
    return (np.arange(S) <= np.arange(S - T, S)[:, None])[None, None]


@given(st.integers(1, 3), st.integers(1, 3 * BLOCK), st.integers(0, 40), st.floats(0, 1))
def test_blocks_change_nothing(B: int, T: int, cached: int, density: float) -> None:
    S = T + cached
    q, k, v = arrays(B, T, S)
    some = np.random.default_rng(1).random((B, 1, T, S)) < density  # some rows may see nothing
    for visible in (np.broadcast_to(causal(T, S), some.shape), some, some & causal(T, S)):
        # float64 sums of at most 232 numbers of order 1: only their order may differ
        np.testing.assert_allclose(
            attend(q, k, v, visible), WHOLE(q, k, v, visible), rtol=0, atol=1e-13
        )


def test_keys_that_a_block_cannot_see_are_not_read() -> None:
    T = 2 * BLOCK
    q, k, v = arrays(1, T, T)
    expected = attend(q, k, v, causal(T, T))[:, :BLOCK]
    k[:, :, BLOCK:] = v[:, :, BLOCK:] = np.nan  # 0 x NaN would be NaN
    with np.errstate(invalid="ignore"):
        product = attend(q, k, v, causal(T, T))
    np.testing.assert_array_equal(product[:, :BLOCK], expected)


def test_a_tap_sees_whole_arrays() -> None:
    T = 2 * BLOCK + 1
    trace: dict[str, np.ndarray] = {}
    attend(*arrays(1, T, T), causal(T, T), record(trace))
    assert trace["self_attn.scores"].shape == trace["self_attn.weights"].shape == (1, K * G, T, T)


@pytest.mark.parametrize("B", [1, 2])
def test_memory_grows_with_the_tokens_and_not_with_their_square(B: int) -> None:
    def most(T: int) -> int:
        q, k, v = arrays(B, T, T)
        visible = np.broadcast_to(causal(T, T), (B, 1, T, T))
        tracemalloc.start()
        attend(q, k, v, visible)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    assert most(16 * BLOCK) < 3 * most(8 * BLOCK)  # a square would make it 4
