"""Exercises that check themselves: shape first, then the numbers, then which mistake it is.

    check("rms_norm", my_rms_norm)

An exercise is a reference function, inputs with many different sizes, and the wrong answers that
people give. A wrong answer is only listed if the check can tell it from the right one and from
every other one; the tests prove that.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from llama_np import layers, model, precision, rope, sampling
from llama_np.activations import gelu, silu
from llama_np.cache import NoCache
from llama_np.checkpoint import load_tokenizer
from llama_np.config import Config, config_from_dict

UNKNOWN = "no known mistake does this"
ROUNDED = "that is the size of rounding to float32: compute in the dtype of the arguments"

Answer = Callable[..., Any]
Inputs = Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: its id (the oracle's, where the oracle knows it), what it is, the code."""

    id: str
    explanation: str
    answer: Answer


@dataclass(frozen=True)
class Exercise:
    """What is asked: the right function, the axes of its result, inputs and known mistakes."""

    name: str
    axes: str
    reference: Answer
    inputs: Callable[[], Inputs]
    mistakes: tuple[Mistake, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class Result:
    """What a check found: passed is None for an exercise that was not attempted."""

    passed: bool | None
    message: str
    mistake: str | None = None
    details: list[str] = field(default_factory=list)


def check(name: str, attempt: Answer) -> Result:
    """Compare an attempt with the library's function and print the finding.

    Errors: KeyError for an unknown exercise; what the attempt raises, but NotImplementedError.
    """
    result = examine(EXERCISES[name], attempt)
    print("\n".join([f"{name}: {result.message}", *result.details]))
    return result


def examine(exercise: Exercise, attempt: Answer) -> Result:
    """`check` without printing."""
    cases = exercise.inputs()
    if wrong_call := _wrong_call(attempt, cases[0]):
        return Result(False, wrong_call)
    expected = [_arrays(exercise.reference(*_copies(case))) for case in cases]
    try:
        found = [
            _arrays(attempt(*_copies(case)), parts=len(right))
            for case, right in zip(cases, expected, strict=True)
        ]
    except NotImplementedError:
        return Result(None, "not attempted")
    misshapen = [_wrong_shape(*pair, exercise.axes) for pair in zip(found, expected, strict=True)]
    error, exactly = math.inf, False
    details = []
    if not any(misshapen):
        error, exactly = _difference(found, expected)
        details = [f"  {_closeness(error, exactly)}"]
    tolerance = 0.0 if exercise.exact else 1e-9  # float64 inputs: rounding stays below 1e-12
    if error <= tolerance:
        return Result(True, "correct", details=details)
    mistake = _recognized(exercise, cases, found)
    rounding = ROUNDED if error < 1e-6 else UNKNOWN
    meaning = f"this is {mistake.id}: {mistake.explanation}" if mistake else rounding
    details.append(f"  {meaning}")
    message = next(filter(None, misshapen), "not yet")
    return Result(False, message, mistake.id if mistake else None, details)


def _closeness(error: float, exactly: bool) -> str:
    if exactly:
        return "exact"
    return "equal within rounding" if error <= 1e-9 else f"largest difference: {error:.1e}"


def _recognized(exercise: Exercise, cases: Inputs, found: list[list[np.ndarray]]) -> Mistake | None:
    """The known mistake that gives the same wrong answers."""
    for mistake in exercise.mistakes:
        wrong = [_arrays(mistake.answer(*_copies(case))) for case in cases]
        if _same_shapes(found, wrong) and _difference(found, wrong)[0] <= 1e-9:
            return mistake
    return None


def _copies(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs that an attempt may change without spoiling the next comparison."""
    return tuple(x.copy() if isinstance(x, np.ndarray) else x for x in case)


def _wrong_call(attempt: Answer, case: tuple[Any, ...]) -> str:
    """What is wrong with the parameters of an attempt, if anything is."""
    try:
        inspect.signature(attempt).bind(*case)
    except TypeError as error:
        return f"it is called with {len(case)} arguments: {error}"
    return ""


def _arrays(value: Any, parts: int = 1) -> list[np.ndarray]:
    """The result as a list of arrays; a list counts as a tuple where several are expected."""
    several = isinstance(value, tuple) or (isinstance(value, list) and parts > 1)
    return [np.asarray(part) for part in (value if several else (value,))]


def _wrong_shape(mine: list[np.ndarray], theirs: list[np.ndarray], axes: str) -> str:
    if len(mine) != len(theirs):
        return f"expected {len(theirs)} results, found {len(mine)}"
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape:
            return f"the shape is {a.shape}, expected {axes} = {b.shape}"
        if a.size and a.dtype.kind != b.dtype.kind:  # an empty list becomes an array of floats
            return f"the result holds {a.dtype}, expected {b.dtype}"
    return ""


def _same_shapes(one: list[list[np.ndarray]], other: list[list[np.ndarray]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all([x.shape for x in a] == [y.shape for y in b] for a, b in pairs)


def _difference(one: list[list[np.ndarray]], other: list[list[np.ndarray]]) -> tuple[float, bool]:
    """The largest difference, relative to the largest number; equal infinities do not differ."""
    largest, exactly = 0.0, True
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            differs = (x != y) & ~(np.isnan(x) & np.isnan(y))
            if differs.any():
                exactly = False
                gap = np.abs(x[differs].astype(float) - y[differs].astype(float)).max()
                scale = np.abs(y[np.isfinite(y)]).max(initial=1e-300)
                largest = max(largest, math.inf if np.isnan(gap) else float(gap / scale))
    return largest, exactly


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape)


# ------------------------------------------------------------------ 01 tokens

TEXTS = (
    "Once upon a time",
    "the king's daughter",
    "a a  a",
    "she said: »Öffne die Tür!«",
    "grandmother",
    "wolf\nwolf",
    "123, 4.5",
    "日本 🐺",
    "  wolf ",
    "whatsoever happened thereafter",
    "Rumpelstiltskin",
    "",
)


def _vocabulary() -> dict[str, int]:
    tokenizer = load_tokenizer("fairytales")
    ids = range(tokenizer.vocab_size)
    return dict(zip(tokenizer.tokens(ids), ids, strict=True))


def _encode_inputs() -> Inputs:
    vocabulary = _vocabulary()
    return [(text, vocabulary) for text in TEXTS]


def _encode(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    return np.array(load_tokenizer("fairytales").encode(text, bos=False), np.int64)


def _ids(pieces: Sequence[str], vocabulary: dict[str, int], bytes_: bool = True) -> np.ndarray:
    """The ids of pieces; a character that is none becomes its UTF-8 bytes."""
    ids: list[int] = []
    for piece in pieces:
        if piece in vocabulary or not bytes_:
            ids.append(vocabulary.get(piece, vocabulary["<unk>"]))
        else:
            ids += [vocabulary[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return np.array(ids, np.int64)


def _merged(pieces: list[str], vocabulary: dict[str, int], lowest: bool = True) -> list[str]:
    """Join neighbours: always the pair with the lowest id, or simply the leftmost pair."""
    while True:
        pairs = [a + b for a, b in pairwise(pieces)]
        known = [
            (vocabulary[p] if lowest else i, i) for i, p in enumerate(pairs) if p in vocabulary
        ]
        if not known:
            return pieces
        at = min(known)[1]
        pieces[at : at + 2] = [pairs[at]]


def _encode_with(
    prefix: bool = True, lowest: bool = True, bytes_: bool = True, merges: bool = True
) -> Callable[[str, dict[str, int]], np.ndarray]:
    def encode(text: str, vocabulary: dict[str, int]) -> np.ndarray:
        characters = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
        pieces = _merged(characters, vocabulary, lowest) if merges else characters
        return _ids(pieces, vocabulary, bytes_)

    return encode


def _encode_longest(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    rest, pieces = ("▁" + text if text else "").replace(" ", "▁"), []
    while rest:
        ends = range(len(rest), 0, -1)
        end = next((end for end in ends if rest[:end] in vocabulary), 1)
        pieces.append(rest[:end])
        rest = rest[end:]
    return _ids(pieces, vocabulary)


ENCODE_MISTAKES = (
    Mistake("prefix_missing", "no space is put in front of the text", _encode_with(prefix=False)),
    Mistake("merges_missing", "characters are never merged", _encode_with(merges=False)),
    Mistake(
        "merges_leftmost",
        "the leftmost pair is merged first, not the pair with the lowest id",
        _encode_with(lowest=False),
    ),
    Mistake(
        "longest_piece_first",
        "the longest piece is cut off at the left again and again, which is another algorithm",
        _encode_longest,
    ),
    Mistake(
        "bytes_missing",
        "an unknown character becomes <unk> instead of its UTF-8 bytes",
        _encode_with(bytes_=False),
    ),
    Mistake(
        "bos_doubled",
        "the BOS is put in front, which is not part of the text",
        lambda text, vocabulary: np.array([vocabulary["<s>"], *_encode(text, vocabulary)]),
    ),
)

# ------------------------------------------------------------------ 02 RMSNorm


def _norm_inputs() -> Inputs:
    return [(_random(B, T, D) * 0.03, _random(D), 1e-5) for B, T, D in ((2, 3, 8), (1, 1, 5))]


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return layers.rms_norm("norm", x, {"norm.weight": weight}, eps)


def _mean_square(x: np.ndarray, axis: int | None = -1) -> np.ndarray:
    return np.mean(x * x, axis=axis, keepdims=True)


NORM_MISTAKES = (
    Mistake(
        "rms_eps_missing", "no eps is added", lambda x, w, eps: x / np.sqrt(_mean_square(x)) * w
    ),
    Mistake(
        "rms_eps",
        "eps is fixed (1e-6) instead of taken from the configuration",
        lambda x, w, eps: x / np.sqrt(_mean_square(x) + 1e-6) * w,
    ),
    Mistake(
        "rms_eps_outside",
        "eps is added after the square root",
        lambda x, w, eps: x / (np.sqrt(_mean_square(x)) + eps) * w,
    ),
    Mistake(
        "rms_layernorm",
        "the mean is subtracted, as LayerNorm does",
        lambda x, w, eps: (
            (x - x.mean(-1, keepdims=True))
            / np.sqrt(_mean_square(x - x.mean(-1, keepdims=True)) + eps)
            * w
        ),
    ),
    Mistake(
        "rms_weight_missing",
        "the weight is not applied",
        lambda x, w, eps: x / np.sqrt(_mean_square(x) + eps),
    ),
    Mistake(
        "rms_weight_plus_one",
        "1 + weight is applied, as Gemma does",
        lambda x, w, eps: x / np.sqrt(_mean_square(x) + eps) * (1 + w),
    ),
    Mistake(
        "rms_sum",
        "the squares are summed instead of averaged",
        lambda x, w, eps: x / np.sqrt((x * x).sum(-1, keepdims=True) + eps) * w,
    ),
    Mistake(
        "rms_all_axes",
        "the mean runs over all tokens, not over each token's own numbers",
        lambda x, w, eps: x / np.sqrt(_mean_square(x, axis=None) + eps) * w,
    ),
)

# ------------------------------------------------------------------ 03 RoPE


def _rope_inputs() -> Inputs:
    cases = []
    for B, N, T, H in ((2, 3, 4, 6), (1, 2, 5, 4)):
        frequencies = 100.0 ** -(np.arange(0, H, 2) / H)
        cases.append((_random(B, N, T, H), np.arange(T)[None].repeat(B, 0), frequencies))
    return cases


def _angles(positions: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = positions[:, None, :, None] * frequencies
    full = np.concatenate([half, half], axis=-1)
    return np.cos(full), np.sin(full)


def _rotate(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    return layers.rotate(x, *_angles(positions, frequencies))


def _rotate_adjacent(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    angle = positions[:, None, :, None] * frequencies
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.stack(
        [even * np.cos(angle) - odd * np.sin(angle), odd * np.cos(angle) + even * np.sin(angle)], -1
    )
    return turned.reshape(x.shape)


ROPE_MISTAKES = (
    Mistake(
        "rope_interleaved",
        "adjacent channels (0, 1), (2, 3), ... are paired instead of j and j + H/2",
        _rotate_adjacent,
    ),
    Mistake("rope_not_applied", "nothing is rotated", lambda x, positions, frequencies: x),
    Mistake(
        "rope_reversed",
        "the angle has the wrong sign",
        lambda x, positions, f: _rotate(x, -positions, f),
    ),
    Mistake(
        "position_plus_one",
        "positions start at 1 (harmless if keys do the same, but not what was asked)",
        lambda x, positions, f: _rotate(x, positions + 1, f),
    ),
    Mistake(
        "rope_theta",
        "another base than the given frequencies have",
        lambda x, positions, f: _rotate(
            x, positions, 10000.0 ** -(np.arange(0, x.shape[-1], 2) / x.shape[-1])
        ),
    ),
)


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


PERMUTE_MISTAKES = (
    Mistake("rope_interleaved", "nothing is permuted", lambda weight, heads: weight),
    Mistake("permute_inverse", "the permutation of the other direction", _unpermute),
    Mistake(
        "permute_one_head",
        "all rows are treated as one head",
        lambda weight, heads: _permute(weight, 1),
    ),
)

# ------------------------------------------------------------------ 04 attention


def _attend_inputs() -> Inputs:
    cases = []
    for B, K, G, T, S, H in ((2, 2, 3, 4, 4, 6), (1, 3, 2, 2, 5, 4), (2, 2, 2, 1, 3, 8)):
        positions = np.arange(S - T, S)[None]
        visible = model.causal(positions, np.arange(S)[None]).repeat(B, axis=0)
        visible[-1, :, :, : S - T : 2] = False  # the last text has padding and a hole
        q, k, v = _random(B, K * G, T, H), _random(B, K, S, H), _random(B, K, S, H, seed=9)
        cases.append((q, k, v, visible))
    return cases


def _attend_with(
    scale: Callable[[np.ndarray], float] = lambda q: math.sqrt(q.shape[-1]),
    tile: bool = False,
    mask: bool = True,
    axis: int = -1,
    mask_after: bool = False,
    own_mask: bool = False,
) -> Answer:
    """Attention with one thing changed, written with explicit copies of the key/value heads."""

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
        G = q.shape[1] // k.shape[1]
        repeat: Callable[[np.ndarray], np.ndarray] = (
            (lambda x: np.tile(x, (1, G, 1, 1))) if tile else (lambda x: x.repeat(G, axis=1))
        )
        scores = q @ repeat(k).swapaxes(2, 3) / scale(q)
        if own_mask:
            visible = np.tri(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], dtype=bool)
        if mask and not mask_after:
            scores = np.where(visible, scores, -1e300)
        weights = np.exp(scores - scores.max(axis=axis, keepdims=True))
        weights = weights / weights.sum(axis=axis, keepdims=True)
        if mask_after:
            weights = np.where(visible, weights, 0)
        return layers.merge_heads(weights @ repeat(v))

    return attend


ATTEND_MISTAKES = (
    Mistake(
        "attn_scale_missing",
        "the scores are not divided by sqrt(H)",
        _attend_with(scale=lambda q: 1.0),
    ),
    Mistake(
        "attn_scale_d_model",
        "the scores are divided by sqrt(N*H), the width of all heads",
        _attend_with(scale=lambda q: math.sqrt(q.shape[1] * q.shape[3])),
    ),
    Mistake(
        "attn_scale_h", "divided by H, not by its root", _attend_with(scale=lambda q: q.shape[3])
    ),
    Mistake("causal_mask_missing", "every token sees every other", _attend_with(mask=False)),
    Mistake(
        "visible_ignored",
        "a causal mask of its own, which shows padding, instead of `visible`",
        _attend_with(own_mask=True),
    ),
    Mistake("mask_after_softmax", "masked after the softmax", _attend_with(mask_after=True)),
    Mistake("softmax_over_queries", "the softmax runs over the queries", _attend_with(axis=-2)),
    Mistake(
        "gqa_tile",
        "query head n uses key/value head n mod K instead of n // G",
        _attend_with(tile=True),
    ),
)

# ------------------------------------------------------------------ 05 MLP


def _mlp_inputs() -> Inputs:
    return [
        (_random(B, T, D), _random(F, D), _random(F, D, seed=5), _random(D, F, seed=7))
        for B, T, D, F in ((2, 3, 5, 7), (1, 4, 6, 9))
    ]


MLP_MISTAKES = (
    Mistake(
        "gate_up_swapped",
        "the activation is applied to up instead of gate",
        lambda x, gate, up, down: (silu(x @ up.T) * (x @ gate.T)) @ down.T,
    ),
    Mistake(
        "act_gelu",
        "GELU instead of SiLU",
        lambda x, gate, up, down: (gelu(x @ gate.T) * (x @ up.T)) @ down.T,
    ),
    Mistake(
        "act_relu",
        "ReLU instead of SiLU",
        lambda x, gate, up, down: (np.maximum(x @ gate.T, 0) * (x @ up.T)) @ down.T,
    ),
    Mistake(
        "act_missing",
        "no activation",
        lambda x, gate, up, down: ((x @ gate.T) * (x @ up.T)) @ down.T,
    ),
    Mistake(
        "gate_missing",
        "the up projection is left out",
        lambda x, gate, up, down: silu(x @ gate.T) @ down.T,
    ),
    Mistake(
        "down_missing",
        "the down projection is left out",
        lambda x, gate, up, down: silu(x @ gate.T) * (x @ up.T),
    ),
)

# ------------------------------------------------------------------ 06 the whole model


def _model_inputs() -> Inputs:
    cases = []
    for B, T, L, K in ((2, 5, 3, 2), (1, 1, 2, 1)):
        sizes = {"hidden_size": 24, "intermediate_size": 20, "vocab_size": 11}
        heads = {"num_attention_heads": 4, "num_key_value_heads": K, "num_hidden_layers": L}
        config = config_from_dict(sizes | heads)
        tokens = np.random.default_rng(L).integers(0, config.vocab_size, (B, T))
        cases.append((tokens, _random_weights(config), config))
    return cases


def _random_weights(config: Config) -> dict[str, Any]:
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (config.num_attention_heads * config.head_dim, D),
        "self_attn.k_proj.weight": (config.num_key_value_heads * config.head_dim, D),
        "self_attn.v_proj.weight": (config.num_key_value_heads * config.head_dim, D),
        "self_attn.o_proj.weight": (D, config.num_attention_heads * config.head_dim),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    weights: dict[str, Any] = {"model.embed_tokens.weight": _random(V, D) / 4}
    for i in range(config.num_hidden_layers):
        arrays = {n: _random(*s, seed=9 * i + j) / 4 for j, (n, s) in enumerate(shapes.items())}
        weights[f"model.layers.{i}"] = arrays
    return weights | {"model.norm.weight": _random(D, seed=3)}


def _model_with(
    final_norm: bool = True,
    rotated: bool = True,
    causal: bool = True,
    layer: Callable[[int, int], int] = lambda i, count: i,
    start: Callable[[np.ndarray, Config], np.ndarray] = lambda x, config: x,
    left_out: int = 0,
    added_again: bool = False,
) -> Answer:
    """The model, put together with one thing changed."""

    def states(tokens: np.ndarray, weights: dict[str, Any], config: Config) -> np.ndarray:
        x = start(layers.embed(tokens, weights["model.embed_tokens.weight"]), config)
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        angles = positions if rotated else np.zeros_like(positions)
        turns = rope.tables(angles, np.full((1, 1), tokens.shape[1]), config, x.dtype)
        visible = model.causal(positions, positions * causal)
        for i in range(config.num_hidden_layers - left_out):
            w = weights[f"model.layers.{layer(i, config.num_hidden_layers)}"]
            output = layers.decoder_layer(x, w, turns, visible, config, NoCache().store(i))
            x = x + output if added_again else output
        eps = config.rms_norm_eps
        return layers.rms_norm("model.norm", x, weights, eps) if final_norm else x

    return states


MODEL_MISTAKES = (
    Mistake("final_norm_missing", "the final norm is missing", _model_with(final_norm=False)),
    Mistake("rope_not_applied", "every token has position 0", _model_with(rotated=False)),
    Mistake("causal_mask_missing", "the future can be looked at", _model_with(causal=False)),
    Mistake(
        "layers_reversed",
        "the layers run in the opposite order",
        _model_with(layer=lambda i, count: count - 1 - i),
    ),
    Mistake(
        "layer_repeated",
        "every layer uses the first one's weights",
        _model_with(layer=lambda i, n: 0),
    ),
    Mistake("layer_left_out", "the last layer is missing", _model_with(left_out=1)),
    Mistake(
        "residual_twice",
        "the layer's input is added to its output, which contains it already",
        _model_with(added_again=True),
    ),
    Mistake(
        "embedding_scaled",
        "the embedding is multiplied by sqrt(D), as Gemma does",
        _model_with(start=lambda x, config: x * math.sqrt(config.hidden_size)),
    ),
)

# ------------------------------------------------------------------ 07 KV cache


def _cache_inputs() -> Inputs:
    """Sixty keys that arrive in pieces; the answer is what each piece can look at."""
    cases = []
    for sizes in ((4, 1, 1, 3), (1, 1, 1), (5, 2, 6)):
        pieces = [_random(2, 3, size, 4, seed=i) for i, size in enumerate(sizes)]
        cases.append((pieces,))
    return cases


def _all_stored(pieces: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(pieces[: i + 1], axis=2) for i in range(len(pieces)))


def _stored_with_hole(pieces: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    hole = np.zeros_like(pieces[0][:, :, :1])
    return tuple(
        np.concatenate([pieces[0], hole, *pieces[1 : i + 1]], axis=2)[:, :, : n + 1]
        for i, n in enumerate(np.cumsum([p.shape[2] for p in pieces]) - 1)
    )


CACHE_MISTAKES = (
    Mistake(
        "cache_hole",
        "a zero slot between the first piece and the next",
        _stored_with_hole,
    ),
    Mistake(
        "cache_overwritten",
        "new keys are written over the first ones",
        lambda pieces: tuple(_overwritten(pieces[: i + 1]) for i in range(len(pieces))),
    ),
    Mistake(
        "cache_prepended",
        "new keys come first",
        lambda pieces: tuple(
            np.concatenate(pieces[i::-1] if i else pieces[:1], axis=2) for i in range(len(pieces))
        ),
    ),
)


def _overwritten(pieces: list[np.ndarray]) -> np.ndarray:
    whole = np.concatenate(pieces, axis=2)
    kept = np.zeros_like(whole)
    for piece in pieces:
        kept[:, :, : piece.shape[2]] = piece
    return kept


# ------------------------------------------------------------------ 08 batches


def _batch_inputs() -> Inputs:
    return [([3, 1, 5],), ([2, 2],), ([4, 7, 1, 2],)]


def _batch_masks(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    T = max(lengths)
    columns = np.arange(T)
    starts = T - np.array(lengths)[:, None]
    positions = np.where(columns >= starts, columns - starts, -1)
    return positions, model.causal(positions, positions)


def _batch_with(positions_of: Answer | None = None, visible_of: Answer | None = None) -> Answer:
    def masks(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
        positions, visible = _batch_masks(lengths)
        if positions_of is not None:
            positions = positions_of(positions)
        if visible_of is not None:
            visible = visible_of(positions, visible)
        return positions, visible

    return masks


BATCH_MISTAKES = (
    Mistake(
        "left_pad_positions",
        "positions count the padding",
        _batch_with(positions_of=lambda p: np.where(p >= 0, np.arange(p.shape[1]), -1)),
    ),
    Mistake(
        "padding_visible",
        "padding can be looked at",
        _batch_with(visible_of=lambda p, v: p[:, None, None, :] <= p[:, None, :, None]),
    ),
    Mistake(
        "causal_mask_missing",
        "the future can be looked at",
        _batch_with(visible_of=lambda p, v: np.broadcast_to(p[:, None, None] >= 0, v.shape)),
    ),
    Mistake(
        "causal_mask_strict",
        "a token does not see itself",
        _batch_with(visible_of=lambda p, v: v & (p[:, None, None] < p[:, None, :, None])),
    ),
)

# ------------------------------------------------------------------ 09 sampling


def _top_p_inputs() -> Inputs:
    cases: list[tuple[Any, ...]] = [
        (np.log(np.array([0.5, 0.3, 0.15, 0.05])), p) for p in (0.4, 0.6, 0.79, 0.82, 1.0)
    ]
    cases += [(np.log(np.array([0.05, 0.15, 0.5, 0.3])), 0.6), (_random(3, 20) * 3, 0.9)]
    # Probabilities that are exactly 1/2, 1/4, 1/8, 1/8: the first alone reaches 1/2.
    cases.append((np.log(np.array([4.0, 2.0, 1.0, 1.0])), 0.5))
    return [*cases, (np.log(np.array([0.97, 0.02, 0.01])), 0.5)]


def _top_p_with(
    shift: bool = True,
    below: bool = False,
    renormalized: bool = False,
    equal: bool = False,
) -> Callable[[np.ndarray, float], np.ndarray]:
    def top_p(logits: np.ndarray, p: float) -> np.ndarray:
        order = np.argsort(-logits, axis=-1, kind="stable")
        probabilities = layers.softmax(np.take_along_axis(logits, order, axis=-1))
        total = np.cumsum(probabilities, axis=-1)
        keep = (total - probabilities < p) if shift else (total <= p)
        if equal:
            keep = total - probabilities <= p
        if below:
            keep = probabilities >= p
        if not renormalized:
            keep[..., 0] = True
        mask = np.empty_like(keep)
        np.put_along_axis(mask, order, keep, axis=-1)
        return np.where(mask, logits, -np.inf)

    return top_p


TOP_P_MISTAKES = (
    Mistake(
        "top_p_boundary_dropped",
        "the token that crosses p is dropped; it belongs to the nucleus",
        _top_p_with(shift=False),
    ),
    Mistake(
        "top_p_one_too_many",
        "where the sum reaches p exactly, one more token is kept",
        _top_p_with(equal=True),
    ),
    Mistake(
        "top_p_as_threshold",
        "single probabilities are compared with p instead of their sum",
        _top_p_with(below=True),
    ),
    Mistake(
        "top_p_zeroed",
        "dropped logits are set to 0, which is a probability, instead of -inf",
        lambda logits, p: np.where(np.isneginf(sampling.top_p(logits, p)), 0, logits),
    ),
)

# ------------------------------------------------------------------ 10 classification


def _last_inputs() -> Inputs:
    rows = [[0, 1, 2, -1, -1], [-1, -1, 0, 1, 2], [0, 1, 2, 3, 4], [-1, 0, 1, -1, -1]]
    return [(_random(4, 5, 6), np.array(rows)), (_random(2, 3, 4), np.array([[0, -1, -1]] * 2))]


LAST_MISTAKES = (
    Mistake(
        "last_column",
        "the last column is read, which is padding if a row is padded right",
        lambda hidden, positions: hidden[:, -1],
    ),
    Mistake(
        "first_token",
        "the first token is read, which has seen nothing else",
        lambda hidden, positions: hidden[np.arange(len(hidden)), (positions >= 0).argmax(1)],
    ),
    Mistake(
        "length_minus_one",
        "the number of tokens minus one is used as column, which is wrong for left padding",
        lambda hidden, positions: hidden[np.arange(len(hidden)), (positions >= 0).sum(1) - 1],
    ),
    Mistake(
        "mean_of_all",
        "the mean over all columns, padding included",
        lambda hidden, positions: hidden.mean(axis=1),
    ),
)

# ------------------------------------------------------------------ 11 RoPE scaling


def _llama3_config(head_dim: int, theta: float, factor: float, length: int) -> Config:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": length,
    }
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim}
    return config_from_dict(sizes | {"rope_theta": theta, "rope_scaling": scaling})


def _llama3_inputs() -> Inputs:
    cases = []
    for head_dim, theta, factor, length in ((128, 5e5, 8.0, 8192), (64, 5e5, 32.0, 8192)):
        plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        cases.append((plain, factor, 1.0, 4.0, length))
    return cases


def _llama3(plain: np.ndarray, factor: float, low: float, high: float, length: int) -> np.ndarray:
    theta = float(plain[1]) ** -(len(plain))
    config = _llama3_config(2 * len(plain), theta, factor, length)
    return rope.llama3(config, np.zeros((1, 1)))[0]


def _llama3_with(change: Answer) -> Answer:
    def scaled(plain: np.ndarray, factor: float, low: float, high: float, length: int) -> Any:
        keep = np.clip((length * plain / (2 * np.pi) - low) / (high - low), 0, 1)
        return change(plain, factor, keep)

    return scaled


LLAMA3_MISTAKES = (
    Mistake(
        "rope_scaling_ignored",
        "the frequencies are not scaled",
        _llama3_with(lambda plain, factor, keep: plain),
    ),
    Mistake(
        "rope_scaling_uniform",
        "all frequencies are divided, as linear scaling does",
        _llama3_with(lambda plain, factor, keep: plain / factor),
    ),
    Mistake(
        "rope_scaling_swapped",
        "the bands are swapped: high frequencies are divided and low ones kept",
        _llama3_with(lambda plain, factor, keep: keep * plain / factor + (1 - keep) * plain),
    ),
    Mistake(
        "rope_scaling_multiplied",
        "low frequencies are multiplied by the factor",
        _llama3_with(lambda plain, factor, keep: keep * plain + (1 - keep) * plain * factor),
    ),
    Mistake(
        "rope_scaling_no_blend",
        "a hard step instead of the blend between the bands",
        _llama3_with(lambda plain, factor, keep: np.where(keep >= 1, plain, plain / factor)),
    ),
)

# ------------------------------------------------------------------ 12 precision


def _bf16_inputs() -> Inputs:
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    finite = bits[np.isfinite(bits.view(np.float32))]
    near = (finite[:-1, None] + np.array([1, 0x7FFF, 0x8000, 0x8001], np.uint32)).ravel()
    numbers = near.view(np.float32)
    return [(numbers[np.isfinite(numbers)],)]


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


BF16_MISTAKES = (
    Mistake(
        "weights_truncated_bf16",
        "the lower bits are cut off instead of rounded",
        lambda x: (_bits(x) & np.uint32(0xFFFF0000)).view(np.float32),
    ),
    Mistake(
        "round_half_up",
        "ties are rounded away from zero instead of to even",
        lambda x: ((_bits(x) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32),
    ),
    Mistake("round_f16", "rounded to float16, which is another format", precision.round_f16),
)

EXERCISES = {
    exercise.name: exercise
    for exercise in (
        Exercise("encode", "(T,)", _encode, _encode_inputs, ENCODE_MISTAKES, exact=True),
        Exercise("rms_norm", "(B, T, D)", _rms_norm, _norm_inputs, NORM_MISTAKES),
        Exercise("rotate", "(B, N, T, H)", _rotate, _rope_inputs, ROPE_MISTAKES),
        Exercise(
            "permute",
            "(heads*H, D)",
            _permute,
            lambda: [(_random(24, 5), 3), (_random(16, 3), 2)],
            PERMUTE_MISTAKES,
            exact=True,
        ),
        Exercise("attend", "(B, T, N*H)", layers.attend, _attend_inputs, ATTEND_MISTAKES),
        Exercise(
            "mlp",
            "(B, T, D)",
            lambda x, gate, up, down: (silu(x @ gate.T) * (x @ up.T)) @ down.T,
            _mlp_inputs,
            MLP_MISTAKES,
        ),
        Exercise("hidden_states", "(B, T, D)", model.hidden_states, _model_inputs, MODEL_MISTAKES),
        Exercise("store", "(B, K, S, H)", _all_stored, _cache_inputs, CACHE_MISTAKES, exact=True),
        Exercise(
            "batch",
            "(B, T) and (B, 1, T, S)",
            _batch_masks,
            _batch_inputs,
            BATCH_MISTAKES,
            exact=True,
        ),
        Exercise("top_p", "(..., V)", sampling.top_p, _top_p_inputs, TOP_P_MISTAKES, exact=True),
        Exercise(
            "last_token",
            "(B, D)",
            lambda hidden, positions: hidden[np.arange(len(hidden)), positions.argmax(axis=1)],
            _last_inputs,
            LAST_MISTAKES,
            exact=True,
        ),
        Exercise("llama3", "(H/2,)", _llama3, _llama3_inputs, LLAMA3_MISTAKES),
        Exercise(
            "round_bf16", "any shape", precision.round_bf16, _bf16_inputs, BF16_MISTAKES, exact=True
        ),
    )
}
