"""The recorded outputs are whole: nothing missing, nothing changed, every case well formed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from recorded import FOLDER, Recorded, ids, manifest, one, recorded

from llama_np.activations import ACTIVATIONS

EVERY = [Recorded(name, entry) for name, entry in manifest()["cases"].items()]
ARRAYS = [case for case in EVERY if case.entry["call"] != "tokenizer"]
TOKENIZERS = [case for case in EVERY if case.entry["call"] == "tokenizer"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_is_the_one_that_was_recorded() -> None:
    found = {
        path.relative_to(FOLDER).as_posix(): sha256(path)
        for path in (FOLDER / "cases").rglob("*")
        if path.is_file()
    }
    assert found == manifest()["files"]


def test_the_recordings_are_small() -> None:
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 14e6  # they travel with every clone


def test_the_bundled_checkpoint_is_the_one_that_was_recorded() -> None:
    folder = one("bundled-logits-1").weights_folder
    found = {name: sha256(folder / name) for name in manifest()["bundled"]}
    again = "record again: python reference_outputs/record.py --only 'bundled-*' 'tokenizer-*'"
    assert found == manifest()["bundled"], again


def test_the_manifest_names_its_makers() -> None:
    environments = manifest()["environments"]
    assert environments["4.37.2"]["packages"]["transformers"] == "4.37.2"
    for made in environments.values():
        assert made["command"].startswith("python reference_outputs/record.py")
        assert {"numpy", "sentencepiece", "tokenizers", "torch"} <= made["packages"].keys()
    assert {case.entry["environment"] for case in EVERY} == environments.keys()


def test_the_cases_cover_the_api() -> None:
    assert len(recorded("forward")) > 90
    assert len(recorded("generate")) > 40
    assert {case.config["hidden_act"] for case in EVERY if case in ARRAYS} >= set(ACTIVATIONS)
    assert {case.entry["class"] for case in EVERY} >= {
        "LlamaModel",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "LlamaTokenizer",
        "LlamaTokenizerFast",
    }


@pytest.mark.parametrize("case", ARRAYS, ids=ids(ARRAYS))
def test_every_case_is_well_formed(case: Recorded) -> None:
    for kind, arrays in (("inputs", case.inputs()), ("outputs", case.outputs())):
        described = {k: f"{a.dtype} {list(a.shape)}" for k, a in arrays.items()}
        assert described == case.entry[kind]
    assert case.entry["shows"] and case.entry["arguments"]
    assert case.entry["implementation"].endswith(", eager")
    assert (case.weights_folder / "model.safetensors").is_file()
    rows = case.rows()
    assert rows is None or rows.any()


@pytest.mark.parametrize("case", ARRAYS, ids=ids(ARRAYS))
def test_every_output_is_a_number(case: Recorded) -> None:
    for name, array in case.outputs().items():
        if name == "scores":  # a forbidden token scores -inf
            assert not np.isnan(array).any() and not np.isposinf(array).any()
        elif case.name != "loss-nothing":  # no label, no mean
            assert np.isfinite(array).all()


@pytest.mark.parametrize("case", ARRAYS, ids=ids(ARRAYS))
def test_no_recorded_number_hangs_on_rounding(case: Recorded) -> None:
    # The tolerance of 2e-5 leaves every case at least five times what rounding the weights does.
    assert case.entry["sensitivity"] < 4e-6


@pytest.mark.parametrize("case", TOKENIZERS, ids=ids(TOKENIZERS))
def test_every_tokenizer_call_has_one_answer(case: Recorded) -> None:
    assert case.tokenizer_file.is_file()
    for call in case.calls():
        assert call.keys() - {"method", "arguments", "keywords"} in ({"result"}, {"raises"})


def test_models_have_the_shapes_that_their_configs_say() -> None:
    for folder in sorted((FOLDER / "cases" / "_models").iterdir()):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        case = next(case for case in ARRAYS if case.weights_folder.name == folder.name)
        weights = case.weights()
        sizes = (config["vocab_size"], config["hidden_size"])
        assert weights["model.embed_tokens.weight"].shape == sizes
        norms = np.concatenate([w for name, w in weights.items() if "norm" in name])
        assert norms.min() < -0.5 and norms.max() > 1.5  # a dropped norm weight shows
