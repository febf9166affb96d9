"""The files of llama2.c: model.bin (legacy, version 1, version 2) and tokenizer.bin.

All formats are a header of small integers and then nothing but numbers, layer after layer, in
an order that the code of each version fixes. Query and key rows are in Meta's order (pairs that
rotate together are neighbours); Hugging Face's order puts them half a head apart.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_np.errors import CheckpointError, TokenizerError
from llama_np.files import PathLike, atomic_file, guess_format, open_regular, read_bounded
from llama_np.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, Piece, build_model
from llama_np.weights import (
    DTYPES,
    Entry,
    Source,
    Stored,
    forget_pages,
    map_bytes,
    pairs_from_halves,
    reorder_heads,
    stored_view,
    write_array,
)

MAGIC = 0x616B3432  # "ak42"
HEADER_BYTES = 256  # of versions 1 and 2
MAX_TOKENIZER_BYTES = 64 << 20
MAX_SIZES = (1 << 20, 1 << 20, 1024, 1 << 20, 1 << 20, 1 << 24, 1 << 30)
# What the format does not say: run.c has these numbers in its code.
EPS, THETA = 1e-5, 10000.0


@dataclass(frozen=True)
class Header:
    """The sizes of a llama2.c model, under the names of its export script."""

    version: int  # 0 is the legacy format
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int
    shared_classifier: bool
    group_size: int = 0  # of version 2: int8 numbers that share one scale

    @property
    def start(self) -> int:
        """Where the numbers begin."""
        return HEADER_BYTES if self.version else 28

    @property
    def head_size(self) -> int:
        """The width of one head."""
        return self.dim // self.n_heads

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each kind of tensor, by Hugging Face's name within a layer or the model."""
        keys = self.n_kv_heads * self.head_size
        return {
            "model.embed_tokens.weight": (self.vocab_size, self.dim),
            "input_layernorm.weight": (self.dim,),
            "self_attn.q_proj.weight": (self.dim, self.dim),
            "self_attn.k_proj.weight": (keys, self.dim),
            "self_attn.v_proj.weight": (keys, self.dim),
            "self_attn.o_proj.weight": (self.dim, self.dim),
            "post_attention_layernorm.weight": (self.dim,),
            "mlp.gate_proj.weight": (self.hidden_dim, self.dim),
            "mlp.down_proj.weight": (self.dim, self.hidden_dim),
            "mlp.up_proj.weight": (self.hidden_dim, self.dim),
            "model.norm.weight": (self.dim,),
            "lm_head.weight": (self.vocab_size, self.dim),
        }


_MATRICES = [
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
]
_MLP = ["mlp.gate_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight"]  # w1, w2, w3
_NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
_ORDER = {
    0: [
        "model.embed_tokens.weight",
        _NORMS[0],
        *_MATRICES,
        _NORMS[1],
        *_MLP,
        "model.norm.weight",
        "tables",
    ],
    1: [*_NORMS, "model.norm.weight", "model.embed_tokens.weight", *_MATRICES, *_MLP],
}


def layout(header: Header) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the file."""
    for kind in _ORDER[min(header.version, 1)]:
        if kind == "tables":  # cosines and sines, which run.c no longer reads
            for name in ("cos", "sin"):
                yield f"tables.{name}", (header.max_seq_len, header.head_size // 2)
        elif kind.startswith("model."):
            yield kind, header.shapes[kind]
        else:
            for layer in range(header.n_layers):
                yield f"model.layers.{layer}.{kind}", header.shapes[kind]
    if not header.shared_classifier:
        yield "lm_head.weight", header.shapes["lm_head.weight"]


def read_llama2c(path: PathLike) -> Source:
    """A llama2.c model.bin as a checkpoint under Hugging Face's names.

    The tokenizer is a tokenizer.bin, tok<vocab_size>.bin or tokenizer.model in the same folder.
    Errors: OSError; CheckpointError for anything malformed; NotImplementedError for a version
    that is not known.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = read_header(file, path)
        data = map_bytes(file)
    tensors: dict[str, Stored] = {}
    place = header.start
    for name, shape in layout(header):
        tensor, place = _tensor(data, path, name, shape, place, header)
        if not name.startswith("tables."):
            tensors[name] = reorder_heads(name, tensor, header.n_heads, header.n_kv_heads)
    if place != size:
        raise CheckpointError(
            f"{str(path)!r} has {size} bytes, the sizes in its header need {place}: truncated, or "
            "no llama2.c model",
            path,
        )
    return Source(_config(header), tensors, lambda: tokenizer_files(Path(path), header.vocab_size))


def read_header(file: BinaryIO, path: PathLike) -> Header:
    """The header of any version, checked. Errors: as `read_llama2c`."""
    start = file.read(HEADER_BYTES)
    if len(start) < 28:
        raise CheckpointError(f"{str(path)!r} is no llama2.c model ({guess_format(start)})", path)
    magic, version = struct.unpack_from("<Ii", start)
    if magic != MAGIC:
        dim, hidden, layers, heads, groups, words, length = struct.unpack_from("<7i", start)
        shared = words > 0  # the legacy format spells an own classifier as a minus sign
        header = Header(0, dim, hidden, layers, heads, groups, abs(words), length, shared)
    elif version not in (1, 2):
        raise NotImplementedError(f"{str(path)!r}: version {version} of llama2.c's format")
    elif len(start) < HEADER_BYTES:
        raise CheckpointError(f"{str(path)!r} is truncated within its header", path)
    else:
        dim, hidden, layers, heads, groups, words, length = struct.unpack_from("<7i", start, 8)
        shared, group = struct.unpack_from("<Bi", start, 36)
        if shared > 1:
            raise CheckpointError(f"{str(path)!r}: shared_classifier is {shared}", path)
        header = Header(version, dim, hidden, layers, heads, groups, words, length, bool(shared))
        header = replace(header, group_size=group if version == 2 else 0)
    _check(header, path, start)
    return header


def _check(header: Header, path: PathLike, start: bytes) -> None:
    sizes = [header.dim, header.hidden_dim, header.n_layers, header.n_heads, header.n_kv_heads]
    sizes += [header.vocab_size, header.max_seq_len]
    rules = {
        "sizes within reason": all(1 <= n <= m for n, m in zip(sizes, MAX_SIZES, strict=True)),
        "dim a multiple of 2 * n_heads": header.n_heads and not header.dim % (2 * header.n_heads),
        "n_heads a multiple of n_kv_heads": header.n_kv_heads
        and not header.n_heads % header.n_kv_heads,
    }
    if header.version == 2:
        group = header.group_size
        rules["group_size a divisor of dim and hidden_dim"] = (
            group > 0 and not header.dim % group and not header.hidden_dim % group
        )
    for rule, holds in rules.items():
        if not holds:
            raise CheckpointError(
                f"{str(path)!r} is no llama2.c model ({guess_format(start)}): "
                f"{header}, expected {rule}",
                path,
            )


def _tensor(
    data: np.ndarray, path: PathLike, name: str, shape: tuple[int, ...], place: int, header: Header
) -> tuple[Stored, int]:
    """The tensor at a place of the file, and where the next one begins."""
    count = int(np.prod(shape, dtype=object))
    quantized = header.version == 2 and len(shape) == 2
    scales = count // header.group_size if quantized else 0
    stop = place + (count + 4 * scales if quantized else 4 * count)
    if stop > data.size:
        raise CheckpointError(
            f"{str(path)!r} is truncated: {data.size} bytes, {name!r} would end at {stop}; or it "
            "is no llama2.c model",
            path,
            name,
        )
    if not quantized:
        return stored_view(data, Entry("F32", shape, place, stop)), stop
    numbers = data[place : place + count].view(np.int8)
    scale = stored_view(data, Entry("F32", (scales, 1), place + count, stop))
    size = header.group_size

    def dequantized() -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):  # infinite scales are legal
            array = (numbers.reshape(-1, size) * scale.array).reshape(shape)
        forget_pages(numbers)
        return array

    return Stored("F32", dequantized, shape, "int8"), stop


def _config(header: Header) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": header.vocab_size,
        "hidden_size": header.dim,
        "intermediate_size": header.hidden_dim,
        "num_hidden_layers": header.n_layers,
        "num_attention_heads": header.n_heads,
        "num_key_value_heads": header.n_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": header.max_seq_len,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "tie_word_embeddings": header.shared_classifier,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def write_llama2c(
    path: PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    version: int = 0,
    overwrite: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Write a model.bin from Hugging Face's tensors, one at a time; version 0 is the legacy one.

    `config` holds the values of a config.json. Version 2 quantizes matrices to int8 groups.
    Errors: as `save_tensors`; NotImplementedError for what run.c cannot compute.
    """
    header = _header_of(config, version)
    fields = [header.dim, header.hidden_dim, header.n_layers, header.n_heads, header.n_kv_heads]
    sign = 1 if version or header.shared_classifier else -1
    text = struct.pack("<7i", *fields, sign * header.vocab_size, header.max_seq_len)
    if version:
        extra = bytes([header.shared_classifier])
        extra += struct.pack("<i", header.group_size) if version == 2 else b""
        text = (struct.pack("<Ii", MAGIC, version) + text + extra).ljust(HEADER_BYTES, b"\0")
    with atomic_file(path, overwrite) as file:
        file.write(text)
        for name, shape in layout(header):
            array = (
                _table(name, header) if name.startswith("tables.") else _out(name, tensors, header)
            )
            if array.shape != shape:
                raise CheckpointError(f"{name!r} has shape {array.shape}, expected {shape}")
            if version == 2 and array.ndim == 2:
                _write_quantized(file, array, header.group_size)
            else:
                write_array(file, array, DTYPES["F32"])
            progress()


def _header_of(config: Mapping[str, Any], version: int) -> Header:
    """The sizes, if run.c computes this kind of model."""
    if version not in (0, 1, 2):
        raise ValueError(f"version {version}: llama2.c has 0 (legacy), 1 and 2")
    _refuse_what_run_c_lacks(config)
    group = 64  # as llama2.c's export script: the largest power of two that divides dim
    while config["hidden_size"] % group or config["intermediate_size"] % group:
        group //= 2
    return Header(
        version,
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["vocab_size"],
        config["max_position_embeddings"],
        config["tie_word_embeddings"],
        group if version == 2 else 0,
    )


def _refuse_what_run_c_lacks(config: Mapping[str, Any]) -> None:
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    wanted = {
        "hidden_act": config["hidden_act"] in ("silu", "swish"),
        "rope_theta": config["rope_theta"] == THETA,
        "rms_norm_eps": config["rms_norm_eps"] == EPS,
        "rope_scaling": scaling.get("rope_type") == "default",
        "attention_bias": not config["attention_bias"],
        "mlp_bias": not config["mlp_bias"],
        "head_dim": config["head_dim"] * config["num_attention_heads"] == config["hidden_size"],
    }
    for name, fits in wanted.items():
        if not fits:
            raise NotImplementedError(
                f"llama2.c's run.c cannot compute a model with {name} = {config[name]!r}: it has "
                f"SiLU, rope_theta {THETA:g}, rms_norm_eps {EPS:g}, no rope scaling, no biases "
                "and heads that fill hidden_size in its code"
            )


def _out(name: str, tensors: Mapping[str, Stored], header: Header) -> np.ndarray:
    """A tensor in Meta's order, float32."""
    if name not in tensors:
        raise CheckpointError(f"the checkpoint lacks {name!r}", None, name)
    in_order = reorder_heads(
        name, tensors[name], header.n_heads, header.n_kv_heads, pairs_from_halves
    )
    return Stored(in_order.dtype, in_order.array).widened().astype(np.float32, copy=False)


def _table(name: str, header: Header) -> np.ndarray:
    frequencies = THETA ** (-np.arange(0, header.head_size, 2) / header.head_size)
    angles = np.outer(np.arange(header.max_seq_len), frequencies)
    return (np.cos(angles) if name == "tables.cos" else np.sin(angles)).astype(np.float32)


def _write_quantized(file: BinaryIO, array: np.ndarray, group: int) -> None:
    """int8 numbers, then one float32 scale for each group of them."""
    groups = array.reshape(-1, group)
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
    divisor = np.where(scale == 0, np.float32(1), scale)
    write_array(file, np.round(groups / divisor).astype(np.int8), DTYPES["I8"])
    write_array(file, scale, DTYPES["F32"])


def tokenizer_files(model: Path, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer that lies beside a model.bin, as the files of a Hugging Face folder.

    Errors: FileNotFoundError; TokenizerError.
    """
    for name in ("tokenizer.bin", f"tok{vocab_size}.bin", f"{model.stem}.tokenizer.bin"):
        if (model.parent / name).exists():
            content = read_bounded(model.parent / name, MAX_TOKENIZER_BYTES)
            pieces = parse_tokenizer_bin(content, vocab_size, repr(str(model.parent / name)))
            return {"tokenizer.model": build_model(pieces)}
    beside = model.parent / "tokenizer.model"
    if beside.exists():
        return {"tokenizer.model": read_bounded(beside, MAX_TOKENIZER_BYTES)}
    what = f"no tokenizer.bin, tok{vocab_size}.bin or tokenizer.model beside the model"
    raise FileNotFoundError(errno.ENOENT, what, str(model))


def parse_tokenizer_bin(content: bytes, vocab_size: int, where: str) -> list[Piece]:
    """The vocabulary of a tokenizer.bin: for each piece a score, a length, and its UTF-8 bytes.

    Errors: TokenizerError.
    """
    pieces: list[Piece] = []
    place = 4  # the length of the longest piece comes first; nothing here needs it
    for index in range(vocab_size):
        if place + 8 > len(content):
            raise TokenizerError(f"{where} ends after {index} of {vocab_size} pieces")
        score, length = struct.unpack_from("<fi", content, place)
        place += 8
        if not 0 <= length <= len(content) - place:
            raise TokenizerError(f"{where}: piece {index} claims {length} bytes")
        try:
            text = content[place : place + length].decode("utf-8")
        except UnicodeDecodeError as problem:
            raise TokenizerError(f"{where}: piece {index} is not UTF-8") from problem
        place += length
        pieces.append(_piece(index, text, score))
    if place != len(content):
        raise TokenizerError(f"{where} holds more than the {vocab_size} pieces of the model")
    return pieces


def _piece(index: int, text: str, score: float) -> Piece:
    """llama2.c writes spaces for SentencePiece's marks, and line breaks around <s> and </s>."""
    if index < 3:
        return Piece(("<unk>", "<s>", "</s>")[index], 0.0, CONTROL if index else UNKNOWN)
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return Piece(text, score, BYTE)
    return Piece(text.replace(" ", "\u2581"), score, NORMAL)


def tokenizer_bin(pieces: list[Piece]) -> bytes:
    """The content of the file tokenizer.bin of a vocabulary."""
    texts = [piece.text.replace("\u2581", " ").encode("utf-8") for piece in pieces]
    texts[1:3] = [b"\n<s>\n", b"\n</s>\n"]
    entries = (
        struct.pack("<fi", piece.score, len(text)) + text
        for piece, text in zip(pieces, texts, strict=True)
    )
    return struct.pack("<i", max(map(len, texts))) + b"".join(entries)
