"""Finding and loading checkpoints: names, shards, shapes, ties, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from systems import POSIX

from llama_np import checkpoint, hidden_states, load, load_tokenizer, logits
from llama_np.checkpoint import (
    canonical_names,
    expected_shapes,
    locate,
    read_checkpoint,
    read_folder,
    resident_bytes,
)
from llama_np.config import config_from_dict
from llama_np.errors import CheckpointError
from llama_np.inspection import describe
from llama_np.precision import to_bf16
from llama_np.weights import Stored, save_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 9,
}
TOKENS = np.array([[1, 7, 10, 3]])


def random_tensors(seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(config_from_dict(SIZES | changes))
    shapes.pop("score.weight")
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_checkpoint(folder: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A folder with config.json and model.safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | changes))
    content = random_tensors(**changes) if tensors is None else tensors
    save_tensors(folder / "model.safetensors", content, overwrite=True)
    return folder


def write_shards(folder: Path, tensors: dict[str, np.ndarray], **index: Any) -> Path:
    """The same in two shards with an index, of which parts can be replaced."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES))
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_tensors(folder / file, {n: tensors[n] for n in part}, overwrite=True)
    places = {name: file for file, part in parts.items() for name in part}
    content = {"metadata": {"total_size": 1}, "weight_map": places} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def run(name: str | Path, **options: Any) -> np.ndarray:
    config, weights = load(name, **options)
    return logits(hidden_states(TOKENS, weights, config), weights)


# Names


def test_a_bundled_model_a_folder_and_a_file_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "m")
    assert locate("fairytales").name == "fairytales"
    assert locate(str(folder)) == locate(folder) == folder
    assert np.array_equal(run(folder), run(folder / "model.safetensors"))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(run("m"), run("m/model.safetensors"))


def test_the_tokenizer_is_found_beside_a_file(tmp_path: Path) -> None:
    folder = locate("fairytales")
    from_file = load_tokenizer(folder / "model.safetensors")
    assert from_file.encode("A king") == load_tokenizer("fairytales").encode("A king")
    assert load_tokenizer(folder / "tokenizer.model").encode("A king") == from_file.encode("A king")


@pytest.mark.parametrize("name", ["", "nothing", "./owner/name", "../fairytales", "fairytales/"])
def test_a_name_that_is_nowhere_is_a_file_not_found_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "":
        name = "no such thing"
    with pytest.raises(FileNotFoundError) as caught:
        load(name)
    assert caught.value.filename == name


@pytest.mark.parametrize(
    "files, error, words",
    [
        ({"adapter_config.json": b"{}"}, NotImplementedError, "LoRA"),
        ({"m.gguf": b"GGUF"}, FileNotFoundError, r"name a file in it, such as 'm\.gguf'"),
        ({"consolidated.00.pth": b"PK"}, CheckpointError, "convert it first"),
        ({"model.pt": b"PK"}, CheckpointError, "convert it first"),
        ({}, FileNotFoundError, r"no config\.json"),
    ],
)
def test_a_folder_of_another_kind_is_told_what_to_do(
    tmp_path: Path, files: dict[str, bytes], error: type[Exception], words: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words):
        load(tmp_path)


# Shards


def test_shards_load_as_one_file(tmp_path: Path) -> None:
    tensors = random_tensors()
    whole = write_checkpoint(tmp_path / "whole", tensors)
    parts = write_shards(tmp_path / "parts", tensors)
    assert np.array_equal(run(whole), run(parts))


@POSIX
def test_symbolic_links_as_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    tensors = random_tensors()
    parts = write_shards(tmp_path / "parts", tensors)
    (tmp_path / "blobs").mkdir()
    for path in list(parts.iterdir()):
        blob = tmp_path / "blobs" / f"blob-{path.name}"
        path.rename(blob)
        path.symlink_to(blob)
    assert run(parts).shape == (1, 4, 11)


@pytest.mark.parametrize(
    "place",
    ["../one.safetensors", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "c:x", "a\0b", 7, None],
)
def test_a_shard_outside_the_folder_is_never_opened(tmp_path: Path, place: Any) -> None:
    tensors = random_tensors()
    places = dict.fromkeys(tensors, "one.safetensors") | {"model.norm.weight": place}
    folder = write_shards(tmp_path / "m", tensors, weight_map=places)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is placed in"):
        load(folder)


@pytest.mark.parametrize("places", [None, [], "one.safetensors", {}])
def test_an_index_without_places_is_refused(tmp_path: Path, places: Any) -> None:
    folder = write_shards(tmp_path / "m", random_tensors(), weight_map=places)
    with pytest.raises(CheckpointError, match="weight_map"):
        load(folder)


def test_disagreements_between_index_and_shards_are_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    folder = write_shards(tmp_path / "m", tensors)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"ghost": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match="ghost"):
        load(folder)
    index.write_text(json.dumps({"weight_map": places}))
    save_tensors(folder / "one.safetensors", tensors, overwrite=True)  # holds all of them
    with pytest.raises(CheckpointError, match="another shard"):
        load(folder)
    (folder / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"two\.safetensors"):
        load(folder)


# Names and shapes


def test_missing_and_misshaped_tensors_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    tensors = random_tensors()
    name = "model.layers.1.mlp.up_proj.weight"
    folder = write_checkpoint(tmp_path / "m", {n: a for n, a in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: 'model\.layers\.1\.mlp\.up") as e:
        load(folder)
    assert e.value.tensor == name
    write_checkpoint(folder, tensors | {name: tensors[name].T})
    with pytest.raises(CheckpointError, match=r"\(12, 10\).*expects \(10, 12\)") as e:
        load(folder)
    assert (e.value.tensor, e.value.path) == (name, folder)


def test_a_long_list_of_missing_tensors_is_cut(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"model.norm.weight": np.ones(12, np.float32)})
    with pytest.raises(CheckpointError, match=r"lacks 20 tensors: .* and 10 more"):
        load(folder)


def test_unexpected_tensors_are_told_and_left_out(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", random_tensors() | {"extra": np.ones(3)})
    with pytest.warns(UserWarning, match="extra"):
        _, weights = load(folder)
    assert "extra" not in weights
    with pytest.raises(CheckpointError, match="extra"):
        load(folder, strict=True)


def test_rotary_frequencies_of_old_files_are_ignored_quietly(tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.full(2, 99, np.float32)}
    folder = write_checkpoint(tmp_path / "old", random_tensors() | old)
    assert np.array_equal(run(folder), run(write_checkpoint(tmp_path / "new")))


def test_a_bare_model_gets_its_prefix(tmp_path: Path) -> None:
    tensors = random_tensors()
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    folder = write_checkpoint(tmp_path / "bare", bare)
    assert np.array_equal(run(folder), run(write_checkpoint(tmp_path / "full", tensors)))


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_head_is_one_array(tmp_path: Path, kept: str) -> None:
    pair = ["lm_head.weight", "model.embed_tokens.weight"]
    tensors = random_tensors()
    left_out = set() if kept == "both" else {*pair} - {kept}
    part = {name: array for name, array in tensors.items() if name not in left_out}
    folder = write_checkpoint(tmp_path / "m", part, tie_word_embeddings=True)
    _, weights = load(folder, np.float64)
    assert weights[pair[0]] is weights[pair[1]]
    source = kept if kept != "both" else "lm_head.weight"  # as transformers does
    assert np.array_equal(weights[pair[0]], tensors[source])


def test_a_head_that_is_not_tied_must_be_there(tmp_path: Path) -> None:
    tensors = {n: a for n, a in random_tensors().items() if n != "lm_head.weight"}
    with pytest.raises(CheckpointError, match="lm_head"):
        load(write_checkpoint(tmp_path / "m", tensors))
    headless = write_checkpoint(tmp_path / "m", tensors, architectures=["LlamaModel"])
    assert "lm_head.weight" not in load(headless)[1]


def test_integers_are_no_weights(tmp_path: Path) -> None:
    tensors = random_tensors() | {"model.norm.weight": np.ones(12, np.int32)}
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has the dtype I32"):
        load(write_checkpoint(tmp_path / "m", tensors))


# Precision


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "bfloat16"])
@pytest.mark.parametrize("stored", ["F32", "BF16", "F16", "F64"])
def test_every_precision_loads_as_every_other(tmp_path: Path, stored: str, dtype: Any) -> None:
    codes = {"F16": np.float16, "F64": np.float64, "F32": np.float32}
    tensors = {
        name: Stored("BF16", to_bf16(a)) if stored == "BF16" else a.astype(codes[stored])
        for name, a in random_tensors().items()
    }
    folder = write_checkpoint(tmp_path / "m", tensors)
    _, weights = load(folder, dtype)
    matrix = weights["model.layers.0"]["mlp.up_proj.weight"]
    assert matrix.dtype == (np.uint16 if dtype == "bfloat16" else dtype)
    assert weights["model.norm.weight"].dtype == (np.float32 if dtype == "bfloat16" else dtype)
    assert not matrix.flags.writeable
    assert not weights["model.norm.weight"].flags.writeable


def test_other_precisions_are_refused_before_anything_is_looked_for() -> None:
    with pytest.raises(ValueError, match="float16"):
        load("no/such/thing", np.float16)


def test_mapped_or_read_the_numbers_are_the_same(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    assert np.array_equal(run(folder, mmap=True), run(folder, mmap=False))
    _, weights = load(folder, mmap=False)
    (folder / "model.safetensors").write_bytes(b"")  # a mapped file would be lost now
    assert np.isfinite(weights["model.embed_tokens.weight"]).all()


def test_small_files_are_read_and_large_ones_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "m")
    elements = sum(tensor.size for tensor in read_folder(folder).values())
    with pytest.raises(MemoryError):
        load(folder, max_bytes=4 * elements - 1)
    _, weights = load(folder, max_bytes=4 * elements)
    assert describe(folder)["bytes_resident"] == 4 * elements
    monkeypatch.setattr(checkpoint, "MAPPED_FROM", 4 * elements)
    load(folder, max_bytes=0)
    assert describe(folder)["bytes_resident"] == 0
    (folder / "model.safetensors").write_bytes(b"")  # a mapped file would be lost now
    assert np.isfinite(weights["model.embed_tokens.weight"]).all()


# Memory


def test_the_estimate_is_what_loading_allocates(tmp_path: Path) -> None:
    tensors = {n: Stored("BF16", to_bf16(a)) for n, a in random_tensors().items()}
    config, stored = read_checkpoint(write_checkpoint(tmp_path / "m", tensors))
    elements = sum(tensor.size for tensor in stored.values())
    vectors = sum(t.size for t in stored.values() if len(t.shape) == 1)
    for dtype, expected in [
        (np.float32, 4 * elements),
        (np.float64, 8 * elements),
        ("bfloat16", 4 * vectors),
    ]:
        assert sum(resident_bytes(t, dtype) for t in stored.values()) == expected
    assert canonical_names(stored, config).keys() == stored.keys()


def test_too_little_memory_is_told_with_the_estimate_before_it_is_taken(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    elements = sum(tensor.size for tensor in read_folder(folder).values())
    load(folder, np.float64, max_bytes=8 * elements)
    with pytest.raises(MemoryError, match=r"GB of memory as float64, more than the limit"):
        load(folder, np.float64, max_bytes=8 * elements - 1)
    load(folder, np.float32, max_bytes=0, mmap=True)  # nothing is allocated
    with pytest.raises(MemoryError):
        load(folder, np.float32, max_bytes=0, mmap=False)


def test_a_tied_embedding_is_counted_once(tmp_path: Path) -> None:
    tensors = {n: a for n, a in random_tensors().items() if n != "lm_head.weight"}
    folder = write_checkpoint(tmp_path / "m", tensors, tie_word_embeddings=True)
    elements = sum(array.size for array in tensors.values())
    load(folder, np.float64, max_bytes=8 * elements)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_load_unless_asked_for(tmp_path: Path, value: float) -> None:
    tensors = random_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    tensors["model.layers.0.mlp.up_proj.weight"][4, 1] = value
    folder = write_checkpoint(tmp_path / "m", tensors)
    load(folder)
    with pytest.raises(CheckpointError, match=r"2 numbers that are not finite.*\(3, 5\)") as e:
        load(folder, check_finite=True)
    assert e.value.tensor == "model.layers.0.mlp.up_proj.weight"
