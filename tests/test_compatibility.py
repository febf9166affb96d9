"""The compatibility table names every documented item, and every row names what shows it.

Behind that, facts about documented arguments that no other test file is about.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from meta_llama import random_meta_model
from recorded import FOLDER, TOLERANCE, manifest
from torch_files import torch_file

from llama_np import (
    FlaxLlamaForCausalLM,
    FlaxLlamaModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlamaTokenizer,
    LlamaTokenizerFast,
    hf_outputs,
)
from llama_np.checkpoint import locate
from llama_np.cli import build_parser
from llama_np.convert import convert
from llama_np.hf_config import GENERATION_FIELDS, INHERITED
from llama_np.hf_encoding import Options
from llama_np.hf_generation_config import DEFAULTS

TABLE = FOLDER / "COMPATIBILITY.md"
VERDICTS = {"same", "better", "different", "not offered"}
MODELS = (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification)
TOKENIZERS = (LlamaTokenizer, LlamaTokenizerFast)
# Public because the library's modules use them among themselves; no documentation has them.
OWN = {
    "contrasts", "default_generation_config", "embed", "memory", "new_cache", "rounding", "run",
    "with_params",
}  # fmt: skip

# ------------------------------------------------------------------ the table


class Row(NamedTuple):
    section: str
    items: list[str]
    verdict: str
    what: str
    evidence: list[str]


def in_code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def rows() -> list[Row]:
    section, found = "", []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        cells = [cell.strip() for cell in line.split(" | ")]
        if line.startswith("| `") and len(cells) == 4:
            item, verdict, what, evidence = cells
            found.append(Row(section, in_code(item), verdict, what, in_code(evidence)))
    return found


def listed(section: str) -> set[str]:
    return {item for row in rows() if row.section == section for item in row.items}


def parameters(*functions: Any) -> set[str]:
    names = {name for f in functions for name in inspect.signature(f).parameters}
    return names - {"self", "kwargs", "options", "args", "arguments", "decode_kwargs"}


def public(*classes: type) -> set[str]:
    return {name for cls in classes for name in dir(cls) if not name.startswith("_")} - OWN


def assert_listed(wanted: Iterable[str], section: str) -> None:
    assert sorted(set(wanted) - listed(section)) == [], f"not in the section {section!r}"


def test_every_line_of_the_table_is_understood() -> None:
    lines = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("|")]
    headings = [line for line in lines if line.startswith(("| item", "|--", "| --"))]
    assert len(rows()) == len(lines) - len(headings)
    assert len(rows()) > 150
    assert [row for row in rows() if row.verdict not in VERDICTS] == []


def test_every_row_has_evidence_and_an_explanation_where_something_differs() -> None:
    assert [row.items for row in rows() if not row.evidence] == []
    assert [row.items for row in rows() if row.verdict != "same" and not row.what] == []


def test_every_test_that_the_table_names_exists() -> None:
    tests = {
        f"{path.name}::{node.name}"
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    named = {name for row in rows() for name in row.evidence if "::" in name}
    assert sorted(named - tests) == []


def test_every_recorded_case_that_the_table_names_exists() -> None:
    cases = [name for name, case in manifest()["cases"].items() if case["compare"] == "binding"]
    named = {name for row in rows() for name in row.evidence if "::" not in name}
    assert [name for name in sorted(named) if not any(fnmatch(c, name) for c in cases)] == []


def test_every_field_and_method_of_the_configuration_is_in_the_table() -> None:
    fields = parameters(LlamaConfig) | INHERITED.keys() | GENERATION_FIELDS.keys()
    assert_listed(fields | public(LlamaConfig), "LlamaConfig")


def test_every_argument_output_and_method_of_the_models_is_in_the_table() -> None:
    assert_listed(parameters(*(model.forward for model in MODELS)), "Calling a model")
    outputs = {
        name
        for output in (
            hf_outputs.BaseModelOutputWithPast,
            hf_outputs.CausalLMOutputWithPast,
            hf_outputs.SequenceClassifierOutputWithPast,
        )
        for name in output.fields()
    }
    assert_listed(outputs, "Calling a model")
    made = parameters(LlamaModel, LlamaModel.from_pretrained, LlamaModel.save_pretrained)
    assert_listed(made | public(*MODELS), "Making, loading, saving and changing a model")


def test_every_keyword_and_output_of_generate_is_in_the_table() -> None:
    outputs = {
        *hf_outputs.GenerateDecoderOnlyOutput.fields(),
        *hf_outputs.GenerateBeamDecoderOnlyOutput.fields(),
    }
    keywords = parameters(LlamaForCausalLM.generate) | DEFAULTS.keys()
    methods = public(GenerationConfig) | parameters(LlamaForCausalLM.compute_transition_scores)
    assert_listed(keywords | outputs | methods, "generate()")


def test_every_argument_and_method_of_the_tokenizers_is_in_the_table() -> None:
    arguments = parameters(*TOKENIZERS, Options, LlamaTokenizer.__call__)
    methods = parameters(LlamaTokenizer.apply_chat_template, LlamaTokenizer.decode)
    assert_listed(arguments | methods | public(*TOKENIZERS), "The tokenizers")


# ------------------------------------------------------------ facts about LlamaConfig

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.4,
}
IDS = np.array([[5, 9, 14, 3, 22, 14], [7, 7, 31, 30, 2, 36]])


def tiny(model: Any = LlamaForCausalLM, **changes: Any) -> Any:
    return model(LlamaConfig(**(SIZES | changes)), dtype=np.float64)


def close(found: Any, expected: Any) -> None:
    """Within the rounding of float64, in another order of summing."""
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


IDLE = {
    "attention_dropout": 0.5,
    "pretraining_tp": 2,
    "use_bfloat16": True,
    "tf_legacy_loss": True,
    "chunk_size_feed_forward": 3,
    "is_encoder_decoder": True,
    "is_decoder": True,
    "cross_attention_hidden_size": 5,
    "add_cross_attention": True,
    "tie_encoder_decoder": True,
    "finetuning_task": "x",
    "tokenizer_class": "LlamaTokenizer",
    "prefix": "x",
    "sep_token_id": 3,
    "decoder_start_token_id": 3,
    "task_specific_params": {"x": 1},
    "attn_implementation": "sdpa",
}


@pytest.mark.parametrize("name", IDLE)
def test_fields_that_cannot_change_an_evaluation_are_kept_and_change_nothing(
    name: str, tmp_path: Path
) -> None:
    model = tiny(**{name: IDLE[name]})
    np.testing.assert_array_equal(model(IDS).logits, tiny()(IDS).logits)
    model.config.save_pretrained(tmp_path)
    if name != "attn_implementation":  # never saved, as in 4.37.2
        assert getattr(LlamaConfig.from_pretrained(tmp_path), name) == IDLE[name]


def test_torchscript_asks_for_tuples() -> None:
    assert isinstance(tiny(torchscript=True)(IDS), tuple)
    assert not isinstance(tiny(torchscript=True)(IDS, return_dict=True), tuple)


def test_a_configuration_is_saved_read_updated_and_compared(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES)
    config.update({"rms_norm_eps": 1e-5})
    config.to_json_file(tmp_path / "config.json")
    assert LlamaConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    assert LlamaConfig.get_config_dict(tmp_path)[0]["rms_norm_eps"] == 1e-5
    assert LlamaConfig.from_dict(config.to_diff_dict()) == config
    assert config != LlamaConfig()
    assert config.keys_to_ignore_at_inference == ["past_key_values"]


# ------------------------------------------------------------ facts about the models


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForCausalLM"])
def test_a_flax_cache_with_positions_and_a_full_mask_gives_one_pass(name: str) -> None:
    flax = {"LlamaModel": FlaxLlamaModel, "LlamaForCausalLM": FlaxLlamaForCausalLM}[name]
    model = tiny(flax, max_position_embeddings=4)  # longer texts than that, grouped heads
    cache, parts = model.init_cache(2, 8), []
    for t in range(6):
        out = model(
            IDS[:, t : t + 1],
            attention_mask=np.ones((2, 8), np.int64),
            position_ids=np.full((2, 1), t),
            past_key_values=cache,
            params=model.params,
        )
        cache = out.past_key_values
        parts.append(out[0])
    close(np.concatenate(parts, axis=1), model(IDS)[0])


def test_flax_parameters_and_their_tree_run_through_another_model() -> None:
    mine, other = tiny(), LlamaForCausalLM(LlamaConfig(**SIZES), seed=5, dtype=np.float64)
    close(mine(IDS, params=other.params).logits, other(IDS).logits)
    tree: dict[str, Any] = {}
    for name, array in other.state_dict().items():
        *folders, leaf = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        if "embed_tokens" in name:
            node["embedding"] = array
        elif array.ndim == 2:
            node["kernel"] = array.T
        else:
            node[leaf] = array
    close(mine(IDS, params=tree).logits, other(IDS).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"tie_word_embeddings": True},
    ],
)
def test_flax_models_heed_the_whole_configuration(changes: dict[str, Any]) -> None:
    state = tiny().state_dict()
    model = FlaxLlamaForCausalLM(LlamaConfig(**(SIZES | changes)), state, dtype=np.float64)
    assert np.abs(model(IDS).logits - tiny()(IDS).logits).max() > 1e-3


def test_options_of_a_training_framework_are_refused_by_name() -> None:
    for name in ("dropout_rng", "train", "head_mask"):
        with pytest.raises(TypeError, match=name):
            tiny()(IDS, **{name: None})
    for name in ("input_shape", "_do_init"):
        options: dict[str, Any] = {name: None}
        with pytest.raises(TypeError, match=name):
            FlaxLlamaModel(LlamaConfig(**SIZES), **options)
    for name in ("backward", "half", "parameters", "to_bf16", "update_inputs_for_generation"):
        with pytest.raises(AttributeError, match=name):
            getattr(tiny(), name)
    for name in ("from_flax", "from_tf"):
        loading: dict[str, Any] = {name: True}
        with pytest.raises(NotImplementedError, match=name):
            FlaxLlamaModel.from_pretrained("fairytales", **loading)


def test_weights_of_pytorch_load_into_the_flax_classes_with_or_without_being_told() -> None:
    told = FlaxLlamaModel.from_pretrained("fairytales", from_pt=True)
    plain = FlaxLlamaModel.from_pretrained("fairytales")
    ids = np.array([[1, 5, 7]])
    assert np.array_equal(told(ids).last_hidden_state, plain(ids).last_hidden_state)
    assert not hasattr(told.config, "from_pt")


def test_a_checkpoint_loads_with_another_configuration_and_mapped_or_read(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, torch_dtype=np.float64)
    ways: list[dict[str, Any]] = [
        {"dtype": "float64", "mmap": False},
        {"dtype": "float64", "config": LlamaConfig(**SIZES)},
        {"dtype": "auto"},
    ]
    for options in ways:
        model = LlamaForCausalLM.from_pretrained(tmp_path, **options)
        np.testing.assert_array_equal(model(IDS).logits, plain(IDS).logits)
    assert LlamaForCausalLM.from_pretrained(tmp_path).dtype == np.float32


WHERE = {
    "revision": "main", "subfolder": "inner", "cache_dir": "x", "token": "y", "use_auth_token": "z",
    "local_files_only": True, "force_download": False, "resume_download": False, "proxies": None,
    "trust_remote_code": False,
}  # fmt: skip


def test_every_class_is_loaded_with_the_keywords_that_say_where(tmp_path: Path) -> None:
    tiny(vocab_size=300).save_pretrained(tmp_path / "inner")
    LlamaTokenizer(MODEL).save_pretrained(tmp_path / "inner")
    LlamaConfig(vocab_size=77).save_pretrained(tmp_path)  # must not be taken instead
    options: dict[str, Any] = WHERE
    assert LlamaConfig.from_pretrained(tmp_path, **options).vocab_size == 300
    assert LlamaConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **options)[1] == {}
    assert GenerationConfig.from_pretrained(tmp_path, **options)._from_model_config
    for model in (LlamaModel, LlamaForCausalLM):
        assert model.from_pretrained(tmp_path, **options).vocab_size == 300
        named = model.from_pretrained(tmp_path, config=str(tmp_path), **options)
        assert named.vocab_size == 300
    for cls in TOKENIZERS:
        assert (
            cls.from_pretrained(tmp_path, **options).vocab_size == LlamaTokenizer(MODEL).vocab_size
        )
    elsewhere = options | {"subfolder": "nowhere"}
    every: tuple[Any, ...] = (LlamaConfig, GenerationConfig, *MODELS, *TOKENIZERS)
    for kind in every:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            kind.from_pretrained(tmp_path, **elsewhere)


def test_what_can_only_have_one_value_is_taken_with_that_one(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(
        tmp_path, True, None, print, push_to_hub=False, variant=None, token="x",
        save_peft_format=False,
    )  # fmt: skip
    one_value: dict[str, Any] = {"load_in_8bit": False, "variant": None, "from_tf": False}
    one_value |= {"max_memory": {0: "1GB"}, "_fast_init": True}  # and those without effect
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype="float64", **one_value)
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)
    others: list[dict[str, Any]] = [{"load_in_8bit": True}, {"variant": "fp16"}]
    for options in others:
        with pytest.raises(NotImplementedError, match="from_pretrained has no"):
            LlamaForCausalLM.from_pretrained(tmp_path, **options)
    unsaved: list[dict[str, Any]] = [{"is_main_process": False}, {"variant": "fp16"}]
    for options in [*unsaved, {"push_to_hub": True}]:
        with pytest.raises(NotImplementedError, match="save_pretrained has no"):
            model.save_pretrained(tmp_path, **options)
    for small in (model.config, model.generation_config, LlamaTokenizer(MODEL)):
        small.save_pretrained(tmp_path, push_to_hub=False)
        with pytest.raises(NotImplementedError, match="push_to_hub"):
            small.save_pretrained(tmp_path, push_to_hub=True)


def test_several_labels_of_a_text_and_of_numbers_give_their_losses() -> None:
    three = tiny(LlamaForSequenceClassification, num_labels=3, pad_token_id=0)
    several = three(IDS, labels=np.array([[1.0, 0, 1], [0, 1, 0]]))
    x, y = several.logits, np.array([[1.0, 0, 1], [0, 1, 0]])
    close(several.loss, (np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * y).mean())
    assert three.config.problem_type == "multi_label_classification"
    one = tiny(LlamaForSequenceClassification, num_labels=1, pad_token_id=0)
    out = one(IDS, labels=np.array([0.5, -1.0]))
    close(out.loss, ((out.logits[:, 0] - np.array([0.5, -1.0])) ** 2).mean())


# ------------------------------------------------------------ facts about generate()


def scored(**options: Any) -> Any:
    asked = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    return tiny().generate(IDS, **({"max_new_tokens": 5} | asked | options))


def test_a_sequence_bias_is_added_where_its_sequence_would_end() -> None:
    plain, biased = scored(), scored(sequence_bias={(14, 8): 2.5, (6,): -1.25, (9, 9): 7})
    expected = plain.scores[0].copy()
    expected[:, 6] -= 1.25
    expected[0, 8] += 2.5  # the first prompt ends with 14
    close(biased.scores[0], expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_encoder_repetition_penalty_favours_the_words_of_the_prompt(num_beams: int) -> None:
    plain = scored(num_beams=num_beams).scores[0]
    favoured = scored(num_beams=num_beams, encoder_repetition_penalty=2.0).scores[0]
    for i, prompt in enumerate(np.repeat(IDS, num_beams, axis=0)):
        expected = plain[i].copy()
        seen = np.unique(prompt)
        expected[seen] = np.where(expected[seen] < 0, expected[seen] / 2, expected[seen] * 2)
        close(favoured[i], expected)


def test_no_ngram_of_the_prompt_comes_again() -> None:
    prompt = scored(max_new_tokens=20).sequences
    again = tiny().generate(
        prompt, max_new_tokens=8, eos_token_id=None, encoder_no_repeat_ngram_size=1
    )
    for old, row in zip(prompt, again, strict=True):
        assert not set(old) & set(row[prompt.shape[1] :])


def test_first_and_last_tokens_can_be_forced() -> None:
    options: dict[str, Any] = {"eos_token_id": None, "max_new_tokens": 4}
    found = tiny().generate(IDS[:, :1], forced_bos_token_id=11, **options)
    assert (found[:, 1] == 11).all()
    assert (tiny().generate(IDS, forced_eos_token_id=12, **options)[:, -1] == 12).all()
    placed = tiny().generate(IDS, forced_decoder_ids=[[6, 20], [8, 21]], **options)
    assert (placed[:, [6, 8]] == [20, 21]).all()


def test_suppressed_tokens_are_never_said_or_not_said_first() -> None:
    favourite = int(scored().sequences[0, 6])
    never = scored(suppress_tokens=[favourite])
    assert not (never.sequences[:, 6:] == favourite).any()
    later = scored(begin_suppress_tokens=[favourite])
    assert (later.scores[0][:, favourite] == -np.inf).all()
    assert np.isfinite(later.scores[1]).all()


def test_an_exponential_decay_makes_the_end_ever_likelier() -> None:
    model, options = tiny(), {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(
        IDS[:1], max_new_tokens=4, eos_token_id=30, min_new_tokens=0,
        exponential_decay_length_penalty=(1, 1.5), **options,
    )  # fmt: skip
    logits = model(out.sequences).logits[0, 5:]
    for step, scores in enumerate(out.scores):
        grown = 1.5 ** max(step - 1, 0) - 1
        close(scores[0, 30], logits[step, 30] + abs(logits[step, 30]) * grown)


def test_an_exponential_decay_leaves_a_forbidden_end_forbidden() -> None:
    options: dict[str, Any] = {"exponential_decay_length_penalty": (0, 1.5), "eos_token_id": 30}
    out = scored(max_new_tokens=4, min_new_tokens=4, **options)
    assert all(np.isneginf(scores[:, 30]).all() for scores in out.scores)
    assert not any(np.isnan(scores).any() for scores in out.scores)


def test_broken_scores_can_be_repaired_and_renormalized() -> None:
    state = tiny().state_dict() | {"model.norm.weight": np.full(24, np.nan)}
    repaired = scored(params=state, remove_invalid_values=True)
    assert all((scores == 0).all() for scores in repaired.scores)
    for scores in scored(renormalize_logits=True, repetition_penalty=1.5).scores:
        close(np.exp(scores).sum(axis=-1), 1)


def test_options_about_memory_and_other_architectures_change_no_text() -> None:
    plain = tiny().generate(IDS, max_new_tokens=5)
    for options in (
        {"low_memory": True},
        {"decoder_start_token_id": 4},
        {"max_time": 1000.0},
        {"num_assistant_tokens_schedule": "constant"},
    ):
        np.testing.assert_array_equal(tiny().generate(IDS, max_new_tokens=5, **options), plain)
    one = tiny().generate(IDS[:1], max_new_tokens=9)
    guessed = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    np.testing.assert_array_equal(tiny().generate(IDS[:1], max_new_tokens=9, **guessed), one)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "force_words_ids": [[5]]},
        {"num_beams": 3, "constraints": [object()]},
    ],
)
def test_strategies_that_are_not_offered_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"generate\(\) has no"):
        tiny().generate(IDS, **options)


def test_the_options_of_generate_are_saved_read_and_compared(tmp_path: Path) -> None:
    config = GenerationConfig(max_new_tokens=4, note="mine")
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path, top_k=7)
    assert (again.max_new_tokens, again.note, again.top_k) == (4, "mine", 7)
    assert GenerationConfig.from_dict(config.to_dict()) == config
    GenerationConfig(temperature=0.5).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.5
    version = {"transformers_version": "4.37.2"}
    assert config.to_diff_dict() == {"max_new_tokens": 4, "note": "mine"} | version
    assert repr(config) == 'GenerationConfig {\n  "max_new_tokens": 4,\n  "note": "mine"\n}\n'
    assert config.update(top_k=3, nonsense=1) == {"nonsense": 1}
    assert json.loads(config.to_json_string())["top_k"] == 3
    assert GenerationConfig.from_model_config(LlamaConfig(max_length=9)).max_length == 9
    config.save_pretrained(tmp_path, "mine.json")
    config.to_json_file(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == config.to_json_string()
    for name in ("mine.json", "again.json"):
        assert GenerationConfig.from_pretrained(tmp_path, name) == config
    read, unused = GenerationConfig.from_pretrained(
        tmp_path, "mine.json", return_unused_kwargs=True, top_k=7, revision="v2", cache_dir="x"
    )
    assert (read.top_k, unused) == (7, {})
    assert read.to_diff_dict() == config.to_diff_dict() | {"top_k": 7}
    derived = {"_from_model_config": True}  # such options become no others, as in 4.37.2
    read, unused = GenerationConfig.from_dict(derived, return_unused_kwargs=True, mine=1)
    assert (read, unused) == (GenerationConfig(), {"mine": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"early_stopping": "soon"},
        {"num_return_sequences": 3},
        {"num_return_sequences": 3, "num_beams": 2},
        {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0},
        {"num_beams": 4, "num_beam_groups": 2},
        {"streamer": None},
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(options)):
        GenerationConfig(**options)


def test_arguments_of_generate_have_the_positions_of_4_37_2() -> None:
    """inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn,
    synced_gpus, assistant_model, streamer, negative_prompt_ids, negative_prompt_attention_mask."""
    one, options = IDS[:1], {"max_new_tokens": 4, "guidance_scale": 2.5}
    negative = np.array([[4, 5]])
    found = tiny().generate(
        one, None, None, None, None, False, None, None, negative, np.array([[0, 1]]), **options
    )
    named = {"negative_prompt_ids": negative, "negative_prompt_attention_mask": np.array([[0, 1]])}
    np.testing.assert_array_equal(found, tiny().generate(one, **named, **options))
    with pytest.raises(NotImplementedError, match="synced_gpus"):
        tiny().generate(one, synced_gpus=True)


# ------------------------------------------------------------ facts about the tokenizers

MODEL = locate("fairytales") / "tokenizer.model"
BOTH = pytest.mark.parametrize("cls", TOKENIZERS)


@BOTH
def test_the_special_tokens_mask_is_one_where_control_tokens_are_put(cls: Any) -> None:
    tokenizer = cls(MODEL, add_eos_token=True)
    for a, b in (([5, 6], None), ([5, 6], [7])):
        built = tokenizer.build_inputs_with_special_tokens(a, b)
        mask = tokenizer.get_special_tokens_mask(a, b)
        assert [i in (1, 2) for i in built] == [bool(m) for m in mask]
    assert tokenizer.num_special_tokens_to_add() == 2
    tokenizer.model_max_length = 10
    assert (tokenizer.max_len_single_sentence, tokenizer.max_len_sentences_pair) == (8, 6)


@BOTH
def test_the_vocabulary_is_saved_under_a_prefix_byte_for_byte(cls: Any, tmp_path: Path) -> None:
    (path,) = cls(MODEL).save_vocabulary(str(tmp_path), filename_prefix="my")
    assert Path(path).name == "my-tokenizer.model"
    assert Path(path).read_bytes() == MODEL.read_bytes()


@BOTH
def test_spaces_before_punctuation_are_removed_if_the_constructor_says_so(cls: Any) -> None:
    ids = cls(MODEL).encode("What ? Yes , I 'm", add_special_tokens=False)
    assert cls(MODEL).decode(ids) == "What ? Yes , I 'm"
    assert cls(MODEL, clean_up_tokenization_spaces=True).decode(ids) == "What? Yes, I'm"
    assert cls.clean_up_tokenization("a !") == "a!"
    assert cls(MODEL).batch_decode([ids], clean_up_tokenization_spaces=True) == ["What? Yes, I'm"]


def test_spaces_stand_between_added_tokens_unless_the_call_says_otherwise() -> None:
    tokenizer = LlamaTokenizer(MODEL, legacy=False)
    tokenizer.add_tokens(["<|user|>"])
    ids = tokenizer.encode("hi<|user|>there", add_special_tokens=False)
    assert tokenizer.decode(ids) == "hi <|user|> there"
    assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "hi<|user|>there"


@BOTH
def test_special_tokens_are_listed_and_counted(cls: Any) -> None:
    tokenizer = cls(MODEL)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<|a|>"]})
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert tokenizer.special_tokens_map == names | {"additional_special_tokens": ["<|a|>"]}
    assert tokenizer.special_tokens_map_extended.keys() == tokenizer.special_tokens_map.keys()
    assert tokenizer.all_special_tokens == ["<s>", "</s>", "<unk>", "<pad>", "<|a|>"]
    assert [str(token) for token in tokenizer.all_special_tokens_extended] == (
        tokenizer.all_special_tokens
    )
    V = tokenizer.vocab_size
    assert tokenizer.all_special_ids == [1, 2, 0, V, V + 1]
    assert tokenizer.additional_special_tokens_ids == [V + 1]
    assert tokenizer.get_added_vocab().items() >= {("<pad>", V), ("<|a|>", V + 1)}
    assert tokenizer.added_tokens_encoder["<|a|>"] == V + 1
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (1, 2, 0)
    others = (tokenizer.sep_token, tokenizer.cls_token, tokenizer.mask_token)
    assert others == (None, None, None)
    assert tokenizer.is_fast is (cls is LlamaTokenizerFast)


@BOTH
def test_old_names_of_a_call_give_the_same(cls: Any) -> None:
    tokenizer = cls(MODEL)
    called = tokenizer("Once", "upon")
    assert tokenizer.encode_plus("Once", "upon") == called
    assert tokenizer.batch_encode_plus([("Once", "upon")])["input_ids"] == [called["input_ids"]]
    a, b = (tokenizer.encode(t, add_special_tokens=False) for t in ("Once", "upon"))
    assert tokenizer.prepare_for_model(a, b)["input_ids"] == called["input_ids"]
    cut = tokenizer.truncate_sequences([5, 6, 7], num_tokens_to_remove=2)
    assert cut[0] == [5]
    assert called.convert_to_tensors("np")["input_ids"].ndim == 1
    assert tokenizer("Once", return_length=True)["length"] in (len(a) + 1, [len(a) + 1])


def test_what_only_one_of_the_tokenizers_has() -> None:
    slow, fast = LlamaTokenizer(MODEL), LlamaTokenizerFast(MODEL)
    assert slow.unk_token_length == len(slow.sp_model.encode("<unk>"))
    assert fast.backend_tokenizer.get_vocab_size() == len(fast)
    assert fast.can_save_slow_tokenizer
    assert fast.slow_tokenizer_class is LlamaTokenizer
    batch = fast("Once", "upon")
    assert batch.sequence_ids()[1] == 0
    assert len(batch.word_ids()) == len(batch.tokens())


@BOTH
def test_a_text_longer_than_the_model_takes_is_told_once_and_not_cut(
    cls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = cls(MODEL, model_max_length=3)
    for _ in range(2):
        assert len(tokenizer.encode("Once upon a time")) > 3
    assert sum("longer than" in record.message for record in caplog.records) == 1


# ------------------------------------------------------------ facts about the conversion script


def test_metas_download_converts_with_the_tokenizer_of_the_folder_above(tmp_path: Path) -> None:
    params = {"dim": 48, "n_layers": 2, "n_heads": 12, "n_kv_heads": 12, "norm_eps": 1e-5}
    folder = tmp_path / "llama" / "7B"
    folder.mkdir(parents=True)
    weights = random_meta_model(params, 40, 2048, 0)
    (folder / "consolidated.00.pth").write_bytes(torch_file(weights))
    (folder / "params.json").write_text(json.dumps(params))
    (folder.parent / "tokenizer.model").write_bytes(MODEL.read_bytes())
    convert(folder, tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.max_position_embeddings == 4096  # LLaMA 2, by its norm_eps
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("Hey, are you conscious?", return_tensors="np")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs.input_ids.shape[1] + 2
    again = model(inputs.input_ids, use_cache=False).logits
    assert np.abs(again - model(**inputs).logits).max() <= TOLERANCE * np.abs(again).max()


def test_the_convert_command_has_the_arguments_that_the_table_names() -> None:
    command = build_parser().parse_args(["convert", "in", "out"])
    assert {"source", "out", "dtype", "max_shard_size"} <= vars(command).keys()
