"""The layout that the package promises: levels, lengths, one language for all commands."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import llama_np

PACKAGE = Path(llama_np.__file__).parent
ROOT = Path(__file__).parents[1]

# Lowest first. A module imports only from the lines above its own, so that each can be read
# knowing only what stands above it.
LEVELS = [
    "activations errors hf_loading hf_streamers memory options precision processor tap",
    "terminal threads",
    "files hf_encoding hub linear query_blocks",
    "config tasks tokenizer weights",
    "cache chat_template gguf_file rope sentencepiece_model show torch_pickle workers",
    "gguf_model hf_outputs layers llama2c speculate",
    "checkpoint model sampling tiktoken_model",
    "chunks experiment inspection losses meta",
    "generate patterns",
    "perplexity prompt_cache",
    "hf_beams hf_config hf_generation_config hf_processors hf_session hf_tokenizer_base hf_weights",
    "bench bulk chat convert explore hf_tokenizer trace",
    "cli_chat cli_convert hf_base hf_generate ports",
    "hf variations verify",
    "check hf_auto mistakes replay report scalars",
    "explain mutation",
    "cli_oracle testing",
    "cli",
    "__init__ __main__",
]
NUMERIC_CORE = ("layers", "rope", "model")
OPTIONAL = {
    "dask", "distributed", "gguf", "huggingface_hub", "jinja2", "matplotlib", "ml_dtypes",
    "threadpoolctl", "tokenizers", "torch", "transformers", "yaml", "requests", "scipy", "pandas",
}  # fmt: skip
MAY_PLOT = {"show", "check"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.glob("*.py"))}


MODULES = modules()
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names.split()}


def imported_modules(tree: ast.Module, names: set[str]) -> Iterator[tuple[str, int]]:
    """Modules of this package that `tree` imports, inside functions too, and the lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "llama_np":
                    yield [*alias.name.split("."), "__init__"][1], node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            inside = parts[1:] if parts[0] == "llama_np" else parts if node.level else None
            if inside is None:
                continue
            for alias in node.names:
                path = [part for part in inside if part] or [alias.name]
                if path != ["__version__"]:  # a number, not a dependency
                    yield (path[0] if path[0] in names else "__init__"), node.lineno


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_from_lower_levels(name: str) -> None:
    assert name in LEVEL_OF, (
        f"llama_np/{name}.py is new: add it to LEVELS in tests/test_structure.py, at the lowest "
        "level that is above everything it imports"
    )
    for other, line in imported_modules(MODULES[name], set(MODULES)):
        assert LEVEL_OF[other] < LEVEL_OF[name], (
            f"llama_np/{name}.py:{line} (level {LEVEL_OF[name]}) imports {other} (level "
            f"{LEVEL_OF[other]}): move what both need to a lower level, or the module in LEVELS"
        )


@pytest.mark.parametrize("name", MODULES)
def test_optional_packages_are_imported_inside_functions(name: str) -> None:
    for node in top_level_statements(MODULES[name].body):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots = {(node.module or "").split(".")[0]}
        else:
            continue
        found = roots & OPTIONAL
        assert not found or name in MAY_PLOT, f"llama_np/{name}.py:{node.lineno} imports {found}"


def top_level_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported; `if TYPE_CHECKING` blocks do not."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from top_level_statements(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from top_level_statements(node.body + [s for h in node.handlers for s in h.body])


@pytest.mark.parametrize("name", ["layers", "rope"])
def test_layers_have_no_if(name: str) -> None:
    lines = [node.lineno for node in ast.walk(MODULES[name]) if isinstance(node, ast.If)]
    assert not lines, f"llama_np/{name}.py: `if` at lines {lines}; options are data or functions"


@pytest.mark.parametrize("name", ["layers", "rope"])
def test_layers_do_not_loop(name: str) -> None:
    loops = (ast.For, ast.While)
    lines = [node.lineno for node in ast.walk(MODULES[name]) if isinstance(node, loops)]
    assert not lines, f"llama_np/{name}.py: loops at lines {lines}; heads and tokens are axes"


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def test_one_name_means_one_array_within_a_layer() -> None:
    for function in functions(MODULES["layers"]):
        bound = [
            argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)
        ]
        for node in ast.walk(function):  # `e /= total` changes an array, the name stays
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            bound += [name.id for name in names]
        twice = {name for name in bound if bound.count(name) > 1}
        assert not twice, f"llama_np/layers.py: {function.name} binds {twice} twice"


def body_lines(function: Function, source: list[str]) -> int:
    """Lines of a function's body without its docstring, comments and empty lines."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return 0
    lines = source[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_as_long_as_their_idea(name: str) -> None:
    limit = 16 if name in NUMERIC_CORE else 40
    source = (PACKAGE / f"{name}.py").read_text("utf-8").splitlines()
    lengths = {f.name: body_lines(f, source) for f in functions(MODULES[name])}
    too_long = {function: lines for function, lines in lengths.items() if lines > limit}
    assert not too_long, f"llama_np/{name}.py: more than {limit} lines: {too_long}; split them"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_reads_the_environment_or_guesses_by_attribute(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        match node:
            case ast.Name("hasattr") | ast.Attribute(attr="environ" | "getenv") | ast.Global():
                raise AssertionError(f"llama_np/{name}.py:{node.lineno}: {ast.unparse(node)}")


def defined_again(notebook: Path) -> set[str]:
    """Functions of the library that a notebook's code cells define once more."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = [line for c in cells if c["cell_type"] == "code" for line in [*c["source"], "\n"]]
    plain = "".join(line for line in code if not line.lstrip().startswith(("%", "!", "?")))
    library = {f.name for tree in MODULES.values() for f in tree.body if isinstance(f, Function)}
    return {f.name for f in functions(ast.parse(plain))} & library


def test_notebooks_show_the_library_and_never_define_it_again(tmp_path: Path) -> None:
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        twice = defined_again(notebook)
        assert not twice, f"{notebook.name} defines {twice}: import it, or name it otherwise"
    cell = {"cell_type": "code", "source": ["%matplotlib inline\n", "def rms_norm(x):\n", "  pass"]}
    (tmp_path / "pasted.ipynb").write_text(json.dumps({"cells": [cell, cell]}), "utf-8")
    assert defined_again(tmp_path / "pasted.ipynb") == {"rms_norm"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def declared(requirements: list[str]) -> set[str]:
    return {Requirement(text).name.lower().replace("-", "_") for text in requirements}


def packages_imported_by(tree: ast.Module) -> set[str]:
    """Root names of everything imported that neither Python nor this repository provides."""
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots.add((node.module or "").split(".")[0])
    ours = {"llama_np"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    return {root.lower() for root in roots - sys.stdlib_module_names - ours}


COMES_WITH = {"distributed": "dask", "nbformat": "nbmake", "packaging": "pytest"}


def test_three_packages_are_enough_to_run() -> None:
    assert declared(project()["dependencies"]) == {"numpy", "safetensors", "sentencepiece"}


def test_every_import_of_the_package_is_declared() -> None:
    extras = project()["optional-dependencies"]
    known = declared([*project()["dependencies"], *(r for name in extras for r in extras[name])])
    for name, tree in MODULES.items():
        needed = {COMES_WITH.get(root, root) for root in packages_imported_by(tree)}
        assert needed <= known, f"llama_np/{name}.py imports {needed - known}: add an extra"


def test_every_import_of_the_tests_is_in_the_extra_that_the_readme_installs() -> None:
    extras = project()["optional-dependencies"]
    included = next(r for r in map(Requirement, extras["test"]) if r.name == "llama_np").extras
    known = declared([*project()["dependencies"], *extras["test"]])
    known |= declared([r for name in included for r in extras[name]])
    for path in sorted((ROOT / "tests").glob("*.py")):
        imported = packages_imported_by(ast.parse(path.read_text("utf-8")))
        needed = {COMES_WITH.get(root, root) for root in imported}
        assert needed <= known, f"{path.name} imports {needed - known}: add it to the extra test"


def readme_commands() -> list[str]:
    """The one-line shell blocks above the README's first heading of the second level."""
    head = (ROOT / "README.md").read_text("utf-8").split("\n## ")[0]
    return re.findall(r"```sh\n(.+)\n```", head)


@pytest.mark.parametrize("path", [".ci/run", ".github/workflows/ci.yml"])
def test_the_readme_promises_what_is_checked(path: str) -> None:
    commands = readme_commands()
    assert len(commands) == 2
    text = (ROOT / path).read_text("utf-8")
    places = [text.find(command) for command in commands]
    assert 0 <= places[0] < places[1], f"{path} does not run {commands} in this order"


def test_the_version_is_stated_once() -> None:
    assert llama_np.__version__ == project()["version"]


def test_the_bundled_model_comes_with_the_package() -> None:
    names = {path.name for path in (PACKAGE / "checkpoints" / "fairytales").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= names
