"""What goes into a Hugging Face tokenizer and what comes out: tokens, options, batches, padding."""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from llama_np.errors import TokenizerError

logger = logging.getLogger(__name__)

PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")


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
        self._settled = self.normalized is not None
        self.normalized = not self.special if self.normalized is None else self.normalized

    def __str__(self) -> str:
        return self.content

    def __hash__(self) -> int:
        return hash(self.content)

    def as_special(self, settled: bool) -> AddedToken:
        """The same token, special; unless `settled`, `normalized` follows if it was not given."""
        token = copy(self)
        token.special = True
        if not settled and not self._settled:
            token.normalized = False
        token._settled = settled or self._settled
        return token

    @classmethod
    def of(cls, token: Any, special: bool = False) -> AddedToken:
        """From a string, a dict, or any object with these attributes."""
        if isinstance(token, str):
            return cls(token, special=special)
        if isinstance(token, cls):
            return copy(token)
        names = cls.__dataclass_fields__
        if isinstance(token, Mapping):
            flags = {k: bool(v) for k, v in token.items() if k in names and k != "content"}
            return cls(token["content"], **flags)
        try:
            return cls(**{name: getattr(token, name) for name in names})
        except AttributeError as problem:
            found = type(token).__name__
            raise TypeError(f"a token must be str or AddedToken, found {found}") from problem


class CharSpan(NamedTuple):
    """Characters start up to, without, end of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens start up to, without, end of a row."""

    start: int
    end: int


class BatchEncoding(UserDict[str, Any]):
    """What a tokenizer returns: a dictionary whose entries are also attributes.

    encoding: what the package `tokenizers` made, one or one for each row. tensor_type "np" turns
    lists into arrays, with `prepend_batch_axis` those of a single row.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: Any = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ) -> None:
        super().__init__(data or {})
        several = encoding is None or isinstance(encoding, list | tuple)
        self.encodings: Sequence[Any] | None = encoding if several else [encoding]
        self._n_sequences = n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

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

    def to(self, *device: Any, **options: Any) -> BatchEncoding:
        """Everything stays in memory. Returns itself."""
        return self

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

    words = word_ids  # its older name

    @property
    def n_sequences(self) -> int | None:
        """1 or 2, how many texts each row was made of; None from a slow tokenizer."""
        if self._n_sequences is None and self.encodings:
            self._n_sequences = int(self.encodings[0].n_sequences)
        return self._n_sequences

    # Where the parts of a text are; the row may be left out of a batch of one:
    # x_to_y(index) or x_to_y(row, index). None where there is nothing, as at a control token.

    def token_to_sequence(self, row_or_token: int, token: int | None = None) -> int | None:
        """Which text of a pair a token belongs to."""
        row, index = _place(row_or_token, token)
        found = self._encoding(row).token_to_sequence(index)
        return None if found is None else int(found)

    def token_to_word(self, row_or_token: int, token: int | None = None) -> int | None:
        """The word that a token belongs to."""
        row, index = _place(row_or_token, token)
        return _second(self._encoding(row).token_to_word(index))

    def token_to_chars(self, row_or_token: int, token: int | None = None) -> CharSpan | None:
        """The characters that a token stands for."""
        row, index = _place(row_or_token, token)
        span = _second(self._encoding(row).token_to_chars(index))
        return None if span is None else CharSpan(*span)

    def char_to_token(
        self, row_or_char: int, char: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token that a character of text `sequence_index` is part of."""
        row, index = _place(row_or_char, char)
        found = self._encoding(row).char_to_token(index, sequence_index)
        return None if found is None else int(found)

    def char_to_word(
        self, row_or_char: int, char: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that a character of text `sequence_index` is part of."""
        row, index = _place(row_or_char, char)
        found = self._encoding(row).char_to_word(index, sequence_index)
        return None if found is None else int(found)

    def word_to_tokens(
        self, row_or_word: int, word: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word of text `sequence_index`."""
        row, index = _place(row_or_word, word)
        span = self._encoding(row).word_to_tokens(index, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, row_or_word: int, word: int | None = None, sequence_index: int = 0
    ) -> CharSpan:
        """The characters of a word of text `sequence_index`."""
        row, index = _place(row_or_word, word)
        return CharSpan(*self._encoding(row).word_to_chars(index, sequence_index))

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


def _place(first: int, second: int | None) -> tuple[int, int]:
    return (0, first) if second is None else (first, second)


def _second(found: Any) -> Any:
    """Without the text that some versions of `tokenizers` put in front: (text, what)."""
    nested = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], tuple)
    return found[1] if nested else found


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


def truncate(
    ids: list[int], pair: list[int] | None, remove: int, strategy: str, stride: int, side: str
) -> tuple[list[int], list[int] | None, list[int]]:
    """Remove tokens from `side`: (ids, pair, what was removed and `stride` tokens more)."""
    if remove <= 0:
        return ids, pair, []
    if strategy == "longest_first" and pair is not None:
        first, second = _share(len(ids), len(pair), remove)
        return _shorten(ids, first, side), _shorten(pair, second, side), []
    target = pair if strategy == "only_second" else ids
    if strategy == "do_not_truncate" or target is None:
        return ids, pair, []
    if len(target) <= remove:
        logger.error(f"cannot remove {remove} of {len(target)} tokens; nothing is truncated")
        return ids, pair, []
    window = min(len(target), stride + remove)
    lost = target[-window:] if side == "right" else target[:window]
    kept = _shorten(target, remove, side)
    return (ids, kept, lost) if strategy == "only_second" else (kept, pair, lost)


def _shorten(ids: list[int], count: int, side: str) -> list[int]:
    return ids[count:] if side == "left" else ids[: max(len(ids) - count, 0)]


def _share(first: int, second: int, remove: int) -> tuple[int, int]:
    """How many tokens each of a pair loses: the longer one until they are equal, then both."""
    level = min(abs(first - second), remove)
    half = (remove - level) // 2
    other = remove - level - half
    return (level + half, other) if first > second else (half, level + other)


def pad_batch(
    inputs: dict[str, Any], options: Options, mask: bool, fill: dict[str, Any], side: str
) -> dict[str, Any]:
    """Pad one row, or the rows of a batch to one length.

    `fill` names the entries to pad and what with, the ids first; `mask` asks for a mask.
    """
    rows = inputs[next(iter(fill))]
    if not rows or not isinstance(rows[0], list | tuple):
        return _pad_row(dict(inputs), options, mask, fill, side)
    if any(len(value) != len(rows) for value in inputs.values()):
        raise ValueError("the entries of a batch must have the same number of rows")
    if options.padding == "longest":
        options = replace(options, padding="max_length", max_length=max(map(len, rows)))
    padded = [
        _pad_row({key: value[i] for key, value in inputs.items()}, options, mask, fill, side)
        for i in range(len(rows))
    ]
    return {key: [row[key] for row in padded] for key in padded[0]}


def _pad_row(
    row: dict[str, Any], options: Options, mask: bool, fill: dict[str, Any], side: str
) -> dict[str, Any]:
    length = len(row[next(iter(fill))])
    if mask and "attention_mask" not in row:
        row["attention_mask"] = [1] * length
    if options.padding == "do_not_pad":
        return row
    target = length if options.padding == "longest" else int(options.max_length or 0)
    multiple = options.pad_to_multiple_of or 1
    missing = max(-(-target // multiple) * multiple - length, 0)
    for key, value in fill.items():
        if key in row and (mask or key != "attention_mask"):
            pads, old = [value] * missing, list(row[key])
            row[key] = pads + old if side == "left" else old + pads
    return row


def one_of(
    name: str, value: bool | str, choices: Sequence[str], true: str = "", false: str = ""
) -> str:
    chosen = (true if value else false) if isinstance(value, bool) else value
    if chosen not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; found {value!r}")
    return chosen


def as_list(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return as_list(value.tolist())
    return [as_list(row) for row in value] if isinstance(value, list | tuple) else value


def token_from_file(value: Any) -> Any:
    """A special token as a file gives it: a string, or a dictionary that becomes an AddedToken.

    Errors: TokenizerError.
    """
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return AddedToken.of({"special": True, **value})
    if not isinstance(value, str | AddedToken):
        raise TokenizerError(f"a token must be a string or an object with one, found {value!r:.80}")
    return value


def to_plain(value: Any, typed: bool) -> Any:
    """AddedTokens as dictionaries: with a type mark, or without the `special` flag."""
    if isinstance(value, AddedToken):
        fields = asdict(value)
        if not typed:
            del fields["special"]
        return {**fields, "__type": "AddedToken"} if typed else fields
    if isinstance(value, Mapping):
        return {key: to_plain(item, typed) for key, item in value.items()}
    return [to_plain(item, typed) for item in value] if isinstance(value, list | tuple) else value
