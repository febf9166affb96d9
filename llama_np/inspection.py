"""What a checkpoint is made of: sizes, dtypes, and where each configuration value came from."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from llama_np.cache import KVCache
from llama_np.checkpoint import (
    canonical_names,
    check_names_and_shapes,
    compute_dtype,
    is_worth_mapping,
    locate,
    read_checkpoint,
    resident_bytes,
)
from llama_np.config import Config, config_to_dict

PARTS = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "mlp": "MLP",
    "layernorm": "norms",
    "norm": "norms",
    "lm_head": "LM head",
    "score": "classification head",
}


def describe(model: str | os.PathLike[str], dtype: Any = np.float32) -> dict[str, Any]:
    """Everything that `llama-np inspect` says, as plain data; no weight is read.

    Bytes resident are what loading with `dtype` allocates; weights that stay in the mapped file
    take none.
    Errors: as `checkpoint.load`.
    """
    folder = locate(model)
    config, in_file = read_checkpoint(folder)
    stored = canonical_names(in_file, config)
    check_names_and_shapes(stored, config, folder)
    parts: dict[str, int] = {}
    mapped = is_worth_mapping(stored)
    unique = {id(tensor): (name, tensor) for name, tensor in reversed(stored.items())}
    for name, tensor in unique.values():
        part = next((label for key, label in PARTS.items() if key in name), "other")
        parts[part] = parts.get(part, 0) + tensor.size
    return {
        "model": str(folder),
        "architecture": architecture(config),
        "parameters": sum(parts.values()),
        "parameters_per_part": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "tied_embedding": config.tie_word_embeddings,
        "bytes_on_disk": (
            sum(t.nbytes for t in in_file.values()) if folder.is_dir() else folder.stat().st_size
        ),
        "bytes_resident": sum(resident_bytes(t, dtype, mapped) for _, t in unique.values()),
        "bytes_per_cached_token": cache_bytes_per_token(config, dtype),
        "dtypes": sorted({tensor.resting for tensor in stored.values()}),
        "shapes": {name: list(tensor.shape) for name, tensor in stored.items()},
        "config": config_to_dict(config),
        "config_sources": dict(config.sources),
        "files": sorted(f.name for f in (folder.iterdir() if folder.is_dir() else [folder])),
    }


def architecture(config: Config) -> str:
    """The model in one line, in axis letters."""
    return (
        f"{config.num_hidden_layers} layers, D={config.hidden_size} "
        f"F={config.intermediate_size} V={config.vocab_size} N={config.num_attention_heads} "
        f"K={config.num_key_value_heads} H={config.head_dim}"
    )


def cache_bytes_per_token(config: Config, dtype: Any) -> int:
    """How much one more token of context costs in the key/value cache, per row."""
    return KVCache(config, batch=1, capacity=1, dtype=compute_dtype(dtype)).nbytes


def table(summary: dict[str, Any]) -> str:
    """The description as text for people."""
    total = summary["parameters"]
    lines = [f"{summary['model']}", f"  {summary['architecture']}", "", f"{total:>15,}  parameters"]
    for part, count in summary["parameters_per_part"].items():
        lines.append(f"{count:>15,}  {part} ({count / total:.0%})")
    lines += ["", f"{_size(summary['bytes_on_disk']):>15}  on disk ({_listed(summary['dtypes'])})"]
    lines += [f"{_size(summary['bytes_resident']):>15}  allocated by loading (the rest is mapped)"]
    lines += [f"{_size(summary['bytes_per_cached_token']):>15}  per token of context, per row", ""]
    width = max(map(len, summary["config"]))
    for name, value in summary["config"].items():
        source = summary["config_sources"].get(name, "")
        lines.append(f"  {name:<{width}}  {value!s:<28} {source}".rstrip())
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
