"""What from_pretrained and save_pretrained take that is about files, the same for every class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT_VERSION = "4.37.2"  # the version of transformers whose file formats are written

# What `checkpoint.locate` heeds. What is about the hub changes nothing about a folder.
_PLACE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
# Downloads resume by themselves, proxies are the environment's, and code of others never runs.
_IDLE = frozenset(
    "resume_download proxies trust_remote_code _from_auto _from_pipeline _commit_hash".split()
)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of a from_pretrained as (those that say where the files are, the rest).

    The first are for `checkpoint.locate`; those without effect here are in neither.
    """
    rest = {name: value for name, value in options.items() if name not in _IDLE}
    old_token = rest.pop("use_auth_token", None)  # what `token` was called before
    place = {name: rest.pop(name) for name in _PLACE if name in rest}
    place["token"] = old_token if place.get("token") is None else place["token"]
    return {name: value for name, value in place.items() if value is not None}, rest


def refuse(method: str, neutral: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Errors: NotImplementedError for an option that has another value than the neutral one."""
    for name, value in options.items():
        if name in neutral and value != neutral[name]:
            raise NotImplementedError(f"{method} has no {name}={value!r:.60} here")


def refuse_upload(push_to_hub: bool) -> None:
    """Errors: NotImplementedError unless `push_to_hub` is False."""
    refuse("save_pretrained", {"push_to_hub": False}, {"push_to_hub": push_to_hub})
