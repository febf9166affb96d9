"""Many lines of text, here or on many machines: the same work, cut into chunks.

A chunk goes to a worker of dask.distributed (extra `dask`), or is done in this process. Every
worker process maps the checkpoint once, so workers of one host share its memory. Results come
back in the order of the lines; the work of a worker that dies is done by another one.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from llama_np.checkpoint import load, load_tokenizer
from llama_np.errors import require
from llama_np.generate import generate
from llama_np.perplexity import score
from llama_np.sampling import Sampling

CHUNK_LINES = 32
CHUNKS_PER_THREAD = 3  # sent ahead, so that no worker waits for the next chunk
RETRIES = 3

Result = dict[str, Any]
Task = Callable[[int, Sequence[str]], list[Result]]  # (number of the first line, lines)


@lru_cache(maxsize=1)
def open_model(model: str, dtype: str) -> tuple[Any, Any, Any]:
    """Config, weights and tokenizer; loaded once per process."""
    config, weights = load(model, dtype)
    return config, weights, load_tokenizer(model)


@dataclass(frozen=True)
class ScoreTask:
    """The likelihood of every line."""

    model: str
    dtype: str = "float32"

    def __call__(self, first: int, lines: Sequence[str]) -> list[Result]:
        """One result per line: text, log_likelihood, tokens, perplexity."""
        config, weights, tokenizer = open_model(self.model, self.dtype)
        found = score([tokenizer.encode(line) for line in lines], weights, config)
        return [
            {
                "text": line,
                "log_likelihood": result.log_likelihood,
                "tokens": result.token_count,
                "perplexity": result.perplexity if result.token_count else None,
            }
            for line, result in zip(lines, found, strict=True)
        ]


@dataclass(frozen=True)
class GenerateTask:
    """The completion of every line; line n draws with seed + n."""

    model: str
    dtype: str = "float32"
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    max_new_tokens: int = 256
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __call__(self, first: int, lines: Sequence[str]) -> list[Result]:
        """One result per line: prompt, text, token_ids, finish_reason, seed."""
        config, weights, tokenizer = open_model(self.model, self.dtype)
        seeds = [self.seed + first + i for i in range(len(lines))]
        stops = {*config.eos_token_id, *tokenizer.eos_ids}
        completions = generate(
            [tokenizer.encode(line) for line in lines],
            weights,
            config,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            seeds=seeds,
            stop_ids=[] if self.ignore_eos else sorted(stops),
            stop_strings=self.stop_strings,
            tokenizer=tokenizer,
        )
        return [
            {
                "prompt": line,
                "text": done.text,
                "token_ids": done.token_ids,
                "prompt_token_ids": done.prompt_token_ids,
                "finish_reason": done.finish_reason,
                "seed": seed,
            }
            for line, seed, done in zip(lines, seeds, completions, strict=True)
        ]


def run(
    task: Task, lines: Sequence[str], first: int = 0, scheduler: str | None = None
) -> Iterator[list[Result]]:
    """Work through the lines from number `first` on: the results of one chunk after another.

    scheduler: the address of a dask scheduler, such as "tcp://127.0.0.1:8786". Its workers need
    llama_np and the checkpoint under the same name.
    Errors: what the task raises; ModuleNotFoundError without dask; OSError without scheduler.
    """
    starts = range(first, len(lines), CHUNK_LINES)
    chunks = ((start, list(lines[start : start + CHUNK_LINES])) for start in starts)
    if scheduler is None:
        yield from (task(*chunk) for chunk in chunks)
        return
    distributed = require("distributed", extra="dask")
    with distributed.Client(scheduler, set_as_default=False) as client:
        window = CHUNKS_PER_THREAD * max(1, sum(client.nthreads().values()))
        waiting: deque[Any] = deque()
        for chunk in chunks:
            waiting.append(client.submit(task, *chunk, pure=False, retries=RETRIES))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def resume(path: str | os.PathLike[str], lines: Sequence[str]) -> int:
    """How many lines an interrupted output file already answers; a torn last line is cut off.

    Errors: ValueError if the file answers other lines.
    """
    target = Path(path)
    if not target.exists():
        return 0
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    answered = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
    for number, (answer, line) in enumerate(zip(answered, lines, strict=False)):
        if answered_line(answer) != line:
            raise ValueError(f"{str(path)!r} answers another line {number + 1}: use a new file")
    if len(answered) > len(lines):
        raise ValueError(f"{str(path)!r} answers {len(answered)} lines, there are {len(lines)}")
    if len(whole) < len(content):
        os.truncate(target, len(whole))
    return len(answered)


def answered_line(answer: Mapping[str, Any]) -> str:
    """The line of input that a result belongs to."""
    return str(answer.get("text") if "log_likelihood" in answer else answer.get("prompt"))


def append(path: str | os.PathLike[str], results: Sequence[Result]) -> None:
    """Add results to an output file and make sure that they stay."""
    text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    with open(path, "ab") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
