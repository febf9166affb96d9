"""The golden files that are shipped: true, small, and able to show mistakes; C reads them too."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from golden_models import SHIPPED

from llama_np.cli import main
from llama_np.experiment import FLOAT64, error, evaluate
from llama_np.mutation import mutation_scores
from llama_np.trace import load_golden, open_model, run_of, same_weights

DESIGNED = ("grouped", "biased", "llama3", "padded")
EVERY = (*DESIGNED, "fairytales")


def model_of(name: str) -> str:
    return name if name == "fairytales" else str(SHIPPED / name)


def test_all_golden_files_together_are_below_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 10_000_000


@pytest.mark.parametrize("name", EVERY)
def test_the_values_are_still_the_truth(name: str) -> None:
    golden = load_golden(SHIPPED / name / "golden.safetensors")
    _, weights = open_model(model_of(name))
    assert same_weights(golden, weights), "run reference_outputs/record_golden.py"
    trace, _ = evaluate(run_of(golden, weights), FLOAT64, frozenset(golden.tensors))
    for tensor, gold in golden.tensors.items():
        assert error(trace[tensor], gold) < 6e-8, tensor  # the values are stored as float32


@pytest.mark.parametrize("name", EVERY)
def test_detection_rates_are_as_published(name: str) -> None:
    published = json.loads((SHIPPED / "mutation_scores.json").read_text("utf-8"))[name]
    now = mutation_scores(SHIPPED / name / "golden.safetensors", model_of(name))
    for precision, scores in now.items():
        lost = set(scores["hidden"]) - set(published[precision]["hidden"])
        assert not lost, f"{name} no longer shows {lost} at {precision}"
        assert scores["score"] >= published[precision]["score"]


def test_together_the_files_show_every_mistake_in_float32() -> None:
    published = json.loads((SHIPPED / "mutation_scores.json").read_text("utf-8"))
    hidden = [set(published[name]["float32"]["hidden"]) for name in EVERY]
    assert not set.intersection(*hidden)
    assert min(published[name]["float32"]["score"] for name in EVERY) > 0.97


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "this test needs a C compiler: install cc, gcc or clang"
    program = tmp_path_factory.mktemp("c") / "golden_check"
    source = Path(__file__).parent / "golden_check.c"
    strict = ["-O2", "-Wall", "-Wextra", "-Werror"]
    command: list[str | Path] = [compiler, *strict, "-o", program, source, "-lm"]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def checked(checker: Path, *mistake: str) -> subprocess.CompletedProcess[str]:
    folder = SHIPPED / "grouped"
    files = [folder / "model.safetensors", folder / "golden.safetensors"]
    command: list[str | Path] = [checker, *files, *mistake]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_port_in_c_checks_itself_without_python(checker: Path) -> None:
    result = checked(checker)
    assert result.returncode == 0 and result.stdout.endswith("PASS\n"), result.stdout


@pytest.mark.parametrize("mistake", ["eps", "theta", "tile"])
def test_a_mistake_in_c_is_found_without_python(checker: Path, mistake: str) -> None:
    result = checked(checker, mistake)
    assert result.returncode == 1 and result.stdout.endswith("FAIL\n"), result.stdout


def test_the_commands_work_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, golden = str(SHIPPED / "biased"), str(tmp_path / "g.safetensors")
    assert main(["record", "-m", model, "--ids", "1,5,9,4", "--decode", "2", "-o", golden]) == 0
    capsys.readouterr()
    page = tmp_path / "report.html"
    assert main(["verify", golden, golden, "--json", "--html", str(page)]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass" and page.stat().st_size > 5000
    assert main(["replay", golden, "-m", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["faulty"] == []
    assert main(["explain", golden, golden, "-m", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "clean"


def test_the_commands_fail_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = str(SHIPPED / "biased" / "golden.safetensors")
    other = str(SHIPPED / "grouped" / "golden.safetensors")
    assert main(["verify", golden, other]) == 1
    assert "verdict: fail" in capsys.readouterr().out
    assert main(["explain", golden, golden, "-m", str(SHIPPED / "grouped")]) == 1
    assert main(["verify", other + "x", golden]) == 1
    assert main(["record", "--ids", "1", "-o", str(tmp_path / "no" / "g")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("llama-np: error: ") for line in lines)


def test_scalars_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = str(SHIPPED / "biased" / "golden.safetensors")
    model, log = str(SHIPPED / "biased"), tmp_path / "log.txt"
    ids = ",".join(map(str, load_golden(golden).tokens[0, :17].tolist()))
    command = ["record", "-m", model, "--ids", ids, "--decode", "5", "--scalars", "-o", str(log)]
    assert main(command) == 0
    assert main(["verify", "--scalars", golden, str(log)]) == 0
    log.write_text(log.read_text("utf-8").replace("lm_head 1 ", "lm_head 1 7"))
    assert main(["verify", "--scalars", golden, str(log)]) == 1
    assert "fail" in capsys.readouterr().out
