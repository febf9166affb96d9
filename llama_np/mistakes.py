"""Known mistakes of LLaMA implementations, each a small variation of the forward pass.

A variation takes the plain run and returns a changed one: another config, other positions or
visibility, changed weights, or named arrays computed differently. It returns None where it does
not apply (no biases to drop, nothing to scale). Variations can be applied one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from llama_np import rope
from llama_np.activations import ACTIVATIONS
from llama_np.config import Config
from llama_np.experiment import Op, Place, Run, one_call
from llama_np.layers import merge_heads, rms_norm, rotate, split_heads
from llama_np.linear import linear
from llama_np.model import causal
from llama_np.ports import from_interleaved, to_interleaved
from llama_np.precision import round_bf16, round_f16, widen

Variation = Callable[[Run], Run | None]


@dataclass(frozen=True)
class Mistake:
    """A mistake that real projects made.

    id: its name; cause: how it usually comes about; advice: how to mend it; threads: where it
    was reported (repository#number); variations: the forms in which it shows.
    """

    id: str
    cause: str
    advice: str
    threads: tuple[str, ...]
    variations: tuple[Variation, ...]


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


def _rows_by_head(change: Callable[[np.ndarray, Config], np.ndarray], *modules: str) -> Variation:
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

    return _rows_by_head(change, "k_proj")(run)


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
        ends = np.cumsum(run.calls)
        first = np.repeat(ends - run.calls, run.calls)[:, None]
        last = np.repeat(ends, run.calls)[:, None]
        T = run.tokens.shape[1]
        query, key = np.arange(T)[:, None], np.arange(T)[None]
        allowed = rule(query, key, first, run.prompt) & (key < last)
        visible = np.asarray(allowed & (run.positions[:, None, None] >= 0))
        if np.array_equal(visible, run.visible):
            return None
        weights = (key < last) / last if blind is None else np.full((T, T), blind)
        return _blind_rows(replace(run, visible=visible), weights)

    return variation


def _blind_rows(run: Run, given: np.ndarray) -> Run:
    """Tokens that see nothing have the given weights (T, T)."""
    sighted = np.asarray(run.visible.any(axis=-1))[:, 0]
    blind = ~sighted & (run.positions >= 0)  # (B, T)

    def op(array: np.ndarray, place: Place) -> np.ndarray:
        columns = place.columns
        weights = given[columns, : columns.stop].astype(array.dtype)
        return np.where(blind[:, None, columns, None], weights, array)

    return run.with_ops(self_attn__weights=op) if blind.any() else run


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
        return q @ _per_query_head(k, q).swapaxes(2, 3) / math.sqrt(place.config.head_dim)

    def context(array: np.ndarray, place: Place) -> np.ndarray:
        v = split_heads(rounded(place.seen["self_attn.v_proj"]), place.config.head_dim)
        weights = place.seen["self_attn.weights"]
        return merge_heads(weights @ _per_query_head(v, weights))

    return single.with_ops(self_attn__scores=scores, self_attn__context=context)


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


def scores_times(factor: Callable[[Config], float]) -> Variation:
    return ops(self_attn__scores=lambda array, place: array * factor(place.config))


def capped(limit: float) -> Op:
    return lambda array, place: np.tanh(array / limit) * limit


def rounded_op(rounded: Callable[[np.ndarray], np.ndarray]) -> Op:
    return lambda array, place: rounded(array)


# MLP, residual, head.


def _activated(array: np.ndarray, place: Place) -> np.ndarray:
    return ACTIVATIONS[place.config.hidden_act](array)


def other_activation(name: str) -> Variation:
    def op(array: np.ndarray, place: Place) -> np.ndarray:
        return ACTIVATIONS[name](_gate(place))

    return lambda run: None if run.config.hidden_act == name else run.with_ops(mlp__act_fn=op)


def _up(place: Place) -> np.ndarray:
    w, x = place.w, place.seen["post_attention_layernorm"]
    return linear(x, w["mlp.up_proj.weight"], w.get("mlp.up_proj.bias"))


def _gate(place: Place) -> np.ndarray:
    return place.seen["mlp.gate_proj"]


def missing_layer(index: int) -> Variation:
    def op(array: np.ndarray, place: Place) -> np.ndarray:
        skipped = place.layer == index % place.config.num_hidden_layers
        return place.seen["x"] if skipped else array

    return ops(block=op)


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


def _other(name: str, *values: Any) -> tuple[Variation, ...]:
    return tuple(with_config(**{name: value}) for value in values)


def _width(config: Config) -> float:
    return config.hidden_size


def _width_per_head(config: Config) -> float:
    return config.hidden_size / config.num_attention_heads


def _root_of_width(config: Config) -> float:
    return math.sqrt(config.hidden_size)


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BF16 = round_bf16
F16 = round_f16

CATALOGUE: tuple[Mistake, ...] = (
    # tokens
    Mistake(
        "bos_missing",
        "The tokenizer was asked for no special tokens, or the harness strips them.",
        "Put the beginning-of-sequence token in front of the prompt.",
        ("ggml-org/llama.cpp#1303", "ollama/ollama#9373"),
        (first_token_missing,),
    ),
    Mistake(
        "bos_doubled",
        "Both the chat template and the tokenizer add the beginning-of-sequence token.",
        "Encode text that already contains it without adding special tokens.",
        ("ggml-org/llama.cpp#7107", "abetlen/llama-cpp-python#1501"),
        (token_in_front, partial(token_in_front, shown=False)),
    ),
    Mistake(
        "logits_row_shift",
        "Logits are read one row too early or too late.",
        "Row t predicts token t + 1; read the last real row for the next token.",
        ("tenstorrent/tt-forge-onnx#384", "unslothai/unsloth#772"),
        tuple(rows_shifted(by, wrap) for by in (1, -1) for wrap in (True, False)),
    ),
    # weights
    Mistake(
        "rope_interleaved",
        "Adjacent channels are rotated on weights for halves, or Meta's q/k were not permuted.",
        "Pair channel j with j + head_dim/2, or permute q_proj and k_proj rows when converting.",
        ("huggingface/transformers#25199", "tenstorrent/tt-metal#26844", "rasbt#747"),
        (
            rotations(interleaved),
            _rows_by_head(lambda rows, c: to_interleaved(rows, c.head_dim), "q_proj", "k_proj"),
            _rows_by_head(lambda rows, c: from_interleaved(rows, c.head_dim), "q_proj", "k_proj"),
            rotations(interleaved, "self_attn.k_rot"),
            rotations(interleaved, "self_attn.q_rot"),
        ),
    ),
    Mistake(
        "k_permuted_for_query_heads",
        "The rotary permutation of k_proj was done with the number of query heads.",
        "Permute k_proj with num_key_value_heads.",
        ("ggml-org/llama.cpp#3364", "huggingface/transformers#31788"),
        (keys_permuted_for_query_heads,),
    ),
    Mistake(
        "o_proj_head_order",
        "Heads are merged in another order than the output projection was trained with.",
        "Merge as (tokens, heads, head_dim) with query heads in their own order.",
        ("nntile/nntile#347",),
        (
            partial(context_reordered, by_channel=True),
            partial(context_reordered, by_channel=False),
        ),
    ),
    Mistake(
        "fused_qkv_split",
        "A fused q/k/v matrix interleaved by group was split as [all q, all k, all v].",
        "Split each group into its query heads, one key head and one value head.",
        ("epfLLM/Megatron-LLM#45", "vllm-project/vllm#53114"),
        (fused_qkv_split_in_thirds,),
    ),
    Mistake(
        "gate_up_swapped",
        "gate_proj and up_proj are exchanged (Meta: w1 is gate, w3 is up).",
        "Apply the activation to gate_proj, multiply by up_proj.",
        ("ml-explore/mlx-lm#767", "flashinfer-ai/flashinfer#4130"),
        (
            exchanged("mlp.gate_proj", "mlp.up_proj"),
            ops(
                mlp__act_fn=lambda array, place: _activated(_up(place), place),
                mlp__hidden=lambda array, place: place.seen["mlp.act_fn"] * _gate(place),
            ),
            ops(mlp__hidden=lambda array, place: _activated(_up(place), place) * _gate(place)),
        ),
    ),
    Mistake(
        "kv_swapped",
        "k_proj and v_proj are exchanged.",
        "Check the order in which the loader unpacks q, k and v.",
        (),
        (exchanged("self_attn.k_proj", "self_attn.v_proj"),),
    ),
    Mistake(
        "qk_swapped",
        "q_proj and k_proj are exchanged.",
        "Check the order in which the loader unpacks q, k and v.",
        (),
        (exchanged("self_attn.q_proj", "self_attn.k_proj"),),
    ),
    Mistake(
        "head_untied",
        "The embedding serves as head although the checkpoint has its own, or none was loaded.",
        "Follow tie_word_embeddings: true shares the embedding, false loads lm_head.weight.",
        ("tinygrad/tinygrad#13796", "huggingface/transformers#43429", "DeepSpeed#4088"),
        (head_is_embedding, head_is_zero),
    ),
    *(
        Mistake(
            f"{module.split('.')[1]}_transposed",
            f"The weight of {module} is used as (in, out) although it is stored as (out, in).",
            "Compute x @ weight.T; square matrices hide the mistake.",
            ("EnzymeAD/Enzyme-JAX#104", "huggingface/candle#321"),
            (transposed(module), misread_as_transposed(module)),
        )
        for module in (*ATTENTION, "self_attn.o_proj", *MLP)
    ),
    Mistake(
        "weights_truncated_bf16",
        "float32 weights were cut to bfloat16 by dropping bits instead of rounding.",
        "Round to nearest even when converting.",
        ("aprender#2144",),
        (all_weights(truncate_bf16),),
    ),
    Mistake(
        "weights_rounded_bf16",
        "The weights went through bfloat16, the arithmetic is float32.",
        "Load the weights in the checkpoint's own precision.",
        (),
        (all_weights(round_bf16),),
    ),
    Mistake(
        "weights_rounded_f16",
        "The weights went through float16, the arithmetic is float32.",
        "Load the weights in the checkpoint's own precision.",
        (),
        (all_weights(round_f16),),
    ),
    Mistake(
        "qkv_bias_dropped",
        "The biases of q, k and v are not loaded.",
        "Load every *.bias tensor of the checkpoint; attention_bias says that they exist.",
        ("ANEForge#253", "mlc-ai/mlc-llm#3494", "vllm-project/vllm#3767"),
        (without_bias(*ATTENTION), *map(without_bias, ATTENTION)),
    ),
    Mistake(
        "o_bias_dropped",
        "The bias of o_proj is not loaded.",
        "Load every *.bias tensor of the checkpoint.",
        ("mlc-ai/mlc-llm#3494",),
        (without_bias("self_attn.o_proj"),),
    ),
    Mistake(
        "attention_bias_dropped",
        "All four biases of the attention are not loaded.",
        "Load every *.bias tensor of the checkpoint; attention_bias says that they exist.",
        ("mlc-ai/mlc-llm#3494",),
        (without_bias(*ATTENTION, "self_attn.o_proj"),),
    ),
    Mistake(
        "mlp_bias_dropped",
        "The biases of the MLP are not loaded.",
        "Load every *.bias tensor of the checkpoint; mlp_bias says that they exist.",
        ("mlc-ai/mlc-llm#3494",),
        (without_bias(*MLP), *map(without_bias, MLP)),
    ),
    Mistake(
        "layer_missing",
        "One layer is skipped: the loop ends early or starts late.",
        "Run num_hidden_layers layers.",
        (),
        (missing_layer(-1), missing_layer(0)),
    ),
    # norms and residual
    Mistake(
        "rms_eps",
        "The norm's eps is a constant of the code instead of rms_norm_eps.",
        "Read rms_norm_eps from config.json.",
        ("ggml-org/llama.cpp#2373", "huggingface/candle#271", "Lightning-AI/lit-llama#339"),
        _other("rms_norm_eps", 1e-6, 1e-5, 1e-8, 1e-12, 1e-3),
    ),
    Mistake(
        "rms_eps_outside",
        "eps is added after the square root.",
        "x / sqrt(mean(x*x) + eps) * weight",
        (),
        (norms(eps_outside),),
    ),
    Mistake(
        "rms_layernorm",
        "LayerNorm: the mean is subtracted.",
        "RMSNorm subtracts nothing: x / sqrt(mean(x*x) + eps) * weight",
        (),
        (norms(layer_norm), *(norms(layer_norm, name) for name in NORMS)),
    ),
    Mistake(
        "rms_weight_missing",
        "The norm's weight is not applied.",
        "Multiply the normalized vector by the weight.",
        (),
        (norms(unweighted), *(norms(unweighted, name) for name in NORMS)),
    ),
    Mistake(
        "rms_weight_plus_one",
        "1 + weight, as in Gemma.",
        "LLaMA multiplies by the weight itself.",
        ("vllm-project/vllm#29810", "google/gemma_pytorch#67"),
        (norms(weight_plus_one),),
    ),
    Mistake(
        "rms_sum",
        "The sum of squares instead of their mean.",
        "Divide the sum of squares by hidden_size.",
        (),
        (norms(sum_not_mean),),
    ),
    Mistake(
        "norm_low_precision",
        "The norm is computed in bfloat16.",
        "Compute the mean of squares in float32, cast afterwards.",
        ("tinygrad/tinygrad#5095", "huggingface/transformers#29402"),
        (norms(norm_in_bf16),),
    ),
    Mistake(
        "norms_swapped",
        "input_layernorm and post_attention_layernorm are exchanged.",
        "Check which norm the loader gives to which half of the layer.",
        (),
        (exchanged("input_layernorm", "post_attention_layernorm"),),
    ),
    Mistake(
        "final_norm_twice",
        "The final norm is applied again to states that are normalized already.",
        "hidden_states[-1] of transformers has been through model.norm.",
        (),
        (
            ops(
                model__norm=lambda array, place: rms_norm(
                    "model.norm", array, place.w, place.config.rms_norm_eps
                )
            ),
        ),
    ),
    Mistake(
        "final_norm_missing",
        "The norm before the head is left out.",
        "Apply model.norm to the last layer's output.",
        ("PaddlePaddle/PaddleNLP#7615",),
        (norms(no_norm, "model.norm"),),
    ),
    Mistake(
        "residual_from_norm",
        "The sublayer's output is added to its normalized input (or the norm works in place).",
        "Add to what went into the norm.",
        ("nano-vllm#170", "naklecha/llama3-from-scratch#28"),
        (
            added_to("input_layernorm", "post_attention_layernorm"),
            added_to("input_layernorm", "middle"),
            added_to("x", "post_attention_layernorm"),
        ),
    ),
    Mistake(
        "residual_missing",
        "The sublayer's output is not added to the stream.",
        "x = x + attention(norm(x)); x = x + mlp(norm(x))",
        (),
        (added_to(None, None), added_to(None, "middle"), added_to("x", None)),
    ),
    Mistake(
        "residual_from_layer_input",
        "The MLP's output is added to the layer's input: the attention's contribution is lost.",
        "Keep the sum after the attention and add the MLP's output to it.",
        ("RiNALMo#9",),
        (added_to("x", "x"),),
    ),
    Mistake(
        "mlp_beside_attention",
        "The MLP reads the layer's input instead of the sum after the attention.",
        "post_attention_layernorm reads x + attention.",
        (),
        (ops(post_attention_layernorm=mlp_beside_attention),),
    ),
    # rotation and positions
    Mistake(
        "rope_not_applied",
        "Queries or keys are not rotated.",
        "Rotate both before the scores.",
        (),
        (rotations(unrotated), *(rotations(unrotated, name) for name in ROTATED)),
    ),
    Mistake(
        "rope_reversed",
        "The sign of the sine is wrong: rotation by minus the angle.",
        "x * cos + concat(-second half, first half) * sin",
        (),
        (
            rotations(backwards),
            ops(model__rotary_emb__sin=lambda array, place: -array),
            *(rotations(backwards, name) for name in ROTATED),
        ),
    ),
    Mistake(
        "rope_twice",
        "Queries and keys are rotated twice, for example again when they leave the cache.",
        "Rotate once; cached keys are already rotated.",
        ("ggml-org/llama.cpp#4889",),
        (rotations(rotated_twice), *(rotations(rotated_twice, name) for name in ROTATED)),
    ),
    Mistake(
        "rope_on_values",
        "Values are rotated too.",
        "Rotate queries and keys only.",
        (),
        (values_rotated,),
    ),
    Mistake(
        "rope_theta",
        "rope_theta is a constant of the code (10000 for Llama 2, 500000 for Llama 3).",
        "Read rope_theta from config.json.",
        ("karpathy/llama2.c#356", "ggml-org/llama.cpp#2773"),
        _other("rope_theta", 10000.0, 500000.0, 1000000.0, 100000.0, 1000.0),
    ),
    Mistake(
        "rope_scaling_ignored",
        "rope_scaling is not implemented, read under another key, or computed and dropped.",
        "Apply the scaling that rope_scaling (type or rope_type) names.",
        ("huggingface/transformers#32330", "Blaizzy/mlx-vlm#1710", "unslothai/unsloth#6197"),
        (without_scaling, scaled_linearly),
    ),
    Mistake(
        "rope_low_precision",
        "Rotary frequencies, angles or tables are kept in 16 bits.",
        "Compute angles in float32 and round only the cosines and sines.",
        ("EleutherAI/gpt-neox#1003", "huggingface/transformers#29496"),
        (
            angles(plain_angles, BF16),
            angles(partial(rounded_angles, BF16), BF16),
            angles(partial(rounded_angles, BF16)),
            angles(partial(rounded_frequencies, BF16)),
            angles(partial(rounded_frequencies, BF16), BF16),
            angles(plain_angles, F16),
            angles(partial(rounded_angles, F16), F16),
            angles(partial(rounded_frequencies, F16)),
        ),
    ),
    Mistake(
        "position_low_precision",
        "Positions are counted in bfloat16, which knows no odd number above 256.",
        "Keep positions as integers.",
        ("keras-team/keras-hub#1544",),
        (angles(rounded_positions),),
    ),
    Mistake(
        "rope_full_dim_exponent",
        "theta^(-2i/hidden_size): the exponent is divided by the model's width.",
        "theta^(-2i/head_dim)",
        ("rasbt#410", "nntile/nntile#347"),
        (angles(partial(exponent_over, _width)),),
    ),
    Mistake(
        "rope_head_dim",
        "The exponent uses hidden_size / num_attention_heads although head_dim is another.",
        "Use head_dim from config.json.",
        ("huggingface/transformers#32857", "pytorch/torchtitan#3570"),
        (angles(partial(exponent_over, _width_per_head)),),
    ),
    Mistake(
        "rope_exponent_halved",
        "theta^(-i/head_dim) instead of theta^(-2i/head_dim).",
        "The exponents are 0, 2, 4, ... divided by head_dim.",
        ("rasbt#411",),
        (angles(partial(exponent_over, lambda config: 2 * config.head_dim)),),
    ),
    Mistake(
        "position_plus_one_decode",
        "Decode steps are rotated one position too far.",
        "The first decoded token's position is the prompt's length.",
        ("microsoft/onnxruntime-genai#2354", "tiny-llm#46"),
        (decode_positions(lambda p, prompt: p + 1),),
    ),
    Mistake(
        "position_minus_one_decode",
        "Decode steps are rotated one position too early.",
        "The first decoded token's position is the prompt's length.",
        (),
        (decode_positions(lambda p, prompt: p - 1),),
    ),
    Mistake(
        "position_zero_decode",
        "Every decode step is rotated at position 0: the start position is ignored.",
        "Pass the number of cached tokens as the start position.",
        ("keras-team/keras-hub#1544", "Blaizzy/mlx-vlm#1983"),
        (decode_positions(lambda p, prompt: 0),),
    ),
    Mistake(
        "position_stuck_decode",
        "All decode steps are rotated at the prompt's length: the position does not advance.",
        "Every decoded token's position is one further than the one before.",
        (),
        (decode_positions(lambda p, prompt: prompt),),
    ),
    Mistake(
        "position_restart",
        "Positions start again at 0 with the first decode step.",
        "Positions continue from the prompt's length.",
        ("keras-team/keras-hub#1544",),
        (decode_positions(lambda p, prompt: np.arange(p.shape[1])),),
    ),
    Mistake(
        "position_layer_offset",
        "The cache's length is counted up while the layers run: upper layers are one further.",
        "Count the cache's length up once, after the last layer.",
        ("fla-org/flash-linear-attention#766",),
        (upper_layers_one_further,),
    ),
    Mistake(
        "left_pad_positions",
        "In a left-padded batch, padding counts as positions in one phase and not in the other.",
        "position = cumsum(attention_mask) - 1, continued per row while decoding.",
        ("huggingface/transformers#33095", "unslothai/unsloth#3699"),
        (
            partial(padding_counted, prompt_too=False, decode_too=True),
            partial(padding_counted, prompt_too=True, decode_too=False),
            partial(padding_counted, prompt_too=True, decode_too=True),
        ),
    ),
    Mistake(
        "padding_attended",
        "Padding tokens are attended to.",
        "Mask the padding columns in every layer and every step.",
        ("huggingface/transformers#26072", "tloen/alpaca-lora#315"),
        (padding_attended,),
    ),
    # attention
    *(
        Mistake(
            name,
            "Query head n reads key/value head n mod K: keys are tiled, not repeated.",
            "Query head n reads key/value head n // (N/K).",
            ("onnx/onnx#7274", "ONNXim#34", "prime-rl#2681"),
            (key_heads_taken_in_turn,),
        )
        for name in ("gqa_tile", "kv_head_modulo")
    ),
    Mistake(
        "attn_scale_missing",
        "Scores are not divided by sqrt(head_dim).",
        "scores = q @ k.T / sqrt(head_dim)",
        ("mlc-ai/mlc-llm#3426",),
        (scores_times(lambda config: math.sqrt(config.head_dim)),),
    ),
    Mistake(
        "attn_scale_d_model",
        "Scores are divided by sqrt(hidden_size).",
        "scores = q @ k.T / sqrt(head_dim)",
        ("DL4Proteins#12", "AI-Hypercomputer/maxtext#1370"),
        (
            scores_times(lambda config: math.sqrt(config.head_dim / config.hidden_size)),
            scores_times(lambda config: math.sqrt(config.head_dim / _width_per_head(config))),
        ),
    ),
    Mistake(
        "attn_scale_twice",
        "The scale is applied twice: scores are divided by head_dim.",
        "scores = q @ k.T / sqrt(head_dim), once",
        ("TransformerLensOrg/TransformerLens#27",),
        (scores_times(lambda config: 1 / math.sqrt(config.head_dim)),),
    ),
    Mistake(
        "attn_scale_inverse",
        "Scores are multiplied by sqrt(head_dim).",
        "scores = q @ k.T / sqrt(head_dim)",
        ("ViT-CIFAR#12",),
        (scores_times(lambda config: float(config.head_dim)),),
    ),
    Mistake(
        "attn_scale_other",
        "Scores are scaled by a number of their own.",
        "scores = q @ k.T / sqrt(head_dim)",
        ("AI-Hypercomputer/maxtext#1370",),
        (scores_times(lambda config: 2.0), scores_times(lambda config: 0.5)),
    ),
    Mistake(
        "scores_softcapped",
        "Scores pass through a soft cap, as in Gemma 2.",
        "LLaMA has no soft cap.",
        ("sgl-project/sglang#33915", "ggml-org/llama.cpp#8197"),
        (ops(self_attn__scores=capped(50.0)), ops(self_attn__scores=capped(30.0))),
    ),
    Mistake(
        "logits_softcapped",
        "Logits pass through a soft cap, as in Gemma 2.",
        "LLaMA has no soft cap.",
        ("ggml-org/llama.cpp#8197",),
        (ops(lm_head=capped(30.0)), ops(lm_head=capped(50.0))),
    ),
    Mistake(
        "causal_mask_missing",
        "Tokens of the prompt see later tokens.",
        "Mask keys after the query in every call with more than one token.",
        ("mlxcel#998", "TinyLLM#17"),
        (sees(lambda query, key, first, prompt: key >= 0 * query),),
    ),
    Mistake(
        "causal_mask_strict",
        "A token does not see itself: key < query. The first token sees nothing (NaN with -inf).",
        "The mask is key <= query.",
        (),
        tuple(
            sees(lambda query, key, first, prompt: key < query, blind)
            for blind in (None, 0.0, math.nan)
        ),
    ),
    Mistake(
        "causal_mask_reversed",
        "The mask is upside down: tokens see themselves and later ones.",
        "The mask is key <= query.",
        (),
        (sees(lambda query, key, first, prompt: key >= query),),
    ),
    Mistake(
        "causal_mask_not_offset",
        "The mask ignores the cached length: a decode step sees key 0 only.",
        "Compare key positions with query positions, not with the row number of the call.",
        ("hyprstream#1521",),
        (sees(lambda query, key, first, prompt: key <= query - first),),
    ),
    Mistake(
        "cache_hole",
        "The cache's write position is one too far: a slot of zeros is attended to.",
        "Write the first decoded token directly behind the prompt.",
        ("microsoft/onnxruntime-genai#2354", "tiny-llm#46"),
        (partial(hole_in_cache, further=0), partial(hole_in_cache, further=1)),
    ),
    Mistake(
        "cache_prompt_lost",
        "Decode steps do not see the prompt: its keys never reached the cache.",
        "Store the keys and values of the prefill.",
        ("ml-explore/mlx-examples#977",),
        (sees(lambda q, key, first, prompt: (key <= q) & ((q < prompt) | (key >= prompt))),),
    ),
    Mistake(
        "cache_slot_reused",
        "Every decode step writes to the same slot: earlier decoded tokens are forgotten.",
        "Advance the write position after every step.",
        ("koboldcpp#2158",),
        (
            sees(
                lambda q, key, first, prompt: (
                    (key <= q) & ((q < prompt) | (key < prompt) | (key == q))
                )
            ),
        ),
    ),
    Mistake(
        "cache_newest_missing",
        "A decode step does not see its own token: it attends before it stores.",
        "Store the new key and value first, then attend.",
        (),
        (sees(lambda q, key, first, prompt: (key <= q) & ((q < prompt) | (key < q))),),
    ),
    Mistake(
        "cache_low_precision",
        "Keys and values are kept in 16 bits.",
        "Expected where the cache is meant to be half as large; compare with a float32 cache.",
        (),
        (
            ops(self_attn__k_rot=rounded_op(F16), self_attn__v_proj=rounded_op(F16)),
            ops(self_attn__k_rot=rounded_op(BF16), self_attn__v_proj=rounded_op(BF16)),
            partial(keys_and_values_reread, F16),
            partial(keys_and_values_reread, BF16),
        ),
    ),
    Mistake(
        "softmax_low_precision",
        "Scores or attention weights are kept in 16 bits.",
        "Compute scores and softmax in float32.",
        ("tinygrad/tinygrad#12280", "huggingface/transformers#24519"),
        (
            ops(self_attn__scores=rounded_op(BF16), self_attn__weights=rounded_op(BF16)),
            ops(self_attn__weights=rounded_op(BF16)),
            ops(self_attn__scores=rounded_op(BF16)),
            ops(self_attn__scores=rounded_op(F16), self_attn__weights=rounded_op(F16)),
        ),
    ),
    # MLP
    *(
        Mistake(
            f"act_{name}",
            f"The activation is {name} instead of hidden_act.",
            "Use the activation that hidden_act names (SiLU in LLaMA).",
            ("huggingface/candle#3745", "vllm-project/vllm#41574"),
            (other_activation(act),),
        )
        for name, act in (
            ("gelu", "gelu"),
            ("gelu_tanh", "gelu_pytorch_tanh"),
            ("relu", "relu"),
            ("quick_gelu", "quick_gelu"),
            ("sigmoid", "sigmoid"),
            ("silu", "silu"),
        )
    ),
    Mistake(
        "act_missing",
        "down(gate * up): the activation is left out.",
        "down(silu(gate) * up)",
        (),
        (other_activation("linear"),),
    ),
    Mistake(
        "gate_missing",
        "down(silu(gate)): the product with up is left out.",
        "down(silu(gate) * up)",
        (),
        (ops(mlp__hidden=lambda array, place: place.seen["mlp.act_fn"]),),
    ),
    Mistake(
        "act_on_product",
        "down(silu(gate * up)): the activation comes after the product.",
        "down(silu(gate) * up)",
        (),
        (
            ops(
                mlp__act_fn=lambda array, place: _activated(_gate(place) * _up(place), place),
                mlp__hidden=lambda array, place: place.seen["mlp.act_fn"],
            ),
        ),
    ),
    # embedding and head
    Mistake(
        "embedding_scaled",
        "The embedding is multiplied by sqrt(hidden_size), as in Gemma and T5.",
        "LLaMA uses the embedding as it is.",
        (),
        (ops(model__embed_tokens=lambda a, place: a * _root_of_width(place.config)),),
    ),
    Mistake(
        "head_low_precision",
        "The head's product or the logits are kept in 16 bits.",
        "Compute the logits in float32.",
        ("huggingface/transformers#29285", "keras-team/keras-hub#1544"),
        (head_in(round_bf16), ops(lm_head=rounded_op(BF16)), head_in(round_f16)),
    ),
)
BY_ID = {mistake.id: mistake for mistake in CATALOGUE}


def variants(mistake: Mistake, run: Run) -> list[Run]:
    """All forms of a mistake that apply to this run."""
    changed = (variation(run) for variation in mistake.variations)
    return [other for other in changed if other is not None]
