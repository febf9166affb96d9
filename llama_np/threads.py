"""How many threads the matrix products may use."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

AVX512 = {"SkylakeX", "Cooperlake", "Sapphirerapids"}  # processors, as OpenBLAS names its kernels

AWAKE = 0.13  # seconds for which the threads of OpenBLAS go on asking for work (2^28 cycles)
LOOK = 0.002  # seconds that show whether they do


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
        BLAS_LIMIT.one_thread = count == 1
    return controller is not None


def blas_threads() -> int | None:
    """How many threads BLAS uses now; None when threadpoolctl is not installed."""
    controller = _blas()
    if controller is None:
        return None
    return max((library["num_threads"] for library in controller.info()), default=1)


class BlasLimit:
    """Keeps BLAS to one thread while processes or Python threads share the work among themselves.

    The limit stays until it is lifted, since setting it takes longer than a small product.
    BLAS's other threads keep their cores busy for a moment after a product, until `asleep`.
    """

    def __init__(self) -> None:
        self.one_thread = cores() == 1  # as far as this package knows
        self.limited, self.asleep = False, 0.0
        self.threads: int | None = None  # without the limit
        self.holders, self.before = 0, False
        self.lock = threading.Lock()

    def set(self, limited: bool) -> None:
        """Set or lift the limit; while it is held nothing changes."""
        if limited != self.limited and not self.holders:
            self._change(limited)

    def _change(self, limited: bool) -> None:
        if limited:
            self.threads, self.asleep = blas_threads(), time.monotonic() + AWAKE
        if self.threads is not None:
            set_blas_threads(1 if limited else self.threads)
        self.limited = limited

    @contextmanager
    def held(self) -> Iterator[None]:
        """Set the limit for a while; afterwards all is as before."""
        with self.lock:
            if not self.holders:
                self.before = self.limited
                self.set(True)
            self.holders += 1
        try:
            yield
        finally:
            with self.lock:
                self.holders -= 1
                self.set(self.before)

    def resting(self) -> bool:
        """Whether BLAS's other threads have nothing to do and sleep."""
        return self.limited and time.monotonic() >= self.asleep

    def look(self) -> bool:
        """See whether BLAS's other threads sleep: no processor time goes by while this one does.

        If they sleep while the limit is set, they rest from now on.
        """
        before = time.process_time()
        time.sleep(LOOK)
        asleep = time.process_time() - before < LOOK / 2
        if asleep and self.limited:
            self.asleep = time.monotonic()
        return asleep

    def all_threads(self) -> int | None:
        """How many threads BLAS has without the limit; None without threadpoolctl."""
        return self.threads if self.limited else blas_threads()


def cores() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


BLAS_LIMIT = BlasLimit()


def blas_name() -> str | None:
    """BLAS, its version and the processors that its kernels are for; None without threadpoolctl."""
    blas = _library()
    if blas is None:
        return None
    kernels = blas.get("architecture")
    return f"{blas['internal_api']} {blas['version']}" + (f" for {kernels}" if kernels else "")


def avx512_kernels() -> bool:
    """Whether BLAS is an OpenBLAS that multiplies with AVX-512; False without threadpoolctl.

    OpenBLAS chooses its kernels when NumPy is imported: the best for this processor, unless the
    environment variable OPENBLAS_CORETYPE names others.
    """
    blas = _library()
    return blas is not None and blas.get("architecture") in AVX512


@cache
def _library() -> dict[str, Any] | None:
    """What threadpoolctl says of BLAS; it stays the same, but for the number of threads."""
    controller = _blas()
    libraries = [] if controller is None else controller.info()
    return libraries[0] if libraries else None


@cache
def _blas() -> Any:
    """The controller of BLAS, looked for once: that takes a millisecond, setting it 5 us."""
    try:
        from threadpoolctl import ThreadpoolController
    except ModuleNotFoundError:
        return None
    return ThreadpoolController().select(user_api="blas")
