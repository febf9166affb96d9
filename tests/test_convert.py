"""Conversions between formats: the logits stay the same, and output is whole or absent."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meta_llama import meta_logits, random_meta_model, shards_of
from torch_files import torch_file

from llama_np import hidden_states, logits
from llama_np.checkpoint import load, load_tokenizer, read_folder
from llama_np.cli import main
from llama_np.convert import convert
from llama_np.errors import CheckpointError, ConfigError, TokenizerError
from llama_np.meta import hidden_size_of
from llama_np.precision import to_bf16, widen_bf16
from llama_np.weights import Stored, save_tensors

TOKENS = [1, 17, 3, 29, 30, 5]
PARAMS = {"dim": 48, "n_layers": 2, "n_heads": 12, "n_kv_heads": 4, "norm_eps": 1e-5}
HIDDEN, VOCABULARY = 40, 36


def meta_folder(
    path: Path, params: dict[str, Any], shards: int = 1, dtype: Any = np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    """Write a checkpoint as Meta ships it; returns its weights."""
    path.mkdir(parents=True)
    weights = random_meta_model(params, HIDDEN, VOCABULARY, seed)
    for number, shard in enumerate(shards_of(weights, shards)):
        if dtype is np.uint16:
            content = torch_file({name: to_bf16(array) for name, array in shard.items()})
        else:
            content = torch_file({n: a.astype(dtype, copy=False) for n, a in shard.items()})
        (path / f"consolidated.{number:02d}.pth").write_bytes(content)
    (path / "params.json").write_text(json.dumps(params))
    return weights


def our_logits(path: Path) -> np.ndarray:
    config, weights = load(path, np.float64)
    hidden = hidden_states(np.array([TOKENS]), weights, config)
    return logits(hidden, weights)[0]


# n_kv_heads² = n_heads is all that the original script can do; 12/4, 12/3, 12/1, 12/12 are not.
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("groups", [12, 4, 1, 6])
def test_a_converted_meta_checkpoint_has_the_logits_of_metas_convention(
    tmp_path: Path, shards: int, groups: int
) -> None:
    params = PARAMS | {"n_kv_heads": groups, "rope_theta": 5000.0}
    weights = meta_folder(tmp_path / "meta", params, shards)
    convert(tmp_path / "meta", tmp_path / "hf")
    expected = meta_logits(TOKENS, params, weights)
    # Both in float64; theta's powers differ in the last bits.
    np.testing.assert_allclose(our_logits(tmp_path / "hf"), expected, rtol=1e-9, atol=1e-9)


def test_one_and_four_shards_convert_to_the_same_file(tmp_path: Path) -> None:
    for shards in (1, 4):
        meta_folder(tmp_path / f"meta{shards}", PARAMS, shards)
        convert(tmp_path / f"meta{shards}", tmp_path / f"hf{shards}")
    files = [(tmp_path / f"hf{n}" / "model.safetensors").read_bytes() for n in (1, 4)]
    assert files[0] == files[1]


def test_an_embedding_that_is_cut_by_words_is_joined_by_words(tmp_path: Path) -> None:
    weights = meta_folder(tmp_path / "meta", PARAMS, 2)
    rows = np.split(weights["tok_embeddings.weight"], 2)
    for number, shard in enumerate(shards_of(weights, 2)):
        shard["tok_embeddings.weight"] = np.ascontiguousarray(rows[number])
        (tmp_path / "meta" / f"consolidated.{number:02d}.pth").write_bytes(torch_file(shard))
    convert(tmp_path / "meta", tmp_path / "hf")
    embedding = read_folder(tmp_path / "hf")["model.embed_tokens.weight"]
    assert np.array_equal(embedding.array, weights["tok_embeddings.weight"])


@pytest.mark.parametrize("dtype, name", [(np.float16, "F16"), (np.uint16, "BF16")])
def test_the_precision_of_the_original_is_kept(tmp_path: Path, dtype: Any, name: str) -> None:
    meta_folder(tmp_path / "meta", PARAMS, 2, dtype)
    convert(tmp_path / "meta", tmp_path / "hf")
    assert {tensor.dtype for tensor in read_folder(tmp_path / "hf").values()} == {name}
    names = {"F16": "float16", "BF16": "bfloat16"}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == names[name]


def test_a_wished_precision_is_rounded_to_nearest(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "meta", tmp_path / "bf16", dtype="bfloat16")
    exact, rounded = read_folder(tmp_path / "hf"), read_folder(tmp_path / "bf16")
    for name, tensor in exact.items():
        assert np.array_equal(rounded[name].widened(), widen_bf16(to_bf16(tensor.array)))


def test_the_configuration_follows_from_params_json(tmp_path: Path) -> None:
    params = PARAMS | {"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": -1}
    meta_folder(tmp_path / "meta", params)
    convert(tmp_path / "meta", tmp_path / "hf")
    config, _ = load(tmp_path / "hf")
    assert (config.num_key_value_heads, config.intermediate_size) == (4, HIDDEN)
    assert (config.vocab_size, config.rms_norm_eps) == (VOCABULARY, 1e-5)
    assert config.max_position_embeddings == 131072
    assert config.rope_scaling["rope_type"] == "llama3"


def test_the_small_files_that_transformers_writes_come_along(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    (tmp_path / "tokenizer.model").write_bytes(b"any vocabulary of SentencePiece")
    convert(tmp_path / "meta", tmp_path / "hf")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    settings |= {"add_bos_token": True, "add_eos_token": False}
    expected = {
        "tokenizer_config.json": settings | names,
        "special_tokens_map.json": names,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    }
    for name, content in expected.items():
        assert json.loads((tmp_path / "hf" / name).read_text()) == content


@pytest.mark.parametrize(
    "params, width",
    [
        ({"multiple_of": 256}, {4096: 11008, 5120: 13824, 6656: 17920, 8192: 22016}),
        ({"multiple_of": 4096, "ffn_dim_multiplier": 1.3}, {8192: 28672}),
        ({"multiple_of": 1024, "ffn_dim_multiplier": 1.3}, {4096: 14336}),
    ],
)
def test_metas_formula_gives_the_published_widths(
    params: dict[str, Any], width: dict[int, int]
) -> None:
    assert {dim: hidden_size_of(params, dim) for dim in width} == width


def test_params_of_another_model_are_refused(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    for change, error in [
        ({"multiple_of": 256}, CheckpointError),
        ({"n_kv_heads": 6}, CheckpointError),
        ({"dim": 24}, CheckpointError),
        ({"n_heads": 0}, ConfigError),
        ({"n_layers": 3}, CheckpointError),
    ]:
        (tmp_path / "meta" / "params.json").write_text(json.dumps(PARAMS | change))
        with pytest.raises(error):
            convert(tmp_path / "meta", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS, 4)
    (tmp_path / "meta" / "consolidated.01.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"consolidated\.01\.pth"):
        convert(tmp_path / "meta", tmp_path / "hf")


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_to_meta_and_back_changes_no_bit(tmp_path: Path, shards: int) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again", to="meta", shards=shards)
    assert len(list((tmp_path / "again").glob("consolidated.*.pth"))) == shards
    convert(tmp_path / "again", tmp_path / "hf2")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "hf2" / name).read_bytes()


def test_hugging_faces_pickles_become_safetensors(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    convert(tmp_path / "meta", tmp_path / "hf")
    tensors = {name: t.array for name, t in read_folder(tmp_path / "hf").items()}
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    (old / "pytorch_model.bin").write_bytes(torch_file(tensors))
    with pytest.raises(CheckpointError, match="convert it first"):
        load(old)
    convert(old, tmp_path / "one")
    names = sorted(tensors)
    halves = {"a.bin": names[::2], "b.bin": names[1::2]}
    (old / "pytorch_model.bin").unlink()
    for file, part in halves.items():
        (old / file).write_bytes(torch_file({name: tensors[name] for name in part}))
    places = {name: file for file, part in halves.items() for name in part}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    convert(old, tmp_path / "two")
    for folder in ("one", "two"):
        written = read_folder(tmp_path / folder)
        assert all(np.array_equal(written[name].array, tensors[name]) for name in tensors)


def test_large_output_is_cut_into_shards_with_an_index(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "meta", tmp_path / "cut", shard_bytes=20_000)
    shards = list((tmp_path / "cut").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    whole, cut = read_folder(tmp_path / "hf"), read_folder(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(np.array_equal(whole[name].array, cut[name].array) for name in whole)


def test_existing_output_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    convert(tmp_path / "meta", tmp_path / "hf")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="not empty"):
        convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "meta", tmp_path / "hf", dtype="float16", overwrite=True)
    assert read_folder(tmp_path / "hf")["model.norm.weight"].dtype == "F16"
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.odt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"letters\.odt"):
        convert(tmp_path / "meta", home, overwrite=True)
    assert (home / "letters.odt").read_text() == "dear"


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    before = sorted(tmp_path.iterdir())

    def fail(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    for to in ("hf", "meta", "llama2c"):
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "meta", tmp_path / "out.bin", to=to, progress=fail)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.filterwarnings("ignore:the classification head is left out")
def test_models_of_one_folder_share_an_equal_tokenizer_and_no_other(tmp_path: Path) -> None:
    for name in ("one.bin", "two.bin"):
        convert("fairytales", tmp_path / name, to="llama2c")
    (tmp_path / "tokenizer.bin").write_bytes(b"another")
    with pytest.raises(FileExistsError, match=r"tokenizer\.bin"):
        convert("fairytales", tmp_path / "three.bin", to="llama2c")
    assert (tmp_path / "tokenizer.bin").read_bytes() == b"another"
    assert not (tmp_path / "three.bin").exists()


@pytest.mark.parametrize(
    "options",
    [{}, {"to": "meta", "shards": 2}, {"to": "llama2c"}, {"to": "llama2c", "version": 2}],
)
def test_progress_counts_every_tensor(tmp_path: Path, options: dict[str, Any]) -> None:
    steps: list[tuple[int, int]] = []
    with contextlib.nullcontext() if not options else pytest.warns(UserWarning, match="head"):
        convert(
            "fairytales", tmp_path / "out", progress=lambda *step: steps.append(step), **options
        )
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]


def test_the_bundled_model_survives_every_format(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="classification head"):
        convert("fairytales", tmp_path / "m", to="meta")
    convert(tmp_path / "m", tmp_path / "hf")
    config, weights = load("fairytales", np.float64)
    tokens = np.array([load_tokenizer("fairytales").encode("Once upon a time")])
    expected = logits(hidden_states(tokens, weights, config), weights)
    other, copies = load(tmp_path / "hf", np.float64)
    found = logits(hidden_states(tokens, copies, other), copies)
    assert np.array_equal(found, expected)
    assert load_tokenizer(tmp_path / "hf").encode("A king") == load_tokenizer().encode("A king")


def test_float8_becomes_float32(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    convert(tmp_path / "meta", tmp_path / "hf")
    tensors: dict[str, Any] = dict(read_folder(tmp_path / "hf"))
    codes = np.arange(48 * 48, dtype=np.int64).reshape(48, 48) % 120
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = Stored("F8_E4M3", codes.astype(np.uint8))
    save_tensors(tmp_path / "hf" / "model.safetensors", tensors, overwrite=True)
    convert(tmp_path / "hf", tmp_path / "wide")
    wide = read_folder(tmp_path / "wide")[name]
    assert wide.dtype == "F32"
    assert np.array_equal(wide.array, tensors[name].widened())


def test_the_command_converts_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    meta, out = str(tmp_path / "meta"), str(tmp_path / "hf")
    assert main(["convert", meta, out, "--dtype", "float16", "--context", "99"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"wrote {out}\n"  # no progress line: this is no terminal
    assert load(out)[0].max_position_embeddings == 99
    assert main(["convert", meta, out]) == 1
    assert capsys.readouterr().err.startswith("llama-np: error: folder exists and is not empty")
    assert main(["convert", meta, out, "--overwrite"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["convert", meta, out, "--to", "onnx"])


def test_the_command_leaves_nothing_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    meta_folder(tmp_path / "meta", PARAMS)
    monkeypatch.setattr("llama_np.convert.write_atomically", interrupt)
    assert main(["convert", str(tmp_path / "meta"), str(tmp_path / "hf")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_llama3s_vocabulary_becomes_a_tokenizer_json(tmp_path: Path) -> None:
    """Against byte pairs merged by rank, as tiktoken defines them."""
    words = [
        b"th",
        b"he",
        b" t",
        b" th",
        b"the",
        b" the",
        b"in",
        b"12",
        b"123",
        b"\xc3\xa9",
        b"\n\n",
    ]
    ranks = {bytes([b]): b for b in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    lines = [base64.b64encode(word) + b" %d\n" % rank for word, rank in ranks.items()]
    meta_folder(tmp_path / "meta", PARAMS)
    (tmp_path / "meta" / "tokenizer.model").write_bytes(b"".join(lines))
    convert(tmp_path / "meta", tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    text = "the the th\xe9in 12345\n\n"
    assert tokenizer.encode(text, bos=False) == [
        rank for chunk in cut(text) for rank in merged_by_rank(chunk, ranks)
    ]
    first = len(ranks)
    assert tokenizer.encode("")[:1] == [first]  # <|begin_of_text|>
    assert tokenizer.tokens([first + 9, first + 255]) == [
        "<|eot_id|>",
        "<|reserved_special_token_247|>",
    ]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def cut(text: str) -> list[bytes]:
    """LLaMA 3's rule, for the letters, digits and spaces of the test above."""
    parts = re.findall(r" ?[^\W\d]+|\d{1,3}| ?[^\s\w]+|\s*\n+|\s+", text)
    return [part.encode() for part in parts]


def merged_by_rank(chunk: bytes, ranks: dict[bytes, int]) -> list[int]:
    if chunk in ranks:
        return [ranks[chunk]]
    parts = [bytes([byte]) for byte in chunk]
    while True:
        pairs = [
            (ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts))
        ]
        rank, place = min(pairs, default=(1 << 30, 0))
        if rank == 1 << 30:
            return [ranks[part] for part in parts]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@pytest.mark.parametrize("damage", [b"!!! 0\n", b"AA== 7\n", b"AA==\n"])
def test_damaged_vocabularies_of_llama3_are_refused(tmp_path: Path, damage: bytes) -> None:
    lines = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)]
    meta_folder(tmp_path / "meta", PARAMS)
    (tmp_path / "meta" / "tokenizer.model").write_bytes(b"".join(lines) + damage)
    with pytest.raises(TokenizerError, match=r"line 257"):
        convert(tmp_path / "meta", tmp_path / "hf")


def test_an_inner_model_object_in_params_json_is_unwrapped(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    (tmp_path / "meta" / "params.json").write_text(json.dumps({"model": PARAMS}))
    convert(tmp_path / "meta", tmp_path / "hf")
    assert load(tmp_path / "hf")[0].hidden_size == PARAMS["dim"]


def test_rope_scaling_is_spelled_so_that_every_version_reads_it(tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS)
    convert(tmp_path / "meta", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"rope_scaling": {"rope_type": "linear", "factor": 2}}))
    convert(tmp_path / "hf", tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_labels_of_a_classifier_are_kept(tmp_path: Path) -> None:
    convert("fairytales", tmp_path / "hf")
    assert load(tmp_path / "hf")[0].id2label == load("fairytales")[0].id2label
