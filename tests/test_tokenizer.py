"""The core tokenizer: exact ids, whole characters, and no control token from a user's text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from systems import POSIX
from tokenizers_for_tests import LLAMA3_SPECIAL, byte_level_json, train_sentencepiece, write_folder

from llama_np.errors import TokenizerError
from llama_np.hf_tokenizer import convert_sentencepiece
from llama_np.sentencepiece_model import Piece, build_model, parse_pieces
from llama_np.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

CONTROL = ["<s>", "</s>", "<unk>", *LLAMA3_SPECIAL, "<think>"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
# Text of a user who knows the control tokens, spaces and characters outside the vocabulary.
TRICKY = st.lists(st.sampled_from([*CONTROL, " ", "  ", "a", "prince", "é", "😀", "▁", "<", "s>"]))


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: bytes) -> Path:
    return write_folder(tmp_path_factory.mktemp("llama2"), tokenizer_model=model)


@pytest.fixture(scope="module")
def llama2(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def llama3_json() -> str:
    return byte_level_json(LLAMA3_SPECIAL, plain=["<think>"])


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory, llama3_json: str) -> Tokenizer:
    ids = {t["content"]: t["id"] for t in json.loads(llama3_json)["added_tokens"]}
    return load_tokenizer(
        write_folder(
            tmp_path_factory.mktemp("llama3"),
            tokenizer_json=llama3_json,
            tokenizer_config_json={
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
            },
            generation_config_json={"eos_token_id": [ids["<|end_of_text|>"], ids["<|eot_id|>"]]},
        )
    )


@pytest.fixture(params=["llama2", "llama3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    chosen: Tokenizer = request.getfixturevalue(request.param)
    return chosen


fixture_is_shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- encoding and decoding -------------------------------------------------------------------


@fixture_is_shared
@given(TEXT)
@example("  leading, and trailing  ")
def test_decoding_inverts_encoding(tokenizer: Tokenizer, text: str) -> None:
    expected = text.replace("▁", " ") if tokenizer.strips_space else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@given(TEXT)
def test_sentencepiece_gives_the_same_ids_and_text(
    model: bytes, llama2: Tokenizer, text: str
) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = llama2.encode(text, bos=False)
    assert ids == library.encode(text)
    assert llama2.decode(ids) == library.decode(ids)


@given(TEXT)
def test_tokenizers_gives_the_same_ids_and_text(
    llama3_json: str, llama3: Tokenizer, text: str
) -> None:
    library = tokenizers.Tokenizer.from_str(llama3_json)
    ids = llama3.encode(text)
    assert ids == library.encode(text).ids
    assert llama3.decode(ids) == library.decode(ids)


@fixture_is_shared
@given(TRICKY.map("".join))
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, bos=False)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == (text.replace("▁", " ") if tokenizer.strips_space else text)


@fixture_is_shared
@given(TRICKY.map("".join))
def test_control_tokens_are_read_on_request(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, bos=False, special=True)
    found = [name for name in CONTROL if name in tokenizer.special_tokens and name in text]
    assert all(tokenizer.special_tokens[name] in ids for name in found)
    assert tokenizer.encode_parts(tokenizer.split(text)) == ids


@pytest.fixture(scope="module")
def first_only(tmp_path_factory: pytest.TempPathFactory, model: bytes) -> Path:
    """A tokenizer.json as new versions write it: only the beginning gets a prefix space."""
    library = convert_sentencepiece(model)
    library.normalizer = tokenizers.normalizers.Sequence([])
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spec = library.to_str()
    return write_folder(tmp_path_factory.mktemp("metaspace"), tokenizer_json=spec)


@given(TRICKY.map("".join))
def test_a_prefix_for_the_beginning_only_is_understood(first_only: Path, text: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(first_only / "tokenizer.json"))
    tokenizer = load_tokenizer(first_only)
    ids = library.encode(text).ids
    assert tokenizer.encode(text, bos=False, special=True) == ids
    assert tokenizer.decode(ids) == library.decode(ids)


def test_bos_and_eos_frame_the_text(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("a prince", bos=False)
    assert tokenizer.encode("a prince", eos=True) == [
        tokenizer.bos_id,
        *plain,
        tokenizer.eos_ids[0],
    ]
    assert tokenizer.encode("") == [tokenizer.bos_id]


def test_every_piece_of_text_gets_the_prefix_space_only_in_the_legacy_way(
    tmp_path: Path, model: bytes, llama2: Tokenizer
) -> None:
    config = {"legacy": False}
    folder = write_folder(tmp_path, tokenizer_model=model, tokenizer_config_json=config)
    new = load_tokenizer(folder)
    assert llama2.tokens(llama2.encode("a<s>a", bos=False, special=True)) == ["▁a", "<s>", "▁a"]
    assert new.tokens(new.encode("a<s>a", bos=False, special=True)) == ["▁a", "<s>", "a"]
    assert new.encode("a prince") == llama2.encode("a prince")


def test_special_tokens_are_shown_on_request(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("prince", eos=True)
    bos, *_, eos = tokenizer.tokens(ids)
    space = " " if tokenizer.strips_space else ""
    assert tokenizer.decode(ids) == "prince"
    assert tokenizer.decode(ids, skip_special=False) == f"{bos}{space}prince{eos}"


def test_a_byte_that_is_not_utf8_is_replaced(llama2: Tokenizer) -> None:
    broken = [*llama2.encode("a😀")[:-1], *llama2.encode("b", bos=False)]
    assert llama2.decode(broken) == "a\ufffd b"


# --- streaming ---------------------------------------------------------------------------------


@fixture_is_shared
@given(st.data())
def test_a_stream_continues_the_prompt_exactly(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    cut = data.draw(st.integers(0, len(ids)))
    skip = data.draw(st.booleans())
    stream = tokenizer.decode_stream(prompt_ids=ids[:cut], skip_special=skip)
    streamed = "".join(map(stream.push, ids[cut:])) + stream.flush()
    shown = tokenizer.decode(ids[:cut], skip_special=skip)
    assert streamed == tokenizer.decode(ids, skip_special=skip)[len(shown) :]


@fixture_is_shared
@given(TEXT)
@example("👨‍👩‍👧 नमस्ते")
def test_a_stream_shows_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream = tokenizer.decode_stream()
    pieces = [*map(stream.push, ids), stream.flush()]
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) == tokenizer.decode(ids)


def test_only_the_first_space_of_a_text_is_its_prefix(llama2: Tokenizer) -> None:
    ids = llama2.encode(" a prince a")
    assert llama2.decode(ids) == " a prince a"
    stream = llama2.decode_stream(prompt_ids=llama2.encode("a"))
    assert stream.push(llama2.encode("a", bos=False)[0]) == " a"
    first = llama2.decode_stream(prompt_ids=llama2.encode(""))
    assert first.push(llama2.encode("a", bos=False)[0]) == "a"


# --- ids and text that are wrong ---------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**63])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, wrong: int) -> None:
    for method in (tokenizer.decode, tokenizer.tokens, tokenizer.encode_parts):
        with pytest.raises(IndexError, match=str(wrong)):
            method([wrong])
    with pytest.raises(IndexError):
        tokenizer.decode_stream().push(wrong)


@pytest.mark.parametrize("wrong", [1.0, True, "1", None, np.float32(1), np.bool_(True)])
def test_ids_must_be_integers(tokenizer: Tokenizer, wrong: object) -> None:
    with pytest.raises(TypeError):
        tokenizer.decode([wrong])  # type: ignore[list-item]


def test_arrays_of_ids_are_one_row(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a prince")
    assert tokenizer.decode(np.array(ids)) == "a prince"
    with pytest.raises(TypeError):
        tokenizer.decode(np.array([ids]))


def test_text_must_be_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError):
        tokenizer.encode(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


# --- files ---------------------------------------------------------------------------------------


def test_a_tokenizer_can_be_smaller_than_the_embedding_but_not_larger(llama2: Tokenizer) -> None:
    check_vocabulary(llama2, llama2.vocab_size)
    check_vocabulary(llama2, llama2.vocab_size + 64)
    with pytest.raises(TokenizerError, match=str(llama2.vocab_size)):
        check_vocabulary(llama2, llama2.vocab_size - 1)


def test_the_files_of_a_folder_name_its_ends(llama2: Tokenizer, llama3: Tokenizer) -> None:
    assert (llama2.bos_id, llama2.eos_ids, llama2.pad_id) == (1, (2,), None)
    names = [llama3.tokens([i])[0] for i in llama3.eos_ids]
    assert names == ["<|end_of_text|>", "<|eot_id|>"]


def test_the_sentencepiece_model_comes_first(
    tmp_path: Path, model: bytes, llama3_json: str, llama2: Tokenizer
) -> None:
    folder = write_folder(tmp_path, tokenizer_model=model, tokenizer_json=llama3_json)
    assert load_tokenizer(folder).vocab_size == llama2.vocab_size
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as Meta distributes LLaMA-3
    assert load_tokenizer(folder).encode("é", bos=False) != llama2.encode("é", bos=False)


def test_a_model_that_is_used_without_bos_gets_none(tmp_path: Path) -> None:
    spec = byte_level_json(["<|endoftext|>"], bos=False)
    config = {"bos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}
    folder = write_folder(tmp_path, tokenizer_json=spec, tokenizer_config_json=config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id is not None
    assert tokenizer.bos_id not in tokenizer.encode("a prince")


def test_added_tokens_extend_a_sentencepiece_model(
    tmp_path: Path, model: bytes, llama2: Tokenizer
) -> None:
    size = llama2.vocab_size
    folder = write_folder(tmp_path, tokenizer_model=model, added_tokens_json={"<|im_end|>": size})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("a<|im_end|>", bos=False, special=True)[-1] == size
    assert size not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode([size]) == "<|im_end|>"


def test_a_user_defined_control_piece_is_not_made_from_text(tmp_path: Path) -> None:
    model = train_sentencepiece(user_defined_symbols=["<|im_end|>"])
    added = {"3": {"content": "<|im_end|>", "special": True}}
    folder = write_folder(
        tmp_path, tokenizer_model=model, tokenizer_config_json={"added_tokens_decoder": added}
    )
    tokenizer = load_tokenizer(folder)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert library.encode("a<|im_end|>")[-1] == 3
    assert 3 not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>")) == "a<|im_end|>"


def pieces_with(model: bytes, **changed: Any) -> list[Piece]:
    pieces = parse_pieces(model)
    return [*pieces[:300], pieces[300]._replace(**changed), *pieces[301:]]


BAD_MODELS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda m: b"",
    "web page": lambda m: b"<!DOCTYPE html><html>not found</html>",
    "git-lfs": lambda m: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "tiktoken": lambda m: b"IQ== 0\nIg== 1\n",
    "JSON": lambda m: b'{"version": "1.0"}',
    "truncated": lambda m: m[: len(m) // 2],
    "SentencePiece": lambda m: b"\xff" * 40,
    "not finite": lambda m: build_model(pieces_with(m, score=float("nan"))),
    "model type": lambda m: m + b"\x12\x02\x18\x03",  # WORD
    "no eos": lambda m: m + b"\x12\x06\xfa\x02\x03zzz",
}


@pytest.mark.parametrize("kind", ["tokenizer.model", "folder"])
@pytest.mark.parametrize("clue", BAD_MODELS)
def test_a_bad_model_says_what_it_looks_like(
    tmp_path: Path, model: bytes, clue: str, kind: str
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(BAD_MODELS[clue](model))
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path if kind == "tokenizer.model" else tmp_path)
    assert clue in str(caught.value)
    assert repr(str(path)) in str(caught.value)


BAD_JSON: dict[str, Any] = {
    "not JSON": "[",
    "nested too deeply": "[" * 100_000,
    "no model": "{}",
    "an id twice": lambda s: s["model"]["vocab"].update(twice=5),
    "an id below zero": lambda s: s["model"]["vocab"].update(below=-1),
    "a huge id": lambda s: s["model"]["vocab"].update(huge=4 * 10**9),
    "an id that is text": lambda s: s["model"]["vocab"].update(text="7"),
    "a clashing added token": lambda s: s["added_tokens"].append({"id": 5, "content": "<clash>"}),
    "an empty added token": lambda s: s["added_tokens"].append({"id": 500, "content": ""}),
    "an unknown model": lambda s: s["model"].update(type="Nonsense"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_tokenizer_json_is_refused(tmp_path: Path, llama3_json: str, case: str) -> None:
    change = BAD_JSON[case]
    if isinstance(change, str):
        text = change
    else:
        spec = json.loads(llama3_json)
        change(spec)
        text = json.dumps(spec)
    folder = write_folder(tmp_path, tokenizer_json=text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(folder)


def test_an_unknown_decoder_is_not_guessed_at(tmp_path: Path, llama3_json: str) -> None:
    spec = {**json.loads(llama3_json), "decoder": {"type": "WordPiece", "prefix": "##"}}
    spec["decoder"]["cleanup"] = True
    with pytest.raises(NotImplementedError, match="WordPiece"):
        load_tokenizer(write_folder(tmp_path, tokenizer_json=spec))


@pytest.mark.parametrize("value", [-1, 10**6, 1.5, "</s>", [None]])
def test_an_eos_that_is_no_id_is_refused(tmp_path: Path, model: bytes, value: object) -> None:
    config = {"eos_token_id": value}
    folder = write_folder(tmp_path, tokenizer_model=model, generation_config_json=config)
    with pytest.raises(TokenizerError, match="eos_token_id"):
        load_tokenizer(folder)


def test_what_is_not_there_or_not_a_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(IsADirectoryError):
        load_tokenizer(tmp_path)


@POSIX
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match="not a regular file"):
        load_tokenizer(tmp_path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_model_loads_or_says_so(
    tmp_path: Path, model: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(model)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "tokenizer.model").write_bytes(damaged)
    try:
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("a prince"))
    except (ValueError, NotImplementedError):
        pass
