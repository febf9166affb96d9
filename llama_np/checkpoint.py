"""From a checkpoint folder to (config, weights): everything is checked before it is loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.config import Config, read_config, read_json
from llama_np.errors import CheckpointError
from llama_np.precision import to_bf16
from llama_np.tokenizer import Tokenizer
from llama_np.tokenizer import load_tokenizer as open_tokenizer
from llama_np.weights import Stored, read_tensors

BUNDLED = Path(__file__).parent / "checkpoints"
MAX_INDEX_BYTES = 64 << 20
MOST_NAMES_LISTED = 10


def load(
    folder: str | os.PathLike[str] = "fairytales",
    dtype: np.typing.DTypeLike | str = np.float32,
    *,
    mmap: bool = True,
    strict: bool = False,
    check_finite: bool = False,
    max_bytes: int | None = None,
) -> tuple[Config, dict[str, Any]]:
    """Load a checkpoint: `config, weights = load("fairytales")`.

    dtype float32 or float64 is what the model computes in; "bfloat16" leaves matrices in two
    bytes and computes in float32. Weights that need no widening are views of the mapped file.
    Unknown tensors are warned of, or refused if `strict`.
    Errors: OSError; ConfigError; CheckpointError (missing, mis-shaped, malformed, with
    `check_finite` also NaN or infinity); MemoryError, before anything is allocated, when the
    weights need more than `max_bytes` (by default 90 % of this machine's memory).
    """
    path = locate(folder)
    config = read_config(path)
    stored = canonical_names(read_folder(path, mmap), config)
    check_names_and_shapes(stored, config, path, strict)
    _check_memory(stored, dtype, max_bytes, path)
    if check_finite:
        _check_finite(stored, path)
    arrays = {name: _as_dtype(name, tensor, dtype) for name, tensor in stored.items()}
    return config, group_by_layer(arrays, config)


def load_tokenizer(name: str | os.PathLike[str] = "fairytales") -> Tokenizer:
    """The tokenizer of a checkpoint; names as in `load`.

    Errors: OSError; TokenizerError for a malformed file.
    """
    return open_tokenizer(locate(name))


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: a path, or the name of a bundled one.

    Errors: FileNotFoundError says what was looked for.
    """
    path = Path(name)
    if not path.exists() and (BUNDLED / path.name).is_dir() and path.name == str(name):
        return BUNDLED / path.name
    if not path.exists():
        raise FileNotFoundError(2, "no such checkpoint folder (nor a bundled model)", str(name))
    if not path.is_dir():
        raise NotADirectoryError(20, "a checkpoint is a folder", str(name))
    return path


def read_folder(folder: Path, mmap: bool = True) -> dict[str, Stored]:
    """The tensors of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists() or not index.exists():
        if not single.exists():
            raise FileNotFoundError(2, _what_is_there(folder), str(single))
        return read_tensors(single, mmap)
    return _read_shards(folder, index, mmap)


def _what_is_there(folder: Path) -> str:
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]
    if pickles:
        return f"no safetensors here, but {pickles[0].name!r}: convert it first"
    return "no model.safetensors and no model.safetensors.index.json"


def _read_shards(folder: Path, index: Path, mmap: bool) -> dict[str, Stored]:
    places = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{str(index)!r} has no weight_map", index)
    for name, file in places.items():
        if not is_bare_file_name(file):
            raise CheckpointError(
                f"{str(index)!r}: tensor {name!r} is placed in {file!r}, expected a file name",
                index,
                name,
            )
    tensors: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        shard = read_tensors(folder / file, mmap)
        twice = tensors.keys() & shard.keys()
        if twice:
            raise CheckpointError(f"{file!r}: tensor {min(twice)!r} is in another shard too", index)
        tensors |= shard
    lost = places.keys() - tensors.keys()
    if lost:
        raise CheckpointError(f"{str(index)!r}: no shard holds {_listed(lost)}", index, min(lost))
    return tensors


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
    for name in shapes.keys() & stored.keys():
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


def _check_memory(
    stored: Mapping[str, Stored], dtype: Any, max_bytes: int | None, path: Path
) -> None:
    """Errors: MemoryError with the estimate, if the widened weights would not fit."""
    limit = physical_memory() * 9 // 10 if max_bytes is None else max_bytes
    needed = sum(resident_bytes(tensor, dtype) for tensor in stored.values())
    if limit and needed > limit:
        raise MemoryError(
            f"{str(path)!r} needs about {needed / 1e9:.1f} GB as {np.dtype(dtype)}"
            if dtype != "bfloat16"
            else f"{str(path)!r} needs about {needed / 1e9:.1f} GB"
        )


def physical_memory() -> int:
    """Bytes of memory of this machine, or 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def resident_bytes(tensor: Stored, dtype: Any) -> int:
    """Bytes that loading this tensor allocates: none when it stays in the file."""
    stays = _rests_as_bf16(tensor, dtype) or tensor.array.dtype == compute_dtype(dtype)
    return 0 if stays else tensor.array.size * compute_dtype(dtype).itemsize


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


def _as_dtype(name: str, tensor: Stored, dtype: Any) -> np.ndarray:
    """The array that the model computes with; matrices may rest as bfloat16 bits."""
    if tensor.dtype[0] not in "FB" or tensor.dtype == "BOOL":
        raise CheckpointError(f"tensor {name!r} has the dtype {tensor.dtype}, expected numbers")
    if _rests_as_bf16(tensor, dtype):
        return tensor.array if tensor.dtype == "BF16" else to_bf16(tensor.widened())
    return tensor.widened().astype(compute_dtype(dtype), copy=False)


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
