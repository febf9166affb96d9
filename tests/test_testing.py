"""The assertion for test suites of ports, and the example that shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_models import SHIPPED, dump, golden, mistaken, plain, tiny

from llama_np.errors import VerificationError
from llama_np.testing import assert_matches_golden

PORT = """
from llama_np.experiment import FLOAT32, evaluate
from llama_np.mistakes import BY_ID, variants
from llama_np.trace import load_golden, open_model, run_of

def dump(tokens):
    run = run_of(load_golden("golden.safetensors"), open_model("./model")[1])
    return evaluate({run}, FLOAT32)[0]
"""


def blocks(kind: str) -> list[str]:
    text = (SHIPPED / "README.md").read_text("utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


def outcome(folder: Path, run: str) -> subprocess.CompletedProcess[str]:
    """The example of the README, with a port that computes this run."""
    shutil.copytree(SHIPPED / "grouped", folder / "model")
    shutil.move(folder / "model" / "golden.safetensors", folder)
    (example,) = (block for block in blocks("python") if "test_my_port" in block)
    (folder / "test_my_port.py").write_text(example, "utf-8")
    (folder / "my_port.py").write_text(PORT.replace("{run}", run), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_port.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_example_passes_with_a_right_port(tmp_path: Path) -> None:
    done = outcome(tmp_path, "run")
    assert done.returncode == 0, done.stdout


def test_the_example_fails_as_the_readme_shows(tmp_path: Path) -> None:
    done = outcome(tmp_path, 'variants(BY_ID["act_gelu"], run)[0]')
    assert done.returncode == 1
    (shown,) = (block for block in blocks("text") if "act_gelu" in block)
    for line in shown.strip().splitlines():
        assert line in done.stdout.replace("E   ", "").replace("    ", "")


def test_a_right_dump_gives_its_report() -> None:
    report = assert_matches_golden(dump(plain()), golden(), tiny())
    assert report.verdict == "pass" and len(report.findings) == 66


def test_without_a_model_the_place_is_named() -> None:
    with pytest.raises(VerificationError, match=r"^model.layers.0.middle is the first wrong"):
        assert_matches_golden(mistaken("residual_missing"), golden())


def test_other_bugs_are_called_unexplained() -> None:
    changed = plain().with_ops(mlp__hidden=lambda array, place: array.clip(-0.1, 0.1))
    message = "no known mistake explains it: unexplained\nfaulty ops: model.layers.0.mlp.hidden, "
    with pytest.raises(VerificationError, match=message):
        assert_matches_golden(dump(changed), golden(), tiny())


def test_dumps_with_nothing_to_compare_fail() -> None:
    for arrays in ({}, {"what": np.ones(3, np.float32)}, {"input_ids": np.array([[1, 2, 3]])}):
        with pytest.raises(VerificationError, match=r"token ids|nothing in common"):
            assert_matches_golden(arrays, golden(), tiny())
