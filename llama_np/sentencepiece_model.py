"""SentencePiece models from a list of pieces, and back: the few protobuf fields that it takes."""

from __future__ import annotations

import struct
from typing import NamedTuple

from llama_np.tokenizer import proto_fields

# The kinds of pieces, as SentencePiece numbers them (GGUF uses the same numbers).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2


class Piece(NamedTuple):
    """One entry of a vocabulary."""

    text: str
    score: float
    kind: int


def build_model(
    pieces: list[Piece], unk: int = 0, bos: int = 1, eos: int = 2, prefix_space: bool = True
) -> bytes:
    """The serialized ModelProto of a byte-pair vocabulary with LLaMA's settings.

    `unk`, `bos`, `eos` are ids. Source: sentencepiece_model.proto.
    """
    content = b"".join(
        _bytes(1, _bytes(1, p.text.encode("utf-8")) + _float(2, p.score) + _whole(3, p.kind))
        for p in pieces
    )
    has_bytes = any(piece.kind == BYTE for piece in pieces)
    trainer = _whole(3, BPE) + _whole(4, len(pieces)) + _whole(35, has_bytes)
    for id_field, name_field, index in ((40, 45, unk), (41, 46, bos), (42, 47, eos)):
        trainer += _whole(id_field, index)
        trainer += _bytes(name_field, pieces[index].text.encode("utf-8"))
    trainer += _whole(43, (1 << 64) - 1)  # no padding piece: -1
    normalizer = _bytes(1, b"identity") + _whole(3, prefix_space) + _whole(4, 0) + _whole(5, 1)
    return content + _bytes(2, trainer) + _bytes(3, normalizer)


def _whole(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def parse_pieces(model: bytes) -> list[Piece]:
    """The vocabulary of a serialized ModelProto. Errors: TokenizerError."""
    pieces = []
    for number, value in proto_fields(model):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
    return pieces


def _piece(content: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in proto_fields(content):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8", errors="replace")
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)
