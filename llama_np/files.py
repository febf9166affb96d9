"""Files that were written by somebody else, and files that must be whole or not there at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llama_np.errors import CheckpointError

PathLike = str | os.PathLike[str]

# What a checkpoint folder consists of: `atomic_folder` replaces a folder of nothing else.
CHECKPOINT_FILES = re.compile(
    r"(.*\.(json|safetensors|jinja|model|pth|md|txt)|\.gitattributes|tokenizer\.bin)", re.ASCII
)


@contextmanager
def open_regular(path: PathLike) -> Iterator[BinaryIO]:
    """Open a file for reading, unless it is a directory, a pipe or a device.

    Opening a pipe would wait for a writer, and opening a device may set it in motion.
    Errors: FileNotFoundError, IsADirectoryError, PermissionError, CheckpointError.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "expected a file, found a folder", str(path))
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{str(path)!r} is not a regular file; it was not opened", path)
    with open(path, "rb") as file:
        yield file


def read_bounded(path: PathLike, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Errors: as `open_regular`; CheckpointError for a larger file.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{str(path)!r} is larger than {limit} bytes", path)
    return content


def guess_format(start: bytes) -> str:
    """What a file might be, from its first bytes: a hint for error messages."""
    guesses = {
        b"version ": "a git-lfs pointer: run `git lfs pull`",
        b"GGUF": "a GGUF file",
        b"PK\x03\x04": "a zip archive, perhaps of PyTorch: `llama-np convert` reads those",
        b"\x80": "a pickle",
        b"<": "a web page: the download failed",
        b"{": "JSON",
        b"\x1f\x8b": "a gzip archive",
    }
    if not start:
        return "an empty file"
    found = [text for magic, text in guesses.items() if start.startswith(magic)]
    return found[0] if found else "truncated, or of another format"


def check_target(path: PathLike, overwrite: bool = False) -> Path:
    """Where a file will be written, links followed, before the work for it begins.

    Errors: FileExistsError when it exists and `overwrite` is false, or is not a regular file;
    FileNotFoundError when its folder does not exist.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (overwrite and target.is_file()):
        what = "file exists" if target.is_file() else "exists and is not a regular file"
        raise FileExistsError(errno.EEXIST, what, str(path))
    _check_parent(target)
    return target


def _check_parent(target: Path) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(target.parent))


@contextmanager
def atomic_file(path: PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Write a file so that it appears complete or not at all.

    The content goes to a temporary file in the same folder, is forced to the disk and renamed.
    A symbolic link is followed; the mode respects the umask.
    Errors: FileExistsError when it exists and `overwrite` is false, or is not a regular file;
    OSError as the operating system says. Then the old file is intact and nothing else is left.
    """
    target = check_target(path, overwrite)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.partial")
    with _named_after(path):
        opened = temporary.open("xb")
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)  # after closing: Windows does not rename an open file
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(target.parent)


def write_atomically(path: PathLike, content: bytes, overwrite: bool = False) -> None:
    """Write a small file, atomically. Errors: as `atomic_file`."""
    with atomic_file(path, overwrite) as file:
        file.write(content)


@contextmanager
def atomic_folder(path: PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Fill a new folder `PATH.partial-XXXX`, which becomes PATH when everything is written.

    With `overwrite`, an existing PATH is replaced if it holds nothing but files of a checkpoint.
    Errors: FileExistsError; OSError as the operating system says. Then PATH is as it was.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(target, overwrite)
    _check_parent(target)
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    with _named_after(path):
        partial.mkdir()
    try:
        yield partial
        sync_folder(partial)
        _put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(target.parent)


@contextmanager
def _named_after(path: PathLike) -> Iterator[None]:
    """Let errors name the file that was asked for, not the temporary one."""
    try:
        yield
    except OSError as problem:
        problem.filename = str(path)
        problem.filename2 = None
        raise


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FileExistsError(errno.EEXIST, "exists and is not a folder", str(target))
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "folder exists and is not empty", str(target))
    foreign = _foreign(target.iterdir())
    if foreign:
        what = f"not replaced, because it also holds {foreign!r}"
        raise FileExistsError(errno.EEXIST, what, str(target))


def _foreign(entries: Iterable[Path]) -> str | None:
    """The name of an entry that no checkpoint writer made."""
    for entry in entries:
        if not (entry.is_file() and CHECKPOINT_FILES.fullmatch(entry.name)):
            return entry.name
    return None


def sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where the system can (Windows cannot open folders)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)
