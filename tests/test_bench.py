"""The benchmark measures what it says; no speed is asserted."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_np import hidden_states, load, logits
from llama_np.bench import (
    PART_OF,
    PARTS,
    SHAPES,
    Ceilings,
    Measurement,
    best_of,
    measure,
    measure_ceilings,
    prefill_operations,
    random_model,
    table,
    weight_bytes,
)
from llama_np.checkpoint import expected_shapes
from llama_np.cli import main
from llama_np.tap import record
from llama_np.threads import blas_threads


def test_a_step_reads_every_weight_once_and_a_tied_table_as_the_head() -> None:
    config, weights = load("fairytales")
    sizes = {name: int(np.prod(s)) for name, s in expected_shapes(config).items()}
    read = sum(sizes.values()) - sizes["lm_head.weight"] - sizes["score.weight"]
    assert weight_bytes(weights) == 4 * read


def test_a_prompt_needs_the_layers_per_token_attention_per_pair_and_the_head_once() -> None:
    config, weights = load("fairytales")
    sizes = {name: int(np.prod(s)) for name, s in expected_shapes(config).items()}
    layers = sum(size for name, size in sizes.items() if name.startswith("model.layers."))
    pairs = 1 + 2 + 3 + 4 + 5  # a token attends to itself and to those before
    attention = config.num_hidden_layers * pairs * 2 * config.num_attention_heads * config.head_dim
    expected = 2 * (5 * layers + attention + sizes["lm_head.weight"])
    assert prefill_operations(config, weights, 5) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_random_models_of_known_shapes_run(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**SHAPES["15M"], "hidden_size": 24, "intermediate_size": 40, "vocab_size": 101}
    monkeypatch.setitem(SHAPES, "15M", small)
    config, weights = random_model("15M", dtype)
    scores = logits(hidden_states(np.array([[1, 2, 3]]), weights, config), weights)
    assert scores.dtype == (np.float64 if dtype == "float64" else np.float32)
    found = measure(config, weights, [1, 3], [5], 4)
    assert [(m.workload, m.batch, m.tokens) for m in found] == [
        ("prefill", 1, 5),
        ("decode", 1, 4),
        ("decode", 3, 4),
    ]
    assert all(m.tokens_per_second > 0 and m.rate > 0 for m in found)


def test_a_prompt_is_bound_by_arithmetic_and_decoding_by_memory() -> None:
    ceilings = best_of(Ceilings(200.0, 30.0), Ceilings(100.0, 40.0))
    assert Measurement("prefill", 1, 5, 1.0, 10.0).share_of_limit(ceilings) == 10 / 40
    assert Measurement("decode", 2, 5, 1.0, 10.0).share_of_limit(ceilings) == 10 / 200


def test_every_array_of_a_layer_but_the_sums_belongs_to_a_part() -> None:
    config, weights = load("fairytales")
    trace: dict[str, np.ndarray] = {}
    hidden = hidden_states(np.array([[1, 2]]), weights, config, tap=record(trace))
    logits(hidden, weights, tap=record(trace))
    last = {name.rpartition(".")[2] for name in trace}
    layers = {str(i) for i in range(config.num_hidden_layers)}
    # the last two are other names of o_proj and down_proj
    assert last - set(PART_OF) == {*layers, "embed_tokens", "middle", "self_attn", "mlp"}
    assert set(PART_OF) <= last


def test_the_command_prints_a_table_a_json_object_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "bench --batch 1 2 --prompt-tokens 8 --context 4 --profile".split()
    assert main([*options, "--json", "--plot", str(tmp_path / "roof.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["workload"] for row in report["measurements"]} == {"prefill", "decode"}
    assert report["peak_memory_bytes"] > 1e7
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    for batch in ("1", "2"):
        assert set(report["profile"][batch]) == {*PARTS, "rest"}
        assert min(report["profile"][batch].values()) > 0
    text = table(report | {"transformers": report["measurements"]})
    assert "a step for 2, " in text
    assert text.count("1.00x") == 3


@pytest.mark.parametrize(
    ("bytes_read", "rows"), [(0, 11264), (8192 * 20_000, 20_000), (10**12, 65536)]
)
def test_bandwidth_is_measured_with_as_many_bytes_as_the_weights_within_limits(
    bytes_read: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="[2.0, 3.0]")

    monkeypatch.setattr(subprocess, "run", run)
    assert measure_ceilings(bytes_read) == Ceilings(2.0, 3.0)
    assert commands[0][-2:] == [str(rows), str(blas_threads() or 0)]


def test_limits_are_measured_in_another_process() -> None:
    found = measure_ceilings(0)
    assert found.bytes_per_second > 0 and found.flops_per_second > 0
