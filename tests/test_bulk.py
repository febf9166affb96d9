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
    bulk.append(file, [{"prompt": line, "text": f"\x0b{line}\x1e"} for line in lines], "me")
    assert [answer["prompt"] for answer in resume(file, lines, "me")] == lines


def test_a_file_with_other_answers_is_not_continued(tmp_path: Path) -> None:
    file = tmp_path / "answers"
    bulk.append(file, ScoreTask("fairytales")(0, ["another line"]), "me")
    with pytest.raises(ValueError, match="another line 1"):
        resume(file, LINES, "me")
    with pytest.raises(ValueError, match="there are 0"):
        resume(file, [], "me")
    with pytest.raises(ValueError, match="answers', line 1: not a result of this command"):
        resume(file, ["another line"], "you")


@pytest.mark.parametrize("content", ["remember to call mum", '{"mine": 1}', "[1]\n", '{"run": "u'])
def test_a_foreign_file_is_refused_and_stays_as_it_is(tmp_path: Path, content: str) -> None:
    file = tmp_path / "foreign"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="foreign', line 1: not a result of this command"):
        resume(file, LINES, "me")
    assert file.read_text("utf-8") == content


def test_every_option_and_the_model_tell_runs_apart() -> None:
    tasks = [
        ScoreTask("fairytales"),
        ScoreTask("fairytales", "float64"),
        GenerateTask("fairytales"),
        GenerateTask("fairytales", seed=1),
        GenerateTask("fairytales", max_new_tokens=3),
        GenerateTask("fairytales", sampling=Sampling(temperature=0.5)),
        GenerateTask("fairytales", stop_strings=("a",)),
    ]
    assert len({bulk.identity(task) for task in tasks}) == len(tasks)
    folder = Path(bulk.__file__).parent / "checkpoints" / "fairytales"
    assert bulk.identity(ScoreTask(str(folder))) == bulk.identity(tasks[0])  # the same weights


def test_a_drawn_seed_is_kept_when_a_file_is_completed(tmp_path: Path) -> None:
    source, complete, torn = (tmp_path / name for name in ("lines", "complete", "torn"))
    source.write_text("\n".join(LINES[:16]), encoding="utf-8")
    command = ["generate", "--prompts", str(source), "-n", "3", "--temp", "1", "-o"]
    assert main([*command, str(complete)]) == 0
    content = complete.read_bytes()
    torn.write_bytes(content[: len(content) // 2])
    assert main([*command, str(torn)]) == 0
    seeds = [json.loads(line)["seed"] for line in torn.read_text("utf-8").splitlines()]
    assert seeds == list(range(seeds[0], seeds[0] + 16))
    assert main([*command, str(torn), "--seed", str(seeds[0] + 1)]) == 1


def test_a_line_that_is_too_long_costs_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, found = tmp_path / "lines", tmp_path / "found"
    source.write_text("\n".join([LINES[0], "so " * 600, LINES[1]]), encoding="utf-8")
    for _ in range(2):  # the second time, everything is there
        assert main(["score", str(source), "-o", str(found)]) == 1
        assert "result 2: the line has 602 tokens, expected at most 512" in capsys.readouterr().err
    results = [json.loads(line) for line in found.read_text("utf-8").splitlines()]
    assert [r["log_likelihood"] is None for r in results] == [False, True, False]
    for way in ([], ["-o", str(tmp_path / "told")]):
        assert main(["generate", "--prompts", str(source), "-n", "1", *way]) == 1
        assert "result 2: the prompt has 602 tokens" in capsys.readouterr().err


def test_the_summary_of_a_completed_file_is_about_all_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, found = tmp_path / "lines", tmp_path / "found"
    source.write_text("\n".join(LINES), encoding="utf-8")
    main(["score", str(source), "-o", str(found)])
    first = capsys.readouterr().err
    found.write_text("".join(found.read_text("utf-8").splitlines(True)[:9]), encoding="utf-8")
    main(["score", str(source), "-o", str(found)])
    assert capsys.readouterr().err == "9 lines were done before\n" + first


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
