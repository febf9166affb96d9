"""Bulk work gives the same results in chunks, after an interruption, and on a cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_bulk import Fit, errors, fit, share
from systems import POSIX

from llama_np import bulk
from llama_np.bulk import GenerateTask, ScoreTask, resume, run
from llama_np.cli import main
from llama_np.sampling import Sampling

LINES = [f"The king had {n} sons" for n in range(40)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK_LINES", 7)


def test_chunks_change_nothing() -> None:
    task = GenerateTask("fairytales", "float64", Sampling(temperature=1.0), 5, max_new_tokens=3)
    whole = task(0, LINES[:9])
    parts = [result for chunk in run(task, LINES[:9]) for result in chunk]
    assert parts == whole


def test_an_interrupted_file_is_completed_and_a_torn_line_is_done_again(tmp_path: Path) -> None:
    source, complete, torn = (tmp_path / name for name in ("lines", "complete", "torn"))
    source.write_text("\n".join(LINES), encoding="utf-8")
    assert main(["score", str(source), "-o", str(complete)]) == 0
    content = complete.read_bytes()
    torn.write_bytes(content[: len(content) // 2])
    assert main(["score", str(source), "-o", str(torn)]) == 0
    before, after = (path.read_text("utf-8").splitlines() for path in (complete, torn))
    for one, other in zip(before, after, strict=True):
        a, b = json.loads(one), json.loads(other)
        assert a["text"] == b["text"]
        assert a["log_likelihood"] == pytest.approx(b["log_likelihood"], rel=1e-5)  # float32


def test_separators_of_lines_inside_an_answer_end_no_line(tmp_path: Path) -> None:
    file = tmp_path / "answers"
    lines = ["one\u2028line", "another\x85line"]
    bulk.append(file, [{"prompt": line, "text": f"\x0b{line}\x1e"} for line in lines])
    assert resume(file, lines) == 2


def test_a_file_with_other_answers_is_not_continued(tmp_path: Path) -> None:
    file = tmp_path / "answers"
    bulk.append(file, ScoreTask("fairytales")(0, ["another line"]))
    with pytest.raises(ValueError, match="another line 1"):
        resume(file, LINES)
    with pytest.raises(ValueError, match="there are 0"):
        resume(file, [])


CLUSTER = """
import os, signal, sys, threading, time
from distributed import Client, LocalCluster
from llama_np import bulk
from llama_np.bulk import GenerateTask, run

if __name__ == "__main__":
    bulk.CHUNK_LINES = 2
    lines = [f"The king had {n} sons" for n in range(40)]
    task = GenerateTask("fairytales", "float64", max_new_tokens=12)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        victim = next(iter(cluster.workers.values())).pid
        found = []
        for chunk in run(task, lines, scheduler=cluster.scheduler_address):
            found += chunk
            if len(found) == 6:
                os.kill(victim, signal.SIGKILL)
    alone = [result for chunk in run(task, lines) for result in chunk]
    assert found == alone, "the cluster's results differ"
    print("equal", len(found))
"""


@POSIX
def test_a_killed_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "equal 40", done.stderr


def test_the_fit_of_the_benchmark_finds_the_start_and_the_cost_per_line() -> None:
    known = Fit(0.5, 0.004)
    times = {case: known.predict(*case) for case in [(64, 1), (64, 2), (640, 1), (640, 2)]}
    found = fit(times)
    assert (found.start, found.per_line) == pytest.approx((0.5, 0.004))  # float64
    assert errors(found, times) == pytest.approx([0.0] * 4, abs=1e-12)
    assert errors(Fit(1.0, 0.008), times) == pytest.approx([1.0] * 4)  # twice the truth


def test_the_benchmark_computes_with_whole_chunks_and_one_sender() -> None:
    cases = [(10, 1), (320, 1), (320, 2), (320, 4), (320, 16)]
    assert [share(*case) for case in cases] == [10, 320, 160, 96, 32]
    known = Fit(0.5, 0.004, coordination=0.001)
    assert known.predict(3200, 2) == pytest.approx(0.5 + 1600 * 0.004)
    assert known.predict(3200, 50) == pytest.approx(0.5 + 3200 * 0.001)
