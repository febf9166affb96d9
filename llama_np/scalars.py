"""One number per array and call: enough to check a port that can only print.

The number is the sum of all values with signs + and - in a fixed, random-looking order:
value i (token by token, channels in a row, heads one after another) counts negative when the
top bit of i * 2654435761 modulo 2^32 is set. Unlike a plain sum it does not cancel, and unlike a
norm it notices values in the wrong place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llama_np.errors import CheckpointError
from llama_np.experiment import PRECISIONS, axes_of, row_axis, spans
from llama_np.ports import possible_names
from llama_np.trace import Golden, in_order
from llama_np.verify import FAIL, FLOOR, NOTE, PASS, Finding, Report

HEADER = "# name call value, then the largest allowed difference in float32, bfloat16, float16"
ALLOWED = 4  # standard deviations: signs make the error of the sum normal


def signs(count: int) -> np.ndarray:
    """+1 and -1 for the values 0 ... count - 1."""
    product = np.arange(count, dtype=np.uint64) * np.uint64(2654435761)
    return np.where(product >> np.uint64(31) & np.uint64(1), -1.0, 1.0)


def signed_sum(name: str, array: np.ndarray) -> float:
    """The number of one array (B = 1), token by token."""
    rows = np.moveaxis(array[0], row_axis(name) - 1, 0).ravel().astype(np.float64)
    return float(rows @ signs(rows.size))


def scalars(golden: Golden) -> Iterator[tuple[str, int, float, dict[str, float]]]:
    """(name, call, value, allowed difference per precision) for every array but the scores.

    Errors: ValueError for a batch of several texts.
    """
    if len(golden.tokens) != 1:
        raise ValueError("scalars need a golden file of a single text")
    for call, columns in enumerate(spans(golden.calls)):
        for name in in_order(golden.tensors, golden.config):
            if axes_of(name).endswith("S"):
                continue
            part = golden.tensors[name][(slice(None),) * row_axis(name) + (columns,)]
            size = float(np.linalg.norm(part.ravel().astype(np.float64)))
            yardsticks = golden.yardsticks[name]
            limits = {p: ALLOWED * max(yardsticks[p], FLOOR) * size for p in PRECISIONS}
            yield name, call, signed_sum(name, part), limits


def scalar_lines(golden: Golden) -> list[str]:
    """The golden file as text: what `record --scalars` writes."""
    lines = [HEADER, f"# tokens {' '.join(map(str, golden.tokens[0]))}",
             f"# calls {' '.join(map(str, golden.calls))}"]  # fmt: skip
    for name, call, value, limits in scalars(golden):
        numbers = " ".join(f"{limit:.3e}" for limit in limits.values())
        lines.append(f"{name} {call} {value:.9e} {numbers}")
    return lines


def read_log(text: str, layers: int) -> dict[tuple[str, int], float]:
    """Numbers in a log: lines with `name value` or `name call value`; anything else is skipped.

    Without call numbers, the n-th line with a name belongs to the n-th call.
    """
    found: dict[tuple[str, int], float] = {}
    seen: dict[str, int] = {}
    for line in text.splitlines():
        words = [word for word in re.split(r"[\s:=,@]+", line.strip()) if word]
        for place, word in enumerate(words[:-1]):
            names = possible_names(word, layers)
            numbers = [_number(w) for w in words[place + 1 : place + 3]]
            if not names or numbers[0] is None:
                continue
            two = len(numbers) == 2 and numbers[1] is not None and numbers[0] % 1 == 0
            call = int(numbers[0]) if two else seen.get(names[0], 0)
            seen[names[0]] = call + 1
            found[names[0], call] = float((numbers[1] if two else numbers[0]) or 0.0)
            break
    return found


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def verify_scalars(golden: Golden, log: str | Path, precision: str = "float32") -> Report:
    """Compare numbers pasted from a log with a golden file.

    log: the text itself, or the path of a file with it.
    Errors: OSError; CheckpointError for a file that is not text.
    """
    try:
        text = log.read_text("utf-8") if isinstance(log, Path) else log
    except UnicodeDecodeError as problem:
        raise CheckpointError(f"{str(log)!r} is not text: {problem}") from problem
    mine = read_log(text, golden.config.num_hidden_layers)
    findings = []
    for name, call, value, limits in scalars(golden):
        if (name, call) in mine:
            findings.append(_judged(name, call, mine[name, call], value, limits[precision]))
    statuses = {f.status for f in findings}
    problems = () if findings else ("no number in the log has a known name",)
    verdict = FAIL if problems or FAIL in statuses else NOTE if NOTE in statuses else PASS
    return Report(verdict, tuple(findings), precision, problems, tokens=tuple(golden.tokens[0]),
                  prompt=golden.prompt)  # fmt: skip


def _judged(name: str, call: int, mine: float, value: float, limit: float) -> Finding:
    size = abs(mine - value) if math.isfinite(mine) else float("inf")
    status = PASS if size <= limit else NOTE if size <= 2 * limit else FAIL
    position = None if status != FAIL else call
    reason = f"call {call}: {mine:.9g}, not {value:.9g}" if status == FAIL else ""
    label = f"{name} {call}"
    return Finding(label, status, size, size, limit / 2, name, reason=reason, position=position)
