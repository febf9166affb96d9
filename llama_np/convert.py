"""Checkpoints from one format to another, one tensor at a time.

Everything becomes a `Source` under Hugging Face's names, is checked against its configuration,
and is written as a Hugging Face folder, in Meta's layout, or for llama2.c.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.checkpoint import (
    canonical_names,
    check_names_and_shapes,
    expected_shapes,
    file_format,
    is_bare_file_name,
    locate,
    read_checkpoint,
    read_single,
)
from llama_np.config import Config, config_from_dict, config_to_dict, read_json
from llama_np.errors import CheckpointError
from llama_np.files import (
    PathLike,
    atomic_folder,
    check_target,
    open_regular,
    read_bounded,
    write_atomically,
)
from llama_np.llama2c import tokenizer_bin, write_llama2c
from llama_np.meta import meta_source, meta_tensors, params_of
from llama_np.precision import to_bf16
from llama_np.sentencepiece_model import parse_pieces
from llama_np.torch_pickle import read_torch, write_torch
from llama_np.weights import Source, Stored, save_tensors

SHARD_BYTES = 5_000_000_000
MAX_SIDE_FILE = 64 << 20
MAX_INDEX_BYTES = 64 << 20
SIDE_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
FORMATS = ("hf", "llama2c", "meta")
STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TORCH_NAMES = {"F64": "float64"} | {dtype: name for name, dtype in STORED_AS.items()}


def convert(
    source: PathLike,
    out: PathLike,
    to: str = "hf",
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    shards: int = 1,
    version: int = 0,
    context: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Convert any checkpoint; `to` is "hf" or "meta" (`out` is a folder), or "llama2c" (a file).

    dtype: "float32", "float16", "bfloat16", or None to keep each tensor's own (quantized ones
    become float32). `shard_bytes` splits Hugging Face's safetensors, `shards` Meta's files;
    `version` is llama2.c's; `context` replaces max_position_embeddings. `progress(done, total)`
    is called after every tensor. The output appears complete or not at all.
    Errors: OSError (FileExistsError unless `overwrite`), CheckpointError, ConfigError,
    NotImplementedError for what the target format cannot say.
    """
    if to not in FORMATS or dtype not in (None, *STORED_AS):
        raise ValueError(f"to = {to!r}, dtype = {dtype!r}: expected {FORMATS}, {(*STORED_AS,)}")
    if shards < 1 or shard_bytes < 1:
        raise ValueError(f"shards = {shards}, shard_bytes = {shard_bytes}: expected at least 1")
    model = open_source(source)
    if context is not None:
        model.config["max_position_embeddings"] = context
    config = config_from_dict(model.config, where=repr(str(source)))
    tensors = _checked_tensors(model, config, Path(source), dtype)
    if to != "hf" and tensors.pop("score.weight", None) is not None:
        warnings.warn("the classification head is left out: this format lacks one", stacklevel=2)
    files = _small_files(model)
    steps = _Steps(progress)
    if to == "hf":
        _write_hugging_face(Path(out), config, files, tensors, shard_bytes, overwrite, steps)
    elif to == "meta":
        _write_meta(Path(out), config, files, tensors, shards, overwrite, steps)
    else:
        _write_llama2c(Path(out), config, files, tensors, version, overwrite, steps)


class _Steps:
    """Counts finished tensors for a progress display; the writer says how many there will be."""

    def __init__(self, show: Callable[[int, int], None]) -> None:
        self.show, self.done, self.total = show, 0, 0

    def __call__(self) -> None:
        self.done += 1
        self.show(self.done, self.total)


def _small_files(model: Source) -> dict[str, bytes]:
    """The tokenizer's files, read before the long work begins."""
    try:
        return model.files()
    except (FileNotFoundError, NotImplementedError) as problem:
        warnings.warn(f"converted without a tokenizer: {problem}", stacklevel=3)
        return {}


def _checked_tensors(
    model: Source, config: Config, path: Path, dtype: str | None
) -> dict[str, Stored]:
    """What is to be written: complete, of the right shapes, a tied head only once."""
    stored = canonical_names(model.tensors, config)
    check_names_and_shapes(stored, config, path)
    wanted = {name: stored[name] for name in expected_shapes(config) if name in stored}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    return {name: _as_dtype(tensor, dtype) for name, tensor in wanted.items()}


def _as_dtype(tensor: Stored, dtype: str | None) -> Stored:
    """The tensor in another precision, rounded to nearest; float8 becomes float32."""
    wanted = STORED_AS[dtype] if dtype else tensor.dtype
    wanted = "F32" if wanted.startswith("F8") else wanted
    if wanted == tensor.dtype:
        return tensor

    def cast() -> np.ndarray:
        source = Stored(tensor.dtype, tensor.array)
        out = np.empty(tensor.shape, {"BF16": np.uint16, "F16": np.float16}.get(wanted, np.float32))
        step = max(1, (1 << 22) * len(out) // max(1, out.size))
        for first in range(0, len(out), step):  # piece by piece: rounding needs copies
            rows = slice(first, first + step)
            numbers = Stored(source.dtype, source.array[rows]).widened()
            with np.errstate(over="ignore"):  # beyond float16's range: infinity, as everywhere
                out[rows] = to_bf16(numbers) if wanted == "BF16" else numbers
        return out

    return Stored(wanted, cast, tensor.shape)


# Reading


def open_source(source: PathLike) -> Source:
    """Any checkpoint, pickles included, under Hugging Face's names; nothing is read yet.

    Errors: as `convert`.
    """
    path = locate(source)
    if path.is_dir():
        return _open_folder(path)
    start = _start(path)
    if path.suffix in (".pth", ".pt") or start.startswith(b"PK\x03\x04"):
        return _open_torch_file(path)
    format = file_format(path)
    if format == "safetensors":
        return _hugging_face(path, path.parent, read_checkpoint(path, mmap=False)[1])
    return read_single(path, format, mmap=False)


def _start(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(8)


def _open_folder(folder: Path) -> Source:
    index = folder / "pytorch_model.bin.index.json"
    if any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        return _hugging_face(folder, folder, read_checkpoint(folder, mmap=False)[1])
    if (folder / "pytorch_model.bin").exists():
        return _hugging_face(folder, folder, read_torch(folder / "pytorch_model.bin"))
    if index.exists():
        return _hugging_face(folder, folder, _torch_shards(folder, index))
    shards = sorted(folder.glob("consolidated.*.pth"))
    if shards:
        return _open_meta(folder, shards)
    single = [*sorted(folder.glob("*.gguf")), *sorted(folder.glob("*.pth"))]
    if len(single) == 1:
        return open_source(single[0])
    raise FileNotFoundError(
        2,
        "no checkpoint in this folder: expected model.safetensors, pytorch_model.bin, "
        "consolidated.00.pth or one .gguf file",
        str(folder),
    )


def _open_torch_file(path: Path) -> Source:
    """A lone pickle: Meta's if params.json lies beside it, or Hugging Face's with config.json."""
    if (path.parent / "params.json").exists() and not (path.parent / "config.json").exists():
        together = sorted(path.parent.glob("consolidated.*.pth"))
        return _open_meta(path.parent, together if path in together else [path])
    return _hugging_face(path, path.parent, read_torch(path))


def _open_meta(folder: Path, shards: list[Path]) -> Source:
    for number, shard in enumerate(shards):
        if len(shards) > 1 and shard.name != f"consolidated.{number:02d}.pth":
            missing = folder / f"consolidated.{number:02d}.pth"
            raise FileNotFoundError(2, "a shard is missing", str(missing))
    params = _params(folder)
    contents = [read_torch(shard) for shard in shards]
    return meta_source(params, contents, folder)


def _params(folder: Path) -> dict[str, Any]:
    """params.json; some have everything in an inner "model" object."""
    params = read_json(folder / "params.json")
    inner = params.get("model")
    return inner if isinstance(inner, dict) else params


def _torch_shards(folder: Path, index: Path) -> dict[str, Stored]:
    places = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(map(is_bare_file_name, places.values())):
        raise CheckpointError(f"{str(index)!r} has no weight_map of bare file names", index)
    tensors: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        shard = read_torch(folder / file)
        twice = tensors.keys() & shard.keys()
        if twice:
            raise CheckpointError(f"{file!r}: tensor {min(twice)!r} is in another shard too", index)
        tensors |= shard
    lost = places.keys() - tensors.keys()
    if lost:
        raise CheckpointError(f"{str(index)!r}: no shard holds {min(lost)!r}", index, min(lost))
    return tensors


def _hugging_face(path: Path, folder: Path, tensors: dict[str, Stored]) -> Source:
    config = read_json(folder / "config.json")
    return Source(config, tensors, lambda: side_files(folder))


def side_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's and the other small files of a folder, as they are."""
    return {
        name: read_bounded(folder / name, MAX_SIDE_FILE)
        for name in SIDE_FILES
        if (folder / name).exists()
    }


# Writing


def _torch_dtype(tensors: Mapping[str, Stored]) -> str:
    return TORCH_NAMES.get(tensors["model.embed_tokens.weight"].dtype, "float32")


def _write_hugging_face(
    out: Path,
    config: Config,
    files: Mapping[str, bytes],
    tensors: dict[str, Stored],
    shard_bytes: int,
    overwrite: bool,
    progress: _Steps,
) -> None:
    parts = split_into_shards(tensors, shard_bytes)
    progress.total = len(tensors)
    with atomic_folder(out, overwrite) as folder:
        names = ["model.safetensors"]
        if len(parts) > 1:
            names = [
                f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))
            ]
        for name, part in zip(names, parts, strict=True):
            save_tensors(folder / name, part, progress=progress)
        for name, content in files.items():
            write_atomically(folder / name, content)
        if len(parts) > 1:
            _write_json(folder / "model.safetensors.index.json", _index(names, parts))
        _write_json(folder / "config.json", hugging_face_config(config, _torch_dtype(tensors)))


def split_into_shards(tensors: Mapping[str, Stored], limit: int) -> list[dict[str, Stored]]:
    """Fill shard after shard in order; a tensor is never split."""
    parts: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if parts[-1] and filled + tensor.nbytes > limit:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += tensor.nbytes
    return parts


def _index(names: list[str], parts: list[dict[str, Stored]]) -> dict[str, Any]:
    places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    total = sum(tensor.nbytes for part in parts for tensor in part.values())
    return {"metadata": {"total_size": total}, "weight_map": places}


def hugging_face_config(config: Config, dtype: str) -> dict[str, Any]:
    """The content of a config.json that every version of transformers reads the same."""
    values = config_to_dict(config)
    values["architectures"] = values["architectures"] or ["LlamaForCausalLM"]
    standard = config.head_dim * config.num_attention_heads == config.hidden_size
    if standard:  # older versions do not know the key, and newer ones compute it
        values.pop("head_dim")
    if set(config.rope_scaling) == {"rope_type", "factor"}:  # the older spelling, read by all
        values["rope_scaling"] = {
            "type": config.rope_scaling["rope_type"],
            "factor": float(config.rope_scaling["factor"]),
        }
    if list(config.id2label.values()) == ["LABEL_0", "LABEL_1"]:  # the default
        values.pop("id2label")
        values.pop("label2id")
    return {k: v for k, v in values.items() if v is not None} | {"torch_dtype": dtype}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode("utf-8"))


def _write_meta(
    out: Path,
    config: Config,
    files: Mapping[str, bytes],
    tensors: dict[str, Stored],
    shards: int,
    overwrite: bool,
    progress: _Steps,
) -> None:
    params = params_of(config)
    if config.tie_word_embeddings:  # Meta's files always have a head
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    if "lm_head.weight" not in tensors:
        raise CheckpointError("the checkpoint lacks 'lm_head.weight'", None, "lm_head.weight")
    parts = meta_tensors(tensors, config, shards)
    progress.total = sum(map(len, parts))
    with atomic_folder(out, overwrite) as folder:
        for number, part in enumerate(parts):
            write_torch(folder / f"consolidated.{number:02d}.pth", part, progress=progress)
        for name, content in files.items():
            if name in ("tokenizer.model", "tokenizer.json"):
                write_atomically(folder / name, content)
        _write_json(folder / "params.json", params)


def _write_llama2c(
    out: Path,
    config: Config,
    files: Mapping[str, bytes],
    tensors: dict[str, Stored],
    version: int,
    overwrite: bool,
    progress: _Steps,
) -> None:
    """model.bin, and beside it tokenizer.bin if there is a SentencePiece vocabulary."""
    vocabulary = files.get("tokenizer.model")
    progress.total = len(tensors) + (0 if version else 2)  # the legacy format has two tables more
    beside = out.with_name("tokenizer.bin")
    table = b"" if vocabulary is None else tokenizer_bin(parse_pieces(vocabulary))
    new = bool(table) and not (beside.is_file() and beside.read_bytes() == table)
    if new:
        check_target(beside, overwrite)
    write_llama2c(out, config_to_dict(config), tensors, version, overwrite, progress)
    if new:
        write_atomically(beside, table, overwrite)
    elif files and not table:
        warnings.warn("no tokenizer.bin: run.c knows SentencePiece vocabularies only", stacklevel=3)
