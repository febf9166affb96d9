"""What LlamaTokenizer and LlamaTokenizerFast share: special tokens, calls, chat, files."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from llama_np.chat_template import LLAMA2_SYSTEM_PROMPT, llama2_prompt, render, shield
from llama_np.checkpoint import locate, tokenizer_folder
from llama_np.errors import TokenizerError
from llama_np.hf_encoding import (
    PADDINGS,
    TRUNCATIONS,
    AddedToken,
    BatchEncoding,
    Options,
    as_list,
    one_of,
    pad_batch,
    to_plain,
    token_from_file,
    truncate,
)
from llama_np.hf_loading import refuse_upload, split_options
from llama_np.tokenizer import (
    MAX_JSON_BYTES,
    MAX_MODEL_BYTES,
    check_ids,
    find_chat_template,
    read_json,
)

logger = logging.getLogger(__name__)

NO_LIMIT = int(1e30)  # model_max_length of a tokenizer that states none
LARGE = int(1e20)
SIDES = ("right", "left")
MODEL_INPUT_NAMES = ("input_ids", "attention_mask")
SINGLE_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
SPECIAL_TOKENS = (*SINGLE_TOKENS, "additional_special_tokens")
TYPES: dict[str, type | UnionType] = {
    **dict.fromkeys(
        (
            "add_bos_token", "add_eos_token", "legacy", "clean_up_tokenization_spaces",
            "split_special_tokens", "use_default_system_prompt", "from_slow",
            "spaces_between_special_tokens",
        ),
        bool,
    ),
    "padding_side": str,
    "truncation_side": str,
    "model_max_length": int | float,
    "max_len": int | float,
    "pad_token_type_id": int,
    "sp_model_kwargs": dict,
    "added_tokens_decoder": dict,
    "additional_special_tokens": list,
    "model_input_names": list,
}  # fmt: skip
# Entries of tokenizer_config.json, and keywords of from_pretrained, that no constructor takes.
NOT_CONSTRUCTOR = {
    "tokenizer_class", "token", "cache_dir", "local_files_only", "force_download",
    "subfolder", "trust_remote_code", "use_fast", "init_inputs", "auto_map", "tokenizer_object",
}  # fmt: skip


class _Special:
    """A special token as a string attribute, such as `bos_token`; None when unset."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Any, owner: type | None = None) -> Any:
        value = None if tokenizer is None else tokenizer._special.get(self.name)
        return None if value is None else str(value)

    def __set__(self, tokenizer: LlamaTokenizerBase, value: Any) -> None:
        if value is not None and not isinstance(value, str):
            try:
                value = AddedToken.of(value)
            except TypeError as problem:
                raise ValueError(f"Cannot set a non-string value as the {self.name}") from problem
        tokenizer._special[self.name] = value


class _SpecialId:
    """The id of a special token, such as `bos_token_id`; None when unset."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.token = name.removesuffix("_id")

    def __get__(self, tokenizer: Any, owner: type | None = None) -> Any:
        if tokenizer is None or getattr(tokenizer, self.token) is None:
            return None
        return tokenizer.convert_tokens_to_ids(getattr(tokenizer, self.token))

    def __set__(self, tokenizer: LlamaTokenizerBase, value: int | None) -> None:
        token = None if value is None else tokenizer.convert_ids_to_tokens(value)
        setattr(tokenizer, self.token, token)


class LlamaTokenizerBase:
    """What LlamaTokenizer and LlamaTokenizerFast share; see those."""

    is_fast = False
    _saved_class = "LlamaTokenizer"
    padding_side = "right"
    truncation_side = "right"
    vocab_file: str | None
    legacy: bool
    use_default_system_prompt: bool

    bos_token, eos_token, unk_token, sep_token = _Special(), _Special(), _Special(), _Special()
    pad_token, cls_token, mask_token = _Special(), _Special(), _Special()
    bos_token_id, eos_token_id, unk_token_id = _SpecialId(), _SpecialId(), _SpecialId()
    pad_token_id, sep_token_id = _SpecialId(), _SpecialId()
    cls_token_id, mask_token_id = _SpecialId(), _SpecialId()

    # --- construction ---

    def __init__(self, **options: Any) -> None:
        self.init_kwargs = deepcopy(options)
        self.name_or_path = str(options.get("name_or_path", ""))
        limit = options.get("model_max_length", options.get("max_len"))
        self.model_max_length: int = NO_LIMIT if limit is None else limit
        for name in ("padding_side", "truncation_side"):
            setattr(self, name, one_of(name, options.get(name, getattr(self, name)), SIDES))
        self.clean_up_tokenization_spaces = bool(options.get("clean_up_tokenization_spaces"))
        self.split_special_tokens = bool(options.get("split_special_tokens", False))
        self.chat_template: str | None = options.get("chat_template")
        self.pad_token_type_id = int(options.get("pad_token_type_id", 0))
        self.model_input_names = list(options.get("model_input_names", MODEL_INPUT_NAMES))
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
                setattr(self, name, value)  # checks it
                token = AddedToken.of(value, special=True).as_special(settled=not self.is_fast)
                setattr(self, name, token)
                new += [token] if token not in new else []
                continue
            if isinstance(value, str):
                raise TypeError(f"{name} must be a list of str or AddedToken, found {value!r}")
            tokens = [AddedToken.of(token, special=True) for token in value]
            tokens = [token.as_special(settled=not self.is_fast) for token in tokens]
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
            return self._id_to_token(check_ids([int(ids)], self._id_limit())[0])
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
        row: Any = [token_ids] if isinstance(token_ids, int | np.integer) else token_ids
        ids = check_ids(row, self._id_limit())
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
        around: list[list[Any]] = []
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
        pad = one_of("padding", padding, PADDINGS, true="longest", false="do_not_pad")
        cut_name = one_of("truncation", truncation or False, TRUNCATIONS,
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
            encoding = self._padded(encoding, options, mask)
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
            if limit is None:
                raise TypeError("num_truncated_tokens are counted from max_length: give one")
            row["overflowing_tokens"] = lost
            row["num_truncated_tokens"] = total - limit
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
        """Remove tokens from truncation_side: (ids, pair, what was removed and `stride` more).

        A sequence that would lose all its tokens is left alone, with an error in the log.
        """
        strategy = one_of("truncation_strategy", truncation_strategy, TRUNCATIONS)
        side = one_of("truncation_side", self.truncation_side, SIDES)
        return truncate(ids, pair_ids, num_tokens_to_remove, strategy, stride, side)

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
        inputs = {key: as_list(value) for key, value in encoded_inputs.items()}
        rows = inputs[name] if isinstance(inputs[name][0], list | tuple) else [inputs[name]]
        first = next((row[0] for row in rows if len(row)), 0)
        if not isinstance(first, int):
            raise ValueError(f"{name} must be integers: {first!r:.80}")  # noqa: TRY004
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
        fill = {
            self.model_input_names[0]: self.pad_token_id,
            "token_type_ids": self.pad_token_type_id,
            "special_tokens_mask": 1,
            "attention_mask": 0,
        }
        side = one_of("padding_side", self.padding_side, SIDES)
        return pad_batch(inputs, options, mask, fill, side)

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
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """A tokenizer from a checkpoint folder, a bundled name, a file, or owner/name on the hub.

        revision, subfolder, cache_dir, token, local_files_only and force_download say where;
        other keywords override the files. Errors: OSError; TokenizerError for malformed files.
        """
        name = pretrained_model_name_or_path
        place, options = split_options({"revision": revision, **options})
        path = Path(name)
        if path.is_file() and path.suffix in (".gguf", ".bin", ".safetensors"):
            with tokenizer_folder(path) as folder:
                tokenizer = cls.from_pretrained(folder, **options)
            tokenizer.name_or_path = str(name)
            return tokenizer
        if path.is_file():
            key = "tokenizer_file" if path.suffix == ".json" else "vocab_file"
            found, saved = {key: path}, cls._saved(None, options)
        else:
            folder = locate(name, weights=False, **place)
            files = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
            found = {key: folder / file for key, file in files.items() if (folder / file).exists()}
            saved = cls._saved(folder, options)
        if not found or not (cls.is_fast or "vocab_file" in found):
            what = "no tokenizer.json" if cls.is_fast else "LlamaTokenizer reads nothing else"
            raise FileNotFoundError(2, f"No tokenizer.model in this folder; {what}", str(name))
        return cls(**{**found, **saved, "name_or_path": str(name)})

    @classmethod
    def _saved(cls, folder: Path | None, options: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments as the JSON files of a folder and `options` give them."""

        def read(name: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
            return read_json(folder / name, limit) if folder else {}

        config = read("tokenizer_config.json")
        _check_types(config, f"{str(folder)!r}: tokenizer_config.json")
        for key in (*NOT_CONSTRUCTOR, "vocab_file", "tokenizer_file"):
            config.pop(key, None)
        config |= {key: value for key, value in options.items() if key not in NOT_CONSTRUCTOR}
        template = options.get("chat_template") or find_chat_template(folder, config)
        config |= {"chat_template": template} if "chat_template" in config or template else {}
        listed = config.pop("added_tokens_decoder", None)
        if listed is not None:
            added = {int(i): _added_token(token) for i, token in listed.items()}
        else:
            given = read("special_tokens_map.json")
            config |= {key: value for key, value in given.items() if not options.get(key)}
            json_tokens = read("tokenizer.json", MAX_MODEL_BYTES).get("added_tokens", [])
            added = _old_added_tokens(config, read("added_tokens.json"), json_tokens)
        # Only added_tokens_decoder knows the flags better than the special token itself.
        by_content = {t.content: t for t in added.values()} if listed is not None else {}
        for key in SINGLE_TOKENS:
            if config.get(key) is not None:
                token = token_from_file(config[key])
                config[key] = by_content.get(str(token), token)
        extra = config.get("additional_special_tokens")
        config |= {"additional_special_tokens": list(map(token_from_file, extra))} if extra else {}
        return {**config, "added_tokens_decoder": added}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
    ) -> tuple[str, ...]:
        """Write all that `from_pretrained` reads back into a folder; the paths written."""
        refuse_upload(push_to_hub)
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
        _write_json(paths[1], to_plain(self.special_tokens_map_extended, typed=False))
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
        config["tokenizer_class"] = self._saved_class
        plain: dict[str, Any] = to_plain(config, typed=True)
        return plain


def _is_text(value: Any) -> bool:
    """A string; or a list of strings, of pairs, or of lists of strings, judged by its beginning."""
    if isinstance(value, str) or not isinstance(value, list | tuple):
        return isinstance(value, str)
    first = value[0] if value else ""
    if isinstance(first, list | tuple):
        return not first or isinstance(first[0], str)
    return isinstance(first, str)


def _old_added_tokens(
    config: dict[str, Any], added_tokens: dict[str, int], json_tokens: list[dict[str, Any]]
) -> dict[int, AddedToken]:
    """Added tokens of a checkpoint from before `added_tokens_decoder`."""
    named = [config[key] for key in SINGLE_TOKENS if config.get(key)]
    named += config.get("additional_special_tokens") or []
    special = {str(token_from_file(token)) for token in named}
    added = {int(i): AddedToken(name, special=name in special) for name, i in added_tokens.items()}
    return added | {int(token["id"]): _added_token(token) for token in json_tokens}


def _added_token(value: Any) -> AddedToken:
    token_from_file(value)  # checks it; but what a file does not call special is not special here
    return AddedToken.of(value)


def _check_types(config: dict[str, Any], name: str) -> None:
    """Refuse a value of tokenizer_config.json that would fail later, far from here."""
    for key, kind in TYPES.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise TokenizerError(f"{name}: {key} is {value!r:.80}, expected {kind}")


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
