"""One forward pass as one HTML page: attention, logit lens, norms, and the code behind them."""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llama_np import layers, model, rope
from llama_np.config import Config
from llama_np.layers import rms_norm, softmax
from llama_np.model import ModelWeights, hidden_states, logits
from llama_np.show import axes_of
from llama_np.tap import record
from llama_np.terminal import visible
from llama_np.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parent / "templates" / "explore.html"
MOST_TOKENS = 64  # attention grows with the square; 64 tokens keep the page below 5 MB
LENS_CANDIDATES = 5
MOST_LOGITS = 250_000  # floats of logits in the page: 1.3 MB

# The function that taps each name; "" stands for a decoder layer's own output.
MAKERS: dict[str, Callable[..., Any]] = {
    "model.embed_tokens": model.hidden_states,
    "model.rotary_emb.cos": rope.tables,
    "model.rotary_emb.sin": rope.tables,
    "input_layernorm": layers.decoder_layer,
    "post_attention_layernorm": layers.decoder_layer,
    "middle": layers.decoder_layer,
    "self_attn.scores": layers.attend,
    "self_attn.weights": layers.attend,
    "self_attn.context": layers.attend,
    "self_attn": layers.self_attention,
    "mlp": layers.mlp,
    "": model.transform,
    "model.norm": model.transform,
    "lm_head": model.logits,
}


def page(prompt: str, weights: ModelWeights, config: Config, tokenizer: Tokenizer) -> str:
    """Run the model on a text and return the page, self-contained, as HTML.

    Errors: ValueError for a text of more than 64 tokens or none.
    """
    ids = tokenizer.encode(prompt)
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise ValueError(f"the text has {len(ids)} tokens; the page holds 1 to {MOST_TOKENS}")
    trace: dict[str, np.ndarray] = {}
    hidden = hidden_states(np.array([ids]), weights, config, tap=record(trace))
    scores = logits(hidden, weights, tap=record(trace))
    data = describe(trace, scores[0], weights, config, tokenizer, ids)
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text("utf-8").replace("__DATA__", text)


def describe(
    trace: dict[str, np.ndarray],
    scores: np.ndarray,
    weights: ModelWeights,
    config: Config,
    tokenizer: Tokenizer,
    ids: list[int],
) -> dict[str, Any]:
    """Everything that the page shows, as plain data."""
    L, V = config.num_hidden_layers, config.vocab_size
    attention = np.stack([trace[f"model.layers.{i}.self_attn.weights"][0] for i in range(L)])
    stream = [trace["model.embed_tokens"], *(trace[f"model.layers.{i}"] for i in range(L))]
    norms = [np.sqrt(np.mean(x[0] ** 2, axis=-1)) for x in stream]
    every = scores if scores.size <= MOST_LOGITS else scores[-1:]
    arrays, sources = _arrays(trace)
    return {
        "title": f"A forward pass: {len(ids)} tokens through {L} layers",
        "ids": ids,
        "tokens": [_spelled(token) for token in tokenizer.tokens(ids)],
        "vocabulary": _vocabulary(tokenizer, V),
        "layers": L,
        "heads": config.num_attention_heads,
        "attention": _base64(np.round(attention * 255).astype(np.uint8)),
        "logits": _base64(every.astype("<f4")),
        "lens": [_lens(x, weights, config) for x in stream],
        "norms": [[round(float(v), 4) for v in row] for row in norms],
        "arrays": arrays,
        "sources": sources,
    }


def _spelled(token: str) -> str:
    """A token as a person reads it: spaces visible, control characters escaped."""
    return visible(token).replace("\n", "\\n").replace("\t", "\\t")


def _vocabulary(tokenizer: Tokenizer, V: int) -> list[str]:
    known = min(V, tokenizer.vocab_size)  # rows that only pad the embedding have no spelling
    spelled = [_spelled(token) for token in tokenizer.tokens(range(known))]
    return spelled + [f"<{i}>" for i in range(known, V)]


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _lens(
    stream: np.ndarray, weights: ModelWeights, config: Config
) -> list[list[tuple[int, float]]]:
    """The likeliest next tokens if the model ended here, for every position."""
    normed = rms_norm("model.norm", stream, weights, config.rms_norm_eps)
    chances = softmax(logits(normed, weights)[0])
    best = np.argsort(-chances, axis=-1, kind="stable")[:, :LENS_CANDIDATES]
    return [
        [(int(i), round(float(row[i]), 4)) for i in top]
        for row, top in zip(chances, best, strict=True)
    ]


def _arrays(trace: dict[str, np.ndarray]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Name, axes, shape and size of every traced array, and where the code makes it."""
    sources: list[dict[str, str]] = []
    places: dict[str, int] = {}
    arrays = []
    for name, array in trace.items():
        layer, module = _split(name)
        maker = _maker(module)
        where = f"{maker.__module__}.{maker.__qualname__}"
        if where not in places:
            places[where] = len(sources)
            sources.append({"where": where, "text": inspect.getsource(maker).rstrip()})
        arrays.append(
            {
                "name": name,
                "layer": layer,
                "axes": axes_of(name, array.ndim),
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "rms": float(np.sqrt(np.mean(array.astype(np.float64) ** 2))),
                "source": places[where],
                "line": _line(sources[places[where]]["text"], module),
            }
        )
    return arrays, sources


def _split(name: str) -> tuple[int | None, str]:
    """ "model.layers.3.mlp" -> (3, "mlp"); names outside the layers stay whole."""
    if not name.startswith("model.layers."):
        return None, name
    _, _, layer, *inside = name.split(".", 3)
    return int(layer), "".join(inside)


def _maker(module: str) -> Callable[..., Any]:
    parent = module.split(".", maxsplit=1)[0]
    found = MAKERS.get(module) or MAKERS.get(parent)
    if found is None:
        raise KeyError(f"no function is known to make {module!r}")
    return found


def _line(source: str, module: str) -> int:
    """The line of a function that names the module; the layer's output is tapped by its name."""
    wanted = f'"{module}"' if module else "tap(name,"
    lines = source.split("\n")
    return next((i for i, line in enumerate(lines) if wanted in line), 0)
