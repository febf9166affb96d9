"""Losses against their definitions, written out in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import QUICK

from llama_np.errors import ConfigError
from llama_np.losses import (
    IGNORED,
    binary_cross_entropy,
    classification_loss,
    cross_entropy,
    infer_problem_type,
    next_token_loss,
)

# A float32 mean of fewer than 100 terms, each rounded a few times, with logits up to about 10.
TOLERANCE = 2e-6


@st.composite
def logits_and_labels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    B, T, V = (draw(st.integers(1, n)) for n in (3, 6, 7))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    labels = rng.integers(0, V, (B, T))
    labels[rng.random((B, T)) < draw(st.sampled_from([0.0, 0.4]))] = IGNORED
    return rng.normal(0, 3, (B, T, V)).astype(np.float32), labels


@QUICK
@given(pair=logits_and_labels())
def test_language_model_loss_is_the_mean_surprise_of_the_next_token(pair: Any) -> None:
    logits, labels = pair
    surprises = []
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for scores, target in zip(row[:-1], targets[1:], strict=True):
            if target != IGNORED:
                total = math.fsum(math.exp(score) for score in scores)
                surprises.append(math.log(total) - scores[target])
    loss = next_token_loss(logits, labels)
    assert loss.shape == ()
    assert loss.dtype == np.float32
    if surprises:
        assert loss == pytest.approx(np.mean(surprises), rel=TOLERANCE, abs=TOLERANCE)
    else:
        assert math.isnan(loss)


def test_the_first_label_and_ignored_labels_do_not_matter() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 4, 5))
    labels = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    other = labels.copy()
    other[:, 0] = 4
    assert next_token_loss(logits, labels) == next_token_loss(logits, other)
    other[1] = IGNORED
    assert next_token_loss(logits, other) == pytest.approx(next_token_loss(logits[:1], labels[:1]))


@pytest.mark.parametrize("label", [5, -1, -99])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    with pytest.raises(IndexError, match=str(label)):
        cross_entropy(np.zeros((2, 5)), np.array([1, label]))


def test_labels_of_another_shape_or_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        next_token_loss(np.zeros((1, 3, 5)), np.zeros((1, 2), int))
    with pytest.raises(TypeError, match="integers"):
        next_token_loss(np.zeros((1, 3, 5)), np.zeros((1, 3)))


def test_binary_cross_entropy_is_the_mean_over_all_labels_without_overflow() -> None:
    logits = np.array([[-3.0, 0.5], [2.0, -700.0]])
    labels = np.array([[0.0, 1.0], [0.25, 0.0]])
    p = 1 / (1 + np.exp(-logits))
    p[1, 1] = math.exp(-700)
    expected = -(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean()
    assert binary_cross_entropy(logits, labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "num_labels", "kind"),
    [
        (np.zeros(3), 1, "regression"),
        (np.zeros(3, int), 1, "regression"),
        (np.zeros(3, int), 4, "single_label_classification"),
        (np.zeros((3, 1), np.int32), 4, "single_label_classification"),
        (np.zeros((3, 4)), 4, "multi_label_classification"),
        (np.zeros((3, 4), int), 4, "multi_label_classification"),
    ],
)
def test_the_kind_of_problem_follows_from_the_labels(
    labels: np.ndarray, num_labels: int, kind: str
) -> None:
    assert infer_problem_type(labels, num_labels) == kind


def test_regression_is_the_mean_squared_error() -> None:
    logits = np.array([[1.0], [2.0]])
    for labels in (np.array([0.0, 4.0]), np.array([[0], [4]])):
        assert classification_loss(logits, labels, "regression") == 2.5
    several = np.array([[1.0, 2.0]])
    assert classification_loss(several, np.array([[2.0, 4.0]]), "regression") == 2.5
    with pytest.raises(ValueError, match="shape"):
        classification_loss(several, np.array([1.0]), "regression")


def test_classification_losses_check_their_labels() -> None:
    logits = np.zeros((3, 4))
    single = "single_label_classification"
    for labels in (np.array([0, 1, 2]), np.array([[0], [1], [2]], np.int32)):
        assert classification_loss(logits, labels, single) == pytest.approx(math.log(4))
    with pytest.raises(ValueError, match="shape"):
        classification_loss(logits, np.array([0, 1]), single)
    with pytest.raises(ValueError, match="shape"):
        classification_loss(logits, np.zeros((3, 3)), "multi_label_classification")
    with pytest.raises(ConfigError):
        classification_loss(logits, np.zeros((3, 3)), "guessing")
