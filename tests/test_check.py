"""Every exercise accepts the right answer, refuses each known mistake, and names it."""

from itertools import pairwise

import numpy as np
import pytest

from llama_np.check import EXERCISES, Exercise, Mistake, check, examine

MISTAKES = [(e, m) for e in EXERCISES.values() for m in e.mistakes]


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda e: e.name)
def test_the_library_answers_its_own_exercises(exercise: Exercise) -> None:
    assert examine(exercise, exercise.reference).passed


@pytest.mark.parametrize(
    ("exercise", "mistake"), MISTAKES, ids=[f"{e.name}-{m.id}" for e, m in MISTAKES]
)
def test_every_listed_mistake_fails_and_is_named(exercise: Exercise, mistake: Mistake) -> None:
    with np.errstate(over="ignore"):
        result = examine(exercise, mistake.answer)
    assert result.passed is False
    assert result.mistake == mistake.id


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda e: e.name)
def test_a_stub_is_not_attempted(exercise: Exercise) -> None:
    def stub(*arguments: object) -> np.ndarray:
        raise NotImplementedError

    assert examine(exercise, stub).passed is None


def test_a_wrong_shape_is_reported_first_and_in_axis_letters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check("rms_norm", lambda x, weight, eps: x[0])
    assert "expected (B, T, D) = (2, 3, 8)" in capsys.readouterr().out


def test_an_unknown_mistake_is_said_to_be_unknown() -> None:
    result = examine(EXERCISES["rms_norm"], lambda x, weight, eps: x * weight * 0.5)
    assert result.passed is False
    assert result.mistake is None
    assert "no known mistake" in result.details[-1]


def test_an_attempt_that_changes_its_input_is_judged_by_its_result() -> None:
    def in_place(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        x *= weight
        return x

    assert examine(EXERCISES["rms_norm"], in_place).passed


def test_the_names_of_mistakes_are_unique_within_an_exercise() -> None:
    for exercise in EXERCISES.values():
        ids = sorted(mistake.id for mistake in exercise.mistakes)
        assert all(a != b for a, b in pairwise(ids))
        assert len(ids) >= 3


def test_a_list_of_ids_is_an_answer_even_if_it_is_empty() -> None:
    right = EXERCISES["encode"].reference
    assert examine(EXERCISES["encode"], lambda *inputs: right(*inputs).tolist()).passed


def test_several_results_may_come_as_a_list() -> None:
    right = EXERCISES["store"].reference
    assert examine(EXERCISES["store"], lambda *inputs: list(right(*inputs))).passed


def test_missing_parameters_are_said() -> None:
    result = examine(EXERCISES["rms_norm"], lambda x: x)
    assert result.passed is False
    assert "called with 3 arguments: too many positional arguments" in result.message


def test_rounding_to_float32_is_recognized() -> None:
    def narrow(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        return np.asarray(right(x.astype(np.float32), weight.astype(np.float32), eps))

    right = EXERCISES["rms_norm"].reference
    assert "rounding to float32" in examine(EXERCISES["rms_norm"], narrow).details[-1]
