"""How fast each strategy of `linear` is: `python tests/bench_linear.py`.

Prints weights per second (10^9) of one core. Processor time is measured, not wall time, so that
other programs disturb little; set OPENBLAS_NUM_THREADS=1 before.
"""

import time
from collections.abc import Callable

import numpy as np

from llama_np.linear import times, times_bf16, times_few
from llama_np.precision import to_bf16

SHAPES = ((1536, 576), (49152, 576), (5632, 2048))
ROWS = (1, 2, 4, 6, 8, 16)


def best_seconds(function: Callable[[], object], runs: int = 7) -> float:
    """The shortest processor time of several runs."""
    times_taken = []
    for _ in range(runs):
        start = time.process_time()
        function()
        times_taken.append(time.process_time() - start)
    return min(times_taken)


def main() -> None:
    """Measure all strategies on all shapes."""
    random = np.random.default_rng(0)
    print(f"{'shape':>14} {'rows':>4} {'plain':>7} {'few':>7} {'bf16':>7}")
    for shape in SHAPES:
        weight = random.standard_normal(shape, np.float32)
        bits = to_bf16(weight)
        for M in ROWS:
            rows = random.standard_normal((M, shape[1]), np.float32)
            speeds = [
                weight.size / best_seconds(lambda f=f, w=w, x=rows: f(x, w)) / 1e9  # type: ignore[misc]
                for f, w in ((times, weight), (times_few, weight), (times_bf16, bits))
            ]
            print(f"{shape!s:>14} {M:>4} " + " ".join(f"{speed:7.2f}" for speed in speeds))


if __name__ == "__main__":
    main()
