"""Figures and tables for the notebooks: one style, one colour per axis letter.

The only module, besides notebooks, that uses matplotlib (extra `notebooks`).
"""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llama_np.config import Config
from llama_np.errors import require

# Okabe and Ito's colours, which colour-blind readers can tell apart; one per axis letter.
AXIS_COLOURS = {
    "B": "#999999",
    "T": "#0072B2",
    "S": "#56B4E9",
    "D": "#009E73",
    "F": "#D55E00",
    "V": "#CC79A7",
    "N": "#E69F00",
    "K": "#B8860B",
    "H": "#8A63D2",
}
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A63D2")
INK = "#6B7280"  # a grey that can be read on white and on black


class Html(str):
    """Text that a notebook shows as HTML."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        """The text without the markup, for terminals and for comparing notebooks."""
        rows = self.replace("</tr>", "\n").replace("</td>", " ").replace("</th>", " ")
        return html.unescape(re.sub("<[^>]+>", "", rows)).strip()


def source(function: Callable[..., Any]) -> Html:
    """The installed source of a function, as a block of code: never a copy that could drift."""
    pygments = require("pygments", extra="notebooks")
    lexers = require("pygments.lexers", extra="notebooks")
    formatters = require("pygments.formatters", extra="notebooks")
    formatter = formatters.HtmlFormatter(noclasses=True, nobackground=True)
    code = pygments.highlight(inspect.getsource(function), lexers.PythonLexer(), formatter)
    where = f"{function.__module__}.{function.__qualname__}"
    return Html(f"<div style='font-size:90%'><b>{html.escape(where)}</b>{code}</div>")


def axes_of(name: str, ndim: int) -> str:
    """The axis letters of a traced array, such as "B T D", by its name in the trace."""
    module = (
        name.split(".", 3)[3] if name.startswith("model.layers.") and name.count(".") > 2 else name
    )
    if "rotary_emb" in module:
        return "B T H"
    letters = {
        "self_attn.q_proj": "B N T H",
        "self_attn.q_rot": "B N T H",
        "self_attn.k_proj": "B K T H",
        "self_attn.k_rot": "B K T H",
        "self_attn.v_proj": "B K T H",
        "self_attn.scores": "B N T S",
        "self_attn.weights": "B N T S",
        "self_attn.context": "B T N*H",
        "lm_head": "B T V",
        "score": "B C",
    }.get(module)
    if module.startswith("mlp.") and module != "mlp.down_proj":
        letters = "B T F"
    if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") and ndim == 3:
        letters = {"q": "B T N*H", "k": "B T K*H", "v": "B T K*H"}[module[10]]
    return letters or "B T D"


def shapes(trace: Mapping[str, np.ndarray], layer: int | None = 0) -> Html:
    """A table of traced arrays: name, axis letters, sizes; of one layer, or of all (None)."""
    rows = []
    for name, array in trace.items():
        inside = name.startswith("model.layers.")
        if layer is not None and inside and not (name + ".").startswith(f"model.layers.{layer}."):
            continue
        letters = axes_of(name, array.ndim).split()
        cells = " ".join(_coloured(letter) for letter in letters)
        sizes = " × ".join(
            _coloured(letter, str(size)) for letter, size in zip(letters, array.shape, strict=False)
        )
        rows.append(
            f"<tr><td><code>{html.escape(name)}</code></td><td>{cells}</td><td>{sizes}</td></tr>"
        )
    head = "<tr><th>name in the trace</th><th>axes</th><th>sizes</th></tr>"
    return Html(f"<table>{head}{''.join(rows)}</table>")


def _coloured(letters: str, text: str | None = None) -> str:
    colour = AXIS_COLOURS.get(letters[0], INK)
    return f"<b style='color:{colour}'>{html.escape(text or letters)}</b>"


def sizes(config: Config) -> Html:
    """What the axis letters mean, and how large they are in this model."""
    meanings = {
        "D": ("model width", config.hidden_size),
        "F": ("MLP width", config.intermediate_size),
        "V": ("vocabulary", config.vocab_size),
        "N": ("query heads", config.num_attention_heads),
        "K": ("key/value heads", config.num_key_value_heads),
        "H": ("head width", config.head_dim),
    }
    rows = [
        f"<tr><td>{_coloured(letter)}</td><td>{meaning}</td><td>{size}</td></tr>"
        for letter, (meaning, size) in meanings.items()
    ]
    return Html(f"<table>{''.join(rows)}</table>")


def style() -> Any:
    """Set the style of all figures and return `matplotlib.pyplot`.

    Backgrounds are transparent and lines grey, so that a figure reads in light and in dark.
    """
    pyplot = require("matplotlib.pyplot", extra="notebooks")
    pyplot.rcParams.update(
        {
            "figure.figsize": (7.2, 3.4),
            "figure.dpi": 96,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": require("cycler", extra="notebooks").cycler(color=CYCLE),
            "xtick.color": INK,
            "ytick.color": INK,
            "text.color": INK,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "font.size": 9,
            "lines.linewidth": 1.8,
            "figure.constrained_layout.use": True,
        }
    )
    return pyplot


def lines(
    x: Sequence[float] | np.ndarray,
    curves: Mapping[str, Sequence[float] | np.ndarray],
    title: str,
    xlabel: str,
    ylabel: str,
    log: str = "",
) -> Any:
    """Curves over a common x; `title` states the finding. `log` is "x", "y" or "xy"."""
    _, axes = style().subplots()
    for label, y in curves.items():
        axes.plot(x, y, label=label, marker="o" if len(x) <= 20 else None, markersize=4)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    if len(curves) > 4:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif len(curves) > 1:
        axes.legend(loc="best")
    return _finish(axes, title, xlabel, ylabel)


def bars(
    labels: Sequence[str], heights: Sequence[float] | np.ndarray, title: str, ylabel: str
) -> Any:
    """One bar per label."""
    _, axes = style().subplots()
    places = np.arange(len(labels))
    axes.bar(places, heights, color=CYCLE[0])
    longest = max(map(len, labels), default=0)
    turned = {"rotation": 40, "ha": "right"} if longest * len(labels) > 60 else {}
    axes.set_xticks(places, labels, **turned)
    return _finish(axes, title, "", ylabel)


def heatmap(
    matrix: np.ndarray,
    title: str,
    xlabel: str,
    ylabel: str,
    columns: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    diverging: bool = False,
) -> Any:
    """A matrix as colours, with a scale; `diverging` puts 0 in the middle."""
    height = min(7.0, max(2.4, 0.26 * matrix.shape[0] + 1.3))
    pyplot = style()
    figure, axes = pyplot.subplots(figsize=(7.2, height))
    limit = float(np.abs(matrix).max()) or 1.0
    options = (
        {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if diverging else {"cmap": "cividis"}
    )
    image = axes.imshow(matrix, aspect="auto", interpolation="nearest", **options)
    figure.colorbar(image, ax=axes, shrink=0.85)
    if columns is not None:
        axes.set_xticks(np.arange(len(columns)), columns, rotation=50, ha="right")
    if rows is not None:
        axes.set_yticks(np.arange(len(rows)), rows)
    return _finish(axes, title, xlabel, ylabel)


def attention(
    weights: Sequence[np.ndarray],
    tokens: Sequence[str],
    title: str,
    marked: Sequence[tuple[int, int]] = (),
) -> Any:
    """Attention maps of all layers (rows) and heads (columns): weights[l] is (N, T, S).

    `marked` (layer, head) pairs get a frame.
    """
    L, N = len(weights), weights[0].shape[0]
    pyplot = style()
    figure, grid = pyplot.subplots(L, N, figsize=(7.2, 7.2 * L / N + 0.6), squeeze=False)
    for layer in range(L):
        for head in range(N):
            axes = grid[layer][head]
            axes.imshow(weights[layer][head], cmap="cividis", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            framed = (layer, head) in marked
            for spine in axes.spines.values():
                spine.set_visible(True)
                spine.set_color(CYCLE[1] if framed else INK)
                spine.set_linewidth(2.5 if framed else 0.5)
            if layer == 0:
                axes.set_title(f"head {head}", loc="center", fontsize=8, fontweight="normal")
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return finish(figure)


def finish(figure: Any) -> Any:
    """Return the figure as a cell's value: closed, so that a notebook shows it once only."""
    style().close(figure)
    return figure


def _finish(axes: Any, title: str, xlabel: str, ylabel: str) -> Any:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return finish(axes.figure)
