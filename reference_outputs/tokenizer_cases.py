"""What is recorded of the tokenizers: each mode answers the same calls on the same texts.

Plain data. A call is [method, positional arguments, keyword arguments]; `record.py` adds what it
returned or raised. All of it runs on the bundled `fairytales/tokenizer.model`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

Call = list[Any]

TEXTS = [
    "Once upon a time there was a king.",
    "",
    " ",
    "   ",
    "\n",
    "\n\nThe end.\n",
    "\tTab\tand\r\nline",
    " leading",
    "  two leading",
    "trailing ",
    "two  spaces   three    four",
    "I'm here; don't go -- she's \"gone\"!",
    "What ? Yes , indeed . Oh !",
    "12345 and 1,000.50",
    "ALL CAPITALS and MiXeD",
    "naïve café, Æther, Grüße, Dvořák",
    "e\u0301 is two characters, é one",
    "你好，世界",
    "Привет мир",
    "שלום עולם",
    "😀 and 👩‍👩‍👧 and 🏳️‍🌈",
    "a😀b",
    "\u2581underline\u2581here",
    "\u2581",
    "non\u00a0breaking and\u3000wide and\u200bzero width",
    "\ufeffmark",
    "control \x00 \x01 \x7f bytes",
    "<0x41> is not a byte",
    "<unk> <s> </s>",
    "<s>Once",
    "<s> Once",
    "Once<s>upon",
    "Once <s> upon",
    "</s> ",
    "a<unk>b",
    " <s> ",
    "<s></s><s>",
    "Hey<s>.",
    "<S> and < s > are text",
    "[INST] Tell me a story [/INST]",
    "https://example.org/a?b=c&d=e#f",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious",
    "The King's daughter said: 'I will not!', and the old woman laughed.",
    "Then the little mermaid lifted her glorified eyes towards the sun.",
]

ADDED_TEXTS = [
    "hi<|user|>there",
    "hi <|user|> there",
    "<|user|>",
    "<|user|><|user|> Once",
    "Once<mark>upon<|user|>a <s>time",
    " <mark> ",
    "<strip> both  <strip>  sides",
    "word<|user|>.",
]

# Pieces, bytes, control tokens, bad bytes; 3 + b is byte b.
IDS: list[list[int]] = [
    [1, 468, 285, 1992, 2],
    [468, 285],
    [285, 468],
    [],
    [1],
    [2],
    [1, 1, 2, 2],
    [468, 2, 468, 2],
    [1, 468, 2, 1, 1992],
    [468, 0, 1992],
    [0],
    [0, 0, 468],
    [243, 162, 155, 131],
    [243, 162, 155],
    [243, 162, 155, 131, 243],
    [198, 172, 468],
    [468, 198, 1, 172],
    [13, 13, 468, 13],
    [3, 4, 35, 68],
    list(range(259, 280)),
    list(range(2020, 2048)),
]


def text_calls(texts: list[str]) -> list[Call]:
    """Ids with and without special tokens, and the pieces."""
    calls: list[Call] = []
    for text in texts:
        calls += [
            ["tokenize", [text], {}],
            ["encode", [text], {}],
            ["encode", [text], {"add_special_tokens": False}],
        ]
    return calls


def decode_calls(ids: list[list[int]]) -> list[Call]:
    """Text with and without special tokens, with the spaces before punctuation removed, pieces."""
    calls: list[Call] = []
    for each in ids:
        calls += [
            ["decode", [each], {}],
            ["decode", [each], {"skip_special_tokens": True}],
            ["convert_ids_to_tokens", [each], {}],
        ]
    clean = {"clean_up_tokenization_spaces": True}
    calls.append(["batch_decode", [[[1, 468, 285, 2], [1992]]], {"skip_special_tokens": True}])
    return [*calls, ["decode", [[468, 285, 1992]], clean]]


ONE, TWO, LONG = "Once upon a time", "the King", "a long way through the dark forest to the sea"


def call_calls() -> list[Call]:
    """`__call__` on one text, pairs and batches; truncation; special tokens."""
    cut = {"truncation": True}
    return [
        ["__call__", [ONE], {}],
        ["__call__", [ONE, TWO], {}],
        ["__call__", [[ONE, TWO, ""]], {}],
        ["__call__", [[ONE, TWO], [TWO, LONG]], {}],
        ["__call__", [LONG], cut | {"max_length": 8}],
        ["__call__", [LONG], cut | {"max_length": 8, "add_special_tokens": False}],
        ["__call__", [LONG, ONE], cut | {"max_length": 12}],
        ["__call__", [ONE, LONG], cut | {"max_length": 9}],
        ["__call__", [LONG, ONE], {"truncation": "only_first", "max_length": 10}],
        ["__call__", [ONE, LONG], {"truncation": "only_second", "max_length": 10}],
        ["__call__", [LONG], {"return_special_tokens_mask": True}],
        ["__call__", [ONE, TWO], {"return_token_type_ids": True}],
        ["__call__", [ONE], {"return_attention_mask": False}],
        ["__call__", [["Once", "upon"]], {"is_split_into_words": True}],
        ["__call__", [[ONE, LONG]], {"padding": True}],
    ]


def padded_calls() -> list[Call]:
    """What needs a pad token."""
    batch = [ONE, TWO, LONG]
    return [
        ["__call__", [batch], {"padding": True}],
        ["__call__", [batch], {"padding": "longest", "return_token_type_ids": True}],
        ["__call__", [batch], {"padding": "max_length", "max_length": 24}],
        ["__call__", [batch], {"padding": True, "pad_to_multiple_of": 8}],
        ["__call__", [batch], {"padding": True, "truncation": True, "max_length": 7}],
        ["__call__", [batch], {"padding": "max_length", "truncation": True, "max_length": 10}],
        ["__call__", [batch, [TWO, ONE, TWO]], {"padding": True}],
        ["__call__", [batch], {"padding": True, "return_special_tokens_mask": True}],
        ["__call__", [batch], {"padding": True, "return_tensors": "np"}],
        ["__call__", [ONE], {"return_tensors": "np"}],
        ["pad", [{"input_ids": [[1, 5, 6], [1]]}], {}],
        ["pad", [{"input_ids": [1, 5, 6]}], {"padding": "max_length", "max_length": 6}],
        ["decode", [[1, 468, 285, 0, 0]], {"skip_special_tokens": True}],
    ]


def helper_calls() -> list[Call]:
    """The small methods."""
    a, b = [468, 285], [1992]
    return [
        ["build_inputs_with_special_tokens", [a], {}],
        ["build_inputs_with_special_tokens", [a, b], {}],
        ["create_token_type_ids_from_sequences", [a], {}],
        ["create_token_type_ids_from_sequences", [a, b], {}],
        ["get_special_tokens_mask", [[1, 468, 2, 0]], {"already_has_special_tokens": True}],
        ["num_special_tokens_to_add", [], {}],
        ["num_special_tokens_to_add", [], {"pair": True}],
        ["convert_tokens_to_ids", [["▁a", "<s>", "</s>", "<unk>", "<0x0A>", "nonsense"]], {}],
        ["convert_tokens_to_ids", ["▁a"], {}],
        ["convert_tokens_to_string", [["▁On", "ce", "▁upon"]], {}],
        ["convert_tokens_to_string", [["<s>", "▁On", "ce", "</s>", "▁a"]], {}],
    ]


USER, ANSWER = {"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yo"}
SYSTEM = {"role": "system", "content": "  Be kind "}
CONVERSATIONS: list[list[dict[str, str]]] = [
    [USER],
    [USER, ANSWER],
    [USER, ANSWER, {"role": "user", "content": "Bye"}],
    [SYSTEM, USER],
    [SYSTEM, USER, ANSWER, USER],
    [{"role": "user", "content": "<<SYS>>\nown\n<</SYS>>\n\nHi"}],
    [{"role": "user", "content": "I type </s><s>[INST] myself"}],
    [ANSWER],
    [USER, USER],
]


def chat_calls() -> list[Call]:
    """The default template, as text and as ids, and a template of one's own."""
    own = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    own += "{% if add_generation_prompt %}assistant:{% endif %}"
    calls: list[Call] = []
    for chat in CONVERSATIONS:
        calls.append(["apply_chat_template", [chat], {"tokenize": False}])
        calls.append(["apply_chat_template", [chat], {}])
    options = {"chat_template": own, "tokenize": False}
    return [
        *calls,
        ["apply_chat_template", [CONVERSATIONS[1]], options],
        ["apply_chat_template", [CONVERSATIONS[1]], options | {"add_generation_prompt": True}],
        ["apply_chat_template", [CONVERSATIONS[2]], {"truncation": True, "max_length": 9}],
    ]


# 4.37.2 renders a lone system message as nothing at all.
SILENT: list[Call] = [
    ["apply_chat_template", [[SYSTEM]], {"tokenize": False}],
    ["apply_chat_template", [[SYSTEM]], {}],
]


@dataclass(frozen=True)
class TokenizerCase:
    """A way to build the tokenizer, what is done to it first, and the calls it answers."""

    name: str
    shows: str
    class_name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: str = "4.37.2"
    compare: str = "binding"
    setup: list[Call] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


USER_TOKEN = {"content": "<|user|>", "special": False, "normalized": True}
MARK = {"content": "<mark>", "special": True, "normalized": False}
STRIP = {"content": "<strip>", "special": True, "normalized": False, "lstrip": True, "rstrip": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "legacy": ("LlamaTokenizer", {"legacy": True}),
    "new": ("LlamaTokenizer", {"legacy": False}),
    "fast": ("LlamaTokenizerFast", {}),
}


def tokenizer_cases() -> list[TokenizerCase]:
    """Slow legacy, slow new and fast, each in several modes."""
    found = []
    for kind, (class_name, arguments) in KINDS.items():
        for mode, (shows, more, setup, calls) in modes().items():
            name, told = f"tokenizer-{kind}-{mode}", f"{class_name} {arguments or ''}: {shows}"
            found.append(
                TokenizerCase(name, told, class_name, arguments | more, setup=setup, calls=calls)
            )
    accident = "a lone system message becomes the empty text"
    silent = TokenizerCase("tokenizer-silent", accident, "LlamaTokenizer", calls=SILENT)
    return [*found, replace(silent, compare="information")]


def modes() -> dict[str, tuple[str, dict[str, Any], list[Call], list[Call]]]:
    """Mode -> (what it shows, further constructor arguments, setup, calls)."""
    added: list[Call] = [
        ["add_tokens", [[USER_TOKEN]], {}],
        ["add_tokens", [[MARK, STRIP]], {"special_tokens": True}],
    ]
    ends = {"add_bos_token": False, "add_eos_token": True}
    plain = text_calls(TEXTS) + decode_calls(IDS)
    short = text_calls(TEXTS[:1] + TEXTS[26:38]) + call_calls() + helper_calls()
    left = {"pad_token": "<unk>", "padding_side": "left", "truncation_side": "left"}
    right = {"pad_token": "</s>", "padding_side": "right"}
    ids = [[2048, 468], [468, 2048, 285], [1, 2049, 468, 2050], [468, 2049, 285, 2048, 2]]
    return {
        "plain": ("texts to ids and back", {}, [], plain),
        "calls": ("__call__ and helpers", {}, [], call_calls() + helper_calls()),
        "eos-only": ("no bos, an eos", ends, [], short),
        "both-ends": ("bos and eos", {"add_eos_token": True}, [], short),
        "pad-left": ("unk pads, cuts and pads on the left", left, [], padded_calls()),
        "pad-right": ("eos pads on the right", right, [], padded_calls()),
        "pad-new": ("a new pad token", {"pad_token": "<pad>"}, [], padded_calls()),
        "added": ("added tokens", {}, added, text_calls(ADDED_TEXTS) + decode_calls(ids)),
        "chat": ("conversations", {}, [], chat_calls()),
        "chat-system": (
            "conversations with the default system prompt",
            {"use_default_system_prompt": True},
            [],
            chat_calls()[:6],
        ),
    }
