"""Bad files, row by row: what each gets, in Python and on the command line, within two seconds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import malformed
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from systems import LINUX, POSIX
from test_checkpoint import SIZES, random_tensors, write_checkpoint, write_shards
from test_llama2c import legacy_file, random_model, version_1_file, version_2_file, write_tokenizer
from torch_files import torch_file

from llama_np import load, load_tokenizer
from llama_np.cli import main
from llama_np.config import MAX_CONFIG_BYTES, config_from_dict, read_config
from llama_np.convert import convert
from llama_np.errors import CheckpointError, ConfigError
from llama_np.gguf_file import parse_gguf
from llama_np.weights import read_tensors

FUZZ = settings(
    max_examples=200,
    deadline=2000,  # the promise of the specification
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ALLOWED = (ValueError, OSError, NotImplementedError)


@contextmanager
def two_seconds() -> Iterator[None]:
    """Ends a hang as a failure."""

    def hung(*_: Any) -> None:
        raise AssertionError("two seconds have passed")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(10)  # a busy machine may be slow; a hang is endless
    started = time.process_time()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < 2


def is_one_line(capsys: pytest.CaptureFixture[str], model: Path, command: str = "inspect") -> str:
    """What the command line says: exit code 1 and one line on standard error."""
    arguments = ["tokenize", "x"] if command == "tokenize" else [command]
    assert main([*arguments, "--model", str(model)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llama-np: error: ") and captured.err.count("\n") == 1
    return captured.err


# Rows 1 and 2: paths


def test_row_1_missing_folders_and_forbidden_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        load(tmp_path / "nothing")
    assert missing.value.filename == str(tmp_path / "nothing")
    assert missing.value.errno == errno.ENOENT
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path / "empty")
    for name in ("model.safetensors", "config.json"):
        folder = write_checkpoint(tmp_path / f"folder as {name}")
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(IsADirectoryError):
            load(folder)
        is_one_line(capsys, folder)


NO_PERMISSION = """
import os, sys
from llama_np import load
if os.getuid() == 0:
    os.setuid(65534)
try:
    load(sys.argv[1])
except PermissionError as problem:
    print("PermissionError", problem.filename)
"""


@POSIX
def test_row_1_a_file_that_must_not_be_read(tmp_path: Path) -> None:
    os.chmod(tmp_path.parent, 0o755)  # so that another user gets as far as the file
    os.chmod(tmp_path.parent.parent, 0o755)
    os.chmod(tmp_path, 0o755)
    folder = write_checkpoint(tmp_path / "m")
    os.chmod(folder / "model.safetensors", 0)
    command = [sys.executable, "-c", NO_PERMISSION, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout.startswith("PermissionError"), result.stderr


@POSIX
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "x.gguf", "x.bin"])
def test_row_2_pipes_and_devices_are_never_opened(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "m")
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        error = ConfigError if name == "config.json" else CheckpointError
        with two_seconds(), pytest.raises(error, match="not a regular file"):
            load(folder / name if name.startswith("x") else folder)


# Rows 3 to 6: malformed weights, through the front door


def model_with(folder: Path, content: bytes) -> Path:
    write_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.mark.parametrize("name", malformed.BAD_SAFETENSORS)
def test_rows_3_to_5_malformed_safetensors(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_with(tmp_path / "m", malformed.BAD_SAFETENSORS[name])
    with two_seconds(), pytest.raises(CheckpointError):
        load(folder)
    is_one_line(capsys, folder)


@pytest.mark.parametrize("name", malformed.BAD_GGUF)
def test_rows_3_to_5_malformed_gguf(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(malformed.BAD_GGUF[name])
    with two_seconds(), pytest.raises(CheckpointError, match=r"m\.gguf"):
        parse_gguf(path)
    is_one_line(capsys, path)


@pytest.mark.parametrize("name", malformed.FOREIGN_GGUF)
def test_row_6_gguf_of_another_age_or_machine(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.gguf").write_bytes(malformed.FOREIGN_GGUF[name])
    with pytest.raises(NotImplementedError):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"sliding_window": 4096},
        {"num_local_experts": 8},
        {"rope_scaling": {"rope_type": "magic", "factor": 2.0}},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_row_6_models_of_another_kind(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | change))
    with pytest.raises(NotImplementedError, match=r"m|config"):
        read_config(tmp_path)


# Rows 7 to 12 are in test_checkpoint.py. Row 13: config.json

BAD_CONFIGS: dict[str, bytes | dict[str, Any]] = {
    "empty": b"",
    "not json": b"{",
    "a list": b"[]",
    "not utf-8": b'{"a": "\xff"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "NaN": b'{"rms_norm_eps": NaN}',
    "Infinity": b'{"rope_theta": Infinity}',
    "overflow": b'{"rope_theta": 1e400}',
    "huge number": b'{"rope_theta": 1' + b"0" * 400 + b"}",
    "five thousand digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "duplicate key": b'{"vocab_size": 1, "vocab_size": 2}',
    "many duplicates": b"{" + b",".join(b'"k%d":1' % (i % 60_000) for i in range(80_000)) + b"}",
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too large": b" " * (MAX_CONFIG_BYTES + 1),
    "groups not dividing": {"num_key_value_heads": 2},
    "odd heads": {"head_dim": 3},
    "zero": {"hidden_size": 0},
    "negative": {"num_hidden_layers": -1},
    "true": {"num_hidden_layers": True},
    "float": {"hidden_size": 12.0},
    "text": {"vocab_size": "11"},
    "too many layers": {"num_hidden_layers": 1025},
    "too wide": {"hidden_size": 1 << 21},
    "too many words": {"vocab_size": 1 << 25},
    "eps zero": {"rms_norm_eps": 0},
    "eps text": {"rms_norm_eps": "1e-5"},
    "theta negative": {"rope_theta": -1.0},
    "tie a number": {"tie_word_embeddings": 1},
    "activation a list": {"hidden_act": []},
    "activation unknown": {"hidden_act": "sine"},
    "architectures a number": {"architectures": 5},
    "architectures a text": {"architectures": "LlamaForCausalLM"},
    "model type a number": {"model_type": 3},
    "eos a text": {"eos_token_id": "</s>"},
    "eos an object": {"eos_token_id": {}},
    "bos a float": {"bos_token_id": 1.0},
    "rope a list": {"rope_scaling": [1]},
    "rope type a list": {"rope_scaling": {"rope_type": []}},
    "rope without a factor": {"rope_scaling": {"rope_type": "linear"}},
    "rope factor a text": {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "rope factors too few": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
    },
    "labels a list": {"id2label": ["a"]},
    "labels not numbered": {"id2label": {"x": "y"}},
    "unknown key": {"my_attention_trick": 3},
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_row_13_bad_configurations(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "m")
    bad = BAD_CONFIGS[name]
    content = bad if isinstance(bad, bytes) else json.dumps(SIZES | bad).encode()
    (folder / "config.json").write_bytes(content)
    with two_seconds(), pytest.raises(ConfigError, match=r"config|'.*m'"):
        load(folder)
    is_one_line(capsys, folder)


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 20),
        st.integers(),
        st.floats(),
        st.text(max_size=3),
        st.sampled_from(["llama", "silu", "linear", "llama3", "yarn", 4096, 1e-5, 10**400]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = [*SIZES, "rope_scaling", "rope_parameters", "rope_theta", "hidden_act", "architectures"]
KEYS += ["eos_token_id", "bos_token_id", "pad_token_id", "id2label", "num_labels", "model_type"]
KEYS += ["sliding_window", "tie_word_embeddings", "attention_bias", "rms_norm_eps", "torch_dtype"]


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
@FUZZ
def test_row_13_any_values_make_a_configuration_or_one_of_two_errors(
    values: dict[str, Any],
) -> None:
    with contextlib.suppress(ConfigError, NotImplementedError):
        config_from_dict(SIZES | values)


# Row 14 is in test_checkpoint.py. Row 15: pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "x.bin"])
def test_row_15_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    content = torch_file({"w": np.ones(3, np.float32)})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="convert"):
        load(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x80\x04}.")
    with pytest.raises(CheckpointError, match="convert"):
        load(tmp_path / name)
    if name != "x.bin":
        (tmp_path / "config.json").write_text(json.dumps(SIZES))
        with pytest.raises(CheckpointError, match="convert it first"):
            load(tmp_path)


# Row 22: mapped weights cannot be changed


def test_row_22_weights_are_read_only(tmp_path: Path) -> None:
    for dtype in (np.float32, np.float64, "bfloat16"):
        _, weights = load(write_checkpoint(tmp_path / "m"), dtype)
        for array in (weights["model.norm.weight"], weights["model.embed_tokens.weight"]):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


# Row 23 cannot be caught; what can is in test_weights.py. Rows 25, 26: test_hub.py.


@pytest.mark.parametrize("kind, extra", [("Q5_K", "gguf"), ("IQ4_NL", "gguf")])
def test_row_25_rare_gguf_types_name_their_extra(
    monkeypatch: pytest.MonkeyPatch, kind: str, extra: str
) -> None:
    from llama_np.gguf_file import dequantize

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=rf"llama_np\[{extra}\]"):
        dequantize(kind, np.zeros((1, 18), np.uint8))
    with pytest.raises(NotImplementedError, match="Q8_K"):
        dequantize("Q8_K", np.zeros((1, 292), np.uint8))


# Rows 27 and 28 of single files are in test_weights.py; here: folders

KILLED = """
import sys, time
from llama_np.convert import convert
def slow(done, total):
    if done == 5:
        print("half", flush=True)
        time.sleep(60)
convert(sys.argv[1], sys.argv[2], sys.argv[3], overwrite=True, progress=slow)
"""


def contents(path: Path) -> dict[str, bytes]:
    """A file, or the files of a folder."""
    return {p.name: p.read_bytes() for p in (path.iterdir() if path.is_dir() else [path])}


@pytest.mark.parametrize("to", ["hf", "meta", "llama2c"])
def test_row_27_a_killed_conversion_leaves_the_old_output(tmp_path: Path, to: str) -> None:
    sizes = {"rms_norm_eps": 1e-5}
    source = write_checkpoint(tmp_path / "m", random_tensors(seed=1), **sizes)
    out = tmp_path / "out"
    if to == "llama2c":
        out.write_bytes(b"old")
    else:
        write_checkpoint(out, None, **sizes)
    before = contents(out)
    command = [sys.executable, "-c", KILLED, str(source), str(out), to]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.kill()
    assert contents(out) == before
    left = {path.name for path in tmp_path.iterdir()} - {"m", "out"}
    assert left and all(".partial" in name for name in left)
    convert(source, out, to, overwrite=True)  # what is left is in nobody's way
    assert contents(out) != before


FULL = """
import resource, signal, sys
from llama_np.convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    convert(sys.argv[1], sys.argv[2], sys.argv[3], overwrite=True)
except OSError as problem:
    print("OSError", problem.errno)
"""


@POSIX
@pytest.mark.parametrize("to", ["hf", "meta", "llama2c"])
def test_row_27_a_full_disk_leaves_the_old_output(tmp_path: Path, to: str) -> None:
    sizes: dict[str, Any] = {"head_dim": 4, "rms_norm_eps": 1e-5}
    source = write_checkpoint(tmp_path / "m", **sizes)
    out = tmp_path / "out"
    if to == "llama2c":
        out.write_bytes(b"old")
    else:
        write_checkpoint(out)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    command = [sys.executable, "-W", "error", "-c", FULL, str(source), str(out), to]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout.startswith("OSError"), result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


READ_ONLY = """
import os, sys
from llama_np.convert import convert
if os.getuid() == 0:
    os.setuid(65534)
try:
    convert(sys.argv[1], sys.argv[2])
except PermissionError as problem:
    print("PermissionError")
"""


@POSIX
def test_row_27_a_folder_that_must_not_be_written(tmp_path: Path) -> None:
    for folder in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        os.chmod(folder, 0o755)
    source = write_checkpoint(tmp_path / "m")
    (tmp_path / "locked").mkdir(mode=0o555)
    command = [sys.executable, "-c", READ_ONLY, str(source), str(tmp_path / "locked" / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout == "PermissionError\n", result.stderr
    assert not any((tmp_path / "locked").iterdir())


# Row 31: names from a file cannot steer the terminal


def test_row_31_names_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\n\u202e"
    header = {evil: malformed.line(shape=[3])}
    folder = model_with(tmp_path / "m", malformed.safetensors(header, bytes(8)))
    line = is_one_line(capsys, folder)
    assert "\\x1b" in line and not set("\x1b\x07\n\u202e") & set(line[:-1])


# Mutations of every reader


def mutants(content: bytes) -> st.SearchStrategy[bytes]:
    """The file with some bytes changed, cut off or inserted, mostly near its beginning."""

    def change(edits: list[tuple[int, int, bytes]], near: bool) -> bytes:
        mutant = bytearray(content)
        for anywhere, count, replacement in edits:
            place = anywhere % (min(len(mutant), 400) if near else len(mutant))
            mutant[place : place + count] = replacement
            mutant = mutant or bytearray(b"x")
        return bytes(mutant)

    special = st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
    replacement = st.one_of(st.binary(max_size=9), special)
    edit = st.tuples(st.integers(0, 1 << 30), st.integers(0, 9), replacement)
    return st.builds(change, st.lists(edit, min_size=1, max_size=4), st.booleans())


def read_everything(path: Path) -> None:
    """Load with its tokenizer, as a person would."""
    with contextlib.suppress(*ALLOWED):
        _, weights = load(path)
        for array in weights.values():
            if isinstance(array, np.ndarray):
                array.sum()
    with contextlib.suppress(*ALLOWED):
        load_tokenizer(path).encode("a text")


def small_gguf() -> bytes:
    """A whole model with a vocabulary, Q8_0 and float32 tensors, a few kilobytes."""
    import tempfile

    import gguf.quants
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        writer = GGUFWriter(path, "llama")
        for key, value in {"context_length": 9, "embedding_length": 32, "block_count": 1}.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_feed_forward_length(32)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "\u2581", "a", "t", "e", "x"])
        writer.add_token_scores([0.0] * 8)
        writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
        matrix = np.ones((32, 32), np.float32)
        layer = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
        for name in layer:
            quantized = gguf.quants.quantize(matrix, Kind.Q8_0)
            writer.add_tensor(f"blk.0.{name}.weight", quantized, raw_dtype=Kind.Q8_0)
        for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
            writer.add_tensor(f"{name}.weight", matrix[0])
        writer.add_tensor("token_embd.weight", matrix[:8])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


GGUF_FILE = small_gguf()
LLAMA2C_FILES: dict[str, Callable[..., bytes]] = {
    "legacy": legacy_file,
    "version 1": version_1_file,
    "version 2": version_2_file,
}


def test_the_unchanged_gguf_file_loads(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUF_FILE)
    assert load(tmp_path / "m.gguf")[0].vocab_size == 8
    assert load_tokenizer(tmp_path / "m.gguf").encode("a")


@given(mutants(GGUF_FILE))
@FUZZ
def test_mutated_gguf_files_load_or_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    read_everything(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", LLAMA2C_FILES)
def test_mutated_llama2c_files_load_or_are_refused(tmp_path: Path, kind: str) -> None:
    good = LLAMA2C_FILES[kind](random_model(True), True)
    write_tokenizer(tmp_path / "tokenizer.bin")

    @given(mutants(good))
    @settings(FUZZ, max_examples=60)
    def check(content: bytes) -> None:
        (tmp_path / "m.bin").write_bytes(content)
        read_everything(tmp_path / "m.bin")

    check()


def test_mutated_vocabularies_of_llama2c_load_or_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(legacy_file(random_model(True), True))
    write_tokenizer(tmp_path / "tokenizer.bin")

    @given(mutants((tmp_path / "tokenizer.bin").read_bytes()))
    @settings(FUZZ, max_examples=60)
    def check(content: bytes) -> None:
        (tmp_path / "tokenizer.bin").write_bytes(content)
        with contextlib.suppress(*ALLOWED):
            load_tokenizer(tmp_path / "m.bin").encode("a text")

    check()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_mutated_json_loads_or_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_shards(tmp_path / "m", random_tensors())
    good = (folder / name).read_bytes()

    @given(mutants(good))
    @FUZZ
    def check(content: bytes) -> None:
        (folder / name).write_bytes(content)
        with contextlib.suppress(*ALLOWED):
            load(folder)

    check()


@given(mutants(malformed.GOOD))
@FUZZ
def test_mutated_safetensors_load_or_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with contextlib.suppress(*ALLOWED):
        read_tensors(tmp_path / "m.safetensors")["a"].widened()


# Memory of a conversion

PEAK = """
import sys
from llama_np.convert import convert
def peak():
    (line,) = [l for l in open("/proc/self/status") if l.startswith("VmHWM")]
    return int(line.split()[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = peak()
convert(sys.argv[1], sys.argv[2], sys.argv[3], dtype=sys.argv[4] or None)
print(peak() - before)
"""


@LINUX
@pytest.mark.parametrize(
    "source, to, dtype",
    [
        ("hf", "meta", ""),
        ("meta", "hf", ""),
        ("hf", "hf", "bfloat16"),
        ("hf", "llama2c", ""),
        ("m.bin", "hf", ""),
    ],
)
def test_converting_takes_little_more_memory_than_the_largest_tensor(
    tmp_path: Path, source: str, to: str, dtype: str
) -> None:
    # 16 layers of 8 MB, no tensor above 1 MB: 8 GB in 1.5 GB, on the scale of a test.
    sizes: dict[str, Any] = {"num_hidden_layers": 16, "hidden_size": 512, "intermediate_size": 512}
    sizes |= {
        "head_dim": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    }
    folder = write_checkpoint(tmp_path / "hf", **sizes)
    if source != "hf":
        convert(folder, tmp_path / source, to="meta" if source == "meta" else "llama2c")
    command = [sys.executable, "-c", PEAK, str(tmp_path / source), str(tmp_path / "out"), to, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert 0 < int(result.stdout or 0) < 30_000, result.stderr  # kB, of 116,000; code included
