"""GGUF files: a reader that believes no number it has not checked, and the common dequantizers.

The whole file is mapped; metadata is walked once with every length bounded by the file's own
size. F32, F16, BF16, Q8_0, Q4_0, Q4_K and Q6_K are decoded here; the rarer types through the
package `gguf`. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_np.errors import CheckpointError, require
from llama_np.files import PathLike, guess_format, open_regular
from llama_np.weights import Entry, Stored, forget_pages, map_bytes, stored_view

MAX_STRING = 16 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 4
MAX_NESTING = 4
MAX_ALIGNMENT = 1 << 16
STEP = 8192  # blocks that are decoded at a time, so that intermediate results stay small

# Metadata types: numbers by their struct code, then the two that have a length.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q"}
SCALARS[12] = "d"
BOOL, STRING, ARRAY = 7, 8, 9

# Tensor types: name, elements in a block, bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
UNDECODABLE = ("Q8_1", "Q8_K")  # llama.cpp's own intermediate results; never in files


@dataclass(frozen=True)
class GGUF:
    """A parsed file: its metadata, and its tensors under their own names."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def parse_gguf(path: PathLike) -> GGUF:
    """The metadata and tensors of any GGUF file, under its own names.

    Quantized tensors are decoded to float32 when they are asked for.
    Errors: OSError; CheckpointError for anything malformed; NotImplementedError for version 1,
    another byte order or a tensor type that nobody decodes; ModuleNotFoundError for a rare type
    without the package gguf.
    """
    with open_regular(path) as file:
        data = map_bytes(file)
    reader = _Reader(data, path)
    tensor_count, key_count = _counts(reader, path)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.string()
        if key in metadata:
            raise reader.wrong(f"the key {key!r} occurs twice")
        metadata[key] = reader.value(reader.number("I"))
    infos = [_tensor_info(reader) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    power_of_two = isinstance(alignment, int) and alignment > 0 and not alignment & (alignment - 1)
    if not power_of_two or not 8 <= alignment <= MAX_ALIGNMENT:
        raise reader.wrong(f"general.alignment is {alignment!r}, expected a power of two from 8")
    start = reader.place + -reader.place % alignment
    return GGUF(metadata, _place(infos, data, start, alignment, path))


def _counts(reader: _Reader, path: PathLike) -> tuple[int, int]:
    """How many tensors and how many keys follow."""
    start = bytes(reader.data[:8])
    if start[:4] != b"GGUF":
        raise CheckpointError(f"{str(path)!r} is no GGUF file ({guess_format(start)})", path)
    reader.place = 4
    version = reader.number("I")
    if version not in (2, 3):
        if version in (1, 1 << 24, 2 << 24, 3 << 24):
            kind = "version 1" if version == 1 else "big-endian"
            raise NotImplementedError(f"{str(path)!r}: {kind} GGUF; versions 2 and 3 are read")
        raise reader.wrong(f"version {version}, expected 2 or 3")
    tensors, keys = reader.number("Q"), reader.number("Q")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise reader.wrong(f"{tensors} tensors and {keys} keys are more than any model has")
    return tensors, keys


class _Reader:
    """A place in the bytes; nothing is read, and no memory taken, beyond their end."""

    def __init__(self, data: np.ndarray, path: PathLike) -> None:
        self.data, self.path, self.place = data, path, 0
        self.view = memoryview(data.data)

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r}: byte {self.place}: {what}", self.path)

    def need(self, count: int) -> int:
        """Step over `count` bytes; returns where they begin."""
        begin = self.place
        if count > len(self.view) - begin:
            raise self.wrong(f"{count} bytes are announced, the file ends after {len(self.view)}")
        self.place = begin + count
        return begin

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.view, self.need(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise self.wrong(f"a string of {length} bytes, expected at most {MAX_STRING}")
        begin = self.need(length)
        try:
            return str(self.view[begin : self.place], "utf-8")
        except UnicodeDecodeError as problem:
            raise self.wrong(f"a string that is not UTF-8: {problem.reason}") from problem

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(depth + 1)
        if kind not in SCALARS:
            raise self.wrong(f"unknown metadata type {kind}")
        value = self.number(SCALARS[kind])
        if kind == BOOL and value > 1:
            raise self.wrong(f"a truth value of {value}")
        return bool(value) if kind == BOOL else value

    def array(self, depth: int) -> Any:
        """A list of strings or lists, or a NumPy array of numbers (a view, whatever its size)."""
        if depth > MAX_NESTING:
            raise self.wrong(f"lists nested more than {MAX_NESTING} deep")
        kind, count = self.number("I"), self.number("Q")
        if kind in SCALARS:
            dtype = np.dtype("<" + SCALARS[kind])
            begin = self.need(count * dtype.itemsize)
            return self.data[begin : self.place].view(dtype)
        if kind not in (STRING, ARRAY):
            raise self.wrong(f"a list of the unknown type {kind}")
        if count * 8 > len(self.view) - self.place:  # every string or list takes 8 bytes or more
            raise self.wrong(f"{count} strings are announced, the file is too short")
        return [self.value(kind, depth) for _ in range(count)]


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _tensor_info(reader: _Reader) -> _Info:
    name, rank = reader.string(), reader.number("I")
    if not 0 <= rank <= MAX_DIMENSIONS:
        raise reader.wrong(f"tensor {name!r} has {rank} dimensions")
    sizes = [reader.number("Q") for _ in range(rank)]
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in TYPES:
        raise reader.wrong(f"tensor {name!r} has the unknown type {kind}")
    block = TYPES[kind][1]
    if block > 1 and (not sizes or sizes[0] % block):
        raise reader.wrong(f"tensor {name!r}: rows of {sizes[:1]} do not fill blocks of {block}")
    return _Info(name, tuple(reversed(sizes)), kind, offset)  # GGUF names the last axis first


def _place(
    infos: list[_Info], data: np.ndarray, start: int, alignment: int, path: PathLike
) -> dict[str, Stored]:
    """The tensors, which must follow one another without overlap or hole up to the file's end."""

    def wrong(info: _Info, what: str) -> CheckpointError:
        return CheckpointError(f"{str(path)!r}: tensor {info.name!r} {what}", path, info.name)

    tensors: dict[str, Stored] = {}
    expected = stop = start
    for info in sorted(infos, key=lambda info: info.offset):
        _, block, width = TYPES[info.kind]
        count = math.prod(info.shape)
        stop = start + info.offset + count // block * width
        if info.name in tensors:
            raise wrong(info, "occurs twice")
        if math.prod(n for n in info.shape if n) > 1 << 60:
            raise wrong(info, f"has the shape {info.shape}, which no memory could hold")
        if start + info.offset != expected:
            raise wrong(info, f"begins at {start + info.offset}, expected {expected}")
        if stop > data.size:
            raise wrong(info, f"ends at {stop}, but the file has {data.size} bytes: truncated")
        tensors[info.name] = _stored(info, data, expected, stop)
        expected = stop + -stop % alignment
    if infos and data.size > expected:
        raise CheckpointError(f"{str(path)!r} has {data.size - expected} trailing bytes", path)
    return tensors


def _stored(info: _Info, data: np.ndarray, begin: int, stop: int) -> Stored:
    kind, block, width = TYPES[info.kind]
    if block == 1:
        return stored_view(data, Entry(kind, info.shape, begin, stop))
    blocks = data[begin:stop].reshape(-1, width)
    return Stored("F32", lambda: dequantize(kind, blocks).reshape(info.shape), info.shape, kind)


def dequantize(kind: str, blocks: np.ndarray) -> np.ndarray:
    """The float32 numbers of quantized blocks: (blocks, bytes) uint8 -> (blocks, elements).

    Errors: NotImplementedError for a type that nobody decodes; ModuleNotFoundError for one that
    the package gguf decodes, when it is not installed.
    """
    decode = DECODERS[kind] if kind in DECODERS else _borrowed(kind)
    elements = next(block for name, block, _ in TYPES.values() if name == kind)
    numbers = np.empty((len(blocks), elements), np.float32)
    for first in range(0, len(blocks), STEP):
        with np.errstate(over="ignore", invalid="ignore"):  # infinite scales are legal
            numbers[first : first + STEP] = decode(blocks[first : first + STEP])
    forget_pages(blocks)
    return numbers


def _borrowed(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """The decoder of the package gguf."""
    if kind in UNDECODABLE:
        raise NotImplementedError(f"GGUF tensor type {kind} is not implemented")
    gguf = require("gguf", extra="gguf")
    quants = require("gguf.quants", extra="gguf")
    return lambda blocks: quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def _half(blocks: np.ndarray, byte: int) -> np.ndarray:
    """The float16 at a byte of every block, as a float32 column."""
    raw = np.ascontiguousarray(blocks[:, byte : byte + 2])
    return raw.view("<f2").astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """scale (f16), 32 int8."""
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    """scale (f16), 16 bytes: low nibbles are elements 0-15, high ones 16-31, all offset by 8."""
    packed = blocks[:, 2:]
    nibbles = np.concatenate([packed & 15, packed >> 4], axis=1)
    return _half(blocks, 0) * (nibbles.astype(np.float32) - np.float32(8))


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """scale d and minimum m (f16), 12 bytes of eight 6-bit scales and minima, 128 bytes of nibbles.

    Each 32 bytes of nibbles are two sub-blocks of 32: low nibbles, then high nibbles.
    """
    scales, minima = _scales_and_minima(blocks[:, 4:16])  # (n, 8) each
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    nibbles = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    step = (_half(blocks, 0) * scales)[:, :, None]
    low = (_half(blocks, 2) * minima)[:, :, None]
    return (step * nibbles.astype(np.float32) - low).reshape(-1, 256)


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and minima from 12 bytes: (n, 12) -> (n, 8), (n, 8).

    The first four of each rest in the low bits of bytes 0-3 and 4-7; the last four have their
    low halves in the nibbles of bytes 8-11, and their high bits on top of bytes 0-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, scale d (f16).

    Two halves of 128 elements each; sub-blocks of 16 share a scale; numbers are offset by 32.
    """
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    codes = low | (high >> shifts & 3) << 4
    numbers = codes.astype(np.float32).reshape(-1, 16, 16) - np.float32(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return ((_half(blocks, 208) * scales)[:, :, None] * numbers).reshape(-1, 256)


DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
