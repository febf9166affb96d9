"""Many lines of text, here or on many machines: the same work, cut into chunks.

A chunk goes to a worker of dask.distributed (extra `dask`), or is done in this process. Every
worker process maps the checkpoint once, so workers of one host share its memory. Results come
back in the order of the lines; the work of a worker that dies is done by another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from llama_np.checkpoint import load, load_tokenizer
from llama_np.config import Config
from llama_np.errors import require
from llama_np.generate import generate
from llama_np.options import check_standard_input
from llama_np.perplexity import Likelihood, score
from llama_np.prompt_cache import fingerprint
from llama_np.sampling import Sampling

CHUNK_LINES = 32
CHUNKS_PER_THREAD = 3  # sent ahead, so that no worker waits for the next chunk
RETRIES = 3

Result = dict[str, Any]


@lru_cache(maxsize=1)
def open_model(model: str, dtype: str) -> tuple[Any, Any, Any]:
    """Config, weights and tokenizer; loaded once per process."""
    config, weights = load(model, dtype)
    return config, weights, load_tokenizer(model)


@dataclass(frozen=True)
class Task:
    """Something to be done with every line: called with (number of the first line, lines)."""

    model: str
    dtype: str = "float32"

    def __call__(self, first: int, lines: Sequence[str]) -> list[Result]:
        """One result per line."""
        raise NotImplementedError

    def identity(self) -> str:
        """A hash of what is done, its options, and the model."""
        config, weights, _ = open_model(self.model, self.dtype)
        done = repr(replace(self, model=fingerprint(weights, config)))
        return hashlib.sha256(done.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ScoreTask(Task):
    """The likelihood of every line."""

    def __call__(self, first: int, lines: Sequence[str]) -> list[Result]:
        """One result per line: text, log_likelihood, tokens, perplexity; error if too long."""
        config, weights, tokenizer = open_model(self.model, self.dtype)
        rows = [tokenizer.encode(line) for line in lines]
        most = config.max_position_embeddings
        found = iter(score([row for row in rows if len(row) <= most], weights, config))
        return [
            scored(line, next(found)) if len(row) <= most else too_long(line, len(row), most)
            for line, row in zip(lines, rows, strict=True)
        ]


def scored(line: str, found: Likelihood) -> Result:
    """The result of a line that was scored."""
    perplexity = found.perplexity if found.token_count else None
    return {
        "text": line,
        "log_likelihood": found.log_likelihood,
        "tokens": found.token_count,
        "perplexity": perplexity,
    }


def too_long(line: str, length: int, most: int) -> Result:
    """The result of a line that no model with this context can score."""
    error = f"the line has {length} tokens, expected at most {most}"
    return {"text": line, "log_likelihood": None, "tokens": 0, "perplexity": None, "error": error}


@dataclass(frozen=True)
class GenerateTask(Task):
    """The completion of every line; line n draws with seed + n."""

    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    max_new_tokens: int = 256
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __call__(self, first: int, lines: Sequence[str]) -> list[Result]:
        """One result per line: prompt, text, token_ids, finish_reason, seed; error without room."""
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
                **no_room(len(done.prompt_token_ids), config),
            }
            for line, seed, done in zip(lines, seeds, completions, strict=True)
        ]


def no_room(length: int, config: Config) -> Result:
    """{"error": ...} for a prompt that fills the context, so that nothing follows it; else {}."""
    most = config.max_position_embeddings
    if length < most:
        return {}
    return {"error": f"the prompt has {length} tokens, the context {most}: nothing is generated"}


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


def identity(task: Task, scheduler: str | None = None) -> str:
    """What tells the results of a task from those of others; computed where the model is."""
    if scheduler is None:
        return task.identity()
    distributed = require("distributed", extra="dask")
    with distributed.Client(scheduler, set_as_default=False) as client:
        return str(client.submit(task.identity, pure=False).result())


def resume(path: str | os.PathLike[str], lines: Sequence[str], run: str) -> list[Result]:
    """The results in an interrupted output file; a torn last line is cut off.

    run: the `identity` of the task that goes on.
    Errors: ValueError, and the file stays as it is, if it holds anything but results of this
    task for these lines.
    """
    target = Path(path)
    content = target.read_bytes() if target.exists() else b""
    start = _beginning(run)
    *whole, torn = content.split(b"\n")
    for number, piece in enumerate(whole, 1):
        if not piece.startswith(start):
            raise ValueError(_foreign(path, number))
    if not (torn.startswith(start) or start.startswith(torn)):
        raise ValueError(_foreign(path, len(whole) + 1))
    answered = [json.loads(piece) for piece in whole]
    for number, (answer, line) in enumerate(zip(answered, lines, strict=False), 1):
        if answered_line(answer) != line:
            raise ValueError(f"{str(path)!r} answers another line {number}: use a new file")
    if len(answered) > len(lines):
        raise ValueError(f"{str(path)!r} answers {len(answered)} lines, there are {len(lines)}")
    if torn:
        os.truncate(target, len(content) - len(torn))
    return answered


def _beginning(run: str) -> bytes:
    """How every line of an output file begins."""
    return json.dumps({"run": run}).removesuffix("}").encode()


def _foreign(path: str | os.PathLike[str], number: int) -> str:
    return (
        f"{str(path)!r}, line {number}: not a result of this command with this model and these "
        "options: use a new file"
    )


def first_seed(path: str | os.PathLike[str] | None) -> int | None:
    """The seed that an interrupted output file was begun with, if there is one."""
    if path is None or not Path(path).exists():
        return None
    with open(path, encoding="utf-8", errors="replace") as file, suppress(ValueError):
        first = json.loads(file.readline())
        return first.get("seed") if isinstance(first, dict) else None
    return None


def answered_line(answer: Mapping[str, Any]) -> str:
    """The line of input that a result belongs to."""
    return str(answer.get("text") if "log_likelihood" in answer else answer.get("prompt"))


def append(path: str | os.PathLike[str], results: Sequence[Result], run: str) -> None:
    """Add results to an output file and make sure that they stay.

    Errors: OSError that names the file.
    """
    text = "".join(json.dumps({"run": run, **r}, ensure_ascii=False) + "\n" for r in results)
    try:
        with open(path, "ab") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(path)) from problem


def read_lines(name: str) -> list[str]:
    """The lines of a UTF-8 file, or of standard input for "-", that are not empty.

    Errors: ValueError for other bytes than text and if there is no line; OSError.
    """
    if name == "-":
        check_standard_input()
    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        lines = text_lines(content.decode("utf-8-sig"))  # Windows puts a mark before the text
    except UnicodeDecodeError as problem:
        number = content.count(b"\n", 0, problem.start) + 1
        raise ValueError(f"{name!r}, line {number}: not UTF-8 text") from None
    if not lines:
        raise ValueError(f"{name!r} holds no line of text")
    return lines


def text_lines(text: str) -> list[str]:
    """The lines of a text that are not empty; only line feeds end a line."""
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line]
