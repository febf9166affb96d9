"""Golden files: what every named array of a model should be, and how far honest runs are off.

A golden file holds float64 values (stored as float32 unless asked otherwise), one array per
trace name, and for each array three yardsticks: the relative error that honest float32,
bfloat16 and float16 runs make. A port in any language can test itself with nothing else:
||mine - gold|| / ||gold|| <= 2 * yardstick.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_np.checkpoint import (
    canonical_names,
    check_names_and_shapes,
    group_by_layer,
    locate,
    physical_memory,
    read_checkpoint,
)
from llama_np.config import Config, config_from_dict, config_to_dict
from llama_np.errors import CheckpointError
from llama_np.experiment import (
    PRECISIONS,
    Run,
    axes_of,
    evaluate,
    names_in_order,
    noise,
    parameters,
    plain_run,
    split_name,
)
from llama_np.model import ModelWeights
from llama_np.precision import widen
from llama_np.weights import read_header, read_tensors, save_tensors

SCHEMA = "llama_np golden file, version 1"
RULE = (
    "E = ||mine - gold|| / ||gold||. Pass: E <= 2 * yardstick and "
    "max|mine - gold| / max|gold| <= 5 * yardstick. Note: up to twice that. Fail: above. "
    "Yardsticks per array: float32 bfloat16 float16."
)
HEADS = ("lm_head", "score")
POINTS: dict[str, Callable[[str], bool]] = {
    "all": lambda local: True,
    "blocks": lambda local: local in ("model.embed_tokens", "block", "model.norm", *HEADS),
    "logits": lambda local: local in HEADS,
}

Model = str | os.PathLike[str] | tuple[Config, ModelWeights]
Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray


@dataclass(frozen=True)
class Golden:
    """The truth about one forward pass.

    tensors: float arrays by trace name, axes as in `axes`. tokens, positions (B, T): what was
    fed, -1 as a position is padding. calls: how many tokens each call of the model got.
    prompt: how many of the T tokens are not greedy decode steps.
    """

    tensors: Mapping[str, np.ndarray]
    yardsticks: Mapping[str, Mapping[str, float]]
    tokens: np.ndarray
    positions: np.ndarray
    calls: tuple[int, ...]
    prompt: int
    config: Config
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def axes(self) -> dict[str, str]:
        """The axes of every array."""
        return {name: axes_of(name) for name in self.tensors}

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the golden file. Errors: FileExistsError, OSError."""
        tensors = {"input_ids": self.tokens, "positions": self.positions, **self.tensors}
        save_tensors(path, tensors, self._metadata(), overwrite)

    def _metadata(self) -> dict[str, str]:
        data = {
            "schema": SCHEMA,
            "rule": RULE,
            "config": json.dumps(config_to_dict(self.config)),
            "calls": ",".join(map(str, self.calls)),
            "prompt_length": str(self.prompt),
            "decode_steps": str(self.tokens.shape[1] - self.prompt),
            "input_ids": json.dumps(self.tokens.tolist()),
            "positions": json.dumps(self.positions.tolist()),
            **self.about,
        }
        for name in self.tensors:
            data[f"axes/{name}"] = axes_of(name)
            numbers = (self.yardsticks[name][precision] for precision in PRECISIONS)
            data[f"yardstick/{name}"] = " ".join(f"{number:.3e}" for number in numbers)
        return data


def load_golden(path: str | os.PathLike[str]) -> Golden:
    """Read a golden file. Errors: OSError; CheckpointError for anything else than one."""
    _, data = read_header(path)
    if data.get("schema") != SCHEMA:
        found = data.get("schema", "a file without a schema")
        raise CheckpointError(f"{str(path)!r} is no golden file: {found!r}", path)
    stored = {name: tensor.widened() for name, tensor in read_tensors(path).items()}
    try:
        golden = _golden(stored, data)
        _check(golden)
    except (KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(f"{str(path)!r}: damaged golden file: {problem}", path) from problem
    return golden


def _golden(stored: dict[str, np.ndarray], data: dict[str, str]) -> Golden:
    tokens, positions = stored.pop("input_ids"), stored.pop("positions")
    yardsticks = {}
    for name in stored:
        numbers = map(float, data[f"yardstick/{name}"].split())
        yardsticks[name] = dict(zip(PRECISIONS, numbers, strict=True))
    known = ("schema", "rule", "config", "calls", "prompt_length", "decode_steps", "format")
    derived = (*known, "input_ids", "positions")
    about = {k: v for k, v in data.items() if "/" not in k and k not in derived}
    return Golden(
        stored,
        yardsticks,
        tokens,
        positions,
        tuple(map(int, data["calls"].split(","))),
        int(data["prompt_length"]),
        config_from_dict(json.loads(data["config"])),
        about,
    )


def _check(golden: Golden) -> None:
    """Errors: ValueError for arrays that contradict the metadata or hold no numbers."""
    B, T = golden.tokens.shape
    if golden.positions.shape != (B, T) or sum(golden.calls) != T or not golden.tensors:
        raise ValueError("tokens, positions and calls do not fit together")
    for name, array in golden.tensors.items():
        shape = expected_shape(name, golden.config, B, T)
        if array.shape != shape:
            raise ValueError(f"{name!r} has the shape {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name!r} holds numbers that are not finite")
        if not all(value >= 0 for value in golden.yardsticks[name].values()):
            raise ValueError(f"{name!r} has a yardstick below 0")


def expected_shape(name: str, config: Config, B: int, T: int) -> tuple[int, ...]:
    """The shape of a named array for B texts of T tokens. Errors: KeyError for other names."""
    sizes = {
        "B": B,
        "T": T,
        "S": T,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "C": config.num_labels,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
    }
    if split_name(name)[0] >= config.num_hidden_layers:
        raise KeyError(name)
    axes = axes_of(name).split(",")
    return tuple(math.prod(sizes[letter] for letter in axis.split("*")) for axis in axes)


def open_model(model: Model) -> tuple[Config, ModelWeights]:
    """(config, weights as they are stored) of a folder, of a bundled name, or of a given pair.

    Nothing is widened here: that happens one layer at a time when the model runs.
    Errors: as `llama_np.load`.
    """
    if isinstance(model, tuple):
        return model
    path = locate(model)
    config, in_file = read_checkpoint(path)
    stored = canonical_names(in_file, config)
    check_names_and_shapes(stored, config, path)
    wanted = {name: tensor for name, tensor in stored.items()}
    arrays = {
        name: tensor.array if tensor.dtype == "BF16" else tensor.widened()
        for name, tensor in wanted.items()
    }
    return config, group_by_layer(arrays, config)


def weights_hash(weights: ModelWeights) -> str:
    """SHA-256 over names, shapes and float32 values: the same for every way to store them."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        inside = value if isinstance(value, Mapping) else {"": value}
        for key in sorted(inside):
            array = widen(inside[key])
            digest.update(f"{name}.{key}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array, "<f4").data)
    return digest.hexdigest()


def texts_as_rows(ids: Ids) -> tuple[np.ndarray, np.ndarray]:
    """One text or several, padded on the left: tokens and positions, both (B, T).

    Errors: ValueError for an empty text; TypeError for ids that are not integers.
    """
    given: list[Any] = list(ids)
    nested = bool(given) and isinstance(given[0], Sequence | np.ndarray)
    texts: list[list[Any]] = [list(text) for text in given] if nested else [given]
    if not texts or not all(texts):
        raise ValueError("no token ids: a forward pass needs at least one")
    if not all(
        isinstance(i, int | np.integer) and i is not True and i >= 0 for text in texts for i in text
    ):
        raise TypeError(f"token ids must be integers from 0, found {texts!r:.80}")
    T = max(map(len, texts))
    tokens = [[0] * (T - len(text)) + text for text in texts]
    positions = [[-1] * (T - len(text)) + list(range(len(text))) for text in texts]
    return np.array(tokens, np.int64), np.array(positions, np.int64)


def make_run(model: Model, ids: Ids, decode: int = 0, chunks: Sequence[int] | None = None) -> Run:
    """The run that `record` records: the texts, then `decode` greedy tokens one at a time."""
    config, weights = open_model(model)
    tokens, positions = texts_as_rows(ids)
    B, P = tokens.shape
    calls = (P,) if chunks is None else tuple(chunks)
    if min(calls, default=1) < 1:
        raise ValueError(f"chunks {calls}: expected at least one token in each")
    if sum(calls) != P:
        raise ValueError(f"chunks {calls} do not add up to the {P} tokens of the prompt")
    if decode < 0 or (decode and "lm_head.weight" not in weights):
        raise ValueError(f"decode = {decode}: expected 0 or more, and a model with a lm_head")
    later = positions[:, -1:] + 1 + np.arange(decode)
    tokens = np.concatenate([tokens, np.full((B, decode), -1)], axis=1)
    positions = np.concatenate([positions, later], axis=1)
    return plain_run(config, weights, tokens, positions, calls + (1,) * decode, P)


def record(
    model: Model,
    ids: Ids,
    *,
    decode: int = 0,
    chunks: Sequence[int] | None = None,
    points: str = "all",
    store: np.typing.DTypeLike = np.float32,
    about: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Golden:
    """Run the model in float64 and keep every named array, with its yardsticks.

    ids: one text or several (padded on the left); decode: so many greedy tokens follow, each
    fed alone; chunks: lengths of the pieces in which the prompt is fed; points: "all", "blocks"
    or "logits"; store: float32 or float64.
    Errors: ValueError, TypeError for bad ids; IndexError for ids outside the vocabulary;
    MemoryError with the estimate, if the arrays would not fit.
    """
    if points not in POINTS:
        raise ValueError(f"points = {points!r}: expected one of {', '.join(POINTS)}")
    run = make_run(model, ids, decode, chunks)
    every = names_in_order(run.config.num_hidden_layers)
    names = frozenset(name for name in every if POINTS[points](split_name(name)[1]))
    _check_memory(names, run)
    truth, tokens = evaluate(run, names=names, progress=progress)
    run = plain_run(run.config, run.weights, tokens, run.positions, run.calls, run.prompt)
    yardsticks: dict[str, dict[str, float]] = {name: {} for name in truth}
    for precision in PRECISIONS.values():
        progress(f"honest {precision.name} runs")
        for name, value in noise(run, truth, precision).items():
            yardsticks[name][precision.name] = min(value, WORTHLESS)
    tensors = {name: truth[name].astype(store) for name in every if name in truth}
    facts = {**_facts(run), "points": points, **(about or {})}
    calls, config = run.calls, run.config
    return Golden(tensors, yardsticks, tokens, run.positions, calls, run.prompt, config, facts)


def _check_memory(names: Iterable[str], run: Run) -> None:
    """Errors: MemoryError, if twice the float64 arrays (a run and its rival) would not fit."""
    B, T = run.tokens.shape
    sizes = (math.prod(expected_shape(name, run.config, B, T)) for name in names)
    needed, limit = 2 * 8 * sum(sizes), physical_memory() * 9 // 10
    if needed > limit > 0:
        raise MemoryError(
            f"recording {B} x {T} tokens needs about {needed / 1e9:.3g} GB, more than the limit of "
            f"{limit / 1e9:.3g} GB: take fewer tokens, or points='blocks' or 'logits'"
        )


WORTHLESS = 1.0  # a yardstick of 100 % or more: in this precision the array says nothing


def _facts(run: Run) -> dict[str, str]:
    """Everything about a recording that nobody should need to ask for."""
    from llama_np import __version__

    return {
        "config_sources": json.dumps(dict(run.config.sources)),
        "rope_layout": "halves: channel j turns with channel j + head_dim / 2",
        "scores": "scaled, before masking; 0 where a token comes later or is padding",
        "rows": "prompt first, then one row per decode step; padding rows are 0",
        "weights_sha256": weights_hash(run.weights),
        "parameters": str(parameters(run.weights)),
        "computed_in": "float64",
        "llama_np": __version__,
        "numpy": np.__version__,
        "blas": _blas(),
    }


def _blas() -> str:
    known: Any = np.show_config(mode="dicts")
    blas = known["Build Dependencies"]["blas"]
    return f"{blas.get('name')} {blas.get('version')}"


def same_weights(golden: Golden, weights: ModelWeights) -> bool:
    """Whether the golden file was recorded from these weights."""
    return golden.about.get("weights_sha256") == weights_hash(weights)


def run_of(golden: Golden, weights: ModelWeights) -> Run:
    """The run that a golden file recorded, ready to be run again or changed."""
    return plain_run(
        golden.config, weights, golden.tokens, golden.positions, golden.calls, golden.prompt
    )


def in_order(names: Iterable[str], config: Config) -> list[str]:
    """The given trace names in execution order."""
    wanted = set(names)
    return [name for name in names_in_order(config.num_hidden_layers) if name in wanted]
