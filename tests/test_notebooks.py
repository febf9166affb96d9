"""The course runs from top to bottom, and what it shows is what the code prints today.

Every notebook is executed in this process, without a kernel. After a change that alters what a
notebook prints, store its outputs again:

    jupyter nbconvert --to notebook --execute --inplace notebooks/NAME.ipynb
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

from llama_np.threads import blas_threads, set_blas_threads

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
CPU_SECONDS = 20.0

Cell = dict[str, Any]


@dataclass(frozen=True)
class Ran:
    """What a cell printed and returned, as text, and whether it returned a figure."""

    text: str
    drew: bool


def cells_of(path: Path, kind: str) -> list[Cell]:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def source_of(cell: Cell) -> str:
    return "".join(cell["source"])


def run_cell(source: str, namespace: dict[str, Any]) -> Ran:
    """Execute a cell as a notebook does: the value of a last expression is shown."""
    tree = ast.parse(source)
    quiet = source.rstrip().endswith(";")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value = None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec", dont_inherit=True), namespace)  # noqa: S102
        if isinstance(last, ast.Expr):
            expression = ast.Expression(last.value)
            value = eval(compile(expression, "<cell>", "eval", dont_inherit=True), namespace)
    shown = "" if quiet or value is None else repr(value)
    return Ran(f"{printed.getvalue()}\n{shown}", isinstance(value, Figure) and not quiet)


def stored_text(cell: Cell) -> str:
    """What the notebook file says that the cell printed and returned."""
    text = ""
    for output in cell["outputs"]:
        if output["output_type"] == "stream":  # may be cut anywhere into several
            text += "".join(output["text"])
        else:
            text += "\n" + "".join(output["data"].get("text/plain", [])) + "\n"
    return text


# Rounded numbers; whole numbers, such as token ids and shapes, are text like any other.
ROUNDED = re.compile(r"\d+(?:\.\d+)?e[+-]\d+|\d+\.\d+|\d+(?=%)")


def same_text(one: str, other: str) -> bool:
    """Equal but for white space, and for one step in the last digit of rounded numbers.

    Another BLAS sums in another order, so a number close to a rounding limit may tip over.
    """
    if ROUNDED.sub("#", one).split() != ROUNDED.sub("#", other).split():
        return False
    pairs = zip(ROUNDED.findall(one), ROUNDED.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= 1.01 * max(step(a), step(b)) for a, b in pairs)


def step(number: str) -> float:
    """One unit of the last digit: 0.01 for "3.35", 1e-4 for "6e-04"."""
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals)


def test_only_the_last_digit_of_a_rounded_number_may_differ() -> None:
    assert same_text("loss 3.35, 12% of  6e-04\n", "loss 3.34, 13% of 7e-04")
    assert not same_text("loss 3.35", "loss 3.37")
    assert not same_text("token 12", "token 13")
    assert not same_text("loss 3.35", "loss of 3.35")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """BLAS keeps to one thread."""
    before = blas_threads()
    set_blas_threads(1)
    yield
    set_blas_threads(before or 1)


def run_notebook(path: Path) -> Iterator[tuple[Cell, Ran]]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells_of(path, "code"):
        yield cell, run_cell(source_of(cell), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_shows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with one_thread(), matplotlib.rc_context():  # beside other work, waiting threads count, too
        matplotlib.use("Agg")
        start = time.process_time()
        for number, (cell, ran) in enumerate(run_notebook(path)):
            where = f"{path.name}, code cell {number}: outputs are not those of today's code"
            assert same_text(ran.text, stored_text(cell)), where
            images = ["image/png" in output.get("data", {}) for output in cell["outputs"]]
            assert any(images) == ran.drew, f"{path.name}, code cell {number}: figure missing"
        assert time.process_time() - start < CPU_SECONDS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_without_errors_and_without_paths_of_a_machine(path: Path) -> None:
    outputs = [output for cell in cells_of(path, "code") for output in cell["outputs"]]
    assert outputs
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
        text = json.dumps([data, output.get("text", "")])
        assert not re.search(r"/home/|/root/|/tmp/|/opt/|/Users/|[A-Z]:\\\\|site-packages", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_notebooks_resolve(path: Path) -> None:
    text = "\n".join(map(source_of, cells_of(path, "markdown")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_follows_one_order(path: Path) -> None:
    """Prediction, breaking, exercise, what to remember, what was simplified."""
    text = "\n".join(map(source_of, cells_of(path, "markdown")))
    headings = ["## Predict", "## Break", "## Exercise", "## Three lines", "## What was simplified"]
    places = [text.find(heading) for heading in headings]
    assert -1 not in places, f"{path.name}: {headings[places.index(-1)]!r} is missing"
    assert places[0] == min(places)
    assert places[-1] == max(places)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stubs_are_not_attempted_and_solutions_are_folded_and_correct(path: Path) -> None:
    cells = cells_of(path, "code")
    stubs = [cell for cell in cells if "raise NotImplementedError" in source_of(cell)]
    folded = [cell for cell in cells if cell["metadata"].get("jupyter", {}).get("source_hidden")]
    assert any("not attempted" in stored_text(cell) for cell in cells)
    assert folded
    assert all("not attempted" in stored_text(c) for c in stubs if "check(" in source_of(c))
    assert all("correct" in stored_text(c) for c in folded if "check(" in source_of(c))


def test_the_course_is_complete() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(14)]
