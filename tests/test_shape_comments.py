"""The shape comments of the forward pass are executed, so they are true."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import numpy as np
import pytest
from models import SCALINGS, random_tokens, tiny_model
from shape_comments import (
    Seen,
    comments_of,
    faults_of,
    fits,
    lacking_comments,
    source_of,
    watch,
    wrong_comments,
)

from llama_np import layers, model, rope
from llama_np.cache import KVCache

MODULES = [layers, rope, model]
AXES = {
    "B": 3, "T": 4, "S": 11, "D": 24, "F": 26, "V": 37, "N": 14, "K": 2, "G": 7, "H": 10, "C": 13,
}  # fmt: skip
COMPOSED = {
    "N*H": 140, "K*H": 20, "G*T": 28, "H/2": 5,
}  # fmt: skip
ONE_PASS = AXES | {"S": AXES["T"]}  # without a cache, only the new tokens can be attended to


def test_no_two_sizes_agree() -> None:
    sizes = [1, *AXES.values(), *COMPOSED.values()]
    assert len(set(sizes)) == len(sizes)


@cache
def shapes_seen() -> Seen:
    """Every line of the forward pass, with every rotary scaling, mask and cache."""
    seen: Seen = {}
    for scaling in SCALINGS:
        _watch_one_scaling(scaling, seen)
    return seen


def _watch_one_scaling(name: str, seen: Seen) -> None:
    pairs = COMPOSED["H/2"]
    divisors = {"short_factor": [1.5] * pairs, "long_factor": [2.5] * pairs}
    scaling = SCALINGS[name] | (divisors if name == "longrope" else {})
    config, weights = tiny_model(
        vocab_size=AXES["V"],
        hidden_size=AXES["D"],
        intermediate_size=AXES["F"],
        num_attention_heads=AXES["N"],
        num_key_value_heads=AXES["K"],
        head_dim=AXES["H"],
        num_labels=AXES["C"],
        rope_scaling=scaling,
    )
    B, T, S = AXES["B"], AXES["T"], AXES["S"]
    tokens = random_tokens(config, B, S)
    memory = KVCache(config, B, dtype=np.float64)
    model.hidden_states(tokens[:, : S - T], weights, config, memory)
    everything = np.ones((B, 1, T, S), bool)
    new = tokens[:, S - T :]

    def decode(visible: np.ndarray | None) -> None:
        memory.crop(S - T)
        hidden = model.hidden_states(new, weights, config, memory, visible=visible)
        model.logits(hidden, weights)

    watch(MODULES, lambda: decode(None), AXES, seen)
    watch(MODULES, lambda: decode(everything), AXES, seen)
    watch(MODULES, lambda: model.classify(new, weights, config), ONE_PASS, seen)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_shape_comment_is_executed_and_true(module: ModuleType) -> None:
    wrong = list(wrong_comments(source_of(module), module.__name__, shapes_seen()))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_assignment_of_an_array_has_a_shape_comment(module: ModuleType) -> None:
    lacking = list(lacking_comments(source_of(module), module.__name__, shapes_seen()))
    assert not lacking, "\n".join(lacking)


def wrong_versions(comment: str) -> Iterator[str]:
    """The comment with one axis renamed, one axis left out, or two axes exchanged."""
    shape = comment.partition(": ")[0].removesuffix(" x2").split(" or ")[0]
    axes = [axis.strip() for axis in shape.strip("() ,").split(",")]
    for i, letter in itertools.product(range(len(axes)), AXES):
        if axes[i] not in (letter, "..."):
            yield _shape([*axes[:i], letter, *axes[i + 1 :]])
    for i in range(len(axes)):
        yield _shape(axes[:i] + axes[i + 1 :])
    for i, j in itertools.combinations(range(len(axes)), 2):
        swapped = axes.copy()
        swapped[i], swapped[j] = axes[j], axes[i]
        if swapped != axes and "..." not in swapped:
            yield _shape(swapped)


def _shape(axes: list[str]) -> str:
    return f"({', '.join(axes)},)" if len(axes) == 1 else f"({', '.join(axes)})"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_wrong_version_of_every_comment_is_caught(module: ModuleType) -> None:
    for number, comment in comments_of(source_of(module)).items():
        made = shapes_seen()[module.__name__, number]
        only_one_pass = all(runs == [ONE_PASS] for runs in made.values())
        for wrong in wrong_versions(comment):
            if not (only_one_pass and same_if_T_is_S(wrong, comment)):
                assert faults_of(wrong, made), f"{module.__name__}:{number}: {comment} -> {wrong}"


def same_if_T_is_S(wrong: str, comment: str) -> bool:
    return wrong.replace("S", "T") == comment.partition(" or ")[0].replace("S", "T")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_wrong_comments_planted_in_the_source_are_found_at_their_lines(module: ModuleType) -> None:
    source = source_of(module).splitlines(keepends=True)
    planted = list(comments_of("".join(source)).items())[::3]
    for number, comment in planted:
        wrong = comment.replace("(", "(D, ")
        source[number - 1] = source[number - 1].replace(f"# {comment}", f"# {wrong}")
    found = list(wrong_comments("".join(source), module.__name__, shapes_seen()))
    assert {one.split(": ")[0] for one in found} == {
        f"{module.__name__}:{number}" for number, _ in planted
    }


def test_a_comment_that_is_never_executed_is_caught() -> None:
    source = "def f(x):\n    if x:\n        y = x  # (B, T)\n    return y\n"
    assert list(wrong_comments(source, "m", {})) == ["m:3: # (B, T) was never executed"]


def test_a_comment_beside_no_array_is_caught() -> None:
    found = list(wrong_comments("def f(x):\n    # (B, T)\n    return x\n", "m", {}))
    assert found == ["m:2: # (B, T) does not stand at the end of an assignment or return"]


def test_a_comment_that_is_not_a_shape_is_caught() -> None:
    source = "def f(x):\n    return x  # (B, many)\n"
    found = list(wrong_comments(source, "m", {("m", 2): {(3, 4): [AXES]}}))
    assert found == ["m:2: # (B, many) cannot be read: not an axis: 'many'"]


@pytest.mark.parametrize(
    ("comment", "shape"),
    [
        ("(B, N*H)", (3, 140)),
        ("(H/2,)", (5,)),
        ("(1|B, T)", (1, 4)),
        ("(1|B, T)", (3, 4)),
        ("(..., H)", (3, 4, 10)),
        ("(..., H)", (10,)),
        ("(B, K, G*T, S)", (3, 2, 28, 11)),
        ("(B, T) or (T,)", (4,)),
        ("()", ()),
    ],
)
def test_shapes_are_arithmetic_over_the_axis_letters(comment: str, shape: tuple[int, ...]) -> None:
    assert fits(comment, shape, AXES)
    assert not fits(comment, (*shape, 99), AXES)
    assert not fits(comment, (*shape[:-1], 99), AXES)
