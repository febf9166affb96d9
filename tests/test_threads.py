"""What BLAS says of itself."""

import sys
from typing import Any

import pytest

from llama_np import threads

OPENBLAS = {
    "internal_api": "openblas",
    "version": "0.3.31",
    "architecture": "SkylakeX",
    "num_threads": 2,
}
MKL = {"internal_api": "mkl", "version": "2026.0", "num_threads": 2}


class Controller:
    """In place of threadpoolctl's: it knows these libraries."""

    def __init__(self, *libraries: dict[str, Any]) -> None:
        self.libraries = libraries

    def info(self) -> list[dict[str, Any]]:
        return list(self.libraries)


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_blas", "_library"):
        monkeypatch.setattr(threads, name, getattr(threads, name).__wrapped__)


@pytest.mark.parametrize(
    ("controller", "name", "avx512"),
    [
        (Controller(OPENBLAS), "openblas 0.3.31 for SkylakeX", True),
        (Controller(OPENBLAS | {"architecture": "Haswell"}), "openblas 0.3.31 for Haswell", False),
        (Controller(MKL), "mkl 2026.0", False),
        (Controller(), None, False),  # NumPy multiplies by itself, or with a library unknown to it
        (None, None, False),
    ],
)
def test_the_kernels_of_blas_are_known(
    controller: Controller | None, name: str | None, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_blas", lambda: controller)
    assert threads.blas_name() == name
    assert threads.avx512_kernels() == avx512


def test_without_threadpoolctl_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert threads.blas_name() is None and threads.blas_threads() is None
    assert not threads.avx512_kernels() and not threads.set_blas_threads(1)
