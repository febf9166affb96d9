"""Small variations of the forward pass, from which the catalogue of mistakes is made.

A variation takes the plain run and returns a changed one: another config, other positions or
visibility, changed weights, or named arrays computed differently. It returns None where it does
not apply (no biases to drop, nothing to scale). Variations can be applied one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llama_np import rope
from llama_np.activations import ACTIVATIONS
from llama_np.config import Config
from llama_np.experiment import Op, Place, Run, one_call, spans, split_name
from llama_np.layers import merge_heads, rotate, softmax, split_heads
from llama_np.linear import linear
from llama_np.model import causal
from llama_np.ports import from_interleaved, to_interleaved
from llama_np.precision import round_bf16, widen

Variation = Callable[[Run], Run | None]


# Tokens: what is fed.


def _is_plain(run: Run) -> bool:
    """Whether only weights and config differ from the model as it is, for a single text."""
    plain = not run.ops and run.rows is None and len(run.tokens) == 1
    return plain and np.array_equal(run.visible, causal(run.positions, run.positions))


def _with_tokens(run: Run, tokens: np.ndarray, added: int) -> Run:
    """The run with `added` more tokens at the start of its prompt (or fewer)."""
    B, T = tokens.shape
    positions = np.broadcast_to(np.arange(T), (B, T))
    calls = (run.calls[0] + added, *run.calls[1:])
    calls = calls if calls[0] else calls[1:]
    changed = replace(run, tokens=tokens, positions=positions, calls=calls)
    return replace(changed, visible=causal(positions, positions), prompt=run.prompt + added)


def first_token_missing(run: Run) -> Run | None:
    if run.prompt < 2 or not _is_plain(run):
        return None
    return _with_tokens(run, run.tokens[:, 1:], -1)


def token_in_front(run: Run, shown: bool = True) -> Run | None:
    bos = run.config.bos_token_id
    if bos is None or not 0 <= bos < run.config.vocab_size or not _is_plain(run):
        return None
    tokens = np.concatenate([np.full_like(run.tokens[:, :1], bos), run.tokens], axis=1)
    longer = _with_tokens(run, tokens, 1)
    return longer if shown else replace(longer, rows=np.arange(1, tokens.shape[1]))


# Weights: how they are read.


def changed_layers(
    change: Callable[[dict[str, np.ndarray], Config], Mapping[str, Any]],
) -> Variation:
    """A variation that replaces some of every layer's weights; None if it replaces none."""

    def variation(run: Run) -> Run | None:
        first = {name: np.asarray(a) for name, a in run.weights["model.layers.0"].items()}
        if not change(first, run.config):
            return None

        def changed(name: str, value: Any) -> Any:
            inside = isinstance(value, Mapping)
            return {**value, **change(dict(value), run.config)} if inside else value

        return run.with_weights(changed)

    return variation


def exchanged(a: str, b: str) -> Variation:
    """Two modules of every layer with each other's weights and biases."""

    def change(w: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
        names = [(f"{x}.{kind}", f"{y}.{kind}") for kind in ("weight", "bias")
                 for x, y in ((a, b), (b, a))]  # fmt: skip
        pairs = [(x, y) for x, y in names if x in w]
        fits = all(y in w and w[x].shape == w[y].shape for x, y in pairs)
        return {x: w[y] for x, y in pairs} if fits else {}

    return changed_layers(change)


def without_bias(*modules: str) -> Variation:
    def change(w: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
        names = [f"{module}.bias" for module in modules]
        return {name: np.zeros_like(w[name]) for name in names if name in w}

    return changed_layers(change)


def transposed(*modules: str) -> Variation:
    def change(w: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
        weights = {f"{m}.weight": w[f"{m}.weight"] for m in modules}
        square = all(a.shape[0] == a.shape[1] for a in weights.values())
        return {name: a.T for name, a in weights.items()} if square else {}

    return changed_layers(change)


def misread_as_transposed(*modules: str) -> Variation:
    """The bytes of an (out, in) matrix taken for an (in, out) one."""

    def change(w: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
        names = [f"{m}.weight" for m in modules]
        return {n: np.ascontiguousarray(w[n]).reshape(w[n].shape[::-1]).T for n in names}

    return changed_layers(change)


def rows_by_head(change: Callable[[np.ndarray, Config], np.ndarray], *modules: str) -> Variation:
    """The output channels (rows of weight and bias) of some modules rearranged."""

    def changed(w: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
        names = [f"self_attn.{m}.{kind}" for m in modules for kind in ("weight", "bias")]
        return {name: change(w[name].T, config).T for name in names if name in w}

    return changed_layers(changed)


def keys_permuted_for_query_heads(run: Run) -> Run | None:
    """The conversion from Meta's layout done with N heads on the K key heads."""
    N, K, H = run.config.num_attention_heads, run.config.num_key_value_heads, run.config.head_dim
    if N == K or (K * H) % (2 * N):
        return None

    def change(rows: np.ndarray, config: Config) -> np.ndarray:
        return from_interleaved(to_interleaved(rows, H), K * H // N)

    return rows_by_head(change, "k_proj")(run)


def fused_qkv_split_in_thirds(run: Run) -> Run | None:
    """q, k, v stored group by group, split as if all of q came first."""

    def change(w: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        changed: dict[str, np.ndarray] = {}
        for kind in ("weight", "bias"):
            names = [f"self_attn.{m}_proj.{kind}" for m in "qkv"]
            if K == 1 or not all(name in w for name in names):
                continue
            q, k, v = (w[name] for name in names)
            groups = [a.reshape(K, -1, *a.shape[1:]) for a in (q, k, v)]
            fused = np.concatenate(groups, axis=1).reshape(-1, *q.shape[1:])
            parts = np.split(fused, [N * H, N * H + K * H])
            changed |= dict(zip(names, parts, strict=True))
        return changed

    return changed_layers(change)(run)


def all_weights(change: Callable[[np.ndarray], np.ndarray]) -> Variation:
    """Every weight, the embedding included, passed through a function."""

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: change(array) for key, array in value.items()}
        return value if name == "model.embed_tokens.weight" else change(value)

    def variation(run: Run) -> Run:
        return run.with_weights(changed).with_op_map(
            {"model.embed_tokens": lambda array, place: change(array)}
        )

    return variation


def truncate_bf16(x: np.ndarray) -> np.ndarray:
    """The upper half of a float32's bits, without rounding."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(x.dtype)


def head_is_embedding(run: Run) -> Run | None:
    if "lm_head.weight" not in run.weights:
        return None
    embedding = run.weights["model.embed_tokens.weight"]
    if embedding is run.weights["lm_head.weight"]:
        return None

    def change(name: str, value: Any) -> Any:
        return _numbers(embedding, value) if name == "lm_head.weight" else value

    return run.with_weights(change)


def _numbers(stored: np.ndarray, like: np.ndarray) -> np.ndarray:
    return widen(stored).astype(like.dtype)


def head_is_zero(run: Run) -> Run | None:
    return run.with_ops(lm_head=lambda array, place: np.zeros_like(array))


# Configuration.


def with_config(**changes: Any) -> Variation:
    """Other values in the configuration; None if they are the model's own."""

    def variation(run: Run) -> Run | None:
        own = {name: getattr(run.config, name) for name in changes}
        return None if own == changes else run.with_config(**changes)

    return variation


def without_scaling(run: Run) -> Run | None:
    return with_config(rope_scaling={"rope_type": "default"})(run)


def scaled_linearly(run: Run) -> Run | None:
    scaling = run.config.rope_scaling
    if scaling["rope_type"] == "linear" or "factor" not in scaling:
        return None
    return run.with_config(rope_scaling={"rope_type": "linear", "factor": scaling["factor"]})


# Single arrays.


def ops(**functions: Op) -> Variation:
    """Arrays computed differently; "__" in a keyword stands for a dot."""
    return lambda run: run.with_ops(**functions)


def _rms(x: np.ndarray) -> np.ndarray:
    return np.vecdot(x, x)[..., None] / x.shape[-1]


NORMS = {
    "input_layernorm": "x",
    "post_attention_layernorm": "middle",
    "model.norm": "block",
}
NormFormula = Callable[[np.ndarray, np.ndarray, float], np.ndarray]  # x, weight, eps


def norms(formula: NormFormula, *names: str) -> Variation:
    """All norms (or those named) computed by another formula."""

    def op(name: str) -> Op:
        def computed(array: np.ndarray, place: Place) -> np.ndarray:
            weight = place.w[f"{name}.weight"]
            x = place.seen[NORMS[name]]
            return formula(x, weight, place.config.rms_norm_eps).astype(array.dtype, copy=False)

        return computed

    return lambda run: run.with_op_map({name: op(name) for name in names or NORMS})


def _centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(axis=-1, keepdims=True)


def layer_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    centred = _centred(x)
    return centred / np.sqrt(_rms(centred) + eps) * weight


def eps_outside(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / (np.sqrt(_rms(x)) + eps) * weight


def unweighted(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(_rms(x) + eps)


def weight_plus_one(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(_rms(x) + eps) * (1 + weight)


def sum_not_mean(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(_rms(x) * x.shape[-1] + eps) * weight


def divided_by_n_minus_one(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    D = x.shape[-1]
    return x / np.sqrt(_rms(x) * D / (D - 1) + eps) * weight


def no_root(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / (_rms(x) + eps) * weight


def norm_in_bf16(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    scale = round_bf16(1 / np.sqrt(round_bf16(_rms(round_bf16(x))) + eps))
    return round_bf16(round_bf16(round_bf16(x) * scale) * round_bf16(weight))


def no_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x


# Rotation.

ROTATED = {"self_attn.q_rot": "self_attn.q_proj", "self_attn.k_rot": "self_attn.k_proj"}
Rotation = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # heads, cos, sin


def rotations(formula: Rotation, *names: str) -> Variation:
    """Queries and keys (or those named) rotated by another formula."""

    def op(name: str) -> Op:
        def rotated(array: np.ndarray, place: Place) -> np.ndarray:
            heads = split_heads(place.seen[ROTATED[name]], place.config.head_dim)
            cos, sin = (place.seen[f"model.rotary_emb.{t}"][:, None] for t in ("cos", "sin"))
            return formula(heads, cos, sin)

        return rotated

    return lambda run: run.with_op_map({name: op(name) for name in names or ROTATED})


def interleaved(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    H = x.shape[-1]
    return to_interleaved(rotate(from_interleaved(x, H), cos, sin), H)


def backwards(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    return rotate(x, cos, -sin)


def unrotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    return x


def rotated_twice(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    return rotate(rotate(x, cos, sin), cos, sin)


def without_minus(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    return x * cos + np.roll(x, x.shape[-1] // 2, axis=-1) * sin


def half_kept(first: bool) -> Rotation:
    """One half of the rotated head, the other as it was."""

    def formula(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        kept = (np.arange(x.shape[-1]) < x.shape[-1] // 2) == first
        return np.where(kept, x, rotate(x, cos, sin))

    return formula


def half_as_wide(step: int) -> Rotation:
    """The first half of every head rotated as if it were all, with every `step`-th frequency."""

    def formula(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        pairs = x.shape[-1] // 4
        few = [table[..., : pairs * step : step] for table in (cos, sin)]
        tables = [np.concatenate([table, table], axis=-1) for table in few]
        turned = rotate(x[..., : 2 * pairs], *tables)
        return np.concatenate([turned, x[..., 2 * pairs :]], axis=-1)

    return formula


def decoded_keys_unrotated(run: Run) -> Run | None:
    """Decode steps store their keys before the rotation."""
    if _decode(run) is None:
        return None

    def op(array: np.ndarray, place: Place) -> np.ndarray:
        k = split_heads(place.seen["self_attn.k_proj"], place.config.head_dim)
        late = np.arange(run.tokens.shape[1])[place.columns, None] >= run.prompt
        return np.where(late, k, array)

    return run.with_ops(self_attn__k_rot=op)


def cached_keys_unrotated(run: Run, own_too: bool) -> Run | None:
    """Decode steps attend to keys without rotation, their own included or not."""
    single, steps = one_call(run), _decode(run)
    if len(single.calls) > 1 or steps is None:
        return None

    def op(array: np.ndarray, place: Place) -> np.ndarray:
        k = split_heads(place.seen["self_attn.k_proj"], place.config.head_dim)
        raw = _dots(place.seen["self_attn.q_rot"], k)
        own = np.eye(len(steps), dtype=bool) & (not own_too)
        return np.where(steps[:, None] & ~own, raw, array)

    return single.with_ops(self_attn__scores=op)


def values_rotated(run: Run) -> Run:
    def op(array: np.ndarray, place: Place) -> np.ndarray:
        heads = split_heads(array, place.config.head_dim)
        cos, sin = (place.seen[f"model.rotary_emb.{t}"][:, None] for t in ("cos", "sin"))
        return merge_heads(rotate(heads, cos, sin))

    return run.with_ops(self_attn__v_proj=op)


Angles = Callable[[np.ndarray, Config], np.ndarray]  # positions (B, T) -> (B, T, H/2)


def angles(formula: Angles, rounded: Callable[[np.ndarray], np.ndarray] | None = None) -> Variation:
    """Rotary tables from other angles, or rounded to another precision."""

    def table(function: Callable[[np.ndarray], np.ndarray]) -> Op:
        def op(array: np.ndarray, place: Place) -> np.ndarray:
            half = formula(place.positions, place.config)
            values = function(np.concatenate([half, half], axis=-1))
            values = values * rope.attention_factor(place.config)
            return (values if rounded is None else rounded(values)).astype(array.dtype)

        return op

    names = {"model.rotary_emb.cos": table(np.cos), "model.rotary_emb.sin": table(np.sin)}
    return lambda run: run.with_op_map(names)


def _frequencies(config: Config) -> np.ndarray:
    length = np.array([[config.max_position_embeddings]])
    return rope.SCALINGS[config.rope_scaling["rope_type"]](config, length)


def _times(positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """(B, T) and (1, H/2) -> (B, T, H/2), in the precision of the frequencies."""
    return positions[:, :, None].astype(frequencies.dtype) * frequencies[:, None]


def plain_angles(positions: np.ndarray, config: Config) -> np.ndarray:
    return _times(positions, _frequencies(config))


def rounded_angles(
    rounded: Callable[[np.ndarray], np.ndarray], positions: np.ndarray, config: Config
) -> np.ndarray:
    frequencies = rounded(_frequencies(config))
    return rounded(rounded(positions[:, :, None].astype(np.float64)) * frequencies[:, None])


def rounded_products(
    rounded: Callable[[np.ndarray], np.ndarray], positions: np.ndarray, config: Config
) -> np.ndarray:
    return rounded(_times(positions, _frequencies(config)))


def rounded_frequencies(
    rounded: Callable[[np.ndarray], np.ndarray], positions: np.ndarray, config: Config
) -> np.ndarray:
    return _times(positions, rounded(_frequencies(config)))


def rounded_positions(positions: np.ndarray, config: Config) -> np.ndarray:
    return _times(round_bf16(positions.astype(np.float64)), _frequencies(config))


def exponent_over(
    width: Callable[[Config], float], positions: np.ndarray, config: Config
) -> np.ndarray:
    """theta^(-2j/width) instead of theta^(-2j/H)."""
    exponents = np.arange(0, config.head_dim, 2) / width(config)
    frequencies = np.power(config.rope_theta, -exponents).astype(config.rope_angles)
    return _times(positions, frequencies[None])


# Positions and visibility.


def _decode(run: Run) -> np.ndarray | None:
    """Which columns are decode steps; None if there are none."""
    steps = np.arange(run.tokens.shape[1]) >= run.prompt
    return steps if steps.any() and run.prompt else None


def decode_positions(position: Callable[[np.ndarray, int], Any]) -> Variation:
    """Decode steps rotated as if they stood elsewhere: position(true positions, prompt)."""

    def variation(run: Run) -> Run | None:
        steps = _decode(run)
        if steps is None:
            return None
        positions = run.positions.copy()
        positions[:, steps] = position(positions[:, steps], run.prompt)
        return replace(run, positions=positions)

    return variation


def upper_layers_one_further(run: Run) -> Run | None:
    """The cache's length is counted up within the pass: layers above the first are one off."""
    steps = _decode(run)
    if steps is None or run.config.num_hidden_layers < 2:
        return None

    def op(name: str) -> Op:
        def rotated(array: np.ndarray, place: Place) -> np.ndarray:
            if place.layer == 0:
                return array
            moved = place.positions + steps[place.columns]
            length = np.array([[run.tokens.shape[1]]])
            tables = rope.tables(moved, length, place.config, array.dtype)
            return rotate(split_heads(place.seen[ROTATED[name]], place.config.head_dim), *tables)

        return rotated

    return run.with_op_map({name: op(name) for name in ROTATED})


def padding_counted(run: Run, prompt_too: bool, decode_too: bool) -> Run | None:
    """Rotary positions that count the padding in front, in one of the two phases."""
    T = run.tokens.shape[1]
    padded = (run.positions < 0).any()
    steps = np.arange(T) >= run.prompt
    if not padded or (not steps.any() and not (prompt_too and decode_too)):
        return None
    counted = (steps & decode_too) | (~steps & prompt_too)
    columns = np.broadcast_to(np.arange(T), run.positions.shape)
    real = run.positions >= 0
    return replace(run, positions=np.where(counted & real, columns, run.positions))


def padding_attended(run: Run) -> Run | None:
    if not (run.positions < 0).any():
        return None
    T = run.tokens.shape[1]
    return replace(run, visible=np.broadcast_to(np.tri(T, dtype=bool), run.visible.shape))


def sees(
    rule: Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray],
    blind: float | None = None,
) -> Variation:
    """Another mask: rule(query index, key index, first query of the same call, prompt).

    Keys of later calls and padding stay invisible; None if nothing changes. blind: the weights
    of a token that sees nothing: alike for all keys of its call (None), NaN or 0, depending on
    whether its scores are the smallest number or -inf, and on how softmax takes that.
    """

    def variation(run: Run) -> Run | None:
        first, last = _call_of_each(run)
        T = run.tokens.shape[1]
        query, key = np.arange(T)[:, None], np.arange(T)[None]
        allowed = rule(query, key, first, run.prompt) & (key < last)
        visible = np.asarray(allowed & (run.positions[:, None, None] >= 0))
        if np.array_equal(visible, run.visible):
            return None
        weights = (key < last) / last if blind is None else np.full((T, T), blind)
        return _blind_rows(replace(run, visible=visible), weights)

    return variation


def _call_of_each(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Where the call of each query begins and ends, (T, 1) both."""
    ends = np.cumsum(run.calls)
    first, last = (np.repeat(edge, run.calls)[:, None] for edge in (ends - run.calls, ends))
    return first, last


def without_cache(variation: Variation) -> Variation:
    """The same mistake where one call computes all tokens and can look ahead as far as it likes."""

    def changed(run: Run) -> Run | None:
        single = one_call(run)
        return None if single.calls == run.calls else variation(single)

    return changed


def window(width: Callable[[Run], int]) -> Variation:
    """A sliding window: every token sees itself and so many before it that there are `width`."""

    def variation(run: Run) -> Run | None:
        size = width(run)
        return sees(lambda query, key, first, prompt: (key <= query) & (key > query - size))(run)

    return variation


def half_of_the_run(run: Run) -> int:
    """A window for runs of this length."""
    return max(1, run.tokens.shape[1] // 2)


def _blind_rows(run: Run, given: np.ndarray) -> Run:
    """Tokens that see nothing have the given weights (T, T)."""
    sighted = np.asarray(run.visible.any(axis=-1))[:, 0]
    blind = ~sighted & (run.positions >= 0)  # (B, T)

    def op(array: np.ndarray, place: Place) -> np.ndarray:
        columns = place.columns
        weights = given[columns, : columns.stop].astype(array.dtype)
        return np.where(blind[:, None, columns, None], weights, array)

    return run.with_ops(self_attn__weights=op) if blind.any() else run


Weighing = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def weighed(formula: Weighing) -> Variation:
    """Attention weights by another formula of scores, visible keys and keys that are there."""

    def variation(run: Run) -> Run:
        last = _call_of_each(run)[1]
        there = np.arange(len(last)) < last  # (T, S)

        def op(array: np.ndarray, place: Place) -> np.ndarray:
            part = (..., place.columns, slice(place.columns.stop))
            weights = formula(place.seen["self_attn.scores"], run.visible[part], there[part])
            return weights.astype(array.dtype, copy=False)

        return run.with_ops(self_attn__weights=op)

    return variation


def masked(formula: Weighing) -> Variation:
    """`weighed` for masks: None where every key that is there is visible."""

    def variation(run: Run) -> Run | None:
        there = np.arange(run.tokens.shape[1]) < _call_of_each(run)[1]
        return weighed(formula)(run) if (there & ~run.visible).any() else None

    return variation


def hidden_scores(change: Callable[[np.ndarray], np.ndarray]) -> Weighing:
    """Scores of hidden keys that become something else than the smallest number."""

    def formula(scores: np.ndarray, visible: np.ndarray, there: np.ndarray) -> np.ndarray:
        hidden = np.where(there, change(scores), -np.inf)
        return softmax(np.where(visible, scores, hidden))

    return formula


def mask_after_softmax(scores: np.ndarray, visible: np.ndarray, there: np.ndarray) -> np.ndarray:
    return softmax(np.where(there, scores, -np.inf)) * visible


def one_more_in_sum(shifted: bool) -> Weighing:
    """exp(x) / (1 + sum(exp(x))), the 1 added before or after the maximum was subtracted."""

    def formula(scores: np.ndarray, visible: np.ndarray, there: np.ndarray) -> np.ndarray:
        seen = np.where(visible, scores, np.finfo(scores.dtype).min)
        top = seen.max(axis=-1, keepdims=True)
        e = np.exp(seen - top)
        return e / (e.sum(axis=-1, keepdims=True) + (1 if shifted else np.exp(-top)))

    return formula


def softmax_in(rounded: Callable[[np.ndarray], np.ndarray], *steps: str) -> Weighing:
    """The softmax with some of its steps rounded: its input, every step within, its output."""

    def after(step: str, x: np.ndarray) -> np.ndarray:
        return rounded(x) if step in steps else x

    def formula(scores: np.ndarray, visible: np.ndarray, there: np.ndarray) -> np.ndarray:
        x = np.where(visible, after("input", scores), np.finfo(scores.dtype).min)
        e = after("within", np.exp(after("within", x - x.max(axis=-1, keepdims=True))))
        return after("output", e / after("within", e.sum(axis=-1, keepdims=True)))

    return formula


def last_slot_overwritten(run: Run, by_slot: bool) -> Run | None:
    """Decode steps write one slot too early: the prompt's last key and value are lost.

    by_slot: scores and weights are recorded by slot, not by token.
    """
    steps, P = _decode(run), run.prompt
    lost = sees(lambda q, key, first, prompt: (key <= q) & ((q < prompt) | (key != prompt - 1)))
    changed = lost(run)
    if steps is None or changed is None or run.rows is not None or not by_slot:
        return changed

    def slots(array: np.ndarray) -> np.ndarray:
        moved = array.copy()
        moved[..., P:, P - 1 :] = np.roll(array[..., P:, P - 1 :], -1, axis=-1)
        return moved

    return replace(
        changed, shown={**run.shown, "self_attn.scores": slots, "self_attn.weights": slots}
    )


def hole_in_cache(run: Run, further: int) -> Run | None:
    """A slot of zeros between prompt and decoded tokens, seen by every decode step."""
    if _decode(run) is None or not _is_plain(run):
        return None
    P, T = run.prompt, run.tokens.shape[1]
    order = np.concatenate([np.arange(P), [P - 1], np.arange(P, T)])
    positions = run.positions[:, order].copy()
    positions[:, P + 1 :] += further

    def emptied(axis: int) -> Op:
        def op(array: np.ndarray, place: Place) -> np.ndarray:
            where = np.arange(T + 1)[place.columns] == P
            shape = [-1 if i == axis else 1 for i in range(array.ndim)]
            return np.where(where.reshape(shape), array.dtype.type(0), array)

        return op

    calls = (*run.calls[: _calls_of_prompt(run)], 1, *run.calls[_calls_of_prompt(run) :])
    visible = run.visible[:, :, order][:, :, :, order].copy()
    visible[:, :, :, P] = np.arange(T + 1) >= P
    changed = replace(
        run, tokens=run.tokens[:, order], positions=positions, visible=visible, calls=calls,
        rows=np.delete(np.arange(T + 1), P),
    )  # fmt: skip
    return changed.with_ops(self_attn__k_rot=emptied(2), self_attn__v_proj=emptied(1))


def keys_and_values_reread(rounded: Callable[[np.ndarray], np.ndarray], run: Run) -> Run | None:
    """Attention to rounded keys and values, where those before rounding are shown."""
    single = one_call(run)
    if len(single.calls) > 1:
        return None

    def scores(array: np.ndarray, place: Place) -> np.ndarray:
        q, k = place.seen["self_attn.q_rot"], rounded(place.seen["self_attn.k_rot"])
        return _dots(q, k)

    def values(v: np.ndarray, place: Place) -> np.ndarray:
        return split_heads(rounded(v), place.config.head_dim)

    return single.with_ops(self_attn__scores=scores, self_attn__context=_context_of(values))


def values_reread(values: Callable[[np.ndarray, Place], np.ndarray]) -> Variation:
    """Attention to other values than those that are shown: values(v_proj) as heads."""

    def variation(run: Run) -> Run | None:
        single = one_call(run)
        one = len(single.calls) == 1
        return single.with_ops(self_attn__context=_context_of(values)) if one else None

    return variation


def rotated_values(v: np.ndarray, place: Place) -> np.ndarray:
    cos, sin = (place.seen[f"model.rotary_emb.{t}"][:, None] for t in ("cos", "sin"))
    return rotate(split_heads(v, place.config.head_dim), cos, sin)


def _context_of(values: Callable[[np.ndarray, Place], np.ndarray]) -> Op:
    def op(array: np.ndarray, place: Place) -> np.ndarray:
        weights = place.seen["self_attn.weights"]
        v = values(place.seen["self_attn.v_proj"], place)
        return merge_heads(weights @ _per_query_head(v, weights))

    return op


def _dots(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Scores of all queries (B, N, T, H) and keys (B, K, S, H)."""
    return q @ _per_query_head(k, q).swapaxes(2, 3) / math.sqrt(q.shape[-1])


def _per_query_head(array: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(B, K, S, H) -> (B, N, S, H): the key/value head of each query head."""
    return array.repeat(queries.shape[1] // array.shape[1], axis=1)


def _calls_of_prompt(run: Run) -> int:
    """How many calls the prompt takes; one call for everything counts as that."""
    return int(np.searchsorted(np.cumsum(run.calls), run.prompt)) + 1


# Heads.


def key_heads_taken_in_turn(run: Run) -> Run | None:
    """Query head n reads key head n mod K: the order that tiling keys instead of repeating gives.

    Heads are reordered so that each meets the wrong keys, and put back where they are shown.
    """
    N, K = run.config.num_attention_heads, run.config.num_key_value_heads
    if K in (1, N):
        return None
    order = np.argsort(np.arange(N) % K, kind="stable")  # which head stands at each place
    back = np.argsort(order)
    H = run.config.head_dim

    def restored(array: np.ndarray, place: Place) -> np.ndarray:
        return merge_heads(split_heads(array, H)[:, back])

    shown = {f"self_attn.{name}": lambda array: array[:, back]
             for name in ("q_rot", "scores", "weights")}  # fmt: skip
    changed = run.with_op_map({
        "self_attn.q_rot": lambda array, place: array[:, order],
        "self_attn.context": restored,
    })  # fmt: skip
    return replace(changed, shown={**run.shown, **shown})


def context_reordered(run: Run, by_channel: bool) -> Run | None:
    """Heads merged in another order than the output projection expects."""
    N, K, H = run.config.num_attention_heads, run.config.num_key_value_heads, run.config.head_dim

    def op(array: np.ndarray, place: Place) -> np.ndarray:
        B, T, width = array.shape
        if by_channel:
            return array.reshape(B, T, N, H).swapaxes(2, 3).reshape(B, T, width)
        return array.reshape(B, T, K, N // K, H).swapaxes(2, 3).reshape(B, T, width)

    return None if not by_channel and K in (1, N) else run.with_ops(self_attn__context=op)


Reshape = Callable[[np.ndarray, int], np.ndarray]  # (B, T, heads*H), H


def _call_by_call(reshape: Reshape, run: Run, axis: int) -> Callable[..., np.ndarray]:
    """A reshape that mixes tokens, for a few calls computed at once."""
    calls = list(spans(run.calls))

    def reshaped(x: np.ndarray, place: Place) -> np.ndarray:
        start, stop = place.columns.start, place.columns.stop
        parts = [x[:, c.start - start : c.stop - start] for c in calls
                 if start <= c.start and c.stop <= stop]  # fmt: skip
        return np.concatenate([reshape(part, place.config.head_dim) for part in parts], axis)

    return reshaped


def heads_split(reshape: Reshape) -> Variation:
    """Queries, keys and values turned into heads (B, heads, T, H) in another way."""

    def variation(run: Run) -> Run | None:
        heads = _call_by_call(reshape, run, axis=2)

        def op(name: str) -> Op:
            def rotated(array: np.ndarray, place: Place) -> np.ndarray:
                cos, sin = (place.seen[f"model.rotary_emb.{t}"][:, None] for t in ("cos", "sin"))
                return rotate(heads(place.seen[ROTATED[name]], place), cos, sin)

            return rotated

        changed = values_reread(heads)(run)
        return changed and changed.with_op_map({name: op(name) for name in ROTATED})

    return variation


def untransposed(x: np.ndarray, H: int) -> np.ndarray:
    """Heads by a reshape alone, which mixes tokens."""
    B, T, width = x.shape
    return x.reshape(B, width // H, T, H)


def head_last(x: np.ndarray, H: int) -> np.ndarray:
    """Heads as if channels came first: channel h of head n at h * heads + n."""
    B, T, width = x.shape
    return x.reshape(B, T, H, width // H).transpose(0, 3, 1, 2)


def merged_untransposed(run: Run) -> Run:
    """(B, N, T, H) reshaped to (B, T, N*H), which mixes tokens."""
    merged = _call_by_call(lambda x, H: split_heads(x, H).reshape(x.shape), run, axis=1)
    return run.with_ops(self_attn__context=merged)


def scores_times(factor: Callable[[Config], float]) -> Variation:
    return ops(self_attn__scores=lambda array, place: array * factor(place.config))


def capped(limit: float) -> Op:
    return lambda array, place: np.tanh(array / limit) * limit


def rounded_op(rounded: Callable[[np.ndarray], np.ndarray]) -> Op:
    return lambda array, place: rounded(array)


# MLP, residual, head.


def activated(array: np.ndarray, place: Place) -> np.ndarray:
    return ACTIVATIONS[place.config.hidden_act](array)


def activation_in(rounded: Callable[[np.ndarray], np.ndarray]) -> Variation:
    return ops(mlp__act_fn=lambda array, place: rounded(activated(rounded(gate_of(place)), place)))


def other_activation(name: str) -> Variation:
    def op(array: np.ndarray, place: Place) -> np.ndarray:
        return ACTIVATIONS[name](gate_of(place))

    return lambda run: None if run.config.hidden_act == name else run.with_ops(mlp__act_fn=op)


def up_of(place: Place) -> np.ndarray:
    w, x = place.w, place.seen["post_attention_layernorm"]
    return linear(x, w["mlp.up_proj.weight"], w.get("mlp.up_proj.bias"))


def gate_of(place: Place) -> np.ndarray:
    return place.seen["mlp.gate_proj"]


def missing_layer(index: int) -> Variation:
    def op(array: np.ndarray, place: Place) -> np.ndarray:
        skipped = place.layer == index % place.config.num_hidden_layers
        return place.seen["x"] if skipped else array

    def variation(run: Run) -> Run | None:  # the last layer is number -1
        return run.with_ops(block=op) if index < run.config.num_hidden_layers - 1 else None

    return variation


def weights_of_neighbour(by: int) -> Variation:
    """Every layer has the weights of the layer before (-1) or after it (1)."""

    def variation(run: Run) -> Run | None:
        last = run.config.num_hidden_layers - 1

        def change(name: str, value: Any) -> Any:
            layer = split_name(name)[0]
            if layer < 0:
                return value
            other = run.weights[f"model.layers.{min(max(layer + by, 0), last)}"]
            return {key: _numbers(other[key], array) for key, array in value.items()}

        return run.with_weights(change) if last else None

    return variation


def reads(module: str, source: str) -> Op:
    """A linear module that is fed something else."""

    def op(array: np.ndarray, place: Place) -> np.ndarray:
        weight, bias = (place.w.get(f"{module}.{kind}") for kind in ("weight", "bias"))
        return array if weight is None else linear(place.seen[source], weight, bias)

    return op


def added_to(attention: str | None, after: str | None) -> Variation:
    """What the two additions of every layer add to, instead of x and middle (None: nothing)."""
    functions: dict[str, Op] = {}
    if attention != "x":
        functions["middle"] = lambda array, place: (
            place.seen["self_attn"] + (place.seen[attention] if attention else 0)
        )
    if after != "middle":
        functions["block"] = lambda array, place: (
            place.seen["mlp"] + (place.seen[after] if after else 0)
        )
    return lambda run: run.with_op_map(functions)


def mlp_beside_attention(x: np.ndarray, place: Place) -> np.ndarray:
    layer_input = place.seen["x"]
    eps = place.config.rms_norm_eps
    weight = place.w["post_attention_layernorm.weight"]
    return layer_input / np.sqrt(_rms(layer_input) + eps) * weight


def rows_shifted(by: int, wrap: bool) -> Variation:
    """Row t of the logits shows row t - by."""

    def shown(array: np.ndarray) -> np.ndarray:
        rows = np.arange(array.shape[1]) - by
        return array[:, rows % len(rows) if wrap else np.clip(rows, 0, len(rows) - 1)]

    return lambda run: replace(run, shown={**run.shown, "lm_head": shown})


def head_in(rounded: Callable[[np.ndarray], np.ndarray]) -> Variation:
    def op(array: np.ndarray, place: Place) -> np.ndarray:
        hidden = rounded(place.seen["model.norm"])
        return rounded(linear(hidden, rounded(place.w["lm_head.weight"])))

    return ops(lm_head=op)


def with_each(name: str, *values: Any) -> tuple[Variation, ...]:
    return tuple(with_config(**{name: value}) for value in values)


def model_width(config: Config) -> float:
    return config.hidden_size


def width_per_head(config: Config) -> float:
    return config.hidden_size / config.num_attention_heads


def root_of_width(config: Config) -> float:
    return math.sqrt(config.hidden_size)
