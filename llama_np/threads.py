"""How many threads the matrix products may use."""

from __future__ import annotations

import warnings


def limit_threads(count: int | None) -> None:
    """Let BLAS use `count` threads from now on; None leaves it as it is.

    Needs the package threadpoolctl (extra `bench`); without it a warning says what to do.
    """
    if count is None:
        return
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        warnings.warn(
            "--threads needs threadpoolctl: pip install 'llama_np[bench]' "
            f"(or set OPENBLAS_NUM_THREADS={count})",
            stacklevel=2,
        )
        return
    threadpool_limits(count)
