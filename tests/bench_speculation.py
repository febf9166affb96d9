"""What prompt lookup brings to the bundled model: `python tests/bench_speculation.py`.

Prints the speed of greedy decoding with so many guesses per pass, relative to none (processor
time, best of three). Set OPENBLAS_NUM_THREADS=1 before, as idle threads count as busy.
"""

import time

import numpy as np

from llama_np import LlamaForCausalLM, LlamaTokenizer

PROMPT = "Once upon a time"
PENALTIES = {"a text that repeats itself": 1.0, "one that may not": 1.3}
GUESSES = (4, 7, 10, 15)
TOKENS = 150


def seconds(model: LlamaForCausalLM, ids: np.ndarray, guesses: int | None, penalty: float) -> float:
    """Processor time of one text."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        model.generate(
            ids, max_new_tokens=TOKENS, prompt_lookup_num_tokens=guesses, repetition_penalty=penalty
        )
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    """Measure every number of guesses on both texts."""
    model = LlamaForCausalLM.from_pretrained("fairytales")
    tokenizer = LlamaTokenizer.from_pretrained("fairytales")
    ids = tokenizer(PROMPT, return_tensors="np")["input_ids"]
    for name, penalty in PENALTIES.items():
        plain = seconds(model, ids, None, penalty)
        ratios = (f"{n} guesses {plain / seconds(model, ids, n, penalty):.2f}x" for n in GUESSES)
        print(f"{name}:", ", ".join(ratios))


if __name__ == "__main__":
    main()
