"""The exception classes. Each is also a builtin, so that callers need not import ours."""

from __future__ import annotations

import importlib
import os
from types import ModuleType


class CheckpointError(ValueError):
    """A malformed weight file, index or archive; `.path` and `.tensor` name the culprit."""

    def __init__(
        self,
        message: str,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.tensor = tensor


class ConfigError(ValueError):
    """A configuration value that is wrong, out of bounds, inconsistent or not implemented."""


class TokenizerError(ValueError):
    """A tokenizer file that cannot be read or does not fit the model."""


class ChatTemplateError(ValueError):
    """A chat template that is missing, malformed, or refuses the conversation."""


class VerificationError(AssertionError):
    """Two implementations disagree; the message is the report."""


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra of llama_np installs it.

    Errors: ModuleNotFoundError with `.name` = package.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"this needs the package {package!r}: pip install 'llama_np[{extra}]'",
            name=package,
        ) from missing
