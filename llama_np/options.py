"""What options of the command line may be: numbers within bounds, and texts."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any


class UsageError(Exception):
    """Options that do not belong together: exit code 2, as for every wrong usage."""


def whole(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `least` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number >= {least}")
        return number

    return parse


def real(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: finite numbers for which `rule` holds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number {rule}")
        return value

    return parse


def whole_numbers(least: int) -> Callable[[str], list[int]]:
    """A type for argparse: whole numbers from `least` on, with commas between them."""

    def parse(text: str) -> list[int]:
        try:
            return [whole(least)(part) for part in text.split(",")]
        except argparse.ArgumentTypeError:
            what = f"{text!r}: expected whole numbers >= {least} with commas between them"
            raise argparse.ArgumentTypeError(what) from None

    return parse


def some_text(text: str) -> str:
    """A type for argparse: UTF-8 text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected a text, found an empty one")
    try:
        return argument_text(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def standard_input() -> str:
    """All of standard input, as text without the mark that Windows puts before it.

    Errors: ValueError when it is closed or other than UTF-8.
    """
    check_standard_input()
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"standard input: not UTF-8 text ({problem.reason})") from None


def check_standard_input() -> None:
    """Errors: ValueError when standard input is closed."""
    if closed(sys.stdin):
        raise ValueError("standard input is closed")


def closed(stream: Any) -> bool:
    """Whether a standard stream was closed before Python began, which then has None for it."""
    return stream is None


def argument_text(text: str) -> str:
    """A text from the command line as it is. Errors: ValueError for bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{text!a}: not UTF-8 text") from None
    return text
