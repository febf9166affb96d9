"""Execute shape comments: compare `# (B, T, D)` at a line's end with the array that the line makes.

A comment belongs to the assignment or the return that ends on its line. It names one shape, or
several joined by "or"; "x2" says that two arrays have it, and prose may follow after a colon. An
axis is arithmetic over the axis letters (`N*H`, `H/2`); alternatives of one axis are joined by
"|", and a leading "..." stands for any axes.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

import numpy as np

Sizes = Mapping[str, int]
Shape = tuple[int, ...]
Function = ast.FunctionDef | ast.AsyncFunctionDef


Place = tuple[str, int]  # module and line number
Seen = dict[Place, dict[Shape, list[Sizes]]]  # every shape made there, in runs of these sizes


@dataclass(frozen=True)
class Line:
    """One assignment or return of a function.

    `target` is None for a return; `alias` says that an existing array gets a second name.
    """

    module: str
    start: int
    end: int
    target: ast.expr | None
    alias: bool


def lines_of(source: str, module: str) -> list[Line]:
    """All assignments and returns inside functions, in the order of the file."""
    found = {}
    for function in ast.walk(ast.parse(source)):
        for node in ast.walk(function) if isinstance(function, Function) else ():
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.Return) and node.value:
                target = None if isinstance(node, ast.Return) else _target(node)
                alias = isinstance(node.value, ast.Name)
                found[node.lineno] = Line(module, node.lineno, node.end_lineno or 0, target, alias)
    return [found[number] for number in sorted(found)]


def _target(node: ast.Assign | ast.AnnAssign) -> ast.expr:
    return node.target if isinstance(node, ast.AnnAssign) else node.targets[0]


def comments_of(source: str) -> dict[int, str]:
    """Line number -> text of every comment that starts like a shape."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = (
        (token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT
    )
    return {number: text[2:] for number, text in comments if text.startswith("# (")}


def watch(modules: list[ModuleType], run: Callable[[], object], sizes: Sizes, seen: Seen) -> None:
    """Run the model and note the shape that every line of `modules` makes."""
    files = {module.__file__ or "": _by_number(module) for module in modules}

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        lines = files.get(frame.f_code.co_filename)
        comprehension = frame.f_code.co_name.startswith("<")
        return None if lines is None or comprehension else _Watcher(lines, sizes, seen)

    previous = sys.gettrace()
    sys.settrace(on_call)
    try:
        run()
    finally:
        sys.settrace(previous)


def _by_number(module: ModuleType) -> dict[int, Line]:
    return {
        number: line
        for line in lines_of(source_of(module), module.__name__)
        for number in range(line.start, line.end + 1)
    }


def source_of(module: ModuleType) -> str:
    """The text of a module's file."""
    with open(module.__file__ or "", encoding="utf-8") as file:
        return file.read()


class _Watcher:
    """Follows one call of one function; an assignment is done when another line is reached."""

    def __init__(self, lines: Mapping[int, Line], sizes: Sizes, seen: Seen) -> None:
        self.lines, self.sizes, self.seen = lines, sizes, seen
        self.running: Line | None = None

    def __call__(self, frame: FrameType, event: str, arg: Any) -> _Watcher:
        line = self.lines.get(frame.f_lineno)
        if event == "exception":
            self.running = None
        elif event == "return":
            self._finish(frame, arg)
        elif event == "line" and line is not self.running:
            self._finish(frame, None)
            self.running = line
        return self

    def _finish(self, frame: FrameType, returned: Any) -> None:
        if self.running is not None:
            target = self.running.target
            value = returned if target is None else _value(target, frame.f_locals)
            arrays = value if isinstance(value, tuple) else [value]
            place = self.running.module, self.running.end
            for shape in {array.shape for array in arrays if isinstance(array, np.ndarray)}:
                runs = self.seen.setdefault(place, {}).setdefault(shape, [])
                if self.sizes not in runs:
                    runs.append(self.sizes)


def _value(target: ast.expr, variables: Mapping[str, Any]) -> Any:
    if isinstance(target, ast.Tuple):
        return tuple(_value(part, variables) for part in target.elts)
    return variables.get(target.id) if isinstance(target, ast.Name) else None


def fits(comment: str, shape: Shape, sizes: Sizes) -> bool:
    """Whether one of the comment's shapes is `shape`. Errors: ValueError if it cannot be read."""
    shapes = comment.partition(": ")[0].removesuffix(" x2").split(" or ")
    return any(_fits_one(text, shape, sizes) for text in shapes)


def _fits_one(text: str, shape: Shape, sizes: Sizes) -> bool:
    match = re.fullmatch(r"\((.*?),?\)", text.strip())
    if match is None or match[1] == "...":
        raise ValueError(f"not a shape: {text!r}")
    axes = [axis.strip() for axis in match[1].split(",")] if match[1] else []
    if axes[:1] == ["..."]:
        axes = axes[1:]
        shape = shape[len(shape) - len(axes) :] if len(shape) >= len(axes) else shape
    allowed = [{_evaluate(choice, sizes) for choice in axis.split("|")} for axis in axes]
    return len(shape) == len(axes) and all(
        size in choices for size, choices in zip(shape, allowed, strict=True)
    )


def _evaluate(axis: str, sizes: Sizes) -> float:
    def value(node: ast.expr) -> float:
        match node:
            case ast.Name(name) if name in sizes:
                return sizes[name]
            case ast.Constant(int(number)):
                return number
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.BinOp(left, ast.Div(), right):
                return value(left) / value(right)
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
        raise ValueError(f"not an axis: {axis!r}")

    try:
        return value(ast.parse(axis.strip(), mode="eval").body)
    except SyntaxError as problem:
        raise ValueError(f"not an axis: {axis!r}") from problem


def wrong_comments(source: str, module: str, seen: Seen) -> Iterator[str]:
    """One sentence for every comment that is stray, never executed, unreadable or untrue."""
    ends = {line.end for line in lines_of(source, module)}
    for number, comment in comments_of(source).items():
        stray = "does not stand at the end of an assignment or return"
        made = seen.get((module, number), {})
        faults = faults_of(comment, made) if number in ends else [stray]
        yield from (f"{module}:{number}: # {comment} {fault}" for fault in faults)


def faults_of(comment: str, made: Mapping[Shape, list[Sizes]]) -> list[str]:
    """What is wrong with a comment beside the line that made these shapes."""
    if not made:
        return ["was never executed"]
    try:
        untrue = [
            shape
            for shape, runs in made.items()
            if not all(fits(comment, shape, sizes) for sizes in runs)
        ]
    except ValueError as problem:
        return [f"cannot be read: {problem}"]
    return [f"but the array is {shape}" for shape in untrue]


def lacking_comments(source: str, module: str, seen: Seen) -> Iterator[str]:
    """One sentence for every assignment of an array that has no shape comment."""
    comments = comments_of(source)
    for line in lines_of(source, module):
        shapes = list(seen.get((module, line.end), {}))
        if line.target is not None and not line.alias and shapes and line.end not in comments:
            yield f"{module}:{line.end}: {ast.unparse(line.target)} has no comment, it is {shapes}"
