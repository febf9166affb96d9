"""What is recorded: each case is a model, a call, its arguments, and one sentence.

Only NumPy here. `record.py` runs the calls in transformers; `README.md` explains the fields.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from models import MODELS, Arrays, Config

CAUSAL, BASE = "LlamaForCausalLM", "LlamaModel"
CLASSIFIER = "LlamaForSequenceClassification"
VOCABULARY = 97
BUNDLED = Path(__file__).resolve().parents[1] / "llama_np" / "checkpoints" / "fairytales"


def bundled_config() -> Config:
    """The config.json of the checkpoint that comes with llama_np."""
    return dict(json.loads((BUNDLED / "config.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Case:
    """One call: `call` is forward, chunks, generate, first_scores or processors."""

    name: str
    shows: str
    model: str = "gqa"
    call: str = "forward"
    class_name: str = CAUSAL
    inputs: Arrays = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    config: Config = field(default_factory=dict)
    dtype: str = "float32"
    environment: str = "4.37.2"
    rows: str = "all"
    compare: str = "binding"
    chunks: tuple[int, ...] = ()

    def full_config(self) -> Config:
        """What stands in the case's config.json; the change `...` removes a key."""
        own = bundled_config() if self.model == "bundled" else MODELS[self.model]
        changed = own | {"torch_dtype": self.dtype} | self.config
        return {key: value for key, value in changed.items() if value is not ...}


def draw(name: str, rows: int, width: int) -> np.ndarray:
    """Token ids from 3 on, so no special ones; the name fixes them."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return random.randint(3, VOCABULARY, (rows, width)).astype(np.int64)


def normal(name: str, *shape: int) -> np.ndarray:
    """Standard normal float32 values; the name fixes them."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return random.standard_normal(shape).astype(np.float32)


def ints(*rows: Sequence[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


def lengths_to_mask(lengths: Sequence[int], width: int, side: str) -> np.ndarray:
    """A 0/1 mask (B, width): row b has lengths[b] ones, with the padding on `side`."""
    column, length = np.arange(width), np.array(lengths)[:, None]
    ones = column >= width - length if side == "left" else column < length
    return ones.astype(np.int64)


def forward(name: str, shows: str, model: str = "gqa", **more: Any) -> Case:
    """A plain call on three rows of thirteen tokens, unless `inputs` says otherwise."""
    inputs = more.pop("inputs", None) or {"input_ids": draw(name, 3, 13)}
    arguments = {"use_cache": False} | more.pop("arguments", {})
    return Case(name, shows, model, inputs=inputs, arguments=arguments, **more)


ALL_STATES = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}


def architectures() -> list[Case]:
    one, row = {"input_ids": draw("one", 3, 1)}, {"input_ids": draw("row", 1, 17)}
    return [
        forward("gqa", "grouped queries: 6 query heads share 2 key/value heads"),
        forward("mha", "as many key/value heads as query heads; rope_theta 100", "mha"),
        forward("mqa", "one key/value head; rope_theta 500000; rms_norm_eps 0.05", "mqa"),
        forward("attention-bias", "biases on q, k, v and o", "attention_bias"),
        forward("tied", "the head is the embedding; no lm_head.weight in the file", "tied"),
        forward("one-token", "a sequence of one token", inputs=one),
        forward("one-row", "a batch of one row, int32 ids", inputs=as_int32(row)),
        forward("base-tensor-parallel", "pretraining_tp 2 changes nothing", class_name=BASE,
                config={"pretraining_tp": 2}),
        forward("states-gqa", "all hidden states, attention weights, keys and values",
                arguments=ALL_STATES),
        forward("states-bias", "the same with biases", "attention_bias", arguments=ALL_STATES),
        forward("states-mqa", "the same with one key/value head", "mqa", arguments=ALL_STATES),
        forward("base-gqa", "LlamaModel: hidden states after the final norm", class_name=BASE,
                arguments=ALL_STATES),
        forward("base-mha", "LlamaModel without a cache", "mha", class_name=BASE),
    ]  # fmt: skip


def as_int32(inputs: Arrays) -> Arrays:
    return {name: array.astype(np.int32) for name, array in inputs.items()}


# --- rotary embeddings -----------------------------------------------------------------------

TRAINED, BELOW, ABOVE = 32, 20, 45


def rope_437() -> list[Case]:
    found = [
        forward("rope-default-above", "plain rotation beyond max_position_embeddings (48)",
                inputs={"input_ids": draw("beyond", 2, 61)}),
        forward("rope-dynamic-left-padding", "dynamic NTK counts padded columns as length",
                config=_scaled(type="dynamic", factor=2.0), rows="attention_mask",
                inputs=_padded("dynamic", [38, 31, 20], 38, "left")),
    ]  # fmt: skip
    for kind, factor in (("linear", 2.5), ("dynamic", 2.0)):
        config = _scaled(type=kind, factor=factor)
        found += _below_and_above(kind, f"{kind} scaling, factor {factor}", config=config)
    mha = _scaled(type="dynamic", factor=3.5)
    return found + _below_and_above(
        "dynamic-mha", "dynamic, factor 3.5, theta 100", "mha", config=mha
    )


def _scaled(**scaling: Any) -> Config:
    return {"max_position_embeddings": TRAINED, "rope_scaling": scaling}


def _below_and_above(name: str, shows: str, model: str = "gqa", **more: Any) -> list[Case]:
    return [
        forward(f"rope-{name}-{where}", f"{shows}: {width} tokens, trained on {TRAINED}", model,
                inputs={"input_ids": draw(f"rope-{where}", 2, width)}, **more)
        for where, width in (("below", BELOW), ("above", ABOVE))
    ]  # fmt: skip


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.25, "high_freq_factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.05}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
ORIGINAL = {"original_max_position_embeddings": 24}  # BELOW < 24 < TRAINED < ABOVE
SCALINGS_NEWEST: dict[str, tuple[str, Config]] = {
    "llama3": ("keeps, blends and divides frequencies", LLAMA3 | ORIGINAL),
    "llama3-no-original": ("original length missing: max_position_embeddings", LLAMA3),
    "yarn": ("attention factor from the factor", YARN | ORIGINAL),
    "yarn-no-truncate": ("ramp borders not rounded", YARN | ORIGINAL | {"truncate": False}),
    "yarn-mscale": ("mscale and mscale_all_dim", YARN | ORIGINAL
                    | {"mscale": 1.3, "mscale_all_dim": 0.6}),
    "yarn-attention-factor": ("attention_factor given",
                              YARN | ORIGINAL | {"attention_factor": 1.3}),
    "yarn-default-betas": ("beta_fast 32 and beta_slow 1",
                           {"rope_type": "yarn", "factor": 4.0} | ORIGINAL),
    "longrope": ("short factors up to the original length, long ones beyond", LONG | ORIGINAL),
    "longrope-factor": ("factor given", LONG | ORIGINAL | {"factor": 5.0}),
    "longrope-attention-factor": ("attention_factor given",
                                  LONG | ORIGINAL | {"attention_factor": 0.8}),
    "linear-5": ("linear in the newest transformers, an integer factor",
                 {"rope_type": "linear", "factor": 3}),
    "dynamic-5": ("dynamic in the newest transformers", {"rope_type": "dynamic", "factor": 2.0}),
}  # fmt: skip


def rope_newest() -> list[Case]:
    found: list[Case] = []
    for name, (shows, scaling) in SCALINGS_NEWEST.items():
        told, config = f"{scaling['rope_type']}: {shows}", _scaled(**scaling)
        found += _below_and_above(name, told, config=config, environment="newest")
    config = _newest_spelling(LLAMA3 | ORIGINAL)
    return found + _below_and_above("llama3-parameters", "llama3 in the newest spelling",
                                    config=config, environment="newest")  # fmt: skip


def _newest_spelling(scaling: Config, theta: float = 10000.0) -> Config:
    """`rope_parameters` and `dtype` instead of rope_theta, rope_scaling and torch_dtype."""
    return {
        "max_position_embeddings": TRAINED,
        "rope_parameters": scaling | {"rope_theta": theta},
        "dtype": "float32",
        "rope_theta": ...,
        "rope_scaling": ...,
        "torch_dtype": ...,
    }


def architectures_newest() -> list[Case]:
    more = {"environment": "newest"}
    mixed = {"max_position_embeddings": TRAINED, "rope_scaling": YARN | ORIGINAL}
    return [
        forward("head-dim", "head_dim 12 although D / N is 8: N * H = 72, D = 48", "head_dim",
                **more),
        forward("states-head-dim", "its hidden states and attention weights", "head_dim",
                arguments={"output_attentions": True, "output_hidden_states": True}, **more),
        forward("mlp-bias", "biases on gate, up, down, q, k, v, o; head_dim 14", "mlp_bias",
                **more),
        forward("mlp-bias-parameters", "the same in the newest spelling, rope_theta 300",
                "mlp_bias", config=_newest_spelling({"rope_type": "default"}, 300.0), **more),
        forward("head-dim-yarn", "yarn on an explicit head_dim", "head_dim", config=mixed,
                inputs={"input_ids": draw("head-dim-yarn", 2, 41)}, **more),
        forward("gqa-newest", "the same numbers as case gqa",
                inputs={"input_ids": draw("gqa", 3, 13)}, **more),
        forward("logits-to-keep", "only the last three positions", arguments={"logits_to_keep": 3},
                **more),
    ]  # fmt: skip


# --- activations -----------------------------------------------------------------------------

ACTIVATIONS = (
    "gelu gelu_10 gelu_fast gelu_new gelu_python gelu_pytorch_tanh gelu_accurate laplace "
    "leaky_relu linear mish quick_gelu relu relu2 relu6 sigmoid silu swish tanh"
).split()


def activations() -> list[Case]:
    ids = {"input_ids": draw("activations", 2, 9)}
    return [
        forward(
            f"act-{name}", f"hidden_act {name}", "loud", config={"hidden_act": name}, inputs=ids
        )
        for name in ACTIVATIONS
    ]


# --- masks, positions, embeddings ------------------------------------------------------------


def _padded(name: str, lengths: Sequence[int], width: int, side: str) -> Arrays:
    mask = lengths_to_mask(lengths, width, side)
    return {"input_ids": draw(name, len(lengths), width), "attention_mask": mask}


def _shifted(mask: np.ndarray) -> np.ndarray:
    """The positions that transformers' generate gives: the first visible token is 0, pads are 1."""
    return np.where(mask == 1, mask.cumsum(-1) - 1, 1).astype(np.int64)


def masks() -> list[Case]:
    left, right = (_padded(side, [11, 8, 3], 11, side) for side in ("left", "right"))
    shifted = left | {"position_ids": _shifted(left["attention_mask"])}
    holes = {
        "input_ids": draw("holes", 3, 11),
        "attention_mask": ints(
            [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1], [1] * 11
        ),
    }
    values = {
        "input_ids": draw("values", 2, 7),
        "attention_mask": ints([1, 2, 1, 1, -1, 1, 1], [1, 1, 1, 3, 1, 1, 1]),
    }
    floats = left | {"attention_mask": left["attention_mask"].astype(np.float32)}
    return [
        forward("mask-left", "left padding, default positions", inputs=left, rows="attention_mask"),
        forward("mask-left-positions", "left padding, positions from the first token",
                inputs=shifted, rows="attention_mask"),
        forward("mask-left-states", "left padding: states, attention weights, keys and values",
                "mha", inputs=shifted, rows="attention_mask", arguments=ALL_STATES),
        forward("mask-left-float", "the mask as floats", inputs=floats, rows="attention_mask"),
        forward("mask-right", "right padding", inputs=right, rows="attention_mask"),
        forward("mask-right-mqa", "right padding, one key/value head", "mqa", inputs=right,
                rows="attention_mask"),
        forward("mask-holes", "zeros between ones", inputs=holes, rows="attention_mask"),
        forward("mask-only-one-attends", "values other than 1 hide a token", inputs=values,
                rows="attention_mask"),
        forward("mask-unseen-rows", "eager: rows that see nothing average all values", "mha",
                inputs=left, compare="information"),
    ]  # fmt: skip


def masks_4d() -> list[Case]:
    T, lower = 9, np.tril(np.ones((9, 9), np.float32))
    block = lower.copy()
    block[5:, :5] = 0  # two packed texts: 5 and 4 tokens
    ids = {"input_ids": draw("packed", 2, T)}
    both = np.stack([block, lower])[:, None]
    full = np.ones((2, 1, T, T), np.float32)
    packed = ids | {
        "attention_mask": both,
        "position_ids": ints([0, 1, 2, 3, 4, 0, 1, 2, 3], range(T)),
    }
    return [
        forward("mask-4d-packed", "row 0 holds two packed texts", inputs=packed),
        forward("mask-4d-ones", "used as it is: everything sees everything",
                inputs=ids | {"attention_mask": full}),
        forward("mask-4d-states", "a random mask; row 0 of the batch sees only itself", "mha",
                inputs=ids | {"attention_mask": _random_4d(T)},
                arguments={"output_attentions": True, "output_hidden_states": True}),
    ]  # fmt: skip


def _random_4d(T: int) -> np.ndarray:
    mask = (normal("mask-4d", 2, 1, T, T) > 0).astype(np.float32)
    mask[:, :, np.arange(T), np.arange(T)] = 1.0  # no row sees nothing
    mask[0, 0] = np.eye(T, dtype=np.float32)
    return mask


def positions() -> list[Case]:
    ids = {"input_ids": draw("positions", 2, 10)}
    embeds = {"inputs_embeds": normal("embeds", 2, 10, 48)}
    padded = embeds | {"attention_mask": lengths_to_mask([10, 6], 10, "left")}
    return [
        forward("positions-permuted", "position_ids rotate, column order hides",
                inputs=ids | {"position_ids": ints([3, 1, 4, 0, 5, 9, 2, 6, 8, 7], range(10))}),
        forward("positions-repeated", "repeated and skipped positions",
                inputs=ids | {"position_ids": ints([0, 0, 0, 4, 4, 5, 9, 9, 2, 2], [7] * 10)}),
        forward("positions-one-row", "one row of position_ids serves the whole batch",
                inputs=ids | {"position_ids": ints([0, 2, 3, 4, 5, 6, 7, 8, 9, 9])}),
        forward("embeds", "inputs_embeds instead of ids", inputs=embeds),
        forward("embeds-mask", "inputs_embeds with left padding", inputs=padded,
                rows="attention_mask"),
    ]  # fmt: skip


# --- caches ----------------------------------------------------------------------------------


def chunks(name: str, shows: str, sizes: Sequence[int], model: str = "gqa", **more: Any) -> Case:
    """One text in pieces, each given the tuple of keys and values that came before."""
    inputs = more.pop("inputs", None) or {"input_ids": draw("chunked", 3, sum(sizes))}
    return Case(name, shows, model, "chunks", inputs=inputs, chunks=tuple(sizes),
                arguments={"use_cache": True}, **more)  # fmt: skip


def caches() -> list[Case]:
    left = _padded("chunked-left", [13, 9, 4], 13, "left")
    shifted = left | {"position_ids": _shifted(left["attention_mask"])}
    dynamic = _scaled(type="dynamic", factor=2.0)
    return [
        chunks("cache-1", "token by token", [1] * 13),
        chunks("cache-5-8", "two pieces", [5, 8]),
        chunks("cache-12-1", "a prompt and one token", [12, 1]),
        chunks("cache-3-1-4-5", "pieces of several sizes", [3, 1, 4, 5]),
        chunks("cache-mha", "as many key/value heads as query heads", [2, 7, 4], "mha"),
        chunks("cache-mqa", "one key/value head", [6, 1, 1, 5], "mqa"),
        chunks("cache-bias", "with biases", [4, 4, 5], "attention_bias"),
        chunks("cache-left-padding", "left padding in pieces", [6, 4, 1, 1, 1], inputs=shifted,
               rows="attention_mask"),
        chunks("cache-left-default-positions", "left padding in pieces, positions count pads",
               [7, 6], inputs=left, rows="attention_mask"),
        chunks("cache-above", "past max_position_embeddings in pieces", [40, 20],
               inputs={"input_ids": draw("cache-above", 2, 60)}),
        chunks("cache-linear", "linear scaling in pieces beyond the trained length", [30, 1, 12],
               config=_scaled(type="linear", factor=2.5),
               inputs={"input_ids": draw("cache-linear", 2, 43)}),
        chunks("cache-dynamic-history", "4.37.2 keeps old keys under the old base (not a model "
               "property: see README)", [30, 1, 12], config=dynamic, compare="information",
               inputs={"input_ids": draw("cache-dynamic", 2, 43)}),
        _random_past(),
        _past_4d(),
    ]  # fmt: skip


def _past(name: str, P: int) -> Arrays:
    return {
        f"past_key_values.{i}.{part}": normal(f"{name}.{i}.{part}", 2, 2, P, 8)
        for i in range(4)
        for part in ("key", "value")
    }


def _random_past() -> Case:
    inputs = {"input_ids": draw("random-past", 2, 5)} | _past("past", 7)
    return forward("cache-given", "keys and values from elsewhere: 7 columns", inputs=inputs,
                   arguments={"use_cache": True})  # fmt: skip


def _past_4d() -> Case:
    mask = (normal("past-4d", 2, 1, 3, 9) > -0.3).astype(np.float32)
    mask[..., 0] = 1.0  # no row sees nothing
    inputs = {"input_ids": draw("past-4d", 2, 3), "attention_mask": mask} | _past("past4", 6)
    return forward("cache-given-4d", "a 4-D mask over past and new columns", inputs=inputs,
                   arguments={"use_cache": True})  # fmt: skip


# --- losses and classification ---------------------------------------------------------------


def losses() -> list[Case]:
    ids = draw("loss", 3, 10)
    part = ids.copy()
    part[0, :4] = part[1, 7:] = part[2, 5] = -100
    right = _padded("loss-right", [10, 7, 4], 10, "right")
    ignored = np.where(right["attention_mask"] == 1, right["input_ids"], -100)
    return [
        forward("loss", "labels = ids", inputs={"input_ids": ids, "labels": ids}),
        forward("loss-ignored", "-100 is ignored", inputs={"input_ids": ids, "labels": part}),
        forward("loss-padding", "right padding ignored by -100", rows="attention_mask",
                inputs=right | {"labels": ignored}),
        forward("loss-nothing", "every label ignored: NaN",
                inputs={"input_ids": ids, "labels": np.full_like(ids, -100)}),
        forward("loss-mha", "other ids as labels", "mha",
                inputs={"input_ids": ids, "labels": draw("labels", 3, 10)}),
    ]  # fmt: skip


PADS = {
    "right": ("pads (0) on the right", ints([3, 7, 9, 0, 0], [5, 0, 0, 0, 0], [8, 4, 6, 11, 0])),
    "left": ("pads on the left: the last column", ints([0, 0, 3, 7, 9], [0, 5, 6, 7, 8])),
    "inside": ("a pad inside: the token before the first pad",
               ints([3, 0, 7, 9, 0], [0, 3, 7, 9, 4], [6, 5, 0, 8, 9])),
    "all": ("nothing but pads: the last column", ints([0, 0, 0, 0, 0], [3, 7, 9, 4, 5])),
    "none": ("no pads: the last column", ints([3, 7, 9, 4, 5], [9, 8, 7, 6, 5])),
}  # fmt: skip


def classify(name: str, shows: str, model: str = "labels3", **more: Any) -> Case:
    return forward(f"classify-{name}", shows, model, class_name=CLASSIFIER, **more)


def classification() -> list[Case]:
    left = PADS["left"][1]
    three = {"input_ids": draw("classify", 3, 6)}
    embeds = {"inputs_embeds": normal("classify-embeds", 3, 6, 48)}
    return [
        *(classify(f"pads-{name}", shows, inputs={"input_ids": ids})
          for name, (shows, ids) in PADS.items()),
        classify("pads-masked", "the mask hides left pads, the index does not look at it",
                 inputs={"input_ids": left, "attention_mask": (left != 0).astype(np.int64)}),
        classify("no-pad-id", "pad_token_id null: one row, last column",
                 config={"pad_token_id": None}, inputs={"input_ids": ints([3, 0, 7, 9, 0])}),
        classify("pad-minus-one", "pad_token_id -1 is never found", config={"pad_token_id": -1},
                 inputs={"input_ids": PADS["right"][1]}),
        classify("pad-is-eos", "pad = eos = 2: the genuine eos is dropped too",
                 config={"pad_token_id": 2},
                 inputs={"input_ids": ints([3, 7, 2, 2, 2], [3, 4, 5, 6, 2])}),
        classify("embeds", "inputs_embeds: the last column", inputs=embeds),
        classify("bias", "five labels, attention biases", "labels5_bias", inputs=three),
        classify("states", "states of the trunk", inputs=three, arguments=ALL_STATES),
        *classification_losses(three),
    ]  # fmt: skip


def classification_losses(three: Arrays) -> list[Case]:
    one_hot = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], np.float32)
    numbers = normal("numbers", 3)
    return [
        classify("regression", "one label: mean squared error", "labels1",
                 inputs=three | {"labels": numbers}),
        classify("regression-integers", "one label, integer targets", "labels1",
                 inputs=three | {"labels": np.array([2, -1, 4], np.int64)}),
        classify("regression-three", "problem_type regression, three numbers each",
                 config={"problem_type": "regression"},
                 inputs=three | {"labels": normal("targets", 3, 3)}),
        classify("single-label", "integer labels: cross-entropy",
                 inputs=three | {"labels": np.array([2, 0, 1], np.int64)}),
        classify("single-label-ignored", "-100 is ignored, labels (B, 1)",
                 inputs=three | {"labels": ints([2], [-100], [1])}),
        classify("multi-label", "float labels: binary cross-entropy",
                 inputs=three | {"labels": one_hot}),
        classify("multi-label-five", "problem_type multi_label_classification, five labels",
                 "labels5_bias", config={"problem_type": "multi_label_classification"},
                 inputs=three | {"labels": (normal("five", 3, 5) > 0).astype(np.float32)}),
    ]  # fmt: skip


# --- generation ------------------------------------------------------------------------------


def generate(name: str, shows: str, model: str = "gqa", **more: Any) -> Case:
    """Greedy from two prompts of six tokens, pad 0, scores recorded, unless said otherwise."""
    inputs = more.pop("inputs", None) or {"input_ids": draw("prompts-2", 2, 6)}
    arguments = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False} | more.pop(
        "arguments", {}
    )
    full = {"return_dict_in_generate": True, "output_scores": True} | arguments
    return Case(f"generate-{name}", shows, model, "generate", inputs=inputs, arguments=full, **more)


EOS_OFTEN = list(range(5, 97, 4))  # some beam meets one at almost every step
EOS = [5, 11, 17, 23, 29, 31, 37, 41, 43, 47, 53, 59]  # enough of them that some rows end


def greedy() -> list[Case]:
    def case(
        name: str, shows: str, model: str = "gqa", inputs: Any = None, **arguments: Any
    ) -> Case:
        return generate(name, shows, model, inputs=inputs, arguments=arguments)

    left = _padded("generate-left", [7, 4, 1], 7, "left")
    pads = left["input_ids"] * left["attention_mask"]
    long = {"input_ids": draw("long", 1, 40)}
    return [
        case("greedy", "twelve tokens"),
        case("greedy-mha", "as many key/value heads as query heads", "mha"),
        case("greedy-mqa", "one key/value head", "mqa"),
        case("greedy-tied", "tied head", "tied"),
        case("greedy-no-cache", "use_cache false: the same ids", use_cache=False),
        case("greedy-beyond", "past max_position_embeddings", inputs=long, max_new_tokens=16),
        case("max-length", "max_length counts the prompt", max_length=10, max_new_tokens=None),
        case("max-length-reached", "a prompt of max_length: one token all the same",
             max_length=6, max_new_tokens=None),
        case("eos-list", "a row that ends is filled with pad", eos_token_id=EOS, max_new_tokens=24),
        case("eos-mha", "the same on another model", "mha", eos_token_id=[25, 63],
             max_new_tokens=24),
        case("min-new-tokens", "no eos before eight new tokens", eos_token_id=EOS,
             min_new_tokens=8, max_new_tokens=24),
        case("min-length", "no eos before length eleven", eos_token_id=EOS, min_length=11,
             max_new_tokens=24),
        case("repetition-penalty", "1.7, prompt included", repetition_penalty=1.7),
        case("repetition-reward", "0.8", repetition_penalty=0.8),
        case("no-repeat-2", "no pair twice", "mha", no_repeat_ngram_size=2, max_new_tokens=30),
        case("no-repeat-1", "no token twice", no_repeat_ngram_size=1, max_new_tokens=20),
        case("bad-words", "single ids and sequences are banned",
             bad_words_ids=[[i] for i in range(30, 60)] + [[7, 8], [61, 62, 63]]),
        case("left-padding", "left padding with a mask",
             inputs={"input_ids": pads, "attention_mask": left["attention_mask"]}),
        case("inferred-mask", "pad 0 in the prompt: the mask is inferred",
             inputs={"input_ids": pads}),
        case("everything", "four processors at once", "mha", repetition_penalty=1.3,
             no_repeat_ngram_size=3, bad_words_ids=[[i] for i in range(60, 80)], min_new_tokens=6,
             eos_token_id=EOS, max_new_tokens=20),
    ]  # fmt: skip


def beams() -> list[Case]:
    def case(
        name: str, shows: str, model: str = "gqa", inputs: Any = None, **arguments: Any
    ) -> Case:
        defaults = {"eos_token_id": EOS_OFTEN, "num_beams": 3}
        return generate(f"beam-{name}", shows, model, inputs=inputs, arguments=defaults | arguments)

    left = _padded("beam-left", [7, 4, 2], 7, "left")
    return [
        case("2", "two beams", num_beams=2),
        case("4", "four beams, no end in sight", num_beams=4, eos_token_id=2),
        case("5-mha", "five beams", "mha", num_beams=5),
        case("longer", "length_penalty 2 favours long ones", length_penalty=2.0),
        case("raw-sums", "length_penalty 0", length_penalty=0.0),
        case("shorter", "length_penalty -1", length_penalty=-1.0),
        case("early", "early_stopping true", early_stopping=True, num_beams=4),
        case("never", 'early_stopping "never", length_penalty 1.5', early_stopping="never",
             length_penalty=1.5),
        case("return-3", "the three best of four", num_beams=4, num_return_sequences=3),
        case("return-all", "all beams, early stopping", num_return_sequences=3,
             early_stopping=True),
        case("repetition-penalty", "acts on log-probabilities", repetition_penalty=1.5),
        case("no-repeat-bad-words", "both, on a tied head", "tied", no_repeat_ngram_size=2,
             bad_words_ids=[[i] for i in range(20, 40)], max_new_tokens=16),
        case("min-new-tokens", "no eos before six new tokens", min_new_tokens=6),
        case("left-padding", "left padding with a mask", inputs=left),
        case("max-length", "max_length 9", max_length=9, max_new_tokens=None, num_beams=4),
        case("mqa", "one key/value head", "mqa", num_return_sequences=2),
    ]  # fmt: skip


WARPERS: dict[str, dict[str, Any]] = {
    "default": {},  # top_k is 50 unless said otherwise
    "temperature": {"temperature": 0.6, "top_k": 0},
    "hot": {"temperature": 1.9, "top_k": 0},
    "top-k": {"top_k": 7},
    "top-k-1": {"top_k": 1},
    "top-p": {"top_p": 0.85, "top_k": 0},
    "top-p-small": {"top_p": 0.1, "top_k": 0},
    "typical": {"typical_p": 0.7, "top_k": 0},
    "epsilon": {"epsilon_cutoff": 0.02, "top_k": 0},
    "eta": {"eta_cutoff": 0.05, "top_k": 0},
    "all": {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "typical_p": 0.8},
    "after-processors": {"repetition_penalty": 1.6, "temperature": 0.8, "top_k": 12,
                         "min_new_tokens": 2, "eos_token_id": EOS},
}  # fmt: skip
MIN_P = {
    "min-p": {"min_p": 0.1, "top_k": 0},
    "min-p-hot": {"min_p": 0.05, "temperature": 1.8, "top_k": 0},
    "min-p-top-k": {"min_p": 0.02, "top_k": 9, "top_p": 0.95},
}


def sampling() -> list[Case]:
    def case(name: str, options: dict[str, Any], environment: str) -> Case:
        told = ", ".join(f"{k} {v}" for k, v in options.items() if k != "eos_token_id")
        arguments = {
            "do_sample": True,
            "max_new_tokens": 1,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
            "output_scores": True,
        } | options
        return Case(f"sample-{name}", f"scores of the first draw: {told or 'top_k is 50'}", "gqa",
                    "first_scores", inputs={"input_ids": draw("sample", 4, 6)},
                    arguments=arguments, environment=environment)  # fmt: skip

    old = [case(name, options, "4.37.2") for name, options in WARPERS.items()]
    return old + [case(name, options, "newest") for name, options in MIN_P.items()]


def _logits() -> np.ndarray:
    """Rows with ties, with negative values, with one clear winner, with equal values only."""
    rows = 3 * normal("fixed-logits", 5, 23)
    rows[1] = np.round(rows[1])
    rows[2] = np.abs(rows[2])
    rows[3, 4] = 30.0
    rows[4] = 1.0
    return rows


CHAINS: dict[str, tuple[str, list[list[Any]]]] = {
    "temperature": ("4.37.2", [["TemperatureLogitsWarper", {"temperature": 0.7}]]),
    "top-k": ("4.37.2", [["TopKLogitsWarper", {"top_k": 4}]]),
    "top-k-min-keep": ("4.37.2", [["TopKLogitsWarper", {"top_k": 1, "min_tokens_to_keep": 3}]]),
    "top-p": ("4.37.2", [["TopPLogitsWarper", {"top_p": 0.6}]]),
    "top-p-min-keep": ("4.37.2", [["TopPLogitsWarper", {"top_p": 0.2, "min_tokens_to_keep": 3}]]),
    "typical": ("4.37.2", [["TypicalLogitsWarper", {"mass": 0.5}]]),
    "repetition": ("4.37.2", [["RepetitionPenaltyLogitsProcessor", {"penalty": 1.5}]]),
    "no-repeat": ("4.37.2", [["NoRepeatNGramLogitsProcessor", {"ngram_size": 2}]]),
    "bad-words": ("4.37.2", [["NoBadWordsLogitsProcessor",
                              {"bad_words_ids": [[3], [9, 4], [1, 2, 8]], "eos_token_id": 2}]]),
    "min-length": ("4.37.2", [["MinLengthLogitsProcessor", {"min_length": 9, "eos_token_id": 2}]]),
    "min-new-tokens": ("4.37.2", [["MinNewTokensLengthLogitsProcessor",
                       {"prompt_length_to_skip": 3, "min_new_tokens": 6, "eos_token_id": [2, 5]}]]),
    "in-order": ("4.37.2", [["RepetitionPenaltyLogitsProcessor", {"penalty": 1.2}],
                            ["TemperatureLogitsWarper", {"temperature": 1.3}],
                            ["TopKLogitsWarper", {"top_k": 9}],
                            ["TopPLogitsWarper", {"top_p": 0.9}]]),
    "min-p": ("newest", [["MinPLogitsWarper", {"min_p": 0.15}]]),
    "min-p-min-keep": ("newest", [["MinPLogitsWarper", {"min_p": 0.9, "min_tokens_to_keep": 4}]]),
}  # fmt: skip


def processors() -> list[Case]:
    ids = ints([1, 2, 3, 1, 2], [9, 9, 9, 9, 9], [4, 9, 4, 9, 4], [8, 7, 6, 5, 9], [0, 1, 0, 1, 2])
    inputs = {"input_ids": ids, "scores": _logits()}
    return [
        Case(f"processor-{name}", "fixed scores through " + ", ".join(step[0] for step in steps),
             call="processors", inputs=inputs, arguments={"processors": steps}, environment=where)
        for name, (where, steps) in CHAINS.items()
    ]  # fmt: skip


def generate_newest() -> list[Case]:
    more: dict[str, Any] = {"environment": "newest"}
    llama3 = {"config": _scaled(**LLAMA3, **ORIGINAL)}
    return [
        generate("head-dim", "greedy with an explicit head_dim", "head_dim", **more),
        generate("mlp-bias", "greedy with biases everywhere", "mlp_bias", **more),
        generate("llama3", "greedy with llama3 scaling, past both lengths",
                 inputs={"input_ids": draw("long", 1, 20)}, arguments={"max_new_tokens": 20},
                 **llama3, **more),
    ]  # fmt: skip


# --- low precision ---------------------------------------------------------------------------


def low_precision() -> list[Case]:
    left = _padded("half", [11, 7, 4], 11, "left")
    padded = left | {"position_ids": _shifted(left["attention_mask"])}
    found = [forward("half-float32", "the float32 run of the low-precision cases", "half",
                     inputs=padded, rows="attention_mask", arguments=ALL_STATES)]  # fmt: skip
    for dtype in ("bfloat16", "float16"):
        found.append(
            forward(f"half-{dtype}", f"weights and arithmetic in {dtype}", "half", dtype=dtype,
                    inputs=padded, rows="attention_mask", arguments=ALL_STATES,
                    compare="information")
        )  # fmt: skip
    return found


# --- the bundled checkpoint ------------------------------------------------------------------


def pieces(text: str) -> list[int]:
    """The ids of a text in the bundled tokenizer, <s> first."""
    from sentencepiece import SentencePieceProcessor

    return [1, *SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model")).encode(text)]


STORIES = (
    "Once upon a time there was a king who had three daughters, and the youngest",
    "The old woman looked out of the window and said: “Little tin soldier, where are you going?”",
)


def bundled() -> list[Case]:
    """The trained model; its weights are widened from bfloat16 and computed with in float32."""
    first, second = (ints(pieces(text)) for text in STORIES)
    both = [pieces(text) for text in STORIES]
    width = max(map(len, both))
    mask = lengths_to_mask([len(row) for row in both], width, "left")
    ids = ints(*[[0] * (width - len(row)) + row for row in both])
    padded = {"input_ids": ids, "attention_mask": mask}
    greedy = {
        "max_new_tokens": 40,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }

    def case(name: str, shows: str, inputs: Arrays, call: str = "forward", **more: Any) -> Case:
        arguments = more.pop("arguments", {"use_cache": False})
        return Case(
            f"bundled-{name}", shows, "bundled", call, inputs=inputs, arguments=arguments, **more
        )

    classifier = {"class_name": CLASSIFIER}
    return [
        case("logits-1", STORIES[0], {"input_ids": first}),
        case("logits-2", STORIES[1], {"input_ids": second}),
        case("logits-padded", "both prompts in one batch, positions from the first token",
             padded | {"position_ids": _shifted(mask)}, rows="attention_mask"),
        case("greedy-1", "40 tokens", {"input_ids": first}, "generate", arguments=greedy),
        case("greedy-2", "40 tokens", {"input_ids": second}, "generate", arguments=greedy),
        case("greedy-padded", "both prompts in one batch", padded, "generate", arguments=greedy),
        case("beams", "three beams, 16 tokens", {"input_ids": first}, "generate",
             arguments=greedy | {"num_beams": 3, "max_new_tokens": 16}),
        case("classify-1", "Andersen or Grimm?", {"input_ids": first}, **classifier),
        case("classify-2", "Andersen or Grimm?", {"input_ids": second}, **classifier),
    ]  # fmt: skip


def all_cases() -> list[Case]:
    """Every case, in the order of the manifest."""
    groups = (
        architectures, architectures_newest, rope_437, rope_newest, activations, masks, masks_4d,
        positions, caches, losses, classification, greedy, beams, sampling, processors,
        generate_newest, low_precision, bundled,
    )  # fmt: skip
    return [case for group in groups for case in group()]
