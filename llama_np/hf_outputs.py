"""What the documented models return: values readable as attributes, by key and by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_np.cache import KVCache

Past = Any  # a tuple of (key, value) pairs, or a KVCache; both give past[layer][0]
Layers = tuple[np.ndarray, ...]


def past_of(given: Any, cache: KVCache | None) -> Past:
    """What to hand back: the cache that was handed in, or else a tuple of (key, value) pairs."""
    return cache if isinstance(given, KVCache) or cache is None else tuple(cache)


class ModelOutput(dict[str, Any]):
    """A dictionary of what was computed, in the documented order.

    `out.logits`, `out["logits"]` and `out[0]` are the same. What was not asked for is None as an
    attribute, and absent from keys and positions.
    """

    def __init__(self, **values: Any) -> None:
        super().__init__({k: v for k, v in values.items() if v is not None})

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names that this output may hold, in order."""
        return tuple(cls.__annotations__)

    def __getattr__(self, name: str) -> Any:
        if name not in type(self).fields() and name not in self:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Everything that was computed, in the documented order, and then what was added."""
        fields = type(self).fields()
        known = [name for name in fields if name in self]
        return tuple(self[name] for name in [*known, *(n for n in self if n not in fields)])


class BaseModelOutputWithPast(ModelOutput):
    """Of LlamaModel: last_hidden_state (B, T, D) is taken after the final norm."""

    last_hidden_state: np.ndarray
    past_key_values: Past
    hidden_states: Layers | None
    attentions: Layers | None


class CausalLMOutputWithPast(ModelOutput):
    """Of LlamaForCausalLM: logits (B, T, V)."""

    loss: np.floating | None
    logits: np.ndarray
    past_key_values: Past
    hidden_states: Layers | None
    attentions: Layers | None


class SequenceClassifierOutputWithPast(ModelOutput):
    """Of LlamaForSequenceClassification: logits (B, C)."""

    loss: np.floating | None
    logits: np.ndarray
    past_key_values: Past
    hidden_states: Layers | None
    attentions: Layers | None


class GenerateDecoderOnlyOutput(ModelOutput):
    """Of generate() without beams: sequences (B, S), scores one (B, V) per new token."""

    sequences: np.ndarray
    scores: Layers | None
    attentions: Sequence[Layers] | None
    hidden_states: Sequence[Layers] | None
    past_key_values: Past


class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """Of generate() with beams: scores are processed log-probabilities, (B * beams, V) each."""

    sequences: np.ndarray
    sequences_scores: np.ndarray | None
    scores: Layers | None
    beam_indices: np.ndarray | None
    attentions: Sequence[Layers] | None
    hidden_states: Sequence[Layers] | None
    past_key_values: Past
