"""What differs between operating systems, as far as one of them can show it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from llama_np.files import atomic_file

# Python offers these on POSIX only: https://docs.python.org/3/library/os.html, "Availability".
WITHOUT_POSIX = """
import multiprocessing, os, random, signal, subprocess, sys, tempfile
import numpy, safetensors, sentencepiece  # they look for POSIX themselves, and then do without
for name in (
    "fork register_at_fork sched_getaffinity sched_setaffinity getuid geteuid getgid getpgid "
    "setsid killpg nice uname sysconf getloadavg pread pwrite fchown chown mkfifo posix_fadvise "
    "posix_fallocate wait3 wait4 WNOHANG WIFEXITED O_NONBLOCK O_CLOEXEC O_NOFOLLOW O_DIRECTORY"
).split():
    vars(os).pop(name, None)
for name in "SIGKILL SIGPIPE SIGALRM SIGHUP SIGUSR1 alarm setitimer pthread_sigmask".split():
    vars(signal).pop(name, None)
sys.modules.update(dict.fromkeys(("resource", "fcntl", "termios", "pty", "tty", "pwd", "grp")))
from llama_np.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command(*arguments: str, program: str, encoding: str = "utf-8") -> bytes:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "The king", "-n", "3"),
        ("inspect",),
        ("bench", "--batch", "1", "--prompt-tokens", "4", "--context", "4"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_need_nothing_that_only_posix_has(arguments: tuple[str, ...]) -> None:
    output = command(*arguments, program=WITHOUT_POSIX)
    assert output
    if arguments[0] == "bench":
        assert b"peak memory unknown" in output


def test_a_converted_model_appears_without_anything_that_only_posix_has(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second.bin")
    command("convert", "fairytales", first, program=WITHOUT_POSIX)
    command("convert", first, second, "--to", "llama2c", program=WITHOUT_POSIX)
    assert Path(second).stat().st_size > 1e6


def test_a_file_is_closed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to rename an open file."""
    opened: list[BinaryIO] = []
    rename = os.replace

    def on_windows(source: Path, target: Path) -> None:
        assert opened[0].closed
        rename(source, target)

    monkeypatch.setattr(os, "replace", on_windows)
    with atomic_file(tmp_path / "file") as file:
        opened.append(file)
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


MAIN = "import sys; from llama_np.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_pipe_carries_utf8_whatever_the_code_page() -> None:
    output = command("tokenize", "The king", "--json", program=MAIN, encoding="cp1252")
    assert json.loads(output.decode("utf-8"))["tokens"][1] == "▁The"
