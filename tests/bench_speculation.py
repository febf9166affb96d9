"""What guessing brings and costs: `python tests/bench_speculation.py [MODEL [DTYPE]]`.

MODEL is a checkpoint, or one of the shapes of `llama-np bench` with random weights (135M). Every
line is a speed relative to decoding without guesses (medians of interleaved runs): in the worst
case, where every guess is wrong, in the best, where every one is right, and for a checkpoint with
prompt lookup.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from llama_np import Sampling, load, load_tokenizer, share_products, stream
from llama_np.bench import SHAPES, random_model
from llama_np.speculate import Draft, PromptLookup

PROMPT = "Once upon a time"
SAMPLINGS = {"greedy": Sampling(), "no repetitions": Sampling(repetition_penalty=1.3)}
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


class Right(Draft):
    """Guesses what is said: it has heard the text before."""

    def __init__(self, count: int, told: np.ndarray) -> None:
        super().__init__()
        self.count, self.told = count, told

    def guess(self, ids: np.ndarray) -> np.ndarray:
        """The next tokens of the text."""
        return self.told[len(ids) : len(ids) + self.count]


def relative_speeds(tell: Callable[[Draft | None], object], draft: Callable[[int], Draft]) -> str:
    """How fast a text is told with every number of guesses, relative to none."""
    spent: dict[int, list[float]] = {count: [] for count in GUESSES}
    for _ in range(ROUNDS):
        for count in GUESSES:
            start = time.perf_counter()
            tell(draft(count) if count else None)
            spent[count].append(time.perf_counter() - start)
    median = {count: statistics.median(seconds[1:]) for count, seconds in spent.items()}
    return ", ".join(f"{n} guesses {median[0] / median[n]:.2f}x" for n in GUESSES if n)


def main(model: str = "fairytales", dtype: str = "float32") -> None:
    """Measure every number of guesses."""
    is_random = model in SHAPES
    config, weights = random_model(model, dtype) if is_random else load(model, dtype)
    with share_products(weights):
        ids = [1, 2, 3, 4]

        def any_text(draft: Draft | None) -> list[int]:
            text = stream([ids], weights, config, max_new_tokens=24, stop_ids=[], draft=draft)
            return [token.id for token in text if token.id is not None]

        told = np.array(ids + any_text(None))
        print("wrong guesses:", relative_speeds(any_text, Wrong))
        print("right guesses:", relative_speeds(any_text, lambda n: Right(n, told)))
        if is_random:
            return
        prompt = load_tokenizer(model).encode(PROMPT)
        for name, sampling in SAMPLINGS.items():

            def tale(draft: Draft | None, sampling: Sampling = sampling) -> object:
                ids, most = [prompt], 150
                return list(
                    stream(
                        ids, weights, config, max_new_tokens=most, sampling=sampling, draft=draft
                    )
                )

            print(f"prompt lookup, {name}: {relative_speeds(tale, PromptLookup)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
