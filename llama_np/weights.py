"""Safetensors files: a bounded reader over a read-only memory map, and a safe writer.

The reader is our own because the library copies every tensor and does not know bfloat16 in
NumPy. The writer is the library's, behind one function that makes arrays contiguous first:
safetensors 0.8 silently writes wrong bytes for strided arrays.
"""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.errors import CheckpointError
from llama_np.precision import FLOAT8_E4M3, FLOAT8_E5M2, widen_bf16

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
MAX_TENSORS = 100_000

# Explicit byte order, so that a big-endian machine reads the same numbers.
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
KNOWN_ELSEWHERE = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")


@dataclass(frozen=True)
class Stored:
    """A tensor as it rests in a file: its safetensors dtype name, and its raw elements."""

    dtype: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.array.shape

    def widened(self) -> np.ndarray:
        """The numbers in a dtype that NumPy computes with; exact, and no copy if it can be."""
        if self.dtype == "BF16":
            return widen_bf16(self.array)
        if self.dtype in ("F8_E4M3", "F8_E5M2"):
            table = FLOAT8_E4M3 if self.dtype == "F8_E4M3" else FLOAT8_E5M2
            return table[self.array]
        return self.array


@dataclass(frozen=True)
class Entry:
    """One line of a safetensors header: dtype, shape and the byte range within the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_tensors(path: str | os.PathLike[str], mmap: bool = True) -> dict[str, Stored]:
    """All tensors of a safetensors file, without copying them.

    With `mmap` they are read-only views of the mapped file; if another program truncates the
    file meanwhile, the operating system ends this one (SIGBUS). `mmap=False` reads the file
    into memory instead.
    Errors: OSError; CheckpointError for anything malformed; NotImplementedError for a dtype
    that is known and not supported.
    """
    entries, _ = read_header(path)
    size = os.path.getsize(path)
    data = np.memmap(path, np.uint8, "r") if mmap and size else np.fromfile(path, np.uint8)
    if data.size < size:
        raise CheckpointError(f"{str(path)!r} became shorter while it was read", path)
    data = data.view(np.ndarray)  # plain arrays: the memmap class slows every slice down
    data.flags.writeable = False
    return {name: Stored(entry.dtype, _view(data, entry)) for name, entry in entries.items()}


def _view(data: np.ndarray, entry: Entry) -> np.ndarray:
    dtype = np.dtype(DTYPES[entry.dtype])
    raw = data[entry.start : entry.stop]
    if raw.ctypes.data % dtype.alignment:  # a header of odd length; such files are rare
        raw = raw.copy()
        raw.flags.writeable = False
    return raw.view(dtype).reshape(entry.shape)


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The checked table of contents of a safetensors file, and its metadata.

    Errors: as `read_tensors`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{str(path)!r} is no safetensors file{_guess(start)}", path)
        text = file.read(length)
    header = _parse_header(text, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{str(path)!r}: __metadata__ is not a map of strings", path)
    entries = {name: _entry(path, name, line, 8 + length) for name, line in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries, metadata


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file for reading, unless it is a directory, a pipe or a device.

    Errors: FileNotFoundError, IsADirectoryError, PermissionError, CheckpointError.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise CheckpointError(f"{str(path)!r} is not a regular file", path)
    with open(path, "rb") as file:
        yield file


def _guess(start: bytes) -> str:
    """What a file that is no safetensors file might be, from its first bytes."""
    guesses = {
        b"": "it is empty",
        b"version ": "it looks like a git-lfs pointer: run `git lfs pull`",
        b"GGUF": "it looks like a GGUF file",
        b"PK\x03\x04": "it looks like a PyTorch archive: convert it first",
        b"\x80": "it looks like a pickle: convert it first",
        b"<": "it looks like a web page",
    }
    found = [text for magic, text in guesses.items() if magic and start.startswith(magic)]
    if not start:
        found = [guesses[b""]]
    return f" ({found[0]})" if found else " (truncated, or of another format)"


def _parse_header(text: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{str(path)!r}: the header does not begin with '{{'", path)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{str(path)!r}: malformed header: {problem}", path) from problem
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise CheckpointError(f"{str(path)!r}: more than {MAX_TENSORS} tensors", path)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _entry(path: str | os.PathLike[str], name: str, line: Any, data_start: int) -> Entry:
    """One checked header line; offsets become positions within the file."""

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{str(path)!r}: tensor {name!r} {what}", path, name)

    if not isinstance(line, dict):
        raise wrong("is not described by an object")
    dtype: Any = line.get("dtype")
    shape: Any = line.get("shape")
    offsets: Any = line.get("data_offsets")
    if dtype in KNOWN_ELSEWHERE:
        raise NotImplementedError(f"{str(path)!r}: tensor {name!r} has the dtype {dtype}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"has the unknown dtype {dtype!r}")
    if not _is_whole_list(shape) or len(shape) > MAX_DIMENSIONS or any(n >> 62 for n in shape):
        raise wrong(f"has the shape {shape!r}")
    if not _is_whole_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"has the data_offsets {offsets!r}")
    needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != needed or math.prod(n for n in shape if n) >> 60:
        raise wrong(f"has {offsets[1] - offsets[0]} bytes, its shape {shape} needs {needed}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_whole_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_layout(
    path: str | os.PathLike[str], entries: Mapping[str, Entry], start: int, size: int
) -> None:
    """The tensors fill the file without overlap, hole or rest."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != start:
            kind = "overlaps its neighbour" if entry.start < start else "leaves a hole before it"
            raise CheckpointError(f"{str(path)!r}: tensor {name!r} {kind}", path, name)
        start = entry.stop
    if start != size:
        problem = "is truncated" if start > size else "has trailing bytes"
        raise CheckpointError(f"{str(path)!r} {problem}: {size} bytes, expected {start}", path)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray | Stored],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a safetensors file, all of it or nothing.

    A `Stored` keeps its own dtype (bfloat16 bits stay bfloat16); an array keeps NumPy's.
    Errors: FileExistsError; OSError as the operating system says; ValueError for the name
    "__metadata__"; TypeError for a dtype that the format lacks.
    """
    from safetensors import TensorSpec, serialize

    ready = {name: _contiguous(name, tensor) for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=dtype, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, (dtype, array) in ready.items()  # `ready` keeps the arrays alive meanwhile
    }
    content = {"format": "pt", **(metadata or {})}
    write_atomically(path, serialize(specs, metadata=content), overwrite)


def _contiguous(name: str, tensor: np.ndarray | Stored) -> tuple[str, np.ndarray]:
    """What the library's serializer wants: its name of the dtype, and contiguous elements."""
    if name == "__metadata__":
        raise ValueError("a tensor cannot be named '__metadata__'")
    array = tensor.array if isinstance(tensor, Stored) else np.asarray(tensor)
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    names = {np.dtype(code): dtype for dtype, code in DTYPES.items() if dtype[:2] not in _BITS}
    dtype = tensor.dtype if isinstance(tensor, Stored) else names.get(little.dtype)
    if dtype is None:
        raise TypeError(f"tensor {name!r} has the dtype {array.dtype}, which cannot be stored")
    return _LIBRARY_NAMES[dtype], np.ascontiguousarray(little).reshape(array.shape)


_BITS = ("BF", "F8")  # formats that rest in integer arrays
_LIBRARY_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def write_atomically(path: str | os.PathLike[str], content: bytes, overwrite: bool = False) -> None:
    """Write a file so that it appears complete or not at all.

    Errors: FileExistsError when it exists and `overwrite` is false, or is not a regular file;
    PermissionError, OSError as the operating system says, leaving nothing behind.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (overwrite and target.is_file()):
        raise FileExistsError(f"{str(path)!r} exists")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
