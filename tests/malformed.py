"""Builders of files that are wrong in one way each; nothing binary is kept in the repository."""

from __future__ import annotations

import json
import struct
from typing import Any

GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n"
WEB_PAGE = b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n" * 3
ZIP = b"PK\x03\x04" + bytes(60)
PICKLE = b"\x80\x04\x95" + bytes(60)


def raw_safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header text, whatever it says."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A file with this header as JSON."""
    return raw_safetensors(json.dumps(header).encode(), data)


def line(
    shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32", **more: Any
) -> dict[str, Any]:
    """A header line, by default of two float32 numbers."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


EIGHT = bytes(8)
GOOD = safetensors({"a": line()}, EIGHT)

# Every one of these must be a CheckpointError; the library's behaviour is in the comments where
# it is more lenient.
BAD_SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "length zero": raw_safetensors(b"", length=0),
    "length beyond the file": raw_safetensors(b"{}", length=1 << 40),
    "length of all ones": raw_safetensors(b"{}", length=(1 << 64) - 1),
    "length over the limit": raw_safetensors(b"{}", length=100_000_001),
    "not json": raw_safetensors(b"{nonsense"),
    "not utf-8": raw_safetensors(b'{"\xff":1}'),
    "a list": raw_safetensors(b"[]"),
    "a number": raw_safetensors(b"17"),
    "nothing but spaces": raw_safetensors(b"  "),
    "leading space": raw_safetensors(
        b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT
    ),
    "nested deeply": raw_safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested objects": raw_safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "duplicate tensor": raw_safetensors(  # the library takes the last one
        b'{"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        EIGHT,
    ),
    "duplicate key in a line": raw_safetensors(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT
    ),
    "metadata not strings": safetensors({"__metadata__": {"a": 1}, "a": line()}, EIGHT),
    "metadata nested": safetensors({"__metadata__": {"a": {"b": "c"}}, "a": line()}, EIGHT),
    "metadata a list": safetensors({"__metadata__": ["x"], "a": line()}, EIGHT),
    "overlap": safetensors({"a": line(), "b": line()}, EIGHT),
    "partial overlap": safetensors({"a": line(), "b": line(begin=4, end=12)}, bytes(12)),
    "hole": safetensors({"a": line(), "b": line(begin=12, end=20)}, bytes(20)),
    "hole at the start": safetensors({"a": line(begin=4, end=12)}, bytes(12)),
    "trailing": safetensors({"a": line()}, bytes(9)),
    "truncated": safetensors({"a": line()}, bytes(7)),
    "no data": safetensors({"a": line()}),
    "reversed offsets": safetensors({"a": line(begin=8, end=0)}, EIGHT),
    "negative offset": safetensors({"a": line(begin=-8, end=0)}, EIGHT),
    "minus zero": raw_safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', EIGHT
    ),
    "float offset": safetensors({"a": line(begin=0.0, end=8)}, EIGHT),
    "one offset": safetensors({"a": line() | {"data_offsets": [8]}}, EIGHT),
    "three offsets": safetensors({"a": line() | {"data_offsets": [0, 4, 8]}}, EIGHT),
    "offsets missing": safetensors({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "shape too large": safetensors({"a": line(shape=[3])}, EIGHT),
    "shape too small": safetensors({"a": line(shape=[1])}, EIGHT),
    "shape missing": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "shape a number": safetensors({"a": line(shape=2)}, EIGHT),
    "negative size": safetensors({"a": line(shape=[-2])}, EIGHT),
    "two negative sizes": safetensors({"a": line(shape=[-1, -2])}, EIGHT),
    "float size": safetensors({"a": line(shape=[2.0])}, EIGHT),
    "true as size": safetensors({"a": line(shape=[True, 2])}, EIGHT),
    "text as size": safetensors({"a": line(shape=["2"])}, EIGHT),
    "overflowing product": safetensors({"a": line(shape=[1 << 32, 1 << 32, 2])}, EIGHT),
    "overflow to nothing": safetensors({"a": line(shape=[1 << 62, 0], end=0)}),
    "size of 2**63": safetensors({"a": line(shape=[1 << 63, 0], end=0)}),
    "huge number": raw_safetensors(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', EIGHT
    ),
    "forty dimensions": safetensors({"a": line(shape=[1] * 39 + [2])}, EIGHT),
    "unknown dtype": safetensors({"a": line(dtype="F17")}, EIGHT),
    "dtype missing": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "dtype a list": safetensors({"a": line(dtype=["F32"])}, EIGHT),
    "line a list": safetensors({"a": [1, 2]}, EIGHT),
    "line null": safetensors({"a": None}, EIGHT),
    "not a number": raw_safetensors(
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT
    ),
    "half a character": raw_safetensors(
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT
    ),
    "too many tensors": safetensors({f"t{i}": line(shape=[0], end=0) for i in range(102_000)}),
    "git-lfs pointer": GIT_LFS,
    "web page": WEB_PAGE,
    "zip": ZIP,
    "pickle": PICKLE,
    "gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    "big-endian length": struct.pack(">Q", len(GOOD) - 16) + GOOD[8:],
}

# Odd, and legal: these load.
ODD_SAFETENSORS: dict[str, bytes] = {
    "no tensors": safetensors({}),
    "scalar": safetensors({"a": line(shape=[], end=4)}, bytes(4)),
    "no elements": safetensors({"a": line(shape=[0, 5], end=0)}),
    "odd header length": raw_safetensors(json.dumps({"a": line()}).encode() + b" " * 3, EIGHT),
    "extra key in a line": safetensors({"a": line(comment="x")}, EIGHT),
    "strange names": safetensors(
        {"\0": line(end=4, shape=[1]), "\x1b[2J../\n": line(begin=4, end=8, shape=[1])}, EIGHT
    ),
    "not finite": safetensors({"a": line()}, struct.pack("<2f", float("nan"), float("inf"))),
    "empty between": safetensors(
        {"a": line(), "b": line(shape=[0], begin=8, end=8), "c": line(begin=8, end=16)}, bytes(16)
    ),
}


# GGUF


def gguf_string(text: str | bytes, length: int | None = None) -> bytes:
    """A string with its length, or with a length that lies."""
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content) if length is None else length) + content


def gguf_value(key: str | bytes, kind: int, payload: bytes) -> bytes:
    """One line of metadata."""
    return gguf_string(key) + struct.pack("<I", kind) + payload


def gguf_tensor(
    name: str = "t", sizes: Any = (8,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    """The description of a tensor."""
    content = gguf_string(name) + struct.pack("<I", len(sizes) if rank is None else rank)
    return content + struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, offset)


def gguf_file(
    values: list[bytes] | tuple[bytes, ...] = (),
    tensors: list[bytes] | tuple[bytes, ...] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    """A file of these parts, data aligned to 32."""
    n_tensors, n_values = counts if counts is not None else (len(tensors), len(values))
    start = magic + struct.pack("<IQQ", version, n_tensors, n_values)
    start += b"".join(values) + b"".join(tensors)
    return start + bytes(-len(start) % 32) + data if data or tensors else start


def _nested(depth: int) -> bytes:
    return gguf_value("a", 9, struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQB", 0, 1, 7))


BIG = 1 << 62
BAD_GGUF: dict[str, bytes] = {
    "empty": b"",
    "three bytes": b"GGU",
    "eight bytes": b"GGUF\3\0\0\0",
    "wrong magic": gguf_file(magic=b"GGML"),
    "version 99": gguf_file(version=99),
    "too many keys": gguf_file(counts=(0, 1 << 63)),
    "too many tensors": gguf_file(counts=(1 << 63, 0)),
    "more keys than there are": gguf_file(counts=(0, 5)),
    "key longer than the file": gguf_file([gguf_string("k", 1 << 60)]),
    "string longer than the file": gguf_file([gguf_value("k", 8, gguf_string("v", 1000))]),
    "string not utf-8": gguf_file([gguf_value("k", 8, gguf_string(b"\xff\xfe"))]),
    "key not utf-8": gguf_file([gguf_value(b"\xff", 0, b"\1")]),
    "unknown kind of value": gguf_file([gguf_value("k", 77, bytes(8))]),
    "truth value 7": gguf_file([gguf_value("k", 7, b"\7")]),
    "array of 2**40": gguf_file([gguf_value("k", 9, struct.pack("<IQ", 0, 1 << 40))]),
    "array of 2**62 strings": gguf_file([gguf_value("k", 9, struct.pack("<IQ", 8, BIG))]),
    "array of an unknown kind": gguf_file([gguf_value("k", 9, struct.pack("<IQ", 50, 0) * 2)]),
    "nested five deep": gguf_file([_nested(5)]),
    "nested without end": gguf_file([_nested(5000)]),
    "duplicate key": gguf_file([gguf_value("k", 0, b"\1"), gguf_value("k", 0, b"\1")]),
    "alignment 0": gguf_file([gguf_value("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 3": gguf_file([gguf_value("general.alignment", 4, struct.pack("<I", 3))]),
    "alignment a string": gguf_file([gguf_value("general.alignment", 8, gguf_string("32"))]),
    "alignment an array": gguf_file(
        [gguf_value("general.alignment", 9, struct.pack("<IQI", 4, 1, 32))]
    ),
    "unknown tensor type": gguf_file([], [gguf_tensor(kind=200)], bytes(32)),
    "nine dimensions": gguf_file([], [gguf_tensor(sizes=[1] * 9)], bytes(32)),
    "dimensions announced, not there": gguf_file([], [gguf_tensor(rank=4)]),
    "row that fills no block": gguf_file([], [gguf_tensor(sizes=[33], kind=2)], bytes(64)),
    "product overflows": gguf_file([], [gguf_tensor(sizes=[1 << 33, 1 << 33])], bytes(32)),
    "huge and empty": gguf_file([], [gguf_tensor(sizes=[0, 1 << 63])], bytes(32)),
    "offset wraps": gguf_file([], [gguf_tensor(offset=(1 << 64) - 32)], bytes(32)),
    "offset misaligned": gguf_file([], [gguf_tensor(offset=8)], bytes(40)),
    "overlap": gguf_file([], [gguf_tensor("a"), gguf_tensor("b")], bytes(64)),
    "hole": gguf_file([], [gguf_tensor("a"), gguf_tensor("b", offset=64)], bytes(96)),
    "duplicate tensor": gguf_file([], [gguf_tensor(), gguf_tensor(offset=32)], bytes(64)),
    "truncated data": gguf_file([], [gguf_tensor()], bytes(31)),
    "trailing data": gguf_file([], [gguf_tensor()], bytes(1000)),
    "web page": WEB_PAGE,
    "git-lfs pointer": GIT_LFS,
}
FOREIGN_GGUF: dict[str, bytes] = {
    "version 1": gguf_file(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
}
