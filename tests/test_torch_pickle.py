"""The closed pickle reader: it reads tensors, and executes nothing."""

from __future__ import annotations

import builtins
import collections
import contextlib
import io
import os
import pickle
import pickletools
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_files import KINDS, archive, torch_file

from llama_np.errors import CheckpointError
from llama_np.precision import to_bf16
from llama_np.torch_pickle import read_torch, write_torch
from llama_np.weights import Stored

RNG = np.random.default_rng(0)


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def with_code(code: bytes, storages: dict[str, np.ndarray] | None = None) -> bytes:
    """An archive around a hand-written pickle."""
    return archive(code, storages or {"0": np.zeros(6, np.float32)})


# Reading


@pytest.mark.parametrize("dtype", sorted(KINDS, key=str))
def test_every_dtype_is_read(tmp_path: Path, dtype: np.dtype) -> None:
    array = RNG.integers(0, 2, (3, 5)).astype(dtype)
    tensors = read_torch(saved(tmp_path / "x.pth", torch_file({"w": array})))
    assert tensors["w"].array.dtype == dtype
    assert np.array_equal(tensors["w"].array, array)


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    numbers = RNG.standard_normal((4, 3)).astype(np.float32)
    tensors = read_torch(saved(tmp_path / "x.pth", torch_file({"w": to_bf16(numbers)})))
    assert tensors["w"].dtype == "BF16"
    np.testing.assert_allclose(tensors["w"].widened(), numbers, rtol=2**-8)  # 8 bits of fraction


def test_transposed_scalar_and_empty_tensors_are_read(tmp_path: Path) -> None:
    arrays = {
        "t": RNG.standard_normal((3, 4)).T,
        "s": np.array(2.5),
        "e": np.zeros((0, 3)),
    }
    tensors = read_torch(saved(tmp_path / "x.pth", torch_file(arrays)))
    for name, array in arrays.items():
        assert np.array_equal(tensors[name].array, array)


def test_shared_storages_slices_parameters_and_attributes_are_understood(tmp_path: Path) -> None:
    # One storage of 12 numbers; a view of its middle, wrapped as a Parameter; version numbers.
    code = (
        b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x01\x00\x00\x00aq\x02"
        b"ctorch._utils\n_rebuild_parameter\n(ctorch._utils\n_rebuild_tensor_v2\n"
        b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        b"K\x0ctQK\x02K\x02K\x03\x86K\x04K\x01\x86\x89ccollections\nOrderedDict\n)RtR\x88"
        b"ccollections\nOrderedDict\n)RtRu}X\x09\x00\x00\x00_metadataNsb."
    )
    numbers = np.arange(12, dtype=np.float32)
    tensors = read_torch(saved(tmp_path / "x.pth", with_code(code, {"0": numbers})))
    assert tensors["a"].array.tolist() == [[2, 3, 4], [6, 7, 8]]


def test_a_state_dict_inside_a_dictionary_is_found(tmp_path: Path) -> None:
    inner = pickle_of_tensor("w")
    code = b"\x80\x02}(X\x05\x00\x00\x00epochK\x03X\x0a\x00\x00\x00state_dict" + inner + b"u."
    tensors = read_torch(saved(tmp_path / "x.pth", with_code(code)))
    assert list(tensors) == ["w"]


def pickle_of_tensor(
    name: str,
    key: bytes = b"0",
    size: int = 6,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    kind: bytes = b"FloatStorage",
) -> bytes:
    """Instructions that leave {name: tensor} on the stack."""

    def integer(value: int) -> bytes:
        content = value.to_bytes(9, "little", signed=True)[:8]
        return b"\x8a\x08" + content

    def group(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    text = b"X" + struct.pack("<I", len(name)) + name.encode()
    storage = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX"
    storage += struct.pack("<I", len(key)) + key + b"X\x03\x00\x00\x00cpu" + integer(size) + b"tQ"
    arguments = storage + integer(offset) + group(shape) + group(strides) + b"\x89}"
    return b"}" + text + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs"


def one_tensor(**options: Any) -> bytes:
    return with_code(b"\x80\x02" + pickle_of_tensor("w", **options) + b".")


def test_the_hand_written_pickle_is_right(tmp_path: Path) -> None:
    assert read_torch(saved(tmp_path / "x.pth", one_tensor()))["w"].shape == (2, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 7},
        {"size": 5},
        {"offset": 1},
        {"offset": -1},
        {"shape": (2, 4)},
        {"shape": (-1, 3)},
        {"strides": (3, -1)},
        {"strides": (4, 1)},
        {"shape": (1 << 30,), "strides": (0,)},  # a stride of zero: 4 GB out of one number
        {"shape": (1 << 62, 1 << 62), "strides": (0, 0)},
        {"strides": (1,)},
        {"shape": (1,) * 9, "strides": (1,) * 9},
        {"key": b"../../etc/passwd"},
        {"key": b"1"},
        {"kind": b"Tensor"},
        {"size": -6},
    ],
)
def test_views_that_leave_their_storage_are_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        read_torch(saved(tmp_path / "x.pth", one_tensor(**options)))


# Attacks


class Attack:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks() -> dict[str, bytes]:
    """Pickles that do something when Python's own machine runs them."""
    found = {
        f"{name}, protocol {protocol}": pickle.dumps(attack, protocol)
        for name, attack in {
            "os.system": Attack(os.system, "echo broken-in > pwned"),
            "eval": Attack(eval, "print('broken in')"),
            "exec": Attack(exec, "open('pwned','w')"),
            "open": Attack(builtins.open, "pwned", "w"),
            "popen": Attack(subprocess.Popen, "touch pwned"),
            "getattr": Attack(getattr, "", "join"),
            "import": Attack(__import__, "os"),
            "numpy": np.ones(3),
            "object": collections.Counter("abc"),
            "bytearray": bytearray(b"x" * 100),
            "set": {1, 2},
        }.items()
        for protocol in range(6)
    }
    return found | {
        "INST": b"(S'echo'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'echo'\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "EXT1": b"\x80\x02\x82\x01.",
        "NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "a dotted name": b"\x80\x02ctorch\nserialization.os.system\n.",
        "a name with a space": b"\x80\x02ctorch._utils _rebuild_tensor_v2 x\ny\n.",
        "call of a string": b"\x80\x02X\x02\x00\x00\x00os)R.",
        "call of a storage type": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "build on a name": b"\x80\x02ctorch\nFloatStorage\n}b.",
        "dictionary from pairs": b"\x80\x02ccollections\nOrderedDict\n(]\x85R.",
        "large memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "huge string": b"\x80\x02X\xff\xff\xff\x7f.",
        "huge bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".",
        "huge integer": b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
        "empty": b"",
        "no stop": b"\x80\x02}",
        "nothing": b"\x80\x02.",
        "missing mark": b"\x80\x02}u.",
        "mark as value": b"\x80\x02(.",
        "mark as key": b"\x80\x02}(Ns.",
        "key without a value": b"\x80\x02}(X\x01\x00\x00\x00au.",
        "list as key": b"\x80\x02}]Ns.",
        "empty memo": b"\x80\x02h\x07.",
        "append to a tuple": b"\x80\x02)Na.",
        "reference to nothing": b"\x80\x02NQ.",
        "reference to a short tuple": b"\x80\x02)Q.",
        "protocol 9": b"\x80\x09}.",
        "a list": b"\x80\x02].",
        "no tensors": b"\x80\x02}.",
        "many instructions": b"\x80\x02" + b"N" * 1_100_000 + b".",
        "same key twice": b"\x80\x02}X\x01\x00\x00\x00aNsX\x01\x00\x00\x00aNs.",
        # Each tuple holds the one before twice: small here, endless when it is printed.
        "doubling": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)"
        + b"q\x00h\x00\x86" * 60
        + b")\x89)tR.",
    }


@pytest.mark.parametrize("name", sorted(attacks()))
def test_attacks_are_refused_and_nothing_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "x.pth", with_code(attacks()[name]))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        read_torch(path)
    assert time.perf_counter() - started < 2
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_a_forbidden_name_is_named(tmp_path: Path) -> None:
    code = pickle.dumps(Attack(os.system, "true"), 2)
    with pytest.raises(CheckpointError, match="system' is not allowed; nothing was executed"):
        read_torch(saved(tmp_path / "x.pth", with_code(code)))


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    code = b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b."
    with pytest.raises(CheckpointError, match="Linear"):
        read_torch(saved(tmp_path / "x.pth", with_code(code)))


def test_float8_and_older_formats_are_named(tmp_path: Path) -> None:
    for content in (
        with_code(b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n."),
        with_code(b"\x80\x02ctorch\nfloat8_e4m3fn\n."),
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + bytes(100),
        archive(b"\x80\x02}.", {}, byteorder=b"big"),
    ):
        with pytest.raises(NotImplementedError, match=r"x\.pth"):
            read_torch(saved(tmp_path / "x.pth", content))


# Archives


def repacked(change: Callable[[zipfile.ZipFile], None]) -> bytes:
    """A good archive to which something is added."""
    stream = io.BytesIO(one_tensor())
    with zipfile.ZipFile(stream, "a") as file:
        change(file)
    return stream.getvalue()


def bad_archives() -> dict[str, bytes]:
    good = one_tensor()
    local = bytearray(good)
    local[30:35] = b"other"  # the name in the first local header
    checksum = bytearray(good)
    checksum[good.index(b"_rebuild_tensor_v2") + 3] ^= 1
    data = bytearray(torch_file({"w": np.arange(6, dtype=np.float32)}))
    data[data.index(np.arange(6, dtype=np.float32).tobytes()) + 5] ^= 1
    encrypted = bytearray(good)
    encrypted[good.index(b"PK\x01\x02") + 8] |= 1
    code = b"\x80\x02" + pickle_of_tensor("w") + b"."
    return {
        "deflated": archive(code, {"0": np.zeros(6, np.float32)}, zipfile.ZIP_DEFLATED),
        "two data.pkl": repacked(lambda z: z.writestr("other/data.pkl", code)),
        "no data.pkl": archive(code, {}).replace(b"data.pkl", b"data.pk_"),
        "encrypted": bytes(encrypted),
        "truncated": good[:-30],
        "half": good[: len(good) // 2],
        "trailing": good + b"x",
        "another local name": bytes(local),
        "damaged pickle": bytes(checksum),
        "damaged numbers": bytes(data),
        "only an end": b"PK\x03\x04" + b"PK\x05\x06" + bytes(18),
        "many members announced": good[:-14] + struct.pack("<2H2IH", 60000, 60000, 9, 9, 0),
        "table beyond the file": good[:-10] + struct.pack("<2IH", 1 << 31, 1 << 31, 0),
        "empty": b"",
        "html": b"<html>",
    }


@pytest.mark.parametrize("name", bad_archives())
def test_damaged_archives_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        for tensor in read_torch(saved(tmp_path / "x.pth", bad_archives()[name])).values():
            tensor.widened()


def test_the_same_member_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = repacked(lambda z: z.writestr("consolidated/data/0", bytes(24)))
    with pytest.raises(CheckpointError, match="twice"):
        read_torch(saved(tmp_path / "x.pth", content))


MUTANTS = [one_tensor(), torch_file({"a": np.ones((2, 3), np.float16).T, "b": np.arange(5)})]


@given(
    st.sampled_from(MUTANTS),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=5),
    st.integers(0, 3),
)
@settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_mutants_load_or_are_refused_quickly(
    tmp_path: Path, content: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    mutant = bytearray(content)
    for place, value in changes:
        mutant[place % len(mutant)] = value
    mutant = mutant[: len(mutant) - cut]
    try:
        for tensor in read_torch(saved(tmp_path / "x.pth", bytes(mutant))).values():
            tensor.widened()
    except (ValueError, OSError, NotImplementedError):
        pass


@given(
    st.lists(st.sampled_from([bytes([c]) for c in range(256)] + [b"cos\nsystem\n"]), max_size=30)
)
@settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_programs_are_refused_quickly(tmp_path: Path, parts: list[bytes]) -> None:
    with contextlib.suppress(ValueError, NotImplementedError):
        read_torch(saved(tmp_path / "x.pth", with_code(b"\x80\x02" + b"".join(parts) + b".")))


def test_no_instruction_of_pickle_is_forgotten() -> None:
    from llama_np.torch_pickle import ACTIONS, FORBIDDEN

    known = {opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    assert ACTIONS.keys() <= known and FORBIDDEN.keys() <= known
    assert not ACTIONS.keys() & FORBIDDEN.keys()


# Writing


def test_what_is_written_is_read_and_is_a_sound_zip(tmp_path: Path) -> None:
    tensors = {
        "a": Stored("F32", RNG.standard_normal((3, 4)).astype(np.float32)),
        "b.c": Stored("BF16", np.arange(6, dtype=np.uint16).reshape(2, 3)),
        "ü": Stored("I64", np.array(-3)),
        "t": Stored("F16", np.arange(12, dtype=np.float16).reshape(3, 4).T),
    }
    write_torch(tmp_path / "x.pth", tensors)
    found = read_torch(tmp_path / "x.pth")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert np.array_equal(found[name].array, tensor.array)
    with zipfile.ZipFile(tmp_path / "x.pth") as file:
        assert file.testzip() is None
        assert file.read("archive/data/0") == tensors["a"].array.tobytes()


def test_python_reads_the_written_pickle_as_calls_of_torch(tmp_path: Path) -> None:
    write_torch(tmp_path / "x.pth", {"w": Stored("F32", np.ones((2, 3), np.float32))})
    with zipfile.ZipFile(tmp_path / "x.pth") as file:
        code = file.read("archive/data.pkl")
    names = [arg for op, arg, _ in pickletools.genops(code) if op.name == "GLOBAL"]
    assert names == [
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "collections OrderedDict",
    ]
