"""Text to token ids and back: SentencePiece models, and tokenizer.json.

A token is a sequence of bytes. That one idea gives decoding (join the bytes, read them as UTF-8)
and streaming (the same, with a decoder that waits until a character is complete), whatever the
file format. Text from a user never becomes a control token, unless the caller asks for it with
`special=True`.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from llama_np import files
from llama_np.errors import CheckpointError, TokenizerError, require

MAX_MODEL_BYTES = 64 << 20  # tokenizer.model and tokenizer.json
MAX_JSON_BYTES = 4 << 20  # the small files beside them
MAX_TEMPLATE_BYTES = 1 << 20
MAX_VOCABULARY = 1 << 24

SPACE = "\u2581"  # SentencePiece writes a space as this character
# A protobuf parser merges repeated messages, so these bytes, appended to a model, set
# normalizer_spec.add_dummy_prefix = false and change nothing else.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

Ids = Iterable[int] | np.ndarray


# --- files ---------------------------------------------------------------------------------------


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Errors: FileNotFoundError, IsADirectoryError, PermissionError; TokenizerError.
    """
    try:
        return files.read_bounded(path, limit)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file, or {} if there is no such file. Errors: TokenizerError."""
    try:
        data = json.loads(read_bounded(path, limit).decode("utf-8-sig"))
    except FileNotFoundError:
        return {}
    except TokenizerError:
        raise
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{str(path)!r}: expected a JSON object, found {type(data).__name__}")
    return data


def guess_format(data: bytes) -> str:
    """What a file that is not a SentencePiece model looks like, in words."""
    start = data[:512].lstrip()
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", start):
        return "a tiktoken vocabulary (LLaMA-3; use the tokenizer.json of the Hugging Face version)"
    return files.guess_format(start)


# --- the few protobuf fields that sentencepiece does not check -----------------------------------


def proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (number, value) fields of a serialized protobuf message: integers, or bytes.

    Errors: TokenizerError when a field reaches past the end.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise TokenizerError(f"protobuf wire type {wire} at byte {at}")
        length, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
        if length > len(data) - at:
            raise TokenizerError(f"a field of {length} bytes at byte {at} of {len(data)}")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise TokenizerError(f"a number that does not end at byte {at}")


def load_sentencepiece(
    data: bytes, name: str = "<bytes>", **options: Any
) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece processor over the bytes of a model, after the checks that the library omits.

    Errors: TokenizerError for an unreadable model, non-finite scores, a model type other than BPE
    and UNIGRAM, and for missing unk, bos or eos pieces.
    """
    try:
        trainer = trainer_spec(data)
        if not data:
            raise TokenizerError("no pieces")
        processor = sentencepiece.SentencePieceProcessor(model_proto=data, **options)
    except (TokenizerError, RuntimeError, UnicodeDecodeError) as error:
        kind = guess_format(data)
        raise TokenizerError(
            f"{name!r} is not a SentencePiece model; it looks like {kind} ({error})"
        ) from error
    _check_trainer(trainer, name)
    for what in ("unk", "bos", "eos"):
        if getattr(processor, what + "_id")() < 0:
            raise TokenizerError(f"{name!r}: no {what} piece, which a LLaMA vocabulary needs")
    for index in range(len(processor)):
        if not math.isfinite(processor.get_score(index)):
            raise TokenizerError(f"{name!r}: score of piece {index} is not finite")
    return processor


def trainer_spec(data: bytes) -> dict[int, int | bytes]:
    """The settings that a serialized SentencePiece model was trained with, by field number."""
    specs = [value for number, value in proto_fields(data) if number == 2]
    return dict(field for spec in specs if isinstance(spec, bytes) for field in proto_fields(spec))


def _check_trainer(trainer: dict[int, int | bytes], name: str) -> None:
    model_type = trainer.get(3, 1)  # the protobuf default is UNIGRAM
    if model_type not in (1, 2):
        raise TokenizerError(
            f"{name!r}: model type {model_type!r}, expected 1 (UNIGRAM) or 2 (BPE)"
        )
    if trainer.get(24):
        raise NotImplementedError(f"{name!r}: treat_whitespace_as_suffix is not implemented")


# --- the two backends: text chunk -> ids, id -> piece, id -> bytes -------------------------------


class _SentencePiece:
    """A SentencePiece model. `legacy`: every chunk, not only the first, gets the prefix space."""

    def __init__(self, data: bytes, name: str, legacy: bool) -> None:
        self.processor = load_sentencepiece(data, name)
        self._data, self.prefixes_every_part = data, legacy
        self._continue: sentencepiece.SentencePieceProcessor | None = None
        self.size = len(self.processor)
        dummy = self.processor.encode("a") != self._without_prefix().encode("a")
        self.strips_space = dummy

    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        if self._continue is None:
            self._continue = sentencepiece.SentencePieceProcessor(
                model_proto=self._data + NO_DUMMY_PREFIX
            )
        return self._continue

    def encode(self, text: str, prefix: bool) -> list[int]:
        processor = self.processor if prefix else self._without_prefix()
        return list(processor.encode(text))

    def piece(self, index: int) -> str:
        return str(self.processor.id_to_piece(index))

    def piece_bytes(self, index: int) -> bytes:
        piece = self.piece(index)
        if self.processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def controls(self) -> dict[str, int]:
        sp = self.processor
        return {self.piece(i): i for i in range(self.size) if sp.is_control(i) or sp.is_unknown(i)}


class _TokenizersJson:
    """A tokenizer.json, run by the package `tokenizers`."""

    def __init__(self, data: bytes, name: str) -> None:
        library = require("tokenizers", extra="hf")
        spec = _parse_tokenizer_json(data, name)
        self.added = {int(t["id"]): t for t in spec["added_tokens"]}
        # Control tokens are cut out before (Tokenizer.split), so the library must never see one
        # in text, not even those that the file calls "not special". Blank ones are vocabulary.
        for token in spec["added_tokens"]:
            token["special"] = bool(token.get("special")) or bool(token["content"].strip())
        self.spec, self._library = spec, library
        self._first = self._build(spec, name)
        self._later = self._build(_never_prepend(spec), name) if _prepends_once(spec) else None
        self.prefixes_every_part = self._later is None
        self._vocab = {i: piece for piece, i in self._first.get_vocab(True).items()}
        self.size = max(self._vocab, default=-1) + 1
        self._kind, self.strips_space = _decoder_kind(spec.get("decoder"), name)

    def _build(self, spec: dict[str, Any], name: str) -> Any:
        try:
            tokenizer = self._library.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises nothing more specific
            raise TokenizerError(f"{name!r} is not a tokenizer.json: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode(self, text: str, prefix: bool) -> list[int]:
        tokenizer = self._first if prefix or self._later is None else self._later
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def template_prefix(self) -> list[int]:
        """What the file's post-processor puts around an empty text."""
        return list(self._first.encode("", add_special_tokens=True).ids)

    def piece(self, index: int) -> str:
        return self._vocab.get(index, "")

    def piece_bytes(self, index: int) -> bytes:
        piece = self.piece(index)
        if index in self.added:
            return piece.encode()
        if self._kind == "byte-level":
            known = all(c in _BYTE_OF for c in piece)
            return bytes(_BYTE_OF[c] for c in piece) if known else piece.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) and self._kind == "byte-fallback":
            return bytes([int(piece[3:5], 16)])
        return (" " + piece if self._kind == "words" else piece.replace(SPACE, " ")).encode()

    def controls(self) -> dict[str, int]:
        return {t["content"]: i for i, t in self.added.items() if t["special"]}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself if visible, otherwise U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def _parse_tokenizer_json(data: bytes, name: str) -> dict[str, Any]:
    try:
        spec = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        kind = guess_format(data)
        raise TokenizerError(f"{name!r} is not JSON; it looks like {kind}: {error}") from error
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise TokenizerError(f"{name!r}: no model.vocab; expected a tokenizer.json of `tokenizers`")
    added = spec.setdefault("added_tokens", [])
    vocab = model["vocab"]
    if not isinstance(added, list) or not all(_is_added_token(t) for t in added):
        raise TokenizerError(f"{name!r}: added_tokens must be objects with a content and an id")
    if isinstance(vocab, dict):
        _check_vocab_ids(vocab, added, name)
    return spec


def _is_added_token(token: object) -> bool:
    return (
        isinstance(token, dict)
        and type(token.get("id")) is int
        and 0 <= token["id"] < MAX_VOCABULARY
        and isinstance(token.get("content"), str)
        and token["content"] != ""
    )


def _check_vocab_ids(vocab: dict[str, Any], added: list[dict[str, Any]], name: str) -> None:
    owner: dict[int, str] = {}
    for piece, index in [*vocab.items(), *((t["content"], t["id"]) for t in added)]:
        if type(index) is not int or not 0 <= index < MAX_VOCABULARY:
            raise TokenizerError(f"{name!r}: id {index!r} of {piece!r} is not a token id")
        if owner.setdefault(index, piece) != piece:
            raise TokenizerError(f"{name!r}: id {index} is both {owner[index]!r} and {piece!r}")


def _parts(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences flattened."""
    if not isinstance(spec, dict):
        return []
    inner = spec.get("decoders", spec.get("pretokenizers", spec.get("normalizers")))
    return [p for step in inner for p in _parts(step)] if isinstance(inner, list) else [spec]


def _prepends_once(spec: dict[str, Any]) -> bool:
    steps = _parts(spec.get("pre_tokenizer"))
    return any(s.get("type") == "Metaspace" and s.get("prepend_scheme") == "first" for s in steps)


def _never_prepend(spec: dict[str, Any]) -> dict[str, Any]:
    later: dict[str, Any] = json.loads(json.dumps(spec))
    for step in _parts(later["pre_tokenizer"]):
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
    return later


def _decoder_kind(decoder: dict[str, Any] | None, name: str) -> tuple[str, bool]:
    """How pieces become bytes, and whether the first space of a text is dropped."""
    steps = {str(step.get("type")): step for step in _parts(decoder)}
    if "ByteLevel" in steps:
        return "byte-level", False
    unknown = steps.keys() - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if unknown:
        raise NotImplementedError(f"{name!r}: decoder {sorted(unknown)} is not implemented")
    if not steps:
        return "words", True
    strips = (
        "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
    )
    return ("byte-fallback" if "ByteFallback" in steps else "pieces"), strips


# --- the tokenizer -------------------------------------------------------------------------------


class Tokenizer:
    """Text <-> ids over a SentencePiece model or a tokenizer.json; made by `load_tokenizer`.

    `bos_id`, `pad_id`: id or None. `eos_ids`: every id that ends a text, the main one first.
    `vocab_size`: number of ids, added tokens included. `chat_template`: Jinja source or None.
    `special_tokens`: the strings of all control and added tokens, with their ids.
    """

    def __init__(self, backend: _SentencePiece | _TokenizersJson, files: _Files) -> None:
        self._backend = backend
        added = files.added_tokens()
        self.special_tokens = backend.controls() | {t["content"]: i for i, t in added.items()}
        self._added = {i: str(t["content"]) for i, t in added.items()}
        self.vocab_size = max([backend.size - 1, *added]) + 1
        self._hidden = _hidden_ids(backend, added)
        self._bytes: dict[int, bytes] = {}
        self._cut = _cut_pattern(self.special_tokens, added)
        self._inside = _inside_pattern(self.special_tokens, backend)
        self.chat_template = find_chat_template(files.folder, files.tokenizer_config)
        self._set_special_ids(files)

    def _set_special_ids(self, files: _Files) -> None:
        backend = self._backend
        if isinstance(backend, _SentencePiece):
            sp = backend.processor
            defaults = {"bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id()}
        else:
            defaults = dict(zip(["bos"], backend.template_prefix(), strict=False))
        named = {what: self._named(files, what) for what in ("bos", "eos", "pad")}
        found = {w: defaults.get(w) if i is None else i for w, i in named.items()}
        self.bos_id, eos, self.pad_id = (_id_or_none(found[w]) for w in ("bos", "eos", "pad"))
        listed = [*([] if eos is None else [eos]), *files.eos_ids(self.vocab_size)]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(listed))
        adds_bos = self._adds_bos(files.tokenizer_config, in_file="bos" in defaults)
        self._prefix = [self.bos_id] if adds_bos and self.bos_id is not None else []

    def _adds_bos(self, config: dict[str, Any], in_file: bool) -> bool:
        """Whether a text starts with the BOS; only Llama's classes let tokenizer_config decide."""
        llama = str(config.get("tokenizer_class")).startswith("Llama")
        asked = config.get("add_bos_token")
        decides = llama or isinstance(self._backend, _SentencePiece)
        return bool(asked) if decides and asked is not None else llama or in_file

    def _named(self, files: _Files, what: str) -> int | None:
        """The id of the token that the folder's files call the bos, eos or pad token."""
        name = files.token_name(what)
        if name is None:
            return None
        if name in self.special_tokens:
            return self.special_tokens[name]
        ids = self._backend.encode(name, prefix=False)
        return ids[0] if len(ids) == 1 and self._backend.piece(ids[0]) == name else None

    def encode(
        self, text: str, bos: bool = True, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        `bos` puts the BOS in front if the model is used with one (its files can say no, as those
        of SmolLM2 do); `eos` appends the main EOS. `special=True` turns control tokens that are
        written out in the text ("</s>") into their ids: for templates, never for a user's text.
        Errors: TypeError, UnicodeEncodeError (lone surrogates).
        """
        check_text(text)
        ids = self.encode_parts(self.split(text) if special else [text])
        end = [self.eos_ids[0]] if eos and self.eos_ids else []
        return [*(self._prefix if bos else []), *ids, *end]

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of a text in parts: strings are plain text, integers are control tokens as they are.

        Only the first part gets the prefix space (every part, in the `legacy` way of LLaMA-2).
        """
        ids: list[int] = []
        for place, part in enumerate(parts):
            if isinstance(part, str):
                prefix = place == 0 or self._backend.prefixes_every_part
                for text in self._inside.split(part) if self._inside else [part]:
                    ids += self._backend.encode(text, prefix) if text else []
                    prefix = False
            else:
                ids += check_ids([part], self.vocab_size)
        return ids

    def split(self, text: str) -> list[str | int]:
        """Cut a text at the control tokens written in it: the parts that `encode_parts` takes."""
        parts: list[str | int] = []
        at = 0
        for match in self._cut.finditer(text) if self._cut else ():
            name = match.group()
            parts += [text[at : match.start()]] if match.start() > at else []
            parts.append(self.special_tokens.get(name, -1))
            if parts[-1] == -1:  # the match includes spaces that the token swallows
                parts[-1] = self.special_tokens[name.strip()]
            at = match.end()
        return parts + ([text[at:]] if at < len(text) else [])

    def decode(self, ids: Ids, skip_special: bool = True) -> str:
        """The text of token ids; a byte that is not UTF-8 becomes U+FFFD.

        Errors: IndexError for an id outside the vocabulary, TypeError for what is not an integer.
        """
        stream = self.decode_stream(skip_special=skip_special)
        return "".join(map(stream.push, check_ids(ids, self.vocab_size))) + stream.flush()

    def tokens(self, ids: Ids) -> list[str]:
        """The vocabulary's own spelling of each id."""
        return [
            self._added.get(i) or self._backend.piece(i) for i in check_ids(ids, self.vocab_size)
        ]

    def token_bytes(self, index: int, skip_special: bool = True) -> bytes:
        """The bytes that one token adds to a text; empty for a control token that is skipped."""
        if skip_special and index in self._hidden:
            return b""
        if index not in self._bytes:
            [index] = check_ids([index], self.vocab_size)
            added = self._added.get(index)
            self._bytes[index] = added.encode() if added else self._backend.piece_bytes(index)
        return self._bytes[index]

    def decode_stream(self, prompt_ids: Ids = (), skip_special: bool = True) -> DecodeStream:
        """A decoder that is fed one id at a time, continuing after `prompt_ids`."""
        return DecodeStream(self, check_ids(prompt_ids, self.vocab_size), skip_special)

    @property
    def strips_space(self) -> bool:
        """Whether a text's first space is the tokenizer's own prefix, dropped by decoding."""
        return self._backend.strips_space


class DecodeStream:
    """Text of a growing list of ids: whole characters only, as soon as they are certain.

    What push and flush return, joined, is decode(prompt + ids)[len(decode(prompt)):].
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = tokenizer.strips_space
        self._shown = 0
        for index in prompt_ids:
            self.push(index)
        # An unfinished character at the end of the prompt counts as shown (as one U+FFFD).
        self._shown = 1 if self._utf8.getstate()[0] else 0

    def push(self, index: int) -> str:
        """The text that this id completes, often one word, "" while a character is incomplete."""
        data = self._tokenizer.token_bytes(index, self._skip_special)
        if data and self._strip_next:
            self._strip_next = False
            data = data.removeprefix(b" ")
        return self._emit(self._utf8.decode(data))

    def flush(self) -> str:
        """The rest, at the end of the text: U+FFFD for a character that never became whole."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        skipped = min(self._shown, len(text))
        self._shown -= skipped
        return text[skipped:]


def check_ids(ids: Ids, vocab_size: int) -> list[int]:
    """Token ids as a list of int. Errors: TypeError (not integers), IndexError (not in range)."""
    if isinstance(ids, np.ndarray) and ids.ndim != 1:
        raise TypeError(f"token ids must be one row, found an array of shape {ids.shape}")
    checked = []
    for index in ids:
        if isinstance(index, bool | np.bool_) or not isinstance(index, int | np.integer):
            raise TypeError(f"token ids must be integers, found {index!r}")
        if not 0 <= index < vocab_size:
            raise IndexError(f"token id {index} is outside the vocabulary of {vocab_size}")
        checked.append(int(index))
    return checked


def check_text(text: str) -> None:
    """Errors: TypeError (not str), UnicodeEncodeError (lone surrogates)."""
    if not isinstance(text, str):
        raise TypeError(f"text must be str, found {type(text).__name__}")
    text.encode()  # a lone surrogate is a UnicodeEncodeError here, before a library hides it


def _id_or_none(index: int | None) -> int | None:
    return None if index is None or index < 0 else index


def _hidden_ids(
    backend: _SentencePiece | _TokenizersJson, added: dict[int, dict[str, Any]]
) -> frozenset[int]:
    hidden = set(backend.controls().values()) - added.keys()
    return frozenset(hidden | {i for i, token in added.items() if token.get("special")})


def _cut_pattern(
    special: dict[str, int], added: dict[int, dict[str, Any]]
) -> re.Pattern[str] | None:
    """Finds the control tokens written in a text, the longest first."""

    def pattern(name: str) -> str:
        token = added.get(special[name], {})
        left, right = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
        return left + re.escape(name) + right

    longest = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(pattern, longest))) if special else None


def _inside_pattern(
    special: dict[str, int], backend: _SentencePiece | _TokenizersJson
) -> re.Pattern[str] | None:
    """Finds the place after the first character of the control tokens that the library would use.

    Some SentencePiece models hold "<|im_end|>" as a user-defined piece. Plain text that is cut
    there keeps its characters and can no longer become that token.
    """
    known = [s for s, i in special.items() if i < backend.size and len(s) > 1]
    used = [s for s in known if special[s] in backend.encode(s, prefix=False)]
    places = [rf"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in used]
    return re.compile("|".join(places)) if places else None


# --- the files of a checkpoint folder ------------------------------------------------------------


class _Files:
    """What the JSON files beside a tokenizer say about it."""

    def __init__(self, folder: Path | None, spec: dict[str, Any] | None = None) -> None:
        read: Callable[[str], dict[str, Any]] = (
            (lambda name: read_json(folder / name)) if folder else (lambda name: {})
        )
        self.folder, self._spec = folder, spec
        self.tokenizer_config = read("tokenizer_config.json")
        self._special_map = read("special_tokens_map.json")
        self._added = read("added_tokens.json")
        self._generation = read("generation_config.json") or read("config.json")

    def token_name(self, what: str) -> str | None:
        for source in (self.tokenizer_config, self._special_map):
            value = source.get(what + "_token")
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                return content
        return None

    def eos_ids(self, vocab_size: int) -> list[int]:
        value = self._generation.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        try:
            return check_ids(ids, vocab_size)
        except (TypeError, IndexError) as error:
            raise TokenizerError(
                f"{str(self.folder)!r}: eos_token_id {value!r}: {error}"
            ) from error

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Added tokens by id: content, special, lstrip, rstrip."""
        listed = self.tokenizer_config.get("added_tokens_decoder")
        if self._spec is not None:
            tokens = [dict(t) for t in self._spec["added_tokens"] if t["special"]]
        elif isinstance(listed, dict):
            tokens = [{**t, "id": _as_id(i)} for i, t in listed.items() if isinstance(t, dict)]
        else:
            tokens = [{"content": name, "id": i} for name, i in self._added.items()]
        for token in tokens:
            if not _is_added_token(token):
                raise TokenizerError(f"{str(self.folder)!r}: added token {token!r} is malformed")
        return {token["id"]: token for token in tokens}


def find_chat_template(folder: Path | None, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the template in tokenizer_config.json (the one named default)."""
    path = folder / "chat_template.jinja" if folder else None
    if path is not None and path.exists():
        return read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _as_id(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,8}", text) else None


def load_tokenizer(path: str | PathLike[str] = "fairytales") -> Tokenizer:
    """The tokenizer of a checkpoint folder or bundled name, or of one tokenizer file.

    A folder's tokenizer.model comes first; its tokenizer.json needs the extra `hf`.
    Errors: FileNotFoundError, IsADirectoryError, TokenizerError, ModuleNotFoundError.
    """
    bundled = Path(__file__).parent / "checkpoints" / path
    path = bundled if Path(path).name == str(path) and not Path(path).exists() else Path(path)
    if not path.exists():
        raise FileNotFoundError(2, "No such tokenizer file or checkpoint folder", str(path.name))
    if not path.is_dir():
        return _load_file(path, path.parent if path.name.startswith("tokenizer.") else None)
    model, spec = path / "tokenizer.model", path / "tokenizer.json"
    if model.exists() and not (spec.exists() and _is_tiktoken(model)):
        return _load_file(model, path)
    if spec.exists():
        return _load_file(spec, path)
    raise FileNotFoundError(2, "No tokenizer.model and no tokenizer.json in this folder", str(path))


def from_json(data: bytes, name: str, folder: Path | None = None) -> Tokenizer:
    """A tokenizer from the bytes of a tokenizer.json, and the files beside it, if any."""
    backend = _TokenizersJson(data, name)
    return Tokenizer(backend, _Files(folder, backend.spec))


def _load_file(path: Path, folder: Path | None) -> Tokenizer:
    data = read_bounded(path, MAX_MODEL_BYTES)
    if path.suffix == ".json":
        return from_json(data, str(path), folder)
    files = _Files(folder)
    legacy = files.tokenizer_config.get("legacy", True)
    return Tokenizer(_SentencePiece(data, str(path), legacy is None or bool(legacy)), files)


def _is_tiktoken(path: Path) -> bool:
    return "tiktoken" in guess_format(read_bounded(path, MAX_MODEL_BYTES))


def check_vocabulary(tokenizer: Tokenizer, config_vocab_size: int) -> None:
    """Refuse a tokenizer with more ids than the embedding has rows; fewer is padding.

    Errors: TokenizerError.
    """
    if tokenizer.vocab_size > config_vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is "
            f"{config_vocab_size}: they do not belong together"
        )
