"""Taps: functions that look at (and may change) the named arrays of a forward pass.

Layers say `x = tap("self_attn.q_proj", x)` wherever an eager framework would hand you a tensor.
With `NO_TAP` nothing happens. Recording, rounding to bf16, replacing, counting and timing are all
taps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping

import numpy as np

Tap = Callable[[str, np.ndarray], np.ndarray]


def NO_TAP(name: str, array: np.ndarray) -> np.ndarray:
    """Return the array as it is."""
    return array


def record(trace: MutableMapping[str, np.ndarray], names: Iterable[str] | None = None) -> Tap:
    """Store every array (or those in `names`) under its name in `trace`.

    Nothing is copied: the forward pass never changes an array after it was tapped.
    """
    wanted = None if names is None else frozenset(names)

    def tap(name: str, array: np.ndarray) -> np.ndarray:
        if wanted is None or name in wanted:
            trace[name] = array
        return array

    return tap


def each(function: Callable[[np.ndarray], np.ndarray]) -> Tap:
    """Pass every named array through `function`, for example a rounding to bf16."""
    return lambda name, array: function(array)


def replace(arrays: Mapping[str, np.ndarray]) -> Tap:
    """Put the given arrays in the place of the computed ones (ablation, activation patching)."""
    return arrays.get


def stopwatch(spent: MutableMapping[str, float]) -> Tap:
    """Add to `spent` the seconds from each named array to the next, under the latter's name.

    The first array's seconds begin when the tap is made. Names come more than once: in every
    forward pass, and where two modules name the same array.
    """
    last = time.perf_counter()

    def tap(name: str, array: np.ndarray) -> np.ndarray:
        nonlocal last
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - last
        last = time.perf_counter()
        return array

    return tap


def chain(*taps: Tap) -> Tap:
    """Apply several taps one after another; each sees what the previous one returned."""

    def tap(name: str, array: np.ndarray) -> np.ndarray:
        for step in taps:
            array = step(name, array)
        return array

    return tap


def within(prefix: str, tap: Tap) -> Tap:
    """Tap under longer names: `within("model.layers.3.", tap)("mlp", x)`."""
    if tap is NO_TAP:  # an untraced run must not pay for building names
        return NO_TAP
    return lambda name, array: tap(prefix + name, array)
