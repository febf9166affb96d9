"""Comparing a port's dump with a golden file: pass, note or fail, and where it first goes wrong.

An array is judged by its relative error against its yardstick: what an honest run in the same
precision gets wrong. Other layouts of the same numbers are found and reported, not failed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from llama_np.errors import VerificationError
from llama_np.experiment import (
    PEAK,
    axes_of,
    error,
    full_name,
    misfit,
    peak,
    row_axis,
    split_name,
    up_to_query,
)
from llama_np.ports import ROTARY, Array, Dump, Port, TopK, View, read_port, views
from llama_np.sampling import log_softmax
from llama_np.trace import Golden, in_order, load_golden

FLOOR = 6e-8  # the golden values themselves are rounded to float32
HOPELESS = 0.7  # above this error nothing is in common, whatever the yardstick
BROKEN = "NaN or infinity"
PASS, NOTE, FAIL, SAME = "pass", "note", "fail", "equivalent"
PROBABILITIES = "these are probabilities: dump the logits, or log-probabilities"
IDS_ALONE = "only token ids were compared: the dump holds no array"


@dataclass(frozen=True)
class Finding:
    """One array of the dump against the truth.

    error: ||mine - gold|| / ||gold||; peak: max|mine - gold| / max|gold|; profile: the relative
    error of every row (token); position: the first row that is clearly wrong.
    """

    tensor: str
    status: str
    error: float
    peak: float
    yardstick: float
    label: str = ""
    layout: str = ""
    reason: str = ""
    start: int = 0
    position: int | None = None
    profile: tuple[float, ...] = ()
    heads: tuple[float, ...] = ()
    rows: int = 0

    @property
    def ratio(self) -> float:
        """The error in yardsticks."""
        return self.error / self.yardstick if self.yardstick else 0.0


@dataclass(frozen=True)
class Report:
    """The outcome of a comparison; `str` of it is the table for people."""

    verdict: str
    findings: tuple[Finding, ...]
    precision: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    prompt: int = 0

    @property
    def first_divergence(self) -> Finding | None:
        """The first array, in execution order, that fails."""
        return next((f for f in self.findings if f.status == FAIL), None)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        first = self.first_divergence
        return {
            "verdict": self.verdict,
            "precision": self.precision,
            "first_divergence": None if first is None else {**_brief(first), "hint": hint(self)},
            "problems": list(self.problems),
            "notes": list(self.notes),
            "tensors": [_brief(f) for f in self.findings],
            "not_covered": list(self.not_covered),
            "unknown": list(self.unknown),
        }

    def __str__(self) -> str:
        return "\n".join(_table(self))


def _brief(f: Finding) -> dict[str, Any]:
    brief = {
        "tensor": f.tensor,
        "position": f.position,
        "error": _finite(f.error),
        "yardstick": f.yardstick,
        "peak": _finite(f.peak),
        "status": f.status,
    }
    texts = {"name_in_dump": f.label, "layout": f.layout, "reason": f.reason}
    return brief | {key: text for key, text in texts.items() if text}


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return float(value) if np.isfinite(value) else None


def verify(
    golden: Golden | str | os.PathLike[str],
    port: Dump | Port,
    *,
    precision: str | None = None,
    check: bool = True,
) -> Report:
    """Compare a dump with a golden file.

    port: a file or folder (see `ports`), or a mapping of arrays; precision: by default what the
    dump's numbers show.
    Errors: VerificationError with the report as its message when the verdict is "fail", unless
    `check` is false; OSError, CheckpointError for files that cannot be read.
    """
    truth = golden if isinstance(golden, Golden) else load_golden(golden)
    given = port if isinstance(port, Port) else read_port(port, truth.config, precision)
    report = compare(truth, given)
    if check and report.verdict == FAIL:
        raise VerificationError(str(report))
    return report


def compare(golden: Golden, port: Port) -> Report:
    """All findings about a port, and the verdict that follows from them."""
    problems, notes = list(_token_problems(golden, port)), list(port.notes)
    usable = _usable_rows(golden, port)
    if problems and usable:
        notes.append(f"compared up to position {usable - 1}, where the tokens are still the same")
    covered = [n for n in in_order(golden.tensors, golden.config) if n in port.arrays]
    every = [f for name in covered for f in _worst(golden, port, name, usable)]
    findings = _settle_ambiguous(every)
    fed = None if port.tokens is None else port.tokens.shape[1]
    findings = _same_rows(findings, golden, fed)
    findings = _settle_layouts(findings, golden, port)
    findings += _topk_findings(golden, port) + _greedy_findings(golden, port)
    alone = not findings and port.tokens is not None and not problems
    if alone and golden.prompt < golden.tokens.shape[1] and not port.unknown:
        notes.append(IDS_ALONE)
    elif not findings:
        problems.append("the dump and the golden file have nothing in common")
    problems += _invisible_winners(golden, port)
    problems += _partly_decoded(findings, golden) if not problems else []
    statuses = {f.status for f in findings}
    failed = bool(problems) or FAIL in statuses
    seen = {f.tensor for f in findings}
    return Report(
        FAIL if failed else NOTE if NOTE in statuses or alone else PASS,
        tuple(findings),
        port.precision,
        tuple(problems),
        tuple(notes),
        tuple(name for name in golden.tensors if name not in seen),
        port.unknown,
        tuple(golden.tokens[0].tolist()),
        golden.prompt,
    )


def _token_problems(golden: Golden, port: Port) -> Iterator[str]:
    """Other token ids make every other comparison meaningless."""
    if port.tokens is None:
        return
    mine, gold = port.tokens, golden.tokens
    alone = not port.arrays and port.topk is None
    n = mine.shape[1]
    if mine.shape[0] != gold.shape[0] or n > gold.shape[1] or (alone and n < gold.shape[1]):
        yield f"other token ids: {mine.shape} of them, the golden file has {gold.shape}"
        return
    real = golden.positions[:, :n] >= 0
    wrong = np.argwhere((mine != gold[:, :n]) & real)
    if n < min(golden.prompt, gold.shape[1]):
        yield f"the dump holds {n} token ids, the prompt alone has {golden.prompt}"
    elif n not in (golden.prompt, gold.shape[1]):
        yield f"the dump holds {n} token ids: {_decoded(n, golden)}"
    elif len(wrong):
        b, t = wrong[0].tolist()
        yield f"other token ids: {int(mine[b, t])} at position {t}, expected {int(gold[b, t])}"


def _usable_rows(golden: Golden, port: Port) -> int | None:
    """How many tokens come before the first other one; None when all can be compared."""
    mine, gold = port.tokens, golden.tokens
    if mine is None or mine.shape != gold.shape:
        return None
    other = np.flatnonzero(((mine != gold) & (golden.positions >= 0)).any(axis=0))
    return int(other[0]) or None if len(other) else None


def _worst(golden: Golden, port: Port, name: str, usable: int | None) -> list[Finding]:
    """The findings about every array of the dump that may stand for this name."""
    gold, yardstick = golden.tensors[name], limit_base(golden, name, port.precision)
    return [judge(name, array, gold, yardstick, golden, usable) for array in port.arrays[name]]


def limit_base(golden: Golden, name: str, precision: str) -> float:
    """The yardstick that an array is judged by."""
    return max(golden.yardsticks[name][precision], FLOOR)


def judge(
    name: str,
    array: Array,
    gold: np.ndarray,
    yardstick: float,
    golden: Golden,
    usable: int | None = None,
) -> Finding:
    """The best reading of one array against what it should be."""
    best, least = None, np.inf
    for view in views(name, array, golden):
        size = misfit(*_aligned(name, view, gold, golden, usable))
        if best is None or size < least * 0.5:  # a later reading must be clearly better
            best, least = view, size
    if best is not None:
        return measure(name, best, gold, yardstick, golden, usable)
    reason = f"shape {array.values.shape} does not fit {axes_of(name)} = {gold.shape}"
    V = gold.shape[-1]
    if axes_of(name).endswith("V") and array.values.shape[-1:] < (V,):
        reason += f": {V - array.values.shape[-1]} of {V} columns are missing, dump all words"
    return Finding(name, FAIL, float("inf"), float("inf"), yardstick, array.label, reason=reason)


def measure(
    name: str,
    view: View,
    gold: np.ndarray,
    yardstick: float,
    golden: Golden,
    usable: int | None = None,
) -> Finding:
    """Error, peak, status and profiles of one reading of an array, up to the usable rows."""
    axis = row_axis(name)
    n = view.values.shape[axis]
    mine, target = _aligned(name, view, gold, golden, usable)
    size = error(mine, target)
    status, peak = grade(mine, target, size, yardstick)
    broken = not np.isfinite(mine).all()
    reason = BROKEN if broken else ""
    profile = row_errors(mine, target, axis)
    heads = _head_errors(name, mine, target, golden.config.head_dim)
    first = next((i for i, e in enumerate(profile) if not e <= PEAK * yardstick), None)
    position = None if status != FAIL else view.start + (first or 0)
    return Finding(
        name, status, size, peak, yardstick, view.label, view.layout, reason, view.start,
        position, profile, heads, n,
    )  # fmt: skip


def _aligned(
    name: str, view: View, gold: np.ndarray, golden: Golden, usable: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """A reading and the same rows of the truth, up to the usable ones."""
    axis = row_axis(name)
    rows = slice(view.start, view.start + view.values.shape[axis])
    mine = cleaned(name, view.values, golden, rows)
    target = gold[(slice(None),) * axis + (rows,)]
    if usable is None:
        return mine, target
    kept = (slice(None),) * axis + (slice(0, max(usable - view.start, 0)),)
    return mine[kept], target[kept]


def cleaned(name: str, values: np.ndarray, golden: Golden, rows: slice) -> np.ndarray:
    """The port's values without what does not count: padding, and scores of later tokens."""
    real = golden.positions >= 0
    axis, local = row_axis(name), split_name(name)[1]
    if not real.all():
        shape = [1] * values.ndim
        shape[0], shape[axis] = len(real), values.shape[axis]
        values = np.where(real[:, rows].reshape(shape), values, 0)
    if local == "self_attn.scores":
        seen = np.tri(real.shape[1], dtype=bool)[rows] & real[:, None, None]
        values = np.where(seen, values, 0)
    if local == "self_attn.weights":
        values = up_to_query(values, rows.start)
    return values.astype(np.float64)


def grade(mine: np.ndarray, gold: np.ndarray, size: float, yardstick: float) -> tuple[str, float]:
    """The verdict rule: status, and the peak error that it looked at besides `size`."""
    highest = peak(mine, gold)
    if not (np.isfinite(highest) and size <= HOPELESS):
        return FAIL, highest
    for status, slack in ((PASS, 1), (NOTE, 2)):
        if size <= 2 * slack * yardstick and highest <= PEAK * slack * yardstick:
            return status, highest
    return FAIL, highest


def row_errors(mine: np.ndarray, gold: np.ndarray, axis: int) -> tuple[float, ...]:
    """The relative error of every token's row, over the batch."""
    a = np.moveaxis(mine, axis, 0).reshape(mine.shape[axis], -1)
    r = np.moveaxis(gold, axis, 0).reshape(a.shape)
    with np.errstate(all="ignore"):
        sizes = np.linalg.norm(r, axis=1)
        errors = np.linalg.norm(a - r, axis=1) / np.where(sizes > 0, sizes, 1)
    return tuple(errors.tolist())


def _head_errors(name: str, mine: np.ndarray, gold: np.ndarray, H: int) -> tuple[float, ...]:
    """The relative error of every head, for arrays that have heads."""
    axes = axes_of(name).split(",")
    if axes[1] in "NK":
        by_head = np.moveaxis(mine, 1, 0), np.moveaxis(gold, 1, 0)
    elif axes[-1].endswith("*H"):
        shape = (*mine.shape[:-1], -1, H)
        by_head = np.moveaxis(mine.reshape(shape), -2, 0), np.moveaxis(gold.reshape(shape), -2, 0)
    else:
        return ()
    return tuple(error(a, r) for a, r in zip(*by_head, strict=True))


def _settle_ambiguous(findings: list[Finding]) -> list[Finding]:
    """Some tools use one name twice: keep the meaning that fits; of equal names, the worst."""
    by_label: dict[str, list[Finding]] = {}
    for finding in findings:
        by_label.setdefault(finding.label, []).append(finding)
    chosen = [min(same, key=lambda f: f.ratio) if any(f.status != FAIL for f in same)
              else min(same, key=lambda f: not np.isfinite(f.error))
              for same in by_label.values()]  # fmt: skip
    by_name: dict[str, Finding] = {}
    for finding in chosen:
        other = by_name.get(finding.tensor)
        if other is None or finding.ratio > other.ratio:
            by_name[finding.tensor] = finding
    order = dict.fromkeys(f.tensor for f in findings)
    return [by_name[name] for name in order if name in by_name]


def _same_rows(findings: list[Finding], golden: Golden, tokens: int | None) -> list[Finding]:
    """A dump holds all rows, or the prompt's; the end of the model may hold only the last ones."""
    T, P, last = golden.tokens.shape[1], golden.prompt, golden.config.num_hidden_layers - 1
    read = {1, T - P, T - P + 1, len(golden.calls)} - {0}  # rows whose logits somebody reads
    longest = max((f.rows for f in findings), default=0)
    whole = {T, P} if longest in (T, P) else read

    def checked(f: Finding) -> Finding:
        layer = split_name(f.tensor)[0]
        at_end = layer == last or f.tensor in ("model.norm", "lm_head", "score")
        fits = f.rows == longest in whole or (at_end and f.rows in read)
        # Right numbers must also be those of the last rows, not of some first ones.
        placed = f.rows in (T, P) or f.start + f.rows in (T, P) or f.status == FAIL
        if f.rows == 0 or (fits and placed and (tokens is None or f.rows <= tokens)):
            return f
        found = f"{f.rows} rows, expected {T} (or the {P} of the prompt, everywhere)"
        return replace(f, status=FAIL, error=float("inf"), reason=found, position=f.position or 0)

    return [checked(f) for f in findings]


def _partly_decoded(findings: list[Finding], golden: Golden) -> list[str]:
    """What to do about arrays that end between two decode steps."""
    rows = [f.rows for f in findings if golden.prompt < f.rows < golden.tokens.shape[1]]
    return [_decoded(max(rows), golden)] if rows else []


def _decoded(n: int, golden: Golden) -> str:
    T, P = golden.tokens.shape[1], golden.prompt
    found = f"{n} rows are the prompt's {P} and {n - P} of {T - P} decode steps"
    return f"{found}: dump all {T}, or only the {P}, or record with --decode {n - P}"


@dataclass
class _Settling:
    """The findings by name while layouts and equivalent forms are being decided."""

    findings: dict[str, Finding]
    golden: Golden
    port: Port
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def bad(self, name: str) -> bool:
        return name in self.findings and self.findings[name].status == FAIL

    def good(self, name: str) -> bool:
        return name in self.findings and self.findings[name].status != FAIL

    def all_good(self, names: Iterable[str]) -> bool:
        covered = [name for name in names if name in self.findings]
        return bool(covered) and all(map(self.good, covered))

    def excuse(self, name: str, reason: str) -> None:
        if self.bad(name) and np.isfinite(self.findings[name].error):  # else rows are missing
            changed = replace(self.findings[name], status=SAME, reason=reason, position=None)
            self.findings[name] = changed

    def excuse_if_rearranged(self, name: str) -> None:
        """Only for arrays whose readers are right: the same channels in another order or scale."""
        if self.bad(name) and _is_permuted(self, name, 1):
            self.excuse(name, "channels in another order")
        elif self.bad(name) and _is_scaled(self, name):
            self.excuse(name, "another scale")

    def label(self, name: str) -> Array | None:
        label = self.findings[name].label if name in self.findings else None
        return next((a for a in self.port.arrays.get(name, []) if a.label == label), None)


QUERIES = ("self_attn.q_proj", "self_attn.q_rot")
KEYS = ("self_attn.k_proj", "self_attn.k_rot")
READS_PRODUCTS = ("self_attn.scores", "self_attn.weights", "self_attn.context")
ATTENTION_OUTPUT = ("self_attn.o_proj", "self_attn", "middle", "block")
BY_HEAD = ("self_attn.v_proj", "self_attn.scores", "self_attn.weights", "self_attn.context")
MLP_CHANNELS = ("mlp.gate_proj", "mlp.act_fn", "mlp.up_proj", "mlp.hidden")


def _settle_layouts(findings: list[Finding], golden: Golden, port: Port) -> list[Finding]:
    """Decide which differences are only another way to lay out or to express the same numbers."""
    state = _Settling({f.tensor: f for f in findings}, golden, port)
    for layer in range(golden.config.num_hidden_layers):
        _settle_rotary(state, layer)
        _settle_scores(state, layer)
        _settle_heads(state, layer)
        _settle_mlp(state, layer)
    _settle_tables(state)
    _settle_logits(state)
    return list(state.findings.values())


def _settle_rotary(state: _Settling, layer: int) -> None:
    """Another channel order of q and k counts as a layout only if what reads them is right."""
    readers = [full_name(layer, local) for local in (*READS_PRODUCTS, *ATTENTION_OUTPUT)]
    covered = [name for name in readers if name in state.findings]
    fine = not covered or state.good(covered[0])
    products = _products_agree(state, layer)
    for projected, rotated in (QUERIES, KEYS):
        first, second = full_name(layer, projected), full_name(layer, rotated)
        if not fine and not (second in state.findings and _is_turned(state, second)):
            _as_plain(state, first)
            _as_plain(state, second)
        for name in (first, second):
            if products:
                state.excuse(name, "q and k differ from the truth, their products do not")
            elif products is None and covered and state.findings[covered[0]].status == PASS:
                state.excuse_if_rearranged(name)


def _is_turned(state: _Settling, name: str) -> bool:
    return state.good(name) and "interleaved" in state.findings[name].layout


def _as_plain(state: _Settling, name: str) -> None:
    """Judge an array in the plain layout after all."""
    array = state.label(name)
    if array is None or "interleaved" not in state.findings[name].layout:
        return
    gold, old = state.golden.tensors[name], state.findings[name]
    plain = next(v for v in views(name, array, state.golden) if "interleaved" not in v.layout)
    state.findings[name] = measure(name, plain, gold, old.yardstick, state.golden)


def _products_agree(state: _Settling, layer: int) -> bool | None:
    """Whether q_rot times k_rot of the port gives the true scores; None if that is unknown."""
    golden = state.golden
    q_name, k_name = (full_name(layer, f"self_attn.{x}_rot") for x in "qk")
    q_array, k_array = state.label(q_name), state.label(k_name)
    if q_array is None or k_array is None or not (state.bad(q_name) or state.bad(k_name)):
        return None
    q_gold, k_gold = golden.tensors[q_name], golden.tensors[k_name]
    truth = _products(q_gold, k_gold, golden)
    names = [n for n in (q_name, k_name, full_name(layer, "self_attn.scores"))
             if n in golden.tensors]  # fmt: skip
    limit = max(limit_base(golden, name, state.port.precision) for name in names)
    pairs = product(views(q_name, q_array, golden), views(k_name, k_array, golden))
    return any(
        error(_products(q.values, k.values, golden), truth) <= 4 * limit
        for q, k in pairs
        if q.layout == k.layout
        and q.values.shape == q_gold.shape
        and k.values.shape == k_gold.shape
    )


def _products(q: np.ndarray, k: np.ndarray, golden: Golden) -> np.ndarray:
    B, N, T, H = q.shape
    grouped = q.astype(np.float64).reshape(B, k.shape[1], -1, H)
    with np.errstate(all="ignore"):
        dots = (grouped @ k.astype(np.float64).swapaxes(2, 3)).reshape(B, N, T, T)
    return cleaned("model.layers.0.self_attn.scores", dots, golden, slice(0, T))


def _settle_scores(state: _Settling, layer: int) -> None:
    """Scores that were captured before they were scaled; the softmax read the scaled ones."""
    scores, weights = (full_name(layer, local) for local in READS_PRODUCTS[:2])
    if state.good(weights) and state.bad(scores) and _is_scaled(state, scores):
        state.excuse(scores, "another scale, but the weights are right: before the scaling?")


def _settle_heads(state: _Settling, layer: int) -> None:
    """Heads in another order are the same model if the output projection undoes it."""
    after = [full_name(layer, local) for local in ATTENTION_OUTPUT]
    covered = [name for name in after if name in state.findings]
    if not covered or state.findings[covered[0]].status != PASS:
        return
    for local in BY_HEAD:
        name = full_name(layer, local)
        if state.bad(name) and _is_permuted(state, name, state.golden.config.head_dim):
            state.excuse(name, "heads in another order")


def _settle_mlp(state: _Settling, layer: int) -> None:
    after = [full_name(layer, local) for local in ("mlp.down_proj", "mlp", "block")]
    covered = [name for name in after if name in state.findings]
    if not covered or state.findings[covered[0]].status != PASS:
        return
    for local in MLP_CHANNELS:
        name = full_name(layer, local)
        if state.bad(name) and _is_permuted(state, name, 1):
            state.excuse(name, "channels in another order")


MOST_UNITS = 2048  # comparing all channels with all others is quadratic


def _is_permuted(state: _Settling, name: str, width: int) -> bool:
    """Whether the array is the truth with its heads (or channels) in another order."""
    array = state.label(name)
    gold = state.golden.tensors[name]
    view = next(iter(views(name, array, state.golden)), None) if array else None
    if view is None or view.values.shape != gold.shape:
        return False
    mine = cleaned(name, view.values, state.golden, slice(0, state.golden.tokens.shape[1]))
    a, r = (_units(name, x.astype(np.float64), width) for x in (mine, gold))
    if len(a) > MOST_UNITS or not np.isfinite(a).all():
        return False
    distance = (a * a).sum(1)[:, None] + (r * r).sum(1) - 2 * a @ r.T
    limit = 4 * state.findings[name].yardstick
    there, back = distance.argmin(axis=1), distance.argmin(axis=0)
    return error(a, r[there]) <= limit and error(r, a[back]) <= limit


def _is_scaled(state: _Settling, name: str) -> bool:
    """Whether the array is the truth times one number."""
    array, gold = state.label(name), state.golden.tensors[name].astype(np.float64)
    view = next(iter(views(name, array, state.golden)), None) if array else None
    if view is None or view.values.shape != gold.shape or not np.isfinite(view.values).all():
        return False
    mine = cleaned(name, view.values, state.golden, slice(0, state.golden.tokens.shape[1]))
    factor = float((mine * gold).sum() / ((gold**2).sum() or 1.0))
    return factor > 0 and error(mine, gold * factor) <= 4 * state.findings[name].yardstick


def _units(name: str, x: np.ndarray, width: int) -> np.ndarray:
    """One row per head or channel."""
    if axes_of(name).split(",")[1] != "T":
        return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
    units = x.reshape(*x.shape[:-1], -1, width)
    return np.moveaxis(units, -2, 0).reshape(units.shape[-2], -1)


def _settle_tables(state: _Settling) -> None:
    """Rotary tables may be shifted or permuted if everything that uses them is right."""
    rest = [name for name in state.findings if name not in TABLES]
    if not state.all_good(rest) or not any(split_name(n)[1] not in BEFORE_ROTATION for n in rest):
        return
    for name in TABLES:
        if state.bad(name) and (_is_shifted(state, name) or _is_permuted(state, name, 1)):
            state.excuse(name, "other angles, but everything that uses them is right")


TABLES = ("model.rotary_emb.cos", "model.rotary_emb.sin")


def _is_shifted(state: _Settling, name: str) -> bool:
    """Whether a table is the true one with a constant added to every channel's angle.

    cos(x + c) = cos(c) cos(x) - sin(c) sin(x): a combination of both tables, of length 1.
    """
    array, golden = state.label(name), state.golden
    pair = [golden.tensors.get(table) for table in TABLES]
    if array is None or pair[0] is None or pair[1] is None:
        return False
    for view in views(name, array, golden):
        mine = view.values[0].astype(np.float64)
        rows = slice(view.start, view.start + len(mine))
        cos, sin = (np.asarray(table)[0, rows].astype(np.float64) for table in pair)
        if len(mine) < 4 or not np.isfinite(mine).all():
            continue
        fits = [np.linalg.lstsq(np.stack([c, s], 1), m, rcond=None)[0]
                for c, s, m in zip(cos.T, sin.T, mine.T, strict=True)]  # fmt: skip
        a, b = np.array(fits).T
        close = error(mine, a * cos + b * sin) <= 10 * state.findings[name].yardstick
        if close and np.abs(a**2 + b**2 - 1).max() < 0.02:
            return True
    return False


BEFORE_ROTATION = ("model.embed_tokens", "input_layernorm", "self_attn.q_proj",
                   "self_attn.k_proj", "self_attn.v_proj")  # fmt: skip


def _settle_logits(state: _Settling) -> None:
    """A constant added to all logits of a token changes no probability."""
    if not state.bad("lm_head"):
        return
    array, found = state.label("lm_head"), state.findings["lm_head"]
    for view in views("lm_head", array, state.golden) if array else ():
        n = view.values.shape[1]
        gold = state.golden.tensors["lm_head"][:, view.start : view.start + n].astype(np.float64)
        mine = view.values - view.values.mean(axis=-1, keepdims=True, dtype=np.float64)
        centred = gold - gold.mean(axis=-1, keepdims=True)
        if grade(mine, centred, error(mine, centred), found.yardstick)[0] != FAIL:
            state.excuse("lm_head", "a constant per token was added (log-probabilities?)")
            return
        if _are_probabilities(view.values):
            state.findings["lm_head"] = replace(found, reason=PROBABILITIES)
            return


def _are_probabilities(rows: np.ndarray) -> bool:
    """Whether no number is negative and every row adds up to 1."""
    sums = rows.sum(axis=-1, dtype=np.float64)
    return bool((rows >= 0).all() and np.allclose(sums, 1, atol=1e-2))  # 1e-2: bfloat16


def _invisible_winners(golden: Golden, port: Port) -> list[str]:
    """Rows of a padded vocabulary must not win against real tokens."""
    V = golden.config.vocab_size
    for array in port.arrays.get("lm_head", []):
        values = array.values
        if values.ndim and values.shape[-1] > V:
            winners = values.argmax(axis=-1)
            count = int((winners >= V).sum())
            if count:
                return [f"{count} rows have their largest logit beyond the vocabulary of {V}"]
    return []


def _topk_findings(golden: Golden, port: Port) -> list[Finding]:
    if port.topk is None or "lm_head" not in golden.tensors:
        return []
    yardstick = limit_base(golden, "lm_head", port.precision)
    return [topk_finding(golden.tensors["lm_head"][0], port.topk, golden, yardstick)]


def topk_finding(logits: np.ndarray, topk: TopK, golden: Golden, yardstick: float) -> Finding:
    """Judge log-probabilities of the best tokens against logits (T, V).

    The error is taken relative to the size of the logits, whose yardstick applies. Without ids
    the sorted values are compared.
    """
    n, best = len(topk.logprobs), None
    for start in dict.fromkeys((golden.prompt - 1, len(logits) - n)):
        rows = logits[start : start + n].astype(np.float64)
        if len(rows) < n or n == 0:
            continue
        scale = float(np.sqrt(2 * (rows**2).mean())) or 1.0
        gold = _expected_topk(rows, topk)
        with np.errstate(all="ignore"):
            off = np.maximum(np.abs(topk.logprobs - gold) - topk.rounding, 0)
            size = float(np.sqrt((off**2).mean()) / scale)
        ok = np.isfinite(topk.logprobs).all() and np.isfinite(gold).all()
        size = size if ok else float("inf")
        status = PASS if size <= 2 * yardstick else NOTE if size <= 4 * yardstick else FAIL
        profile = tuple((np.abs(off).max(axis=1) / scale).tolist())
        found = Finding("lm_head", status, size, size, yardstick, "top log-probabilities",
                        start=start, position=None if status != FAIL else start,
                        profile=profile)  # fmt: skip
        best = found if best is None or found.error < best.error else best
    wrong = Finding("lm_head", FAIL, float("inf"), float("inf"), yardstick, "top log-probabilities",
                    reason=f"{n} rows, the golden file has {len(logits)}")  # fmt: skip
    return best or wrong


def _expected_topk(rows: np.ndarray, topk: TopK) -> np.ndarray:
    logprobs = log_softmax(rows)
    k = topk.logprobs.shape[1]
    if topk.ids is None or topk.ids.shape != topk.logprobs.shape:
        return -np.sort(-logprobs, axis=-1)[:, :k]
    known = (topk.ids >= 0) & (topk.ids < rows.shape[1])
    picked = np.take_along_axis(logprobs, np.where(known, topk.ids, 0), axis=-1)
    return np.where(known, picked, np.inf)


def _greedy_findings(golden: Golden, port: Port) -> list[Finding]:
    """Best token after every row, fed with the golden tokens."""
    if port.greedy is None or "lm_head" not in golden.tensors:
        return []
    yardstick = limit_base(golden, "lm_head", port.precision)
    return [greedy_finding(golden.tensors["lm_head"], port.greedy, yardstick)]


def greedy_finding(logits: np.ndarray, greedy: np.ndarray, yardstick: float) -> Finding:
    """How far the chosen tokens are below the best logit, relative to the size of the logits."""
    n = greedy.shape[1]
    rows = logits[:, -n:].astype(np.float64)
    if rows.shape[:2] != greedy.shape or (greedy < 0).any() or (greedy >= rows.shape[2]).any():
        reason = f"greedy_ids {greedy.shape} do not fit"
        return Finding("lm_head", FAIL, np.inf, np.inf, yardstick, "greedy_ids", reason=reason)
    chosen = np.take_along_axis(rows, greedy[..., None], axis=-1)[..., 0]
    gap = (rows.max(axis=-1) - chosen) / (float(np.sqrt((rows**2).mean())) or 1.0)
    worst = float(gap.max())
    status = PASS if worst <= 10 * yardstick else FAIL  # nearly equal logits may swap
    first = np.flatnonzero((gap > 10 * yardstick).any(axis=0))
    position = logits.shape[1] - n + int(first[0]) if len(first) else None
    profile = tuple(gap.max(axis=0).tolist())
    return Finding("lm_head", status, worst, worst, yardstick, "greedy_ids",
                   start=logits.shape[1] - n, position=position, profile=profile)  # fmt: skip


def hint(report: Report) -> str:
    """What the pattern of the first divergence usually means."""
    first = report.first_divergence
    if first is None:
        return ""
    if not np.isfinite(first.error) or first.reason:
        return _broken_rows(first) if first.reason in ("", BROKEN) else first.reason
    local = split_name(first.tensor)[1]
    at, start = first.position or 0, first.start
    if len(report.findings) == 1 and local in LATE:
        return f"wrong from position {at} on: dump the blocks, too, to see where it begins"
    heads = _some_heads(first)
    if report.prompt and at >= report.prompt and start < report.prompt:
        return "the prompt is right, decoding is wrong: positions, cache slots or mask offset"
    if at > start and start == 0:
        by_token = local in ROTARY or local == "model.embed_tokens"
        usual = USUALLY[local] if by_token else "rotary angles, mask, or key/value heads"
        return f"clean before position {at}: {usual}" + heads
    return USUALLY.get(local, "wrong from the first token: weights or arithmetic") + heads


LATE = ("block", "model.norm", "lm_head")


def _broken_rows(finding: Finding) -> str:
    """What NaN usually means, by the rows that have it."""
    rows = [finding.start + i for i, e in enumerate(finding.profile) if not np.isfinite(e)]
    local = split_name(finding.tensor)[1]
    attends = local in (*READS_PRODUCTS, *ATTENTION_OUTPUT) and local != "block"
    if 0 < len(rows) < len(finding.profile) and attends:
        where = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        return f"NaN or infinity only at position {where}: fully masked (softmax of only -inf)?"
    return "NaN or infinity: overflow, a fully masked row, or memory that was never written"


def _some_heads(finding: Finding) -> str:
    wrong = [i for i, e in enumerate(finding.heads) if not e <= PEAK * finding.yardstick]
    some = 0 < len(wrong) < len(finding.heads)
    return f"; only heads {', '.join(map(str, wrong))} are wrong" if some else ""


USUALLY = {
    "model.embed_tokens": "the embedding: other token ids, misread weights, or scaled rows",
    "model.rotary_emb.cos": "rotary tables: theta, scaling, exponent or precision",
    "model.rotary_emb.sin": "rotary tables: theta, scaling, exponent, precision or sign",
    "input_layernorm": "the norm: eps, its weight, or the mean subtracted",
    "post_attention_layernorm": "the norm: eps, its weight, or the wrong norm's weight",
    "self_attn.q_proj": "the weight: transposed, permuted, a bias dropped, fused q/k/v split wrong",
    "self_attn.k_proj": "the weight: transposed, permuted for the wrong number of heads, a bias",
    "self_attn.v_proj": "the weight: transposed, a bias dropped, fused q/k/v split wrong",
    "self_attn.q_rot": "the rotary step: channel pairs, sign, or applied at all",
    "self_attn.k_rot": "the rotary step: channel pairs, sign, or applied at all",
    "self_attn.scores": "scores: the scale, or which key head serves which query head",
    "self_attn.weights": "the mask or the softmax",
    "self_attn.context": "attention: mask, scale, or which value head serves which query head",
    "self_attn.o_proj": "the output projection: transposed, heads in another order",
    "self_attn": "the output projection: transposed, heads in another order",
    "middle": "the residual: what is added to what",
    "mlp.act_fn": "the activation function",
    "mlp.hidden": "the gated product: gate and up exchanged, activation on the wrong branch",
    "block": "the residual after the MLP, or what is inside this layer",
    "model.norm": "the final norm: missing, its weight, eps",
    "lm_head": "the head: tied or not, rows shifted, or anything before it",
}


def _table(report: Report) -> Iterator[str]:
    """Lines for the terminal."""
    yield f"{'tensor':44} {'error':>9} {'yardstick':>9} {'ratio':>8}  status"
    for f in report.findings:
        extra = "; ".join(filter(None, (f.layout, f.reason)))
        where = f" from position {f.position}" if f.position is not None else ""
        ratio = f"{f.ratio:8.1f}" if f.ratio < 1e5 else f"{f.ratio:8.0e}"
        note = f"{f.status}{where}{f' ({extra})' if extra else ''}"
        yield f"{f.tensor:44} {f.error:9.2e} {f.yardstick:9.2e} {ratio}  {note}"
    for text in (*report.problems, *report.notes):
        yield f"! {text}"
    if report.unknown:
        yield f"names not understood: {', '.join(map(repr, report.unknown[:8]))}"
    covered = len(report.findings)
    yield f"{covered} arrays compared as {report.precision}, {len(report.not_covered)} not covered"
    first = report.first_divergence
    if first is not None:
        yield f"first divergence: {first.tensor}, position {first.position}: {hint(report)}"
    yield f"verdict: {report.verdict}"


def profiles(report: Report) -> Mapping[str, tuple[float, ...]]:
    """The error of every row, per array."""
    return {f.tensor: f.profile for f in report.findings}
