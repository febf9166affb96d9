"""LlamaTokenizer and LlamaTokenizerFast: the documented tokenizers of transformers 4.37.2.

`LlamaTokenizer` runs on sentencepiece, `LlamaTokenizerFast` on the package `tokenizers` (extra
`hf`). What they share is in hf_tokenizer_base.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.errors import TokenizerError, require
from llama_np.hf_encoding import AddedToken, BatchEncoding, Options
from llama_np.hf_tokenizer_base import LlamaTokenizerBase
from llama_np.tokenizer import (
    MAX_MODEL_BYTES,
    NO_DUMMY_PREFIX,
    SPACE,
    check_ids,
    check_text,
    from_json,
    load_sentencepiece,
    read_bounded,
    trainer_spec,
)

__all__ = [
    "AddedToken",
    "BatchEncoding",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
]

logger = logging.getLogger(__name__)


class LlamaTokenizer(LlamaTokenizerBase):
    """LLaMA's SentencePiece tokenizer with the API of transformers 4.37.2.

    vocab_file: path of a tokenizer.model. unk_token, bos_token, eos_token, pad_token: str or
    AddedToken. sp_model_kwargs: options of SentencePieceProcessor (enable_sampling, nbest_size,
    alpha). add_bos_token, add_eos_token: what `__call__` and `encode` put around a text.
    legacy: True (the default) gives every piece of text between control tokens its own prefix
    space; False only the beginning of the text. Further options: padding_side, truncation_side,
    model_max_length, chat_template, additional_special_tokens, split_special_tokens.

    Text is cut at control tokens wherever they are written, also in text from a user. For a chat
    with other people use split_special_tokens=True (constructor or call), which keeps their
    "</s>" plain text; `apply_chat_template` then still makes the template's own control tokens.

    Different from 4.37.2 on purpose: decode(int) decodes that token (there: its spelling,
    letter by letter); convert_tokens_to_string leaves the caller's list alone and accepts an
    empty one; ids that are floats or booleans are a TypeError; a lone surrogate is a
    UnicodeEncodeError; a conversation that consists of a system message, or has an unknown role,
    is a ChatTemplateError (there: silently dropped); empty rows are int64 arrays (there: float).
    """

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        use_default_system_prompt: bool = False,
        spaces_between_special_tokens: bool = False,
        legacy: bool | None = None,
        **options: Any,
    ) -> None:
        options.pop("tokenizer_file", None)
        self.vocab_file = str(vocab_file)
        self._model = read_bounded(Path(vocab_file), MAX_MODEL_BYTES)
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        self.legacy = True if legacy is None else bool(legacy)
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self.use_default_system_prompt = use_default_system_prompt
        self.spaces_between_special_tokens = spaces_between_special_tokens
        self._from_slow = bool(options.pop("from_slow", False))
        self.sp_model = self._processor()
        self._added: dict[int, AddedToken] = {}
        added = options.pop("added_tokens_decoder", None) or {}
        named = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token,
                 "pad_token": pad_token}  # fmt: skip
        super().__init__(
            **{k: None if t is None else _special(t) for k, t in named.items()},
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            sp_model_kwargs=self.sp_model_kwargs,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            use_default_system_prompt=use_default_system_prompt,
            spaces_between_special_tokens=spaces_between_special_tokens,
            legacy=self.legacy,
            **options,
        )
        self._register({int(i): AddedToken.of(token) for i, token in added.items()})
        self._add_tokens(self.all_special_tokens_extended, special=True)

    def _processor(self) -> Any:
        prefix = self.legacy or self._from_slow
        data = self._model if prefix else self._model + NO_DUMMY_PREFIX
        return load_sentencepiece(data, str(self.vocab_file), **self.sp_model_kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {k: value for k, value in vars(self).items() if k not in ("sp_model", "_spellings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = dict(state)
        self.sp_model = self._processor()

    # --- vocabulary ---

    @property
    def vocab_size(self) -> int:
        """Number of pieces of the model, without added tokens; `len()` counts those too."""
        return len(self.sp_model)

    @property
    def unk_token_length(self) -> int:
        """How many pieces the unk token is as plain text."""
        return len(self.sp_model.encode(str(self.unk_token)))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added and special tokens by id."""
        return dict(sorted(self._added.items()))

    def get_vocab(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        names = list(self._spellings)
        for i, token in self._added.items():
            if i < len(names):
                names[i] = token.content
        return {name: i for i, name in enumerate(names)} | self.added_tokens_encoder

    @cached_property
    def _spellings(self) -> list[str]:
        """Every piece of the model; asking sentencepiece for all of them takes a while."""
        return list(self.sp_model.id_to_piece(list(range(self.vocab_size))))

    def _register(self, tokens: dict[int, AddedToken]) -> None:
        self._added |= tokens
        self._added_ids = {token.content: i for i, token in self._added.items()}
        longest = sorted(self._added_ids, key=len, reverse=True)
        names = "|".join(map(re.escape, longest))
        self._pattern = re.compile(f"({names})") if names else None

    def _add_tokens(self, tokens: list[Any], special: bool) -> int:
        vocabulary = self.get_vocab()
        size, new = len(vocabulary), {}
        for given in tokens:
            if str(given) == "" or (isinstance(given, str) and given in self._added_ids):
                continue
            flag = special or str(given) in self.all_special_tokens
            token = AddedToken.of(given, special=flag)
            token = token.as_special(settled=True) if special else token
            index = vocabulary.setdefault(token.content, len(vocabulary))
            if token.special and token.content not in self.all_special_tokens:
                self._special["additional_special_tokens"].append(token)
            new[index] = token
        self._register(new)
        return len(vocabulary) - size

    def _id_limit(self) -> int:
        return max([self.vocab_size - 1, *self._added]) + 1

    def _token_to_id(self, token: str) -> int:
        if token in self._added_ids:
            return self._added_ids[token]
        return int(self.sp_model.piece_to_id(token))

    def _id_to_token(self, index: int) -> str:
        if index in self._added:
            return self._added[index].content
        if not 0 <= index < self.vocab_size:
            raise IndexError(f"token id {index} is outside the vocabulary of {len(self)}")
        return str(self.sp_model.id_to_piece(index))

    # --- text -> tokens ---

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text as strings; no control tokens are put around them in any case.

        split_special_tokens=True keeps control tokens that are written in the text plain text.
        As in 4.37.2, a second text has no effect.
        """
        split = Options(add_special_tokens, **options).split_special_tokens
        return self._tokenize(text, self.split_special_tokens if split is None else split)

    def _tokenize(self, text: str, split: bool, mark: str = "") -> list[str]:
        check_text(text)
        if self.legacy or not text:
            return [token for chunk in self._chunks(text, split, mark) for token in chunk]
        marked = SPACE + text.replace(SPACE, " ")
        tokens = [token for chunk in self._chunks(marked, split, mark) for token in chunk]
        if len(tokens) > 1 and tokens[0] == SPACE and tokens[1] in self.all_special_tokens:
            return tokens[1:]
        return tokens

    def _chunks(self, text: str, split: bool, mark: str) -> Iterator[list[str]]:
        """The tokens of each piece of text between added tokens, and the added tokens."""
        if split or self._pattern is None:
            yield self._pieces(text)
            return
        parts = [part for part in self._pattern.split(text) if part]
        for i, part in enumerate(parts):
            if part in self._added_ids:
                self._strip_around(parts, i, self._added[self._added_ids[part]])
        for part in parts:
            plain = part.replace(mark, "") if mark else part
            if part in self._added_ids:
                yield [part]
            elif plain:
                yield self._pieces(plain)

    @staticmethod
    def _strip_around(parts: list[str], i: int, token: AddedToken) -> None:
        """Let an added token swallow spaces, or turn back into text inside a word."""
        left = parts[i - 1] if i > 0 else ""
        right = parts[i + 1] if i + 1 < len(parts) else ""
        if token.rstrip and right:
            parts[i + 1] = right.lstrip()
        if token.lstrip and left:
            parts[i - 1] = left.rstrip()
        if token.single_word and left and left[-1] != " ":
            parts[i - 1], parts[i] = parts[i - 1] + token.content, ""
        elif token.single_word and right and right[0] != " ":
            parts[i + 1], parts[i] = token.content + parts[i + 1], ""

    def _pieces(self, text: str) -> list[str]:
        encode = self.sp_model.encode
        if self.legacy or not text.startswith((SPACE, " ")):
            return list(encode(text, out_type=str))
        # sentencepiece can drop leading spaces; behind another text it keeps them
        pieces = list(encode(f"{self.unk_token}{text}", out_type=str))
        length = self.unk_token_length
        return pieces[length:] if len(pieces) >= length else pieces

    def _encode_rows(self, rows: Sequence[Any], options: Options, single: bool) -> BatchEncoding:
        if options.return_offsets_mapping:
            raise NotImplementedError("offsets need LlamaTokenizerFast")
        made = []
        for text, pair in rows:
            first = self._ids(text, options)
            second = None if pair is None else self._ids(pair, options)
            if single:
                more = {**vars(options), "prepend_batch_axis": True}
                return self.prepare_for_model(first, second, **more)
            made.append(self._row(first, second, options))
            if options.return_length:
                made[-1]["length"] = len(made[-1]["input_ids"])
        mask = options.return_attention_mask
        mask = "attention_mask" in self.model_input_names if mask is None else mask
        batch = self._padded({key: [r[key] for r in made] for key in made[0]}, options, mask)
        return BatchEncoding(batch).convert_to_tensors(options.return_tensors)

    def _ids(self, text: Any, options: Options) -> list[int]:
        """Ids of a string, of a list of words or tokens, or ids as they are."""
        split = options.split_special_tokens
        split = self.split_special_tokens if split is None else split
        if isinstance(text, str):
            return list(map(self._token_to_id, self._tokenize(text, split)))
        first = text[0] if isinstance(text, list | tuple | np.ndarray) and len(text) else None
        if isinstance(first, str):
            words = options.is_split_into_words
            tokens = [t for w in text for t in self._tokenize(w, split)] if words else text
            return list(map(self._token_to_id, tokens))
        if first is None:
            raise ValueError(f"expected a str, or a list of str or of ids; found {text!r:.80}")
        return check_ids(text, self._id_limit())

    def _chat_ids(self, text: str, mark: str) -> list[int]:
        return list(map(self._token_to_id, self._tokenize(text, split=False, mark=mark)))

    # --- tokens -> text ---

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens; special ones as they are spelled, the rest through sentencepiece."""
        if not tokens:
            return ""
        if isinstance(tokens, str):
            raise TypeError(f"tokens must be a list, found {tokens!r:.80}")
        special = set(self.all_special_tokens)
        text, run, after_special = "", [], False
        for i, token in enumerate([tokens[0].removeprefix(SPACE), *tokens[1:]]):
            if token not in special:
                run.append(token)
            else:
                text += " " if self.legacy and i != 0 and not after_special else ""
                text += self.sp_model.decode(run) + token
                run = []
            after_special = token in special
        return text + str(self.sp_model.decode(run))

    def _decode(
        self,
        ids: list[int],
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool = True,
        **_: Any,
    ) -> str:
        """Added tokens stand between spaces by default, as in 4.37.2."""
        special = set(self.all_special_tokens)
        beyond = {
            t for t in self.additional_special_tokens if self._token_to_id(t) >= self.vocab_size
        }
        apart = (self._added_ids.keys() - special) | beyond
        texts: list[str] = []
        run: list[str] = []
        for token in self.convert_ids_to_tokens(ids, skip_special_tokens):
            if token not in apart:
                run.append(token)
                continue
            text = self.convert_tokens_to_string(run)
            texts += [text, token] if text else [token]
            run = []
        texts += [self.convert_tokens_to_string(run)] if run else []
        return (" " if spaces_between_special_tokens else "").join(texts)

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...] | None:
        """Write [prefix-]tokenizer.model into a folder; the path written, in a tuple."""
        if not Path(save_directory).is_dir():
            logger.error(f"{str(save_directory)!r} is not a folder")
            return None
        if Path(str(self.vocab_file)).is_file():
            return _copy(str(self.vocab_file), save_directory, filename_prefix)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{prefix}tokenizer.model"
        target.write_bytes(self._model)
        return (str(target),)


class LlamaTokenizerFast(LlamaTokenizerBase):
    """LLaMA's tokenizer on the package `tokenizers` (extra `hf`), with the API of 4.37.2.

    vocab_file: a tokenizer.model to convert, or tokenizer_file: a tokenizer.json. The other
    arguments are those of LlamaTokenizer. What differs from it, as in 4.37.2: padding_side is
    "left"; `legacy` has no effect (each piece of text between control tokens gets the prefix
    space); offsets, and overflow as further rows, are available; an assigned bos_token or
    eos_token shows after `update_post_processor()`; added tokens that are not special match only
    where a word begins; a bad byte spoils its whole run of byte tokens when decoded.

    Different from 4.37.2 on purpose: split_special_tokens works here too (see LlamaTokenizer);
    an id outside the vocabulary is an IndexError (there: decoded to nothing); a lone surrogate is
    a UnicodeEncodeError; an empty batch is a ValueError; add_tokens heeds AddedToken(special=True);
    a stride that leaves no progress is a ValueError (there: a panic).
    """

    is_fast = True
    padding_side = "left"
    slow_tokenizer_class = LlamaTokenizer

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        clean_up_tokenization_spaces: bool = False,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        use_default_system_prompt: bool = False,
        **options: Any,
    ) -> None:
        from_slow = options.pop("from_slow", False)
        given = options.pop("tokenizer_object", None)
        added = options.pop("added_tokens_decoder", None) or {}
        file = None if from_slow else tokenizer_file
        self._tokenizer = _backend(vocab_file, file, given)
        if given is None and file is None:  # converted: as if constructed by LlamaTokenizer
            unk_token, bos_token, eos_token, pad = (
                _special(t) if t else None
                for t in (unk_token, bos_token, eos_token, options.get("pad_token"))
            )
            more = options.get("additional_special_tokens")
            if isinstance(more, list | tuple):
                more = [t if isinstance(t, str) else _special(t) for t in more]
                options["additional_special_tokens"] = more
            slow = {"sp_model_kwargs": {}, "spaces_between_special_tokens": False}
            options = slow | options | {"legacy": options.get("legacy") is not False}
            options["pad_token"] = pad
        self.vocab_file = None if vocab_file is None else str(vocab_file)
        self.legacy = bool(options.get("legacy", True))
        self.use_default_system_prompt = use_default_system_prompt
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            use_default_system_prompt=use_default_system_prompt,
            **options,
        )
        self._said_normalized: dict[str, bool] = {}
        self._added = self.added_tokens_decoder
        self._register([AddedToken.of(added[i]) for i in sorted(added)])
        self._add_bos_token, self._add_eos_token = add_bos_token, add_eos_token
        self.update_post_processor()

    def _register(self, tokens: list[AddedToken]) -> None:
        known = {*self.added_tokens_encoder, *map(str, tokens)}
        special = set(self.all_special_tokens)
        new = [t for t in self.all_special_tokens_extended if str(t) not in known]
        for flag, group in groupby(
            [*tokens, *new],
            key=lambda t: str(t) in special or (isinstance(t, AddedToken) and t.special),
        ):
            self._add_tokens(list(group), special=flag)

    def update_post_processor(self) -> None:
        """Let what is put around a text follow the present bos_token and eos_token."""
        processors = require("tokenizers.processors", extra="hf")
        bos, eos = self._around()
        names = {"bos": [self.bos_token] if bos else [], "eos": [self.eos_token] if eos else []}

        def piece(side: int) -> list[str]:
            content = [*names["bos"], "$A" if side == 0 else "$B", *names["eos"]]
            return [f"{name}:{side}" for name in content]

        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=piece(0),
            pair=piece(0) + piece(1),
            special_tokens=list(zip(names["bos"] + names["eos"], bos + eos, strict=True)),
        )

    @property
    def add_bos_token(self) -> bool:
        """Whether the BOS is put before each text."""
        return self._add_bos_token

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos_token = value
        self.update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        """Whether the EOS is put after each text."""
        return self._add_eos_token

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos_token = value
        self.update_post_processor()

    # --- vocabulary ---

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizers.Tokenizer that does the work."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids of the vocabulary, without added tokens; `len()` counts those too."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return self._id_limit()

    def _id_limit(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added and special tokens by id."""
        added = self._tokenizer.get_added_tokens_decoder()
        listed = {i: AddedToken.of(added[i]) for i in sorted(added)}
        said = self._said_normalized
        return {
            i: replace(token, normalized=said.get(token.content, token.normalized))
            for i, token in listed.items()
        }

    def get_vocab(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def _add_tokens(self, tokens: list[Any], special: bool) -> int:
        library = require("tokenizers", extra="hf")
        known = {token.content: token for token in self._added.values()}
        made, count = [], 0
        for given in tokens:
            token = AddedToken.of(given, special=special)
            token = token.as_special(settled=False) if special else token
            old = known.get(token.content)
            known[token.content] = token
            count += bool(token.content) and token != old
            # A string says nothing about flags: it does not make a control token a plain one.
            if old is None or not isinstance(given, str):
                made.append(library.AddedToken(**asdict(self._as_found(token, special))))
        add = self._tokenizer.add_special_tokens if special else self._tokenizer.add_tokens
        add(made)
        self._added = self.added_tokens_decoder
        return count

    def _as_found(self, token: AddedToken, special: bool) -> AddedToken:
        """A control token that is known keeps its way of being found, whatever a file lists.

        Found after the normalizer had put "▁" in front of it, "</s>" would be found nowhere.
        """
        listed = self._tokenizer.get_added_tokens_decoder().values()
        known = {t.content: t for t in listed if t.special}
        if not special or token.content not in known:
            return token
        self._said_normalized[token.content] = bool(token.normalized)
        return replace(token, normalized=known[token.content].normalized)

    def _token_to_id(self, token: str) -> Any:
        index = self._tokenizer.token_to_id(token)
        if index is None and token != self.unk_token:
            return self.unk_token_id
        return index

    def _id_to_token(self, index: int) -> str:
        if index in self._added:  # newer libraries spell these with a prefix space
            return self._added[index].content
        token = self._tokenizer.id_to_token(index)
        if token is None:
            raise IndexError(f"token id {index} is outside the vocabulary of {len(self)}")
        return str(token)

    # --- text -> tokens ---

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text as strings; control tokens only with add_special_tokens=True."""
        return self.encode_plus(text, pair, add_special_tokens, **options).tokens()

    def _encode_rows(self, rows: Sequence[Any], options: Options, single: bool) -> BatchEncoding:
        if single and _is_row_of_two(rows[0][0]) and not options.is_split_into_words:
            rows = [rows[0][0]]
        for text in (text for row in rows for text in row if text is not None):
            words = text if options.is_split_into_words else [text]
            for word in words:
                check_text(word)
        texts = [text if not pair and (single or pair is None) else (text, pair)
                 for text, pair in rows]  # fmt: skip
        encodings = self._run(texts, options)
        samples = [
            [e, *(e.overflowing if options.return_overflowing_tokens else [])] for e in encodings
        ]
        flat = [e for sample in samples for e in sample]
        data = {key: [get(e) for e in flat] for key, get in self._columns(options).items()}
        if options.return_overflowing_tokens:
            origin = [i for i, sample in enumerate(samples) for _ in sample]
            data["overflow_to_sample_mapping"] = origin
        for ids in data["input_ids"]:
            self._check_length(ids, options)
        if single and options.return_tensors is None and not options.return_overflowing_tokens:
            data = {k: v[0] if v and isinstance(v[0], list) else v for k, v in data.items()}
        return BatchEncoding(data, flat).convert_to_tensors(options.return_tensors)

    def _columns(self, options: Options) -> dict[str, Any]:
        """The entries that the options ask for, as functions of an encoding."""

        def wanted(choice: bool | None, name: str) -> bool:
            return name in self.model_input_names if choice is None else choice

        columns: dict[str, tuple[bool, Any]] = {
            "input_ids": (True, lambda e: e.ids),
            "token_type_ids": (
                wanted(options.return_token_type_ids, "token_type_ids"),
                lambda e: e.type_ids,
            ),
            "attention_mask": (
                wanted(options.return_attention_mask, "attention_mask"),
                lambda e: e.attention_mask,
            ),
            "special_tokens_mask": (
                options.return_special_tokens_mask,
                lambda e: e.special_tokens_mask,
            ),
            "offset_mapping": (options.return_offsets_mapping, lambda e: e.offsets),
            "length": (options.return_length, lambda e: len(e.ids)),
        }
        return {name: get for name, (asked, get) in columns.items() if asked}

    def _run(self, texts: list[Any], options: Options) -> list[Any]:
        backend, split = self._tokenizer, options.split_special_tokens
        backend.encode_special_tokens = self.split_special_tokens if split is None else split
        try:
            with _library_errors(options.stride):
                self._limit(options)
                encodings = backend.encode_batch(
                    texts,
                    add_special_tokens=options.add_special_tokens,
                    is_pretokenized=options.is_split_into_words,
                )
            return list(encodings)
        finally:
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = False

    def _limit(self, options: Options) -> None:
        if options.truncation != "do_not_truncate":
            self._tokenizer.enable_truncation(
                options.max_length, stride=options.stride, strategy=options.truncation,
                direction=self.truncation_side,
            )  # fmt: skip
        if options.padding != "do_not_pad":
            self._tokenizer.enable_padding(
                length=options.max_length if options.padding == "max_length" else None,
                direction=self.padding_side, pad_id=self.pad_token_id,
                pad_token=self.pad_token, pad_type_id=self.pad_token_type_id,
                pad_to_multiple_of=options.pad_to_multiple_of,
            )  # fmt: skip

    def _chat_ids(self, text: str, mark: str) -> list[int]:
        core = from_json(self._tokenizer.to_str().encode(), self.name_or_path)
        parts = core.split(text)
        return core.encode_parts([p.replace(mark, "") if isinstance(p, str) else p for p in parts])

    # --- tokens -> text ---

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """0 for the first sequence, 1 for the second; control tokens are not counted."""
        return [0] * len(token_ids_0) + [1] * len(token_ids_1 or [])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of a list of tokens."""
        return str(self._tokenizer.decoder.decode(tokens))

    def _decode(self, ids: list[int], skip_special_tokens: bool, **_: Any) -> str:
        added = self._added if skip_special_tokens else {}
        hidden = {i for i, token in added.items() if token.special}
        tokens = [self._id_to_token(i) for i in ids if i not in hidden]
        decoder = self._tokenizer.decoder
        return str(decoder.decode(tokens)) if decoder is not None else " ".join(tokens)

    # --- files ---

    @property
    def can_save_slow_tokenizer(self) -> bool:
        """Whether the tokenizer.model it came from is still there."""
        return self.vocab_file is not None and Path(self.vocab_file).is_file()

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...] | None:
        """Copy the tokenizer.model that it came from. Errors: ValueError if there is none."""
        if not self.can_save_slow_tokenizer:
            raise ValueError(
                "this tokenizer came from a tokenizer.json; there is no .model to save"
            )
        if not Path(save_directory).is_dir():
            logger.error(f"{str(save_directory)!r} is not a folder")
            return None
        return _copy(str(self.vocab_file), save_directory, filename_prefix)

    def _save_files(
        self, folder: Path, legacy_format: bool | None, prefix: str | None
    ) -> tuple[str, ...]:
        paths: tuple[str, ...] = ()
        if legacy_format is not False and self.can_save_slow_tokenizer:
            paths = super()._save_files(folder, True, prefix)
        if legacy_format is not True:
            path = folder / ((f"{prefix}-" if prefix else "") + "tokenizer.json")
            path.write_text(_portable(self._tokenizer.to_str()), encoding="utf-8")
            paths += (str(path),)
        return paths


class PreTrainedTokenizerFast(LlamaTokenizerFast):
    """The tokenizer of a tokenizer.json that is not LLaMA 1's or 2's, such as LLaMA 3's.

    The file alone says which control tokens are put around a text; there are none but those that
    the files name, and texts are padded on the right. AutoTokenizer chooses this class where
    tokenizer_config.json names another class than LLaMA's.
    """

    _saved_class = "PreTrainedTokenizerFast"
    padding_side = "right"
    slow_tokenizer_class = None  # type: ignore[assignment]

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        unnamed = dict.fromkeys(("unk_token", "bos_token", "eos_token"))
        unasked = {"add_bos_token": False, "add_eos_token": False}
        options = {**unnamed, **options, **unasked}
        super().__init__(vocab_file, tokenizer_file, **options)

    def update_post_processor(self) -> None:
        """Nothing: what is put around a text is the file's own."""


def _portable(tokenizer_json: str) -> str:
    """A tokenizer.json that older libraries, such as that of 4.37.2, read too.

    They know merge rules as "a b" only, which cannot spell pieces with spaces.
    """
    content = json.loads(tokenizer_json)
    rules = content["model"].get("merges", [])
    if not any(" " in piece for rule in rules for piece in rule):
        content["model"]["merges"] = [" ".join(rule) for rule in rules]
    return json.dumps(content, indent=2, ensure_ascii=False)


@contextmanager
def _library_errors(stride: int) -> Iterator[None]:
    """The errors of the package `tokenizers` as ValueError, also a panic of its Rust code."""
    try:
        yield
    except TypeError:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"stride {stride} must be less than what a text is cut to") from error


def _copy(source: str, save_directory: str | os.PathLike[str], prefix: str | None) -> tuple[str]:
    target = Path(save_directory) / ((f"{prefix}-" if prefix else "") + "tokenizer.model")
    if Path(source).resolve() != target.resolve():
        shutil.copyfile(source, target)
    return (str(target),)


def _special(token: Any) -> AddedToken:
    return AddedToken.of(token, special=True).as_special(settled=True)


def _is_row_of_two(text: Any) -> bool:
    """Two strings in a list are a pair to a fast tokenizer (and two tokens to a slow one)."""
    return isinstance(text, list | tuple) and len(text) == 2


def _backend(vocab_file: Any, tokenizer_file: Any, given: Any) -> Any:
    """A tokenizers.Tokenizer: a copy of the given one, from a tokenizer.json, or converted."""
    library = require("tokenizers", extra="hf")
    if given is not None:
        data, name = given.to_str().encode(), "tokenizer_object"
    elif tokenizer_file is not None:
        data, name = read_bounded(Path(tokenizer_file), MAX_MODEL_BYTES), str(tokenizer_file)
    elif vocab_file is not None:
        return convert_sentencepiece(
            read_bounded(Path(vocab_file), MAX_MODEL_BYTES), str(vocab_file)
        )
    else:
        raise ValueError("LlamaTokenizerFast needs a vocab_file or a tokenizer_file")
    try:
        backend = library.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises nothing more specific
        raise TokenizerError(f"{name!r} is not a tokenizer.json: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def convert_sentencepiece(data: bytes, name: str = "<bytes>") -> Any:
    """A tokenizers.Tokenizer that encodes as a SentencePiece model does (in the legacy way)."""
    library = require("tokenizers", extra="hf")
    normalizers, decoders = library.normalizers, library.decoders
    model = load_sentencepiece(data, name)
    scores = {model.id_to_piece(i): model.get_score(i) for i in range(len(model))}
    pieces = ["<unk>", "<s>", "</s>", *list(scores)[3:]]
    if trainer_spec(data).get(3, 1) == 2:
        vocab = {piece: i for i, piece in enumerate(pieces)}
        rules = merges(vocab, scores)
        bpe = library.models.BPE(vocab, rules, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        tokenizer = library.Tokenizer(bpe)
    else:
        scored = [(piece, scores.get(piece, 0.0)) for piece in pieces]
        tokenizer = library.Tokenizer(library.models.Unigram(scored, 0, byte_fallback=True))
    special = [library.AddedToken(p, normalized=False, special=True) for p in pieces[:3]]
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


def merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """BPE merge rules, best first: every way to make a piece of two others, by its score."""
    rules: list[tuple[float, str, str]] = []
    for piece, score in scores.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        known.sort(key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        rules += [(score, left, right) for left, right in known]
    return [(left, right) for _, left, right in sorted(rules, key=lambda rule: -rule[0])]
