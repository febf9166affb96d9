"""Checkpoints from the Hugging Face hub, through huggingface_hub: its cache, its progress bars."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llama_np.errors import require

# Never *.bin, *.pth or *.pt: pickles can run code, and nothing here would read them anyway.
SMALL = ["*.json", "tokenizer.model", "*.jinja"]
PATTERNS = [*SMALL, "*.safetensors"]
# Not the copies that some repositories keep in folders of their own, such as Meta's original/.
NOT_WANTED = ["*/*"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[^\s@:\\]{1,255})?", re.ASCII)
_FILE_ENDINGS = (".safetensors", ".gguf", ".bin", ".json", ".model", ".pth", ".pt")


def is_hub_name(name: str) -> bool:
    """Whether a name reads as owner/name or owner/name@revision."""
    return bool(_NAME.fullmatch(name)) and not name.endswith(_FILE_ENDINGS)


def download(name: str, weights: bool = True, subfolder: str = "", **options: Any) -> Path:
    """The folder of a snapshot in the hub's cache, fetched if it is not there yet.

    `name` is owner/name[@revision]: a branch, a tag or a commit. Without `weights`, only the
    configuration and the tokenizer are fetched; of a `subfolder`, only what is in it. Without a
    network, or with the hub's own offline switch (HF_HUB_OFFLINE=1), the cache is used as it is.
    Other options (cache_dir, token, ...) are those of huggingface_hub.snapshot_download.
    Errors: ModuleNotFoundError without huggingface_hub; its own errors, unchanged (a missing
    repository or an empty cache is an OSError, a bad name a ValueError).
    """
    try:
        hub = require("huggingface_hub", extra="hub")
    except ModuleNotFoundError as missing:
        missing.add_note(f"{name!r} is no file or folder here, so it was looked for on the hub")
        raise
    repository, _, revision = name.partition("@")
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    folder = hub.snapshot_download(
        repository,
        revision=revision or None,
        allow_patterns=[inside + pattern for pattern in (PATTERNS if weights else SMALL)],
        ignore_patterns=[inside + pattern for pattern in NOT_WANTED],
        **options,
    )
    return Path(folder)
