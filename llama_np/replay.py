"""Every op of a port recomputed from the port's own inputs.

The model runs once in float64, and wherever the dump has an array, that array takes the place of
the computed one after the two were compared. Errors cannot accumulate, so limits are strict and
every faulty op shows, not only the first. Between captured points the interval is compared as
one op, named by its output.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llama_np.config import Config
from llama_np.experiment import (
    AXES,
    FLOAT64,
    INPUT_OF,
    PRECISIONS,
    Enough,
    Op,
    Place,
    Precision,
    Run,
    axes_of,
    error,
    evaluate,
    full_name,
    honest_runs,
    misfit,
    names_in_order,
    one_call,
    plain_run,
    row_axis,
    split_name,
)
from llama_np.layers import project, rms_norm
from llama_np.model import ModelWeights
from llama_np.patterns import end_of_sum, listed, traces, wrong_channels, wrong_rows
from llama_np.ports import ROTARY, Dump, Port, View, read_port, views
from llama_np.trace import (
    Golden,
    Model,
    expected_shape,
    in_order,
    load_golden,
    open_model,
    texts_as_rows,
)
from llama_np.verify import FAIL, HOPELESS, PASS, cleaned

UNIT = 2.0**-24  # the largest relative error of one float32 operation
SLACK = 2.0  # an op may be twice as far off as an honest one
# Sums: the array whose last axis is summed over.
SUMMED = INPUT_OF | {
    "input_layernorm": "input_layernorm",
    "self_attn.scores": "self_attn.q_rot",
    "self_attn.weights": "self_attn.scores",
    "self_attn.context": "self_attn.weights",
    "post_attention_layernorm": "post_attention_layernorm",
    "model.norm": "model.norm",
}
QUANTIZED = (
    "every matrix product, and nothing else, is off, at the median by {:.1%}: "
    "if its weights are quantized, compare with the quantized model"
)
IN_PART = (
    "{} alone: off by {:.1%} at the median in all channels, as with quantized weights, those of "
    "another checkpoint, or an input that is not the one recorded (normalized or cast once more)"
)
ONE_STEP = "only {} could be recomputed, in one step from the tokens: `verify` is stricter there"
LITTLE = 0.2  # relative error of a product with weights of four bits
MOST_SUSPECTS = 7  # products of a layer
SEARCHED = 3  # faulty ops for which another weight is looked for
AFTER_SCORES = ("self_attn.scores", "self_attn.weights", "self_attn.context")
SHIFTS = (*range(1, 33), *range(-1, -9, -1))  # constant shifts of all positions that are tried


@dataclass(frozen=True)
class Fault:
    """An op whose output does not follow from its inputs.

    position: the first wrong row; channels: the wrong columns of its output, if they are few or
    in one piece; right_with: another weight of the model, or the part of the sum, with which it
    follows; traces: what else the wrong numbers have in common, in words.
    """

    op: str
    error: float
    limit: float
    position: int | None = None
    reason: str = ""
    channels: tuple[int, ...] = ()
    right_with: str = ""
    traces: tuple[str, ...] = ()

    @property
    def pattern(self) -> str:
        """How the output differs, in words; empty if nothing stands out."""
        where = f"only in {listed('channel', self.channels)}" if self.channels else ""
        right = f"right with {self.right_with}" if self.right_with else ""
        return "; ".join(filter(None, (where, *self.traces, right)))


@dataclass(frozen=True)
class Replayed:
    """The outcome of a replay; `str` of it is for people."""

    verdict: str
    faulty: tuple[Fault, ...]
    precision: str
    checked: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON-ready data."""
        return {
            "verdict": self.verdict,
            "faulty": [_brief(f) for f in self.faulty],
            "precision": self.precision,
            "checked": [_brief(f) for f in self.checked],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{'op':44} {'error':>9} {'limit':>9}"]
        for f in self.faulty:
            lines.append(f"{f.op:44} {f.error:9.2e} {f.limit:9.2e}  {_where(f)}")
        lines += [f"! {note}" for note in self.notes]
        lines.append(f"{len(self.checked)} ops recomputed as {self.precision}, "
                     f"{len(self.faulty)} faulty")  # fmt: skip
        return "\n".join([*lines, f"verdict: {self.verdict}"])


def _where(fault: Fault) -> str:
    return "; ".join(
        filter(None, (fault.reason or f"from position {fault.position}", fault.pattern))
    )


def _brief(fault: Fault) -> dict[str, Any]:
    size = fault.error if np.isfinite(fault.error) else None
    brief = {"op": fault.op, "error": size, "limit": fault.limit, "position": fault.position}
    more = {"reason": fault.reason, "channels": list(fault.channels)}
    more |= {"right_with": fault.right_with, "traces": list(fault.traces)}
    return brief | {key: value for key, value in more.items() if value}


def replay(
    port: Dump | Port,
    model: Model = "fairytales",
    *,
    golden: Golden | str | os.PathLike[str] | None = None,
    precision: str | None = None,
) -> Replayed:
    """Check every op of a dump on the dump's own inputs.

    The dump should hold `input_ids`; otherwise the golden file's are taken if one is given, or
    the captured embedding is where the check begins.
    Errors: ValueError when nothing says how many tokens there are; OSError, CheckpointError for
    files that cannot be read.
    """
    config, weights = open_model(model)
    given = port if isinstance(port, Port) else read_port(port, config, precision)
    truth = load_golden(golden) if isinstance(golden, str | os.PathLike) else golden
    like = _like(given, config, truth)
    run = plain_run(config, weights, like.tokens, like.positions, like.calls, like.prompt)
    result = _replayed(given, run, like, interleaved=False)
    if result.faulty:
        turned = _replayed(given, run, like, interleaved=True)
        # Weights in the other layout look similar: there the rotation is wrong instead.
        result = turned if 2 * len(turned.faulty) < len(result.faulty) else result
    result = _unless_unscaled(result, given, run, like)
    return _unless_shifted(result, given, run, like)


def _like(port: Port, config: Config, truth: Golden | None) -> Golden:
    """Tokens and positions in the form that reading a dump needs; no values."""
    if truth is not None and port.tokens is None:
        return replace(truth, tensors={}, yardsticks={})
    if port.tokens is not None:
        tokens, positions = texts_as_rows(port.tokens)
        if truth is not None and truth.tokens.shape == tokens.shape:
            positions = truth.positions
    elif "model.embed_tokens" in port.arrays:
        rows = port.arrays["model.embed_tokens"][0].values.size // config.hidden_size
        tokens, positions = texts_as_rows(np.zeros((1, max(rows, 1)), np.int64))
    else:
        raise ValueError("the dump holds neither input_ids nor model.embed_tokens")
    if tokens.max() >= config.vocab_size:
        raise ValueError(f"token id {tokens.max()} is outside the vocabulary")
    T = tokens.shape[1]
    if truth is not None and truth.tokens.shape == tokens.shape:
        return Golden({}, {}, tokens, positions, truth.calls, truth.prompt, config)
    return Golden({}, {}, tokens, positions, (T,), T, config)


@dataclass
class _Pass:
    """One run of the model over the port's arrays."""

    port: Port
    like: Golden
    interleaved: bool
    computed: dict[str, np.ndarray] = field(default_factory=dict)
    captured: dict[str, tuple[slice, np.ndarray]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, View] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)  # where given, ends at the first fault

    def ops(self, precision: Precision) -> dict[str, Op]:
        """Every named array compared with the port's and replaced by it."""

        def op(local: str) -> Op:
            def take(array: np.ndarray, place: Place) -> np.ndarray:
                name = full_name(place.layer, local)
                return self._taken(name, precision.rounded(array))

            return take

        return {local: op(local) for local in AXES}

    def _taken(self, name: str, array: np.ndarray) -> np.ndarray:
        view = self.chosen.get(name) or self._choose(name, array)
        if view is None:
            return array
        n = view.values.shape[row_axis(name)]
        rows = slice(view.start, view.start + n)
        index = (slice(None),) * row_axis(name) + (rows,)
        mine = cleaned(name, view.values, self.like, rows)
        shown = cleaned(name, array[index], self.like, rows)
        self.computed[name], self.captured[name] = shown, (rows, mine)
        if error(mine, shown) > self.limits.get(name, np.inf):
            raise Enough
        result = array.copy()
        result[index] = mine
        if split_name(name)[1] == "self_attn.scores":  # later tokens were blanked: mask them again
            result = np.where(self._seen(), result, array)
        return result

    def _seen(self) -> np.ndarray:
        return np.tri(self.like.tokens.shape[1], dtype=bool)

    def _choose(self, name: str, array: np.ndarray) -> View | None:
        """The reading of the port's array that fits the computed one best."""
        best, least = None, np.inf
        arrays = self.port.arrays.get(name, [])
        for captured in arrays:
            for view in views(name, captured, self.like):
                turned = "interleaved" in view.layout
                if turned != (self.interleaved and split_name(name)[1] in ROTARY):
                    continue
                rows = slice(view.start, view.start + view.values.shape[row_axis(name)])
                index = (slice(None),) * row_axis(name) + (rows,)
                size = misfit(cleaned(name, view.values, self.like, rows),
                              cleaned(name, array[index], self.like, rows))  # fmt: skip
                if best is None or size < least * 0.5:
                    best, least = view, size
        if best is None and arrays:
            self.unreadable[name] = f"shape {arrays[0].values.shape} does not fit"
        if best is not None and self._is_other(best.label, least):
            return None
        if best is not None:
            self.chosen[name] = best
        return best

    def _is_other(self, label: str, size: float) -> bool:
        """Whether an ambiguous name means another array here."""
        meanings = sum(a.label == label for same in self.port.arrays.values() for a in same)
        return meanings > 1 and not size < 0.1


def _replayed(port: Port, run: Run, like: Golden, interleaved: bool) -> Replayed:
    exact = _Pass(port, like, interleaved)
    evaluate(one_call(run.with_op_map(exact.ops(FLOAT64))), FLOAT64)
    limits = _limits(port, run, like, exact)
    checked = []
    for name in in_order(exact.computed, run.config):
        given = name == "model.embed_tokens" and port.tokens is None
        if given and np.isfinite(exact.captured[name][1]).all():
            continue
        checked.append(_fault(name, exact, limits[name]))
    for name, reason in exact.unreadable.items():
        checked.append(Fault(name, float("inf"), 0.0, 0, reason))
    faulty = tuple(f for f in checked if not f.error <= f.limit)
    notes = ["rotary pairs are interleaved"] if interleaved else []
    if _permuted_alike(exact, faulty, run.config.head_dim):
        faulty = ()
        notes.append("q, k and tables have their channels in another order: equivalent")
    if not checked:
        notes.append("nothing could be recomputed: no known array in the dump")
    if len(checked) == 1:
        notes.append(ONE_STEP.format(checked[0].op))
    verdict = PASS if checked and not faulty else FAIL
    searched = [replace(f, right_with=_weight_that_fits(f, exact, run)) for f in faulty[:SEARCHED]]
    faulty = (*searched, *faulty[SEARCHED:])
    notes += _suspicions(checked, faulty)
    return Replayed(verdict, faulty, port.precision, tuple(checked), tuple(notes))


def _suspicions(checked: Sequence[Fault], faulty: Sequence[Fault]) -> list[str]:
    """What products that are a little off in all channels, and nothing else, may mean."""
    size = float(np.median([f.error for f in faulty])) if faulty else 0.0
    if _quantized(checked, faulty):
        return [QUANTIZED.format(size)]
    dense = all(
        split_name(f.op)[1] in INPUT_OF and f.error < LITTLE and not f.pattern for f in faulty
    )
    few = len(checked) > 1 and 0 < len(faulty) <= MOST_SUSPECTS
    return [IN_PART.format(", ".join(f.op for f in faulty), size)] if dense and few else []


def _quantized(checked: Sequence[Fault], faulty: Sequence[Fault]) -> bool:
    """Whether (nearly) all matrix products are faulty by a little, and nothing else is."""
    products = [f for f in checked if split_name(f.op)[1] in INPUT_OF]
    wrong = [f for f in faulty if split_name(f.op)[1] in INPUT_OF]
    others = {split_name(f.op)[1] for f in faulty} - INPUT_OF.keys() - {"model.embed_tokens"}
    few = len(products) < 4 or len(wrong) < 0.8 * len(products)
    return not (few or others) and all(f.error < LITTLE for f in faulty)


def _permuted_alike(exact: _Pass, faulty: tuple[Fault, ...], H: int) -> bool:
    """Whether all that is faulty are q, k and rotary tables, permuted in the same way.

    The tables have to be among it: without them the permutation would be a mistake.
    """
    by_op = {f.op: f for f in faulty}
    tables = {"model.rotary_emb.cos", "model.rotary_emb.sin"} <= by_op.keys()
    projected = [op for op in by_op if split_name(op)[1].endswith(("q_proj", "k_proj"))]
    only = all(split_name(op)[1] in ROTARY for op in by_op)
    if not (tables and projected and only) or set(by_op) & set(exact.unreadable):
        return False
    pairs = {op: [x.reshape(*x.shape[:-1], -1, H) for x in
                  (exact.captured[op][1], exact.computed[op])] for op in by_op}  # fmt: skip
    mine, gold = (x[..., 0, :].reshape(-1, H) for x in pairs[projected[0]])
    order = np.square(mine[:, :, None] - gold[:, None]).sum(axis=0).argmin(axis=1)
    return all(error(a, r[..., order]) <= 4 * by_op[op].limit for op, (a, r) in pairs.items())


def _fault(name: str, exact: _Pass, limit: float) -> Fault:
    rows, mine = exact.captured[name]
    gold, axis = exact.computed[name], row_axis(name)
    size = error(mine, gold)
    if not np.isfinite(size):
        return Fault(name, size, limit, rows.start, "NaN or infinity")
    if size <= limit:
        return Fault(name, size, limit)
    a, r = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (mine, gold))
    wrong = wrong_rows(a, r, limit)
    position = rows.start + int(wrong[0]) if len(wrong) else None
    C = gold.shape[-1]
    channels = wrong_channels(mine.reshape(-1, C), gold.reshape(-1, C), limit)
    by_head = axes_of(name).endswith("*H")
    width = exact.like.config.head_dim if by_head else C
    found = tuple(traces(a, r, limit, width))
    return Fault(name, size, limit, position, channels=channels, traces=found)


def _weight_that_fits(fault: Fault, exact: _Pass, run: Run) -> str:
    """The weight, or the part of it, with which the port's output follows from its input."""
    layer, local = split_name(fault.op)
    source, own = _input_of(fault.op, run.config), f"{local}.weight"
    group = run.weights if layer < 0 else run.weights[f"model.layers.{layer}"]
    if fault.reason or source not in exact.captured or own not in group:
        return ""
    (start, x), (rows, mine) = exact.captured[source], exact.captured[fault.op]
    x = x[:, rows.start - start.start : rows.stop - start.start].astype(np.float64)
    if x.shape[1] != mine.shape[1]:
        return ""
    for name, module in _exchangeable(run.weights, full_name(layer, own), group):
        w = {f"{local}.{kind}": FLOAT64.convert(array) for kind, array in module.items()}
        linear = local in INPUT_OF
        output = project(local, x, w) if linear else rms_norm(local, x, w, run.config.rms_norm_eps)
        if error(mine, output) <= fault.limit:
            return name
    if local not in INPUT_OF:
        return ""
    outputs, inputs = group[own].shape
    summed = (mine - group.get(f"{local}.bias", 0)).reshape(-1, outputs)
    n = end_of_sum(x.reshape(-1, inputs), FLOAT64.convert(group[own]), summed, fault.limit)
    return f"the first {n} of {inputs} inputs" if n else ""


def _input_of(name: str, config: Config) -> str:
    """The array that a linear layer or a norm reads."""
    layer, local = split_name(name)
    if local == "model.norm":
        return full_name(config.num_hidden_layers - 1, "block")
    if local == "input_layernorm":
        return full_name(layer - 1, "block") if layer else "model.embed_tokens"
    if local == "post_attention_layernorm":
        return full_name(layer, "middle")
    return full_name(layer, INPUT_OF.get(local, ""))


def _exchangeable(
    weights: ModelWeights, own: str, group: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Every module whose weight has the shape of `own`: that weight's name, weight and bias.

    First comes the module itself with its matrix taken for an (in, out) one.
    """
    local = split_name(own)[1]
    mine = group[local]
    bias = group.get(local.replace(".weight", ".bias"))
    if mine.ndim == 2:
        misread = np.ascontiguousarray(mine).reshape(mine.shape[::-1]).T
        yield f"{own} read as (in, out)", _module(misread, bias)
    for name, value in weights.items():
        inside = isinstance(value, Mapping)
        for key, array in value.items() if inside else [(name, value)]:
            full = f"{name}.{key}" if inside else name
            if full != own and array.shape == mine.shape:
                other = value if inside else weights
                yield full, _module(array, other.get(key.replace(".weight", ".bias")))


def _module(weight: np.ndarray, bias: np.ndarray | None) -> dict[str, np.ndarray]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _limits(port: Port, run: Run, like: Golden, exact: _Pass) -> dict[str, float]:
    """Per interval: twice what honest runs of that interval get wrong in the port's precision."""
    precision = PRECISIONS[port.precision]
    worst = dict.fromkeys(exact.computed, 0.0)
    for honest in honest_runs(run):
        attempt = _Pass(port, like, exact.interleaved, chosen=exact.chosen)
        evaluate(one_call(honest.with_op_map(attempt.ops(precision))), precision)
        for name, gold in exact.computed.items():
            worst[name] = max(worst[name], error(attempt.computed[name], gold))
    if precision.name == "float32":
        floors = _rounding(worst, like)
    else:
        floors = dict.fromkeys(worst, {"bfloat16": 2.0**-10, "float16": 2.0**-13}[precision.name])
    return {n: min(SLACK * max(size, floors[n]), HOPELESS) for n, size in worst.items()}


def _rounding(names: Iterable[str], like: Golden) -> dict[str, float]:
    """What the plainest float32 program gets wrong in each of these intervals.

    Adding n numbers one after another costs up to sqrt(n) / 4 roundings (measured for dot
    products, norms and softmax, n = 16 ... 8192), the arithmetic around it two more: exp is
    rarely exact, and fused kernels add in another order than the dumped ones. Ops that were not
    captured add theirs to the next one that was.
    """
    captured, floors, skipped = set(names), dict.fromkeys(names, 0.0), 0.0
    for name in names_in_order(like.config.num_hidden_layers):
        layer, local = split_name(name)
        summed = SUMMED.get(local)
        terms = 0
        if summed is not None:
            terms = expected_shape(full_name(layer, summed), like.config, *like.tokens.shape)[-1]
        skipped += UNIT * (2 + math.sqrt(terms) / 4)
        if name in captured:
            floors[name], skipped = skipped, 0.0
    return floors


def _unless_unscaled(result: Replayed, port: Port, run: Run, like: Golden) -> Replayed:
    """Scores that were captured before the scaling are right if all that follows them is."""
    scores = [name for name in port.arrays if name.endswith("self_attn.scores")]
    wrong = {split_name(f.op)[1] for f in result.faulty}
    if not scores or not wrong or not wrong <= set(AFTER_SCORES):
        return result
    factor = 1 / math.sqrt(run.config.head_dim)
    scaled = {
        name: [replace(array, values=array.values * factor) for array in port.arrays[name]]
        for name in scores
    }
    again = _replayed(replace(port, arrays={**port.arrays, **scaled}), run, like, False)
    if again.faulty:
        return result
    return replace(again, notes=(*again.notes, "the scores were captured before the scaling"))


def _unless_shifted(result: Replayed, port: Port, run: Run, like: Golden) -> Replayed:
    """A constant shift of all positions changes rotations and nothing that they lead to."""
    rotary = {full_name(split_name(f.op)[0], local) for f in result.faulty for local in ROTARY}
    rotary |= {"model.rotary_emb.cos", "model.rotary_emb.sin"}
    if not result.faulty or not {f.op for f in result.faulty} <= rotary:
        return result
    limits = {f.op: f.limit for f in result.checked}
    for shift in SHIFTS:
        moved = replace(run, positions=np.where(run.positions >= 0, run.positions + shift, -1))
        attempt = _Pass(port, like, interleaved=False, limits=limits)
        try:
            evaluate(one_call(moved.with_op_map(attempt.ops(FLOAT64))), FLOAT64)
        except Enough:
            continue
        note = f"all positions are shifted by {shift}: mathematically equivalent"
        return replace(result, verdict=PASS, faulty=(), notes=(*result.notes, note))
    return result
