"""Reading what another implementation dumped: files, names, layouts, precision.

Nothing here judges. A dump becomes a `Port`: for every trace name the arrays that might stand
for it, and for every array the ways to bring it into the axes of a golden file.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.config import Config
from llama_np.errors import CheckpointError
from llama_np.experiment import AFTER, AXES, axes_of, full_name, split_name
from llama_np.precision import round_bf16, round_f16
from llama_np.trace import Golden, expected_shape
from llama_np.weights import Stored, read_tensors

MAX_JSON_BYTES = 64 << 20
Dump = str | os.PathLike[str] | Mapping[str, np.ndarray]

# Names within a layer in other tools, beside our own (which are Hugging Face's module paths).
META = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention": "self_attn",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward": "mlp",
}
LLAMA_CPP = {
    "attn_norm": ["input_layernorm"],
    "Qcur": ["self_attn.q_rot", "self_attn.q_proj"],  # used before and after the rotation
    "Kcur": ["self_attn.k_rot", "self_attn.k_proj"],
    "Vcur": ["self_attn.v_proj"],
    "Qcur_rope": ["self_attn.q_rot"],
    "Kcur_rope": ["self_attn.k_rot"],
    "kq": ["self_attn.scores"],
    "kq_scaled": ["self_attn.scores"],
    "kq_soft_max": ["self_attn.weights"],
    "kq_soft_max_ext": ["self_attn.weights"],
    "kqv": ["self_attn.context"],
    "kqv_merged": ["self_attn.context"],
    "kqv_merged_cont": ["self_attn.context"],
    "kqv_out": ["self_attn.context", "self_attn"],  # older builds: after the projection
    "attn_out": ["self_attn"],
    "ffn_inp": ["middle"],
    "ffn_norm": ["post_attention_layernorm"],
    "ffn_gate": ["mlp.gate_proj"],
    "ffn_up": ["mlp.up_proj"],
    "ffn_silu": ["mlp.act_fn"],
    "ffn_gate_par": ["mlp.hidden"],
    "ffn_swiglu": ["mlp.hidden"],
    "ffn_out": ["mlp", "block"],  # used twice: before and after the residual
    "l_out": ["block"],
}
TRANSFORMER_LENS = {
    "hook_resid_mid": "middle",
    "hook_resid_post": "block",
    "hook_attn_out": "self_attn",
    "hook_mlp_out": "mlp",
    "attn.hook_q": "self_attn.q_proj",
    "attn.hook_k": "self_attn.k_proj",
    "attn.hook_v": "self_attn.v_proj",
    "attn.hook_rot_q": "self_attn.q_rot",
    "attn.hook_rot_k": "self_attn.k_rot",
    "attn.hook_attn_scores": "self_attn.scores",
    "attn.hook_pattern": "self_attn.weights",
    "attn.hook_z": "self_attn.context",
    "mlp.hook_pre": "mlp.gate_proj",
    "mlp.hook_pre_linear": "mlp.up_proj",
    "mlp.hook_post": "mlp.hidden",
}
# What a module read: the hooks of PyTorch hand over inputs as well as outputs.
INPUTS = {
    "self_attn.o_proj": "self_attn.context",
    "mlp.down_proj": "mlp.hidden",
    "post_attention_layernorm": "middle",
    "self_attn.q_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
}
ALIASES = {
    "self_attn.rotary_emb.cos": "model.rotary_emb.cos",
    "self_attn.rotary_emb.sin": "model.rotary_emb.sin",
    "self_attn.rotary_emb": "model.rotary_emb.cos",  # the first of the pair (cos, sin)
    "output": "block",
}
GLOBAL = {
    "embed_tokens": "model.embed_tokens",
    "tok_embeddings": "model.embed_tokens",
    "inp_embd": "model.embed_tokens",
    "hook_embed": "model.embed_tokens",
    "rotary_emb": "model.rotary_emb.cos",
    "rotary_emb.cos": "model.rotary_emb.cos",
    "rotary_emb.sin": "model.rotary_emb.sin",
    "cos": "model.rotary_emb.cos",
    "sin": "model.rotary_emb.sin",
    "norm": "model.norm",
    "model": "model.norm",
    "result_norm": "model.norm",
    "activation_trace.output_norm": "model.norm",
    "last_hidden_state": "model.norm",
    "output": "lm_head",
    "logits": "lm_head",
    "result_output": "lm_head",
    "unembed.hook_out": "lm_head",
}
TOKENS = ("input_ids", "inp_tokens", "tokens", "token_ids", "activation_trace.token_ids")
SPECIAL = ("topk_ids", "topk_logprobs", "greedy_ids")


def possible_names(name: str, layers: int) -> list[str]:
    """The trace names that a tool's own name may mean, the likeliest first; none if unknown."""
    name = re.sub(r"[\\/]", ".", name)
    name = re.sub(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+", "", name)
    inner = name.removeprefix("model.")
    name_of_input = re.fullmatch(r"(.+)[._]input(?:\.0)?", inner)
    if name_of_input:
        return _input_names(possible_names(name_of_input[1], layers), layers)
    plain = re.sub(r"(?:[._]outputs?)?(?:\.0)?$", "", inner)
    return _plain_names(inner, layers) or (_plain_names(plain, layers) if plain else [])


def _plain_names(inner: str, layers: int) -> list[str]:
    """Meanings of a name without prefixes and suffixes."""
    if inner in GLOBAL or inner in AFTER:
        return [GLOBAL.get(inner, inner)]
    listed = re.fullmatch(r"(hidden_states|attentions)[._](\d+)", inner)
    if listed:
        return _listed_names(listed[1], int(listed[2]), layers)
    return _inside_names(inner, layers)


def _inside_names(name: str, layers: int) -> list[str]:
    """Names of arrays within a layer, in four spellings."""
    patterns = (
        (r"(?:model\.)*layers\.(\d+)(?:\.(.+))?", _our_names),
        (r"blocks\.(\d+)\.(.+)", _lens_names),
        (r"(\w+?)(?: \(.*\))?-(\d+)(?:[ #.].*)?", _cpp_names),
    )
    for pattern, names in patterns:
        match = re.fullmatch(pattern, name)
        if match:
            found = names(match[1], match[2])
            return [n for n in found if split_name(n)[0] < layers]
    return []


def _our_names(layer: str, local: str | None) -> list[str]:
    local = META.get(local or "block", local or "block")
    local = ALIASES.get(local, local)
    if local in AXES and local.startswith("model."):
        return [local]
    return [full_name(int(layer), local)] if local in AXES else []


def _lens_names(layer: str, local: str) -> list[str]:
    if local == "hook_resid_pre":
        return [full_name(int(layer) - 1, "block")] if int(layer) else ["model.embed_tokens"]
    return [full_name(int(layer), TRANSFORMER_LENS[local])] if local in TRANSFORMER_LENS else []


def _cpp_names(local: str, layer: str) -> list[str]:
    return [full_name(int(layer), name) for name in LLAMA_CPP.get(local, [])]


def _listed_names(kind: str, index: int, layers: int) -> list[str]:
    """Entries of transformers' output_hidden_states and output_attentions."""
    if kind == "attentions":
        return [full_name(index, "self_attn.weights")] if index < layers else []
    if index == layers:
        return ["model.norm"]
    return [full_name(index - 1, "block")] if index else ["model.embed_tokens"]


def _input_names(names: list[str], layers: int) -> list[str]:
    found = []
    for name in names:
        layer, local = split_name(name)
        if local in INPUTS:
            found.append(full_name(layer, INPUTS[local]))
        elif local in ("input_layernorm", "block"):
            found.append(full_name(layer - 1, "block") if layer else "model.embed_tokens")
        elif local == "lm_head":
            found.append("model.norm")
        elif local == "model.norm":
            found.append(full_name(layers - 1, "block"))
    return found


@dataclass(frozen=True)
class Array:
    """One array of a dump under the name that its author gave it."""

    label: str
    values: np.ndarray


@dataclass(frozen=True)
class TopK:
    """Log-probabilities of the best next tokens: (n, k), best first; ids where they are known."""

    logprobs: np.ndarray
    ids: np.ndarray | None
    rounding: float = 0.0  # half a unit in the last decimal that was printed
    chosen: np.ndarray | None = None  # the token that was generated from each row


@dataclass(frozen=True)
class Port:
    """What an implementation dumped, sorted by trace name."""

    arrays: Mapping[str, list[Array]]
    precision: str
    tokens: np.ndarray | None = None
    unknown: tuple[str, ...] = ()
    topk: TopK | None = None
    greedy: np.ndarray | None = None
    notes: tuple[str, ...] = field(default=())


def read_port(dump: Dump, config: Config, precision: str | None = None) -> Port:
    """Read a dump: .safetensors, .npz, a folder of .npy, a server's .json, or a mapping.

    precision: "float32", "bfloat16" or "float16"; by default what the numbers show.
    Errors: OSError; CheckpointError for a file that cannot be read.
    """
    if not isinstance(dump, Mapping) and Path(dump).suffix == ".json":
        return Port({}, precision or "float32", topk=read_response(dump))
    raw = {name: tensor for name, tensor in _raw(dump).items()}
    tokens = next((_ids(raw[name]) for name in TOKENS if name in raw), None)
    arrays: dict[str, list[Array]] = {}
    unknown = []
    for label, tensor in raw.items():
        if label in TOKENS or label in SPECIAL or label == "positions":
            continue
        names = possible_names(label, config.num_hidden_layers)
        for name in names:
            arrays.setdefault(name, []).append(Array(label, _numbers(tensor, label)))
        if not names:
            unknown.append(label)
    found = precision or _precision(raw, arrays)
    greedy = _ids(raw["greedy_ids"]) if "greedy_ids" in raw else None
    return Port(arrays, found, tokens, tuple(unknown), _topk(raw), greedy)


def _raw(dump: Dump) -> dict[str, Stored]:
    if isinstance(dump, Mapping):
        return {name: _stored(np.asarray(array), name) for name, array in dump.items()}
    path = Path(dump)
    if path.is_dir():
        files = sorted(path.rglob("*.npy"))
        names = [".".join(file.relative_to(path).with_suffix("").parts) for file in files]
        return {n: _stored(_npy(f), n) for n, f in zip(names, files, strict=True)}
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix == ".npy":
        return {path.stem: _stored(_npy(path), path.stem)}
    return read_tensors(path)


def _npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as problem:
        raise CheckpointError(f"{str(path)!r} is no .npy file: {problem}", path) from problem
    return array


def _npz(path: Path) -> dict[str, Stored]:
    problems = (ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, zlib.error)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            arrays = {name[:-4]: _member(archive, name) for name in names}
    except (*problems, zipfile.BadZipFile) as problem:
        raise CheckpointError(f"{str(path)!r} is no .npz file: {problem}", path) from problem
    return {name: _stored(array, name) for name, array in arrays.items()}


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _stored(array: np.ndarray, name: str) -> Stored:
    kinds = {"f8": "F64", "f4": "F32", "f2": "F16", "b1": "BOOL", "u2": "U16"}
    if array.dtype.kind in "iu" and array.dtype != np.uint16:
        return Stored("I64", array.astype(np.int64))
    kind = kinds.get(array.dtype.str[1:])
    if kind is None:
        raise CheckpointError(f"array {name!r} has the dtype {array.dtype}, expected numbers")
    return Stored(kind, array)


def _numbers(tensor: Stored, label: str) -> np.ndarray:
    values = tensor.widened()
    if values.dtype.kind != "f":
        raise CheckpointError(f"array {label!r} has the dtype {values.dtype}, expected floats")
    return values.astype(np.float32 if values.dtype.itemsize < 8 else np.float64, copy=False)


def _ids(tensor: Stored) -> np.ndarray:
    """Token ids as (B, T) whole numbers; -1 where the dump holds something else."""
    values = np.atleast_2d(tensor.widened())
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64)
    return np.where(whole == values, whole, -1)


def _topk(raw: Mapping[str, Stored]) -> TopK | None:
    if "topk_logprobs" not in raw:
        return None
    logprobs = np.atleast_2d(np.squeeze(_numbers(raw["topk_logprobs"], "topk_logprobs")))
    ids = _ids(Stored("I64", np.squeeze(raw["topk_ids"].widened()))) if "topk_ids" in raw else None
    if logprobs.ndim != 2 or not logprobs.size or (ids is not None and ids.shape != logprobs.shape):
        raise CheckpointError("topk_logprobs and topk_ids: expected k numbers each, or n rows of k")
    return TopK(logprobs.astype(np.float64), ids)


def _precision(raw: Mapping[str, Stored], arrays: Mapping[str, list[Array]]) -> str:
    """What most of the large arrays are exactly representable in."""
    votes = {"bfloat16": 0, "float16": 0, "float32": 0}
    labels = {array.label for same in arrays.values() for array in same}
    for precision in filter(None, (_array_precision(raw[label]) for label in labels)):
        votes[precision] += 1
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] else "float32"


def _array_precision(tensor: Stored) -> str:
    """What one array's numbers fit into; "" if they are all NaN and show nothing."""
    stored = {"BF16": "bfloat16", "F16": "float16"}
    if tensor.dtype in stored:
        return stored[tensor.dtype]
    values = tensor.widened()
    values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not values.size:
        return ""
    for name, rounded in (("bfloat16", round_bf16), ("float16", round_f16)):
        if values.size > 8 and np.array_equal(rounded(values), values):
            return name
    return "float32"


def read_response(path: str | os.PathLike[str]) -> TopK:
    """The top log-probabilities of an OpenAI-style response (chat, completions, llama.cpp).

    Errors: OSError; CheckpointError when there are none in the file.
    """
    text = Path(path).read_bytes()
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{str(path)!r} is larger than {MAX_JSON_BYTES} bytes", path)
    try:
        content = json.loads(text, parse_float=Decimal, parse_constant=_refuse)
        steps = list(_steps(content))
        rows = [[entry for entry in map(_entry, step) if entry] for step in steps]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{str(path)!r}: not a server's response: {problem}") from problem
    rows = [sorted(row, key=lambda entry: -entry[0]) for row in rows if row]
    if not rows:
        raise CheckpointError(f"{str(path)!r} holds no top log-probabilities", path)
    k = min(map(len, rows))
    logprobs = np.array([[float(p) for p, _ in row[:k]] for row in rows])
    ids = [[i for _, i in row[:k]] for row in rows]
    known = all(i is not None for row in ids for i in row)
    decimals = max(-int(p.as_tuple().exponent) for row in rows for p, _ in row[:k])
    rounding = 0.5 * 10.0**-decimals if decimals < 12 else 0.0
    return TopK(logprobs, np.array(ids, np.int64) if known else None, rounding)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _steps(response: Any) -> Iterator[list[Any]]:
    """One list of candidates for each generated token, in any of the known shapes."""
    if "choices" in response:
        logprobs = response["choices"][0]["logprobs"]
        if logprobs.get("content"):
            yield from (step["top_logprobs"] for step in logprobs["content"])
        else:
            for step in logprobs["top_logprobs"]:
                yield [{"token": token, "logprob": p} for token, p in step.items()]
    else:  # llama.cpp's own server
        yield from (step["top_logprobs"] for step in response["completion_probabilities"])


def _entry(candidate: Mapping[str, Any]) -> tuple[Decimal, int | None] | None:
    """(log-probability, token id or None) of one candidate."""
    logprob = candidate["logprob"]
    if logprob is None:
        return None
    named = re.fullmatch(r"token_id:(\d+)", str(candidate.get("token", "")))
    index = candidate.get("id", int(named[1]) if named else None)
    return Decimal(logprob), index


@dataclass(frozen=True)
class View:
    """A port's array brought into golden axes: rows start ... start + n of the truth."""

    values: np.ndarray
    start: int
    layout: str = ""
    label: str = ""


def views(name: str, array: Array, golden: Golden) -> Iterator[View]:
    """All readings of a port's array as the named one, the plain reading first."""
    B, T = golden.tokens.shape
    shape = expected_shape(name, golden.config, B, T)
    axes = axes_of(name).split(",")
    for values, layout in _readings(name, axes, array.values, shape, golden):
        n = values.shape[axes.index("T")]
        for start in dict.fromkeys((0, T - n, max(golden.prompt - n, 0))):
            for turned, how in _rotary_layouts(name, values, golden.config.head_dim):
                text = ", ".join(filter(None, (layout, how)))
                yield View(turned, start, text, array.label)


def _readings(
    name: str, axes: list[str], values: np.ndarray, shape: Sequence[int], golden: Golden
) -> Iterator[tuple[np.ndarray, str]]:
    if axes[-1] == "S":
        yield from _score_readings(values, shape)
    elif "rotary_emb" in name:
        yield from _table_readings(values, shape, golden)
    else:
        plain, how = _in_plain_order(axes, values, shape, golden)
        for reading, layout in _row_readings(axes, plain, shape, golden):
            yield reading, ", ".join(filter(None, (layout, how)))


def _in_plain_order(
    axes: list[str], values: np.ndarray, shape: Sequence[int], golden: Golden
) -> tuple[np.ndarray, str]:
    """Texts before tokens, and every key head once."""
    B, T = golden.tokens.shape
    n = values.size * T // int(np.prod(shape))
    if values.ndim > 2 and values.shape[:2] == (n, B) != (B, n):
        return values.swapaxes(0, 1), "tokens before texts"
    once = _once_per_group(values, golden.config) if axes[1] == "K" else None
    return (values, "") if once is None else (once, "repeated for every query head")


def _once_per_group(values: np.ndarray, config: Config) -> np.ndarray | None:
    """Keys (..., N, T, H) or (..., T, N, H) with the repetitions of a group left out."""
    N, G = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    for axis in (-3, -2):
        if G > 1 and values.ndim > 2 and values.shape[axis] == N:
            by_head = np.moveaxis(values, axis, 0)
            if all(np.array_equal(by_head[i::G], by_head[::G]) for i in range(1, G)):
                return np.moveaxis(by_head[::G], 0, axis)
    return None


def _row_readings(
    axes: list[str], values: np.ndarray, shape: Sequence[int], golden: Golden
) -> Iterator[tuple[np.ndarray, str]]:
    """Rows of features, flat or in heads, with or without the batch axis."""
    B, T = golden.tokens.shape
    H, width = golden.config.head_dim, int(np.prod(shape)) // (B * T)
    if axes[-1] == "V" and values.ndim and values.shape[-1] > width:
        values = values[..., :width]  # padding of the vocabulary
    n = values.size // (B * width)
    if values.size != B * n * width or not 0 < n <= T:
        return
    heads = width // H
    flat, batched = (B, n, width), values.reshape(values.shape)
    in_heads = axes[-1] == "H" or axes[-1].endswith("*H")

    def placed(by_token: np.ndarray) -> np.ndarray:
        """(B, n, width) in the axes of the golden file."""
        if axes[-1] != "H":
            return by_token.reshape(flat)
        return by_token.reshape(B, n, heads, H).swapaxes(1, 2)

    core = _without_ones(batched.shape, B)
    found = []
    if core in ((B, n, width), (n, width), (B * n, width), (width,)):
        found.append((placed(values), "heads flat" if axes[-1] == "H" else ""))
    elif in_heads and core in ((B, n, heads, H), (n, heads, H)):
        found.append((placed(values), "tokens before heads" if axes[-1] == "H" else "heads split"))
    if in_heads and core in ((B, heads, n, H), (heads, n, H)):
        by_head = values.reshape(B, heads, n, H).swapaxes(1, 2)
        found.append((placed(by_head), "" if axes[-1] == "H" else "heads before tokens"))
    yield from sorted(found, key=lambda reading: reading[1] != "")  # both fit if n == heads


def _without_ones(shape: tuple[int, ...], B: int) -> tuple[int, ...]:
    """The shape without a batch axis of one."""
    return shape[1:] if B == 1 and len(shape) > 1 and shape[0] == 1 else shape


def _score_readings(values: np.ndarray, shape: Sequence[int]) -> Iterator[tuple[np.ndarray, str]]:
    """(N, n, s) or (B, N, n, s), s up to all tokens; later columns are filled with 0."""
    B, N, T, S = shape
    if values.ndim == 3 and B == 1:
        values = values[None]
    if values.ndim != 4 or values.shape[0] != B:
        return
    for array, layout in ((values, ""), (values.swapaxes(2, 3), "keys before queries")):
        n, s = array.shape[2:]
        if array.shape[1] == N and 0 < n <= T and 0 < s <= S:
            masked = np.where(np.isneginf(array) | (array < -1e30), 0, array)
            yield np.pad(masked, [(0, 0)] * 3 + [(0, S - s)]), layout


def _table_readings(
    values: np.ndarray, shape: Sequence[int], golden: Golden
) -> Iterator[tuple[np.ndarray, str]]:
    """Cosines and sines per row, per call, or as a table over all positions; or only half."""
    B, T, H = shape
    if values.ndim < 2 or values.shape[-1] not in (H, H // 2):
        return
    layout = ""
    if values.shape[-1] == H // 2:
        values, layout = np.concatenate([values, values], axis=-1), "half width"
    rows, at = values.reshape(-1, H), np.maximum(golden.positions, 0)
    if len(rows) == B * T:
        yield rows.reshape(B, T, H), layout
    if len(rows) in (T, golden.prompt):
        yield rows[np.minimum(at[:, : len(rows)], len(rows) - 1)], layout
    for calls in dict.fromkeys([golden.calls, *_calls_for(len(rows), T)]):
        ends = np.cumsum(calls)
        if len(rows) == ends.sum() and len(calls) > 1:  # every call returned a whole table
            first = np.repeat(np.cumsum(ends) - ends, calls)  # where the table of its call begins
            yield (
                rows[np.minimum(first + at, len(rows) - 1)],
                f"{layout} one table per call".strip(),
            )
    if len(rows) > T:
        yield rows[np.minimum(at, len(rows) - 1)], f"{layout} table over positions".strip()


def _calls_for(rows: int, T: int) -> Iterator[tuple[int, ...]]:
    """Prefills in one or two calls, and single steps, whose tables have so many rows in all."""
    for prompt in range(1, T):
        steps = (T * (T + 1) - prompt * (prompt + 1)) // 2  # tables from position 0 each
        first = rows - steps - prompt
        if first == 0:
            yield (prompt,) + (1,) * (T - prompt)
        elif 0 < first < prompt:
            yield (first, prompt - first) + (1,) * (T - prompt)


def _rotary_layouts(name: str, values: np.ndarray, H: int) -> Iterator[tuple[np.ndarray, str]]:
    yield values, ""
    local = split_name(name)[1]
    if local in ROTARY:
        yield from_interleaved(values, H), "interleaved rotary pairs"


ROTARY = frozenset(
    [
        "model.rotary_emb.cos",
        "model.rotary_emb.sin",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.q_rot",
        "self_attn.k_rot",
    ]
)


def from_interleaved(values: np.ndarray, H: int) -> np.ndarray:
    """Channels (0, 1), (2, 3), ... of every head as halves: (0, 2, ..., 1, 3, ...)."""
    pairs = values.reshape(*values.shape[:-1], -1, H // 2, 2)
    return pairs.swapaxes(-1, -2).reshape(values.shape)


def to_interleaved(values: np.ndarray, H: int) -> np.ndarray:
    """The reverse of `from_interleaved`."""
    halves = values.reshape(*values.shape[:-1], -1, 2, H // 2)
    return halves.swapaxes(-1, -2).reshape(values.shape)
