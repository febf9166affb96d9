"""The weights of the Hugging Face classes: which ones, random ones, given ones, saved ones."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.checkpoint import canonical_names, check_memory, expected_shapes, read_folder
from llama_np.config import Config
from llama_np.errors import CheckpointError
from llama_np.files import write_atomically
from llama_np.precision import is_bf16, round_bf16, round_f16, to_bf16, widen
from llama_np.weights import Stored, save_tensors

Shapes = dict[str, tuple[int, ...]]
HEADS = ("lm_head.weight", "score.weight")
SHARD_NAME = "model-{:05d}-of-{:05d}.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Precision:
    """What a model computes in: NumPy's float64 and float32, or bfloat16 and float16 emulated.

    An emulated run rounds the weights once and every named array where it appears; the arrays
    themselves are float32.
    """

    name: str
    compute: np.dtype
    round: Callable[[np.ndarray], np.ndarray] | None = None

    def weight(self, array: Any) -> np.ndarray:
        """The array as the model uses it; matrices of bfloat16 bits may rest as they are."""
        array = np.asarray(array)
        if self.name in ("bfloat16", "float32") and array.ndim == 2 and is_bf16(array):
            return array
        if self.name == "bfloat16" and array.ndim == 2:
            return to_bf16(array.astype(np.float32, copy=False))
        wide = widen(array).astype(self.compute, copy=False)
        return wide if self.round is None else self.round(wide)

    def stored(self, array: np.ndarray) -> np.ndarray | Stored:
        """The array in the format in which it is saved."""
        if self.name == "bfloat16":
            return Stored("BF16", array if is_bf16(array) else to_bf16(array))
        return widen(array).astype(np.float16) if self.name == "float16" else widen(array)


PRECISIONS = {
    "float64": Precision("float64", np.dtype(np.float64)),
    "float32": Precision("float32", np.dtype(np.float32)),
    "bfloat16": Precision("bfloat16", np.dtype(np.float32), round_bf16),
    "float16": Precision("float16", np.dtype(np.float32), round_f16),
}


def wanted_shapes(config: Config, head: str | None) -> Shapes:
    """Name and shape of every weight of a model with this head, in the order of a state dict."""
    shapes = expected_shapes(config)
    return {name: shape for name, shape in shapes.items() if name not in HEADS or name == head}


def random_weight(
    name: str, shape: tuple[int, ...], config: Config, deviation: float, seed: int
) -> np.ndarray:
    """A freshly initialised weight, float32: it depends on the seed and its own name only.

    Matrices are normally distributed, norms 1, biases 0, the padding token's embedding 0.
    """
    if len(shape) == 1:
        return np.full(shape, 0 if name.endswith("bias") else 1, np.float32)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    weight = generator.standard_normal(shape, np.float32) * np.float32(deviation)
    pad = config.pad_token_id
    if name == "model.embed_tokens.weight" and pad is not None and pad < shape[0]:
        weight[pad] = 0
    return weight


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Weights under Hugging Face's flat names.

    Takes a flat mapping, one grouped by layers (`load`), a bare model's (without "model."), or
    a tree of Flax parameters, whose kernels are stored as (in, out).
    """
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat if prefix else _canonical(flat)


def _canonical(flat: Mapping[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, value in flat.items():
        name = re.sub(r"(embedding|kernel)$", "weight", key.removeprefix("params."))
        bare = name.startswith(("embed_tokens.", "layers.", "norm."))
        transposed = key.endswith(".kernel")
        named[f"model.{name}" if bare else name] = np.asarray(value).T if transposed else value
    return named


def check_complete(arrays: Mapping[str, Any], shapes: Shapes) -> None:
    """Errors: CheckpointError for a weight that is missing or has another shape."""
    for name, shape in shapes.items():
        if name not in arrays:
            raise CheckpointError(f"the weights lack {name!r}, of shape {shape}", None, name)
        if np.shape(arrays[name]) != shape:
            found = np.shape(arrays[name])
            raise CheckpointError(f"{name!r} has the shape {found}, expected {shape}", None, name)


@dataclass
class Read:
    """The weights of a checkpoint, and what does not fit the model that they are read for."""

    tensors: dict[str, Stored]
    stored_dtype: str
    missing: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, found, expected
    unexpected: list[str]

    def arrays(self, precision: Precision) -> dict[str, np.ndarray]:
        """Numbers; for a bfloat16 model the bits. Errors: CheckpointError for what is neither."""
        keep = precision.name == "bfloat16"
        raw = {name: _raw(name, tensor) for name, tensor in self.tensors.items()}
        return raw if keep else {name: widen(array) for name, array in raw.items()}

    def check_memory(self, precision: Precision, path: Path) -> None:
        """Errors: MemoryError where the weights would not fit."""
        name = "bfloat16" if precision.name == "bfloat16" else precision.compute.name
        check_memory(self.tensors, name, None, path)


def read_weights(path: Path, config: Config, head: str | None, mmap: bool) -> Read:
    """Read what a model with this head needs. Errors: OSError, CheckpointError."""
    stored = read_folder(path, mmap)
    shapes = wanted_shapes(config, head)
    other_heads = [name for name in HEADS if name in stored and name not in shapes]
    if head != "lm_head.weight":  # a tied head's values win only where there is a head
        stored = {name: t for name, t in stored.items() if name != "lm_head.weight"}
    named = canonical_names(stored, config)
    present = {name: named[name] for name in shapes if name in named}
    floats = [t.dtype for t in stored.values() if t.dtype in _TORCH_NAMES]
    return Read(
        tensors={name: t for name, t in present.items() if t.shape == shapes[name]},
        stored_dtype=_TORCH_NAMES[floats[0]] if floats else "float32",
        missing=[name for name in shapes if name not in named],
        mismatched=[
            (name, t.shape, shapes[name]) for name, t in present.items() if t.shape != shapes[name]
        ],
        unexpected=[n for n in named if n not in shapes and n not in HEADS] + other_heads,
    )


_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _raw(name: str, tensor: Stored) -> np.ndarray:
    """Numbers, or bfloat16 bits. Errors: CheckpointError for what is neither."""
    if tensor.dtype[0] not in "FB" or tensor.dtype == "BOOL":
        raise CheckpointError(
            f"tensor {name!r} has the dtype {tensor.dtype}, expected numbers", None, name
        )
    return tensor.array if tensor.dtype == "BF16" else tensor.widened()


def save_weights(
    folder: Path, tensors: Mapping[str, np.ndarray | Stored], max_shard_size: int | str
) -> None:
    """Write model.safetensors, or shards and their index; an earlier save is replaced."""
    shards = _shards(tensors, size_in_bytes(max_shard_size))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [SHARD_NAME.format(i + 1, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_tensors(folder / name, shard, overwrite=True)
    if len(shards) > 1:
        _write_index(folder, names, shards)
    for old in [*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors*")]:
        if old.name not in [*names, INDEX_NAME if len(shards) > 1 else ""]:
            old.unlink()


def _nbytes(tensor: np.ndarray | Stored) -> int:
    return tensor.array.nbytes if isinstance(tensor, Stored) else tensor.nbytes


def _shards(
    tensors: Mapping[str, np.ndarray | Stored], limit: int
) -> list[dict[str, np.ndarray | Stored]]:
    """Fill shard after shard; a tensor is never split."""
    shards: list[dict[str, np.ndarray | Stored]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _nbytes(tensor) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += _nbytes(tensor)
    return shards


def _write_index(folder: Path, names: Iterable[str], shards: Iterable[Mapping[str, Any]]) -> None:
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(_nbytes(tensor) for shard in shards for tensor in shard.values())
    content = {"metadata": {"total_size": total}, "weight_map": places}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / INDEX_NAME, text.encode("utf-8"), overwrite=True)


def size_in_bytes(size: int | str) -> int:
    """5000000000 for "5GB", 2**30 for "1GiB"; a small b means bits. Errors: ValueError."""
    if isinstance(size, int):
        return size
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)", size.upper())
    if match is None:
        raise ValueError(f"max_shard_size = {size!r}: expected bytes, or for example '5GB'")
    bits = match[2][1] != "I" and size.endswith("b")
    return int(match[1]) * units[match[2]] // (8 if bits else 1)
