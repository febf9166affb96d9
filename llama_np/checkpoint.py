"""From a checkpoint to (config, weights): everything is checked before it is loaded.

A checkpoint is a Hugging Face folder, a .safetensors file beside its config.json, a .gguf file,
or a .bin file of llama2.c; it is found as a path, among the bundled models, or on the hub.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.config import Config, config_from_dict, read_config, read_json
from llama_np.errors import CheckpointError, ConfigError, TokenizerError
from llama_np.files import guess_format, open_regular, write_atomically
from llama_np.gguf_file import parse_gguf
from llama_np.gguf_model import gguf_source
from llama_np.hub import download, is_hub_name
from llama_np.llama2c import read_llama2c
from llama_np.memory import empty_in_one_block
from llama_np.precision import to_bf16
from llama_np.tokenizer import Tokenizer
from llama_np.tokenizer import load_tokenizer as open_tokenizer
from llama_np.weights import DTYPES, FLOATS, Source, Stored, copy_of_view, read_tensors

BUNDLED = Path(__file__).parent / "checkpoints"
MAX_INDEX_BYTES = 64 << 20
MAX_SHARDS = 4096
MOST_NAMES_LISTED = 10
MAPPED_FROM = 1 << 27  # bytes of weights; fewer are copied in 0.1 s


def load(
    folder: str | os.PathLike[str] = "fairytales",
    dtype: np.typing.DTypeLike | str = np.float32,
    *,
    mmap: bool | None = None,
    strict: bool = False,
    check_finite: bool = False,
    max_bytes: int | None = None,
) -> tuple[Config, dict[str, Any]]:
    """Load a checkpoint: `config, weights = load("fairytales")`.

    `folder` is a folder, a .safetensors, .gguf or llama2.c .bin file, the name of a bundled
    model, or owner/name[@revision] on the hub. dtype float32 or float64 is what the model
    computes in; "bfloat16" leaves matrices in two bytes and computes in float32. Weights that
    need no widening are views of the mapped file, unless `mmap` is False. By default small files
    (less than 128 MiB) are copied into memory of their own, which the system holds in large pages:
    a model of 15 million parameters decodes 1.4 times as fast. Unknown tensors are warned of, or
    refused if `strict`.
    Errors: OSError; ConfigError; CheckpointError (missing, mis-shaped, malformed, with
    `check_finite` also NaN or infinity); NotImplementedError; MemoryError, before anything is
    allocated, when the weights need more than `max_bytes` (by default 90 % of this machine's
    memory).
    """
    compute_dtype(dtype)  # a wrong dtype is told before a download
    path = locate(folder)
    config, in_file = read_checkpoint(path, mmap is not False)
    stored = canonical_names(in_file, config)
    check_names_and_shapes(stored, config, path, strict)
    stored = {name: stored[name] for name in expected_shapes(config) if name in stored}
    mapped = is_worth_mapping(stored) if mmap is None else mmap
    check_memory(stored, dtype, max_bytes, path, mapped)
    if check_finite:
        _check_finite(stored, path)
    unique = {id(tensor): tensor for tensor in stored.values()}  # a tied head is one tensor
    arrays = _as_dtype(unique, dtype, mapped)
    return config, group_by_layer({n: arrays[id(t)] for n, t in stored.items()}, config)


def load_tokenizer(name: str | os.PathLike[str] = "fairytales") -> Tokenizer:
    """The tokenizer of a checkpoint; names as in `load`.

    Errors: OSError; TokenizerError for a malformed file.
    """
    path = locate(name, weights=False)
    if path.name.startswith("tokenizer."):
        return open_tokenizer(path)
    with tokenizer_folder(path) as folder:
        try:
            return open_tokenizer(folder)
        except TokenizerError as problem:  # name the file that people know
            raise TokenizerError(str(problem).replace(str(folder), str(path))) from problem


@contextmanager
def tokenizer_folder(path: Path) -> Iterator[Path]:
    """A folder with the tokenizer's files of a checkpoint; temporary for a file that holds all.

    Errors: OSError; TokenizerError.
    """
    format = file_format(path)
    if format in ("folder", "safetensors"):
        yield path if format == "folder" else path.parent
        return
    with tempfile.TemporaryDirectory() as name:
        for file, content in read_single(path, format, mmap=True).files().items():
            write_atomically(Path(name) / file, content)
        yield Path(name)


def locate(
    name: str | os.PathLike[str],
    weights: bool = True,
    *,
    revision: str | None = None,
    subfolder: str = "",
    **hub: Any,
) -> Path:
    """Where a checkpoint is: a path that exists, a bundled model, or a download from the hub.

    Without `weights`, only the small files are fetched from the hub. `subfolder` is a folder
    within any of them; `revision` and the options of `hub.download` are for the hub only.
    Errors: FileNotFoundError says what was looked for; those of huggingface_hub, unchanged.
    """
    path = _found(name, weights, revision, subfolder, hub) / subfolder
    if subfolder and not path.is_dir():
        raise FileNotFoundError(2, "no such subfolder of the checkpoint", str(path))
    return path


def _found(
    name: str | os.PathLike[str],
    weights: bool,
    revision: str | None,
    subfolder: str,
    hub: dict[str, Any],
) -> Path:
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    if isinstance(name, str) and is_bare_file_name(name) and (BUNDLED / name).is_dir():
        return BUNDLED / name
    if isinstance(name, str) and is_hub_name(name):
        pinned = name if revision is None else f"{name.partition('@')[0]}@{revision}"
        return download(pinned, weights, subfolder, **hub)
    raise FileNotFoundError(
        2, "no such file or folder, no bundled model, and no owner/name of the hub", str(name)
    )


def file_format(path: Path) -> str:
    """What a checkpoint is: "folder", "safetensors", "gguf" or "llama2c".

    Errors: OSError; CheckpointError for a pickle, an empty file, a pipe.
    """
    if path.is_dir():
        return "folder"
    with open_regular(path) as file:
        start = file.read(8)
    if start.startswith(b"GGUF") or path.suffix == ".gguf":
        return "gguf"
    if path.suffix == ".safetensors" or path.name.startswith("tokenizer."):
        return "safetensors"
    if path.suffix in (".pth", ".pt", ".pkl") or start.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{str(path)!r} may be a pickle, which is never loaded: `llama-np convert` it first",
            path,
        )
    if path.suffix == ".bin" and start:
        return "llama2c"
    raise CheckpointError(
        f"{str(path)!r}: expected a folder, .safetensors, .gguf or llama2.c's .bin "
        f"({guess_format(start)})",
        path,
    )


def read_checkpoint(path: Path, mmap: bool = True) -> tuple[Config, dict[str, Stored]]:
    """The configuration and the tensors, as they rest, of whatever `locate` found."""
    format = file_format(path)
    if format in ("folder", "safetensors"):
        return read_config(_folder_of(path)), read_folder(path, mmap)
    source = read_single(path, format, mmap)
    config = config_from_dict(source.config, where=repr(str(path)))
    sources = {k: v.replace("config.json", "the file") for k, v in config.sources.items()}
    return replace(config, sources=sources), source.tensors


def read_single(path: Path, format: str, mmap: bool) -> Source:
    """A file that holds a whole checkpoint."""
    if format == "gguf":
        file = parse_gguf(path)
        source = gguf_source(file.metadata, file.tensors, str(path))
    else:
        source = read_llama2c(path)
    if mmap:
        return source
    copies = {
        name: t.apply(copy_of_view) if t.is_mapped else t for name, t in source.tensors.items()
    }
    return replace(source, tensors=copies)


def read_values(path: Path) -> dict[str, Any]:
    """The content of config.json, or what stands for it in a GGUF or llama2.c file."""
    format = file_format(path)
    if format not in ("folder", "safetensors"):
        return read_single(path, format, mmap=True).config
    return read_json(_folder_of(path) / "config.json")


def _folder_of(path: Path) -> Path:
    """Where config.json stands: the checkpoint's folder, or the one that its file is in."""
    if path.is_dir() and not (path / "config.json").exists():
        raise _nothing_to_load(path, "config.json")
    return path if path.is_dir() else path.parent


def read_folder(path: Path, mmap: bool = True) -> dict[str, Stored]:
    """The tensors of a folder (model.safetensors, or the shards of its index) or of a file.

    Errors: OSError; CheckpointError; NotImplementedError.
    """
    format = file_format(path)
    if format == "safetensors":
        return _without_kernels(read_tensors(path, mmap))
    if format != "folder":
        return read_single(path, format, mmap).tensors
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        return _without_kernels(read_tensors(path / "model.safetensors", mmap))
    if index.exists():
        return _without_kernels(_read_shards(path, index, mmap))
    raise _nothing_to_load(path, "model.safetensors")


def _without_kernels(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Flax's names as PyTorch has them, and its kernels (in, out) as weights (out, in)."""
    return {
        re.sub(r"\.(kernel|embedding)$", ".weight", name): _transposed(tensor)
        if name.endswith(".kernel")
        else tensor
        for name, tensor in tensors.items()
    }


def _transposed(kernel: Stored) -> Stored:
    def read() -> np.ndarray:
        return np.ascontiguousarray(kernel.array.T)

    return Stored(kernel.dtype, read, kernel.shape[::-1], kernel.resting)


def _nothing_to_load(folder: Path, wanted: str) -> Exception:
    """What to say about a folder that is no Hugging Face checkpoint in safetensors."""
    if (folder / "adapter_config.json").exists():
        what = "holds an adapter (LoRA); merge it into its base model first"
        return NotImplementedError(f"{str(folder)!r} {what}")
    for pattern, advice in (
        ("*.pth", "convert it first: llama-np convert FOLDER OUT"),
        ("pytorch_model*.bin", "convert it first: llama-np convert FOLDER OUT"),
        ("*.pt", "convert it first: llama-np convert FILE OUT"),
    ):
        for found in sorted(folder.glob(pattern)):
            what = f"holds the pickle {found.name!r}; {advice}"
            return CheckpointError(f"{str(folder)!r} has no {wanted} but {what}", folder)
    for found in sorted(folder.glob("*.msgpack")):
        what = f"holds Flax's {found.name!r}; save the model with safe_serialization=True there"
        return CheckpointError(f"{str(folder)!r} has no {wanted} but {what}", folder)
    for pattern in ("*.gguf", "*.safetensors", "*.bin"):
        for found in sorted(folder.glob(pattern)):
            what = f"no {wanted} in this folder; name a file in it, such as {found.name!r}"
            return FileNotFoundError(2, what, str(folder / wanted))
    hub = "; pickles are never fetched from the hub" if folder.parent.name == "snapshots" else ""
    return FileNotFoundError(2, f"no {wanted} in this folder{hub}", str(folder / wanted))


def _read_shards(folder: Path, index: Path, mmap: bool) -> dict[str, Stored]:
    places = _read_index(index)
    tensors: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        shard = read_tensors(folder / file, mmap)
        twice = tensors.keys() & shard.keys()
        if twice:
            raise CheckpointError(f"{file!r}: tensor {min(twice)!r} is in another shard too", index)
        lost = {name for name, place in places.items() if place == file} - shard.keys()
        if lost:
            where = f"{str(index)!r}: {file!r} does not hold"
            raise CheckpointError(f"{where} {_listed(lost)}", index, min(lost))
        tensors |= shard
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """The weight_map, checked: file names in it cannot lead out of the folder."""
    try:
        places = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    except ConfigError as problem:
        raise CheckpointError(str(problem), index) from problem
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{str(index)!r} has no weight_map", index)
    for name, file in places.items():
        if not is_bare_file_name(file):
            raise CheckpointError(
                f"{str(index)!r}: tensor {name!r} is placed in {file!r:.200}, expected a bare "
                "file name",
                index,
                name,
            )
    if len(set(places.values())) > MAX_SHARDS:
        raise CheckpointError(f"{str(index)!r} names more than {MAX_SHARDS} shards", index)
    return places


def is_bare_file_name(name: Any) -> bool:
    """True for a name that cannot lead out of the folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\:\0")
    )


def canonical_names(stored: Mapping[str, Stored], config: Config) -> dict[str, Stored]:
    """Names as LlamaForCausalLM has them: with "model.", without buffers, the head tied.

    A bare LlamaModel's checkpoint lacks the prefix. Old checkpoints carry rotary frequencies,
    which are computed here. A tied head is an alias of the embedding.
    """
    heads = ("lm_head.", "score.")
    bare = "embed_tokens.weight" in stored
    names = {
        name if not bare or name.startswith(heads) else f"model.{name}": tensor
        for name, tensor in stored.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if config.tie_word_embeddings:  # as in transformers, the head's values win if both exist
        shared = names.get("lm_head.weight") or names.get("model.embed_tokens.weight")
        if shared is not None:
            names["lm_head.weight"] = names["model.embed_tokens.weight"] = shared
    return names


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the configuration calls for, heads included."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (queries, D),
        "self_attn.k_proj.weight": (keys, D),
        "self_attn.v_proj.weight": (keys, D),
        "self_attn.o_proj.weight": (D, queries),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    has_bias = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}
    for name, shape in list(layer.items()):
        if has_bias.get(name.split(".")[0], False):
            layer[name.replace("weight", "bias")] = shape[:1]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    return shapes | {"lm_head.weight": (V, D), "score.weight": (config.num_labels, D)}


def optional_tensors(config: Config) -> set[str]:
    """Heads that a checkpoint of this architecture may leave out."""
    headless = {"LlamaModel", "LlamaForSequenceClassification"} & set(config.architectures)
    return {"score.weight", "lm_head.weight"} if headless else {"score.weight"}


def check_names_and_shapes(
    stored: Mapping[str, Stored], config: Config, path: Path, strict: bool = False
) -> None:
    """Errors: CheckpointError naming what is missing or mis-shaped, or (strict) unexpected."""
    shapes = expected_shapes(config)
    missing = shapes.keys() - stored.keys() - optional_tensors(config)
    if missing:
        raise CheckpointError(f"{str(path)!r} lacks {_listed(missing)}", path, min(missing))
    for name in sorted(shapes.keys() & stored.keys()):
        if stored[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{str(path)!r}: tensor {name!r} has the dtype {stored[name].dtype}, "
                "expected floating-point numbers",
                path,
                name,
            )
        if stored[name].shape != shapes[name]:
            raise CheckpointError(
                f"{str(path)!r}: tensor {name!r} has the shape {stored[name].shape}, "
                f"the configuration expects {shapes[name]}",
                path,
                name,
            )
    unexpected = stored.keys() - shapes.keys()
    if unexpected and strict:
        raise CheckpointError(f"{str(path)!r}: unexpected {_listed(unexpected)}", path)
    if unexpected:
        warnings.warn(f"{str(path)!r}: ignored {_listed(unexpected)}", stacklevel=3)


def _listed(names: set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:MOST_NAMES_LISTED])
    more = len(names) - MOST_NAMES_LISTED
    return f"{len(names)} tensors: {shown}" + (f" and {more} more" if more > 0 else "")


def is_worth_mapping(stored: Mapping[str, Stored]) -> bool:
    """Whether these weights are so large that `load` leaves them in the mapped file."""
    unique = {id(tensor): tensor.nbytes for tensor in stored.values()}
    return sum(unique.values()) >= MAPPED_FROM


def check_memory(
    stored: Mapping[str, Stored],
    dtype: Any,
    max_bytes: int | None,
    path: Path,
    mapped: bool = True,
) -> None:
    """Errors: MemoryError with the estimate, if the widened weights would not fit."""
    limit = physical_memory() * 9 // 10 if max_bytes is None else max_bytes
    unique = {id(tensor): tensor for tensor in stored.values()}
    needed = sum(resident_bytes(tensor, dtype, mapped) for tensor in unique.values())
    if needed > limit and (limit or max_bytes is not None):
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        raise MemoryError(
            f"{str(path)!r} needs about {needed / 1e9:.3g} GB of memory as {name}, more than the "
            f"limit of {limit / 1e9:.3g} GB"
        )


def physical_memory() -> int:
    """Bytes of memory of this machine, or 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def resident_bytes(tensor: Stored, dtype: Any, mapped: bool = True) -> int:
    """Bytes that loading this tensor allocates: none when it stays in the mapped file."""
    mapped = mapped and tensor.is_mapped
    if _rests_as_bf16(tensor, dtype):
        return 0 if tensor.dtype == "BF16" and mapped else 2 * tensor.size
    stays = np.dtype(DTYPES[tensor.dtype]) == compute_dtype(dtype) and mapped
    return 0 if stays else tensor.size * compute_dtype(dtype).itemsize


def compute_dtype(dtype: Any) -> np.dtype:
    """The dtype of activations: float32 also when the weights rest as bfloat16."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        return np.dtype(np.float32)
    chosen = np.dtype(dtype)
    if chosen not in (np.float32, np.float64):
        raise ValueError(f"dtype {chosen}: expected float32, float64 or 'bfloat16'")
    return chosen


def _rests_as_bf16(tensor: Stored, dtype: Any) -> bool:
    return isinstance(dtype, str) and dtype == "bfloat16" and len(tensor.shape) == 2


def _as_dtype(tensors: Mapping[int, Stored], dtype: Any, mapped: bool) -> dict[int, np.ndarray]:
    """The arrays that the model computes with: views of the file, or in memory of their own."""
    moved = [key for key, tensor in tensors.items() if resident_bytes(tensor, dtype, mapped)]
    arrays = empty_in_one_block({key: _kind(tensors[key], dtype) for key in moved})
    for key, tensor in tensors.items():
        if key in arrays:
            arrays[key][...] = _converted(tensor, dtype)
        else:
            arrays[key] = tensor.array
        arrays[key].flags.writeable = False  # also where it is no view of a file
    return arrays


def _kind(tensor: Stored, dtype: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array that the model computes with."""
    kind = np.dtype(np.uint16) if _rests_as_bf16(tensor, dtype) else compute_dtype(dtype)
    return tensor.shape, kind


def _converted(tensor: Stored, dtype: Any) -> np.ndarray:
    """What the model computes with; matrices may rest as bfloat16 bits."""
    if _rests_as_bf16(tensor, dtype):
        return tensor.array if tensor.dtype == "BF16" else to_bf16(tensor.widened())
    return tensor.widened()


def _check_finite(stored: Mapping[str, Stored], path: Path) -> None:
    for name, tensor in stored.items():
        bad = ~np.isfinite(tensor.widened())
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise CheckpointError(
                f"{str(path)!r}: tensor {name!r} holds {int(bad.sum())} numbers that are not "
                f"finite, the first at {first}",
                path,
                name,
            )


def group_by_layer(arrays: Mapping[str, np.ndarray], config: Config) -> dict[str, Any]:
    """One mapping per layer, keeping the names: weights["model.layers.3"]["mlp.up_proj.weight"].

    Grouping once at load time spares every forward pass the search through all names.
    """
    weights: dict[str, Any] = {f"model.layers.{i}": {} for i in range(config.num_hidden_layers)}
    for name, array in arrays.items():
        parts = name.split(".", 3)
        layer = ".".join(parts[:3])
        if layer in weights:
            weights[layer][parts[3]] = array
        else:
            weights[name] = array
    return weights
