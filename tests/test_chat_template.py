"""Conversations as text and as ids: the formats, the sandbox, and what users cannot do."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import LLAMA3_SPECIAL, byte_level_json, train_sentencepiece, write_folder

from llama_np.chat_template import (
    LLAMA2_SYSTEM_PROMPT,
    encode_chat,
    llama2_prompt,
    llama3_prompt,
    render,
)
from llama_np.errors import ChatTemplateError
from llama_np.tokenizer import Tokenizer, load_tokenizer

SIMPLE = (
    "{% for message in messages %}"
    "{{ bos_token + message['role'] + ': ' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)


def talk(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turns, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama2")
    return load_tokenizer(write_folder(folder, tokenizer_model=train_sentencepiece()))


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama3")
    config = {"eos_token": "<|eot_id|>"}
    return load_tokenizer(
        write_folder(
            folder, tokenizer_json=byte_level_json(LLAMA3_SPECIAL), tokenizer_config_json=config
        )
    )


# --- the two built-in formats --------------------------------------------------------------------


def test_llama2_puts_the_system_message_into_the_first_user_message() -> None:
    text = llama2_prompt([system("  Sys "), *talk(" Hi ", " Yo ", "Bye")])
    assert text == (
        "<s>[INST] <<SYS>>\n  Sys \n<</SYS>>\n\n Hi [/INST] Yo </s><s>[INST] Bye [/INST]"
    )


def test_llama2_uses_the_default_system_prompt_unless_there_is_one() -> None:
    default = {"default_system": "Be kind."}
    assert "Be kind." in llama2_prompt(talk("Hi"), **default)
    assert "Be kind." not in llama2_prompt([system("Sys"), *talk("Hi")], **default)
    assert "Be kind." not in llama2_prompt(talk("<<SYS>>\nSys\n<</SYS>>\n\nHi"), **default)


def test_the_default_system_prompt_is_the_published_one() -> None:
    digest = hashlib.sha256(LLAMA2_SYSTEM_PROMPT.encode()).hexdigest()
    assert digest == "cda5d1f1710b2195c05075e118c2dc9499e5c5044a45c8cebbbac3d00632bfd4"


def test_llama3_frames_each_message_with_control_tokens() -> None:
    text = llama3_prompt([system(" Sys "), *talk("Hi")], add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSys<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [system("alone")],
        [{"role": "assistant", "content": "first"}],
        [*talk("one"), *talk("two")],
        [*talk("one"), {"role": "critic", "content": "two"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        ["user: hi"],
    ],
)
def test_llama2_refuses_what_it_cannot_express(messages: list[dict[str, str]]) -> None:
    with pytest.raises(ChatTemplateError):
        llama2_prompt(messages)


# --- Jinja templates -----------------------------------------------------------------------------


def test_a_template_sees_messages_tokens_and_the_prompt_flag() -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    text = render(SIMPLE, talk(" Hi "), add_generation_prompt=True, **names)
    assert text == "<s>user: Hi</s><s>"


def test_blocks_leave_no_blank_lines() -> None:
    assert render("{% if true %}\n  {% set x = 1 %}\nx{{ x }}\n{% endif %}\n", []) == "x1\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content }}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ 2 ** (10**9) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'a' | center(2000000) }}",
        "{{ range(10**9) | length }}",
        "{% for i in range(90000) %}{{ 'aaaaaaaaaaaaaaaa' }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'secret' %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 1 / 0 }}",
        "{{ '' | attr('format') | attr('__globals__') }}",
        "{{" * 100_000,
        "a" * (1 << 21),
    ],
)
def test_a_bad_template_is_an_error_or_shows_nothing(template: str) -> None:
    try:
        text = render(template, [])
    except ChatTemplateError:
        return
    assert text == ""  # an undefined value, which is what the sandbox gives for private names


def test_templates_need_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(ModuleNotFoundError, match=r"llama_np\[hf\]"):
        render("", [])


# --- ids: what a message says is plain text ------------------------------------------------------


def test_the_checkpoint_decides_the_format(
    tmp_path: Path, llama2: Tokenizer, llama3: Tokenizer
) -> None:
    messages = talk("Hi", "Yo", "Bye")
    expected = llama2.encode(llama2_prompt(messages), bos=False, special=True)
    assert encode_chat(llama2, messages) == expected
    expected = llama3.encode(llama3_prompt(messages, True), bos=False, special=True)
    assert encode_chat(llama3, messages) == expected
    folder = write_folder(
        tmp_path, tokenizer_model=train_sentencepiece(), chat_template_jinja=SIMPLE
    )
    own = load_tokenizer(folder)
    assert own.decode(encode_chat(own, talk("Hi"), False), skip_special=False) == (
        "<s> user: Hi</s>"
    )


PIECES = ["<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<", "s>", "<|", "eot_id|>", " ", "a"]
CONTENT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENT, min_size=1, max_size=4))
@pytest.mark.parametrize("kind", ["llama2", "llama3", "template"])
def test_messages_never_make_control_tokens(
    llama2: Tokenizer, llama3: Tokenizer, kind: str, contents: list[str]
) -> None:
    tokenizer = llama3 if kind == "llama3" else llama2
    template = SIMPLE if kind == "template" else None

    def control(messages: list[dict[str, str]]) -> list[int]:
        ids = encode_chat(tokenizer, messages, template=template)
        return [i for i in ids if i in tokenizer.special_tokens.values()]

    assert control(talk(*contents)) == control(talk(*["x"] * len(contents)))


def test_what_a_message_says_is_kept(llama3: Tokenizer) -> None:
    said = "a <|eot_id|> b"
    ids = encode_chat(llama3, talk(said))
    assert said in llama3.decode(ids)
    assert llama3.decode(ids).count("<|eot_id|>") == 1


def test_a_vocabulary_without_a_format_needs_a_template(tmp_path: Path) -> None:
    spec = byte_level_json(["<|endoftext|>"])
    tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_json=spec))
    with pytest.raises(ChatTemplateError, match="template"):
        encode_chat(tokenizer, talk("Hi"))
