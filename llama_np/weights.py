"""Safetensors files: a bounded reader over a read-only memory map, and a streaming writer.

Both are our own. The library's reader copies every tensor and does not know bfloat16 in NumPy;
its writer wants all tensors in memory at once, and version 0.8 silently writes wrong bytes for
strided arrays. The tests hold both against the library.
"""

from __future__ import annotations

import json
import math
import mmap as memory
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np

from llama_np.errors import CheckpointError
from llama_np.files import PathLike, atomic_file, guess_format, open_regular
from llama_np.precision import FLOAT8_E4M3, FLOAT8_E5M2, widen_bf16

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
MAX_TENSORS = 100_000
MAX_ELEMENTS = 1 << 60  # the product of the dimensions that are not zero: NumPy's limit is near
DATA_ALIGNMENT = 64  # the writer pads its header so that tensors start at whole cache lines
COPY_BYTES = 1 << 24  # the writer copies this much of a tensor at a time

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
FLOATS = frozenset(["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
KNOWN_ELSEWHERE = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")
RESTING_AS_BITS = ("BF16", "F8_E4M3", "F8_E5M2")  # formats that rest in integer arrays


class Writable(Protocol):
    """Anything that takes bytes, one piece after another."""

    def write(self, content: Any, /) -> object: ...


class Stored:
    """A tensor as it rests in a file: its safetensors dtype name, and its raw elements.

    Instead of an array there may be a function that makes it each time that it is asked for
    (the tensor must be read, dequantized or permuted); then `shape` is given too. `resting` names
    the format in the file, where that is another one: "Q8_0" for numbers that become "F32".
    """

    __slots__ = ("_array", "_read", "dtype", "resting", "shape")

    def __init__(
        self,
        dtype: str,
        array: np.ndarray | Callable[[], np.ndarray],
        shape: tuple[int, ...] | None = None,
        resting: str | None = None,
    ) -> None:
        self.dtype = dtype
        self.resting = dtype if resting is None else resting
        self._array = array if isinstance(array, np.ndarray) else None
        self._read = None if isinstance(array, np.ndarray) else array
        self.shape = array.shape if isinstance(array, np.ndarray) else tuple(shape or ())

    @property
    def array(self) -> np.ndarray:
        """The raw elements, in the resting dtype; bfloat16 and float8 are bits."""
        if self._read is None:
            assert self._array is not None
            return self._array
        return self._read()

    @property
    def is_mapped(self) -> bool:
        """Whether the array is there already, as a view that takes no memory of its own."""
        return self._read is None

    @property
    def size(self) -> int:
        """How many elements there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the elements take at rest."""
        return self.size * np.dtype(DTYPES[self.dtype]).itemsize

    def widened(self) -> np.ndarray:
        """The numbers in a dtype that NumPy computes with; exact, and no copy if it can be."""
        if self.dtype == "BF16":
            return widen_bf16(self.array)
        if self.dtype in ("F8_E4M3", "F8_E5M2"):
            table = FLOAT8_E4M3 if self.dtype == "F8_E4M3" else FLOAT8_E5M2
            return table[self.array]
        return self.array

    def apply(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, ...] | None = None,
    ) -> Stored:
        """The tensor that `function` makes of this one, when it is asked for."""
        shape = self.shape if shape is None else shape
        return Stored(self.dtype, lambda: function(self.array), shape, self.resting)

    def __repr__(self) -> str:
        return f"Stored({self.dtype!r}, shape={self.shape})"


@dataclass(frozen=True)
class Source:
    """A checkpoint in any format, under Hugging Face's names.

    `config`: the content of its config.json. `files`: makes the tokenizer's and the other small
    files, by name; called only when they are wanted.
    """

    config: dict[str, Any]
    tensors: dict[str, Stored]
    files: Callable[[], dict[str, bytes]]


@dataclass(frozen=True)
class Entry:
    """One line of a safetensors header: dtype, shape and the byte range within the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def map_bytes(file: BinaryIO) -> np.ndarray:
    """The content of an open file as a read-only array of bytes that takes no memory."""
    if not os.fstat(file.fileno()).st_size:
        return np.zeros(0, np.uint8)
    mapping = memory.mmap(file.fileno(), 0, access=memory.ACCESS_READ)
    return np.frombuffer(mapping, np.uint8)


def forget_pages(view: np.ndarray) -> None:
    """Give back the memory in which the system shows this part of a mapped file.

    Reading it again is possible, and slower. Only Linux needs this; elsewhere nothing happens.
    """
    owner: Any = view
    first = 0
    while isinstance(owner, np.ndarray):
        first, owner = owner.ctypes.data, owner.base
    mapping = owner.obj if isinstance(owner, memoryview) else None
    if sys.platform == "linux" and isinstance(mapping, memory.mmap) and view.size:
        begin, end = np.lib.array_utils.byte_bounds(view)
        start = (begin - first) // memory.PAGESIZE * memory.PAGESIZE
        mapping.madvise(memory.MADV_DONTNEED, start, end - first - start)


def copy_of_view(view: np.ndarray) -> np.ndarray:
    """A copy in memory of a view of a mapped file, whose pages are given back."""
    copy = np.array(view)
    forget_pages(view)
    return copy


def read_tensors(path: PathLike, mmap: bool = True) -> dict[str, Stored]:
    """All tensors of a safetensors file, without copying them.

    With `mmap` they are read-only views of the mapped file; if another program truncates the
    file meanwhile, the operating system ends this one (SIGBUS). With `mmap=False` each tensor is
    read into memory when its `.array` is asked for.
    Errors: OSError; CheckpointError for anything malformed; NotImplementedError for a dtype
    that is known and not supported.
    """
    with open_regular(path) as file:
        entries, _ = _read_header(file, path)
        data = map_bytes(file) if mmap else None
    if data is None:
        return {name: _unmapped(path, name, entry) for name, entry in entries.items()}
    return {name: stored_view(data, entry) for name, entry in entries.items()}


def stored_view(data: np.ndarray, entry: Entry) -> Stored:
    """The tensor at a place of a mapped file; a copy, later, if that place is misaligned."""
    dtype = np.dtype(DTYPES[entry.dtype])
    raw = data[entry.start : entry.stop]
    if raw.ctypes.data % dtype.alignment == 0:
        return Stored(entry.dtype, raw.view(dtype).reshape(entry.shape))

    def aligned() -> np.ndarray:
        copy = raw.copy()
        copy.flags.writeable = False
        return copy.view(dtype).reshape(entry.shape)

    return Stored(entry.dtype, aligned, entry.shape)


def _unmapped(path: PathLike, name: str, entry: Entry) -> Stored:
    """A tensor that is read from the file when it is asked for."""

    def read() -> np.ndarray:
        with open_regular(path) as file:
            file.seek(entry.start)
            raw = np.fromfile(file, np.uint8, entry.stop - entry.start)
        if raw.size < entry.stop - entry.start:
            raise CheckpointError(f"{str(path)!r} became shorter while it was read", path, name)
        raw.flags.writeable = False
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)

    return Stored(entry.dtype, read, entry.shape)


def read_header(path: PathLike) -> tuple[dict[str, Entry], dict[str, str]]:
    """The checked table of contents of a safetensors file, and its metadata.

    Errors: as `read_tensors`.
    """
    with open_regular(path) as file:
        return _read_header(file, path)


def _read_header(file: BinaryIO, path: PathLike) -> tuple[dict[str, Entry], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        guess = guess_format(start)
        raise CheckpointError(f"{str(path)!r} is no safetensors file ({guess})", path)
    header = _parse_header(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{str(path)!r}: __metadata__ is not a map of strings", path)
    entries = {name: _entry(path, name, line, 8 + length) for name, line in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries, metadata


def _parse_header(text: bytes, path: PathLike) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{str(path)!r}: the header does not begin with '{{'", path)
    # Counted before parsing: objects take a hundred times the memory of their two characters.
    if text.count(b"{") > MAX_TENSORS + 1000 or text.count(b"[") > 2 * MAX_TENSORS + 1000:
        raise CheckpointError(f"{str(path)!r}: more than {MAX_TENSORS} tensors", path)
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_number,
            parse_int=_natural,
        )
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{str(path)!r}: malformed header: {problem}", path) from problem
    if not isinstance(header, dict) or len(header) > MAX_TENSORS + 1:
        raise CheckpointError(f"{str(path)!r}: more than {MAX_TENSORS} tensors", path)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    for key, value in pairs:  # JSON can spell half a character; UTF-8 cannot
        key.encode("utf-8")
        if isinstance(value, str):
            value.encode("utf-8")
    return content


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"{text[:30]} is no size")
    return int(text)


def _entry(path: PathLike, name: str, line: Any, data_start: int) -> Entry:
    """One checked header line; offsets become positions within the file."""

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{str(path)!r}: tensor {name!r} {what}", path, name)

    if not isinstance(line, dict):
        raise wrong("is not described by an object")
    dtype: Any = line.get("dtype")
    shape: Any = line.get("shape")
    offsets: Any = line.get("data_offsets")
    if isinstance(dtype, str) and dtype in KNOWN_ELSEWHERE:
        raise NotImplementedError(f"{str(path)!r}: tensor {name!r} has the dtype {dtype}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"has the unknown dtype {dtype!r:.50}")
    if not _is_whole_list(shape) or len(shape) > MAX_DIMENSIONS:
        raise wrong(f"has the shape {shape!r:.200}, expected at most {MAX_DIMENSIONS} sizes")
    if math.prod(n for n in shape if n) > MAX_ELEMENTS:
        raise wrong(f"has the shape {shape}, which no memory could hold")
    if not _is_whole_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"has the data_offsets {offsets!r:.200}, expected [begin, end]")
    needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != needed:
        found = offsets[1] - offsets[0]
        raise wrong(f"has {found} bytes, but {dtype} of shape {shape} needs {needed}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_whole_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_layout(path: PathLike, entries: Mapping[str, Entry], start: int, size: int) -> None:
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
    path: PathLike,
    tensors: Mapping[str, np.ndarray | Stored],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Write a safetensors file, all of it or nothing, one tensor at a time.

    A `Stored` keeps its own dtype (bfloat16 bits stay bfloat16); an array keeps NumPy's, and
    may be strided or of the other byte order. `progress` is called after every tensor.
    Errors: FileExistsError; OSError as the operating system says; ValueError for the name
    "__metadata__"; TypeError for a dtype that the format lacks.
    """
    stored = {name: as_stored(name, tensor) for name, tensor in tensors.items()}
    widest_first = sorted(stored, key=lambda name: -np.dtype(DTYPES[stored[name].dtype]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    place = 0
    for name in widest_first:  # so that every tensor stays aligned
        offsets = [place, place := place + stored[name].nbytes]
        dtype, shape = stored[name].dtype, list(stored[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    with atomic_file(path, overwrite) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in widest_first:
            write_array(file, stored[name].array, DTYPES[stored[name].dtype])
            progress()


def as_stored(name: str, tensor: np.ndarray | Stored) -> Stored:
    """The tensor under its safetensors dtype. Errors: as `save_tensors`."""
    if name == "__metadata__":
        raise ValueError("a tensor cannot be named '__metadata__'")
    if isinstance(tensor, Stored):
        return tensor
    array = np.asarray(tensor)
    names = {np.dtype(code): dtype for dtype, code in DTYPES.items() if dtype in NUMPY_DTYPES}
    dtype = names.get(array.dtype.newbyteorder("<"))
    if dtype is None:
        raise TypeError(f"tensor {name!r} has the dtype {array.dtype}, which cannot be stored")
    return Stored(dtype, array)


NUMPY_DTYPES = [dtype for dtype in DTYPES if dtype not in RESTING_AS_BITS]


def write_array(file: Writable, array: np.ndarray, dtype: str) -> None:
    """Append the elements in row order and the given byte order, whatever their layout.

    Piece by piece, so that a mapped array of any size is written with little memory.
    """
    if array.dtype.kind != np.dtype(dtype).kind or array.dtype.itemsize != np.dtype(dtype).itemsize:
        raise TypeError(f"an array of {array.dtype} cannot be stored as {dtype}")
    rows = array if array.ndim else array[None]
    if not rows.size:
        return
    step = max(1, COPY_BYTES // max(1, rows.nbytes // len(rows)))
    for first in range(0, len(rows), step):
        piece = rows[first : first + step].astype(dtype, order="C", copy=False)
        file.write(piece.reshape(-1).view(np.uint8).data)


def halves_from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the output rows of q or k from Meta's order to Hugging Face's: a copy.

    Meta rotates neighbours (0, 1), (2, 3), ...; Hugging Face rotates rows half a head apart.
    Biases (one axis) are reordered the same way.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def pairs_from_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `halves_from_pairs`."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def reorder_heads(
    name: str,
    tensor: Stored,
    query_heads: int,
    key_heads: int,
    order: Callable[[np.ndarray, int], np.ndarray] = halves_from_pairs,
) -> Stored:
    """The tensor with its rows in the other order if it belongs to q_proj or k_proj.

    Errors: CheckpointError if its rows are no pairs for that many heads.
    """
    heads = {"q_proj": query_heads, "k_proj": key_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    rows = tensor.shape[0] if tensor.shape else 0
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{name!r}: {rows} rows are no pairs for {heads!r} heads", None, name)

    def reordered(array: np.ndarray) -> np.ndarray:
        result = order(array, heads)
        forget_pages(array)
        return result

    return tensor.apply(reordered)
