"""How fast each strategy of `linear` is: `python tests/bench_linear.py`.

Prints milliseconds for one pass over the weights of a model of 135 million parameters (median of
interleaved passes), by number of rows; then those for the attention scores of one token in 30
layers. Run it on a machine that does nothing else.
"""

import statistics
import time

import numpy as np

import llama_np  # noqa: F401  it keeps freed memory, as in every real run
from llama_np.linear import (
    FEW,
    TILE,
    Product,
    linear,
    matmul,
    times,
    times_bf16,
    times_few,
    times_padded,
    times_transposed,
    times_unpacked,
)
from llama_np.precision import to_bf16
from llama_np.threads import AWAKE, blas_name
from llama_np.workers import share_products

LAYERS = 30
LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
HEAD = (49152, 576)
ROWS = (1, 2, 3, 4, 6, 7, 8, 12, 15, 16, 32, 128)
PASSES = 9
SCORES = ((1, 3, 3, 150), (1, 3, 3, 1500), (32, 3, 3, 150), (1, 4, 8, 500), (1, 4, 8, 1500))

Cases = dict[str, tuple[Product, list[np.ndarray]]]


def milliseconds(
    product: Product, inputs: dict[int, np.ndarray], weights: list[np.ndarray]
) -> float:
    """Wall time of one pass: every weight once."""
    start = time.perf_counter()
    for weight in weights:
        product(inputs[weight.shape[1]], weight)
    return (time.perf_counter() - start) * 1e3


def medians(cases: Cases, inputs: dict[int, np.ndarray]) -> str:
    """The median duration of every product, measured in turn."""
    spent: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(PASSES):
        for name, (product, given) in cases.items():
            spent[name].append(milliseconds(product, inputs, given))
    return " ".join(f"{name} {statistics.median(v[1:]):.1f} ms" for name, v in spent.items())


def main() -> None:
    """Measure every strategy that can take so many rows, alone and with worker processes."""
    random = np.random.default_rng(0)
    shapes = [*LAYER * LAYERS, HEAD]
    weights = [random.standard_normal(shape, np.float32) for shape in shapes]
    bits = [to_bf16(weight) for weight in weights]
    named = {
        f"{kind}{i}": w for kind, ws in (("f", weights), ("b", bits)) for i, w in enumerate(ws)
    }
    print(blas_name())
    for M in ROWS:
        inputs = {D: random.standard_normal((M, D), np.float32) for D in (576, 1536)}
        cases: Cases = {"plain": (times, weights), "bf16": (times_bf16, bits)}
        if M in FEW or M < TILE:
            cases["few"] = (times_few, weights)
        if M % TILE:
            cases["padded"] = (times_padded, weights)
        if 1 < M < 128:
            cases["transposed"] = (times_transposed, weights)
            cases["unpacked"] = (times_unpacked, weights)
        print(f"{M:>4} rows, one process: ", medians(cases, inputs))
        with share_products(named) as count:  # one after the other, as BLAS may change threads
            start = time.perf_counter()
            while time.perf_counter() < start + 2 * AWAKE:  # until the threads of BLAS sleep
                milliseconds(linear, inputs, weights)
            shared = [
                medians({"float32": (linear, weights)}, inputs),
                medians({"bf16": (linear, bits)}, inputs),
            ]
            print(f"{M:>4} rows, {count} processes:", *shared)
    for B, K, G, S in SCORES:
        keys = [random.standard_normal((B, K, S + 1, 64), np.float32) for _ in range(LAYERS)]
        spent = attention_milliseconds(random.standard_normal((B, K, G, 64), np.float32), keys)
        print(f"{B} x {K} x {G} queries, {S} keys:", spent)


def attention_milliseconds(queries: np.ndarray, keys: list[np.ndarray]) -> str:
    """`matmul` beside the plain product and the product row by row, for queries and keys."""
    transposed = [k[:, :, :-1].swapaxes(2, 3) for k in keys]  # a part of a cache's slots
    products: dict[str, Product] = {
        "plain": lambda q, k: q @ k,
        "row by row": lambda q, k: (q[..., None, :] @ k[..., None, :, :])[..., 0, :],
        "matmul": lambda q, k: np.ascontiguousarray(matmul(q, k)),  # as softmax wants it
    }
    spent: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(PASSES):
        for name, product in products.items():
            start = time.perf_counter()
            for k in transposed:
                product(queries, k)
            spent[name].append((time.perf_counter() - start) * 1e3)
    return " ".join(f"{name} {statistics.median(v[1:]):.2f} ms" for name, v in spent.items())


if __name__ == "__main__":
    main()
