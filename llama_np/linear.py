"""The one matrix product of the model, and every speed trick that it needs.

Decoding is bound by memory: a token costs one pass over all weights. What the tricks bring is
said beside them, in milliseconds for one pass over the weights of a model of 135 million
parameters (NumPy 2.4, OpenBLAS 0.3.31 with its kernels for Haswell or, where AVX-512 is named,
for SkylakeX; two threads, an AMD EPYC; `tests/bench_linear.py` measures it again).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from llama_np.memory import Scratch
from llama_np.precision import is_bf16, places_to_widen
from llama_np.processor import halves_avx512, second_level_cache
from llama_np.threads import BLAS_LIMIT, avx512_kernels

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]

# The products in which worker processes take part (workers.py), by id(weight).
SHARED: dict[int, Product] = {}

FEW = range(2, 4)  # rows that are faster one by one than by BLAS's matrix-matrix product
FEW_ALONE = range(2, 6)  # the same where BLAS has one thread
TILE = 8  # rows that BLAS's matrix-matrix product takes at once
MOST_UNPACKED = 32  # rows that make up for the copies that BLAS makes of the weights
MOST_UNPACKED_IN_HALVES = 191  # the same if AVX-512 is computed in two halves
SMALL = 950_000  # multiplications; OpenBLAS calls a product small up to 10^6 of them
FEWEST_UNPACKED = 8  # rows of weights for which a small product pays
SMALL_TRANSPOSED = 1200  # numbers in a product that OpenBLAS calls small if b is transposed
FEW_QUERIES = 64  # rows of attention; for more a copy of the keys pays
BLOCK_BYTES = 1 << 19  # of weights; a block stays in the second-level cache between two uses
BF16_BLOCK = 1 << 20  # bfloat16 weights that are widened at a time
BF16_BLOCK_IN_CACHE = 3 << 16  # the same if they are to stay in the second-level cache
LARGE_CACHE = 1 << 21  # bytes of a second-level cache in which they had better stay
WIDENED = Scratch(2 * BF16_BLOCK + 2)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x @ weight.T + bias: (..., in), (out, in), (out,) -> (..., out), in the dtype of x.

    The weight is stored as (out, in), as in every checkpoint; bfloat16 bits are widened exactly.
    """
    rows = x.reshape(-1, x.shape[-1])  # one large product instead of many small ones
    multiply = SHARED.get(id(weight)) or strategy(len(rows), weight)
    product = multiply(rows, weight)
    if bias is not None:
        product += bias
    return product.reshape(*x.shape[:-1], weight.shape[0])


def strategy(row_count: int, weight: np.ndarray) -> Product:
    """The product that is fastest for so many rows and this weight, if nobody helps."""
    if is_bf16(weight):
        return times_bf16
    if row_count == 1:
        return times_one if BLAS_LIMIT.one_thread else times
    few = row_count in FEW and not _full_width()
    return times_few if few else cached_strategy(row_count, weight.shape[1])


def cached_strategy(row_count: int, width: int) -> Product:
    """The same for weights that lie in the cache, as a block does that was just widened."""
    alone = BLAS_LIMIT.one_thread
    if row_count == 1:
        return times if alone else times_one
    if avx512_kernels():
        if _unpacked_pays(row_count, width):
            return times_unpacked
        many = row_count > MOST_UNPACKED_IN_HALVES and row_count % TILE == 0
        return times if many and not _full_width() else times_transposed
    if row_count in (FEW_ALONE if alone else FEW):
        return times_few
    return times if row_count % TILE == 0 else times_padded


def _full_width() -> bool:
    """Whether BLAS multiplies with AVX-512, and the processor does so at once, not in halves."""
    return avx512_kernels() and not halves_avx512()


def _unpacked_pays(row_count: int, width: int) -> bool:
    """Whether products without copies are faster, if BLAS multiplies with AVX-512."""
    if row_count <= TILE:
        return True
    most = MOST_UNPACKED if _full_width() else MOST_UNPACKED_IN_HALVES
    fits = _at_once(row_count, width) >= FEWEST_UNPACKED
    return BLAS_LIMIT.one_thread and row_count <= most and fits


def times(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The plain product: (M, in), (out, in) -> (M, out).

    For one row NumPy passes it to the matrix-vector product, which reads weights as fast as the
    memory delivers them (16 ms).
    """
    return rows @ weight.T


def times_one(row: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product for one row, as one dot product after the other: (1, in), (out, in) -> (1, out).

    On one core it reads weights 15 % faster than the matrix-vector product, which is better only
    with two threads. `times_bf16` and worker processes use it.
    """
    return np.vecdot(row, weight)[None]


def times_few(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product for 2 or 3 rows: block after block of weights, and each block row by row.

    The first row's dot products read a block from memory, as fast as it delivers on one core; for
    the others, which find it in the cache, BLAS's matrix-vector product is faster. On the Zen 4
    machine of the README 2 rows take 35 ms instead of 55, 3 rows 40 instead of 55. Where AVX-512
    has its full width `times_unpacked` is faster: a token for each of 2 texts takes 30 instead of
    35 ms on an Intel Xeon (Emerald Rapids) with worker processes, 47 instead of 59 without.
    """
    product = np.empty((len(rows), len(weight)), np.result_type(rows, weight))
    step = max(1, BLOCK_BYTES // (weight.shape[1] * weight.itemsize))
    for start in range(0, len(weight), step):
        block = weight[start : start + step]
        for number, row in enumerate(rows):
            multiply = np.dot if number else np.vecdot
            multiply(block, row, out=product[number, start : start + step])
    return product


def times_padded(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product for 4 or more rows, with rows of zeros up to the next multiple of 8.

    BLAS is slower on an incomplete tile than on a complete one: 4 rows take 32 ms instead of 38,
    6 rows 34 instead of 59, 15 rows 45 instead of 55.
    """
    return (_padded(rows) @ weight.T)[: len(rows)]


def times_transposed(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product the other way round: (weight @ rows.T).T, with rows up to a multiple of 8.

    BLAS copies the matrix on the left into another order faster than the one on the right, if it
    multiplies with AVX-512: 16 rows take 41 ms instead of 67, 32 rows 54 instead of 83.
    """
    return (weight @ _padded(rows).T).T[: len(rows)]


def _padded(rows: np.ndarray) -> np.ndarray:
    """The rows, and rows of zeros up to the next multiple of TILE."""
    if len(rows) % TILE == 0:
        return rows
    padded = np.zeros((-(-len(rows) // TILE) * TILE, rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return padded


def times_unpacked(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product in pieces so small that BLAS copies nothing.

    BLAS's matrix-matrix product first copies ("packs") the weights into the order in which it
    reads them. With AVX-512, OpenBLAS multiplies small matrices as they lie, on one core: 8 rows
    take 40 ms on one core instead of 83, or 51 on two; with two worker processes they take 23.
    With two threads, each on a core of its own, 64 rows reach 85 % of the speed of a large product
    instead of 72 (`times_transposed`), 32 rows 79 instead of 58. That is on a Zen 4, which
    computes AVX-512 in two halves. An Intel Xeon (Emerald Rapids), twice as fast, waits for the
    weights then: 128 rows reach 61 % instead of 77 with the copies.
    """
    columns = np.ascontiguousarray(rows.T)
    product = np.empty((len(weight), len(rows)), np.result_type(rows, weight))
    step = _at_once(*rows.shape)
    count, rest = divmod(len(weight), step)
    whole = len(weight) - rest
    pieces, products = (a[:whole].reshape(count, step, a.shape[1]) for a in (weight, product))
    np.matmul(pieces, columns, out=products)  # one call, as its loop needs no lock of Python's
    np.matmul(weight[whole:], columns, out=product[whole:])
    return product.T


def _at_once(row_count: int, width: int) -> int:
    """How many rows of a weight make a small product with so many rows of that width."""
    step = max(1, SMALL // max(1, row_count * width))
    return step - step % 4 if step > 4 else step  # the kernel takes 4 at once


def times_bf16(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product with weights that rest in two bytes, of which a block is widened at a time.

    One row takes 21 ms on one core, of which 12 are for widening; with a second thread of BLAS it
    takes twice as long, as the block lies in the first one's cache. With the worker processes of
    `workers` it takes 15 ms, as one row of float32.
    """
    product = np.empty((len(rows), len(weight)), rows.dtype)
    times_wide = cached_strategy(len(rows), weight.shape[1])
    for part, places, wide in blocks_to_widen(len(rows), weight, WIDENED):
        places[...] = weight[part]
        product[:, part] = times_wide(rows, wide)
    return product


def blocks_to_widen(
    row_count: int, weight: np.ndarray, scratch: Scratch
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Block after block: which rows of a weight, where to put their bits, and the numbers there."""
    block = _block(row_count, weight.shape[1])
    step = max(1, block // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, min(start + step, len(weight)))
        shape = (part.stop - start, weight.shape[1])
        halves = scratch.take(2 * math.prod(shape) + 2, within=2 * block + 2)
        yield part, *places_to_widen(shape, halves)


def _block(row_count: int, width: int) -> int:
    """How many bfloat16 weights to widen at a time, and to keep memory for.

    Writing to memory that lies in the second-level cache slows down the reading of weights on a
    Zen 4 (1 MiB, and a fast third level): with two worker processes one row takes 15 ms if the
    memory is larger, otherwise 18. On an Intel Xeon (Emerald Rapids: 2 MiB, and a slow third
    level) a token takes 28 ms if the memory fits, otherwise 35, and two 40 instead of 43. That
    holds as long as BLAS does not copy the rows for every block.
    """
    stays = _unpacked_pays(row_count, width) and second_level_cache() >= LARGE_CACHE
    return BF16_BLOCK_IN_CACHE if stays else BF16_BLOCK


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b for stacks of matrices: (..., M, in), (..., in, out) -> (..., M, out).

    BLAS's matrix-matrix product first copies b into another order, which does not pay for fewer
    than 8 rows; these are multiplied one by one. Attention of one token to 1,500 others takes
    6 ms instead of 11 in 30 layers with 3 query heads for each key/value head.
    With AVX-512 a small product copies nothing, unless b is transposed, as keys are; then the
    product the other way round copies nothing. The scores alone take 4 ms instead of 16 for one
    text of 1,500 tokens.
    """
    M, out = a.shape[-2], b.shape[-1]
    if avx512_kernels():
        transposed = b.strides[-1] != b.itemsize
        if transposed and 1 < M < FEW_QUERIES and M * out > SMALL_TRANSPOSED:
            return _other_way_round(a, b)
    elif 1 < M < TILE:
        return (a[..., None, :] @ b[..., None, :, :])[..., 0, :]
    return a @ b


def _other_way_round(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(b.T @ a.T).T for stacks of matrices."""
    columns = np.ascontiguousarray(a.swapaxes(-1, -2))
    return (b.swapaxes(-1, -2) @ columns).swapaxes(-1, -2)
