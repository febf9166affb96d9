"""What the documented models share: building, loading, saving, changing and running one.

The classes themselves are in `hf.py`. Here their arguments become positions, visibility and
taps for the functions of `model`.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from llama_np import hf_weights
from llama_np.cache import KVCache
from llama_np.checkpoint import group_by_layer, locate
from llama_np.chunks import in_chunks
from llama_np.config import HARMLESS, Config
from llama_np.errors import CheckpointError
from llama_np.hf_config import LlamaConfig, dtype_name
from llama_np.hf_loading import refuse, split_options
from llama_np.hf_outputs import BaseModelOutputWithPast, past_of
from llama_np.layers import embed
from llama_np.linear import linear
from llama_np.model import ModelWeights, check_tokens, transform
from llama_np.precision import widen
from llama_np.tap import NO_TAP, Tap, chain, each, record

Array = np.ndarray
EMBEDDING = "model.embed_tokens.weight"

# Options of transformers' from_pretrained that cannot change what a NumPy model computes,
# and those of which only one value means what happens here.
_IDLE = frozenset(
    "device_map from_pt low_cpu_mem_usage max_memory offload_folder offload_state_dict "
    "use_safetensors _fast_init adapter_kwargs mirror".split()
)
_ONLY: dict[str, Any] = {
    "load_in_8bit": False,
    "load_in_4bit": False,
    "quantization_config": None,
    "use_flash_attention_2": False,
    "from_tf": False,
    "from_flax": False,
    "variant": None,
    "state_dict": None,
}

_ONLY_SAVED: dict[str, Any] = {"is_main_process": True, "push_to_hub": False, "variant": None}


class _Weights:
    """The weights of a model, shared by the model and its base; random ones are made when used."""

    def __init__(
        self, groups: dict[str, Any] | None, make: Callable[[], dict[str, Any]] | None = None
    ) -> None:
        self._groups, self._make = groups, make

    @property
    def groups(self) -> dict[str, Any]:
        """Arrays by name, and one mapping for each layer, as `checkpoint.load` gives them."""
        if self._groups is None:
            assert self._make is not None
            self._groups = self._make()
        return self._groups


class Module:
    """One matrix of a model as an object: what get_input_embeddings and its kin return."""

    def __init__(
        self,
        read: Callable[[], Array],
        replace: Callable[[Array], None],
        apply: Callable[[Array, Array], Array],
    ) -> None:
        self._read, self._replace, self._apply = read, replace, apply

    @property
    def weight(self) -> Array:
        """The matrix; read-only where it is a file's, or a float32 copy of bfloat16.

        Assign a changed copy: `module.weight = changed`.
        """
        return _shown(self._read())

    @weight.setter
    def weight(self, value: Array) -> None:
        self._replace(value)

    def __call__(self, x: Array) -> Array:
        return self._apply(np.asarray(x), self.weight)


def _shown(array: Array) -> Array:
    """Weights as numbers; changing what is only a copy of bfloat16 would change nothing."""
    numbers = widen(array)
    if numbers is not array:
        numbers.flags.writeable = False
    return numbers


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
            self._weights = _Weights(None, self._random_groups)
        else:
            self._weights = _Weights(self._groups(given))

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
        """The weights under the name that Flax models give them; hand them back as `params=`.

        Assigning takes every layout that the functions take, and a tree of Flax parameters.
        """
        return self._weights.groups

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        self._weights = _Weights(self._groups(hf_weights.flatten(params)))

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

    @property
    def training(self) -> bool:
        """Always False: there is no dropout, and no gradient."""
        return False

    @property
    def name_or_path(self) -> str:
        """Where the model was loaded from; empty for one made from a configuration."""
        return self.config.name_or_path

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has generate()."""
        return cls._head == "lm_head.weight"

    @classmethod
    def from_config(cls, config: LlamaConfig | Config, **kwargs: Any) -> Self:
        """A model with random weights, as `Model(config)`."""
        return cls(config, dtype=kwargs.pop("torch_dtype", None), **kwargs)

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

        revision: a branch, tag or commit on the hub, for which token, cache_dir,
        local_files_only and force_download are, too; subfolder: a folder within the
        checkpoint. Options of generate() become defaults. dtype (or torch_dtype): float32 unless
        given; "auto" takes the checkpoint's. Weights that the checkpoint lacks are drawn at
        random, with a UserWarning; a bare model loads into one with a head, and the reverse.
        With `output_loading_info` the result is (model, dict of names).
        Errors: OSError; ConfigError; CheckpointError for malformed files and for shapes that
        differ, unless `ignore_mismatched_sizes`; MemoryError; TypeError for an unknown keyword;
        NotImplementedError for options such as load_in_8bit.
        """
        name = pretrained_model_name_or_path
        place, options = split_options({"revision": revision, **kwargs})
        refuse("from_pretrained", _ONLY, options)
        folder = locate(name, **place)
        config = _config_for(folder, config, options, place)
        config._name_or_path = str(name)
        read = hf_weights.read_weights(folder, config.core(), cls._head, mmap)
        chosen = _either(_either(dtype, torch_dtype), "float32")
        if isinstance(chosen, str) and chosen == "auto":
            chosen = config.torch_dtype or read.stored_dtype
        model = cls(config, seed=seed, dtype=chosen)
        model._adopt(read, folder, ignore_mismatched_sizes)
        model._read_generation_config(folder, options)
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
            name, found, expected = read.mismatched[0]
            raise CheckpointError(
                f"{str(folder)!r}: the shape of {name!r} is {found}, not {expected}, as the "
                "configuration expects (ignore_mismatched_sizes=True draws it anew)",
                folder,
                name,
            )
        fresh = [*read.missing, *(name for name, _, _ in read.mismatched)]
        if self._core.tie_word_embeddings and EMBEDDING in read.tensors:
            fresh = [name for name in fresh if name != "lm_head.weight"]
        if fresh:
            warnings.warn(
                f"Some weights of {type(self).__name__} were not in {str(folder)!r} and are newly "
                f"initialized: {fresh[:10]}. Train them before you trust what they say.",
                stacklevel=3,
            )
        unknown = [name for name in read.unexpected if name not in hf_weights.HEADS]
        if unknown:
            warnings.warn(f"{str(folder)!r}: ignored {unknown[:10]}", stacklevel=3)
        drawn = {name: self._random(name, shapes[name]) for name in fresh}
        self._weights = _Weights(self._groups(read.arrays(self._precision) | drawn))

    def _read_generation_config(self, folder: Path, options: Mapping[str, Any]) -> None:
        """Only models that generate have defaults for it."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        token: Any = None,
        save_peft_format: bool = True,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        """Write config.json and model.safetensors (or shards), as transformers reads them.

        The folder is created, an earlier save in it replaced. params: other weights to be saved,
        as `forward` takes them. save_function (of pickles), token and save_peft_format have no
        effect.
        Errors: NotImplementedError for safe_serialization=False, push_to_hub, a variant, and
        another process than the main one; OSError.
        """
        if not safe_serialization:
            raise NotImplementedError("pickles are not written; safetensors are read everywhere")
        given = {"is_main_process": is_main_process, "push_to_hub": push_to_hub, "variant": variant}
        refuse("save_pretrained", _ONLY_SAVED, given)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        self.config.torch_dtype = self._precision.name
        self.config.save_pretrained(folder)
        weights = self.with_params(params)
        arrays = self._flat(weights) if state_dict is None else dict(state_dict)
        if self._core.tie_word_embeddings and self._head == "lm_head.weight":
            arrays.pop("lm_head.weight", None)
        stored = {name: self._precision.stored(array) for name, array in arrays.items()}
        hf_weights.save_weights(folder, stored, max_shard_size)

    def _flat(self, weights: ModelWeights) -> dict[str, Array]:
        """Weights under the names of this class's state dict, as they rest."""
        flat = hf_weights.flatten(weights)
        prefix = "model." if self._head is None else ""
        return {name.removeprefix(prefix): flat[name] for name in self._shapes()}

    def state_dict(self) -> dict[str, Array]:
        """Every weight under Hugging Face's name; a tied head is listed, and shared."""
        return {name: _shown(array) for name, array in self._flat(self.weights).items()}

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
        return Module(lambda: self.weights[EMBEDDING], self.set_input_embeddings, embed)

    def get_output_embeddings(self) -> Module | None:
        """The language model head: `.weight` (V, D); None where there is none."""
        if self._head != "lm_head.weight":
            return None
        return Module(lambda: self.weights["lm_head.weight"], self.set_output_embeddings, linear)

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
        if self.config.tie_word_embeddings != self._core.tie_word_embeddings:
            self._core = self.config.core(rope_angles=self._angles())
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

    def to(self, *device: Any, **options: Any) -> Self:
        """Everything stays in memory. Returns the model."""
        return self

    # ------------------------------------------------------------------ running it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the model does; see the classes."""
        raise NotImplementedError("LlamaPreTrainedModel is what the models have in common")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Only a LlamaForCausalLM writes text. Errors: TypeError."""
        raise TypeError(
            f"The current model class ({type(self).__name__}) is not compatible with "
            "`.generate()`, as it doesn't have a language model head. Use LlamaForCausalLM instead."
        )

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """A preallocated cache, to be handed in as `past_key_values`."""
        return self.new_cache(batch_size, max_length)

    def with_params(self, params: Mapping[str, Any] | None) -> ModelWeights:
        """The given weights, checked and grouped, or the model's own. Errors: CheckpointError."""
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
        _check_continues(cache, positions)
        hidden = self._transform(embedded, weights, cache, positions, visible, tap)
        if cache is past_key_values and cache is not None and not use_cache:
            cache.crop(P)  # it was asked to be read only
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_of(past_key_values, cache) if use_cache else None,
            hidden_states=self._hidden_states(embedded, hidden, trace) if states else None,
            attentions=self._attentions(trace) if attentions else None,
        )

    def _transform(
        self,
        embedded: Array,
        weights: ModelWeights,
        cache: KVCache | None,
        positions: Array,
        visible: Array,
        tap: Tap,
    ) -> Array:
        """The decoder, in chunks if nobody looks at its arrays.

        A query that sees nothing (padding) weighs all keys equally, those of later chunks, too.
        """
        if cache is None or tap is not NO_TAP or not visible.any(axis=3).all():
            return transform(embedded, weights, self._core, cache, positions, visible, tap)
        P = cache.length

        def compute(part: slice, memory: KVCache) -> Array:
            seen = visible[:, :, part, : P + part.stop]
            x, places = embedded[:, part], positions[:, part]
            return transform(x, weights, self._core, memory, places, seen)

        every = np.broadcast_to(positions, embedded.shape[:2])
        return in_chunks(compute, every, self._core, cache)

    @property
    def rounding(self) -> Tap:
        """What an emulated precision does to every named array; nothing for float32, float64."""
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
            table = weights[EMBEDDING]
            return embed(check_tokens(input_ids, len(table)), table)
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


def _config_for(
    folder: Path, config: Any, options: Mapping[str, Any], place: Mapping[str, Any]
) -> LlamaConfig:
    """The configuration to load with; `options` are overrides and those without effect.

    A configuration given by name is looked for in the same `place` as the model.
    """
    overrides = {k: v for k, v in options.items() if k not in _IDLE and k not in _ONLY}
    unused = overrides
    if config is None:
        config, unused = LlamaConfig.from_pretrained(folder, return_unused_kwargs=True, **overrides)
    elif not isinstance(config, LlamaConfig):
        overrides |= {"return_unused_kwargs": True, **place}
        config, unused = LlamaConfig.from_pretrained(config, **overrides)
    else:
        config = copy.deepcopy(config)  # the caller's own stays as it is
        if "attn_implementation" in unused:
            config._attn_implementation = unused.pop("attn_implementation")
    if unused:
        raise TypeError(f"from_pretrained got unknown keywords: {', '.join(sorted(unused))}")
    unknown = vars(config).keys() - vars(LlamaConfig()).keys() - HARMLESS
    unknown -= {"original_max_position_embeddings"}
    if unknown:
        warnings.warn(f"{str(folder)!r}: config.json sets {sorted(unknown)}, ignored", stacklevel=4)
    return config


def _check_continues(cache: KVCache | None, positions: Array) -> None:
    """Refuse a preallocated cache that already holds these positions of every row.

    A cache is extended in place, where Flax returns another one: what holds a text already cannot
    start a second one.
    """
    if cache is None or not cache.fixed or not cache.length or not positions.shape[1]:
        return
    ends = cache.positions[:, : cache.length].max(axis=1)  # (B,)
    if (positions[:, 0] <= ends).all():
        raise ValueError(
            f"the cache already holds {cache.length} tokens, up to position {ends.max()}, and "
            f"position_ids begin at {positions[:, 0].min()}: it was extended in place; start "
            "another text with a new init_cache()"
        )


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
