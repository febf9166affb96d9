"""PyTorch checkpoints without PyTorch: a closed reader, and a writer, of the zip format.

A pickle is a program for a small stack machine, and Python's own machine may import and call
anything that the program names. This one knows the instructions and the 13 names that a file of
tensors needs, looks the names up in a table, and refuses the rest: nothing is imported and
nothing is called. Tensors are read when they are asked for.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from llama_np.errors import CheckpointError
from llama_np.files import PathLike, atomic_file, guess_format, open_regular
from llama_np.weights import (
    DTYPES,
    Entry,
    Stored,
    forget_pages,
    map_bytes,
    stored_view,
    write_array,
)

MAX_PICKLE = 16 << 20
MAX_ENTRIES = 1 << 17
MAX_OBJECTS = 1 << 20
MAX_DEPTH = 64
MAX_DIMENSIONS = 8

STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
REBUILD, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
ORDERED_DICT = "collections OrderedDict"
GLOBALS = {REBUILD, PARAMETER, ORDERED_DICT, *(f"torch {name}" for name in STORAGES)}
# Known, and not read: float8, and storages without a type.
ELSEWHERE = {"torch._utils _rebuild_tensor_v3", "torch.storage UntypedStorage"}


def read_torch(path: PathLike) -> dict[str, Stored]:
    """All tensors of a .pth or pytorch_model.bin file: a state dict, or one inside a dict.

    Errors: OSError; CheckpointError for anything malformed, or that would have to be executed;
    NotImplementedError for the format before PyTorch 1.6, another byte order, float8.
    """
    with open_regular(path) as file:
        data = map_bytes(file)
    archive = _Archive(data, path)
    content = _Machine(archive.pickle(), path).run()
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds no dictionary of tensors", path)
    tensors = {}
    for name, value in content.items():
        if isinstance(value, _Tensor):
            if not isinstance(name, str):
                raise CheckpointError(f"{str(path)!r}: a tensor is named {name!r:.100}", path)
            tensors[name] = _stored(archive, path, name, value)
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no tensors", path)
    return tensors


@dataclass(frozen=True)
class _Member:
    start: int
    size: int
    crc: int


class _Archive:
    """A zip file whose members are all stored, not compressed."""

    def __init__(self, data: np.ndarray, path: PathLike) -> None:
        self.data, self.path = data, path
        self.checked: set[str] = set()
        start = bytes(data[:4])
        if start != b"PK\x03\x04":
            if start[:1] == b"\x80" or bytes(data[:512]).find(b"ustar") >= 0:
                raise NotImplementedError(
                    f"{str(path)!r} is in the format before PyTorch 1.6; save it again with "
                    "torch.save of a newer version"
                )
            raise self.wrong(f"is no PyTorch archive ({guess_format(start)})")
        self.members = self._directory()
        pickles = [name for name in self.members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise self.wrong(f"holds {len(pickles)} members called data.pkl, expected one")
        self.root = pickles[0].removesuffix("data.pkl")
        order = self.members.get(self.root + "byteorder")
        if order is not None and bytes(self._bytes(order)) != b"little":
            raise NotImplementedError(f"{str(path)!r} is not in little-endian byte order")

    def wrong(self, what: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r} {what}", self.path, tensor)

    def pickle(self) -> bytes:
        member = self.members[self.root + "data.pkl"]
        if member.size > MAX_PICKLE:
            raise self.wrong(f"has a data.pkl of {member.size} bytes, more than {MAX_PICKLE}")
        content = bytes(self._bytes(member))
        if zlib.crc32(content) != member.crc:
            raise self.wrong("is damaged: data.pkl has the wrong checksum")
        return content

    def storage(self, key: str, tensor: str) -> _Member:
        """Where a storage's bytes are."""
        member = self.members.get(f"{self.root}data/{key}")
        if member is None:
            raise self.wrong(f"lacks the storage {key!r:.100} of {tensor!r}", tensor)
        return member

    def check(self, key: str, tensor: str) -> None:
        """Compare a storage's checksum, once."""
        member = self.storage(key, tensor)
        if key not in self.checked and zlib.crc32(self._bytes(member).data) != member.crc:
            raise self.wrong(f"is damaged: {tensor!r} has the wrong checksum", tensor)
        self.checked.add(key)

    def _bytes(self, member: _Member) -> np.ndarray:
        return self.data[member.start : member.start + member.size]

    def _directory(self) -> dict[str, _Member]:
        """The members by name, from the table at the end of the file."""
        count, size, place = self._table()
        if count > MAX_ENTRIES or place + size > len(self.data) or count * 46 > size:
            raise self.wrong(f"has a damaged table of {count} members")
        table = bytes(self.data[place : place + size])
        members: dict[str, _Member] = {}
        at = 0
        for _ in range(count):
            if at + 46 > len(table) or table[at : at + 4] != b"PK\x01\x02":
                raise self.wrong("has a damaged table of members")
            name_length, extra_length, comment_length = struct.unpack_from("<3H", table, at + 28)
            end = at + 46 + name_length + extra_length
            if end + comment_length > len(table):
                raise self.wrong("has a damaged table of members")
            name, extra = table[at + 46 : at + 46 + name_length], table[end - extra_length : end]
            member_name = name.decode("utf-8", "backslashreplace")
            if member_name in members:
                raise self.wrong(f"holds the member {member_name!r} twice")
            members[member_name] = self._member(table[at : at + 46], extra, name)
            at = end + comment_length
        self._refuse_overlap(members, place)
        return members

    def _table(self) -> tuple[int, int, int]:
        """How many members the archive has, and the size and place of their table."""
        tail = bytes(self.data[-65557:])
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or len(tail) - end < 22:
            raise self.wrong("is truncated: it has no table of members")
        *_, count, size, place, comment = struct.unpack_from("<4s4H2IH", tail, end)
        if comment != len(tail) - end - 22:
            raise self.wrong("has trailing bytes")
        locator = len(self.data) - len(tail) + end - 20
        if count == 0xFFFF or 0xFFFFFFFF in (size, place):
            if locator < 0 or bytes(self.data[locator : locator + 4]) != b"PK\x06\x07":
                raise self.wrong("has a damaged table of members (zip64)")
            (record,) = struct.unpack("<Q", bytes(self.data[locator + 8 : locator + 16]))
            content = bytes(self.data[record : record + 56]) if record < locator else b""
            if len(content) < 56 or content[:4] != b"PK\x06\x06":
                raise self.wrong("has a damaged table of members (zip64)")
            count, size, place = struct.unpack_from("<3Q", content, 32)
        return count, size, place

    def _member(self, line: bytes, extra: bytes, name: bytes) -> _Member:
        flags, method, _, _, crc, packed, size = struct.unpack_from("<4H3I", line, 8)
        (place,) = struct.unpack_from("<I", line, 42)
        size, packed, place = _wide_sizes(size, packed, place, extra)
        if method != 0 or flags & 1 or packed != size:
            raise self.wrong(f"has the compressed or encrypted member {name!r}, expected it stored")
        header = bytes(self.data[place : place + 30]) if place < len(self.data) else b""
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise self.wrong(f"has no member at the place of {name!r}")
        name_length, extra_length = struct.unpack_from("<2H", header, 26)
        start = place + 30 + name_length + extra_length
        if bytes(self.data[place + 30 : place + 30 + name_length]) != name:
            raise self.wrong(f"calls the member {name!r} differently in two places")
        if start + size > len(self.data):
            raise self.wrong(f"is truncated within the member {name!r}")
        return _Member(start, size, crc)

    def _refuse_overlap(self, members: Mapping[str, _Member], table: int) -> None:
        stop = 0
        for name, member in sorted(members.items(), key=lambda item: item[1].start):
            if member.start < stop or member.start + member.size > table:
                raise self.wrong(f"has the member {name!r} over another one")
            stop = member.start + member.size


def _wide_sizes(size: int, packed: int, place: int, extra: bytes) -> tuple[int, int, int]:
    """The 64-bit sizes of a large member, which stand in the extra field 1."""
    values = [size, packed, place]
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF and len(field) >= 8:
                    (values[i],) = struct.unpack_from("<Q", field)
                    field = field[8:]
        at += 4 + length
    return values[0], values[1], values[2]


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    size: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    text: str


class _Mark:
    """Where a group of operands begins."""


class _Machine:
    """Runs the instructions that describe tensors in dictionaries, and no others."""

    def __init__(self, code: bytes, path: PathLike) -> None:
        self.code, self.path, self.place = code, path, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{str(self.path)!r}: data.pkl, byte {self.place}: {what}", self.path
        )

    def run(self) -> Any:
        """The object that the pickle describes. Errors: as `read_torch`."""
        while True:
            opcode = self.take(1)
            if opcode == b".":
                return self.pop()
            action = ACTIONS.get(opcode)
            if action is None:
                name = FORBIDDEN.get(opcode, "unknown")
                raise self.wrong(f"the instruction {opcode!r} ({name}) is not allowed")
            action(self)
            self.steps += 1
            if self.steps > MAX_OBJECTS:
                raise self.wrong(f"more than {MAX_OBJECTS} instructions")

    def take(self, count: int) -> bytes:
        if count > len(self.code) - self.place:
            raise self.wrong("the pickle is truncated")
        self.place += count
        return self.code[self.place - count : self.place]

    def number(self, format: str) -> int:
        value: int = struct.unpack("<" + format, self.take(struct.calcsize("<" + format)))[0]
        return value

    def line(self) -> str:
        end = self.code.find(b"\n", self.place, self.place + 1000)
        if end < 0:
            raise self.wrong("a name that does not end")
        text = self.take(end - self.place).decode("utf-8", "backslashreplace")
        self.place += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise self.wrong("an operand is missing")
        return self.stack.pop()

    def pop_marked(self) -> list[Any]:
        """Everything above the last mark."""
        for i in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[i], _Mark):
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        raise self.wrong("a mark is missing")

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise self.wrong(f"expected a {kind.__name__} on the stack")
        return self.stack[-1]

    def text(self, length: int) -> None:
        try:
            self.push(self.take(length).decode("utf-8"))
        except UnicodeDecodeError as problem:
            raise self.wrong("a string that is not UTF-8") from problem

    def put(self, index: int) -> None:
        if index > MAX_OBJECTS:
            raise self.wrong(f"memo {index}")
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise self.wrong(f"memo {index} is empty")
        self.push(self.memo[index])

    def group(self, count: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(count)])))

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top(dict)
        if len(pairs) % 2:
            raise self.wrong("a key without a value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self.wrong(f"a key of the kind {type(key).__name__}")
            if key in target:
                raise self.wrong(f"the key {key!r:.100} occurs twice")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def name(self) -> None:
        """A module and a name: looked up in a table, never imported."""
        text = f"{self.line()} {self.line()}"
        if text in ELSEWHERE or text.startswith("torch float8"):
            raise NotImplementedError(f"{str(self.path)!r} uses {text!r} (float8 or no type)")
        if text not in GLOBALS:
            raise self.wrong(f"the name {text!r:.200} is not allowed; nothing was executed")
        self.push(_Name(text))

    def reduce(self) -> None:
        """What the pickle would call a function for: an empty dictionary, or a tensor."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise self.wrong("something that is no name would be called")
        if function.text == ORDERED_DICT and arguments in ((), ([],)):
            self.push({})
        elif function.text == REBUILD:
            self.push(self.rebuild(arguments))
        elif function.text == PARAMETER and arguments and isinstance(arguments[0], _Tensor):
            self.push(arguments[0])
        else:
            raise self.wrong(f"{function.text!r} is called in an unknown way")

    def rebuild(self, arguments: tuple[Any, ...]) -> _Tensor:
        """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)."""
        if not 4 <= len(arguments) <= 7 or not isinstance(arguments[0], _Storage):
            raise self.wrong("a tensor without a storage")
        storage, offset, shape, strides = arguments[:4]
        for sizes in (shape, strides):
            if not isinstance(sizes, tuple) or not all(type(n) is int and n >= 0 for n in sizes):
                raise self.wrong("a tensor whose sizes are no whole numbers")
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise self.wrong(f"a tensor of {len(shape)} dimensions and {len(strides)} strides")
        if type(offset) is not int or offset < 0:
            raise self.wrong("a tensor whose offset is no whole number")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count and (last >= storage.size or count > storage.size):
            raise self.wrong(f"a tensor of shape {shape} reaches beyond its storage")
        return _Tensor(storage, offset, shape, strides)

    def persistent(self) -> None:
        """("storage", type, key, location, size): a reference to a member of the archive."""
        value = self.pop()
        if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
            raise self.wrong("a reference that is no storage")
        _, kind, key, _, size = value
        dtype = STORAGES.get(kind.text.removeprefix("torch ")) if isinstance(kind, _Name) else None
        if dtype is None or not isinstance(key, str) or type(size) is not int or size < 0:
            raise self.wrong("a reference that is no storage")
        self.push(_Storage(dtype, key, size))

    def build(self) -> None:
        """A state dict carries its version numbers as attributes: dropped, not applied."""
        self.pop()
        self.top(dict)

    def protocol(self) -> None:
        if not 2 <= self.number("B") <= 5:
            raise self.wrong("an unknown pickle protocol")

    def long(self) -> None:
        length = self.number("B")
        if length > 8:
            raise self.wrong(f"an integer of {length} bytes")
        self.push(int.from_bytes(self.take(length), "little", signed=True))


ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"(": lambda m: m.push(_Mark()),
    b"q": lambda m: m.put(m.number("B")),
    b"r": lambda m: m.put(m.number("I")),
    b"h": lambda m: m.get(m.number("B")),
    b"j": lambda m: m.get(m.number("I")),
    b"X": lambda m: m.text(m.number("I")),
    b"c": _Machine.name,
    b"R": _Machine.reduce,
    b"t": lambda m: m.push(tuple(m.pop_marked())),
    b"\x85": lambda m: m.group(1),
    b"\x86": lambda m: m.group(2),
    b"\x87": lambda m: m.group(3),
    b"Q": _Machine.persistent,
    b"K": lambda m: m.push(m.number("B")),
    b"M": lambda m: m.push(m.number("H")),
    b"J": lambda m: m.push(m.number("i")),
    b"\x8a": _Machine.long,
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"N": lambda m: m.push(None),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.pop_marked()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_marked()),
    b"b": _Machine.build,
}
FORBIDDEN = {
    b"\x93": "STACK_GLOBAL",
    b"i": "INST",
    b"o": "OBJ",
    b"\x81": "NEWOBJ",
    b"\x92": "NEWOBJ_EX",
    b"\x82": "EXT1",
    b"\x83": "EXT2",
    b"\x84": "EXT4",
    b"P": "PERSID",
    b"\x96": "BYTEARRAY8",
    b"\x95": "FRAME",
    b"S": "STRING",
    b"I": "INT",
    b"L": "LONG",
}


def _stored(archive: _Archive, path: PathLike, name: str, tensor: _Tensor) -> Stored:
    """The tensor, read when it is asked for; its checksum is compared then."""
    dtype = np.dtype(DTYPES[tensor.storage.dtype])
    member = archive.storage(tensor.storage.key, name)
    if tensor.storage.size * dtype.itemsize != member.size:
        raise archive.wrong(
            f"has a storage of {member.size} bytes for {name!r}, which claims "
            f"{tensor.storage.size} numbers of {dtype.itemsize} bytes",
            name,
        )
    whole = Entry(
        tensor.storage.dtype, (tensor.storage.size,), member.start, member.start + member.size
    )
    numbers = stored_view(archive.data, whole)

    def read() -> np.ndarray:
        archive.check(tensor.storage.key, name)
        elements = numbers.array
        view = np.lib.stride_tricks.as_strided(
            elements[tensor.offset :],
            tensor.shape,
            [step * dtype.itemsize for step in tensor.strides],
            writeable=False,
        )
        copy = np.array(view)
        forget_pages(elements)
        return copy

    return Stored(tensor.storage.dtype, read, tensor.shape)


def write_torch(
    path: PathLike,
    tensors: Mapping[str, Stored],
    overwrite: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Write a state dict that torch.load reads, one tensor at a time.

    Errors: as `save_tensors`; TypeError for a dtype that torch's storages lack.
    """
    kinds = {dtype: kind for kind, dtype in STORAGES.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            raise TypeError(f"tensor {name!r} has the dtype {tensor.dtype}, which torch stores not")
    with atomic_file(path, overwrite) as file:
        table = [_write_member(file, "archive/data.pkl", _state_dict_pickle(tensors, kinds))]
        table.append(_write_member(file, "archive/byteorder", b"little"))
        for i, tensor in enumerate(tensors.values()):
            table.append(_write_member(file, f"archive/data/{i}", tensor))
            progress()
        table.append(_write_member(file, "archive/version", b"3\n"))
        _write_table(file, table)


def _state_dict_pickle(tensors: Mapping[str, Stored], kinds: Mapping[str, str]) -> bytes:
    """The pickle, protocol 2, of an OrderedDict of contiguous tensors."""
    code = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for i, (name, tensor) in enumerate(tensors.items()):
        code += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        code += [_text("storage"), f"ctorch\n{kinds[tensor.dtype]}\n".encode("ascii")]
        code += [_text(str(i)), _text("cpu"), _integer(tensor.size), b"tQ", _integer(0)]
        steps = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        code += [b"(", *map(_integer, tensor.shape), b"t(", *map(_integer, steps), b"t"]
        code.append(b"\x89ccollections\nOrderedDict\n)RtR")
    return b"".join([*code, b"u."])


def _text(text: str) -> bytes:
    content = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(content)) + content


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


@dataclass(frozen=True)
class _Line:
    name: bytes
    crc: int
    size: int
    place: int


class _Summing:
    """Passes bytes on to a file and keeps their checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc = file, 0

    def write(self, content: Any) -> None:
        self.crc = zlib.crc32(content, self.crc)
        self.file.write(content)


def _write_member(file: BinaryIO, name: str, content: bytes | Stored) -> _Line:
    """One stored member; data begin at multiples of 64, as in archives that torch writes."""
    size = len(content) if isinstance(content, bytes) else content.nbytes
    place, text = file.tell(), name.encode("utf-8")
    wide = struct.pack("<2H2Q", 1, 16, size, size)
    padding = -(place + 30 + len(text) + len(wide) + 4) % 64
    extra = wide + struct.pack("<2H", 0x4246, padding) + bytes(padding)
    file.write(_local_header(text, 0, extra))
    summing = _Summing(file)
    if isinstance(content, bytes):
        summing.write(content)
    else:
        write_array(summing, content.array, DTYPES[content.dtype])
    end = file.tell()
    file.seek(place)
    file.write(_local_header(text, summing.crc, extra))
    file.seek(end)
    return _Line(text, summing.crc, size, place)


def _local_header(name: bytes, crc: int, extra: bytes) -> bytes:
    sizes = (crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra))
    return b"PK\x03\x04" + struct.pack("<5H3I2H", 45, 0, 0, 0, 0x21, *sizes) + name + extra


def _write_table(file: BinaryIO, lines: list[_Line]) -> None:
    begin = file.tell()
    for line in lines:
        extra = struct.pack("<2H3Q", 1, 24, line.size, line.size, line.place)
        file.write(b"PK\x01\x02" + struct.pack("<6H", 45, 45, 0, 0, 0, 0x21))
        file.write(struct.pack("<3I", line.crc, 0xFFFFFFFF, 0xFFFFFFFF))
        file.write(struct.pack("<5H2I", len(line.name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF))
        file.write(line.name + extra)
    end, count = file.tell(), len(lines)
    record = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, end - begin, begin)
    file.write(b"PK\x06\x06" + record)
    file.write(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
    short = (0, 0, min(count, 0xFFFF), min(count, 0xFFFF), 0xFFFFFFFF, 0xFFFFFFFF, 0)
    file.write(b"PK\x05\x06" + struct.pack("<4H2IH", *short))
