"""A saved prefix changes nothing but the time, and belongs to one model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_np import KVCache, generate, load
from llama_np.cli import main
from llama_np.errors import CheckpointError
from llama_np.generate import prefill
from llama_np.prompt_cache import keep_common_prefix, load_cache, save_cache

CONFIG, WEIGHTS = load("fairytales", np.float64)
PREFIX = [1, 403, 88, 1207, 19, 640]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cache = KVCache(CONFIG, dtype=np.float64)
    prefill([PREFIX], WEIGHTS, CONFIG, cache)
    save_cache(tmp_path / "prefix.cache", cache, PREFIX, WEIGHTS, CONFIG)
    return tmp_path / "prefix.cache"


@pytest.mark.parametrize("rest", [[7, 300], [12], []])
def test_a_prompt_that_goes_on_from_a_saved_prefix_gives_the_same_tokens(
    saved: Path, rest: list[int]
) -> None:
    prompt = PREFIX + rest
    cache, ids = load_cache(saved, WEIGHTS, CONFIG)
    assert keep_common_prefix(cache, ids, prompt) == min(len(PREFIX), len(prompt) - 1)
    (warm,) = generate([prompt], WEIGHTS, CONFIG, max_new_tokens=5, cache=cache)
    assert warm == generate([prompt], WEIGHTS, CONFIG, max_new_tokens=5)[0]


def test_a_prompt_that_differs_uses_what_is_common(saved: Path) -> None:
    prompt = [*PREFIX[:3], 999, 5]
    cache, ids = load_cache(saved, WEIGHTS, CONFIG)
    assert keep_common_prefix(cache, ids, prompt) == 3
    (warm,) = generate([prompt], WEIGHTS, CONFIG, max_new_tokens=5, cache=cache)
    assert warm == generate([prompt], WEIGHTS, CONFIG, max_new_tokens=5)[0]


def test_a_cache_of_another_model_is_refused(saved: Path) -> None:
    changed = dict(WEIGHTS) | {"model.norm.weight": WEIGHTS["model.norm.weight"] * 2}
    with pytest.raises(CheckpointError, match="another model"):
        load_cache(saved, changed, CONFIG)
    with pytest.raises(CheckpointError, match="another model"):
        load_cache(saved, WEIGHTS, replace(CONFIG, rope_theta=500.0))


def test_other_files_are_refused(tmp_path: Path) -> None:
    from llama_np.weights import save_tensors

    save_tensors(tmp_path / "x.safetensors", {"a": np.ones(3)})
    with pytest.raises(CheckpointError, match="no prompt cache"):
        load_cache(tmp_path / "x.safetensors", WEIGHTS, CONFIG)
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "missing", WEIGHTS, CONFIG)


def test_only_a_single_row_of_known_tokens_is_saved(tmp_path: Path) -> None:
    cache = KVCache(CONFIG, dtype=np.float64)
    prefill([PREFIX], WEIGHTS, CONFIG, cache)
    with pytest.raises(ValueError, match="expected 1 of 2"):
        save_cache(tmp_path / "x", cache, PREFIX[:2], WEIGHTS, CONFIG)


def test_the_command_saves_and_loads_a_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "king.cache")
    texts = []
    for option in ([], ["--save-cache", file], ["--load-cache", file]):
        assert main(["generate", "The king of the wood", "-n", "6", "--json", *option]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1] == texts[2]
    assert main(["generate", "x", "--save-cache", file]) == 1
    assert "exists" in capsys.readouterr().err
