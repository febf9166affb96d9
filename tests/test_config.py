"""config.json is read strictly: nothing that would change the numbers is guessed or ignored."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import QUICK, SCALINGS, SIZES, tiny_config

from llama_np.config import (
    DEFAULTS,
    HARMLESS,
    NOT_IMPLEMENTED,
    Config,
    config_from_dict,
    config_to_dict,
    read_config,
)
from llama_np.errors import ConfigError

# Llama-2 as transformers 4.31 wrote it, and Llama-3.1 as the hub has it.
LLAMA_2: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_31: dict[str, Any] = LLAMA_2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def written(tmp_path: Path, text: str | bytes) -> Path:
    (tmp_path / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    return tmp_path


# What is read


def test_real_files_are_read_as_they_stand(tmp_path: Path) -> None:
    old = read_config(written(tmp_path, json.dumps(LLAMA_2)))
    assert (old.head_dim, old.num_key_value_heads, old.rope_theta) == (128, 32, 10000.0)
    assert old.eos_token_id == (2,) and old.rope_scaling == {"rope_type": "default"}
    new = read_config(written(tmp_path, json.dumps(LLAMA_31)))
    assert (new.head_dim, new.num_key_value_heads) == (128, 8)
    assert new.eos_token_id == (128001, 128008, 128009)
    assert new.rope_scaling == LLAMA_31["rope_scaling"]
    assert new.architectures == ("LlamaForCausalLM",)


def test_an_empty_object_is_llama_7b() -> None:
    config = config_from_dict({})
    for name, value in DEFAULTS.items():
        expected = (value,) if name == "eos_token_id" else value
        assert getattr(config, name) == expected
    assert (config.num_key_value_heads, config.head_dim, config.num_labels) == (32, 128, 2)


@pytest.mark.parametrize("absent", [{}, {"num_key_value_heads": None, "head_dim": None}])
def test_left_out_heads_follow_from_the_others(absent: dict[str, Any]) -> None:
    config = config_from_dict({"hidden_size": 48, "num_attention_heads": 4} | absent)
    assert (config.num_key_value_heads, config.head_dim) == (4, 12)


def test_a_given_head_width_need_not_divide_the_model_width() -> None:
    config = config_from_dict({"hidden_size": 50, "num_attention_heads": 4, "head_dim": 6})
    assert config.head_dim == 6


def test_null_is_the_default_but_for_token_ids() -> None:
    config = config_from_dict(dict.fromkeys(DEFAULTS))
    assert config.hidden_size == 4096 and config.rms_norm_eps == 1e-6
    assert config.bos_token_id is config.pad_token_id is None
    assert config.eos_token_id == ()


def test_the_source_of_every_value_is_known() -> None:
    config = config_from_dict({"hidden_size": 64, "rope_parameters": {"rope_theta": 5.0}})
    assert config.sources["hidden_size"] == "config.json"
    assert config.sources["rope_theta"] == "config.json"
    assert config.sources["vocab_size"] == "default of transformers"
    assert config.sources["num_key_value_heads"] == "= num_attention_heads"
    assert config.sources["head_dim"] == "= hidden_size / num_attention_heads"


def test_a_pad_id_of_minus_one_is_legal() -> None:
    assert config_from_dict({"pad_token_id": -1}).pad_token_id == -1


def test_labels_come_from_id2label_or_are_counted() -> None:
    assert config_from_dict({"id2label": {"0": "a", "1": "b", "2": "c"}}).num_labels == 3
    assert config_from_dict({"num_labels": 4}).id2label[3] == "LABEL_3"


def test_whole_numbers_may_stand_where_numbers_are_expected() -> None:
    config = config_from_dict(
        {"rope_theta": 500000, "rope_scaling": {"type": "linear", "factor": 2}}
    )
    assert config.rope_theta == 500000 and config.rope_scaling["factor"] == 2


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_keys_that_cannot_change_the_numbers_are_passed_over(key: str) -> None:
    value = "llama" if key == "model_type" else 7
    assert config_from_dict(SIZES | {key: value}) == tiny_config()


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_written_configuration_is_read_back_the_same(kind: str) -> None:
    config = tiny_config(
        rope_scaling=SCALINGS[kind], eos_token_id=[1, 2], architectures=["LlamaForCausalLM"]
    )
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config


def test_simple_scalings_are_written_as_the_oldest_readers_expect() -> None:
    """transformers 4.37 wants exactly `type` and `factor`, the latter a float."""
    config = tiny_config(rope_scaling={"rope_type": "linear", "factor": 2})
    scaling = config_to_dict(config)["rope_scaling"]
    assert scaling == {"type": "linear", "factor": 2.0}
    assert type(scaling["factor"]) is float


# The three spellings of the rotary parameters


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_three_spellings_of_the_rotary_parameters_mean_the_same(kind: str) -> None:
    scaling = dict(SCALINGS[kind])
    hub = config_from_dict(SIZES | {"rope_theta": 77.0, "rope_scaling": scaling})
    old_name = {"type": scaling["rope_type"], **scaling}
    old_name.pop("rope_type")
    old = config_from_dict(SIZES | {"rope_theta": 77.0, "rope_scaling": old_name})
    sizes = {name: value for name, value in SIZES.items() if name != "rope_theta"}
    new = config_from_dict(sizes | {"rope_parameters": {"rope_theta": 77.0, **scaling}})
    both = config_from_dict(
        SIZES | {"rope_theta": 77.0, "rope_scaling": scaling | {"type": scaling["rope_type"]}}
    )
    assert hub == old == new == both
    assert hub.rope_theta == 77.0 and hub.rope_scaling == scaling


def test_rope_parameters_and_an_equal_rope_scaling_may_stand_together() -> None:
    scaling = SCALINGS["linear"]
    config = config_from_dict({"rope_scaling": scaling, "rope_parameters": scaling})
    assert config.rope_scaling == scaling


def test_an_original_length_beside_the_scaling_belongs_to_it() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    config = tiny_config(rope_scaling=scaling, original_max_position_embeddings=16)
    assert config.rope_scaling["original_max_position_embeddings"] == 16


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": SCALINGS["linear"], "rope_parameters": SCALINGS["dynamic"]},
        {"rope_scaling": {"factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": None}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
        {"rope_scaling": {"rope_type": "linear", "factor": True}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": "linear", "factor": -2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
        {"rope_scaling": {"rope_type": []}},
        {"rope_scaling": {"rope_type": 3}},
        {"rope_scaling": "linear"},
        {"rope_scaling": [2.0]},
        {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
        {"rope_scaling": SCALINGS["llama3"] | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        {"rope_scaling": SCALINGS["llama3"] | {"low_freq_factor": None}},
        {"rope_scaling": SCALINGS["longrope"] | {"long_factor": [1.0]}},
        {"rope_scaling": SCALINGS["longrope"] | {"long_factor": [1.0, 2.0, "3"]}},
        {"rope_scaling": SCALINGS["longrope"] | {"long_factor": 2.0}},
        {"rope_scaling": SCALINGS["longrope"] | {"short_factor": None}},
        {"rope_scaling": SCALINGS["yarn"] | {"truncate": 1}},
        {"rope_scaling": SCALINGS["yarn"], "rope_theta": 1.0},
        {"rope_scaling": SCALINGS["dynamic"], "head_dim": 2},
    ],
    ids=str,
)
def test_inconsistent_rotary_parameters_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rope"):
        tiny_config(**rope)


# What is refused


NO_COUNT: list[Any] = [0, -4, 8.0, "8", True, [8], 10**400]
NO_NUMBER: list[Any] = [0, 0.0, -1e-5, "1e-5", True, [1.0], {}, 10**400, math.nan, math.inf]
NO_FLAG: list[Any] = [0, 1, "true", []]
NO_ID: list[Any] = [1.0, True, "1", -2, 2**24, {}]
WRONG: dict[str, list[Any]] = {
    "hidden_size": [*NO_COUNT, 2**20 + 2],
    "vocab_size": [*NO_COUNT, 2**24 + 1],
    "intermediate_size": NO_COUNT,
    "num_hidden_layers": [*NO_COUNT, 1025],
    "num_attention_heads": NO_COUNT,
    "num_key_value_heads": [*NO_COUNT, 3, 16],
    "head_dim": [*NO_COUNT, 5],
    "max_position_embeddings": NO_COUNT,
    "rms_norm_eps": NO_NUMBER,
    "rope_theta": NO_NUMBER,
    "attention_bias": NO_FLAG,
    "mlp_bias": NO_FLAG,
    "tie_word_embeddings": NO_FLAG,
    "hidden_act": ["SILU", "", [], 3],
    "bos_token_id": NO_ID,
    "pad_token_id": NO_ID,
    "eos_token_id": [*NO_ID, [1, 2.0], [[1]], [None]],
    "id2label": [[1, 2], {"one": "a"}],
    "num_labels": [1.5],
    "architectures": ["LlamaForCausalLM", 3, [3]],
    "model_type": [3],
}


@pytest.mark.parametrize(
    ("key", "wrong"),
    [(key, value) for key, values in WRONG.items() for value in values],
    ids=lambda value: str(value)[:20],
)
def test_wrong_values_are_errors_that_name_the_key(key: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        config_from_dict(SIZES | {key: wrong})
    assert len(str(caught.value)) < 1000


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size = 50 .* num_attention_heads = 4"):
        config_from_dict({"hidden_size": 50, "num_attention_heads": 4})


def test_unknown_keys_are_refused_unless_they_are_off() -> None:
    with pytest.raises(ConfigError, match="'query_temperature'"):
        tiny_config(query_temperature=2.0)
    switched_off: list[Any] = [None, False, 0, "", [], {}]
    for off in switched_off:
        assert tiny_config(query_temperature=off) == tiny_config()


@pytest.mark.parametrize("key", sorted(NOT_IMPLEMENTED))
def test_options_that_are_not_implemented_are_named(key: str) -> None:
    with pytest.raises(NotImplementedError, match=key):
        config_from_dict(SIZES | {key: 0.37})
    assert config_from_dict(SIZES | {key: None}) == tiny_config()


def test_other_models_and_scalings_are_named() -> None:
    with pytest.raises(NotImplementedError, match="'mistral'"):
        tiny_config(model_type="mistral")
    with pytest.raises(NotImplementedError, match="'proportional'"):
        tiny_config(rope_scaling={"rope_type": "proportional"})


def test_numpy_scalars_are_refused_because_they_promote_float32_arrays() -> None:
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        replace(tiny_config(), rms_norm_eps=np.float64(1e-5))
    with pytest.raises(ConfigError, match="rope_theta"):
        replace(tiny_config(), rope_theta=np.float64(1e4))
    with pytest.raises(ConfigError, match="factor"):
        tiny_config(rope_scaling={"type": "linear", "factor": np.float64(2)})


def test_a_configuration_cannot_be_changed() -> None:
    config = tiny_config()
    with pytest.raises(FrozenInstanceError):
        config.hidden_size = 3  # type: ignore[misc]
    with pytest.raises(ConfigError):
        replace(config, hidden_size=0)


# The file


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{",
        '{"a": }',
        '{"hidden_size": 8, "hidden_size": 16}',
        '{"rope_scaling": {"factor": 2.0, "factor": 4.0}}',
        '{"rms_norm_eps": NaN}',
        '{"rms_norm_eps": Infinity}',
        '{"rms_norm_eps": -Infinity}',
        '{"rms_norm_eps": 1e400}',
        '{"hidden_size": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a":' * 100_000,
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"hidden_act": "\xe9"}',
        "<!DOCTYPE html>",
        "{}" + " " * (1 << 20),
    ],
    ids=lambda text: repr(text[:30]),
)
def test_malformed_files_are_config_errors(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ConfigError):
        read_config(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"vocab_size": 8, "vocab_size": 16}', "duplicate key 'vocab_size'"),
        (
            '{"rope_scaling": {"type": "linear", "factor": 2, "factor": 4}}',
            "duplicate key 'factor'",
        ),
        ('{"temperature": NaN}', "NaN"),
        ('{"temperature": -Infinity}', "-Infinity"),
    ],
)
def test_what_json_readers_take_silently_is_named(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_config(written(tmp_path, text))


def test_errors_name_the_file(tmp_path: Path) -> None:
    for text in ('{"hidden_size": 0}', "{", '{"colour": 3}'):
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_config(written(tmp_path, text))


def test_a_missing_file_is_the_operating_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises((IsADirectoryError, PermissionError)):
        read_config(tmp_path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
keys = st.sampled_from(
    [*DEFAULTS, *sorted(NOT_IMPLEMENTED), "head_dim", "num_key_value_heads", "id2label",
     "num_labels", "architectures", "rope_scaling", "rope_parameters", "model_type",
     "original_max_position_embeddings"]
)  # fmt: skip
rope_keys = st.sampled_from(
    ["type", "rope_type", "factor", "rope_theta", "low_freq_factor", "short_factor",
     "original_max_position_embeddings", "attention_factor", "partial_rotary_factor"]
)  # fmt: skip
rope_values = anything | st.sampled_from([*SCALINGS])


@QUICK
@given(
    values=st.dictionaries(keys, anything, max_size=4),
    scaling=st.none() | st.dictionaries(rope_keys, rope_values, max_size=4),
)
def test_whatever_a_file_holds_it_is_read_or_refused(values: Any, scaling: Any) -> None:
    """No other exception may come out, and what is accepted has the declared types."""
    if scaling is not None:
        values = values | {"rope_scaling": scaling}
    try:
        config = config_from_dict(SIZES | values)
    except (ConfigError, NotImplementedError) as refused:
        assert len(str(refused)) < 2000
    else:
        assert isinstance(config, Config)
        assert config_from_dict(config_to_dict(config)) == config
