"""Safetensors: our reader and writer against the library, numbers, memory, and interruptions."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import malformed
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from systems import LINUX, POSIX

from llama_np.errors import CheckpointError
from llama_np.weights import (
    DTYPES,
    FLOATS,
    Stored,
    halves_from_pairs,
    pairs_from_halves,
    read_header,
    read_tensors,
    save_tensors,
)

QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def deserialize(content: bytes) -> Any:
    """The library's own parser."""
    return safetensors.deserialize(content)  # type: ignore[no-untyped-call]


def library(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """What the library makes of a file: dtype, shape and bytes."""
    return {
        name: (tensor["dtype"], list(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in deserialize(content)
    }


def ours(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (tensor.dtype, list(tensor.shape), tensor.array.tobytes())
        for name, tensor in read_tensors(path).items()
    }


# Reading


@pytest.mark.parametrize("name", malformed.BAD_SAFETENSORS)
def test_malformed_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(malformed.BAD_SAFETENSORS[name])
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as caught:
        read_tensors(path)
    assert caught.value.path == path
    assert time.perf_counter() - started < 2  # on a busy machine; usually milliseconds


@pytest.mark.parametrize("name", malformed.ODD_SAFETENSORS)
def test_odd_files_load_as_in_the_library(tmp_path: Path, name: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(malformed.ODD_SAFETENSORS[name])
    assert ours(path) == library(path.read_bytes())


@pytest.mark.parametrize(
    "content, hint",
    [
        (malformed.GIT_LFS, "git lfs pull"),
        (malformed.WEB_PAGE, "web page"),
        (malformed.ZIP, "convert"),
        (b"", "empty"),
        (b"GGUF" + bytes(60), "GGUF"),
    ],
)
def test_a_file_of_another_kind_is_recognized(tmp_path: Path, content: bytes, hint: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=hint):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "C64"])
def test_known_formats_that_are_not_implemented_say_so(tmp_path: Path, dtype: str) -> None:
    content = malformed.safetensors({"a": malformed.line(dtype=dtype)}, bytes(8))
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(NotImplementedError, match=dtype):
        read_tensors(tmp_path / "x.safetensors")


def good_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "one": malformed.line([2, 3], 0, 24),
        "two": malformed.line([4], 24, 32, "BF16"),
        "three": malformed.line([], 32, 40, "I64"),
        "four": malformed.line([0], 40, 40, "U8"),
    }
    return malformed.safetensors(header, bytes(range(40)))


def agrees_or_is_stricter(path: Path) -> None:
    """What we load, the library loads the same; what we refuse raises one of three errors."""
    try:
        found = ours(path)
    except (ValueError, OSError, NotImplementedError):
        return
    assert found == library(path.read_bytes())


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
@settings(QUICK, max_examples=200)
def test_changed_bytes_never_load_differently_from_the_library(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(good_file())
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    agrees_or_is_stricter(path)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 70),
        st.sampled_from([1 << 62, 1 << 64, 0.0, 1.5, "F32", "BF16", "I8", "F4", "", "x"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner
        ),
    ),
    max_leaves=8,
)
LINES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "BOOL", "C64", 3]),
        "shape": st.one_of(st.lists(st.integers(-1, 4), max_size=4), JSON),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 40), min_size=2, max_size=2), JSON),
    }
)


@given(
    st.one_of(JSON, st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), LINES)),
    st.integers(0, 40),
    st.booleans(),
)
@settings(QUICK, max_examples=200)
def test_any_header_loads_as_in_the_library_or_is_refused(
    tmp_path: Path, header: Any, size: int, escape: bool
) -> None:
    text = json.dumps(header, ensure_ascii=escape).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(malformed.raw_safetensors(text, bytes(size)))
    agrees_or_is_stricter(path)


@given(st.integers(0, 300))
@QUICK
def test_every_truncation_is_refused(tmp_path: Path, size: int) -> None:
    content = good_file()
    path = tmp_path / "m.safetensors"
    path.write_bytes(content[: size % len(content)])
    with pytest.raises(CheckpointError):
        read_tensors(path)


def test_where_we_are_stricter_than_the_library() -> None:
    lenient = set()
    for name, content in malformed.BAD_SAFETENSORS.items():
        try:
            deserialize(content)
            lenient.add(name)
        except safetensors.SafetensorError:
            pass
    # The format's own text forbids the first two; the others name sizes that NumPy cannot hold.
    assert lenient <= {
        "leading space",
        "duplicate tensor",
        "duplicate key in a line",
        "forty dimensions",
        "overflow to nothing",
        "size of 2**63",
        "too many tensors",
    }


# Numbers


def test_every_bfloat16_widens_to_its_number() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    assert Stored("BF16", bits).widened().view(np.uint32).tolist() == (
        expected.view(np.uint32).tolist()
    )


@pytest.mark.parametrize("name, kind", [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")])
def test_every_float8_widens_to_its_number(name: str, kind: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(getattr(ml_dtypes, kind)).astype(np.float32)
    np.testing.assert_array_equal(Stored(name, codes).widened(), expected)


@pytest.mark.parametrize("mmap", [True, False])
def test_views_are_read_only_and_misaligned_files_load(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "m.safetensors"
    for padding in range(9):
        header = json.dumps({"a": malformed.line([2], 0, 16, "F64")}).encode() + b" " * padding
        path.write_bytes(malformed.raw_safetensors(header, struct.pack("<2d", 1.5, -2.5)))
        array = read_tensors(path, mmap)["a"].array
        assert array.tolist() == [1.5, -2.5]
        assert array.ctypes.data % 8 == 0
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 3


def test_without_mapping_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(good_file())
    tensors = read_tensors(path, mmap=False)
    os.truncate(path, len(good_file()) - 20)
    with pytest.raises(CheckpointError, match="shorter"):
        tensors["two"].widened()


@pytest.mark.parametrize("heads, pairs", [(1, 1), (3, 4), (5, 2)])
def test_the_two_orders_of_rows_are_inverse(heads: int, pairs: int) -> None:
    rows = np.arange(heads * pairs * 2 * 3).reshape(-1, 3)
    assert np.array_equal(pairs_from_halves(halves_from_pairs(rows, heads), heads), rows)
    one = halves_from_pairs(np.arange(8), 1)
    assert one.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


# Writing


STRIDED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda a: a,
    "transposed": lambda a: a.T,
    "backwards": lambda a: a[::-1],
    "every second": lambda a: a[..., ::2],
    "fortran": np.asfortranarray,
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape)),
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "both": lambda a: a.astype(a.dtype.newbyteorder(">")).T,
}


@given(
    nps.arrays(
        st.sampled_from([np.dtype(DTYPES[d]) for d in ("F64", "F32", "F16", "I64", "I8", "BOOL")]),
        nps.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
    ),
    st.sampled_from(sorted(STRIDED)),
)
@QUICK
def test_any_array_is_written_as_it_looks(tmp_path: Path, array: np.ndarray, how: str) -> None:
    view = STRIDED[how](array)
    path = tmp_path / "m.safetensors"
    save_tensors(path, {"x": view, "y": np.zeros(3, np.int8)}, {"note": "ü"}, overwrite=True)
    by_library = safetensors.numpy.load(path.read_bytes())
    assert by_library["x"].dtype == view.dtype.newbyteorder("=")
    np.testing.assert_array_equal(by_library["x"], view)
    np.testing.assert_array_equal(read_tensors(path)["x"].array, view)
    assert read_header(path)[1] == {"format": "pt", "note": "ü"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_written_and_the_library_reads_it(tmp_path: Path, dtype: str) -> None:
    raw = np.arange(12).reshape(3, 4).astype(DTYPES[dtype])
    save_tensors(tmp_path / "m.safetensors", {"x": Stored(dtype, raw), "s": np.array(3.0)})
    found = library((tmp_path / "m.safetensors").read_bytes())
    assert found["x"] == (dtype, [3, 4], raw.tobytes())
    assert ours(tmp_path / "m.safetensors") == found


def test_tensors_begin_at_whole_cache_lines_whatever_their_names(tmp_path: Path) -> None:
    for length in range(1, 40):
        path = tmp_path / "m.safetensors"
        save_tensors(path, {"n" * length: np.ones(3), "z": np.ones(3, np.int8)}, overwrite=True)
        entries, _ = read_header(path)
        assert entries["n" * length].start % 64 == 0


def test_large_arrays_are_written_in_pieces(tmp_path: Path) -> None:
    array = np.arange(9_000_000, dtype=np.float32).reshape(3000, 3000).T
    save_tensors(tmp_path / "m.safetensors", {"x": array})
    assert np.array_equal(read_tensors(tmp_path / "m.safetensors")["x"].array, array)


def test_what_cannot_be_stored_is_told_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    cases: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"__metadata__": np.ones(2)}, ValueError),
        ({"x": np.ones(2, np.complex128)}, TypeError),
        ({"x": np.array(["text"])}, TypeError),
        ({"x": np.ones(2, np.longdouble)}, TypeError),
        ({"x": np.array([None])}, TypeError),
    ]
    for tensors, error in cases:
        with pytest.raises(error):
            save_tensors(path, tensors)
        assert not any(tmp_path.iterdir())


@POSIX
def test_existing_files_links_pipes_and_modes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    old = os.umask(0o027)
    try:
        save_tensors(path, {"x": np.ones(2)})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(FileExistsError):
        save_tensors(path, {"x": np.zeros(2)})
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    save_tensors(link, {"x": np.zeros(2)}, overwrite=True)
    assert link.is_symlink() and read_tensors(path)["x"].array.tolist() == [0, 0]
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FileExistsError):
            save_tensors(target, {"x": np.ones(2)}, overwrite=True)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    nowhere = tmp_path / "nowhere" / "m.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        save_tensors(nowhere, {"x": np.ones(2)})
    assert caught.value.filename == str(nowhere.parent)


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_tensors(path, {"x": np.ones(2)})
    before = path.read_bytes()

    def broken() -> np.ndarray:
        raise KeyboardInterrupt

    tensors: dict[str, Any] = {"x": np.ones(5), "y": Stored("F32", broken, (3,))}
    with pytest.raises(KeyboardInterrupt):
        save_tensors(path, tensors, overwrite=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def python(code: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run(command, check=False, **options)


FULL_DISK = """
import resource, signal, sys
import numpy as np
from llama_np.weights import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    save_tensors(sys.argv[1], {"x": np.ones(1_000_000)}, overwrite=True)
except OSError as problem:
    print(problem.errno)
"""


@POSIX
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_tensors(path, {"x": np.ones(2)})
    before = path.read_bytes()
    assert python(FULL_DISK, path).stdout.strip().isdigit()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


SLOW_WRITE = """
import sys, time
import numpy as np
from llama_np.weights import Stored, save_tensors
def slow():
    print("writing", flush=True)
    time.sleep(60)
save_tensors(sys.argv[1], {"x": np.ones(100_000), "y": Stored("F32", slow, (3,))}, overwrite=True)
"""


@POSIX
def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_tensors(path, {"x": np.ones(2)})
    before = path.read_bytes()
    command = [sys.executable, "-c", SLOW_WRITE, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == before
    assert all(p == path or p.name.endswith(".partial") for p in tmp_path.iterdir())


# Memory


MEASURE = """
import sys, time, json
from llama_np import load
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith("Private_Dirty:"))
load("fairytales")
before = private()
best = 9e9
for _ in range(5):
    start = time.perf_counter()
    pair = load(sys.argv[1])
    best = min(best, time.perf_counter() - start)
print(json.dumps({"kB": private() - before, "seconds": best}))
"""


def large_checkpoint(folder: Path, words: int) -> None:
    """A float32 checkpoint that is nearly all embedding; on disk it is a hole."""
    folder.mkdir()
    config = {
        "vocab_size": words,
        "hidden_size": 512,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    from llama_np.checkpoint import expected_shapes
    from llama_np.config import config_from_dict

    shapes = expected_shapes(config_from_dict(config))
    header, place = {}, 0
    for name, shape in shapes.items():
        if name not in ("lm_head.weight", "score.weight"):
            stop = place + 4 * math.prod(shape)
            header[name] = malformed.line(list(shape), place, stop)
            place = stop
    text = json.dumps(header).encode()
    content = malformed.raw_safetensors(text + b" " * (-len(text) % 8))
    (folder / "model.safetensors").write_bytes(content)
    os.truncate(folder / "model.safetensors", len(content) + place)


@LINUX
def test_loading_float32_takes_neither_time_nor_memory(tmp_path: Path) -> None:
    large_checkpoint(tmp_path / "big", 250_000)  # 512 MB
    result = python(MEASURE, tmp_path / "big")
    measured = json.loads(result.stdout or "{}")
    assert measured["kB"] < 4_000, result.stderr  # of 512,000: the parsed header and page tables
    assert measured["seconds"] < 0.1  # 1 ms on a quiet machine


def test_all_float_formats_count_as_floats() -> None:
    assert set(DTYPES) >= FLOATS
