"""What is written to a terminal: untrusted text must not be able to steer it."""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Control characters but newline and tab, C1 controls, and the marks that reorder text.
_DANGEROUS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Replace control characters by their escapes, so that a terminal shows and ignores them."""
    return _DANGEROUS.sub(lambda match: ascii(match.group())[1:-1], text)


def write(text: str, stream: TextIO | None = None) -> None:
    """Write and flush; escape what a terminal would obey. A file gets the exact text."""
    target = sys.stdout if stream is None else stream
    target.write(visible(text) if target.isatty() else text)
    target.flush()


def note(text: str) -> None:
    """One line to standard error."""
    write(text + "\n", sys.stderr)


class Progress:
    """A line on standard error that counts up, shown only when that is a terminal.

    beside_results: results are written to standard output meanwhile; where that is a terminal,
    too, they say enough.
    """

    def __init__(self, what: str, total: int, beside_results: bool = False) -> None:
        self.what, self.total, self.done = what, total, 0
        self.shown = sys.stderr.isatty() and not (beside_results and sys.stdout.isatty())

    def advance(self, steps: int = 1) -> None:
        """Count further and rewrite the line."""
        self.done += steps
        if self.shown and steps:
            end = "\n" if self.done >= self.total else ""
            sys.stderr.write(f"\r{self.what} {self.done}/{self.total}{end}")
            sys.stderr.flush()
