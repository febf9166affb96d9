"""How many threads the matrix products may use."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any


def limit_threads(count: int | None) -> None:
    """Let BLAS use `count` threads from now on; None leaves it as it is.

    Needs the package threadpoolctl (extra `bench`); without it a warning says what to do.
    """
    if count is not None and not set_blas_threads(count):
        warnings.warn(
            "--threads needs threadpoolctl: pip install 'llama_np[bench]' "
            f"(or set OPENBLAS_NUM_THREADS={count})",
            stacklevel=2,
        )


def set_blas_threads(count: int) -> bool:
    """Let BLAS use `count` threads from now on; False when threadpoolctl is not installed."""
    controller = _blas()
    if controller is not None:
        controller.limit(limits=count)
    return controller is not None


def blas_threads() -> int | None:
    """How many threads BLAS uses now; None when threadpoolctl is not installed."""
    controller = _blas()
    if controller is None:
        return None
    return max((library["num_threads"] for library in controller.info()), default=1)


@cache
def _blas() -> Any:
    """The controller of BLAS, looked for once: that takes a millisecond, setting it 5 us."""
    try:
        from threadpoolctl import ThreadpoolController
    except ModuleNotFoundError:
        return None
    return ThreadpoolController().select(user_api="blas")


def cores() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
