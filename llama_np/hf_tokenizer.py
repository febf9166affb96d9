"""LlamaTokenizer and LlamaTokenizerFast: the documented tokenizers of transformers 4.37.2.

The base class holds what both share: special tokens, truncation, padding, batches, chat, files.
`LlamaTokenizer` runs on sentencepiece; `LlamaTokenizerFast` on the package `tokenizers` (extra `hf`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llama_np.chat_template import LLAMA2_SYSTEM_PROMPT, llama2_prompt, render, shield
from llama_np.checkpoint import locate
from llama_np.errors import TokenizerError, require
from llama_np.tokenizer import (
    MAX_JSON_BYTES,
    MAX_MODEL_BYTES,
    NO_DUMMY_PREFIX,
    SPACE,
    check_ids,
    check_text,
    from_json,
    load_sentencepiece,
    read_bounded,
    read_json,
    trainer_spec,
)

logger = logging.getLogger(__name__)

NO_LIMIT = int(1e30)  # model_max_length of a tokenizer that states none
LARGE = int(1e20)
SINGLE_TOKENS = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
SPECIAL_TOKENS = (*SINGLE_TOKENS, "additional_special_tokens")
PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
NOT_CONSTRUCTOR = (
    "tokenizer_class token revision cache_dir local_files_only force_download subfolder "
    "trust_remote_code use_fast init_inputs auto_map"
).split()


@dataclass
class AddedToken:
    """A token that text is cut at before the vocabulary's own rules apply."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self) -> None:
        self.normalized = not self.special if self.normalized is None else self.normalized

    def __str__(self) -> str:
        return self.content

    def __hash__(self) -> int:
        return hash(self.content)

    @classmethod
    def of(cls, token: Any, special: bool = False) -> AddedToken:
        """From a string, a dict, or any object with these attributes."""
        if isinstance(token, str):
            return cls(token, special=special)
        names = cls.__dataclass_fields__
        if isinstance(token, Mapping):
            return cls(**{k: v for k, v in token.items() if k in names})
        try:
            return cls(**{name: getattr(token, name) for name in names})
        except AttributeError as problem:
            found = type(token).__name__
            raise TypeError(f"a token must be str or AddedToken, found {found}") from problem


class BatchEncoding(UserDict[str, Any]):
    """What a tokenizer returns: a dictionary whose entries are also attributes."""

    def __init__(
        self, data: Mapping[str, Any] | None = None, encodings: Sequence[Any] | None = None
    ) -> None:
        super().__init__(data or {})
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.data[key]
        if self.encodings is not None:
            return self.encodings[key]
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        raise KeyError(f"{key!r}: only a fast tokenizer's output can be indexed by number")

    @property
    def is_fast(self) -> bool:
        """Whether the package `tokenizers` made it."""
        return self.encodings is not None

    def _encoding(self, index: int) -> Any:
        if self.encodings is None:
            raise ValueError("only the output of a fast tokenizer knows tokens and words")
        return self.encodings[index]

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The vocabulary's spelling of each id (fast tokenizers only)."""
        return list(self._encoding(batch_index).tokens)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The word that each token belongs to (fast tokenizers only)."""
        return list(self._encoding(batch_index).word_ids)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 or 1, which text of a pair each token belongs to (fast tokenizers only)."""
        return list(self._encoding(batch_index).sequence_ids)

    def convert_to_tensors(
        self, tensor_type: str | None = None, prepend_batch_axis: bool = False
    ) -> BatchEncoding:
        """Turn the lists into int64 arrays; ragged ones into an object array of rows."""
        if tensor_type is None:
            return self
        if tensor_type != "np":
            raise ValueError(f"return_tensors must be 'np' or None, found {tensor_type!r}")
        for key, value in self.data.items():
            if not isinstance(value, np.ndarray):
                self.data[key] = _as_array([value] if prepend_batch_axis else value)
        return self


def _as_array(value: Sequence[Any]) -> np.ndarray:
    rows = bool(value) and all(isinstance(row, list | tuple | np.ndarray) for row in value)
    if rows and len({len(row) for row in value}) > 1:
        ragged = np.empty(len(value), dtype=object)
        ragged[:] = [_as_array(row) for row in value]
        return ragged
    array = np.asarray(value)
    return array if array.size else array.astype(np.int64)


@dataclass(frozen=True)
class Options:
    """The keyword arguments of a tokenizer call.

    padding: False, True or "longest", "max_length". truncation: True or "longest_first",
    "only_first", "only_second", False. max_length: of a row, control tokens included; default
    model_max_length. stride: tokens that the overflow repeats. return_tensors: "np" or None.
    split_special_tokens: True keeps "<s>" in a text plain text (safe for text from others).
    """

    add_special_tokens: bool = True
    padding: bool | str = False
    truncation: bool | str | None = None
    max_length: int | None = None
    stride: int = 0
    is_split_into_words: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = None
    return_token_type_ids: bool | None = None
    return_attention_mask: bool | None = None
    return_overflowing_tokens: bool = False
    return_special_tokens_mask: bool = False
    return_offsets_mapping: bool = False
    return_length: bool = False
    verbose: bool = True
    split_special_tokens: bool | None = None


class _Special:
    """A special token as a string attribute, such as `bos_token`; None when unset."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Any, owner: type | None = None) -> Any:
        value = None if tokenizer is None else tokenizer._special.get(self.name)
        return None if value is None else str(value)

    def __set__(self, tokenizer: LlamaTokenizerBase, value: Any) -> None:
        if value is not None and not isinstance(value, str):
            value = AddedToken.of(value)
        tokenizer._special[self.name] = value


class _SpecialId:
    """The id of a special token, such as `bos_token_id`; None when unset."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.token = name.removesuffix("_id")

    def __get__(self, tokenizer: Any, owner: type | None = None) -> Any:
        name = None if tokenizer is None else getattr(tokenizer, self.token)
        return None if name is None else tokenizer.convert_tokens_to_ids(name)

    def __set__(self, tokenizer: LlamaTokenizerBase, value: int | None) -> None:
        token = None if value is None else tokenizer.convert_ids_to_tokens(value)
        setattr(tokenizer, self.token, token)


class LlamaTokenizerBase:
    """What LlamaTokenizer and LlamaTokenizerFast share; see those."""

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    is_fast = False
    vocab_file: str | None
    legacy: bool
    use_default_system_prompt: bool

    bos_token, eos_token, unk_token, sep_token = _Special(), _Special(), _Special(), _Special()
    pad_token, cls_token, mask_token = _Special(), _Special(), _Special()
    bos_token_id, eos_token_id, unk_token_id = _SpecialId(), _SpecialId(), _SpecialId()
    pad_token_id, sep_token_id = _SpecialId(), _SpecialId()
    cls_token_id, mask_token_id = _SpecialId(), _SpecialId()

    # --- construction ---

    def __init__(self, side: str, **options: Any) -> None:
        self.init_kwargs = deepcopy(options)
        self.name_or_path = str(options.get("name_or_path", ""))
        limit = options.get("model_max_length", options.get("max_len"))
        self.model_max_length: int = NO_LIMIT if limit is None else limit
        self.padding_side = _side("padding_side", options.get("padding_side", side))
        self.truncation_side = _side("truncation_side", options.get("truncation_side", "right"))
        self.clean_up_tokenization_spaces = bool(options.get("clean_up_tokenization_spaces"))
        self.split_special_tokens = bool(options.get("split_special_tokens", False))
        self.chat_template: str | None = options.get("chat_template")
        self.pad_token_type_id = int(options.get("pad_token_type_id", 0))
        self.model_input_names = list(
            options.get("model_input_names", type(self).model_input_names)
        )
        self._warned: set[str] = set()
        self._special: dict[str, Any] = {"additional_special_tokens": []}
        for name in SPECIAL_TOKENS:
            if options.get(name) is not None:
                setattr(self, name, options[name])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, "
            f"vocab_size={self.vocab_size}, model_max_length={self.model_max_length}, "
            f"is_fast={self.is_fast}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map})"
        )

    def __len__(self) -> int:
        return len(self.get_vocab())

    # What a subclass provides:

    @property
    def vocab_size(self) -> int:
        """Number of ids of the vocabulary, without added tokens; `len()` counts those too."""
        raise NotImplementedError

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added and special tokens by id."""
        raise NotImplementedError

    def get_vocab(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        raise NotImplementedError

    def _id_limit(self) -> int:
        """One more than the largest id."""
        raise NotImplementedError

    def _token_to_id(self, token: str) -> int:
        raise NotImplementedError

    def _id_to_token(self, index: int) -> str:
        raise NotImplementedError

    def _add_tokens(self, tokens: list[str | AddedToken], special: bool) -> int:
        raise NotImplementedError

    def _encode_rows(self, rows: Sequence[Any], options: Options, single: bool) -> BatchEncoding:
        raise NotImplementedError

    def _chat_ids(self, text: str, mark: str) -> list[int]:
        raise NotImplementedError

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...] | None:
        """Write [prefix-]tokenizer.model into a folder; the path written, in a tuple."""
        raise NotImplementedError

    # --- special tokens ---

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens beyond the seven named ones."""
        return [str(token) for token in self._special["additional_special_tokens"]]

    @additional_special_tokens.setter
    def additional_special_tokens(self, value: Sequence[str | AddedToken] | None) -> None:
        if isinstance(value, str) or not isinstance(value, Sequence | None):
            raise TypeError("additional_special_tokens must be a list of str or AddedToken")
        tokens = [t if isinstance(t, str) else AddedToken.of(t) for t in value or []]
        self._special["additional_special_tokens"] = tokens

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Ids of the additional special tokens."""
        return [self._token_to_id(token) for token in self.additional_special_tokens]

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, value: Sequence[int]) -> None:
        self.additional_special_tokens = self.convert_ids_to_tokens(value)

    @property
    def special_tokens_map_extended(self) -> dict[str, Any]:
        """The special tokens that are set, by attribute name, as they were given."""
        return {n: self._special[n] for n in SPECIAL_TOKENS if self._special.get(n)}

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The special tokens that are set, by attribute name, as strings."""
        return {n: getattr(self, n) for n in SPECIAL_TOKENS if self._special.get(n)}

    @property
    def all_special_tokens_extended(self) -> list[Any]:
        """Every special token once, in the order of the attributes, as it was given."""
        values = self.special_tokens_map_extended.values()
        tokens = [t for v in values for t in (v if isinstance(v, list) else [v])]
        unique: dict[str, Any] = {}
        for token in tokens:
            unique.setdefault(str(token), token)
        return list(unique.values())

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once, in the order of the attributes."""
        values = self.special_tokens_map.values()
        return list(dict.fromkeys(t for v in values for t in (v if isinstance(v, list) else [v])))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return [self._token_to_id(token) for token in self.all_special_tokens]

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Ids of added and special tokens by content, in the order of ids."""
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """Ids of added and special tokens by content."""
        return self.added_tokens_encoder

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens at the end of the vocabulary; how many were new.

        A text is cut at them wherever they stand. Resize the model's embedding afterwards.
        """
        if not new_tokens:
            return 0
        tokens = list(new_tokens) if isinstance(new_tokens, list | tuple) else [new_tokens]
        known = [t if isinstance(t, str) else AddedToken.of(t) for t in tokens]
        return self._add_tokens(known, special_tokens)

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Any],
        replace_additional_special_tokens: bool = True,
    ) -> int:
        """Set special tokens by attribute name and add those that are new; how many were."""
        new: list[str | AddedToken] = []
        for name, value in special_tokens_dict.items():
            if name not in SPECIAL_TOKENS:
                raise ValueError(f"{name!r} is not one of {', '.join(SPECIAL_TOKENS)}")
            if name != "additional_special_tokens":
                token = AddedToken.of(value, special=True)
                setattr(self, name, token)
                new += [token] if token not in new else []
                continue
            tokens = [AddedToken.of(token, special=True) for token in value]
            old = self._special[name]
            if replace_additional_special_tokens and tokens:
                self._special[name] = list(tokens)
            else:
                tokens = [t for t in tokens if str(t) not in map(str, old)]
                self._special[name] = [*old, *tokens]
            new += tokens
        return self.add_tokens(new, special_tokens=True)

    # --- tokens <-> ids ---

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or the ids of a list; an unknown token gets the unk token's."""
        if tokens is None or isinstance(tokens, str):
            return None if tokens is None else self._token_to_id(tokens)
        return [None if token is None else self._token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of several.

        Errors: IndexError for an id outside the vocabulary, TypeError for what is not an integer.
        """
        if isinstance(ids, int | np.integer):
            return self._id_to_token(check_ids([ids], self._id_limit())[0])
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._id_to_token(i) for i in check_ids(ids, self._id_limit()) if i not in skipped]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of a list of tokens."""
        raise NotImplementedError

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """The tokens of a text as strings; no control tokens are put around them."""
        raise NotImplementedError

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> str:
        """The text of ids: an integer, a list, or an array of one row.

        Errors: IndexError for an id outside the vocabulary, TypeError for what is not an integer.
        """
        if isinstance(token_ids, np.ndarray):
            token_ids = token_ids.tolist()
        ids = [token_ids] if isinstance(token_ids, int | np.integer) else token_ids
        ids = check_ids(ids, self._id_limit())
        text = self._decode(ids, skip_special_tokens, **options)
        clean = clean_up_tokenization_spaces
        clean = self.clean_up_tokenization_spaces if clean is None else clean
        return self.clean_up_tokenization(text) if clean else text

    def _decode(self, ids: list[int], skip_special_tokens: bool, **options: Any) -> str:
        raise NotImplementedError

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> list[str]:
        """The texts of several rows of ids."""
        return [
            self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **options)
            for row in sequences
        ]

    @staticmethod
    def clean_up_tokenization(out_string: str) -> str:
        """Remove the spaces that word-based tokenizers leave before English punctuation."""
        for mark in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
            out_string = out_string.replace(mark, mark.strip())
        return out_string

    # --- control tokens around a sequence ---

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """[bos] A [eos], and for a pair [bos] A [eos] [bos] B [eos]."""
        bos, eos = self._around()
        row = bos + list(token_ids_0) + eos
        return row if token_ids_1 is None else row + bos + list(token_ids_1) + eos

    def _around(self) -> tuple[list[int], list[int]]:
        around = []
        for what in ("bos", "eos"):
            wanted = getattr(self, f"add_{what}_token")
            index = getattr(self, f"{what}_token_id") if wanted else None
            if wanted and index is None:
                raise ValueError(f"add_{what}_token is True, but {what}_token is not set")
            around.append([index] if wanted else [])
        return around[0], around[1]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many control tokens are put around one sequence, or around a pair."""
        return len(self.build_inputs_with_special_tokens([], [] if pair else None))

    @property
    def max_len_single_sentence(self) -> int:
        """model_max_length less the control tokens."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """model_max_length less the control tokens of a pair."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 where `build_inputs_with_special_tokens` puts a control token, 0 elsewhere.

        With `already_has_special_tokens`, 1 where the given ids are special.
        """
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("ids that already have special tokens are one sequence, not two")
            special = set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        bos, eos = ([1] * len(side) for side in self._around())
        mask = bos + [0] * len(token_ids_0) + eos
        return mask if token_ids_1 is None else mask + bos + [0] * len(token_ids_1) + eos

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """0 for the first sequence and its control tokens, 1 for the second and its."""
        extra = sum(map(len, self._around()))
        second = [] if token_ids_1 is None else [1] * (len(token_ids_1) + extra)
        return [0] * (len(token_ids_0) + extra) + second

    # --- calls ---

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        *arguments: Any,
        **options: Any,
    ) -> BatchEncoding:
        """Ids and masks of a text, a pair, or a batch; the further arguments are `Options`.

        Targets go to "labels". Text from others: pass split_special_tokens=True, otherwise a
        "</s>" that they typed becomes the control token.
        """
        chosen = Options(*arguments, **options)
        if text is None and text_target is None:
            raise ValueError("give a text or a text_target")
        if text is None:
            return self._call(text_target, text_pair_target, chosen)
        encoding = self._call(text, text_pair, chosen)
        if text_target is not None:
            encoding["labels"] = self._call(text_target, text_pair_target, chosen)["input_ids"]
        return encoding

    def _call(self, text: Any, pair: Any, options: Options) -> BatchEncoding:
        for value in (text, *([] if pair is None else [pair])):
            if not _is_text(value):
                raise ValueError(
                    "a text must be a str, a list of str, or with is_split_into_words a list of "
                    f"lists of str; found {value!r:.80}"
                )
        inner = text[0] if isinstance(text, list | tuple) and text else None
        batched = isinstance(inner, list | tuple) or not options.is_split_into_words
        if not isinstance(text, list | tuple) or not batched:
            return self.encode_plus(text, pair, **vars(options))
        if isinstance(pair, str):
            raise TypeError("text is a batch, so text_pair must be a list of the same length")
        if pair is not None and len(pair) != len(text):
            raise ValueError(f"{len(text)} texts, but {len(pair)} pairs")
        rows = list(text) if pair is None else list(zip(text, pair, strict=True))
        return self.batch_encode_plus(rows, **vars(options))

    def encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kw: Any) -> BatchEncoding:
        """One text or pair; like calling the tokenizer, but it also takes tokens and ids."""
        return self._encode_rows([(text, text_pair)], self._resolve(Options(*args, **kw)), True)

    def batch_encode_plus(
        self, batch_text_or_text_pairs: Sequence[Any], *args: Any, **kw: Any
    ) -> BatchEncoding:
        """A batch of texts or of (text, pair) tuples."""
        rows, options = batch_text_or_text_pairs, self._resolve(Options(*args, **kw))
        if not isinstance(rows, list | tuple):
            raise TypeError(f"a batch must be a list or a tuple, found {type(rows).__name__}")
        if not rows:
            raise ValueError("the batch is empty")
        words = options.is_split_into_words

        def is_pair(row: Any) -> bool:
            listed = isinstance(row, list | tuple)
            return listed and not (words and row and not isinstance(row[0], list | tuple))

        pairs = [row if is_pair(row) else (row, None) for row in rows]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("each row of a batch must be a text or a (text, pair) tuple")
        return self._encode_rows(pairs, options, False)

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """The ids of one text or pair, as a list, or an array with return_tensors="np"."""
        chosen = Options(
            add_special_tokens, padding, truncation, max_length, stride,
            return_tensors=return_tensors, **options,
        )  # fmt: skip
        return self.encode_plus(text, text_pair, **vars(chosen))["input_ids"]

    def _resolve(self, options: Options) -> Options:
        """Padding and truncation as names, with the length they need."""
        padding, truncation, length = options.padding, options.truncation, options.max_length
        if length is not None and length < 0:
            raise ValueError(f"max_length must not be negative, found {length}")
        if length is not None and padding is False and truncation is None:
            self._warn("max_length without truncation=True: truncating 'longest_first'", options)
            truncation = "longest_first"
        cut = truncation not in (None, False, "do_not_truncate")
        if padding is True and length is not None and not cut and options.verbose:
            warnings.warn(
                "`max_length` is ignored when `padding`=`True` and there is no truncation "
                "strategy. To pad to max length, use `padding='max_length'`.",
                stacklevel=4,
            )
        pad = _one_of("padding", padding, PADDINGS, true="longest", false="do_not_pad")
        cut_name = _one_of("truncation", truncation or False, TRUNCATIONS,
                           true="longest_first", false="do_not_truncate")  # fmt: skip
        if length is None and (pad == "max_length" or cut):
            if self.model_max_length <= LARGE:
                length = self.model_max_length
            else:
                self._warn("no max_length is given and the model has none: nothing is cut", options)
                pad = "do_not_pad" if pad == "max_length" else pad
                cut_name = "do_not_truncate"
        if pad != "do_not_pad" and self.pad_token_id is None:
            raise ValueError(
                "padding needs a pad token; set tokenizer.pad_token = tokenizer.eos_token, or "
                "tokenizer.add_special_tokens({'pad_token': '[PAD]'})"
            )
        multiple = options.pad_to_multiple_of
        both = cut_name != "do_not_truncate" and pad != "do_not_pad"
        if both and multiple and length is not None and length % multiple:
            raise ValueError(f"max_length {length} is not a multiple of {multiple}, the padding's")
        return replace(options, padding=pad, truncation=cut_name, max_length=length)

    def _warn(self, message: str, options: Options | None = None) -> None:
        if message not in self._warned and (options is None or options.verbose):
            self._warned.add(message)
            logger.warning(message)

    # --- truncation and padding ---

    def prepare_for_model(
        self, ids: list[int], pair_ids: list[int] | None = None, *args: Any, **kw: Any
    ) -> BatchEncoding:
        """Truncate ids, put control tokens around them, pad: one row."""
        prepend = bool(kw.pop("prepend_batch_axis", False))
        options = self._resolve(Options(*args, **kw))
        encoding = self._row(ids, pair_ids, options)
        mask = options.return_attention_mask
        mask = "attention_mask" in self.model_input_names if mask is None else mask
        if mask or options.padding != "do_not_pad":
            self._pad(encoding, options, mask)
        if options.return_length:
            encoding["length"] = len(encoding["input_ids"])
        return BatchEncoding(encoding).convert_to_tensors(options.return_tensors, prepend)

    def _row(self, ids: list[int], pair: list[int] | None, options: Options) -> dict[str, Any]:
        """One row, truncated and between its control tokens, not yet padded."""
        special = options.add_special_tokens
        types, limit = options.return_token_type_ids, options.max_length
        if types and not special:
            raise ValueError("token_type_ids need add_special_tokens=True")
        overflow = options.return_overflowing_tokens
        if overflow and options.truncation == "longest_first" and pair is not None:
            raise ValueError("the overflow of a pair needs 'only_first' or 'only_second'")
        total = len(ids) + len(pair or [])
        total += self.num_special_tokens_to_add(pair is not None) if special else 0
        row: dict[str, Any] = {}
        lost: list[int] = []
        if options.truncation != "do_not_truncate" and limit and total > limit:
            ids, pair, lost = self.truncate_sequences(
                ids, pair, total - limit, str(options.truncation), options.stride
            )
        if overflow:
            row["overflowing_tokens"] = lost
            row["num_truncated_tokens"] = total - limit if limit is not None else 0
        joined = ids + (pair or [])
        row["input_ids"] = self.build_inputs_with_special_tokens(ids, pair) if special else joined
        if "token_type_ids" in self.model_input_names if types is None else types:
            row["token_type_ids"] = (
                self.create_token_type_ids_from_sequences(ids, pair)
                if special
                else [0] * len(joined)
            )
        if options.return_special_tokens_mask:
            mask = self.get_special_tokens_mask(ids, pair) if special else [0] * len(joined)
            row["special_tokens_mask"] = mask
        self._check_length(row["input_ids"], options)
        return row

    def _check_length(self, ids: list[int], options: Options) -> None:
        if options.max_length is None and len(ids) > self.model_max_length:
            self._warn(f"a text is longer than model_max_length {self.model_max_length}", options)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Remove tokens from `truncation_side`: (ids, pair ids, what was removed and `stride` more).

        A sequence that would lose all its tokens is left alone, with an error in the log.
        """
        if num_tokens_to_remove <= 0:
            return ids, pair_ids, []
        strategy = _one_of("truncation_strategy", truncation_strategy, TRUNCATIONS)
        if strategy == "longest_first" and pair_ids is not None:
            first, second = _share(len(ids), len(pair_ids), num_tokens_to_remove)
            return self._cut(ids, first), self._cut(pair_ids, second), []
        target = pair_ids if strategy == "only_second" else ids
        if strategy == "do_not_truncate" or target is None:
            return ids, pair_ids, []
        if len(target) <= num_tokens_to_remove:
            logger.error(f"cannot remove {num_tokens_to_remove} of {len(target)} tokens")
            return ids, pair_ids, []
        window = min(len(target), stride + num_tokens_to_remove)
        lost = target[-window:] if self.truncation_side == "right" else target[:window]
        kept = self._cut(target, num_tokens_to_remove)
        return (ids, kept, lost) if strategy == "only_second" else (kept, pair_ids, lost)

    def _cut(self, ids: list[int], count: int) -> list[int]:
        if self.truncation_side == "left":
            return ids[count:]
        return ids[: max(len(ids) - count, 0)]

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> Any:
        """Pad a row, a batch, or a list of rows (dictionaries with "input_ids").

        Padded are input_ids, attention_mask, token_type_ids and special_tokens_mask; other
        entries, such as labels, stay as they are.
        """
        name = self.model_input_names[0]
        if isinstance(encoded_inputs, list | tuple):
            keys = encoded_inputs[0].keys()
            encoded_inputs = {key: [row[key] for row in encoded_inputs] for key in keys}
        if name not in encoded_inputs:
            raise ValueError(f"expected {name!r} among {list(encoded_inputs)}")
        if len(encoded_inputs[name]) == 0:
            return encoded_inputs
        if isinstance(encoded_inputs[name], np.ndarray) or any(
            isinstance(row, np.ndarray) for row in encoded_inputs[name]
        ):
            return_tensors = return_tensors or "np"
        inputs = {key: _as_list(value) for key, value in encoded_inputs.items()}
        if not isinstance(inputs[name][0], int | list | tuple):
            raise ValueError(f"{name} must be integers, found {inputs[name][0]!r:.80}")
        options = self._resolve(
            Options(
                padding=padding, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of,
                truncation=False, verbose=verbose,
            )
        )  # fmt: skip
        mask = return_attention_mask
        mask = "attention_mask" in self.model_input_names if mask is None else mask
        return BatchEncoding(self._padded(inputs, options, mask)).convert_to_tensors(return_tensors)

    def _padded(self, inputs: dict[str, Any], options: Options, mask: bool) -> dict[str, Any]:
        rows = inputs[self.model_input_names[0]]
        if not isinstance(rows[0], list | tuple):
            return self._pad(dict(inputs), options, mask)
        if any(len(value) != len(rows) for value in inputs.values()):
            raise ValueError("the entries of a batch must have the same number of rows")
        if options.padding == "longest":
            options = replace(options, padding="max_length", max_length=max(map(len, rows)))
        padded = [
            self._pad({key: value[i] for key, value in inputs.items()}, options, mask)
            for i in range(len(rows))
        ]
        return {key: [row[key] for row in padded] for key in padded[0]}

    def _pad(self, row: dict[str, Any], options: Options, mask: bool) -> dict[str, Any]:
        """Pad one row in place."""
        name = self.model_input_names[0]
        length = len(row[name])
        if mask and "attention_mask" not in row:
            row["attention_mask"] = [1] * length
        if options.padding == "do_not_pad":
            return row
        target = length if options.padding == "longest" else int(options.max_length or 0)
        multiple = options.pad_to_multiple_of or 1
        missing = max(-(-target // multiple) * multiple - length, 0)
        fill = {name: self.pad_token_id, "token_type_ids": self.pad_token_type_id,
                "special_tokens_mask": 1, "attention_mask": 0}  # fmt: skip
        for key, value in fill.items():
            if key in row and (mask or key != "attention_mask"):
                pads = [value] * missing
                left = self.padding_side == "left"
                row[key] = pads + list(row[key]) if left else list(row[key]) + pads
        return row

    # --- chat ---

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """A conversation as ids, or as text with tokenize=False.

        Messages are {"role", "content"}. Without a template LLaMA-2's format is used, and needs
        no package; a template runs in Jinja's sandbox (extra `hf`). split_special_tokens=True, here
        or in the constructor, is the safe way: what messages contain stays plain text and only
        the template makes control tokens. Errors: ChatTemplateError.
        """
        messages = getattr(conversation, "messages", conversation)
        split = options.pop("split_special_tokens", None)
        safe = tokenize and (self.split_special_tokens if split is None else split)
        mark = ""
        if safe:
            names = {*self.added_tokens_encoder, *self.all_special_tokens}
            messages, mark = shield(messages, names)
        template = chat_template if chat_template is not None else self.chat_template
        if template is not None:
            text = render(template, messages, add_generation_prompt, **self.special_tokens_map)
        else:
            system = LLAMA2_SYSTEM_PROMPT if self.use_default_system_prompt else None
            text = llama2_prompt(messages, self.bos_token or "", self.eos_token or "", system)
        if not tokenize:
            return text
        options |= {
            "padding": "max_length" if padding is True else padding, "truncation": truncation,
            "max_length": max_length, "return_tensors": return_tensors, "add_special_tokens": False,
        }  # fmt: skip
        if not safe:
            return self.encode(text, **options)
        ids = self._chat_ids(text, mark)
        return self.prepare_for_model(ids, prepend_batch_axis=True, **options)["input_ids"]

    # --- files ---

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Any:
        """A tokenizer from a checkpoint folder or a bundled name; keywords override its files."""
        path = Path(name)
        if path.is_file():
            key = "tokenizer_file" if path.suffix == ".json" else "vocab_file"
            found, saved = {key: path}, cls._saved(None, options)
        else:
            folder = locate(name)
            files = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
            found = {key: folder / file for key, file in files.items() if (folder / file).exists()}
            saved = cls._saved(folder, options)
        if not found:
            what = "No tokenizer.model and no tokenizer.json in this folder"
            raise FileNotFoundError(2, what, str(name))
        return cls(**{**found, **saved, "name_or_path": str(name)})

    @classmethod
    def _saved(cls, folder: Path | None, options: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments as the JSON files of a folder and `options` give them."""

        def read(name: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
            return read_json(folder / name, limit) if folder else {}

        config = read("tokenizer_config.json")
        for key in (*NOT_CONSTRUCTOR, "vocab_file", "tokenizer_file"):
            config.pop(key, None)
        config |= {key: value for key, value in options.items() if key not in NOT_CONSTRUCTOR}
        listed = config.pop("added_tokens_decoder", None)
        if listed is not None:
            added = {int(i): AddedToken.of(token) for i, token in listed.items()}
        else:
            given = read("special_tokens_map.json")
            config |= {key: value for key, value in given.items() if not options.get(key)}
            json_tokens = read("tokenizer.json", MAX_MODEL_BYTES).get("added_tokens", [])
            added = _old_added_tokens(config, read("added_tokens.json"), json_tokens)
        by_content = {token.content: token for token in added.values()}
        for key in SINGLE_TOKENS:
            if config.get(key) is not None:
                token = _token(config[key])
                config[key] = by_content.get(str(token), token)
        extra = config.get("additional_special_tokens")
        config |= {"additional_special_tokens": list(map(_token, extra))} if extra else {}
        return {**config, "added_tokens_decoder": added}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Write all that `from_pretrained` reads back into a folder; the paths written."""
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(20, "expected a folder", str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        paths = [
            folder / (prefix + name)
            for name in ("tokenizer_config.json", "special_tokens_map.json")
        ]
        _write_json(paths[0], self._config_to_save())
        _write_json(paths[1], _to_plain(self.special_tokens_map_extended, typed=False))
        return tuple(map(str, paths)) + self._save_files(folder, legacy_format, filename_prefix)

    def _save_files(
        self, folder: Path, legacy_format: bool | None, prefix: str | None
    ) -> tuple[str, ...]:
        if legacy_format is False:
            raise ValueError("only a fast tokenizer can be saved as tokenizer.json alone")
        path = folder / (f"{prefix}-" if prefix else "").__add__("added_tokens.json")
        new = {t: i for t, i in self.added_tokens_encoder.items() if i >= self.vocab_size}
        if new:
            _write_json(path, new)
        return (*(self.save_vocabulary(folder, prefix) or ()), str(path))

    def _config_to_save(self) -> dict[str, Any]:
        names = {*self.init_kwargs, "model_max_length", "clean_up_tokenization_spaces"}
        config = {name: getattr(self, name, self.init_kwargs.get(name)) for name in names}
        config |= self.special_tokens_map
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        for name in ("name_or_path", "vocab_file", "tokenizer_file", "special_tokens_map_file"):
            config.pop(name, None)
        added = self.added_tokens_decoder.items()
        config["added_tokens_decoder"] = {str(i): asdict(token) for i, token in added}
        config["tokenizer_class"] = "LlamaTokenizer"
        plain: dict[str, Any] = _to_plain(config, typed=True)
        return plain


def _side(name: str, value: str) -> str:
    return _one_of(name, value, ("right", "left"))


def _one_of(
    name: str, value: bool | str, choices: Sequence[str], true: str = "", false: str = ""
) -> str:
    chosen = (true if value else false) if isinstance(value, bool) else value
    if chosen not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; found {value!r}")
    return chosen


def _is_text(value: Any) -> bool:
    """A string; or a list of strings, of pairs, or of lists of strings, judged by its beginning."""
    if isinstance(value, str) or not isinstance(value, list | tuple):
        return isinstance(value, str)
    first = value[0] if value else ""
    if isinstance(first, list | tuple):
        return not first or isinstance(first[0], str)
    return isinstance(first, str)


def _share(first: int, second: int, remove: int) -> tuple[int, int]:
    """How many tokens each of a pair loses: the longer one until they are equal, then both."""
    level = min(abs(first - second), remove)
    half = (remove - level) // 2
    other = remove - level - half
    return (level + half, other) if first > second else (half, level + other)


def _as_list(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _as_list(value.tolist())
    return [_as_list(row) for row in value] if isinstance(value, list | tuple) else value


def _old_added_tokens(
    config: dict[str, Any], added_tokens: dict[str, int], json_tokens: list[dict[str, Any]]
) -> dict[int, AddedToken]:
    """Added tokens of a checkpoint from before `added_tokens_decoder`."""
    named = [config[key] for key in SINGLE_TOKENS if config.get(key)]
    special = {str(_token(t)) for t in [*named, *(config.get("additional_special_tokens") or [])]}
    added = {i: AddedToken(name, special=name in special) for name, i in added_tokens.items()}
    return added | {token["id"]: AddedToken.of(token) for token in json_tokens}


def _token(value: Any) -> Any:
    """A special token as a file gives it: a string, or a dictionary that becomes an AddedToken."""
    return AddedToken.of({"special": True, **value}) if isinstance(value, Mapping) else value


def _to_plain(value: Any, typed: bool) -> Any:
    """AddedTokens as dictionaries: with a type mark, or without the `special` flag."""
    if isinstance(value, AddedToken):
        fields = asdict(value)
        if not typed:
            del fields["special"]
        return {**fields, "__type": "AddedToken"} if typed else fields
    if isinstance(value, Mapping):
        return {key: _to_plain(item, typed) for key, item in value.items()}
    return [_to_plain(item, typed) for item in value] if isinstance(value, list | tuple) else value


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _copy(source: str, save_directory: str | os.PathLike[str], prefix: str | None) -> tuple[str]:
    target = Path(save_directory) / ((f"{prefix}-" if prefix else "") + "tokenizer.model")
    if Path(source).resolve() != target.resolve():
        shutil.copyfile(source, target)
    return (str(target),)


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
            "right",
            **{k: None if t is None else AddedToken.of(t, special=True) for k, t in named.items()},
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
        return {key: value for key, value in vars(self).items() if key != "sp_model"}

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
        pieces = {self._id_to_token(i): i for i in range(self.vocab_size)}
        return pieces | self.added_tokens_encoder

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
            token.special = token.special or special
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
        self, text: str, add_special_tokens: bool = False, split_special_tokens: bool | None = None
    ) -> list[str]:
        """The tokens of a text as strings; no control tokens are put around them.

        split_special_tokens=True keeps control tokens that are written in the text plain text.
        """
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        return self._tokenize(text, split)

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

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; special ones as they are spelled, the rest through sentencepiece."""
        if not tokens:
            return ""
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
    a UnicodeEncodeError; an empty batch is a ValueError.
    """

    is_fast = True
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
            unk_token, bos_token, eos_token = (
                AddedToken.of(t, special=True) if t else t for t in (unk_token, bos_token, eos_token)
            )
            pad = options.get("pad_token")
            slow = {"sp_model_kwargs": {}, "spaces_between_special_tokens": False}
            options = slow | options | {"legacy": options.get("legacy") is not False}
            options["pad_token"] = AddedToken.of(pad, special=True) if pad else None
        self.vocab_file = None if vocab_file is None else str(vocab_file)
        self.legacy = bool(options.get("legacy", True))
        self.use_default_system_prompt = use_default_system_prompt
        super().__init__(
            "left",
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            use_default_system_prompt=use_default_system_prompt,
            **options,
        )
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
        return {i: AddedToken.of(added[i]) for i in sorted(added)}

    def get_vocab(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def _add_tokens(self, tokens: list[Any], special: bool) -> int:
        library = require("tokenizers", extra="hf")
        made = []
        for token in (AddedToken.of(t, special=special) for t in tokens):
            made.append(
                library.AddedToken(**{**asdict(token), "special": token.special or special})
            )
        add = self._tokenizer.add_special_tokens if special else self._tokenizer.add_tokens
        count = int(add(made))
        self._added = self.added_tokens_decoder
        return count

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

    def tokenize(self, text: str, pair: str | None = None, **options: Any) -> list[str]:
        """The tokens of a text as strings; control tokens only with add_special_tokens=True."""
        options.setdefault("add_special_tokens", False)
        return self.encode_plus(text, pair, **options).tokens()

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
        pair = any(isinstance(text, tuple) for text in texts)
        around = self._tokenizer.num_special_tokens_to_add(pair) * options.add_special_tokens
        cut = options.truncation != "do_not_truncate"
        if cut and options.stride and options.stride >= (options.max_length or 0) - around:
            raise ValueError("stride must be less than max_length without the control tokens")
        try:
            backend.encode_special_tokens = self.split_special_tokens if split is None else split
            if cut:
                backend.enable_truncation(
                    options.max_length, stride=options.stride, strategy=options.truncation,
                    direction=self.truncation_side,
                )  # fmt: skip
            if options.padding != "do_not_pad":
                backend.enable_padding(
                    length=options.max_length if options.padding == "max_length" else None,
                    direction=self.padding_side, pad_id=self.pad_token_id,
                    pad_token=self.pad_token, pad_type_id=self.pad_token_type_id,
                    pad_to_multiple_of=options.pad_to_multiple_of,
                )  # fmt: skip
            return list(
                backend.encode_batch(
                    texts,
                    add_special_tokens=options.add_special_tokens,
                    is_pretokenized=options.is_split_into_words,
                )
            )
        except TypeError:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(str(error)) from error
        finally:
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = False

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
            self._tokenizer.save(str(path))
            paths += (str(path),)
        return paths


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
