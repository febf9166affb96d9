"""GGUF files as the package gguf writes them: numbers, names, row order, vocabulary."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from llama_np import LlamaForCausalLM, LlamaTokenizer, hidden_states, load, load_tokenizer, logits
from llama_np.checkpoint import locate
from llama_np.cli import main
from llama_np.convert import convert
from llama_np.errors import CheckpointError
from llama_np.gguf_file import TYPES, dequantize, parse_gguf
from llama_np.gguf_model import _llama3_divisors
from llama_np.sentencepiece_model import parse_pieces

# The package reads them all; those named here are decoded without it.
OURS = ["Q8_0", "Q4_0", "Q4_K", "Q6_K"]
BORROWED = ["Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "MXFP4"]
SIZES = {"D": 256, "F": 512, "V": 288, "N": 8, "K": 2, "L": 2}  # rows fill blocks of 256
TOKENS = np.array([[1, 5, 17, 3, 44, 90]])


def random_blocks(kind: str, count: int = 400, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes whose float16 scales are finite."""
    _, _, width = next(t for t in TYPES.values() if t[0] == kind)
    blocks = np.random.default_rng(seed).integers(0, 256, (count, width), np.uint8)
    scale_bytes = {"Q8_0": [1], "Q4_0": [1], "Q4_K": [1, 3], "Q6_K": [209]}.get(kind, range(width))
    for byte in scale_bytes:  # the high byte: a clear top exponent bit keeps it below 2
        blocks[:, byte] &= 0xBF
    return blocks


@pytest.mark.parametrize("kind", OURS + BORROWED)
def test_every_block_decodes_to_the_numbers_of_the_package(kind: str) -> None:
    blocks = random_blocks(kind)
    expected = gguf.quants.dequantize(blocks, Kind[kind]).reshape(len(blocks), -1)
    found = dequantize(kind, blocks).reshape(len(blocks), -1)
    assert found.dtype == np.float32
    # The same float32 operations; Q4_K may associate the product of two scales differently.
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-6 * np.abs(expected).max())


def test_blocks_are_decoded_in_pieces_of_any_number() -> None:
    blocks = random_blocks("Q8_0", 20_000)
    assert np.array_equal(dequantize("Q8_0", blocks)[-5:], dequantize("Q8_0", blocks[-5:]))


def test_block_sizes_are_those_of_the_package() -> None:
    for number, (name, block, width) in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[Kind(number)] == (block, width), name


def llama_names(layers: int) -> dict[str, str]:
    """GGUF's name of each of Hugging Face's tensors."""
    pairs = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    names["model.norm.weight"] = "output_norm.weight"
    for i in range(layers):
        for theirs, ours in pairs.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    return names


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def random_model(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names."""
    rng, s = np.random.default_rng(seed), SIZES
    keys = s["D"] // s["N"] * s["K"]
    layer = {
        "self_attn.q_proj": (s["D"], s["D"]),
        "self_attn.k_proj": (keys, s["D"]),
        "self_attn.v_proj": (keys, s["D"]),
        "self_attn.o_proj": (s["D"], s["D"]),
        "mlp.gate_proj": (s["F"], s["D"]),
        "mlp.up_proj": (s["F"], s["D"]),
        "mlp.down_proj": (s["D"], s["F"]),
        "input_layernorm": (s["D"],),
        "post_attention_layernorm": (s["D"],),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (s["V"], s["D"]),
        "lm_head.weight": (s["V"], s["D"]),
        "model.norm.weight": (s["D"],),
    }
    for i in range(s["L"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {n: (rng.standard_normal(z) / 16).astype(np.float32) for n, z in shapes.items()}


VOCABULARY = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{b:02X}>" for b in range(256)),
    "\u2581a",
    "b",
    "\u2581",
]


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    kind: Kind = Kind.F32,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    vocabulary: bool = True,
) -> dict[str, np.ndarray]:
    """Write a model as llama.cpp's converter would; returns the weights after quantization."""
    s, names = SIZES, llama_names(SIZES["L"])
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(s["D"])
    writer.add_feed_forward_length(s["F"])
    writer.add_block_count(s["L"])
    writer.add_head_count(s["N"])
    writer.add_head_count_kv(s["K"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(s["D"] // s["N"])
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, *_value_type(value))
    if vocabulary:
        texts = VOCABULARY + [f"t{i}" for i in range(len(VOCABULARY), s["V"])]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(texts)
        writer.add_token_scores([float(-i) for i in range(s["V"])])
        kinds = [2, 3, 3] + [6] * 256 + [1] * (s["V"] - 259)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    kept: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        heads = s["N"] if "q_proj" in name else s["K"] if "k_proj" in name else 0
        data = permuted(array, heads) if heads else array
        used = kind if array.ndim == 2 else Kind.F32
        quantized = gguf.quants.quantize(data, used)
        writer.add_tensor(names[name], quantized, raw_dtype=used)
        wide = gguf.quants.dequantize(quantized, used).reshape(array.shape)
        kept[name] = _inverse(wide, heads) if heads else wide
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def _value_type(value: Any) -> tuple[Any]:
    kinds = {str: "STRING", float: "FLOAT32", bool: "BOOL", int: "UINT32"}
    return (gguf.GGUFValueType[kinds[type(value)]],)


def _inverse(weight: np.ndarray, heads: int) -> np.ndarray:
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def flat(weights: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if isinstance(value, dict):
            arrays |= flat(value, f"{name}.")
        else:
            arrays[prefix + name] = value
    return arrays


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_a_gguf_file_loads_directly_with_the_weights_it_was_made_of(
    tmp_path: Path, kind: str
) -> None:
    expected = write_gguf(tmp_path / "m.gguf", random_model(), Kind[kind])
    config, weights = load(tmp_path / "m.gguf")
    found = flat(weights)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert (config.rope_theta, config.rms_norm_eps) == (5000.0, 1e-5)
    assert config.sources["hidden_size"] == "the file"


def test_loading_and_converting_give_the_same_logits(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_model(), Kind.Q8_0)
    convert(tmp_path / "m.gguf", tmp_path / "hf")
    for mmap in (True, False):
        found = []
        for name in ("m.gguf", "hf"):
            config, weights = load(tmp_path / name, mmap=mmap)
            found.append(logits(hidden_states(TOKENS, weights, config), weights))
        assert np.array_equal(found[0], found[1])
    assert load_tokenizer(tmp_path / "hf").encode("a b") == load_tokenizer(
        tmp_path / "m.gguf"
    ).encode("a b")


def test_inspection_shows_the_formats_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "m.gguf", random_model(), Kind.Q4_0)
    assert main(["inspect", "--model", str(tmp_path / "m.gguf"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["dtypes"] == ["F32", "Q4_0"]
    assert summary["bytes_on_disk"] == (tmp_path / "m.gguf").stat().st_size


def test_a_tied_head_is_left_out_of_the_file(tmp_path: Path) -> None:
    weights = random_model()
    del weights["lm_head.weight"]
    write_gguf(tmp_path / "m.gguf", weights)
    config, loaded = load(tmp_path / "m.gguf")
    assert config.tie_word_embeddings
    assert loaded["lm_head.weight"] is loaded["model.embed_tokens.weight"]


def test_float32_tensors_stay_in_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_model())
    _, weights = load(tmp_path / "m.gguf")
    down = weights["model.layers.0"]["mlp.down_proj.weight"]
    assert not down.flags.writeable and not down.flags.owndata


def test_llama3_frequencies_are_recognized(tmp_path: Path) -> None:
    recipe = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    pairs = SIZES["D"] // SIZES["N"] // 2
    frequencies = 5000.0 ** (-np.arange(pairs) / pairs)
    divisors = _llama3_divisors(frequencies, recipe).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", random_model(), extra={"rope_freqs.weight": divisors})
    config, _ = load(tmp_path / "m.gguf")
    assert dict(config.rope_scaling) == recipe


def test_other_frequencies_are_taken_as_they_are(tmp_path: Path) -> None:
    pairs = SIZES["D"] // SIZES["N"] // 2
    divisors = np.linspace(1, 3, pairs).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", random_model(), extra={"rope_freqs.weight": divisors})
    config, _ = load(tmp_path / "m.gguf")
    assert config.rope_scaling["rope_type"] == "longrope"
    assert config.rope_scaling["attention_factor"] == 1.0
    assert config.rope_scaling["long_factor"] == divisors.tolist()


@pytest.mark.parametrize(
    "keys, error",
    [
        ({"llama.expert_count": 8}, NotImplementedError),
        ({"split.count": 3}, NotImplementedError),
        ({"llama.attention.key_length": 64}, NotImplementedError),
        ({"llama.rope.scaling.type": "magic"}, NotImplementedError),
    ],
)
def test_models_that_would_come_out_wrong_are_refused(
    tmp_path: Path, keys: dict[str, Any], error: type[Exception]
) -> None:
    write_gguf(tmp_path / "m.gguf", random_model(), keys=keys)
    with pytest.raises(error, match=r"m\.gguf"):
        load(tmp_path / "m.gguf")


def test_linear_scaling_is_understood(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    write_gguf(tmp_path / "m.gguf", random_model(), keys=keys)
    config, _ = load(tmp_path / "m.gguf")
    assert dict(config.rope_scaling) == {"rope_type": "linear", "factor": 2.5}


def test_another_architecture_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NotImplementedError, match="mamba"):
        load(tmp_path / "m.gguf")


# The vocabulary


def write_vocabulary(path: Path, model: str, texts: list[str], **keys: Any) -> Path:
    """A file of metadata with a vocabulary and one tiny tensor."""
    writer = GGUFWriter(path, "llama")
    for name in ("context_length", "embedding_length", "feed_forward_length", "block_count"):
        writer.add_uint32(f"llama.{name}", 32)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(texts)
    for key, value in keys.items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, *_list_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((len(texts), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _list_type(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        return _value_type(value)
    return gguf.GGUFValueType.ARRAY, _value_type(value[0])[0]


def test_the_bundled_vocabulary_survives_gguf(tmp_path: Path) -> None:
    pieces = parse_pieces((locate("fairytales") / "tokenizer.model").read_bytes())
    path = write_vocabulary(
        tmp_path / "v.gguf",
        "llama",
        [piece.text for piece in pieces],
        scores=[piece.score for piece in pieces],
        token_type=[piece.kind for piece in pieces],
        bos_token_id=1,
        eos_token_id=2,
    )
    original, found = load_tokenizer("fairytales"), load_tokenizer(path)
    for text in ("Once upon a time", "  two  spaces", "Ö🙂\n", "", "<s>not a control</s>"):
        assert found.encode(text) == original.encode(text)
        assert found.decode(found.encode(text)) == original.decode(original.encode(text))
    assert (found.bos_id, found.eos_ids) == (original.bos_id, original.eos_ids)


def test_the_classes_take_a_file_too(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_model())
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path / "m.gguf")
    text = "a b"
    ids = tokenizer(text).input_ids
    assert ids == load_tokenizer(tmp_path / "m.gguf").encode(text)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert LlamaTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == ids
    model = LlamaForCausalLM.from_pretrained(tmp_path / "m.gguf")
    config, weights = load(tmp_path / "m.gguf")
    expected = logits(hidden_states(TOKENS, weights, config), weights)
    # The classes compute rotary angles in float32, as transformers does.
    np.testing.assert_allclose(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_user_defined_tokens_are_shown_but_never_found_in_a_users_text(tmp_path: Path) -> None:
    texts = ["<unk>", "<s>", "</s>", "<|user|>", *map(chr, range(32, 127)), "\u2581"]
    kinds = [2, 3, 3, 4] + [1] * (len(texts) - 4)
    scores = [0.0] * len(texts)
    path = write_vocabulary(
        tmp_path / "v.gguf", "llama", texts, scores=scores, token_type=kinds, bos_token_id=1
    )
    tokenizer = load_tokenizer(path)
    assert 3 not in tokenizer.encode("<|user|>")
    assert 3 in tokenizer.encode("<|user|>", special=True)
    assert tokenizer.decode([3]) == "<|user|>"


def byte_level_vocabulary() -> tuple[list[str], list[str], list[int]]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    letters = [chr(b) for b in visible] + [chr(256 + n) for n in range(len(hidden))]
    merged = ["Ġa", "Ġb", "bc", "Ġbc", "12", "123"]
    merges = ["Ġ a", "b c", "Ġ bc", "Ġ b", "1 2", "12 3"]
    texts = letters + merged + ["<|begin|>", "<|end|>"]
    return texts, merges, [1] * (len(texts) - 2) + [3, 3]


@pytest.mark.parametrize(
    "rule, text, pieces",
    [
        ("llama-bpe", " bc1234", ["Ġbc", "123", "4"]),
        ("smollm", " bc123", ["Ġbc", "1", "2", "3"]),
        ("gpt-2", " bc1234", ["Ġbc", "123", "4"]),
    ],
)
def test_byte_level_vocabularies_become_a_tokenizer(
    tmp_path: Path, rule: str, text: str, pieces: list[str]
) -> None:
    texts, merges, kinds = byte_level_vocabulary()
    begin, end = len(texts) - 2, len(texts) - 1
    path = write_vocabulary(
        tmp_path / "v.gguf",
        "gpt2",
        texts,
        merges=merges,
        token_type=kinds,
        pre=rule,
        bos_token_id=begin,
        eos_token_id=end,
        add_bos_token=True,
    )
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text)
    assert ids[0] == begin and tokenizer.tokens(ids[1:]) == pieces
    assert tokenizer.decode(ids) == text
    assert end not in tokenizer.encode("<|end|>")
    assert tokenizer.eos_ids[0] == end


def test_an_unknown_way_to_cut_text_is_refused(tmp_path: Path) -> None:
    texts, merges, kinds = byte_level_vocabulary()
    path = write_vocabulary(
        tmp_path / "v.gguf", "gpt2", texts, merges=merges, token_type=kinds, pre="falcon"
    )
    with pytest.raises(NotImplementedError, match="falcon"):
        load_tokenizer(path)


def test_a_chat_template_comes_along(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_model(), keys={"tokenizer.chat_template": "{{ 'x' }}"})
    assert load_tokenizer(tmp_path / "m.gguf").chat_template == "{{ 'x' }}"
    convert(tmp_path / "m.gguf", tmp_path / "hf")
    saved = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert saved["chat_template"] == "{{ 'x' }}"


def test_a_file_without_a_vocabulary_says_so(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_model(), vocabulary=False)
    with pytest.raises(FileNotFoundError, match="vocabulary"):
        load_tokenizer(tmp_path / "m.gguf")
    with pytest.warns(UserWarning, match="converted without a tokenizer"):
        convert(tmp_path / "m.gguf", tmp_path / "hf")
    assert load(tmp_path / "hf")[0] == load(tmp_path / "m.gguf")[0]


def test_a_large_vocabulary_is_read_quickly_and_in_little_memory(tmp_path: Path) -> None:
    # Two strings of LLaMA 3's number; the package's own reader needs seven seconds for them.
    def strings(key: str, count: int) -> bytes:
        text = [struct.pack("<Q", 8) + b"%08d" % i for i in range(count)]
        head = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IIQ", 9, 8, count)
        return head + b"".join(text)

    body = strings("a", 128_256) + strings("b", 280_147)
    path = tmp_path / "v.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + body)
    assert len(parse_gguf(path).metadata["b"]) == 280_147


def test_numbers_in_arrays_take_no_time_whatever_their_count(tmp_path: Path) -> None:
    count = 5_000_000
    head = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, count)
    path = tmp_path / "v.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + head + bytes(count))
    assert parse_gguf(path).metadata["a"].size == count


def test_a_truncated_file_is_no_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_model())
    content = (tmp_path / "m.gguf").read_bytes()
    for size in (0, 3, 8, 23, 100, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            load(tmp_path / "cut.gguf")
