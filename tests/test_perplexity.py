"""Likelihoods are those of the model, whatever batch a text is in."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_np import hidden_states, load, load_tokenizer, logits
from llama_np.cli import main
from llama_np.perplexity import batches, score

CONFIG, WEIGHTS = load("fairytales", np.float64)
ROWS = st.lists(
    st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=12), min_size=1, max_size=6
)


def directly(row: list[int]) -> float:
    scores = logits(hidden_states(np.array([row]), WEIGHTS, CONFIG), WEIGHTS)[0]
    chances = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    return float(sum(np.log(chances[i, token]) for i, token in enumerate(row[1:])))


@settings(max_examples=20)
@given(ROWS)
def test_every_text_gets_its_own_likelihood_in_any_batch(rows: list[list[int]]) -> None:
    for row, found in zip(rows, score(rows, WEIGHTS, CONFIG), strict=True):
        assert found.log_likelihood == pytest.approx(directly(row), abs=1e-10)  # float64
        assert found.token_count == len(row) - 1


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(50, 200), st.integers(0, 60))
def test_batches_hold_every_text_once_and_stay_within_the_limits(
    lengths: list[int], limit: int, padding: int
) -> None:
    found = list(batches(lengths, limit, padding))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= limit
        assert padded - sum(lengths[i] for i in batch) <= padding


def test_perplexity_is_the_inverse_geometric_mean_of_the_probabilities() -> None:
    (found,) = score([[1, 7, 9]], WEIGHTS, CONFIG)
    assert found.perplexity == pytest.approx(math.exp(-directly([1, 7, 9]) / 2))
    (single,) = score([[1]], WEIGHTS, CONFIG)
    assert math.isnan(single.perplexity)


@pytest.mark.parametrize("row", [[], [1] * (CONFIG.max_position_embeddings + 1)])
def test_texts_that_do_not_fit_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="text 1"):
        score([[1, 2], row], WEIGHTS, CONFIG)


def test_the_command_answers_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Once upon a time there was a king.", "xq zzv wwk", "", "The king said"]
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    assert main(["score", str(file), "--dtype", "float64"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == [line for line in lines if line]
    tokenizer = load_tokenizer("fairytales")
    for row in rows:
        expected = directly(tokenizer.encode(row["text"]))
        assert row["log_likelihood"] == pytest.approx(expected, abs=1e-8)
        assert row["perplexity"] > 1
