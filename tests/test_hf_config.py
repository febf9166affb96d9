"""LlamaConfig: fields, defaults, validation and files as documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import QUICK, SCALINGS, SIZES, tiny_config

from llama_np import LlamaConfig, LlamaForCausalLM
from llama_np.config import config_from_dict, config_to_dict
from llama_np.errors import ConfigError

# What the documentation lists, with its defaults.
DOCUMENTED: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
INHERITED: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "torch_dtype": None,
    "num_labels": 2,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
    "architectures": None,
    "max_length": 20,
    "top_k": 50,
    "do_sample": False,
    "model_type": "llama",
    "use_return_dict": True,
    "name_or_path": "",
}


def test_defaults_are_the_documented_ones() -> None:
    config = LlamaConfig()
    for name, value in (DOCUMENTED | INHERITED).items():
        assert getattr(config, name) == value, name
    assert config.head_dim == 128


def test_arguments_can_be_given_by_position_in_documented_order() -> None:
    config = LlamaConfig(50, 16, 24, 2, 4, 2, "gelu")
    assert (config.vocab_size, config.num_key_value_heads, config.hidden_act) == (50, 2, "gelu")


def test_a_default_config_file_holds_what_a_reader_cannot_guess() -> None:
    saved = json.loads(LlamaConfig().to_json_string())
    expected = {k: v for k, v in DOCUMENTED.items() if k != "pad_token_id"}
    assert saved == expected | {"model_type": "llama", "transformers_version": "4.37.2"}
    assert LlamaConfig().to_json_string().endswith("\n}\n")


def test_unknown_keywords_become_attributes_and_are_saved() -> None:
    config = LlamaConfig(note="mine", max_length=7, eos_token_id=[2, 3])
    assert config.note == "mine"  # type: ignore[attr-defined]
    saved = json.loads(config.to_json_string())
    assert (saved["note"], saved["max_length"], saved["eos_token_id"]) == ("mine", 7, [2, 3])


def test_labels_follow_their_number_and_their_names() -> None:
    assert LlamaConfig(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    named = LlamaConfig(id2label={"0": "good", "1": "bad", "2": "ugly"})
    assert named.num_labels == 3
    assert named.id2label[2] == "ugly"
    assert named.label2id["bad"] == 1
    named.num_labels = 2
    assert named.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert LlamaConfig(num_labels=0).num_labels == 0


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({}, "two fields"),
        ([], "two fields"),
        ("linear", "two fields"),
        ({"type": "linear"}, "two fields"),
        ({"factor": 2.0}, "two fields"),
        ({"type": "linear", "factor": 2.0, "note": 1}, "two fields"),
        ({"name": "linear", "factor": 2.0}, "type field must be one of"),
        ({"type": "bogus", "factor": 2.0}, "type field must be one of"),
        ({"type": "linear", "factor": 1.0}, "factor field must be a float > 1"),
        ({"type": "dynamic", "factor": 0.5}, "factor field must be a float > 1"),
        ({"type": "linear", "factor": "2"}, "factor field must be a float > 1"),
        ({"type": "linear", "factor": True}, "factor field must be a float > 1"),
        ({"type": "linear", "factor": None}, "factor field must be a float > 1"),
        ({"type": "linear", "factor": float("nan")}, "factor field must be a float > 1"),
        ({"type": "linear", "factor": float("inf")}, "factor field must be a float > 1"),
        ({"rope_type": "linear", "factor": 0.0}, "factor field must be a float > 1"),
    ],
)
def test_malformed_rope_scaling_is_refused(scaling: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(rope_scaling=scaling)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_pretrained(tmp_path, rope_scaling=scaling)
    config = LlamaConfig()
    config.rope_scaling = scaling
    with pytest.raises(ConfigError, match=message):
        LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("spelling", "kept"),
    [
        ({"type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        ({"type": "linear", "factor": 2}, {"type": "linear", "factor": 2.0}),
        ({"rope_type": "dynamic", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}),
        ({"type": "linear", "rope_type": "linear", "factor": 2}, {"type": "linear", "factor": 2.0}),
        ({"rope_type": "default"}, None),
        (SCALINGS["llama3"], SCALINGS["llama3"]),
    ],
)
def test_every_spelling_of_rope_scaling_is_read(spelling: Any, kept: Any) -> None:
    config = LlamaConfig(rope_scaling=spelling)
    assert config.rope_scaling == kept
    as_parameters = LlamaConfig(rope_parameters=spelling | {"rope_theta": 5e5})
    assert as_parameters.rope_scaling == kept
    assert as_parameters.rope_theta == 5e5
    assert as_parameters.rope_parameters["rope_theta"] == 5e5
    expected = (kept or {}).get("type") or (kept or {}).get("rope_type") or "default"
    assert config.core().rope_scaling["rope_type"] == expected
    assert config.rope_parameters["rope_type"] == expected


def test_two_spellings_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="both"):
        LlamaConfig(rope_scaling=SCALINGS["linear"], rope_parameters=SCALINGS["dynamic"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 3}, "divisible by num_heads"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "num_key_value_heads"),
        ({"problem_type": "guessing"}, "problem_type"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"label2id": 3}, "label2id"),
        ({"torch_dtype": "float3"}, "torch_dtype"),
    ],
)
def test_values_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "bogus"}, "hidden_act"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "odd"),
        ({"attn_implementation": "bogus"}, "attn_implementation"),
    ],
)
def test_a_model_checks_what_it_needs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **changes))


@pytest.mark.parametrize(
    "dtype", ["float16", "torch.float16", np.float16, np.dtype("float16")], ids=repr
)
def test_dtypes_have_one_name(dtype: Any) -> None:
    assert LlamaConfig(torch_dtype=dtype).torch_dtype == "float16"
    config = LlamaConfig(dtype=dtype)
    assert config.dtype == config.torch_dtype == "float16"
    config.dtype = "bfloat16"
    assert json.loads(config.to_json_string())["torch_dtype"] == "bfloat16"


def test_newer_fields_are_saved_where_they_matter() -> None:
    plain = json.loads(LlamaConfig(mlp_bias=False).to_json_string())
    assert not {"head_dim", "mlp_bias", "rope_parameters"} & plain.keys()
    config = LlamaConfig(head_dim=32, mlp_bias=True)
    assert config.core().head_dim == 32
    saved = json.loads(config.to_json_string())
    assert (saved["head_dim"], saved["mlp_bias"]) == (32, True)
    config.head_dim = None
    assert config.head_dim == 128


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@QUICK
@given(
    extra=st.dictionaries(st.sampled_from(["note", "x1", "tags"]), json_values),
    labels=st.integers(1, 6),
    scaling=st.sampled_from([*SCALINGS.values(), None]),
    eos=st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_saving_and_reading_keeps_every_attribute(
    tmp_path_factory: Any, extra: dict[str, Any], labels: int, scaling: Any, eos: Any
) -> None:
    config = LlamaConfig(num_labels=labels, rope_scaling=scaling, eos_token_id=eos, **extra)
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    again = LlamaConfig.from_pretrained(folder)
    assert again == config
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert LlamaConfig.from_json_file(folder / "config.json") == config
    assert repr(again).startswith("LlamaConfig {")


def test_keywords_override_the_file(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=50).save_pretrained(tmp_path)
    config, unused = LlamaConfig.from_pretrained(
        tmp_path, vocab_size=60, num_labels=4, nonsense=1, return_unused_kwargs=True
    )
    assert (config.vocab_size, config.num_labels, unused) == (60, 4, {"nonsense": 1})
    assert LlamaConfig.from_pretrained(tmp_path / "config.json").vocab_size == 50
    assert LlamaConfig.from_pretrained("fairytales").model_type == "llama"
    with pytest.raises(FileNotFoundError):
        LlamaConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="num_labels"):
        LlamaConfig.from_pretrained(tmp_path, num_labels=3, id2label={0: "a"})


def test_attributes_can_be_changed() -> None:
    config = LlamaConfig()
    config.update({"vocab_size": 7, "note": 1})
    assert config.vocab_size == 7
    assert config != LlamaConfig()
    assert json.loads(config.to_json_string())["vocab_size"] == 7


@pytest.mark.parametrize("scaling", SCALINGS)
def test_both_configurations_say_the_same(scaling: str) -> None:
    core = tiny_config(rope_scaling=SCALINGS[scaling])
    config = LlamaConfig.from_core(core)
    assert config_to_dict(config.core()) == config_to_dict(core)
    assert config.core("float32").rope_angles == "float32"
    assert config_from_dict(LlamaConfig(**SIZES).to_dict()) == tiny_config()
