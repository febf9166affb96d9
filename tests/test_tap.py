"""Taps look at named arrays, and may exchange them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import B, T, random_tokens, random_weights, tiny_model

from llama_np import hidden_states, logits
from llama_np.precision import round_bf16, round_f16
from llama_np.tap import NO_TAP, Tap, chain, each, record, replace, stopwatch, within

CONFIG, WEIGHTS = tiny_model()
TOKENS = random_tokens(CONFIG)


def run(tap: Tap = NO_TAP, weights: Any = WEIGHTS) -> np.ndarray:
    return logits(hidden_states(TOKENS, weights, CONFIG, tap=tap), weights, tap)


def recorded(weights: Any = WEIGHTS) -> dict[str, np.ndarray]:
    trace: dict[str, np.ndarray] = {}
    run(record(trace), weights)
    return trace


def test_recording_changes_no_bit() -> None:
    np.testing.assert_array_equal(recorded()["lm_head"], run())


def test_record_keeps_only_the_wanted_names() -> None:
    trace: dict[str, np.ndarray] = {}
    run(record(trace, ["lm_head", "model.layers.1.mlp", "no such name"]))
    assert trace.keys() == {"lm_head", "model.layers.1.mlp"}


def test_a_stopwatch_says_for_every_name_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 11.0, 11.5, 13.5, 13.5, 17.5, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    spent: dict[str, float] = {}
    tap = stopwatch(spent)  # at 10
    array = np.ones(3)
    for name in ("a", "b", "a"):  # at 11, 13.5 and 17.5; it goes on at 11.5, 13.5 and 20
        assert tap(name, array) is array
    assert spent == {"a": 1.0 + 4.0, "b": 2.0}


def test_a_stopwatch_knows_every_name() -> None:
    spent: dict[str, float] = {}
    np.testing.assert_array_equal(run(stopwatch(spent)), run())
    assert spent.keys() == recorded().keys()
    assert min(spent.values()) > 0


def test_recorded_arrays_are_not_changed_by_later_layers_or_runs() -> None:
    copies: dict[str, np.ndarray] = {}
    trace: dict[str, np.ndarray] = {}

    def copy(name: str, array: np.ndarray) -> np.ndarray:
        copies[name] = array.copy()
        return array

    run(chain(record(trace), copy))
    run()
    for name, array in trace.items():
        np.testing.assert_array_equal(array, copies[name])


def test_recorded_arrays_refer_to_no_weight() -> None:
    """Whoever edits a trace must not edit the model."""
    for name, array in recorded().items():
        for weight in WEIGHTS.values():
            assert isinstance(weight, dict) or not np.shares_memory(array, weight), name


@pytest.mark.parametrize("name", recorded())
def test_every_name_that_is_recorded_can_be_replaced(name: str) -> None:
    """The replaced array is what the rest of the model computes with."""
    trace = recorded()
    other = np.random.default_rng(0).normal(size=trace[name].shape)
    assert np.abs(run(replace({name: other})) - trace["lm_head"]).max() > 1e-3
    np.testing.assert_array_equal(run(replace({name: trace[name]})), trace["lm_head"])


def test_replacing_a_block_cuts_off_everything_before_it() -> None:
    cut = replace({"model.layers.1": recorded()["model.layers.1"]})
    noise = replace({"model.embed_tokens": np.ones((B, T, CONFIG.hidden_size))})
    np.testing.assert_array_equal(run(chain(noise, cut)), run())


def test_each_passes_every_array_through_a_function() -> None:
    doubled = each(lambda array: array * 2)("any", np.ones(3))
    np.testing.assert_array_equal(doubled, [2, 2, 2])
    shapes: list[tuple[int, ...]] = []

    def note(array: np.ndarray) -> np.ndarray:
        shapes.append(array.shape)
        return array

    run(each(note))
    assert sorted(shapes) == sorted(array.shape for array in recorded().values())


@pytest.mark.parametrize("rounding", [round_bf16, round_f16])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_every_array_emulates_low_precision(rounding: Any, dtype: Any) -> None:
    """bfloat16 keeps 8 bits (0.4 %), float16 11; three sharp layers make that ten times larger."""
    weights = random_weights(CONFIG, dtype=dtype)
    trace: dict[str, np.ndarray] = {}
    low = run(chain(each(rounding), record(trace)), weights)
    assert low.dtype == dtype and np.isfinite(low).all()
    for name, array in trace.items():
        np.testing.assert_array_equal(array, rounding(array), err_msg=name)
    error = np.linalg.norm(low - run(weights=weights)) / np.linalg.norm(low)
    assert 1e-5 < error < 0.2


def test_a_chain_goes_from_left_to_right() -> None:
    add, double = each(lambda a: a + 1), each(lambda a: a * 2)
    np.testing.assert_array_equal(chain(add, double)("x", np.array([3])), [8])
    np.testing.assert_array_equal(chain(double, add)("x", np.array([3])), [7])
    np.testing.assert_array_equal(chain()("x", np.array([3])), [3])


def test_within_puts_a_prefix_before_every_name() -> None:
    trace: dict[str, np.ndarray] = {}
    within("model.layers.3.", record(trace))("mlp", np.zeros(1))
    assert list(trace) == ["model.layers.3.mlp"]
    assert within("model.layers.3.", NO_TAP) is NO_TAP
