"""The vocabulary of LLaMA 3 as Meta ships it (tiktoken's format), as a tokenizer.json."""

from __future__ import annotations

import base64
import binascii
import json
import re

from llama_np.errors import TokenizerError
from llama_np.gguf_model import byte_level_spec
from llama_np.tokenizer import _BYTE_OF

MAX_TOKEN_BYTES = 1 << 10
RESERVED = 256  # LLaMA 3 puts that many control tokens after the vocabulary
NAMES = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]


def looks_like_tiktoken(content: bytes) -> bool:
    """Whether the first line is a token in base64 and its rank."""
    return bool(re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content[:4096]))


def tokenizer_json(content: bytes, where: str) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of LLaMA 3. Errors: TokenizerError."""
    ranks = _ranks(content, where)
    letters = {byte: letter for letter, byte in _BYTE_OF.items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    texts = [spelled[token] for token in sorted(ranks, key=lambda token: ranks[token])]
    merges = [
        f"{spelled[left]} {spelled[right]}"
        for token in sorted(ranks, key=lambda token: ranks[token])
        for left, right in _halves(token, ranks)
    ]
    first = len(texts)
    names = [*NAMES, *(f"<|reserved_special_token_{i}|>" for i in range(3, RESERVED))][:RESERVED]
    spec = byte_level_spec(
        texts + names, merges, controls={first + i: True for i in range(RESERVED)}, bos=first
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": NAMES[0],
        "eos_token": NAMES[1],
    }
    return {
        "tokenizer.json": json.dumps(spec, ensure_ascii=False).encode("utf-8"),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode("utf-8"),
    }


def _ranks(content: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines()):
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error) as problem:
            raise TokenizerError(f"{where}: line {number + 1} is no token and rank") from problem
        if rank != str(number).encode("ascii") or token in ranks or len(token) > MAX_TOKEN_BYTES:
            raise TokenizerError(f"{where}: line {number + 1} is out of order or repeated")
        ranks[token] = number
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise TokenizerError(f"{where}: not every byte is a token")
    return ranks


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that merge to this one, the earliest first."""
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
    return sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
