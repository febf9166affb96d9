"""What guessing brings and costs: `python tests/bench_speculation.py [MODEL [DTYPE]]`.

MODEL is a checkpoint, or one of the shapes of `llama-np bench` with random weights (135M). Every
line is a speed relative to decoding without guesses (medians of interleaved runs), in the worst
case, where every guess is wrong, and for a checkpoint with prompt lookup.
"""

import statistics
import sys
import time

import numpy as np

from llama_np import Sampling, load, load_tokenizer, share_products, stream
from llama_np.bench import SHAPES, random_model
from llama_np.speculate import Draft, PromptLookup

PROMPT = "Once upon a time"
SAMPLINGS = {
    "a text that repeats itself": Sampling(),
    "one that may not": Sampling(repetition_penalty=1.3),
}
GUESSES = (0, 1, 2, 3, 4, 7, 15)
ROUNDS = 7


class Wrong(Draft):
    """Guesses what is never said."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def guess(self, ids: np.ndarray) -> np.ndarray:
        """The unknown token, several times."""
        return np.zeros(self.count, np.int64)


def relative_speeds(
    kind: type[Wrong] | type[PromptLookup],
    ids: list[int],
    tokens: int,
    *args: object,
    **options: object,
) -> str:
    """The speed with every number of guesses, relative to none."""
    spent: dict[int, list[float]] = {count: [] for count in GUESSES}
    for _ in range(ROUNDS):
        for count in GUESSES:
            draft = kind(count) if count else None
            start = time.perf_counter()
            for _ in stream([ids], *args, max_new_tokens=tokens, draft=draft, **options):  # type: ignore[arg-type]
                pass
            spent[count].append(time.perf_counter() - start)
    median = {count: statistics.median(seconds[1:]) for count, seconds in spent.items()}
    return ", ".join(f"{n} guesses {median[0] / median[n]:.2f}x" for n in GUESSES if n)


def main(model: str = "fairytales", dtype: str = "float32") -> None:
    """Measure every number of guesses."""
    config, weights = random_model(model, dtype) if model in SHAPES else load(model, dtype)
    with share_products(weights):
        ids = [1, 2, 3, 4]
        print("wrong guesses:", relative_speeds(Wrong, ids, 24, weights, config, stop_ids=[]))
        if model in SHAPES:
            return
        ids = load_tokenizer(model).encode(PROMPT)
        for name, sampling in SAMPLINGS.items():
            speeds = relative_speeds(PromptLookup, ids, 150, weights, config, sampling=sampling)
            print(f"prompt lookup, {name}: {speeds}")


if __name__ == "__main__":
    main(*sys.argv[1:])
