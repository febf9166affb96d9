"""LlamaModel, LlamaForCausalLM and LlamaForSequenceClassification as the documentation has them.

Thin objects over the functions of `model`: they translate arguments (masks, past keys, labels)
into positions, visibility and taps, and results into output objects. Arrays are NumPy's; the
Flax classes' ways (`params=`, `init_cache`, `dtype=`) work on the same objects.

Where transformers 4.37.2 is plainly wrong, these classes are not:
* dynamic NTK scaling leaves no state behind: a long call does not change later short ones;
* position ids may exceed the length of the text; float64 models run, with float64 logits;
* `use_cache=False` together with past keys uses the past (4.37.2: an error, or wrong logits);
* a boolean 4-D mask works; a 2-D mask of the wrong length or a 3-D mask is a ValueError, always;
* `pretraining_tp` > 1 drops neither biases nor columns;
* a `problem_type` that was inferred is inferred again for the next labels, and whole-number
  labels of shape (B, C) are taken for several labels per text.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from llama_np import hf_weights, losses
from llama_np.cache import KVCache
from llama_np.checkpoint import group_by_layer, locate
from llama_np.config import HARMLESS, Config
from llama_np.errors import CheckpointError
from llama_np.hf_config import LlamaConfig, dtype_name
from llama_np.hf_generate import generate, transition_scores
from llama_np.hf_generation_config import FILE as GENERATION_FILE
from llama_np.hf_generation_config import GenerationConfig
from llama_np.hf_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    SequenceClassifierOutputWithPast,
)
from llama_np.layers import embed, project
from llama_np.linear import linear
from llama_np.model import ModelWeights, check_tokens, logits, transform
from llama_np.precision import widen
from llama_np.tap import NO_TAP, Tap, chain, each, record

Array = np.ndarray
EMBEDDING = "model.embed_tokens.weight"

# Options of transformers' from_pretrained that cannot change what a NumPy model computes.
_LOADING_OPTIONS = frozenset(
    "device_map low_cpu_mem_usage offload_folder trust_remote_code use_safetensors".split()
)


class _Weights:
    """The weights of a model, made when they are first used, shared by the model and its base."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        self._make = make

    @cached_property
    def groups(self) -> dict[str, Any]:
        """Arrays by name, and one mapping for each layer, as `checkpoint.load` gives them."""
        return self._make()


class Module:
    """One matrix of a model as an object: what get_input_embeddings and its kin return."""

    def __init__(self, weight: Array, apply: Callable[[Array, Array], Array]) -> None:
        self.weight = weight
        self._apply = apply

    def __call__(self, x: Array) -> Array:
        return self._apply(np.asarray(x), self.weight)


class LlamaPreTrainedModel:
    """What the three models share: building, loading, saving, and running the decoder.

    `Model(config)` has random weights, which depend on `seed` only and are made when they are
    first needed; `Model(config, weights)` has the given ones, grouped by layer as `load` returns
    them, flat, or as a tree of Flax parameters. `config` is a LlamaConfig or a `Config`.
    dtype: what to compute in. float32 and float64 are NumPy's own; "bfloat16" and "float16"
    are emulated by rounding the weights and every named array, and give float32 arrays.
    Errors: ConfigError, CheckpointError (both ValueError).
    """

    config_class = LlamaConfig
    base_model_prefix = "model"
    _head: ClassVar[str | None] = None

    def __init__(
        self,
        config: LlamaConfig | Config,
        weights: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        dtype: Any = None,
    ) -> None:
        self.config = config if isinstance(config, LlamaConfig) else LlamaConfig.from_core(config)
        given = {} if weights is None else hf_weights.flatten(weights)
        self._set_precision(dtype or (_dtype_of(given) if given else "float32"))
        self._seed = seed
        self._core = self.config.core(rope_angles=self._angles())
        if weights is None:
            self._weights = _Weights(self._random_groups)
        else:
            groups = self._groups(given)
            self._weights = _Weights(lambda: groups)

    def _set_precision(self, dtype: Any) -> None:
        name = dtype_name(dtype)
        name = {"float": "float32", "double": "float64", "half": "float16"}.get(str(name), name)
        if name not in hf_weights.PRECISIONS:
            raise ValueError(f"dtype {name}: expected one of {', '.join(hf_weights.PRECISIONS)}")
        self._precision = hf_weights.PRECISIONS[str(name)]

    def _angles(self) -> str:
        """transformers computes rotary angles in float32; a float64 model deserves better."""
        return "float64" if self._precision.name == "float64" else "float32"

    def _shapes(self) -> hf_weights.Shapes:
        return hf_weights.wanted_shapes(self._core, self._head)

    def _random(self, name: str, shape: tuple[int, ...]) -> Array:
        deviation = float(self.config.initializer_range)
        return hf_weights.random_weight(name, shape, self._core, deviation, self._seed)

    def _random_groups(self) -> dict[str, Any]:
        tied = self._core.tie_word_embeddings
        names = [name for name in self._shapes() if not (tied and name == "lm_head.weight")]
        return self._groups({name: self._random(name, self._shapes()[name]) for name in names})

    def _groups(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Checked weights in this model's precision, grouped by layer, the head tied."""
        tied = self._core.tie_word_embeddings and self._head == "lm_head.weight"
        arrays = dict(arrays)
        if tied and ("lm_head.weight" in arrays or EMBEDDING in arrays):
            arrays["lm_head.weight"] = arrays.get("lm_head.weight", arrays.get(EMBEDDING))
            arrays[EMBEDDING] = arrays["lm_head.weight"]
        hf_weights.check_complete(arrays, self._shapes())
        names = [name for name in self._shapes() if not (tied and name == "lm_head.weight")]
        ready = {name: self._precision.weight(arrays[name]) for name in names}
        if tied:
            ready["lm_head.weight"] = ready[EMBEDDING]
        return group_by_layer(ready, self._core)

    @property
    def weights(self) -> dict[str, Any]:
        """The weights, grouped by layer, as the functions of llama_np take them."""
        return self._weights.groups

    @property
    def params(self) -> dict[str, Any]:
        """The weights under the name that Flax models give them; hand them back as `params=`."""
        return self._weights.groups

    @property
    def dtype(self) -> Any:
        """What the model computes in: a NumPy dtype, or "bfloat16"."""
        name = self._precision.name
        return name if name == "bfloat16" else np.dtype(name)

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the embedding."""
        return self._core.vocab_size

    @property
    def device(self) -> str:
        """Always "cpu"."""
        return "cpu"

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: LlamaConfig | str | os.PathLike[str] | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        seed: int = 0,
        revision: str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        mmap: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint, found as `load` finds it; other keywords override the configuration.

        revision: a branch, tag or commit on the hub. dtype (or torch_dtype): float32 unless
        given; "auto" takes the checkpoint's. Weights that the checkpoint lacks are drawn at
        random, with a UserWarning; a bare model loads into one with a head, and the reverse.
        With `output_loading_info` the result is (model, dict of names).
        Errors: OSError; ConfigError; CheckpointError for malformed files and for shapes that
        differ, unless `ignore_mismatched_sizes`; MemoryError; TypeError for an unknown keyword.
        """
        name = pretrained_model_name_or_path
        folder = locate(name if revision is None else f"{name}@{revision}")
        config = _config_for(folder, config, kwargs)
        config._name_or_path = str(name)
        read = hf_weights.read_weights(folder, config.core(), cls._head, mmap)
        chosen = _either(_either(dtype, torch_dtype), "float32")
        if isinstance(chosen, str) and chosen == "auto":
            chosen = config.torch_dtype or read.stored_dtype
        model = cls(config, seed=seed, dtype=chosen)
        model._adopt(read, folder, ignore_mismatched_sizes)
        model._read_generation_config(folder)
        info = {
            "missing_keys": read.missing,
            "unexpected_keys": read.unexpected,
            "mismatched_keys": read.mismatched,
            "error_msgs": [],
        }
        return (model, info) if output_loading_info else model

    def _adopt(self, read: hf_weights.Read, folder: Path, ignore_mismatched: bool) -> None:
        """Take weights that were read, and draw those that are missing."""
        shapes = self._shapes()
        read.check_memory(self._precision, folder)
        if read.mismatched and not ignore_mismatched:
            name = read.mismatched[0]
            raise CheckpointError(
                f"{str(folder)!r}: the shape of {name!r} is not {shapes[name]}, as the "
                "configuration expects (ignore_mismatched_sizes=True draws it anew)",
                folder,
                name,
            )
        fresh = [*read.missing, *read.mismatched]
        if self._core.tie_word_embeddings and EMBEDDING in read.tensors:
            fresh = [name for name in fresh if name != "lm_head.weight"]
        if fresh:
            warnings.warn(
                f"Some weights of {type(self).__name__} were not in {str(folder)!r} and are newly "
                f"initialized: {fresh[:10]}. Train them before you trust what they say.",
                stacklevel=3,
            )
        if read.unexpected:
            warnings.warn(f"{str(folder)!r}: ignored {read.unexpected[:10]}", stacklevel=3)
        drawn = {name: self._random(name, shapes[name]) for name in fresh}
        groups = self._groups(read.arrays(self._precision) | drawn)
        self._weights = _Weights(lambda: groups)

    def _read_generation_config(self, folder: Path) -> None:
        """Only models that generate have defaults for it."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Any] | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write config.json and model.safetensors (or shards), as transformers reads them.

        The folder is created, an earlier save in it replaced.
        Errors: NotImplementedError for safe_serialization=False; OSError.
        """
        if not safe_serialization:
            raise NotImplementedError("pickles are not written; safetensors are read everywhere")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        self.config.torch_dtype = self._precision.name
        self.config.save_pretrained(folder)
        arrays = self._flat() if state_dict is None else dict(state_dict)
        if self._core.tie_word_embeddings and self._head == "lm_head.weight":
            arrays.pop("lm_head.weight", None)
        stored = {name: self._precision.stored(array) for name, array in arrays.items()}
        hf_weights.save_weights(folder, stored, max_shard_size)

    def _flat(self) -> dict[str, Array]:
        """Weights under the names of this class's state dict, as they rest."""
        flat = hf_weights.flatten(self.weights)
        prefix = "model." if self._head is None else ""
        return {name.removeprefix(prefix): flat[name] for name in self._shapes()}

    def state_dict(self) -> dict[str, Array]:
        """Every weight under Hugging Face's name; a tied head is listed, and shared."""
        return {name: widen(array) for name, array in self._flat().items()}

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has; a tied matrix counts once, and all are trainable."""
        shapes = self._shapes()
        if self._core.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        if exclude_embeddings:
            shapes.pop(EMBEDDING)
        return sum(int(np.prod(shape)) for shape in shapes.values())

    # ------------------------------------------------------------------ changing the model

    def get_input_embeddings(self) -> Module:
        """The embedding: `.weight` (V, D), and a call looks token ids up."""
        return Module(widen(self.weights[EMBEDDING]), embed)

    def get_output_embeddings(self) -> Module | None:
        """The language model head: `.weight` (V, D); None where there is none."""
        if self._head != "lm_head.weight":
            return None
        return Module(widen(self.weights["lm_head.weight"]), linear)

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding by an array (V, D) or an object with such a `.weight`."""
        self._set_matrix(EMBEDDING, value)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head by an array (V, D) or an object with such a `.weight`."""
        self._set_matrix("lm_head.weight", new_embeddings)

    def _set_matrix(self, name: str, value: Any) -> None:
        matrix = self._precision.weight(value if isinstance(value, Array) else value.weight)
        D = self._core.hidden_size
        if matrix.ndim != 2 or matrix.shape[1] != D:
            raise ValueError(f"the matrix has the shape {matrix.shape}, expected (V, {D})")
        self.weights[name] = matrix

    def tie_weights(self) -> None:
        """Make the head the embedding again, if the configuration ties them."""
        if self._core.tie_word_embeddings and self._head == "lm_head.weight":
            self.weights["lm_head.weight"] = self.weights[EMBEDDING]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> Module:
        """Make room for more (or fewer) tokens; new rows are drawn at random.

        pad_to_multiple_of rounds the number up. Changes `config.vocab_size` too.
        """
        count = self._core.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        if count == self._core.vocab_size:
            return self.get_input_embeddings()
        self._resize(EMBEDDING, count)
        if self._head == "lm_head.weight":
            self._resize("lm_head.weight", count)
        self.config.vocab_size = count
        self._core = self.config.core(rope_angles=self._angles())
        self.tie_weights()
        return self.get_input_embeddings()

    def _resize(self, name: str, count: int) -> None:
        old = widen(self.weights[name])
        fresh = self._random(name, (count, old.shape[1])).astype(old.dtype)
        kept = min(count, len(old))
        fresh[:kept] = old[:kept]
        self.weights[name] = self._precision.weight(fresh)

    def eval(self) -> Self:
        """Nothing to switch: there is no dropout. Returns the model."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Nothing to switch: there is no dropout. Returns the model."""
        return self

    def to(self, *device: Any) -> Self:
        """Everything stays in memory. Returns the model."""
        return self

    # ------------------------------------------------------------------ running it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the model does; see the classes."""
        raise NotImplementedError("LlamaPreTrainedModel is what the models have in common")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """A preallocated cache, to be handed in as `past_key_values`."""
        return self.new_cache(batch_size, max_length)

    def with_params(self, params: Mapping[str, Any] | None) -> ModelWeights:
        return self.weights if params is None else self._groups(hf_weights.flatten(params))

    def run(
        self,
        weights: ModelWeights,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Run the decoder; the documented arguments with their documented meaning."""
        config = self.config
        use_cache = bool(config.use_cache if use_cache is None else use_cache)
        attentions = bool(_either(output_attentions, config.output_attentions))
        states = bool(_either(output_hidden_states, config.output_hidden_states))
        trace: dict[str, Array] = {}
        tap = self._tap(trace, attentions, states)
        embedded = self.embed(input_ids, inputs_embeds, weights)  # (B, T, D)
        if inputs_embeds is not None:
            embedded = self.rounding("model.embed_tokens", embedded)  # (B, T, D)
        B, T, _ = embedded.shape
        cache = self.memory(past_key_values, B)
        if cache is None and use_cache:
            cache = self.new_cache(B, T)
        P = 0 if cache is None else cache.length
        visible = visibility(_trimmed(attention_mask, cache, P + T), B, T, P)  # (1|B, 1, T, P+T)
        positions = _position_ids(position_ids, P, T)  # (1|B, T)
        hidden = transform(embedded, weights, self._core, cache, positions, visible, tap)
        if cache is past_key_values and cache is not None and not use_cache:
            cache.crop(P)  # it was asked to be read only
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=_past(past_key_values, cache) if use_cache else None,
            hidden_states=self._hidden_states(embedded, hidden, trace) if states else None,
            attentions=self._attentions(trace) if attentions else None,
        )

    @property
    def rounding(self) -> Tap:
        return NO_TAP if self._precision.round is None else each(self._precision.round)

    def _tap(self, trace: dict[str, Array], attentions: bool, states: bool) -> Tap:
        """Round what is emulated; record what was asked for."""
        layers = range(self._core.num_hidden_layers)
        names = [f"model.layers.{i}.self_attn.weights" for i in layers] if attentions else []
        names += [f"model.layers.{i}" for i in layers] if states else []
        taps = [] if self._precision.round is None else [self.rounding]
        taps += [record(trace, names)] if names else []
        return chain(*taps) if taps else NO_TAP

    def _attentions(self, trace: Mapping[str, Array]) -> tuple[Array, ...]:
        layers = range(self._core.num_hidden_layers)
        return tuple(trace[f"model.layers.{i}.self_attn.weights"] for i in layers)

    def _hidden_states(
        self, embedded: Array, hidden: Array, trace: Mapping[str, Array]
    ) -> tuple[Array, ...]:
        """L + 1 arrays: embedding, the outputs of all layers but the last, the final norm."""
        layers = range(self._core.num_hidden_layers - 1)
        return (embedded, *(trace[f"model.layers.{i}"] for i in layers), hidden)

    def embed(self, input_ids: Any, inputs_embeds: Any, weights: ModelWeights) -> Array:
        """The vectors to start from: (B, T, D). Errors: ValueError unless exactly one is given."""
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("You cannot specify both input_ids and inputs_embeds at the same time")
        if input_ids is None and inputs_embeds is None:
            raise ValueError("You have to specify either input_ids or inputs_embeds")
        if input_ids is not None:
            return embed(check_tokens(input_ids, self._core.vocab_size), weights[EMBEDDING])
        given = np.asarray(inputs_embeds, dtype=self._precision.compute)
        D = self._core.hidden_size
        if given.ndim != 3 or given.shape[2] != D:
            raise ValueError(f"inputs_embeds have shape {given.shape}, expected (B, T, {D})")
        return given

    def memory(self, past: Any, B: int) -> KVCache | None:
        """The given cache, or a copy of the given (key, value) pairs. Errors: ValueError."""
        dtype = self._precision.compute
        if isinstance(past, KVCache):
            if past.keys[0].dtype != dtype:
                raise ValueError(f"the cache holds {past.keys[0].dtype}, the model wants {dtype}")
            return past
        if past is None or not len(past):
            return None
        pairs = [(np.asarray(k, dtype), np.asarray(v, dtype)) for k, v in past]
        return KVCache.from_pairs(self._core, pairs)

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache, which grows unless its capacity is given."""
        return KVCache(self._core, batch, capacity, self._precision.compute)


def _either(given: Any, default: Any) -> Any:
    return default if given is None else given


def _dtype_of(arrays: Mapping[str, Any]) -> Any:
    """float64 weights make a float64 model, all others a float32 model."""
    norm = arrays.get("model.norm.weight")
    wide = norm is not None and np.asarray(norm).dtype == np.float64
    return "float64" if wide else "float32"


def _config_for(folder: Path, config: Any, kwargs: dict[str, Any]) -> LlamaConfig:
    """The configuration to load with; `kwargs` are overrides and options without effect."""
    overrides = {k: v for k, v in kwargs.items() if k not in _LOADING_OPTIONS}
    unused = overrides
    if not isinstance(config, LlamaConfig):
        config, unused = LlamaConfig.from_pretrained(
            folder if config is None else config, return_unused_kwargs=True, **overrides
        )
    if unused:
        raise TypeError(f"from_pretrained got unknown keywords: {', '.join(sorted(unused))}")
    unknown = vars(config).keys() - vars(LlamaConfig()).keys() - HARMLESS
    unknown -= {"original_max_position_embeddings"}
    if unknown:
        warnings.warn(f"{str(folder)!r}: config.json sets {sorted(unknown)}, ignored", stacklevel=4)
    return config


def _past(given: Any, cache: KVCache | None) -> Any:
    """What to hand back: the cache that was handed in, or else a tuple of (key, value) pairs."""
    return cache if isinstance(given, KVCache) or cache is None else tuple(cache)


def _position_ids(given: Any, P: int, T: int) -> Array:
    """Positions (1, T) or (B, T); by default they count every column, padding too."""
    if given is None:
        return np.arange(P, P + T)[None]
    ids = np.atleast_2d(np.asarray(given))
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"position_ids are {ids.dtype}, expected integers")
    if ids.shape[-1] != T:
        raise ValueError(f"position_ids have shape {ids.shape}, expected (B, {T})")
    return ids


def _trimmed(mask: Any, cache: KVCache | None, S: int) -> Any:
    """With a preallocated cache the mask may cover all of its slots, as in Flax."""
    if mask is None or cache is None or not cache.fixed or np.ndim(mask) != 2:
        return mask
    return np.asarray(mask)[:, :S] if np.shape(mask)[1] == cache.capacity else mask


def visibility(mask: Any, B: int, T: int, P: int) -> Array:
    """Which of the P + T columns each of the T new tokens sees: (1|B, 1, T, P + T).

    mask: None; (B, P + T), where 1 marks tokens that may be seen, on top of the causal order of
    columns; or (B, 1, T, P + T), where 1 means "sees", used as it is. Errors: ValueError.
    """
    S = P + T
    causal = (np.arange(S) <= P + np.arange(T)[:, None])[None, None]  # (1, 1, T, S)
    if mask is None:
        return causal
    mask = np.asarray(mask)
    if mask.ndim == 4 and mask.shape == (B, 1, T, S):
        if mask.dtype.kind == "f" and mask.size and mask.min() < -1e3:
            raise ValueError("the 4-D attention mask is additive; expected 1 = sees, 0 = does not")
        return mask == 1
    if mask.ndim != 2 or mask.shape != (B, S):
        raise ValueError(
            f"Attention mask should be of size {(B, S)} or {(B, 1, T, S)}, but is {mask.shape}"
        )
    return causal & (mask == 1)[:, None, None, :]  # (B, 1, T, S)


class LlamaModel(LlamaPreTrainedModel):
    """The decoder without a head: token ids in, hidden states after the final norm out."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the model: ids (B, T), or inputs_embeds (B, T, D), give last_hidden_state (B, T, D).

        attention_mask: (B, P + T) with 1 for tokens that may be seen (P is the length of the
        past), or (B, 1, T, P + T) with 1 where a query sees a key and no causal rule added.
        position_ids (B, T): only rotate; by default P, P + 1, ..., with padding counted.
        past_key_values: pairs of (B, K, P, H) arrays, which are not changed and give pairs back,
        or a KVCache, which is extended and given back.
        params: other weights for this call. return_dict=False gives a tuple.
        Errors: ValueError for shapes that do not fit; IndexError for an unknown id; TypeError.
        """
        out = self.run(
            self.with_params(params),
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        return _answer(out, return_dict, self.config)


FlaxLlamaModel = LlamaModel  # NumPy arrays are what Flax users hand over, too


class _WithHead(LlamaPreTrainedModel):
    """A model with something on top of the decoder."""

    @property
    def model(self) -> LlamaModel:
        """The decoder alone; it shares these weights."""
        base = LlamaModel(self.config, dtype=self._precision.name)
        base._core, base._weights = self._core, self._weights
        return base

    base_model = model


class LlamaForCausalLM(_WithHead):
    """The language model: token ids in, a score for every possible next token out."""

    _head = "lm_head.weight"
    _generation_config: GenerationConfig | None = None

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        params: Mapping[str, Any] | None = None,
        logits_to_keep: int = 0,
    ) -> Any:
        """Run the model: logits (B, T, V), and the loss where labels (B, T) are given.

        The logits at t are compared with the label at t + 1; labels of -100 do not count, and
        padding counts unless it is labelled -100. logits_to_keep = n: the logits of the last n
        tokens only (0: all). Everything else as in `LlamaModel.forward`.
        """
        weights = self.with_params(params)
        base = self.run(
            weights,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        kept = base.last_hidden_state
        if labels is None and logits_to_keep:
            kept = kept[:, -logits_to_keep:]
        scores = logits(kept, weights, self.rounding)  # (B, T, V)
        loss = None if labels is None else losses.next_token_loss(scores, np.asarray(labels))
        out = CausalLMOutputWithPast(
            loss=loss, logits=scores[:, -logits_to_keep:], **_without_hidden(base)
        )
        return _answer(out, return_dict, self.config)

    # ------------------------------------------------------------------ generating text

    @property
    def generation_config(self) -> GenerationConfig:
        """The defaults of generate(); change its attributes, or replace it."""
        if self._generation_config is None:
            self._generation_config = GenerationConfig.from_model_config(self.config)
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._generation_config = value

    def default_generation_config(self) -> GenerationConfig:
        """`generation_config`, or what `config` says now where the former came from the latter."""
        mine = self._generation_config
        return GenerationConfig.from_model_config(self.config) if mine is None else mine

    def _read_generation_config(self, folder: Path) -> None:
        if (folder / GENERATION_FILE).exists():
            self._generation_config = GenerationConfig.from_pretrained(folder)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As the other models, and generation_config.json."""
        super().save_pretrained(save_directory, **kwargs)
        self.default_generation_config().save_pretrained(save_directory)

    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, Array], list[int]] | None = None,
        assistant_model: LlamaForCausalLM | None = None,
        streamer: Any = None,
        *,
        rng: np.random.Generator | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts: ids (B, P) give ids (B, S), prompts included and rows padded right.

        Every attribute of GenerationConfig is a keyword: max_new_tokens, max_length (20 tokens
        with the prompt, if nothing is said), do_sample with temperature, top_k, top_p, ...,
        num_beams, num_return_sequences, repetition_penalty, bad_words_ids, eos_token_id (an id,
        several, or None for none), output_scores and return_dict_in_generate, and the rest.
        attention_mask: by default padding is not seen, if pad_token_id is set and no eos id;
        batches are padded on the left. inputs_embeds, past_key_values, params as in `forward`.
        rng: a generator or a seed for do_sample. Custom logits processors are functions
        (ids, scores) -> scores; stopping criteria functions (ids, scores) -> bool, or one per row.
        assistant_model (a smaller LlamaForCausalLM) or prompt_lookup_num_tokens: faster, with
        the output of greedy decoding. Beyond the trained context there is one UserWarning.
        Errors: ValueError, NotImplementedError (an option that is not there), IndexError,
        FloatingPointError (NaN logits).
        """
        return generate(
            self,
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            assistant_model,
            streamer,
            rng,
            **kwargs,
        )

    def compute_transition_scores(
        self,
        sequences: Array,
        scores: Sequence[Array],
        beam_indices: Array | None = None,
        normalize_logits: bool = False,
    ) -> Array:
        """The score of each generated token, from what generate() returned: (R, new tokens).

        normalize_logits: as log-probabilities. beam_indices: after beam search, whose scores
        are log-probabilities already.
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)

    def prepare_inputs_for_generation(
        self,
        input_ids: Array,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward` for the next step: tokens not cached yet, positions by mask."""
        known = 0
        if past_key_values is not None and len(past_key_values):
            known = past_key_values[0][0].shape[2]
            input_ids = input_ids[:, known:] if known < input_ids.shape[1] else input_ids[:, -1:]
        positions = kwargs.get("position_ids")
        if attention_mask is not None and positions is None:
            seen = np.asarray(attention_mask) == 1
            positions = np.where(seen, seen.cumsum(axis=1) - 1, 1)
            positions = positions[:, -input_ids.shape[1] :] if known else positions
        first = inputs_embeds is not None and not known
        return {
            **({"inputs_embeds": inputs_embeds} if first else {"input_ids": input_ids}),
            "position_ids": positions,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }


FlaxLlamaForCausalLM = LlamaForCausalLM


class LlamaForSequenceClassification(_WithHead):
    """The classifier: token ids in, one score per class out, read at each row's last token."""

    _head = "score.weight"
    _inferred: str | None = None

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return self._core.num_labels

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the model: logits (B, C), and the loss where labels are given.

        The last token is the one before the first `config.pad_token_id`; the last column where
        there is none, or where vectors are given instead of ids. labels: numbers (C = 1), class
        numbers (B), or 0/1 for each class (B, C); see `config.problem_type`.
        Errors: ValueError for several rows without a pad token id, and as in LlamaModel.
        """
        weights = self.with_params(params)
        base = self.run(
            weights,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        hidden = base.last_hidden_state  # (B, T, D)
        last = _last_tokens(input_ids, self.config.pad_token_id, *hidden.shape[:2])  # (B,)
        chosen = hidden[np.arange(len(hidden)), last]  # (B, D)
        scores = project("score", chosen, weights, self.rounding)  # (B, C)
        loss = None if labels is None else self._loss(scores, np.asarray(labels))
        out = SequenceClassifierOutputWithPast(loss=loss, logits=scores, **_without_hidden(base))
        return _answer(out, return_dict, self.config)

    def _loss(self, scores: Array, labels: Array) -> np.floating:
        """Infer the problem's type where nobody set it, and leave it in the configuration."""
        if self.config.problem_type is None or self.config.problem_type == self._inferred:
            self._inferred = losses.infer_problem_type(labels, self.num_labels)
            self.config.problem_type = self._inferred
        return losses.classification_loss(scores, labels, self.config.problem_type)


def _last_tokens(input_ids: Any, pad: int | None, B: int, T: int) -> Array:
    """Where each row is read: (first pad - 1) mod T, which is the last column without a pad."""
    if pad is None and B != 1:
        raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
    if pad is None or input_ids is None:
        return np.full(B, T - 1)
    return (np.argmax(np.asarray(input_ids) == pad, axis=1) - 1) % T  # argmax of no pad is 0


def _without_hidden(base: BaseModelOutputWithPast) -> dict[str, Any]:
    return {name: value for name, value in base.items() if name != "last_hidden_state"}


def _answer(out: ModelOutput, return_dict: bool | None, config: LlamaConfig) -> Any:
    keep = config.use_return_dict if return_dict is None else return_dict
    return out if keep else out.to_tuple()
