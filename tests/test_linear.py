"""Every strategy of the one matrix product gives the same numbers."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_np import linear as module
from llama_np.linear import (
    FEW,
    Product,
    cached_strategy,
    linear,
    matmul,
    strategy,
    times,
    times_bf16,
    times_few,
    times_one,
    times_padded,
    times_transposed,
    times_unpacked,
)
from llama_np.precision import to_bf16, widen_bf16
from llama_np.threads import BLAS_LIMIT

SIZES = st.tuples(st.integers(0, 12), st.integers(1, 700), st.integers(1, 40))


def arrays(M: int, out: int, width: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(M + 31 * out + 997 * width)
    weight: np.ndarray = random.standard_normal((out, width)).astype(dtype)
    return random.standard_normal((M, width)).astype(dtype), weight


@given(SIZES)
def test_every_strategy_equals_the_plain_product(sizes: tuple[int, int, int]) -> None:
    rows, weight = arrays(*sizes, np.float64)
    expected = times(rows, weight)
    # float64 sums of at most 40 numbers of order 1: only the order of summation differs
    np.testing.assert_allclose(times_few(rows, weight), expected, atol=1e-13)
    np.testing.assert_allclose(times_padded(rows, weight), expected, atol=1e-13)
    np.testing.assert_allclose(times_transposed(rows, weight), expected, atol=1e-13)
    np.testing.assert_allclose(times_unpacked(rows, weight), expected, atol=1e-13)
    for row, product in zip(rows, expected, strict=True):
        np.testing.assert_allclose(times_one(row[None], weight), product[None], atol=1e-13)
    np.testing.assert_allclose(linear(rows, weight), expected, atol=1e-13)


@given(SIZES, st.integers(1, 5000))
def test_a_product_in_small_pieces_is_the_product(sizes: tuple[int, int, int], small: int) -> None:
    rows, weight = arrays(*sizes, np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", small)
        found = times_unpacked(rows, weight)
    # float64 sums of at most 40 numbers of order 1: only the order of summation differs
    np.testing.assert_allclose(found, times(rows, weight), atol=1e-13)


@given(SIZES, st.integers(1, 3), st.booleans(), st.booleans())
def test_stacks_of_matrices_are_multiplied_one_by_one(
    sizes: tuple[int, int, int], count: int, transposed: bool, avx512: bool
) -> None:
    rows, weight = arrays(*sizes, np.float64)
    other = np.stack([weight] * count)
    other = other.swapaxes(1, 2) if transposed else np.ascontiguousarray(other.swapaxes(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "avx512_kernels", lambda: avx512)
        found = matmul(np.stack([rows] * count), other)
    # float64 sums of at most 40 numbers of order 1: only the order of summation differs
    for product in found:
        np.testing.assert_allclose(product, times(rows, weight), atol=1e-13)


@given(SIZES, st.sampled_from([1, 100, 1 << 20]), st.booleans())
def test_weights_at_rest_equal_their_widened_selves(
    sizes: tuple[int, int, int], block: int, stays_in_cache: bool
) -> None:
    rows, weight = arrays(*sizes, np.float32)
    bits = to_bf16(weight)
    wide = widen_bf16(bits).astype(np.float64)
    expected = rows.astype(np.float64) @ wide.T
    # float32: 40 products of order 1, each rounded to 6e-8 of the sum of their magnitudes
    with pytest.MonkeyPatch.context() as patch:
        cache = module.LARGE_CACHE if stays_in_cache else module.LARGE_CACHE - 1
        patch.setattr(module, "second_level_cache", lambda: cache)
        for name in ("BF16_BLOCK_IN_CACHE", "BF16_BLOCK"):
            patch.setattr(module, name, block)
        np.testing.assert_allclose(times_bf16(rows, bits), expected, atol=1e-4)
        exact = times_bf16(rows.astype(np.float64), bits)
        np.testing.assert_allclose(exact, expected, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("M", [1, 2, 7, 8])
def test_the_result_has_the_dtype_of_the_input(dtype: type, bits: bool, M: int) -> None:
    rows, weight = arrays(M, 300, 16, dtype)
    product = linear(rows, to_bf16(weight) if bits else weight)
    assert product.dtype == dtype


def test_leading_axes_and_bias_are_kept_apart() -> None:
    rows, weight = arrays(6, 5, 4, np.float64)
    bias = np.arange(5.0)
    product = linear(rows.reshape(2, 3, 4), weight, bias)
    np.testing.assert_allclose(product.reshape(6, 5), rows @ weight.T + bias, atol=1e-14)


def test_inputs_are_never_changed() -> None:
    rows, weight = arrays(3, 9, 4, np.float64)
    bias = np.ones(9)
    for array in (rows, weight, bias):
        array.flags.writeable = False
    linear(rows, weight, bias)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Takes what BLAS is: whether it multiplies with AVX-512, and whether it has one thread.

    And whether the processor computes AVX-512 in two halves.
    """

    def choose(avx512: bool, one_thread: bool, halves: bool = False) -> None:
        monkeypatch.setattr(module, "avx512_kernels", lambda: avx512)
        monkeypatch.setattr(module, "halves_avx512", lambda: halves)
        monkeypatch.setattr(BLAS_LIMIT, "one_thread", one_thread)

    return choose


WEIGHT: np.ndarray = np.ones((4, 512), np.float32)
Chosen = dict[tuple[int, ...], Product]


def strategies(counts: Iterable[int]) -> Chosen:
    """How many rows are multiplied with WEIGHT by which product."""
    chosen: dict[Product, list[int]] = {}
    for M in counts:
        chosen.setdefault(strategy(M, WEIGHT), []).append(M)
    return {tuple(rows): product for product, rows in chosen.items()}


def test_without_avx512_rows_are_multiplied_one_by_one_or_in_whole_tiles(
    kernels: Callable[..., None],
) -> None:
    kernels(False, False)
    rows = (0, 1, 2, 3, 4, 5, 7, 8, 9, 192, 511)
    assert strategies(rows) == {
        (0, 1, 8, 192): times,
        (2, 3): times_few,
        (4, 5, 7, 9, 511): times_padded,
    }
    kernels(False, True)
    assert strategies(rows) == {
        (0, 8, 192): times,
        (1,): times_one,
        (2, 3, 4, 5): times_few,
        (7, 9, 511): times_padded,
    }


def test_with_avx512_few_rows_are_multiplied_without_copies_if_products_are_small(
    kernels: Callable[..., None],
) -> None:
    rows = (1, 2, 3, 4, 8, 9, 32, 33, 191, 192, 512, 513)
    kernels(True, False)
    assert strategies(rows) == {
        (1,): times,
        (2, 3, 4, 8): times_unpacked,
        (9, 32, 33, 191, 192, 512, 513): times_transposed,
    }
    kernels(True, True)
    assert strategies(rows) == {
        (1,): times_one,
        (2, 3, 4, 8, 9, 32): times_unpacked,
        (33, 191, 192, 512, 513): times_transposed,
    }
    wide: np.ndarray = np.ones((4, 4096), np.float32)
    assert strategy(28, wide) is times_unpacked  # 8 x 28 x 4096 < 950,000
    assert strategy(29, wide) is times_transposed


def test_with_avx512_in_two_halves_up_to_191_rows_are_multiplied_without_copies(
    kernels: Callable[..., None],
) -> None:
    rows = (1, 2, 3, 4, 8, 9, 191, 192, 193, 512)
    kernels(True, False, halves=True)
    assert strategies(rows) == {
        (1, 192, 512): times,
        (2, 3): times_few,
        (4, 8): times_unpacked,
        (9, 191, 193): times_transposed,
    }
    kernels(True, True, halves=True)
    assert strategies(rows) == {
        (1,): times_one,
        (2, 3): times_few,
        (4, 8, 9, 191): times_unpacked,
        (192, 512): times,  # as its result lies row by row
        (193,): times_transposed,
    }


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("one_thread", [False, True])
def test_a_block_just_widened_lies_in_the_cache_of_one_core(
    avx512: bool, one_thread: bool, kernels: Callable[..., None]
) -> None:
    kernels(avx512, one_thread)
    assert {strategy(M, to_bf16(WEIGHT)) for M in (0, 1, 2, 8, 512)} == {times_bf16}
    assert cached_strategy(1, 512) is (times if one_thread else times_one)
    # rows one by one are no gain over products without copies
    assert {cached_strategy(M, 512) for M in FEW} == {times_unpacked if avx512 else times_few}
