"""How good a golden file is: which known mistakes it can show, and which it cannot."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from llama_np.experiment import PRECISIONS, Enough, Run, error, evaluate, one_call
from llama_np.mistakes import CATALOGUE, variants
from llama_np.trace import Golden, Model, load_golden, open_model, run_of, same_weights
from llama_np.verify import FLOOR

SAME = 1e-12  # relative difference in float64 below which two computations are the same


def largest_ratio(run: Run, golden: Golden, precision: str, stop: float = np.inf) -> float:
    """The largest error of a changed run in yardsticks; stops early above `stop`."""
    worst = 0.0
    if golden.tokens.shape[1] != (run.tokens.shape[1] if run.rows is None else len(run.rows)):
        return np.inf  # another number of rows shows at once

    def watch(name: str, array: np.ndarray) -> None:
        nonlocal worst
        yardstick = max(golden.yardsticks[name][precision], FLOOR)
        worst = max(worst, error(array, golden.tensors[name]) / yardstick)
        if worst > stop:
            raise Enough

    single, names = one_call(run), frozenset(golden.tensors)
    try:
        trace, _ = evaluate(single, names=names, watch=watch)
        if len(single.calls) > 1:
            for name, array in trace.items():
                watch(name, array)
    except Enough:
        pass
    return worst


def changes_nothing(run: Run, plain: dict[str, np.ndarray]) -> bool:
    """Whether a changed run is mathematically the same as the plain one, on this input."""
    trace, _ = evaluate(one_call(run), names=frozenset(plain))
    return all(error(trace[name], plain[name]) < SAME for name in plain)


def mutation_scores(golden: Golden | str | os.PathLike[str], model: Model) -> dict[str, Any]:
    """For float32 and bfloat16: the fraction of mistakes that verification would find.

    "shown" fail (4 yardsticks or more) in every form of the mistake that applies; "hidden" do
    not; "equivalent" change nothing on this input. The score is shown / (shown + hidden).
    Errors: ValueError when the golden file was recorded from other weights.
    """
    truth = golden if isinstance(golden, Golden) else load_golden(golden)
    _, weights = open_model(model)
    if not same_weights(truth, weights):
        raise ValueError("the golden file was recorded from other weights than this model's")
    base = run_of(truth, weights)
    plain, _ = evaluate(one_call(base), names=frozenset(truth.tensors))
    scores: dict[str, Any] = {}
    forms = {mistake.id: variants(mistake, base) for mistake in CATALOGUE}
    for precision in PRECISIONS:
        groups: dict[str, list[str]] = {"shown": [], "hidden": [], "equivalent": []}
        for name, runs in forms.items():
            if runs:
                groups[_group(runs, truth, precision, plain)].append(name)
        found, missed = len(groups["shown"]), len(groups["hidden"])
        score = round(found / max(found + missed, 1), 4)
        scores[precision] = {"score": score, "shown": found, **_lists(groups)}
    return scores


def _lists(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    return {key: groups[key] for key in ("hidden", "equivalent")}


def _group(runs: list[Run], golden: Golden, precision: str, plain: dict[str, np.ndarray]) -> str:
    ratios = [largest_ratio(run, golden, precision, stop=4.0) for run in runs]
    if min(ratios) > 4:
        return "shown"
    weak = [run for run, ratio in zip(runs, ratios, strict=True) if ratio <= 4]
    same = [run for run in weak if changes_nothing(run, plain)]
    if len(same) == len(runs):
        return "equivalent"
    return "hidden" if len(weak) > len(same) else "shown"
