"""A prefix that is computed once: the key/value cache as a file.

A prompt of a thousand tokens then starts in milliseconds. The file belongs to one model; with
another one it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_np.cache import KVCache
from llama_np.config import Config, config_to_dict
from llama_np.errors import CheckpointError
from llama_np.generate import activation_dtype
from llama_np.model import ModelWeights, check_tokens
from llama_np.weights import read_header, read_tensors, save_tensors

FORMAT = "llama_np prompt cache 1"
SAMPLED = 64  # numbers at both ends of every tensor that make up the fingerprint


def fingerprint(weights: ModelWeights, config: Config) -> str:
    """A hash that tells models apart: the configuration and the ends of every weight tensor.

    Reading all weights would take longer than what the cache saves.
    """
    digest = hashlib.sha256(json.dumps(config_to_dict(config), sort_keys=True).encode())
    for name, array in sorted(_flat(weights)):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        ends = array.reshape(-1)[:SAMPLED], array.reshape(-1)[-SAMPLED:]
        digest.update(b"".join(part.tobytes() for part in ends))
    return digest.hexdigest()


def _flat(weights: ModelWeights) -> list[tuple[str, np.ndarray]]:
    flat: list[tuple[str, np.ndarray]] = []
    for name, value in weights.items():
        inside = value.items() if isinstance(value, dict) else [("", value)]
        flat += [(f"{name}.{key}", array) for key, array in inside]
    return flat


def save_cache(
    path: str | os.PathLike[str],
    cache: KVCache,
    ids: Sequence[int],
    weights: ModelWeights,
    config: Config,
    overwrite: bool = False,
) -> None:
    """Write the cache of one row and the token ids that it holds.

    Errors: ValueError if the cache has several rows or another length; as `save_tensors`.
    """
    if cache.batch != 1 or cache.length != len(ids):
        raise ValueError(
            f"the cache holds {cache.batch} rows of {cache.length} tokens, expected 1 of {len(ids)}"
        )
    tensors = {}
    for layer, (keys, values) in enumerate(cache):
        tensors[f"keys.{layer}"], tensors[f"values.{layer}"] = keys, values
    metadata = {
        "format": FORMAT,
        "model": fingerprint(weights, config),
        "token_ids": json.dumps([int(i) for i in ids]),
    }
    save_tensors(path, tensors, metadata, overwrite)


def load_cache(
    path: str | os.PathLike[str], weights: ModelWeights, config: Config
) -> tuple[KVCache, list[int]]:
    """Read a cache and the token ids that it holds.

    Errors: OSError; CheckpointError if the file is malformed or belongs to another model.
    """
    _, metadata = read_header(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{str(path)!r} is no prompt cache of llama_np", path)
    if metadata.get("model") != fingerprint(weights, config):
        raise CheckpointError(f"{str(path)!r} belongs to another model", path)
    ids = _token_ids(metadata.get("token_ids", ""), path, config)
    stored = read_tensors(path)
    shape = (1, config.num_key_value_heads, len(ids), config.head_dim)
    pairs = []
    for layer in range(config.num_hidden_layers):
        pair = stored.get(f"keys.{layer}"), stored.get(f"values.{layer}")
        for tensor in pair:
            dtype = None if tensor is None else tensor.array.dtype
            if tensor is None or tensor.shape != shape or dtype != activation_dtype(weights):
                raise CheckpointError(f"{str(path)!r}: layer {layer} does not fit the model", path)
        pairs.append(tuple(tensor.array for tensor in pair if tensor is not None))
    return KVCache.from_pairs(config, pairs), ids  # type: ignore[arg-type]


def _token_ids(text: str, path: Any, config: Config) -> list[int]:
    try:
        ids = json.loads(text)
        return [int(i) for i in check_tokens(np.array([ids]), config.vocab_size)[0]]
    except (ValueError, TypeError, IndexError, RecursionError) as problem:
        raise CheckpointError(f"{str(path)!r}: malformed token_ids: {problem}", path) from problem


def keep_common_prefix(cache: KVCache, cached_ids: Sequence[int], ids: Sequence[int]) -> int:
    """Crop a cache to what it shares with a prompt; returns how many tokens that is.

    At least the prompt's last token is left to be computed, as its logits are wanted.
    """
    pairs = zip(cached_ids, ids[:-1], strict=False)
    differing = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
    common = min(len(cached_ids), len(ids) - 1) if differing is None else differing
    cache.crop(common)
    return common
