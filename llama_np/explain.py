"""Which known mistake makes a dump differ from the truth?

Every mistake of the catalogue is put into the model: one at a time, in the one layer where the
dump diverges, and in pairs. A mistake is accepted only if every array that the dump covers comes
down to what honest runs of the *mistaken* model get wrong: a mistaken model can amplify rounding
many times.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from llama_np.experiment import (
    FLOAT32,
    FLOAT64,
    PEAK,
    PRECISIONS,
    Enough,
    Precision,
    Run,
    axes_of,
    converted_once,
    error,
    evaluate,
    noise,
    one_call,
    only_in_layer,
    peak,
    row_axis,
    split_name,
)
from llama_np.mistakes import BY_ID, CATALOGUE, Mistake, variants
from llama_np.model import ModelWeights
from llama_np.ports import Dump, Port, read_port, views
from llama_np.precision import widen
from llama_np.replay import replay
from llama_np.trace import Golden, Model, in_order, load_golden, open_model, run_of, same_weights
from llama_np.variations import Variation, hidden_scores, masked, window, without_cache
from llama_np.verify import (
    BROKEN,
    FAIL,
    FLOOR,
    HOPELESS,
    SAME,
    Report,
    cleaned,
    compare,
    greedy_finding,
    hint,
    topk_finding,
)

BETTER = 0.5  # a mistake must at least halve the error of everything that fails
CLEARLY = 2.0  # the best explanation must be this much closer than a different one
PAIR_SECONDS = 1.8  # the likeliest pairs come first
LAYER_SECONDS = 5.0  # for mistakes in one layer alone
SHOWN = 5  # faulty ops in a note
CLOSE, CLEAR = 30, 300  # yardsticks: what may fit before rounding is looked at, and what cannot


@dataclass(frozen=True)
class Cause:
    """A mistake that brings every covered array down to its yardstick."""

    mistake: str
    residual: float
    yardstick: float
    advice: str
    cause: str = ""
    threads: tuple[str, ...] = ()
    together_with: str = ""


@dataclass(frozen=True)
class Explanation:
    """What is wrong with a port, as far as the catalogue knows; `str` of it is for people."""

    verdict: str
    causes: tuple[Cause, ...]
    report: Report
    ruled_out: tuple[str, ...] = ()
    closest: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The explanation as JSON-ready data."""
        return {
            "verdict": self.verdict,
            "causes": [
                {
                    "mistake": c.mistake,
                    "residual": c.residual,
                    "yardstick": c.yardstick,
                    "advice": c.advice,
                    "cause": c.cause,
                    "threads": list(c.threads),
                    **({"together_with": c.together_with} if c.together_with else {}),
                }
                for c in self.causes
            ],
            "first_divergence": self.report.as_dict()["first_divergence"],
            "precision": self.report.precision,
            "ruled_out": list(self.ruled_out),
            "closest": list(self.closest),
            "not_decidable_here": list(self.hidden),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(found: Explanation) -> Iterator[str]:
    first = found.report.first_divergence
    if first is not None:
        yield f"first divergence: {first.tensor}, position {first.position}: {hint(found.report)}"
    for same in _synonyms(found.causes):
        c, names = same[0], " = ".join(cause.mistake for cause in same)
        pair = f" (together with {c.together_with})" if c.together_with else ""
        yield f"{names}{pair}: residual {c.residual:.1e}, yardstick {c.yardstick:.1e}"
        yield f"  {c.cause}"
        yield f"  -> {c.advice}"
        if c.threads:
            yield f"  seen in {', '.join(c.threads)}"
    if found.verdict == "unexplained":
        near = f"the closest are {', '.join(found.closest)}" if found.closest else "none is near"
        yield f"ruled out: {len(found.ruled_out)} known mistakes; {near}"
    if found.hidden:
        yield f"cannot be told from {found.report.precision} rounding: {', '.join(found.hidden)}"
    yield from found.notes
    yield f"verdict: {found.verdict}"


def _synonyms(causes: Iterable[Cause]) -> list[list[Cause]]:
    """Causes in groups: the catalogue knows some mistakes by two names."""
    groups: dict[tuple[str, str], list[Cause]] = {}
    for cause in causes:
        groups.setdefault((cause.cause, cause.together_with), []).append(cause)
    return list(groups.values())


Target = tuple[slice, np.ndarray, str]  # rows of the truth, cleaned values, layout


@dataclass
class Evidence:
    """What a port shows, prepared for being compared with many hypotheses."""

    golden: Golden
    port: Port
    report: Report
    light: ModelWeights  # in float32, to rule things out quickly
    names: list[str] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    ready: dict[tuple[int, int, bool], dict[str, list[Target]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = {f.tensor: f for f in self.report.findings if f.tensor in self.port.arrays}
        self.names = in_order(found, self.golden.config)
        self.before = {name: found[name].error for name in self.names}
        self.base = {name: found[name].yardstick for name in self.names}
        self.labels = {name: found[name].label for name in self.names}
        self.same = {n for n in self.names if found[n].status == SAME}
        # Tables that are right may still be used wrongly, and are often captured before that.
        self.same |= {n for n in self.names if "rotary" in n and found[n].status != FAIL}
        head = self.golden.yardsticks.get("lm_head", {}).get(self.port.precision, FLOOR)
        self.base.setdefault("lm_head", max(head, FLOOR))

    @property
    def wanted(self) -> frozenset[str]:
        """The arrays that a hypothesis must compute."""
        extra = self.port.topk is not None or self.port.greedy is not None or not self.names
        return frozenset([*self.names, *(["lm_head"] if extra else [])])

    @property
    def shows_numbers(self) -> bool:
        """Whether there is more to compare than token ids, which say too little about two."""
        return bool(self.names) or self.port.topk is not None or self.port.greedy is not None

    def targets(self, run: Run) -> dict[str, list[Target]]:
        """The port's arrays in the axes of this run, in all readings."""
        rows = run.tokens.shape[1] if run.rows is None else len(run.rows)
        key = (rows, run.prompt, run.rows is None)
        if key not in self.ready:
            self.ready[key] = {n: list(self._targets(n, run, rows)) for n in self.names
                               if run.rows is None or axes_of(n)[-1] != "S"}  # fmt: skip
        return self.ready[key]

    def _targets(self, name: str, run: Run, rows: int) -> Iterator[Target]:
        tokens, calls = run.tokens, run.calls
        if run.rows is not None:
            tokens, calls = tokens[:, run.rows], (rows,)
        # Tables are read at the true positions, whatever the hypothesis rotates by.
        same = tokens.shape == self.golden.tokens.shape
        positions = self.golden.positions if same else np.arange(rows)[None]
        like = replace(self.golden, tokens=tokens, positions=positions, calls=calls,
                       prompt=min(run.prompt, rows))  # fmt: skip
        for array in self.port.arrays[name]:
            if array.label != self.labels[name]:
                continue
            for view in views(name, array, like):
                n = view.values.shape[row_axis(name)]
                where = slice(view.start, view.start + n)
                yield where, cleaned(name, view.values, like, where), view.layout


def _part(array: np.ndarray, name: str, rows: slice) -> np.ndarray:
    return array[(slice(None),) * row_axis(name) + (rows,)]


def _compared(
    evidence: Evidence, run: Run, name: str, gold: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The port's array in all its readings, each beside what the hypothesis predicts.

    A port may record anything as the score of a key that it hides: those count as 0.
    """
    for rows, mine, _ in evidence.targets(run)[name]:
        expected = _part(gold, name, rows)
        if split_name(name)[1] == "self_attn.scores":
            seen = _part(_shown_visible(run, gold), name, rows)
            yield np.where(seen, mine, 0), np.where(seen, expected, 0)
        else:
            yield mine, expected


def _shown_visible(run: Run, scores: np.ndarray) -> np.ndarray:
    """Which scores the run does not hide, in the order in which it shows them."""
    seen = np.broadcast_to(run.visible, scores.shape)
    return run.shown["self_attn.scores"](seen) if "self_attn.scores" in run.shown else seen


@dataclass
class Trial:
    """One hypothesis: which mistakes, as which run, and how well it fits."""

    mistakes: tuple[Mistake, ...]
    run: Run
    errors: dict[str, float] = field(default_factory=dict)
    complete: bool = False
    truth: dict[str, np.ndarray] = field(default_factory=dict)
    yardsticks: dict[str, float] = field(default_factory=dict)
    accepted: bool = False
    distance: float = float("inf")
    variation: Variation | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of the mistakes."""
        return tuple(m.id for m in self.mistakes)


def explain(
    golden: Golden | str | os.PathLike[str],
    port: Dump | Port,
    model: Model = "fairytales",
    *,
    precision: str | None = None,
    catalogue: Iterable[Mistake] = CATALOGUE,
    pairs: bool = True,
) -> Explanation:
    """Name the mistakes that explain a dump.

    golden, port, precision: as for `verify`; model: the checkpoint that the golden file was
    recorded from.
    Errors: ValueError when the weights are not those of the golden file; OSError,
    CheckpointError for files that cannot be read.
    """
    truth = golden if isinstance(golden, Golden) else load_golden(golden)
    given = port if isinstance(port, Port) else read_port(port, truth.config, precision)
    _, weights = open_model(model)
    if not same_weights(truth, weights):
        raise ValueError("the golden file was recorded from other weights than this model's")
    report = compare(truth, given)
    fed = _tokens_of_embedding(truth, given, report, weights)
    if fed is not None:
        given = replace(given, tokens=fed)
        report = compare(truth, given)
    exact, light = (converted_once(run_of(truth, weights), p) for p in (FLOAT64, FLOAT32))
    evidence = Evidence(truth, given, report, light.weights)
    base, notes = _base_run(truth, given, exact)
    mistakes = tuple(catalogue)
    if report.verdict != FAIL:
        hidden = _hidden(evidence, base, mistakes)
        return Explanation("clean", (), report, hidden=hidden, notes=report.notes)
    if not notes and _accepted(evidence, [_try(evidence, (), base)]):
        return Explanation("unexplained", (), report, notes=(FORM,))
    trials = _singles(evidence, base, mistakes)
    ids = _TOKENS_DIFFER if notes else None
    if ids is not None:
        trials.append(_try(evidence, (ids,), base))
    accepted = (ids and _accepted(evidence, trials[-1:])) or _accepted(evidence, trials)
    if not accepted:
        accepted = _accepted(evidence, _fitted(evidence, base, mistakes))
    if not accepted:
        accepted = _accepted(evidence, _in_one_layer(evidence, base, trials))
    if not accepted and pairs and evidence.shows_numbers:
        accepted = _accepted(evidence, _pairs(evidence, base, trials))
    if not accepted and "head_untied" in {mistake.id for mistake in mistakes}:
        other = _other_head(evidence, base)
        if other is not None:
            return Explanation("explained", (other,), report, notes=notes)
    if not accepted:
        notes += _faulty_ops(evidence, model)
    return _conclude(evidence, accepted, trials, notes)


FORM = "all numbers that could be compared are right: rows, columns or ids are missing or too many"
_TOKENS_DIFFER = Mistake(
    "token_ids",
    "The port fed other token ids; with those, all its numbers are right.",
    "Compare the tokenizers: special tokens, prefix space, pre-tokenizer, merges.",
    ("ggml-org/llama.cpp#6914", "huggingface/transformers#25224"),
    (),
)


def _tokens_of_embedding(
    golden: Golden, port: Port, report: Report, weights: ModelWeights
) -> np.ndarray | None:
    """The tokens whose rows a dump's embedding holds, if it has no ids and other rows."""
    first, arrays = report.first_divergence, port.arrays.get("model.embed_tokens")
    if port.tokens is not None or not arrays or first is None:
        return None
    view = next(views("model.embed_tokens", arrays[0], golden), None)
    if first.tensor != "model.embed_tokens" or view is None:
        return None
    table = widen(np.asarray(weights["model.embed_tokens.weight"])).astype(np.float32)
    rows = view.values.astype(np.float32)
    if rows.shape[:2] != golden.tokens.shape or not np.isfinite(rows).all():
        return None
    nearest = ((table**2).sum(axis=-1) - 2 * rows @ table.T).argmin(axis=-1)
    return nearest if error(rows, table[nearest]) <= 4 * first.yardstick else None


def _base_run(golden: Golden, port: Port, run: Run) -> tuple[Run, tuple[str, ...]]:
    """The run to vary: with the port's own tokens where it fed others."""
    mine = port.tokens
    if mine is None or mine.shape[0] != len(run.tokens) or mine.shape[1] != run.tokens.shape[1]:
        return run, ()
    real = golden.positions >= 0
    if (mine == golden.tokens)[real].all() or not port.arrays:
        return run, ()
    if mine.min() < 0 or mine.max() >= golden.config.vocab_size:
        return run, ("the dump's token ids are outside the vocabulary",)
    where = int(np.argwhere(mine != golden.tokens)[0][1])
    note = f"the port fed other token ids from position {where} on; its own were used here"
    return replace(run, tokens=np.where(real, mine, golden.tokens)), (note,)


def _with_port_tokens(run: Run, port: Port) -> Run | None:
    """A run with the port's own decoded tokens, or None if its prompt is another."""
    mine = port.tokens
    if mine is None or not port.arrays or run.rows is not None:
        return run
    if mine.shape != run.tokens.shape:
        return None if len(run.tokens) == 1 and mine.shape[1] > run.prompt else run
    P = run.prompt
    real = run.positions[:, :P] >= 0
    if not (mine[:, :P] == run.tokens[:, :P])[real].all() or mine.min() < 0:
        return None
    if mine.max() >= run.config.vocab_size:
        return None
    return replace(run, tokens=np.concatenate([run.tokens[:, :P], mine[:, P:]], axis=1))


def _singles(evidence: Evidence, base: Run, mistakes: tuple[Mistake, ...]) -> list[Trial]:
    """Every form of every mistake that applies, alone."""
    trials = []
    for mistake in mistakes:
        for variation in mistake.variations:
            run = variation(base)
            if run is not None:
                trials.append(_try(evidence, (mistake,), run))
                trials[-1].variation = variation
    return trials


def _try(evidence: Evidence, mistakes: tuple[Mistake, ...], run: Run) -> Trial:
    """Compare the port with the model that has these mistakes, until it clearly does not fit."""
    own = _with_port_tokens(run, evidence.port)
    trial = Trial(mistakes, run if own is None else own)
    if own is None or not all(evidence.targets(own).values()):
        return trial
    _compare(evidence, trial, FLOAT32)
    if trial.complete:
        _compare(evidence, trial, FLOAT64)
    return trial


def _compare(evidence: Evidence, trial: Trial, precision: Precision) -> None:
    """Run a hypothesis, to its end or until it is ruled out, for which float32 is enough."""
    targets, single = evidence.targets(trial.run), one_call(trial.run)
    if precision is FLOAT32:
        single = replace(single, weights=evidence.light)
    trial.complete = False

    def watch(name: str, array: np.ndarray) -> None:
        trial.truth[name] = array
        if name not in targets:
            return
        size = min(error(*pair) for pair in _compared(evidence, trial.run, name, array))
        trial.errors[name] = size
        if _hopeless(size, evidence.base[name], evidence.before[name], name in evidence.same):
            raise Enough

    try:
        trace, _ = evaluate(single, precision, names=evidence.wanted, watch=watch)
        if len(single.calls) > 1:  # a run call by call cannot be watched
            for name in in_order(trace, evidence.golden.config):
                watch(name, trace[name])
    except Enough:
        return
    trial.complete = True
    _compare_heads(evidence, trial)


def _hopeless(size: float, yardstick: float, before: float, excused: bool) -> bool:
    """Whether an error rules a hypothesis out before its own yardstick is known."""
    if excused:
        return False
    return size > CLEAR * yardstick or (size > 10 * yardstick and size > BETTER * before)


def _compare_heads(evidence: Evidence, trial: Trial) -> None:
    """Log-probabilities and token ids are compared with the hypothesis' logits."""
    if "lm_head" not in trial.truth:
        return
    size = _head_error(evidence, trial, evidence.base["lm_head"])[0]
    if size is not None:
        trial.errors["lm_head"] = max(trial.errors.get("lm_head", 0.0), size)


def _head_error(evidence: Evidence, trial: Trial, yardstick: float) -> tuple[float | None, bool]:
    """Error of what the port says about the next tokens, and whether it is within limits."""
    logits, port = trial.truth["lm_head"], evidence.port
    findings = []
    if port.topk is not None:
        golden = replace(evidence.golden, prompt=trial.run.prompt)
        findings.append(topk_finding(logits[0], port.topk, golden, yardstick))
    if port.greedy is not None:
        findings.append(greedy_finding(logits, port.greedy, yardstick))
    if not port.arrays and port.tokens is not None and port.topk is None:
        T, P = trial.run.tokens.shape[1], trial.run.prompt
        if port.tokens.shape[1] == T and T > P:
            chosen = port.tokens[:, P:]
            findings.append(greedy_finding(logits[:, P - 1 : T - 1], chosen, yardstick))
    if not findings:
        return None, True
    return max(f.error for f in findings), all(f.status != FAIL for f in findings)


def _accepted(evidence: Evidence, trials: Iterable[Trial]) -> list[Trial]:
    """The hypotheses that bring everything down to their own yardsticks, the closest first."""
    precision = PRECISIONS[evidence.port.precision]
    good = []
    for trial in trials:
        if not trial.complete:
            continue
        trial.yardsticks = noise(one_call(trial.run), trial.truth, precision)
        if _fits(evidence, trial):
            trial.accepted = True
            good.append(trial)
    return sorted(good, key=lambda trial: trial.distance)


def _fitted(evidence: Evidence, base: Run, mistakes: tuple[Mistake, ...]) -> Iterator[Trial]:
    """Numbers that a port got wrong by any amount: the value that fits the first divergence."""
    first = evidence.report.first_divergence
    if first is None or first.tensor not in evidence.names:
        return
    sliding, width = BY_ID["sliding_window"], first.position  # the first row that misses a key
    narrow = window(lambda run: width)(base) if sliding in mistakes and width else None
    if narrow is not None:
        cause = f"{sliding.cause} The width {width} fits."
        yield _try(evidence, (replace(sliding, cause=cause),), narrow)
    if not np.isfinite(first.error):
        return
    for mistake, change, low, high in FITTED:
        if mistake not in mistakes:
            continue
        value = _best_value(evidence, base, change, first.tensor, low, high)
        if value is None:
            continue
        cause = f"{mistake.cause} The value {value:.6g} fits."
        yield _try(evidence, (replace(mistake, cause=cause),), change(base, value))


Change = Callable[[Run, float], Run]


def _best_value(
    evidence: Evidence, base: Run, change: Change, name: str, low: float, high: float
) -> float | None:
    """The value between low and high with the smallest error of one array; None if none helps."""

    light = replace(base, weights=evidence.light)

    @cache
    def misfit(log: float, precision: Precision = FLOAT64) -> float:
        run = one_call(change(light if precision is FLOAT32 else base, math.exp(log)))
        gold: dict[str, np.ndarray] = {}

        def watch(name: str, array: np.ndarray) -> None:
            gold[name] = array
            raise Enough

        with suppress(Enough):
            gold = evaluate(run, precision, names=frozenset([name]), watch=watch)[0]
        pairs = _compared(evidence, run, name, gold[name])
        return min((error(*pair) for pair in pairs), default=np.inf)

    grid = np.linspace(math.log(low), math.log(high), GRID)
    step = grid[1] - grid[0]
    best = float(min(grid, key=lambda log: misfit(log, FLOAT32)))
    if misfit(best) > BETTER * evidence.before[name]:
        return None
    for _ in range(REFINEMENTS):
        step *= 0.5
        best = min((best - step, best, best + step), key=misfit)
    return math.exp(best)


def less(penalty: float) -> Variation:
    """A mask that takes so much from hidden scores."""
    return masked(hidden_scores(lambda scores: scores - penalty))


GRID, REFINEMENTS = 49, 40
FITTED: tuple[tuple[Mistake, Change, float, float], ...] = (
    (BY_ID["rope_theta"], lambda run, x: run.with_config(rope_theta=x), 10.0, 1e8),
    (BY_ID["rms_eps"], lambda run, x: run.with_config(rms_norm_eps=x), 1e-12, 1.0),
    (
        BY_ID["attn_scale_other"],
        lambda run, x: run.with_ops(self_attn__scores=lambda array, place: array * x),
        0.02,
        50.0,
    ),
    (BY_ID["causal_mask_soft"], lambda run, x: less(x)(run) or run, 0.1, 100.0),
    (BY_ID["causal_mask_soft"], lambda run, x: without_cache(less(x))(run) or run, 0.1, 100.0),
)


def _in_one_layer(evidence: Evidence, base: Run, trials: list[Trial]) -> Iterator[Trial]:
    """The same mistakes in one layer alone, where the first divergence says which one it is.

    Those come first that change the diverging array itself.
    """
    first = evidence.report.first_divergence
    if first is None:
        return
    local, deadline = split_name(first.tensor)[1], time.monotonic() + LAYER_SECONDS
    for layer in _suspected(evidence):
        runs = []
        for trial in trials:
            whole = trial.variation(base) if trial.variation is not None else None
            run = only_in_layer(whole, layer, base) if whole is not None else None
            runs += [(trial.mistakes[0], run)] if run is not None else []
        for mistake, run in sorted(runs, key=lambda pair: local not in pair[1].ops):
            if time.monotonic() > deadline:
                return
            cause = f"In layer {layer} alone: {mistake.cause}"
            yield _try(evidence, (replace(mistake, cause=cause),), run)


def _suspected(evidence: Evidence) -> list[int]:
    """The layers that may hold the first divergence, if they are few."""
    first, last = evidence.report.first_divergence, evidence.golden.config.num_hidden_layers - 1
    if first is None or first.tensor not in evidence.names or last == 0:
        return []
    at = evidence.names.index(first.tensor)
    layer, local = split_name(evidence.names[at - 1]) if at else (-1, "block")
    end = split_name(first.tensor)[0] if first.tensor.startswith("model.layers.") else last
    layers = list(range(layer + (local == "block" or layer < 0), end + 1))
    return layers if len(layers) <= 2 else []


def _faulty_ops(evidence: Evidence, model: Model) -> tuple[str, ...]:
    """What a replay of the dump says, for who has no explanation."""
    if len(evidence.names) < 3:
        return ()
    found = replay(evidence.port, model, golden=evidence.golden)
    ops = [f.op + (f": {f.pattern}" if f.pattern else "") for f in found.faulty]
    if not ops:
        return ()
    more = [f"  and {len(ops) - SHOWN} more"] if len(ops) > SHOWN else []
    count = f"{len(ops)} of {len(found.checked)} ops do not follow from their own inputs"
    return (f"replay: {count}", *(f"  {op}" for op in ops[:SHOWN]), *more, *found.notes)


def _fits(evidence: Evidence, trial: Trial) -> bool:
    targets, ratios = evidence.targets(trial.run), []
    broken = [~np.isfinite(trial.truth[name]) for name in targets]
    if any(b.any() for b in broken) and all(b.all() for b in broken if b.any()):
        return False  # nothing but NaN has many causes: some rows have to be right
    for name in targets:
        yardstick = max(trial.yardsticks[name], FLOOR)
        gold = trial.truth[name]
        pairs = list(_compared(evidence, trial.run, name, gold))
        size, highest = min((error(*pair), peak(*pair)) for pair in pairs)
        excused = name in evidence.same
        if not excused and not (size <= min(4 * yardstick, HOPELESS)
                                and highest <= 2 * PEAK * yardstick):  # fmt: skip
            return False
        if not excused and size > BETTER * evidence.before[name] and size > 4 * evidence.base[name]:
            return False
        ratios.append(size / yardstick if not excused else 0.0)
        trial.errors[name] = size
    if "lm_head" in trial.truth:
        yardstick = max(trial.yardsticks["lm_head"], FLOOR)
        size_of_head, fine = _head_error(evidence, trial, yardstick)
        if not fine:
            return False
        if size_of_head is not None:
            ratios.append(size_of_head / yardstick)
    trial.distance = float(np.sqrt(np.mean(np.square(ratios)))) if ratios else float("inf")
    return bool(ratios)


def _pairs(evidence: Evidence, base: Run, trials: list[Trial]) -> Iterator[Trial]:
    """Two mistakes at once: those that explain the longest part of the trace, with all others.

    Left out are pairs of which one spoils what is right without it, or the second changes
    nothing up to where the first stops to explain.
    """
    reached = _Reach(evidence, base)
    start = reached.fits(evidence.before)
    able = [t for t in trials if t.variation is not None and reached.effect(t)[1] >= start]
    ranked = sorted(able, key=lambda t: _promise(evidence, t))
    only_heads = set(evidence.names) <= {"lm_head", "score"}
    deadline = time.monotonic() + PAIR_SECONDS
    seen: set[str] = set()
    for number, one in enumerate(ranked):
        if only_heads and one.ids[0] in seen:
            continue  # of logits alone, the best form of every mistake is the beginning
        seen.add(one.ids[0])
        explained = max(reached.fits(one.errors), start)
        for two in ranked[number + 1 :]:
            changes, spoils = reached.effect(two)
            if one.ids == two.ids or changes > explained or spoils < explained:
                continue
            if time.monotonic() > deadline:
                return
            run = _both(one, two)
            if run is not None:
                yield _try(evidence, one.mistakes + two.mistakes, run)


@dataclass
class _Reach:
    """How far along the trace something fits, as a number of covered arrays."""

    evidence: Evidence
    base: Run
    plain: dict[str, np.ndarray] = field(default_factory=dict)
    effects: dict[int, tuple[int, int]] = field(default_factory=dict)

    def fits(self, errors: Mapping[str, float]) -> int:
        """The number of arrays before the first that does not fit."""
        for number, name in enumerate(self.evidence.names):
            size = errors.get(name, float("inf"))
            if size > CLOSE * self.evidence.base[name] and name not in self.evidence.same:
                return number
        return len(self.evidence.names)

    def effect(self, trial: Trial) -> tuple[int, int]:
        """Which array of the right model this mistake changes first at all, and which clearly."""
        if id(trial) not in self.effects:
            self.effects[id(trial)] = self._effect(trial.run)
        return self.effects[id(trial)]

    def _effect(self, run: Run) -> tuple[int, int]:
        names, single = self.evidence.names, one_call(run)
        if len(names) < 2:
            return 0, len(names)
        wanted = frozenset(names)
        self.plain = self.plain or evaluate(one_call(self.base), names=wanted)[0]
        changed, spoilt = set(), set()

        def watch(name: str, array: np.ndarray) -> None:
            size = error(array, self.plain[name])
            if size > 1e-9:
                changed.add(name)
            if size > CLEAR * self.evidence.base[name] and name not in self.evidence.same:
                spoilt.add(name)
                raise Enough

        with suppress(Enough):
            trace, _ = evaluate(single, names=wanted, watch=watch)
            for name in names if len(single.calls) > 1 else ():
                watch(name, trace[name])
        places = (next((i for i, n in enumerate(names) if n in found), len(names))
                  for found in (changed, spoilt))  # fmt: skip
        return next(places), next(places)


def _both(one: Trial, two: Trial) -> Run | None:
    """One mistake on top of the other; other tokens have to come first."""
    for before, after in ((one, two), (two, one)):
        run = after.variation(before.run) if after.variation is not None else None
        if run is not None:
            return run
    return None


def _promise(evidence: Evidence, trial: Trial) -> tuple[float, float]:
    """Sort key: how much of the trace fits before it stops fitting, then the last error."""
    fits = 0
    for name in evidence.names:
        size = trial.errors.get(name, float("inf"))
        if size > CLOSE * evidence.base[name]:
            break
        fits += 1
    return -fits, list(trial.errors.values())[-1] if trial.errors else float("inf")


def _other_head(evidence: Evidence, base: Run) -> Cause | None:
    """A head that was never loaded: no run can predict its logits, but their angles it can.

    With random weights W, logits h @ W.T of V words have products among tokens that follow those
    of the hidden states h, up to a scale and sqrt((r + 1) / V), r being how many directions h
    fills. Nothing before the head may fail, and the logits must be unrelated to the true ones.
    """
    first = evidence.report.first_divergence
    readings = evidence.targets(base).get("lm_head")
    if first is None or first.tensor != "lm_head" or not readings:
        return None
    trace, _ = evaluate(one_call(base), names=frozenset(["model.norm", "lm_head"]))
    rows, mine, _ = readings[0]
    h, gold = trace["model.norm"][0, rows], trace["lm_head"][0, rows].ravel()
    related = abs(gold @ mine[0].ravel()) / (np.linalg.norm(gold) * np.linalg.norm(mine) or 1.0)
    if not np.isfinite(mine).all() or not mine.any() or related > UNRELATED:
        return None
    products, expected = mine[0] @ mine[0].T, h @ h.T
    expected *= (products * expected).sum() / (expected**2).sum()
    spread = float(np.trace(expected) ** 2 / (expected**2).sum())
    yardstick = math.sqrt((spread + 1) / mine.shape[-1])
    size = error(products, expected)
    by_chance = error(products, np.diag(np.diag(products)))  # what unrelated tokens would give
    if size > 2 * yardstick or size > BETTER * by_chance:
        return None
    m = BY_ID["head_untied"]
    cause = "Everything is right up to the head, whose weights look random: it was not loaded."
    return Cause(m.id, size, yardstick, m.advice, cause, m.threads)


UNRELATED = 0.2  # cosine between logits that have nothing in common


def _conclude(
    evidence: Evidence, accepted: list[Trial], trials: list[Trial], notes: tuple[str, ...]
) -> Explanation:
    report = evidence.report
    ruled = {t.ids[0] for t in trials} - {i for t in accepted for i in t.ids}
    closest = sorted(trials, key=lambda t: _promise(evidence, t))
    near = tuple(dict.fromkeys(t.ids[0] for t in closest if _helps(evidence, t)))[:3]
    first = report.first_divergence
    if first is not None and first.reason == BROKEN:
        near = ()  # a hypothesis fits no worse only because nothing can be compared
    if not accepted:
        return Explanation("unexplained", (), report, tuple(sorted(ruled)), near, notes=notes)
    best = accepted[0]
    rivals = [t for t in accepted[1:] if not _alike(evidence, best, t)]
    close = [t for t in rivals if t.distance < CLEARLY * max(best.distance, 0.25)]
    verdict = "undecidable" if close else "explained"
    order = {mistake.id: number for number, mistake in enumerate(CATALOGUE)}
    alike = sorted(
        (t for t in accepted if t not in rivals), key=lambda t: order.get(t.ids[0], -1)
    )  # what cannot be told apart comes in the order of the catalogue
    chosen = [*alike, *(t for t in accepted if t in close)]
    causes: dict[str, Cause] = {}
    for trial in chosen:
        for cause in _causes(trial):
            causes.setdefault(cause.mistake, cause)
    return Explanation(verdict, tuple(causes.values()), report, tuple(sorted(ruled)), notes=notes)


def _helps(evidence: Evidence, trial: Trial) -> bool:
    """Whether a hypothesis comes nearer to the first array that diverges than the right model."""
    first = evidence.report.first_divergence
    if first is None or first.tensor not in evidence.before:
        return True
    size = trial.errors.get(first.tensor, float("inf"))
    return size <= BETTER * evidence.before[first.tensor]


def _alike(evidence: Evidence, one: Trial, two: Trial) -> bool:
    """Whether two hypotheses predict the same numbers, or are forms of the same mistake."""
    if set(one.ids) == set(two.ids):
        return True
    for name in evidence.wanted:
        a, b = one.truth[name], two.truth[name]
        if a.shape != b.shape or error(a, b) > max(one.yardsticks[name], FLOOR):
            return False
    return True


def _causes(trial: Trial) -> Iterator[Cause]:
    name = max(trial.errors, key=lambda n: trial.errors[n] / max(trial.yardsticks[n], FLOOR))
    size, yardstick = trial.errors[name], max(trial.yardsticks[name], FLOOR)
    for mistake in trial.mistakes:
        others = " and ".join(i for i in trial.ids if i != mistake.id)
        yield Cause(mistake.id, size, yardstick, mistake.advice, mistake.cause,
                    mistake.threads, others)  # fmt: skip


def _hidden(evidence: Evidence, base: Run, mistakes: tuple[Mistake, ...]) -> tuple[str, ...]:
    """Mistakes whose effect a clean dump could not show in this precision and on this input."""
    golden = evidence.golden
    names = frozenset(golden.tensors) & evidence.wanted
    hidden = []
    for mistake in mistakes:
        runs = variants(mistake, base)
        if runs and all(not visible(run, golden, names, evidence.base) for run in runs):
            hidden.append(mistake.id)
    return tuple(hidden)


def visible(
    run: Run, golden: Golden, names: frozenset[str], yardsticks: Mapping[str, float]
) -> bool:
    """Whether a changed run would fail verification against the golden file."""
    shape = (run.tokens.shape[1] if run.rows is None else len(run.rows),)
    if shape != golden.tokens.shape[1:]:
        return True  # other tokens show in the number of rows

    def watch(name: str, array: np.ndarray) -> None:
        if error(array, golden.tensors[name]) > 4 * yardsticks.get(name, FLOOR):
            raise Enough

    try:
        trace, _ = evaluate(one_call(run), names=names, watch=watch)
        if len(one_call(run).calls) > 1:
            for name in trace:
                watch(name, trace[name])
    except Enough:
        return True
    return False
