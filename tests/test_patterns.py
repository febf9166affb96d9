"""What kernels' mistakes leave behind is said in words."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from golden_models import dump, golden, plain, tiny
from hypothesis import given
from hypothesis import strategies as st

from llama_np.experiment import INPUT_OF, Op, Place, split_name
from llama_np.explain import explain
from llama_np.patterns import end_of_sum, listed, traces, wrong_channels, wrong_rows
from llama_np.precision import round_bf16
from llama_np.replay import Fault, replay

LIMIT = 1e-6  # of float32, about eight roundings
Change = Callable[[np.ndarray], np.ndarray]


def truth(rows: int = 7, channels: int = 24) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, channels))


def said(change: Change, width: int = 0) -> list[str]:
    return list(traces(change(truth().copy()), truth(), LIMIT, width))


def zeroed(rows: slice, channels: slice) -> Change:
    def change(x: np.ndarray) -> np.ndarray:
        x[rows, channels] = 0
        return x

    return change


def test_what_is_right_or_differs_everywhere_leaves_no_trace() -> None:
    assert said(lambda x: x * (1 + LIMIT / 2)) == []
    assert said(lambda x: x[:, ::-1]) == []
    assert said(np.tanh) == []


@pytest.mark.parametrize("rows", [slice(4, 5), slice(0, None)])
@pytest.mark.parametrize("channels", [slice(16, None), slice(0, None)])
def test_what_was_never_written_is_0(rows: slice, channels: slice) -> None:
    assert said(zeroed(rows, channels)) == ["what is wrong is 0: never written?"]


@given(st.floats(0.01, 100).filter(lambda c: abs(c - 1) > 1e-3))
def test_a_factor_is_named(factor: float) -> None:
    (words,) = said(lambda x: x * factor)
    assert float(words.split(" times")[0]) == pytest.approx(factor, rel=1e-4)  # five digits
    assert words.endswith("times what it should be")


def test_a_factor_of_some_rows_is_named() -> None:
    assert said(lambda x: np.concatenate([x[:3], -x[3:]])) == ["-1 times what it should be"]


@pytest.mark.parametrize(("off", "words"), [(3.2e-5, "1 + 3.2e-05"), (-4e-4, "1 - 4.0e-04")])
def test_a_factor_near_1_is_told_from_1(off: float, words: str) -> None:
    assert said(lambda x: x * (1 + off)) == [f"{words} times what it should be"]


def test_a_few_plain_numbers_are_in_no_format() -> None:
    assert said(np.ones_like) == []  # every format has 1


@pytest.mark.parametrize("width", [0, 8])
def test_factors_of_their_own_are_named(width: int) -> None:
    each = np.linspace(0.5, 0.75, truth().size // (width or 24))[:, None]
    (words,) = said(lambda x: (x.reshape(len(each), -1) * each).reshape(x.shape), width)
    assert "its own factor, 0.5 to 0.75" in words


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_numbers_of_another_format_are_named(name: str) -> None:
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[name]
    assert said(lambda x: x.astype(dtype).astype(np.float64)) == [f"holds {name} numbers"]


@given(st.integers(0, 23), st.integers(1, 12))
def test_wrong_channels_in_one_piece_are_found(first: int, count: int) -> None:
    mine, wrong = truth(), tuple(range(24))[first : first + count]
    mine[:, wrong] += 1
    assert wrong_channels(mine, truth(), LIMIT) == wrong


def test_many_scattered_channels_are_not_listed() -> None:
    mine = truth()
    mine[:, ::3] += 1
    assert wrong_channels(mine, truth(), LIMIT) == ()


def test_wrong_rows_are_found() -> None:
    mine = truth()
    mine[[2, 5]] += 1
    assert wrong_rows(mine, truth(), LIMIT).tolist() == [2, 5]


@given(st.integers(1, 23))
def test_the_end_of_a_sum_is_found(n: int) -> None:
    x, weight = truth(), truth(13)
    assert end_of_sum(x, weight, x[:, :n] @ weight[:, :n].T, LIMIT) == n


def test_a_whole_sum_has_no_early_end() -> None:
    x, weight = truth(), truth(13)
    assert end_of_sum(x, weight, x @ weight.T, LIMIT) == 0
    assert end_of_sum(x, weight, x @ weight.T + 1, LIMIT) == 0


def test_indices_are_listed_for_people() -> None:
    assert listed("channel", (3,)) == "channel 3"
    assert listed("channel", (3, 4)) == "channels 3, 4"
    assert listed("channel", tuple(range(192, 240))) == "channels 192 to 239"
    assert listed("channel", tuple(range(0, 20, 2))) == "channels 0, 2, 4, 6, 8, 10, 12, 14, ..."


def faulty(local: str, op: Op) -> Fault:
    """The first fault of a run with that op in place of an array; no other array may be faulty."""
    found = replay(dump(plain().with_op_map({local: op})), tiny())
    assert {split_name(f.op)[1] for f in found.faulty} == {local}
    assert not found.notes and found.faulty[0].pattern in str(found)
    assert found.as_dict()["faulty"][0].get("traces", []) == list(found.faulty[0].traces)
    return found.faulty[0]


def test_a_norm_that_divides_by_a_padded_width_is_off_by_one_factor() -> None:
    D = tiny()[0].hidden_size
    padded = faulty("model.norm", lambda array, _: array * np.sqrt((D + 8) / D))
    assert padded.pattern == f"{np.sqrt((D + 8) / D):.5g} times what it should be"


def test_a_softmax_that_divides_by_too_much_shrinks_every_vector_by_its_own_factor() -> None:
    def shrunk(array: np.ndarray, place: Place) -> np.ndarray:
        e = np.exp(place.seen["self_attn.weights"].max(axis=-1))  # any number per head and token
        factors = np.moveaxis(1 / (1 + e), 1, 2)[..., None]
        return (array.reshape(*factors.shape[:3], -1) * factors).reshape(array.shape)

    assert "look at what it is divided by" in faulty("self_attn.context", shrunk).pattern


def test_a_kernel_that_leaves_out_the_last_columns_leaves_zeros() -> None:
    F = tiny()[0].intermediate_size

    def cut(array: np.ndarray, _: Place) -> np.ndarray:
        return np.where(np.arange(F) < F - 4, array, 0)

    where = f"only in channels {F - 4} to {F - 1}; what is wrong is 0: never written?"
    assert faulty("mlp.up_proj", cut).pattern == where


@pytest.mark.parametrize("local", ["mlp.down_proj", "self_attn.q_proj"])
def test_a_sum_that_ends_too_early_is_named(local: str) -> None:
    def short(array: np.ndarray, place: Place) -> np.ndarray:
        x, w = place.seen[INPUT_OF[local]], place.w[f"{local}.weight"]
        return array - x[..., -3:] @ w[:, -3:].T

    n = expected_inputs(local)
    assert faulty(local, short).right_with == f"the first {n - 3} of {n} inputs"


def expected_inputs(local: str) -> int:
    config = tiny()[0]
    return int(config.intermediate_size if local == "mlp.down_proj" else config.hidden_size)


def test_a_residual_in_two_bytes_is_named() -> None:
    fault = faulty("middle", lambda array, _: round_bf16(array))
    assert fault.pattern == "holds bfloat16 numbers"


def test_explain_says_what_the_faulty_ops_leave_behind() -> None:
    run = plain().with_op_map({"model.norm": lambda array, _: array * 1.25})
    found = explain(golden(), dump(run), model=tiny())
    assert found.verdict == "unexplained"
    assert found.notes[1] == "  model.norm: 1.25 times what it should be"
