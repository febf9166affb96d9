"""How the cost of many lines grows: `python tests/bench_bulk.py`.

Times `llama-np score` as a whole, from the start of the process to its end, with models of random
weights: alone, with one dask worker, and with two, each with one thread of BLAS. The workers run
already and have opened the model. Prints Markdown. Run it on a machine that does nothing else and
has two cores; it takes about four minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_np import LlamaForCausalLM, Sampling, generate, load, load_tokenizer
from llama_np.bench import machine
from llama_np.bulk import CHUNK_LINES, Result, Task, append, run
from llama_np.checkpoint import locate
from llama_np.config import Config
from llama_np.errors import require

# Changes to the shape of the bundled model, and how many times the lines of `--lines` it scores.
MODELS: tuple[tuple[dict[str, int], int], ...] = (
    ({}, 4),
    (
        {
            "hidden_size": 480,
            "intermediate_size": 1280,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
        2,
    ),
    (
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 10,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
        1,
    ),
)
LINES = (64, 192, 384)  # multiples of two chunks, so that two workers get the same share
NEW_TOKENS = 34  # they make lines of 33 tokens on average, the first one included
DISTINCT_LINES = 128
MANY_LINES = 100_000
MEASURED = (1, 2)  # workers
COMPUTED = (4, 8, 16)
ONE_THREAD = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def share(lines: int, workers: int) -> int:
    """The lines of the busiest worker: it takes whole chunks."""
    chunks = -(-lines // CHUNK_LINES)
    return min(lines, CHUNK_LINES * -(-chunks // workers))


@dataclass(frozen=True)
class Fit:
    """seconds = start + share x per_line, where share is lines / workers in whole chunks.

    coordination: seconds per line that the sending process needs, however many workers there are.
    """

    start: float
    per_line: float
    coordination: float = 0.0

    def predict(self, lines: int, workers: int) -> float:
        """Seconds for so many lines."""
        return self.start + max(share(lines, workers) * self.per_line, lines * self.coordination)


Times = dict[tuple[int, int], float]  # seconds by (lines, workers)


def fit(times: Times) -> Fit:
    """The start and the cost per line with the smallest squares of relative errors."""
    seconds = np.array(list(times.values()))
    rows = np.array([[1.0, share(*case)] for case in times])
    solution = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    return Fit(*solution.tolist())


def errors(found: Fit, times: Times) -> list[float]:
    """How far each prediction is off, as a share of what was measured."""
    return [abs(found.predict(*case) / seconds - 1) for case, seconds in times.items()]


def write_checkpoint(folder: Path, changes: dict[str, int]) -> int:
    """A model of random weights with the tokenizer of fairytales: the number of its parameters."""
    config: Config = replace(load("fairytales")[0], **changes)  # type: ignore[arg-type]
    LlamaForCausalLM(config, seed=0).save_pretrained(folder)
    for file in locate("fairytales").glob("*token*"):
        shutil.copy(file, folder)
    matrices: dict[int, int] = {}
    for value in load(folder)[1].values():
        for array in value.values() if isinstance(value, dict) else [value]:
            matrices[id(array)] = array.size
    return sum(matrices.values())


def make_lines() -> list[str]:
    """What the bundled model makes up, each text on one line."""
    config, weights = load("fairytales")
    tokenizer = load_tokenizer("fairytales")
    texts = generate(
        [tokenizer.encode("")] * DISTINCT_LINES,
        weights,
        config,
        max_new_tokens=NEW_TOKENS,
        sampling=Sampling(temperature=1.0),
        seeds=range(DISTINCT_LINES),
        tokenizer=tokenizer,
    )
    return [" ".join(done.text.split()) or "a" for done in texts]


@contextmanager
def cluster(workers: int, folder: Path) -> Iterator[str]:
    """A dask scheduler with so many worker processes of one thread: its address."""
    distributed = require("distributed", extra="dask")
    command = [sys.executable, "-m", "dask", "worker", "--no-nanny", "--no-dashboard"]
    command += ["--nthreads", "1", "--local-directory", str(folder)]
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0") as scheduler:
        address = scheduler.scheduler_address
        processes = [
            subprocess.Popen([*command, address], env=ONE_THREAD, stderr=subprocess.DEVNULL)
            for _ in range(workers)
        ]
        try:
            with distributed.Client(address, set_as_default=False) as client:
                client.wait_for_workers(workers, timeout=60)
            yield address
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


def score_seconds(model: Path, text: Path, scheduler: str | None) -> float:
    """The wall time of `llama-np score`."""
    output = text.with_suffix(".jsonl")
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "llama_np", "score", str(text), "--model", str(model)]
    command += ["-o", str(output)]
    command += [] if scheduler is None else ["--scheduler", scheduler]
    start = time.perf_counter()
    subprocess.run(command, env=ONE_THREAD, check=True, capture_output=True)
    spent = time.perf_counter() - start
    wanted, found = (len(path.read_text("utf-8").splitlines()) for path in (text, output))
    if wanted != found:
        raise RuntimeError(f"{found} answers to {wanted} lines")
    return spent


def write_text(path: Path, lines: Sequence[str], count: int) -> Path:
    """A file of so many lines; they repeat, which makes no difference to `score`."""
    path.write_text("\n".join(lines[i % len(lines)] for i in range(count)), encoding="utf-8")
    return path


@dataclass(frozen=True)
class NoWork(Task):
    """Answers of the usual size, at once."""

    def __call__(self, first: int, lines: Sequence[str]) -> list[Result]:
        """One result per line."""
        answer = {"log_likelihood": -100.25, "tokens": 32, "perplexity": 22.5}
        return [{"text": line, **answer} for line in lines]


def coordination_seconds(scheduler: str, lines: Sequence[str], output: Path) -> float:
    """Seconds per line of sending, collecting and writing, with workers that do nothing."""
    many = [lines[i % len(lines)] for i in range(250 * CHUNK_LINES)]
    chunks = run(NoWork("none"), many, scheduler=scheduler)
    next(chunks)  # the connection is the start's cost
    start = time.perf_counter()
    for chunk in chunks:
        append(output, chunk, "none")
    return (time.perf_counter() - start) / (len(many) - CHUNK_LINES)


@dataclass(frozen=True)
class Measured:
    """One model: its parameters, and the times alone and with workers."""

    parameters: int
    alone: Times
    workers: Times


def measure(
    model: Path, parameters: int, counts: Sequence[int], lines: Sequence[str], addresses: list[str]
) -> Measured:
    """Every number of lines alone and with each cluster, in turn."""
    text = model / "lines.txt"
    for address in addresses:  # every worker opens the model
        score_seconds(model, write_text(text, lines, 2 * CHUNK_LINES), address)
    found = Measured(parameters, {}, {})
    for count in counts:
        write_text(text, lines, count)
        found.alone[count, 1] = score_seconds(model, text, None)
        for workers, address in zip(MEASURED, addresses, strict=True):
            found.workers[count, workers] = score_seconds(model, text, address)
    return found


def time_table(models: Sequence[Measured], coordination: float) -> str:
    """Seconds: measured, and computed from the fit."""
    columns = ["parameters", "lines", "no dask"]
    columns += [f"{n} worker{'s' * (n > 1)}" for n in MEASURED]
    columns += [f"*computed: {n} workers*" for n in COMPUTED]
    rows = []
    for model in models:
        alone, with_dask = fits(model, coordination)
        for count, _ in model.alone:
            measured = [model.alone[count, 1], *(model.workers[count, n] for n in MEASURED)]
            computed = [with_dask.predict(count, n) for n in COMPUTED]
            cells = [f"{s:.1f} s" for s in measured] + [f"*{s:.1f} s*" for s in computed]
            rows.append([f"{model.parameters / 1e6:.1f} M", f"{count:,}", *cells])
        computed = [alone.predict(MANY_LINES, 1)]
        computed += [with_dask.predict(MANY_LINES, n) for n in (*MEASURED, *COMPUTED)]
        cells = [f"*{s:,.0f} s*" for s in computed]
        rows.append([f"{model.parameters / 1e6:.1f} M", f"*computed: {MANY_LINES:,}*", *cells])
    return markdown(columns, rows)


def fits(model: Measured, coordination: float) -> tuple[Fit, Fit]:
    """How the time grows alone, and with dask."""
    return fit(model.alone), replace(fit(model.workers), coordination=coordination)


def fit_table(models: Sequence[Measured], coordination: float) -> str:
    """What was fitted, and how well it predicts what was measured."""
    columns = ["parameters", "", "start", "per line", "per line and million parameters"]
    columns += ["fit off by (mean, most)"]
    rows = []
    for model in models:
        names, measured = ("no dask", "dask"), (model.alone, model.workers)
        for name, found, times in zip(names, fits(model, coordination), measured, strict=True):
            millions, off = model.parameters / 1e6, errors(found, times)
            cells = [f"{millions:.1f} M", name, f"{found.start:.2f} s"]
            cells += [f"{found.per_line * 1e3:.2f} ms", f"{found.per_line * 1e3 / millions:.2f} ms"]
            rows.append([*cells, f"{sum(off) / len(off):.1%}, {max(off):.1%}"])
    return markdown(columns, rows)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(
    models: Sequence[Measured], coordination: float, tokens: float, name: dict[str, Any]
) -> str:
    """Both tables, with what they mean."""
    return f"""\
`llama-np score`, lines of {tokens:.0f} tokens, float32, one BLAS thread in each process;
{name["processor"]}, {name["cores"]} cores, NumPy {name["numpy"]}. Computed figures are in italics.

{time_table(models, coordination)}

seconds = start + lines / workers x seconds per line, in whole chunks of {CHUNK_LINES} lines:

{fit_table(models, coordination)}

Sending, collecting and writing take {coordination * 1e3:.2f} ms per line, which bounds the computed
times from below; they also assume a core for each worker."""


def main() -> None:
    """Measure every model and print the tables."""
    parser = argparse.ArgumentParser(description="how the cost of many lines grows")
    parser.add_argument("--lines", type=int, nargs="+", default=LINES, metavar="N")
    base: list[int] = parser.parse_args().lines
    lines = make_lines()
    tokenizer = load_tokenizer("fairytales")
    tokens = sum(len(tokenizer.encode(line)) for line in lines) / len(lines)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with cluster(1, folder) as one, cluster(2, folder) as two:
            coordination = coordination_seconds(two, lines, folder / "answers")
            for number, (changes, factor) in enumerate(MODELS):
                model = folder / str(number)
                parameters = write_checkpoint(model, changes)
                counts = [factor * count for count in base]
                found.append(measure(model, parameters, counts, lines, [one, two]))
    print(report(found, coordination, tokens, machine()))


if __name__ == "__main__":
    main()
