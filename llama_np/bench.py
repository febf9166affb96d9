"""How fast a model runs here, beside what this machine could do at best.

Decoding reads all weights once per step, so it is bound by memory: its limit is the bandwidth of
a row-vector product. Prefill is bound by arithmetic: its limit is the speed of a large matrix
product. Both limits are measured in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.cache import KVCache
from llama_np.checkpoint import expected_shapes, group_by_layer, load
from llama_np.config import Config, config_from_dict, config_to_dict
from llama_np.errors import require
from llama_np.generate import activation_dtype, prefill
from llama_np.memory import empty_in_one_block
from llama_np.model import ModelWeights, hidden_states, logits
from llama_np.precision import is_bf16, to_bf16
from llama_np.processor import processor_name
from llama_np.tap import stopwatch
from llama_np.threads import blas_name, blas_threads
from llama_np.workers import share_products

# Shapes of well-known models, to be measured with random weights.
SHAPES: dict[str, dict[str, Any]] = {
    "15M": {
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
DECODE_STEPS = 24

# Where a step's time goes, by the last part of the names of arrays.
PARTS = {
    "products": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
    "attention": "scores weights context",
    "rotation": "q_rot k_rot cos sin",
    "norms": "input_layernorm post_attention_layernorm norm",
    "activation": "act_fn hidden",
}
PART_OF = {name: part for part, names in PARTS.items() for name in names.split()}


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do: bytes per second of a row-vector product, FLOP/s of a product."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Measurement:
    """One workload: tokens per second, and at which rate it used what limits it.

    The rate of decoding is bytes of weights per second, that of a prompt FLOP/s.
    """

    workload: str
    batch: int
    tokens: int
    tokens_per_second: float
    rate: float

    def share_of_limit(self, ceilings: Ceilings) -> float:
        """Which share of the machine's limit the rate is."""
        decodes = self.workload == "decode"
        return self.rate / (ceilings.bytes_per_second if decodes else ceilings.flops_per_second)


def seconds(function: Callable[[], object], runs: int) -> float:
    """The median duration of several runs, after one that warms up."""
    function()
    durations = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


WIDTH = 2048  # of the matrix of the row-vector product
FEWEST_ROWS, MOST_ROWS = 11264, 65536
CEILINGS = """
import json, sys
from llama_np.bench import ceilings
from llama_np.threads import limit_threads
rows, threads = map(int, sys.argv[1:])
limit_threads(threads or None)
print(json.dumps(ceilings(rows)))
"""


def measure_ceilings(bytes_read: int) -> Ceilings:
    """Measure both limits in float32 with the threads that BLAS uses now.

    The matrix of the row-vector product is as large as the weights that a decoding step reads
    (92 to 537 MB), as smaller ones may lie in a cache where those do not. This is done in a process
    of its own, so that its arrays do not add to the memory that this one is said to take.
    """
    rows = min(max(bytes_read // (4 * WIDTH), FEWEST_ROWS), MOST_ROWS)
    arguments = [str(rows), str(blas_threads() or 0)]
    done = subprocess.run(
        [sys.executable, "-c", CEILINGS, *arguments], capture_output=True, text=True, check=True
    )
    return Ceilings(*json.loads(done.stdout))


def ceilings(rows: int) -> tuple[float, float]:
    """Bytes per second of a row-vector product with so many rows, FLOP/s of a square product."""
    random = np.random.default_rng(0)
    large = np.ones((rows, WIDTH), np.float32)
    row = random.standard_normal((1, WIDTH), np.float32)
    square = random.standard_normal((1536, 1536), np.float32)
    bandwidth = large.nbytes / seconds(lambda: row @ large.T, 15)
    return bandwidth, 2 * 1536**3 / seconds(lambda: square @ square, 7)


def best_of(a: Ceilings, b: Ceilings) -> Ceilings:
    """What the machine could do at one time or the other."""
    return Ceilings(
        max(a.bytes_per_second, b.bytes_per_second), max(a.flops_per_second, b.flops_per_second)
    )


def random_model(shape: str, dtype: str) -> tuple[Config, dict[str, Any]]:
    """A model of a well-known shape with random weights.

    They lie in one block of memory, as those of a checkpoint do. Of bfloat16 only matrices rest in
    two bytes.
    """
    sizes = {"max_position_embeddings": 8192, **SHAPES[shape]}
    config = config_from_dict(sizes)
    shapes = expected_shapes(config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    random = np.random.default_rng(0)
    kinds = {2: "u2", 1: "f4"} if dtype == "bfloat16" else {2: dtype, 1: dtype}
    arrays = empty_in_one_block({n: (s, np.dtype(kinds[len(s)])) for n, s in shapes.items()})
    for array in arrays.values():
        numbers = random.standard_normal(array.shape, np.float32) * np.float32(0.02)
        numbers += array.ndim == 1  # the weights of norms are about 1
        array[...] = to_bf16(numbers) if is_bf16(array) else numbers
    if config.tie_word_embeddings:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    return config, group_by_layer(arrays, config)


def weight_bytes(weights: ModelWeights) -> int:
    """Bytes that one decoding step reads: every weight once, but of the embedding one row."""
    arrays = {id(a): a for value in weights.values() for a in _arrays(value)}
    head, table = weights.get("lm_head.weight"), weights["model.embed_tokens.weight"]
    unread = 0 if head is table else table.nbytes
    score = weights.get("score.weight")
    return sum(a.nbytes for a in arrays.values()) - unread - (0 if score is None else score.nbytes)


def _arrays(value: Any) -> list[np.ndarray]:
    return list(value.values()) if isinstance(value, dict) else [value]


def prefill_operations(config: Config, weights: ModelWeights, tokens: int) -> int:
    """Multiplications and additions of the products that a prompt needs.

    In attention a token's query meets the keys and values up to its own; the head only sees the
    last token.
    """
    layers = sum(
        array.size
        for name, value in weights.items()
        if name.startswith("model.layers.")
        for array in _arrays(value)
    )
    seen = tokens * (tokens + 1) // 2  # pairs of a query and a key
    width = config.num_attention_heads * config.head_dim
    attention = config.num_hidden_layers * 2 * seen * width
    head: int = weights["lm_head.weight"].size
    return 2 * (layers * tokens + attention + head)


def measure(
    config: Config,
    weights: ModelWeights,
    batches: Sequence[int],
    prompts: Sequence[int],
    context: int,
) -> list[Measurement]:
    """Prefill of several lengths, and decoding at several batch sizes after `context` tokens."""
    found = []
    random = np.random.default_rng(1)
    for length in prompts:
        rows = random.integers(0, config.vocab_size, (1, length)).tolist()
        spent = seconds(partial(_prefill, rows, config, weights), 3)
        flops = prefill_operations(config, weights, length) / spent
        found.append(Measurement("prefill", 1, length, length / spent, flops))
    for batch in batches:
        spent = decode_seconds(config, weights, batch, context)
        rate = weight_bytes(weights) / spent
        found.append(Measurement("decode", batch, context, batch / spent, rate))
    return found


def _prefill(rows: list[list[int]], config: Config, weights: ModelWeights) -> np.ndarray:
    return prefill(rows, weights, config, KVCache(config, dtype=activation_dtype(weights)))


def decode_seconds(config: Config, weights: ModelWeights, batch: int, context: int) -> float:
    """The median duration of one decoding step."""
    random = np.random.default_rng(2)
    cache = KVCache(config, batch, dtype=activation_dtype(weights))
    rows = random.integers(0, config.vocab_size, (batch, context)).tolist()
    tokens = prefill(rows, weights, config, cache).argmax(axis=-1)[:, None]
    durations = []
    for _ in range(DECODE_STEPS):
        start = time.perf_counter()
        tokens = logits(hidden_states(tokens, weights, config, cache), weights).argmax(axis=-1)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[2:])


def profile(config: Config, weights: ModelWeights, batch: int, context: int) -> dict[str, float]:
    """Seconds of one decoding step by part: the mean of several steps.

    Weights that are multiplied together by worker processes count under the first one's name.
    "rest" are the embedding, the sums of the residual stream, and what lies between the layers.
    """
    random = np.random.default_rng(2)
    cache = KVCache(config, batch, dtype=activation_dtype(weights))
    rows = random.integers(0, config.vocab_size, (batch, context)).tolist()
    tokens = prefill(rows, weights, config, cache).argmax(axis=-1)[:, None]
    spent = dict.fromkeys([*PARTS, "rest"], 0.0)
    for step in range(DECODE_STEPS):
        by_name: dict[str, float] = {}
        tap = stopwatch(by_name)
        tokens = logits(hidden_states(tokens, weights, config, cache, tap=tap), weights, tap)
        tokens = tokens.argmax(axis=-1)
        if step >= 2:
            for name, seconds in by_name.items():
                part = PART_OF.get(name.rpartition(".")[2], "rest")
                spent[part] += seconds / (DECODE_STEPS - 2)
    return spent


def bench(
    model: str,
    dtype: str,
    batches: Sequence[int],
    prompts: Sequence[int],
    context: int,
    compare: str | None = None,
    processes: int | None = None,
    with_profile: bool = False,
) -> dict[str, Any]:
    """Everything that `llama-np bench` reports. `model` may be a shape such as "135M".

    compare: "transformers" measures the same workloads with that library, if it is installed.
    processes: how many share the products (`workers.share_products`).
    with_profile: say where the time of a decoding step goes.
    """
    start = time.perf_counter()
    config, weights = random_model(model, dtype) if model in SHAPES else load(model, dtype)
    loaded = time.perf_counter() - start
    most = config.max_position_embeddings
    if max([context + DECODE_STEPS, *prompts]) > most:
        raise ValueError(f"the model's context has {most} tokens: measure shorter texts")
    start = time.perf_counter()
    prefill([[1, 2, 3]], weights, config, KVCache(config, dtype=activation_dtype(weights)))
    first = time.perf_counter() - start
    before = measure_ceilings(weight_bytes(weights))
    with share_products(weights, processes) as used:
        found = measure(config, weights, batches, prompts, context)
        own = peak_memory()
        peak = None if own is None else own + sum(map(private_memory, active_children()))
        parts = [profile(config, weights, b, context) for b in batches if with_profile]
    after = measure_ceilings(weight_bytes(weights))
    limits = best_of(before, after)  # another program may have disturbed one
    report: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "machine": machine(),
        "ceilings": asdict(limits),
        "load_seconds": loaded,
        "first_token_seconds": first,
        "processes": used,
        "peak_memory_bytes": peak,
        "measurements": [asdict(m) | {"share_of_limit": m.share_of_limit(limits)} for m in found],
    }
    if with_profile:
        report["profile"] = dict(zip(batches, parts, strict=True))
    if compare is not None:
        report[compare] = compare_transformers(config, dtype, batches, prompts, context)
    return report


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas_name(),
    }


def peak_memory() -> int | None:
    """The most memory that this process has occupied so far, in bytes; None on Windows."""
    try:
        import resource  # POSIX only
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def private_memory(process: BaseProcess) -> int:
    """Bytes that a worker process occupies and shares with no other process (Linux)."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text("ascii")
    fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
    return sum(1024 * int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))


PEER = """
import json, statistics, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
task = json.loads(sys.stdin.read())
config = LlamaConfig(**task["config"])
dtype = getattr(torch, task["dtype"])
model = LlamaForCausalLM(config).eval().to(dtype)
found = []
with torch.inference_mode():
    for length in task["prompts"]:
        ids = torch.randint(0, config.vocab_size, (1, length))
        times = []
        for _ in range(4):
            start = time.perf_counter(); model(ids, use_cache=True)
            times.append(time.perf_counter() - start)
        found.append(["prefill", 1, length, length / statistics.median(times[1:])])
    for batch in task["batches"]:
        ids = torch.randint(0, config.vocab_size, (batch, task["context"]))
        past = model(ids, use_cache=True).past_key_values
        times, token = [], ids[:, :1]
        for _ in range(task["steps"]):
            start = time.perf_counter()
            out = model(token, past_key_values=past, use_cache=True)
            past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
        found.append(["decode", batch, task["context"], batch / statistics.median(times[2:])])
print(json.dumps(found))
"""


def compare_transformers(
    config: Config, dtype: str, batches: Sequence[int], prompts: Sequence[int], context: int
) -> list[dict[str, Any]]:
    """The same workloads with transformers and random weights, in a process of its own.

    Errors: ModuleNotFoundError if transformers is not installed; RuntimeError if it fails.
    """
    if find_spec("transformers") is None or find_spec("torch") is None:
        raise ModuleNotFoundError("the comparison needs: pip install transformers torch")
    values = {k: v for k, v in config_to_dict(config).items() if not k.endswith("label")}
    task = {
        "config": values,
        "dtype": dtype,
        "batches": list(batches),
        "prompts": list(prompts),
        "context": context,
        "steps": DECODE_STEPS,
    }
    done = subprocess.run(
        [sys.executable, "-c", PEER],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"transformers failed: {done.stderr.strip().splitlines()[-1]}")
    names = ("workload", "batch", "tokens", "tokens_per_second")
    return [dict(zip(names, row, strict=True)) for row in json.loads(done.stdout)]


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table with the machine's name."""
    limits = report["ceilings"]
    name = report["machine"]
    bandwidth, flops = limits["bytes_per_second"] / 1e9, limits["flops_per_second"] / 1e9
    first, peak = report["first_token_seconds"] * 1e3, report["peak_memory_bytes"]
    memory = "unknown" if peak is None else f"{peak / 1e6:.0f} MB"
    where = f"{name['processor']}, {name['cores']} cores, NumPy {name['numpy']}"
    where += f", {name['blas']}" if name["blas"] else ""
    where += f", {report['processes']} processes" if report["processes"] > 1 else ""
    lines = [
        f"{report['model']} {report['dtype']} on {where}",
        f"limits: {bandwidth:.1f} GB/s, {flops:.0f} GFLOP/s",
        f"first token {first:.0f} ms; peak memory {memory}",
        "",
    ]
    peer = {
        (row["workload"], row["batch"], row["tokens"]): row["tokens_per_second"]
        for row in report.get("transformers", [])
    }
    lines.append("| workload | batch | tokens/s | of the limit |" + (" ratio |" if peer else ""))
    lines.append("| --- | --- | --- | --- |" + (" --- |" if peer else ""))
    for row in report["measurements"]:
        speed = row["tokens_per_second"]
        cells = f"| {row['workload']} {row['tokens']} | {row['batch']} | {speed:.1f} "
        cells += f"| {row['share_of_limit']:.0%} |"
        if peer:
            cells += f" {speed / peer[row['workload'], row['batch'], row['tokens']]:.2f}x |"
        lines.append(cells)
    for batch, spent in report.get("profile", {}).items():
        total = sum(spent.values())
        shares = ", ".join(f"{part} {s / total:.0%}" for part, s in spent.items())
        lines.append(f"\na step for {batch}, {total * 1e3:.1f} ms: {shares}")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: str) -> None:
    """Draw the workloads under the machine's roofline: reuse of each weight against speed."""
    pyplot = require("matplotlib.pyplot", extra="notebooks")
    limits = report["ceilings"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    reuse = np.geomspace(0.25, 512, 200)  # FLOP per byte of float32 weights is rows / 2
    roof = np.minimum(reuse * limits["bytes_per_second"], limits["flops_per_second"])
    axes.loglog(reuse, roof / 1e9, color="#6B7280", label="limit of this machine")
    for row in report["measurements"]:
        rows = row["batch"] if row["workload"] == "decode" else row["tokens"]
        bound = min(rows / 2 * limits["bytes_per_second"], limits["flops_per_second"])
        marker = "o" if row["workload"] == "decode" else "s"
        speed = row["share_of_limit"] * (
            rows / 2 * limits["bytes_per_second"]
            if row["workload"] == "decode"
            else limits["flops_per_second"]
        )
        axes.loglog(rows / 2, speed / 1e9, marker, color="#0072B2")
        label = f"{row['workload']} {rows}: {speed / bound:.0%}"
        axes.annotate(label, (rows / 2, speed / 1e9), xytext=(6, -10), textcoords="offset points")
    axes.set_xlabel("operations per byte of weights")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{report['model']} {report['dtype']}: how close to the limits", loc="left")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
