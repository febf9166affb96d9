"""llama2.c's files, against run.c's algorithm written out slowly."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_np import hidden_states, load, load_tokenizer, logits
from llama_np.checkpoint import locate
from llama_np.convert import convert
from llama_np.errors import CheckpointError, TokenizerError
from llama_np.sentencepiece_model import parse_pieces

DIM, HIDDEN, LAYERS, HEADS, GROUPS, VOCABULARY, LENGTH = 16, 24, 2, 4, 2, 280, 20
WIDTH, KEYS = DIM // HEADS, DIM // HEADS * GROUPS
TOKENS = [1, 5, 279, 30, 5]
ORDER = ["att", "wq", "wk", "wv", "wo", "ffn", "w1", "w2", "w3"]
SHAPES = {
    "att": (DIM,),
    "wq": (DIM, DIM),
    "wk": (KEYS, DIM),
    "wv": (KEYS, DIM),
    "wo": (DIM, DIM),
    "ffn": (DIM,),
    "w1": (HIDDEN, DIM),
    "w2": (DIM, HIDDEN),
    "w3": (HIDDEN, DIM),
}


def random_model(shared: bool, seed: int = 0) -> dict[str, Any]:
    """Weights as run.c holds them: every kind for all layers at once."""
    rng = np.random.default_rng(seed)
    w: dict[str, Any] = {
        k: (rng.standard_normal((LAYERS, *s)) * 1.5 / s[-1] ** 0.5).astype(np.float32)
        for k, s in SHAPES.items()
    }
    w["emb"] = rng.standard_normal((VOCABULARY, DIM)).astype(np.float32)
    w["final"] = rng.uniform(0.5, 2, DIM).astype(np.float32)
    w["cls"] = w["emb"] if shared else rng.standard_normal((VOCABULARY, DIM)).astype(np.float32)
    return w


def header(vocabulary: int = VOCABULARY) -> bytes:
    return struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, GROUPS, vocabulary, LENGTH)


def legacy_file(w: dict[str, Any], shared: bool) -> bytes:
    tables = np.zeros((2, LENGTH, WIDTH // 2), np.float32)
    arrays = [w["emb"], *(w[k] for k in ORDER), w["final"], tables]
    content = header(VOCABULARY if shared else -VOCABULARY)
    return content + b"".join(a.tobytes() for a in arrays + ([] if shared else [w["cls"]]))


def version_1_file(w: dict[str, Any], shared: bool) -> bytes:
    start = struct.pack("<Ii", 0x616B3432, 1) + header() + bytes([shared])
    kinds = [k for k in ORDER if k not in ("att", "ffn")]
    arrays = [w["att"], w["ffn"], w["final"], w["emb"], *(w[k] for k in kinds)]
    arrays += [] if shared else [w["cls"]]
    return start.ljust(256, b"\0") + b"".join(a.tobytes() for a in arrays)


def version_2_file(w: dict[str, Any], shared: bool, group: int = 8) -> bytes:
    """Rounds the matrices in `w` to what the file can say."""
    start = struct.pack("<Ii", 0x616B3432, 2) + header() + bytes([shared])
    parts = [(start + struct.pack("<i", group)).ljust(256, b"\0")]
    parts += [w[k].tobytes() for k in ("att", "ffn", "final")]
    kinds = ["emb", *(k for k in ORDER if k not in ("att", "ffn")), *([] if shared else ["cls"])]
    for kind in kinds:
        matrices = w[kind] if kind in SHAPES else w[kind][None]
        for matrix in matrices:
            rows = matrix.reshape(-1, group)
            scale = (np.abs(rows).max(axis=1) / 127).astype(np.float32)
            codes = np.round(rows / scale[:, None]).astype(np.int8)
            parts += [codes.tobytes(), scale.tobytes()]
            matrix[...] = (codes * scale[:, None]).reshape(matrix.shape)
    if shared:
        w["cls"] = w["emb"]
    return b"".join(parts)


FILES = {"legacy": legacy_file, "version 1": version_1_file, "version 2": version_2_file}


def run_c(tokens: list[int], w: dict[str, Any]) -> np.ndarray:
    """run.c's forward(), one token and one number at a time, in double precision."""
    w = {k: a.astype(np.float64) for k, a in w.items()}
    cache: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(LAYERS)]
    x = np.zeros(DIM)
    for position, token in enumerate(tokens):
        x = w["emb"][token].copy()
        for i in range(LAYERS):
            y = rms(x, w["att"][i])
            q, k, v = w["wq"][i] @ y, w["wk"][i] @ y, w["wv"][i] @ y
            for j in range(0, DIM, 2):  # neighbours turn together
                angle = position / 10000.0 ** ((j % WIDTH) / WIDTH)
                for vector in [q, k] if j < KEYS else [q]:
                    a, b = vector[j], vector[j + 1]
                    vector[j] = a * math.cos(angle) - b * math.sin(angle)
                    vector[j + 1] = a * math.sin(angle) + b * math.cos(angle)
            cache[i].append((k, v))
            out = np.zeros(DIM)
            for head in range(HEADS):
                part = slice(head // (HEADS // GROUPS) * WIDTH, None)
                mine = q[head * WIDTH : (head + 1) * WIDTH]
                scores = np.array([mine @ key[part][:WIDTH] for key, _ in cache[i]])
                shares = np.exp(scores / math.sqrt(WIDTH))
                shares /= shares.sum()
                for share, (_, value) in zip(shares, cache[i], strict=True):
                    out[head * WIDTH : (head + 1) * WIDTH] += share * value[part][:WIDTH]
            x += w["wo"][i] @ out
            y = rms(x, w["ffn"][i])
            gate = w["w1"][i] @ y
            x += w["w2"][i] @ (gate / (1 + np.exp(-gate)) * (w["w3"][i] @ y))
    return w["cls"] @ rms(x, w["final"])


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / math.sqrt((x @ x) / len(x) + 1e-5)


def our_logits(path: Path) -> np.ndarray:
    config, weights = load(path, np.float64)
    return logits(hidden_states(np.array([TOKENS]), weights, config), weights)[0, -1]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", FILES)
def test_logits_are_those_of_run_c(tmp_path: Path, kind: str, shared: bool) -> None:
    weights = random_model(shared)
    (tmp_path / "m.bin").write_bytes(FILES[kind](weights, shared))
    expected = run_c(TOKENS, weights)
    # float64 on both sides; only the scales of version 2 are multiplied in float32.
    np.testing.assert_allclose(our_logits(tmp_path / "m.bin"), expected, rtol=1e-6, atol=1e-6)


def write_tokenizer(path: Path) -> list[tuple[str, float]]:
    """A tokenizer.bin as llama2.c's tokenizer.py writes it."""
    pieces = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [(text, -float(i)) for i, text in enumerate([" a", "ab", " ab", " ", "a", "b", "c"])]
    pieces += [(f"word{i}", -99.0) for i in range(VOCABULARY - len(pieces))]
    content = struct.pack("<i", max(len(text.encode()) for text, _ in pieces))
    for text, score in pieces:
        content += struct.pack("<fi", score, len(text.encode())) + text.encode()
    path.write_bytes(content)
    return pieces


@pytest.mark.parametrize("name", ["tokenizer.bin", f"tok{VOCABULARY}.bin"])
def test_its_tokenizer_is_found_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.bin").write_bytes(legacy_file(random_model(True), True))
    write_tokenizer(tmp_path / name)
    tokenizer = load_tokenizer(tmp_path / "m.bin")
    # As run.c: a space in front, characters, then the best merge first (" a" before "ab").
    assert tokenizer.tokens(tokenizer.encode("abc")) == ["<s>", "\u2581ab", "c"]
    assert tokenizer.tokens(tokenizer.encode("é"))[-2:] == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é")) == "ab é"
    assert (tokenizer.bos_id, tokenizer.eos_ids[0]) == (1, 2)


def test_without_a_tokenizer_the_names_that_were_looked_for_are_told(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(legacy_file(random_model(True), True))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.bin, tok280\.bin"):
        load_tokenizer(tmp_path / "m.bin")


@pytest.mark.parametrize("damage", ["short", "long", "length", "utf8"])
def test_damaged_tokenizers_are_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "m.bin").write_bytes(legacy_file(random_model(True), True))
    write_tokenizer(tmp_path / "tokenizer.bin")
    content = bytearray((tmp_path / "tokenizer.bin").read_bytes())
    if damage == "short":
        del content[-20:]
    elif damage == "long":
        content += b"more"
    elif damage == "length":
        content[8:12] = struct.pack("<i", -5)
    else:
        content[-1] = 0xFF
    (tmp_path / "tokenizer.bin").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.bin"):
        load_tokenizer(tmp_path / "m.bin")


@pytest.mark.parametrize("shared", [True, False])
def test_to_hugging_face_and_back_changes_no_bit(tmp_path: Path, shared: bool) -> None:
    weights = random_model(shared)
    write_tokenizer(tmp_path / "tokenizer.bin")
    (tmp_path / "m.bin").write_bytes(version_1_file(weights, shared))
    convert(tmp_path / "m.bin", tmp_path / "hf")
    back = tmp_path / "back"
    back.mkdir()
    convert(tmp_path / "hf", back / "m.bin", to="llama2c", version=1)
    for name in ("m.bin", "tokenizer.bin"):
        assert (back / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_version_is_written_and_read(tmp_path: Path, version: int) -> None:
    weights = random_model(False)
    write_tokenizer(tmp_path / "tokenizer.bin")
    (tmp_path / "m.bin").write_bytes(legacy_file(weights, False))
    convert(tmp_path / "m.bin", tmp_path / "out.bin", to="llama2c", version=version, overwrite=True)
    expected, found = our_logits(tmp_path / "m.bin"), our_logits(tmp_path / "out.bin")
    # int8 with 8 numbers per scale is off by at most 0.4 % of the largest; the rest is exact.
    assert np.abs(found - expected).max() <= (0.1 * np.abs(expected).max() if version == 2 else 0)


def test_the_legacy_file_ends_with_the_rotation_tables(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.bin")
    (tmp_path / "m.bin").write_bytes(legacy_file(random_model(True), True))
    convert(tmp_path / "m.bin", tmp_path / "out.bin", to="llama2c", overwrite=True)
    tables = np.frombuffer((tmp_path / "out.bin").read_bytes()[-8 * LENGTH * WIDTH // 2 :], "<f4")
    cos, sin = tables.reshape(2, LENGTH, WIDTH // 2)
    angles = np.outer(np.arange(LENGTH), [1.0, 10000.0**-0.5])
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-7)  # float32 rounding
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-7)


def test_the_bundled_model_is_one_that_run_c_computes(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="head"):
        convert("fairytales", tmp_path / "m.bin", to="llama2c")
    found = []
    for name in ("fairytales", tmp_path / "m.bin"):
        config, weights = load(name)
        tokens = np.array([load_tokenizer(name).encode("Once upon a time")])
        found.append(logits(hidden_states(tokens, weights, config), weights))
    assert np.array_equal(found[0], found[1])


def test_a_missing_tokenizer_does_not_stop_a_conversion(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(legacy_file(random_model(True), True))
    with pytest.warns(UserWarning, match=r"tokenizer\.bin"):
        convert(tmp_path / "m.bin", tmp_path / "hf")
    assert np.array_equal(our_logits(tmp_path / "hf"), our_logits(tmp_path / "m.bin"))


def test_what_run_c_cannot_compute_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(legacy_file(random_model(True), True))
    write_tokenizer(tmp_path / "tokenizer.bin")
    convert(tmp_path / "m.bin", tmp_path / "hf")
    (tmp_path / "new").mkdir()
    text = (tmp_path / "hf" / "config.json").read_text()
    for old, new in [("10000.0", "5000.0"), ("1e-05", "1e-06"), ('"silu"', '"gelu"')]:
        (tmp_path / "hf" / "config.json").write_text(text.replace(old, new))
        with pytest.raises(NotImplementedError, match=r"run\.c"):
            convert(tmp_path / "hf", tmp_path / "new" / "m.bin", to="llama2c")
        assert not any((tmp_path / "new").iterdir())


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    good = legacy_file(random_model(True), True)
    bad = {
        "truncated": good[:-4],
        "trailing": good + b"\0\0\0\0",
        "text": b"hello world, this is a text that is no model" * 10,
        "zeros": bytes(1000),
        "odd heads": struct.pack("<7i", 16, 24, 2, 3, 2, 32, 20) + good[28:],
        "negative": struct.pack("<7i", 16, -24, 2, 4, 2, 32, 20) + good[28:],
        "page": b"<!DOCTYPE html><html>not found</html>" + bytes(100),
        "short": good[:10],
        "v1 header": version_1_file(random_model(True), True)[:100],
        "group": version_2_file(random_model(True), True)[:41] + b"\7\0\0\0" + bytes(9999),
    }
    for kind, content in bad.items():
        (tmp_path / f"{kind}.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=kind):
            load(tmp_path / f"{kind}.bin")
    (tmp_path / "v9.bin").write_bytes(struct.pack("<Ii", 0x616B3432, 9) + bytes(300))
    with pytest.raises(NotImplementedError, match="version 9"):
        load(tmp_path / "v9.bin")


def test_the_bundled_vocabulary_can_be_written_for_run_c() -> None:
    from llama_np.llama2c import parse_tokenizer_bin, tokenizer_bin

    pieces = parse_pieces((locate("fairytales") / "tokenizer.model").read_bytes())
    again = parse_tokenizer_bin(tokenizer_bin(pieces), len(pieces), "here")
    assert [p.text for p in again] == [p.text for p in pieces]
    assert [p.score for p in again[3:]] == [p.score for p in pieces[3:]]
