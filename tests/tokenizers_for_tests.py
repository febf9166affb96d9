"""Small tokenizers of each kind, made in a moment: the facts about them are in the test files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

STORY = [
    "Once upon a time there was a prince who wanted to marry a princess.",
    "He travelled all round the world to find one, but there was always something wrong.",
    "The old king went himself and opened the door; it was a princess who stood outside.",
    "Twelve brothers and seven ravens: 12 and 7. Ärger, süß, naïve!",
] * 8
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip


def train_sentencepiece(**options: Any) -> bytes:
    """A BPE model of 350 pieces with LLaMA's settings."""
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 350, "model_type": "bpe", "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True, "character_coverage": 1.0, "minloglevel": 2,
        "num_threads": 1, "unk_surface": " \u2047 ",
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORY), model_writer=model, **settings | options
    )
    return model.getvalue()


def byte_level_json(special: list[str], plain: list[str] | None = None, bos: bool = True) -> str:
    """A tokenizer.json in the way of LLaMA-3: bytes, no prefix space, perhaps a BOS template."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(STORY, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain or [])
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special[0]} $A",
            special_tokens=[(special[0], tokenizer.token_to_id(special[0]))],
        )
    return str(tokenizer.to_str())


def write_folder(folder: Path, **files: object) -> Path:
    """A checkpoint folder: `tokenizer_json` is written to tokenizer.json, and so on."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        path = folder / f"{stem}.{suffix}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder
