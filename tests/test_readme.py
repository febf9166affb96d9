"""Every command and every Python block of the README runs as it stands there."""

import base64
import json
import re
import shlex
from pathlib import Path

import pytest

from llama_np.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


SHELL, PYTHON, SESSION = "sh", "python", "text"


def blocks() -> list[tuple[str, str]]:
    """All code blocks, with their language, in the order in which they stand."""
    return re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def commands(language: str, block: str) -> list[tuple[str, set[int]]]:
    """Commands of a block and the exit codes to expect; a session shows findings, too.

    The two commands that install first are run by .ci/run itself.
    """
    if language == SHELL:
        lines = [line for line in block.splitlines() if line.startswith("llama-np ")]
        return [(line, {0}) for line in lines]
    lines = re.findall(r"^\$ (llama-np .*)$", block, re.MULTILINE)
    return [(line, {0, 1}) for line in lines]


def test_every_command_and_python_block_runs_in_the_order_in_which_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    count = 0
    for language, block in blocks():
        if language == PYTHON:
            exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own text
            continue
        for line, codes in commands(language, block):
            code = main(shlex.split(line)[1:])
            output = capsys.readouterr()
            assert code in codes, (line, output.err)
            assert "llama-np: error:" not in output.err
            count += 1
    assert count >= 11


def test_the_report_that_the_readme_shows_is_the_one_that_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The findings only: the last digits of errors depend on the machine."""
    shown = next(block for _, block in blocks() if "$ llama-np verify" in block)
    for finding in ("first divergence: model.rotary_emb.cos, position 1", "verdict: explained"):
        assert finding in shown
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, block in blocks():
        if language == PYTHON and "np.savez" not in block:
            exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own text
    assert main(["record", "--prompt", "Once upon a time", "-o", "golden.safetensors"]) == 0
    exec(next(b for lang, b in blocks() if lang == PYTHON and "np.savez" in b), names)  # noqa: S102
    capsys.readouterr()
    assert main(["explain", "golden.safetensors", "port.npz"]) == 0
    explained = capsys.readouterr().out
    assert "verdict: explained" in explained
    assert "rope_theta: residual" in explained
    assert main(["verify", "golden.safetensors", "port.npz"]) == 1
    assert "first divergence: model.rotary_emb.cos, position 1" in capsys.readouterr().out


def test_links_into_the_repository_resolve() -> None:
    targets = re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", README)
    local = [target for target, _ in targets if not target.startswith("http")]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target


def test_links_within_the_page_resolve() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor


def test_every_notebook_is_shown_with_one_of_its_own_figures() -> None:
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        number = notebook.name[:2]
        assert f'href="notebooks/{notebook.name}"' in README
        assert f'src="notebooks/images/{number}.png"' in README
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        figures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
        shown = (notebook.parent / "images" / f"{number}.png").read_bytes()
        assert shown in [base64.b64decode("".join(figure)) for figure in figures], number
