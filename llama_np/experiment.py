"""A forward pass as data: which tokens, seen from where, computed how, and in which precision.

`evaluate` runs the model of `model.py`, unchanged, and records every named array. A `Run` says
what differs from the plain model: another config, other positions, changed weights, or named
arrays that are computed differently (`ops`). The catalogue of mistakes and the honest runs
behind the yardsticks are both made of such differences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from llama_np.cache import KVCache
from llama_np.config import Config
from llama_np.layers import project
from llama_np.model import ModelWeights, causal, hidden_states, logits
from llama_np.precision import round_bf16, round_f16, widen
from llama_np.tap import Tap, chain

# Every named array in the order in which it is computed, with its axes.
BEFORE = {
    "model.embed_tokens": "B,T,D",
    "model.rotary_emb.cos": "B,T,H",
    "model.rotary_emb.sin": "B,T,H",
}
INSIDE = {
    "input_layernorm": "B,T,D",
    "self_attn.q_proj": "B,T,N*H",
    "self_attn.k_proj": "B,T,K*H",
    "self_attn.v_proj": "B,T,K*H",
    "self_attn.q_rot": "B,N,T,H",
    "self_attn.k_rot": "B,K,T,H",
    "self_attn.scores": "B,N,T,S",
    "self_attn.weights": "B,N,T,S",
    "self_attn.context": "B,T,N*H",
    "self_attn.o_proj": "B,T,D",
    "self_attn": "B,T,D",
    "middle": "B,T,D",
    "post_attention_layernorm": "B,T,D",
    "mlp.gate_proj": "B,T,F",
    "mlp.act_fn": "B,T,F",
    "mlp.up_proj": "B,T,F",
    "mlp.hidden": "B,T,F",
    "mlp.down_proj": "B,T,D",
    "mlp": "B,T,D",
    "block": "B,T,D",
}
AFTER = {"model.norm": "B,T,D", "lm_head": "B,T,V", "score": "B,T,C"}
AXES = BEFORE | INSIDE | AFTER

# The module that each linear layer reads.
INPUT_OF = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.context",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.hidden",
    "lm_head": "model.norm",
    "score": "model.norm",
}
FEW = 1 << 22  # numbers that are converted at a time
KEPT_WHOLE = 40_000_000  # models up to this many parameters are converted once, not per layer
_LAYER = re.compile(r"model\.layers\.(\d+)(?:\.(.+))?")


@lru_cache(1 << 14)  # asked for every array of every run
def split_name(name: str) -> tuple[int, str]:
    """Layer number (-1 outside of layers) and the name within the layer; outputs are "block"."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2] or "block") if match else (-1, name)


def full_name(layer: int, local: str) -> str:
    """The reverse of `split_name`."""
    if layer < 0:
        return local
    return f"model.layers.{layer}" + ("" if local == "block" else f".{local}")


def names_in_order(layers: int) -> list[str]:
    """All trace names of a model, in execution order."""
    inside = [full_name(i, local) for i in range(layers) for local in INSIDE]
    return [*BEFORE, *inside, *AFTER]


def axes_of(name: str) -> str:
    """The axes of a named array, for example "B,T,N*H"."""
    return AXES[split_name(name)[1]]


def row_axis(name: str) -> int:
    """Which axis of the named array counts the new tokens."""
    return axes_of(name).split(",").index("T")


@dataclass
class Place:
    """Where in the forward pass an array is being computed, and what was computed before it."""

    config: Config
    positions: np.ndarray  # (B, T) of this call
    columns: slice  # which of the run's tokens this call computes
    prompt: int  # how many tokens the run has before its decode steps
    layer: int = -1
    w: Mapping[str, np.ndarray] = field(default_factory=dict)  # this layer's weights
    seen: dict[str, np.ndarray] = field(default_factory=dict)  # "x" is the layer's input


Op = Callable[[np.ndarray, Place], np.ndarray]
WeightChange = Callable[[str, Any], Any]  # (name or layer name, array or mapping) -> the same


@dataclass(frozen=True)
class Run:
    """One forward pass as data.

    tokens, positions (B, T): -1 as a token asks for the greedy one; positions only rotate.
    visible (B, 1, T, T); calls: how many tokens each call of the model gets. `ops` replaces
    named arrays, `shown` rearranges them in the record only, `rows` are the recorded tokens.
    """

    config: Config
    weights: ModelWeights
    tokens: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    calls: tuple[int, ...]
    prompt: int
    ops: Mapping[str, Op] = field(default_factory=dict)
    shown: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    weight_changes: tuple[WeightChange, ...] = ()
    rows: np.ndarray | None = None

    def with_ops(self, **ops: Op) -> Run:
        """The same run with more arrays replaced; "__" in a keyword stands for a dot."""
        return self.with_op_map({name.replace("__", "."): op for name, op in ops.items()})

    def with_op_map(self, ops: Mapping[str, Op]) -> Run:
        """The same run with more arrays replaced; an array replaced twice goes through both."""
        joined = {n: _after(self.ops[n], op) if n in self.ops else op for n, op in ops.items()}
        return replace(self, ops={**self.ops, **joined})

    def with_config(self, **changes: Any) -> Run:
        """The same run under a changed configuration."""
        return replace(self, config=replace(self.config, **changes))

    def with_weights(self, change: WeightChange) -> Run:
        """The same run with weights passed through one more change."""
        return replace(self, weight_changes=(*self.weight_changes, change))


def _after(first: Op, second: Op) -> Op:
    return lambda array, place: second(first(array, place), place)


def plain_run(
    config: Config,
    weights: ModelWeights,
    tokens: np.ndarray,
    positions: np.ndarray,
    calls: tuple[int, ...],
    prompt: int,
) -> Run:
    """The model as it is."""
    visible = causal(positions, positions)
    return Run(config, weights, tokens, positions, visible, calls, prompt)


def one_call(run: Run) -> Run:
    """The same computation in a single call, unless rotations depend on the length so far."""
    depends = run.config.rope_scaling["rope_type"] in ("dynamic", "longrope")
    return run if depends else replace(run, calls=(run.tokens.shape[1],))


def only_in_layer(run: Run, layer: int, base: Run) -> Run | None:
    """What a run changes in the layers of a base run, in one layer alone; None if it does more."""
    apart = {"ops", "weights", "weight_changes"}
    for f in fields(Run):
        mine, theirs = getattr(run, f.name), getattr(base, f.name)
        if f.name not in apart and mine is not theirs and not np.array_equal(mine, theirs):
            return None
    if base.ops or base.weight_changes or not (run.ops.keys() <= INSIDE.keys()):
        return None
    ops = {name: _there(op, layer) for name, op in run.ops.items()}
    changes = tuple(_there_too(change, layer) for change in run.weight_changes)
    return replace(base, ops=ops, weight_changes=changes)


def _there(op: Op, layer: int) -> Op:
    return lambda array, place: op(array, place) if place.layer == layer else array


def _there_too(change: WeightChange, layer: int) -> WeightChange:
    group = f"model.layers.{layer}"
    return lambda name, value: change(name, value) if name == group else value


@dataclass(frozen=True)
class Precision:
    """How numbers are kept: every weight and named array is converted and rounded."""

    name: str
    dtype: np.dtype
    rounded: Callable[[np.ndarray], np.ndarray] = lambda array: array

    def convert(self, array: np.ndarray) -> np.ndarray:
        """Any stored array in this precision; large ones a few rows at a time."""
        if array.ndim < 2 or array.size <= FEW:
            return self.rounded(widen(array).astype(self.dtype, copy=False))
        converted = np.empty(array.shape, self.dtype)
        step = max(1, FEW * len(array) // array.size)
        for start in range(0, len(array), step):
            rows = widen(array[start : start + step]).astype(self.dtype, copy=False)
            converted[start : start + step] = self.rounded(rows)
        return converted


FLOAT64 = Precision("float64", np.dtype(np.float64))
FLOAT32 = Precision("float32", np.dtype(np.float32))
BFLOAT16 = Precision("bfloat16", np.dtype(np.float32), round_bf16)
FLOAT16 = Precision("float16", np.dtype(np.float32), round_f16)
PRECISIONS = {p.name: p for p in (FLOAT32, BFLOAT16, FLOAT16)}


class Prepared(Mapping[str, Any]):
    """Weights in a precision and changed, one layer at a time: 1B parameters fit in 8 GB."""

    def __init__(self, source: ModelWeights, precision: Precision, run: Run) -> None:
        self.source, self.precision, self.changes = source, precision, run.weight_changes
        self.keep = parameters(source) <= KEPT_WHOLE
        self.ready: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name in self.ready:
            return self.ready[name]
        value = self._prepare(name)
        if not self.keep:
            self.ready.clear()
        self.ready[name] = value
        return value

    def _prepare(self, name: str) -> Any:
        value, convert = self.source[name], self.precision.convert
        if isinstance(value, Mapping):
            value = {key: convert(array) for key, array in value.items()}
        elif name != "model.embed_tokens.weight":  # its rows are converted where they are used
            value = convert(value)
        for change in self.changes:
            value = change(name, value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def get(self, name: str, default: Any = None) -> Any:
        """The weight, or `default` where the model has none of that name."""
        return self[name] if name in self.source else default


def converted_once(run: Run, precision: Precision) -> Run:
    """The same run over weights that are in this precision already, for being varied many times.

    Models above KEPT_WHOLE stay as they are: they are converted one layer at a time.
    """
    if parameters(run.weights) > KEPT_WHOLE:
        return run
    done: dict[int, np.ndarray] = {}  # a tied head stays the same array as the embedding

    def wide(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: wide(array) for key, array in value.items()}
        if id(value) not in done:
            done[id(value)] = precision.convert(value)
        return done[id(value)]

    return replace(run, weights={name: wide(value) for name, value in run.weights.items()})


def parameters(weights: ModelWeights) -> int:
    """How many numbers the weights hold."""
    parts = [v.values() if isinstance(v, Mapping) else [v] for v in weights.values()]
    return sum(array.size for part in parts for array in part)


def spans(calls: tuple[int, ...]) -> Iterator[slice]:
    """The columns of the tokens that each call computes."""
    ends = np.cumsum(calls).tolist()
    return (slice(end - n, end) for end, n in zip(ends, calls, strict=True))


Watch = Callable[[str, np.ndarray], None]


class Enough(Exception):
    """Raised by a watcher to end a run early."""


def evaluate(
    run: Run,
    precision: Precision = FLOAT64,
    names: frozenset[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    watch: Watch | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Run the model call by call: all recorded arrays (or those in `names`), and the tokens.

    Arrays of later calls follow those of earlier ones along T; scores and weights get one
    column per token of the whole run, 0 where a call could not yet see it. `watch` is shown
    every recorded array of a run in one call, and may end it by raising `Enough`.
    """
    weights = Prepared(run.weights, precision, run)
    tokens = run.tokens.copy()
    B, T = tokens.shape
    single = len(run.calls) == 1
    cache = None if single else KVCache(run.config, B, T, precision.dtype)
    parts: list[dict[str, np.ndarray]] = []
    with np.errstate(all="ignore"):  # overflow in float16 is a finding, not a warning
        for number, columns in enumerate(spans(run.calls)):
            progress(f"{precision.name}: call {number + 1} of {len(run.calls)}")
            part: dict[str, np.ndarray] = {}
            positions = run.positions[:, columns]
            place = Place(run.config, positions, columns, run.prompt)
            tap = _tap(run, weights, precision, place, part, names)
            tap = tap if watch is None or not single else chain(tap, _watching(run, watch, names))
            visible = run.visible[:, :, columns, : columns.stop]
            hidden = hidden_states(
                tokens[:, columns], weights, run.config, cache, positions, visible, tap
            )
            best = _heads(hidden, weights, tap)
            if columns.stop < T and (tokens[:, columns.stop] < 0).any():
                tokens[:, columns.stop] = best
            parts.append(part)
    return _joined(parts, run), tokens


def _heads(hidden: np.ndarray, weights: Prepared, tap: Tap) -> np.ndarray:
    """Apply the heads that the model has; returns the greedy next tokens."""
    if "score.weight" in weights:
        project("score", hidden, weights, tap)
    if "lm_head.weight" not in weights:
        return np.zeros(len(hidden), np.int64)
    return logits(hidden, weights, tap)[:, -1].argmax(axis=-1)


def _tap(
    run: Run,
    weights: Prepared,
    precision: Precision,
    place: Place,
    part: dict[str, np.ndarray],
    names: frozenset[str] | None,
) -> Tap:
    def tap(name: str, array: np.ndarray) -> np.ndarray:
        layer, local = split_name(name)
        if layer != place.layer:
            place.layer = layer
            place.w = weights if layer < 0 else weights[f"model.layers.{layer}"]
        if layer >= 0 and local == "input_layernorm":
            place.seen["x"] = place.seen["model.embed_tokens" if layer == 0 else "block"]
        if local == "model.embed_tokens":
            array = precision.convert(array)
        if local in run.ops:
            array = run.ops[local](array, place)
        array = place.seen[local] = precision.rounded(array)
        if names is None or name in names:
            part[name] = array
        return array

    return tap


def _watching(run: Run, watch: Watch, names: frozenset[str] | None) -> Tap:
    def tap(name: str, array: np.ndarray) -> np.ndarray:
        if names is None or name in names:
            watch(name, _as_shown(name, array, run))
        return array

    return tap


def _joined(parts: list[dict[str, np.ndarray]], run: Run) -> dict[str, np.ndarray]:
    width = run.tokens.shape[1]
    joined = {}
    for name in parts[0]:
        axis, pieces = row_axis(name), [part[name] for part in parts]
        if axes_of(name).endswith("S"):
            pieces = [_widened(piece, width) for piece in pieces]
        array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis)
        joined[name] = _as_shown(name, array, run)
    return joined


def _as_shown(name: str, array: np.ndarray, run: Run) -> np.ndarray:
    """An array of the whole run as it appears in a record."""
    array = blanked(name, array, run.positions)
    if run.rows is not None:
        array = array.take(run.rows, row_axis(name))
    local = split_name(name)[1]
    return run.shown[local](array) if local in run.shown else array


def blanked(name: str, array: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The array with 0 where nothing meaningful stands: padding, and scores of later tokens."""
    real, axis = positions >= 0, row_axis(name)
    if not real.all():
        shape = [len(real) if i == 0 else real.shape[1] if i == axis else 1 for i in range(4)]
        array = array * real.reshape(shape[: array.ndim]).astype(array.dtype)
    if split_name(name)[1] == "self_attn.scores":
        array = np.where(np.tri(*array.shape[-2:]).astype(bool) & real[:, None, None], array, 0)
    if split_name(name)[1] == "self_attn.weights":
        array = up_to_query(array, 0)
    return array


def up_to_query(weights: np.ndarray, first: int) -> np.ndarray:
    """Attention weights (B, N, n, S) of queries first ..., without later keys in rows of NaN.

    Such a row is NaN as far as its call reaches, which is another width in one call than in many.
    """
    if not np.isnan(weights).any():
        return weights
    seen = np.tri(weights.shape[-2], weights.shape[-1], first, dtype=bool)
    broken = (np.isnan(weights) & seen).any(axis=-1, keepdims=True)
    return np.where(broken & ~seen, 0, weights)


def _widened(array: np.ndarray, width: int) -> np.ndarray:
    missing = width - array.shape[-1]
    return np.pad(array, [(0, 0)] * 3 + [(0, missing)]) if missing else array


def _reversed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    backwards = np.ascontiguousarray(weight[:, ::-1])
    return np.ascontiguousarray(x[..., ::-1]) @ backwards.T


def _in_blocks(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Partial sums of a few products, added one after another, as simple loops do it."""
    size = max(8, x.shape[-1] // 64)
    total = x[..., :size] @ weight[:, :size].T
    for start in range(size, x.shape[-1], size):
        total += x[..., start : start + size] @ weight[:, start : start + size].T
    return total


def _summing(product: Callable[[np.ndarray, np.ndarray], np.ndarray], local: str) -> Op:
    def op(array: np.ndarray, place: Place) -> np.ndarray:
        result = product(place.seen[INPUT_OF[local]], place.w[local + ".weight"])
        bias = place.w.get(local + ".bias")
        return result if bias is None else result + bias

    return op


def honest_runs(run: Run) -> list[Run]:
    """The same computation with its sums in three orders, and angles as frameworks have them.

    Arrays that the run computes in its own way stay as they are.
    """
    runs = [run]
    for product in (_reversed, _in_blocks):
        ops = {local: _summing(product, local) for local in INPUT_OF if local not in run.ops}
        runs.append(one_call(run.with_op_map(ops).with_config(rope_angles="float32")))
    return runs


def error(mine: np.ndarray, gold: np.ndarray) -> float:
    """||mine - gold|| / ||gold||; infinity for different shapes, and for NaN in one of them only.

    Where both have NaN at the same places, the rest is compared.
    """
    if mine.shape != gold.shape:
        return float("inf")
    with np.errstate(all="ignore"):
        difference = np.linalg.norm((mine - gold).ravel())
        size = np.linalg.norm(gold.ravel())
    if not np.isfinite(difference):
        return _of_finite(error, mine, gold)
    return float(difference / size) if size else float(0 if difference == 0 else "inf")


def _of_finite(
    measure: Callable[[np.ndarray, np.ndarray], float], mine: np.ndarray, gold: np.ndarray
) -> float:
    """A measure of what is finite, if both arrays are so in the same places; else infinity."""
    finite = np.isfinite(gold)
    if finite.all() or (np.isfinite(mine) != finite).any():
        return float("inf")
    return measure(mine[finite], gold[finite])


def misfit(mine: np.ndarray, gold: np.ndarray) -> float:
    """`error` after scaling to the same size: how alike two arrays are, whatever their scale."""
    with np.errstate(all="ignore"):
        size = float(np.linalg.norm(mine.ravel()))
        scale = float(np.linalg.norm(gold.ravel())) / size if size else 1.0
        return error(mine * scale, gold)


def peak(mine: np.ndarray, gold: np.ndarray) -> float:
    """max|mine - gold| / max|gold|, as `error` for what is not finite or empty."""
    with np.errstate(all="ignore"):
        difference = np.abs(mine - gold).max(initial=0.0)
        size = np.abs(gold).max(initial=0.0)
    if not np.isfinite(difference):
        return _of_finite(peak, mine, gold)
    return float(difference / size) if size else float(0 if difference == 0 else "inf")


PEAK = 5  # a single number may be off by so many yardsticks


def noise(run: Run, truth: Mapping[str, np.ndarray], precision: Precision) -> dict[str, float]:
    """The yardsticks: the largest error of honest runs against the truth, per named array.

    Where the error sits in few numbers (angles of far positions in float32), the yardstick is
    large enough for these runs to pass the rule for single numbers too.
    """
    worst = dict.fromkeys(truth, 0.0)
    wanted = frozenset(truth)
    for honest in honest_runs(run):
        trace, _ = evaluate(honest, precision, wanted)
        for name, gold in truth.items():
            size = max(error(trace[name], gold), peak(trace[name], gold) / PEAK)
            worst[name] = max(worst[name], size)
    return worst
