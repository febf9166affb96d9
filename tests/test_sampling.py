"""Facts about choosing tokens. The numbers of the ties come from transformers 4.37.2."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llama_np import sampling
from llama_np.layers import softmax
from llama_np.sampling import Sampling

LOGITS = arrays(np.float32, (3, 11), elements=st.floats(-8, 8, width=32))


def kept(logits: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(logits)).tolist()


def log(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))  # the boundary cases hold in float32


def test_top_k_keeps_all_ties_at_the_threshold() -> None:
    assert kept(sampling.top_k(np.array([1.0, 3, 3, 3, 0]), 2)) == [1, 2, 3]


def test_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    assert kept(sampling.top_k(np.array([1.0, 3, 2]), 99)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.5, [0]), (0.51, [0, 1]), (0.8, [0, 1]), (0.81, [0, 1, 2]), (1e-9, [0]), (1, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_token_that_crosses_the_boundary(p: float, expected: list[int]) -> None:
    assert kept(sampling.top_p(log(0.5, 0.3, 0.15, 0.05), p)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.3, [2, 3]), (0.6, [1, 2, 3])])
def test_top_p_among_equals_keeps_the_highest_ids(p: float, expected: list[int]) -> None:
    assert kept(sampling.top_p(np.zeros(4), p)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.29, [0, 1, 2]), (0.31, [0, 1]), (1.0, [0])])
def test_min_p_compares_with_the_likeliest_token(p: float, expected: list[int]) -> None:
    assert kept(sampling.min_p(log(0.5, 0.3, 0.15, 0.05), p)) == expected


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    seen = sampling.seen_tokens([[0, 1, 1, 2]], 4)
    penalized = sampling.repetition_penalty(np.array([[2.0, -2, 0, 4]]), seen, 2.0)
    np.testing.assert_array_equal(penalized, [[1, -4, 0, 4]])


@given(LOGITS, st.integers(1, 11), st.floats(0.01, 1), st.floats(0.1, 3))
def test_warpers_keep_the_likeliest_token_and_the_dtype(
    logits: np.ndarray, k: int, p: float, t: float
) -> None:
    for warped in (
        sampling.temperature(logits, t),
        sampling.top_k(logits, k),
        sampling.top_p(logits, p),
        sampling.min_p(logits, p),
        sampling.typical_p(logits, p),
    ):
        assert warped.dtype == np.float32
        assert np.isfinite(warped).any(axis=-1).all()
    best = logits.max(axis=-1)
    for warped in (sampling.top_k(logits, k), sampling.top_p(logits, p), sampling.min_p(logits, p)):
        np.testing.assert_array_equal(warped.max(axis=-1), best)


@given(LOGITS)
def test_everything_switched_off_changes_nothing(logits: np.ndarray) -> None:
    seen = np.ones(logits.shape, bool)
    np.testing.assert_array_equal(sampling.warp(logits, Sampling(temperature=1.0), seen), logits)


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.1, 0.0, 0.6, 0.3])
    with np.errstate(divide="ignore"):
        logits = np.broadcast_to(np.log(probabilities), (20_000, 4))
    drawn = sampling.draw(logits, np.random.default_rng(0).random(20_000))
    counts = np.bincount(drawn, minlength=4)
    assert counts[1] == 0
    expected = probabilities[[0, 2, 3]] * 20_000
    chi_square = ((counts[[0, 2, 3]] - expected) ** 2 / expected).sum()
    assert chi_square < 13.8  # 99.9 % quantile for two degrees of freedom; the seed is fixed


@given(LOGITS, st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3))
def test_a_draw_depends_on_its_own_row_only(logits: np.ndarray, uniform: list[float]) -> None:
    together = sampling.draw(logits, np.array(uniform))
    alone = [sampling.draw(row, np.array(u)) for row, u in zip(logits, uniform, strict=True)]
    np.testing.assert_array_equal(together, alone)


def test_extreme_uniform_numbers_draw_possible_tokens() -> None:
    logits = np.array([-np.inf, 0.0, 0.0, -np.inf])
    assert sampling.draw(logits, np.array(0.0)) == 1
    assert sampling.draw(logits, np.array(np.nextafter(1, 0))) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_numbers_out_of_range_are_value_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"top_k": 1.5}, {"temperature": "1"}, {"top_p": True}])
def test_other_types_are_type_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_nan_logits_are_reported_and_nothing_is_drawn_from_nothing() -> None:
    with pytest.raises(FloatingPointError, match="NaN"):
        sampling.check_drawable(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="forbidden"):
        sampling.check_drawable(np.full((1, 3), -np.inf))


@pytest.mark.parametrize("t", [1e-40, 1e-320])
def test_a_tiny_temperature_is_greedy(t: float) -> None:
    logits = np.array([[1.0, 3.0, 2.0], [-5.0, -7.0, -np.inf]], np.float32)
    sharp = sampling.temperature(logits, t)
    assert sharp.dtype == logits.dtype
    np.testing.assert_array_equal(softmax(sharp), [[0, 1, 0], [1, 0, 0]])
