"""LlamaTokenizer and LlamaTokenizerFast: the answers of transformers 4.37.2, or better."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recorded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import LLAMA3_SPECIAL, byte_level_json, train_sentencepiece, write_folder

from llama_np.checkpoint import locate
from llama_np.errors import ChatTemplateError, TokenizerError
from llama_np.hf_auto import AutoTokenizer
from llama_np.hf_tokenizer import (
    AddedToken,
    BatchEncoding,
    LlamaTokenizer,
    LlamaTokenizerFast,
    PreTrainedTokenizerFast,
)

CLASSES: dict[str, Any] = {
    "LlamaTokenizer": LlamaTokenizer,
    "LlamaTokenizerFast": LlamaTokenizerFast,
}
BOTH = pytest.mark.parametrize("cls", CLASSES.values(), ids=list(CLASSES))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PIECES = ["<s>", "</s>", "<unk>", " ", "  ", "a", "prince", "é", "😀", "▁", "<", "s>", "\n"]
TRICKY = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
shared = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = train_sentencepiece()
    return write_folder(tmp_path_factory.mktemp("checkpoint"), tokenizer_model=model)


@pytest.fixture(scope="module")
def slow(folder: Path) -> LlamaTokenizer:
    return LlamaTokenizer(folder / "tokenizer.model", legacy=False, pad_token="<unk>")


@pytest.fixture(scope="module")
def old(folder: Path) -> LlamaTokenizer:
    return LlamaTokenizer(folder / "tokenizer.model", pad_token="<unk>")


@pytest.fixture(scope="module")
def fast(folder: Path) -> LlamaTokenizerFast:
    return LlamaTokenizerFast(folder / "tokenizer.model", pad_token="<unk>")


@pytest.fixture(params=["slow", "old", "fast"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# --- transformers 4.37.2 -------------------------------------------------------------------------


def plain(value: Any) -> Any:
    if isinstance(value, BatchEncoding | dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


CASES = recorded.recorded("tokenizer")


@pytest.mark.parametrize("case", CASES, ids=recorded.ids(CASES))
def test_every_recorded_call_gets_the_recorded_answer(case: recorded.Recorded) -> None:
    tokenizer = CLASSES[case.entry["class"]](case.tokenizer_file, **case.arguments)
    for method, (tokens,), options in case.entry["setup"]:
        getattr(tokenizer, method)([AddedToken(**token) for token in tokens], **options)
    for call in case.calls():
        method = getattr(tokenizer, call["method"])
        if "raises" in call:
            with pytest.raises(Exception) as caught:
                method(*call["arguments"], **call["keywords"])
            name = call["raises"].replace("TemplateError", "ChatTemplateError")
            assert type(caught.value).__name__ == name, call
        else:
            assert plain(method(*call["arguments"], **call["keywords"])) == call["result"], call


def test_a_conversation_without_a_user_is_refused() -> None:
    case = recorded.one("tokenizer-silent")
    tokenizer = LlamaTokenizer(case.tokenizer_file)
    for call in case.calls():
        assert not call["result"]  # 4.37.2 drops the message in silence
        with pytest.raises(ChatTemplateError):
            tokenizer.apply_chat_template(*call["arguments"], **call["keywords"])


@given(TRICKY)
def test_fast_and_legacy_slow_give_the_same_ids(
    fast: LlamaTokenizerFast, old: LlamaTokenizer, text: str
) -> None:
    assert fast(text)["input_ids"] == old(text)["input_ids"]


@shared
@given(TEXT)
def test_decoding_inverts_encoding(
    slow: LlamaTokenizer, fast: LlamaTokenizerFast, text: str
) -> None:
    for tokenizer in (slow, fast):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")


def test_only_the_beginning_has_a_prefix_space_unless_legacy(
    slow: LlamaTokenizer, old: LlamaTokenizer
) -> None:
    assert slow.tokenize("<s>a") == ["<s>", "a"]
    assert old.tokenize("<s>a") == ["<s>", "▁a"]


# --- control tokens in a text --------------------------------------------------------------------


@shared
@given(TRICKY)
def test_split_special_tokens_keeps_a_users_text_plain(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, split_special_tokens=True, add_special_tokens=False)
    assert not {0, 1, 2} & set(ids)


@shared
@given(TRICKY)
def test_a_safe_chat_has_only_the_control_tokens_of_its_template(tokenizer: Any, text: str) -> None:
    def control(content: str) -> list[int]:
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
        ids = tokenizer.apply_chat_template(messages, split_special_tokens=True)
        return [i for i in ids if i in (0, 1, 2)]

    assert control(text) == control("x") == [1, 2]


def test_a_chat_without_control_tokens_in_it_is_the_same_in_both_ways(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "a prince"}]
    default = tokenizer.apply_chat_template(messages)
    assert tokenizer.apply_chat_template(messages, split_special_tokens=True) == default
    array = tokenizer.apply_chat_template(
        messages, split_special_tokens=True, padding=True, max_length=50, return_tensors="np"
    )
    assert array.shape == (1, 50)


# --- batches -------------------------------------------------------------------------------------


@shared
@given(
    texts=st.lists(TRICKY, min_size=1, max_size=4),
    length=st.integers(4, 12),
    padding=st.sampled_from([False, True, "max_length"]),
)
def test_rows_are_cut_padded_and_masked(
    tokenizer: Any, texts: list[str], length: int, padding: bool | str
) -> None:
    batch = tokenizer(texts, truncation=True, max_length=length, padding=padding)
    whole = tokenizer(texts)["input_ids"]
    lengths = [min(len(ids), length) for ids in whole]
    target = {False: None, True: max(lengths), "max_length": length}[padding]
    for ids, mask, all_ids, used in zip(*batch.values(), whole, lengths, strict=True):
        assert len(ids) == len(mask) == (used if target is None else target)
        assert [i for i, m in zip(ids, mask, strict=True) if m] == all_ids[:used]
        assert sum(mask) == used


def test_arrays_come_on_request(tokenizer: Any) -> None:
    batch = tokenizer(["a", "a prince"], padding=True, return_tensors="np")
    assert batch.input_ids.dtype == np.int64
    assert batch.input_ids.shape == batch["attention_mask"].shape
    assert tokenizer("a", return_tensors="np").input_ids.ndim == 2
    ragged = tokenizer(["a", "a prince"], return_tensors="np").input_ids
    assert ragged.dtype == object
    assert tokenizer("", add_special_tokens=False, return_tensors="np").input_ids.dtype == np.int64


def test_pairs_targets_and_words(slow: LlamaTokenizer) -> None:
    a, b = slow("a").input_ids, slow("prince").input_ids
    pair = slow("a", "prince", return_token_type_ids=True)
    assert pair.input_ids == a + b
    assert pair.token_type_ids == [0] * len(a) + [1] * len(b)
    assert slow(["a"], text_target=["prince"])["labels"] == [b]
    assert slow(["a", "prince"], is_split_into_words=True).input_ids == [*a, *b[1:]]


def test_overflow_is_returned_by_both(slow: LlamaTokenizer, fast: LlamaTokenizerFast) -> None:
    options: dict[str, Any] = {"max_length": 4, "truncation": True, "stride": 1}
    whole = slow("a prince and a princess").input_ids
    one = slow("a prince and a princess", return_overflowing_tokens=True, **options)
    assert one.num_truncated_tokens == len(whole) - 4
    assert one.input_ids + one.overflowing_tokens[1:] == whole
    rows = fast("a prince and a princess", return_overflowing_tokens=True, **options)
    assert rows.overflow_to_sample_mapping == [0] * len(rows.input_ids)
    assert rows.input_ids[1][1] == rows.input_ids[0][-1]
    with pytest.raises(ValueError, match="stride"):
        fast("a prince and a princess", max_length=2, truncation=True, stride=5)
    with pytest.raises(ValueError, match="stride"):  # found only while cutting, by a panic of Rust
        fast("a prince " * 9, "a princess " * 9, max_length=6, truncation=True, stride=3)
    with pytest.raises(TypeError, match="max_length"):  # the class that 4.37.2 raises
        slow("a prince", return_overflowing_tokens=True)


def test_adding_a_token_again_counts_as_in_4_37_2(fast: LlamaTokenizerFast) -> None:
    # Counts observed in 4.37.2: a token is new as long as one of its flags is.
    piece = fast.convert_ids_to_tokens(300)
    assert fast.add_tokens([piece]) == 1
    assert fast.add_tokens([piece]) == 0
    assert fast.add_tokens([AddedToken(piece, lstrip=True)]) == 1
    assert fast.add_tokens([AddedToken(piece, lstrip=True)]) == 0
    assert fast.add_tokens(["<new>", "<new>", ""]) == 1
    assert fast.add_special_tokens({"pad_token": "</s>"}) == 0
    assert fast.add_tokens(["</s>"]) == 1
    assert fast.tokenize("a</s>")[-1] == "</s>"  # and it is still a control token
    assert fast.decode([300, fast.eos_token_id], skip_special_tokens=True) == fast.decode([300])


def test_normalized_follows_from_special_unless_it_was_given(
    slow: LlamaTokenizer, fast: LlamaTokenizerFast
) -> None:
    # Observed in 4.37.2, on the LLaMA-2 model: a fast special token is found inside a word.
    for said, found in (({}, False), ({"normalized": True}, True)):
        token = AddedToken("<mask>", lstrip=True, **said)
        assert fast.add_special_tokens({"mask_token": token}) == 1
        [made] = [t for t in fast.added_tokens_decoder.values() if t.content == "<mask>"]
        assert made == AddedToken("<mask>", lstrip=True, normalized=found, special=True)
        assert fast.special_tokens_map_extended["mask_token"] == made
        assert token.special is False  # the caller's own
    assert slow.add_special_tokens({"mask_token": AddedToken("<mask>")}) == 1
    made = slow.special_tokens_map_extended["mask_token"]
    assert made == AddedToken("<mask>", normalized=True, special=True)


def test_older_libraries_can_read_the_merge_rules_of_a_saved_tokenizer_json(
    fast: LlamaTokenizerFast, tmp_path: Path
) -> None:
    # 4.37.2 comes with tokenizers 0.15, which knows them as "a b" only, not as ["a", "b"].
    fast.save_pretrained(tmp_path)
    rules = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert rules and all(isinstance(rule, str) and rule.count(" ") == 1 for rule in rules)
    again = LlamaTokenizerFast.from_pretrained(tmp_path)
    assert again("A prince, 日本").input_ids == fast("A prince, 日本").input_ids


def test_moving_an_encoding_to_a_device_changes_nothing(slow: LlamaTokenizer) -> None:
    encoding = slow("a prince")
    assert encoding.to("cpu") is encoding and encoding.to(device="cpu") is encoding


def test_control_tokens_are_found_though_a_file_lists_them_as_normalized(tmp_path: Path) -> None:
    # As 4.37.2's slow tokenizer saves those of LLaMA-1; its fast one finds them all the same.
    folder = tmp_path / "model"
    shutil.copytree(locate("fairytales"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for token in config["added_tokens_decoder"].values():
        token["normalized"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = LlamaTokenizerFast.from_pretrained(folder)
    assert tokenizer.tokenize("a</s><s>b")[1:3] == ["</s>", "<s>"]
    assert all(token.normalized for token in tokenizer.added_tokens_decoder.values())


def test_a_special_token_keeps_its_flags_in_a_checkpoint_without_tokenizer_config(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = LlamaTokenizer(folder / "tokenizer.model")
    tokenizer.add_special_tokens({"pad_token": AddedToken("<z>", rstrip=True)})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    again = LlamaTokenizer.from_pretrained(tmp_path)
    assert again.added_tokens_decoder[tokenizer.pad_token_id].rstrip


def test_added_token_flags_are_heeded_by_the_fast_class(fast: LlamaTokenizerFast) -> None:
    assert fast.add_tokens(AddedToken("<x>", special=True)) == 1
    assert "<x>" not in fast.decode(fast.encode("a <x> b"), skip_special_tokens=True)
    assert "<x>" in fast.decode(fast.encode("a <x> b"))


@BOTH
def test_unknown_and_outdated_keywords_are_refused_by_name(cls: Any, folder: Path) -> None:
    tokenizer = cls(folder / "tokenizer.model")
    for name in ("truncation_strategy", "pad_to_max_length", "bogus"):
        with pytest.raises(TypeError, match=name):
            tokenizer("a", **{name: True})
    with pytest.raises(ValueError, match="max_length"):
        tokenizer("a", max_length=-1)


def test_wrong_tokens_are_refused(slow: LlamaTokenizer, fast: LlamaTokenizerFast) -> None:
    for tokenizer in (slow, fast):
        with pytest.raises(TypeError, match="list"):
            tokenizer.add_special_tokens({"additional_special_tokens": "x"})
        tokenizer.pad_token = "</s>"
        with pytest.raises(ValueError, match="integers"):
            tokenizer.pad({"input_ids": [["a"]]})
    with pytest.raises(TypeError, match="list"):
        slow.convert_tokens_to_string("text")


def test_a_fast_encoding_maps_tokens_words_and_characters(
    slow: LlamaTokenizer, fast: LlamaTokenizerFast
) -> None:
    # What 4.37.2 gives for the same calls on the LLaMA-2 model.
    text = fast("a prince")
    last = len(text.input_ids) - 1
    assert text.char_to_token(0) == 1 and text.char_to_token(7) == last
    assert text.token_to_chars(1) == (0, 1) and text.token_to_chars(0) is None
    span = text.word_to_tokens(0)
    assert span is not None and (span.start, span.end) == (1, last + 1)
    assert text.token_to_word(1) == 0 and text.token_to_word(0) is None
    assert text.word_to_tokens(5) is None
    assert text.char_to_word(1) == 0 and text.word_to_chars(0) == (0, 8)
    assert text.words() == text.word_ids() == [None] + [0] * last
    pair = fast("a", "a")
    assert pair.n_sequences == 2 and pair.token_to_sequence(3) == 1
    assert pair.token_to_sequence(0) is None
    assert pair.char_to_token(0, sequence_index=1) == 3
    rows = fast([["a", "prince"], ["a"]], is_split_into_words=True)
    assert rows.word_to_chars(0, 1) == (0, 6) and rows.token_to_word(1, 1) == 0
    assert rows.char_to_token(1, 0) == 1 and rows.token_to_word(0, 2) == 1
    assert slow("a").n_sequences is None
    with pytest.raises(ValueError, match="fast"):
        slow("a").char_to_token(0)


def test_pieces_renamed_by_added_tokens_keep_their_ids(folder: Path) -> None:
    tokenizer = LlamaTokenizer(folder / "tokenizer.model", added_tokens_decoder={9: "<nine>"})
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["<nine>"] == 9 and len(vocabulary) == len(tokenizer) == tokenizer.vocab_size


def test_offsets_are_for_the_fast_class(slow: LlamaTokenizer, fast: LlamaTokenizerFast) -> None:
    encoding = fast("a prince", return_offsets_mapping=True)
    assert encoding.offset_mapping[0] == (0, 0)
    assert encoding.offset_mapping[-1][1] == len("a prince")
    assert encoding.tokens() == fast.convert_ids_to_tokens(encoding.input_ids)
    with pytest.raises(NotImplementedError):
        slow("a prince", return_offsets_mapping=True)


def test_pad_takes_rows_and_dictionaries(tokenizer: Any) -> None:
    rows = [tokenizer("a"), tokenizer("a prince")]
    together = tokenizer.pad(rows, return_tensors="np")
    assert together.input_ids.shape == (2, len(rows[1].input_ids))
    assert (
        tokenizer.pad({"input_ids": np.array([[5, 6]])}, padding="max_length", max_length=3)[
            "attention_mask"
        ].sum()
        == 2
    )
    kept = tokenizer.pad({"input_ids": [[5], [6, 7]], "labels": [0, 1]})
    assert kept.labels == [0, 1]


# --- vocabulary and files ------------------------------------------------------------------------


@BOTH
def test_added_tokens_are_cut_out_of_the_text(cls: Any, folder: Path) -> None:
    tokenizer = cls(folder / "tokenizer.model")
    size = len(tokenizer)
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]}) == 1
    # 4.37.2 counts a token that is registered again with other flags in the fast class only.
    assert tokenizer.add_tokens(["<|im_end|>"]) == int(tokenizer.is_fast)
    assert len(tokenizer) == size + 1 == tokenizer.vocab_size + 1
    ids = tokenizer.encode("a<|im_end|>")
    assert ids[-1] == size == tokenizer.get_vocab()["<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"
    tokenizer.pad_token = "<|im_end|>"
    assert tokenizer.pad_token_id == size
    tokenizer.pad_token_id = 2
    assert tokenizer.pad_token == "</s>"


@BOTH
@pytest.mark.parametrize("files", ["all", "old", "model only"])
def test_a_saved_tokenizer_comes_back(cls: Any, folder: Path, tmp_path: Path, files: str) -> None:
    tokenizer = cls(folder / "tokenizer.model", pad_token="<pad>", legacy=False, add_eos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    paths = tokenizer.save_pretrained(tmp_path)
    assert {Path(p).name for p in paths} >= {"tokenizer_config.json", "tokenizer.model"}
    if files != "all":
        (tmp_path / "tokenizer_config.json").unlink()
    if files == "model only":
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    arguments = {} if files == "all" else {"legacy": False, "add_eos_token": True}
    again = cls.from_pretrained(tmp_path, **arguments)
    text = "a <|im_end|> prince<pad>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.added_tokens_decoder == tokenizer.added_tokens_decoder
    copy = pickle.loads(pickle.dumps(again))
    assert copy.encode(text) == tokenizer.encode(text)


def test_keywords_override_the_files(folder: Path, tmp_path: Path) -> None:
    LlamaTokenizer(folder / "tokenizer.model", padding_side="left").save_pretrained(tmp_path)
    assert LlamaTokenizer.from_pretrained(tmp_path).padding_side == "left"
    again = LlamaTokenizer.from_pretrained(tmp_path, padding_side="right", bos_token="</s>")
    assert (again.padding_side, again.bos_token_id) == ("right", 2)
    assert LlamaTokenizer.from_pretrained(folder / "tokenizer.model").encode("")[0] == 1


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config_json": {"chat_template": "{{ messages | length }}"}},
        {"chat_template_jinja": "{{ messages | length }}"},
        {
            "tokenizer_config_json": {
                "chat_template": [
                    {"name": "tool_use", "template": "tools"},
                    {"name": "default", "template": "{{ messages | length }}"},
                ]
            }
        },
    ],
)
def test_the_checkpoints_chat_template_is_used(
    folder: Path, tmp_path: Path, files: dict[str, Any]
) -> None:
    model = (folder / "tokenizer.model").read_bytes()
    write_folder(tmp_path, tokenizer_model=model, **files)
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template([{"content": "a"}] * 3, tokenize=False) == "3"


def test_the_bundled_tokenizer_has_a_name() -> None:
    tokenizer = LlamaTokenizer.from_pretrained("fairytales")
    assert tokenizer.decode(tokenizer("Once upon a time").input_ids[1:]) == "Once upon a time"


def test_a_tokenizer_json_is_enough_for_the_fast_class(tmp_path: Path) -> None:
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    folder = write_folder(
        tmp_path,
        tokenizer_json=byte_level_json(LLAMA3_SPECIAL),
        tokenizer_config_json={**config, "unk_token": "<|end_of_text|>"},
    )
    tokenizer = LlamaTokenizerFast.from_pretrained(folder)
    ids = tokenizer.encode("a 😀<|eot_id|>")
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a 😀"
    with pytest.raises(ValueError, match="model"):
        tokenizer.save_vocabulary(tmp_path)
    with pytest.raises(FileNotFoundError):
        LlamaTokenizer.from_pretrained(folder)


def test_the_post_processor_is_updated_on_request(folder: Path) -> None:
    tokenizer = LlamaTokenizerFast(folder / "tokenizer.model")
    tokenizer.bos_token = "</s>"
    assert tokenizer.encode("") == [1]
    tokenizer.update_post_processor()
    assert tokenizer.encode("") == [2]
    tokenizer.add_eos_token = True
    assert tokenizer.encode("") == [2, 2]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        tokenizer.update_post_processor()


def test_sampling_varies_the_pieces_and_keeps_the_text(folder: Path) -> None:
    options = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.5}
    tokenizer = LlamaTokenizer(folder / "tokenizer.model", sp_model_kwargs=options)
    rows = [tokenizer.encode("a princess and a prince") for _ in range(10)]
    assert len({tuple(row) for row in rows}) > 1
    assert {tokenizer.decode(row[1:]) for row in rows} == {"a princess and a prince"}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((), {}, ValueError),
        (([],), {}, ValueError),
        (([None],), {}, ValueError),
        (([5, 6],), {}, ValueError),
        ((["a"], ["a", "b"]), {}, ValueError),
        ((["a"], "b"), {}, TypeError),
        (("\ud800",), {}, UnicodeEncodeError),
        (("a",), {"return_tensors": "pt"}, ValueError),
        (("a",), {"padding": "shortest"}, ValueError),
        (("a",), {"truncation": "some"}, ValueError),
        (("a",), {"max_length": -1}, ValueError),
        (("a",), {"nonsense": 1}, TypeError),
    ],
)
def test_a_wrong_call_is_refused(
    tokenizer: Any, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        tokenizer(*arguments, **options)


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Any, wrong: int) -> None:
    for method in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
        with pytest.raises(IndexError):
            method([wrong])


@pytest.mark.parametrize("wrong", [1.5, True, "a", None])
def test_ids_must_be_integers(tokenizer: Any, wrong: object) -> None:
    with pytest.raises(TypeError):
        tokenizer.decode([wrong])


def test_one_id_is_one_token(tokenizer: Any) -> None:
    assert tokenizer.decode(1) == tokenizer.decode(np.int64(1)) == tokenizer.decode([1]) == "<s>"
    assert tokenizer.decode(np.array([1, 13])) == "<s>\n"


def test_padding_needs_a_pad_token(folder: Path) -> None:
    tokenizer = LlamaTokenizer(folder / "tokenizer.model")
    with pytest.raises(ValueError, match="pad token"):
        tokenizer(["a"], padding=True)


def test_the_callers_list_is_left_alone(slow: LlamaTokenizer) -> None:
    tokens = ["▁a", "▁prince"]
    assert slow.convert_tokens_to_string(tokens) == "a prince"
    assert tokens == ["▁a", "▁prince"]


@BOTH
def test_bad_files_are_named(cls: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cls(tmp_path / "nowhere.model")
    with pytest.raises(FileNotFoundError):
        cls.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("<html>")
    with pytest.raises(TokenizerError, match="web page"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config",
    [{"padding_side": "middle"}, {"bos_token": 5}, {"added_tokens_decoder": {"x": {}}}, []],
)
def test_a_bad_tokenizer_config_is_refused(folder: Path, tmp_path: Path, config: object) -> None:
    write_folder(tmp_path, tokenizer_model=(folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError)):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_the_fast_class_names_the_package_it_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"llama_np\[hf\]") as caught:
        LlamaTokenizerFast(folder / "tokenizer.model")
    assert caught.value.name == "tokenizers"


# --- what else transformers has ------------------------------------------------------------------


def test_the_files_name_the_class_of_an_auto_tokenizer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level_json(LLAMA3_SPECIAL))
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    for name, cls in {
        "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
        "GPT2Tokenizer": PreTrainedTokenizerFast,
        "LlamaTokenizer": LlamaTokenizerFast,
    }.items():
        config = {"tokenizer_class": name, "bos_token": bos, "eos_token": eos}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert type(AutoTokenizer.from_pretrained(tmp_path)) is cls
    assert type(AutoTokenizer.from_pretrained(folder)) is LlamaTokenizerFast


def test_a_tokenizer_of_another_class_is_as_its_file_says(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(byte_level_json(LLAMA3_SPECIAL))
    backend = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, pad_token="<|end_of_text|>")
    texts = ["a king", "once upon a time"]
    expected = [encoding.ids for encoding in backend.encode_batch(texts)]
    assert tokenizer(texts).input_ids == expected
    assert (tokenizer.bos_token, tokenizer.unk_token, len(tokenizer)) == (
        None,
        None,
        backend.get_vocab_size(),
    )
    padded = tokenizer(texts, padding=True).input_ids
    assert padded[0][: len(expected[0])] == expected[0]
    assert padded[0][-1] == tokenizer.pad_token_id
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again) is PreTrainedTokenizerFast
    assert again(texts).input_ids == expected


def test_a_plain_token_that_becomes_special_is_found_inside_words(folder: Path) -> None:
    tokenizer = LlamaTokenizerFast(folder / "tokenizer.model")
    tokenizer.add_tokens("[X]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[X]"]})
    assert tokenizer.convert_tokens_to_ids("[X]") in tokenizer("a[X]b").input_ids


def test_a_batch_encoding_is_made_as_documented(fast: LlamaTokenizerFast) -> None:
    rows = BatchEncoding({"input_ids": [[1, 2]]}, tensor_type="np")
    np.testing.assert_array_equal(rows.input_ids, [[1, 2]])
    row = BatchEncoding({"input_ids": [1, 2]}, tensor_type="np", prepend_batch_axis=True)
    assert row.input_ids.shape == (1, 2)
    assert BatchEncoding({"input_ids": [1]}, n_sequences=2).n_sequences == 2
    encoding = fast("a king")[0]
    assert BatchEncoding({"input_ids": encoding.ids}, encoding).tokens() == encoding.tokens


@BOTH
def test_a_side_that_does_not_exist_is_refused(cls: Any, folder: Path) -> None:
    tokenizer = cls(folder / "tokenizer.model", pad_token="<unk>")
    tokenizer.padding_side = "lefft"
    with pytest.raises(ValueError, match="lefft"):
        tokenizer(["a", "a b c"], padding=True)


@BOTH
def test_a_special_token_is_a_string(cls: Any, folder: Path) -> None:
    tokenizer = cls(folder / "tokenizer.model")
    with pytest.raises(ValueError, match="non-string value as the pad_token"):
        tokenizer.pad_token = 3
    with pytest.raises(ValueError, match="non-string value as the pad_token"):
        tokenizer.add_special_tokens({"pad_token": 3})


def test_a_second_text_has_no_effect_on_slow_tokens(slow: LlamaTokenizer) -> None:
    assert slow.tokenize("a king", pair="b") == slow.tokenize("a king")
