"""How fast each strategy of `linear` is: `python tests/bench_linear.py`.

Prints milliseconds for one pass over the weights of a model of 135 million parameters (median of
interleaved passes), by number of rows. Run it on a machine that does nothing else.
"""

import statistics
import time

import numpy as np

import llama_np  # noqa: F401  it keeps freed memory, as in every real run
from llama_np.linear import FEW, TILE, Product, times, times_bf16, times_few, times_padded
from llama_np.precision import to_bf16

LAYERS = 30
LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
HEAD = (49152, 576)
ROWS = (1, 2, 3, 4, 6, 7, 8, 12, 15, 16, 32, 128)
PASSES = 9


def milliseconds(
    product: Product, inputs: dict[int, np.ndarray], weights: list[np.ndarray]
) -> float:
    """Wall time of one pass: every weight once."""
    start = time.perf_counter()
    for weight in weights:
        product(inputs[weight.shape[1]], weight)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Measure every strategy that can take so many rows."""
    random = np.random.default_rng(0)
    shapes = [*LAYER * LAYERS, HEAD]
    weights = [random.standard_normal(shape, np.float32) for shape in shapes]
    bits = [to_bf16(weight) for weight in weights]
    for M in ROWS:
        inputs = {D: random.standard_normal((M, D), np.float32) for D in (576, 1536)}
        cases = {"plain": (times, weights), "bf16": (times_bf16, bits)}
        if M in FEW or M < TILE:
            cases["few"] = (times_few, weights)
        if M % TILE:
            cases["padded"] = (times_padded, weights)
        spent: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(PASSES):
            for name, (product, given) in cases.items():
                spent[name].append(milliseconds(product, inputs, given))
        medians = {name: statistics.median(values[1:]) for name, values in spent.items()}
        print(f"{M:>4} rows", *(f"{name} {value:.1f} ms" for name, value in medians.items()))


if __name__ == "__main__":
    main()
