"""A comparison as ONE self-contained HTML page: no network, no other file."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np

from llama_np.experiment import INSIDE, full_name, names_in_order, split_name
from llama_np.trace import Golden
from llama_np.verify import Finding, Report, hint

PLACE = "/*DATA*/null"


def html_page(report: Report, golden: Golden, title: str = "llama_np verify") -> str:
    """The page: a strip of all arrays coloured by error over yardstick, and their profiles."""
    template = files("llama_np").joinpath("report.html").read_text("utf-8")
    # "</" would end the script; the rest of JSON is safe inside of it.
    data = json.dumps(_data(report, golden, title)).replace("</", "<\\/").replace("<!--", "<\\!--")
    return template.replace(PLACE, data)


def _data(report: Report, golden: Golden, title: str) -> dict[str, Any]:
    found = {f.tensor: f for f in report.findings}
    first = report.first_divergence
    layers = golden.config.num_hidden_layers
    every = [n for n in names_in_order(layers) if n in golden.tensors]
    return {
        "title": title,
        "verdict": report.verdict,
        "precision": report.precision,
        "first": first.tensor if first else None,
        "position": first.position if first else None,
        "hint": hint(report),
        "problems": [*report.problems, *report.notes],
        "unknown": list(report.unknown),
        "tokens": list(report.tokens),
        "prompt": report.prompt,
        "rows": _rows(layers, every),
        "arrays": {name: _array(found[name]) for name in found},
    }


def _rows(layers: int, every: list[str]) -> list[dict[str, Any]]:
    """The strip in lines: before the layers, each layer, after the layers."""
    outside = [name for name in every if split_name(name)[0] < 0]
    early = [name for name in outside if name not in ("model.norm", "lm_head", "score")]
    rows = [{"label": "input", "names": early}]
    for layer in range(layers):
        names = [full_name(layer, local) for local in INSIDE]
        rows.append({"label": f"layer {layer}", "names": [n for n in names if n in every]})
    rows.append({"label": "output", "names": [n for n in outside if n not in early]})
    return [row for row in rows if row["names"]]


def _array(f: Finding) -> dict[str, Any]:
    return {
        "status": f.status,
        "error": _finite(f.error),
        "yardstick": f.yardstick,
        "peak": _finite(f.peak),
        "label": f.label,
        "layout": f.layout,
        "reason": f.reason,
        "start": f.start,
        "position": f.position,
        "profile": [_finite(e) for e in f.profile],
        "heads": [_finite(e) for e in f.heads],
    }


def _finite(value: float) -> float | None:
    """Three digits are enough for a picture; JSON knows no infinity."""
    return float(f"{value:.3g}") if np.isfinite(value) else None
