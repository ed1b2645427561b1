"""Where questions come from when they are no arguments: a terminal without a line editor, or a script."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol, TextIO

BLOCK = '"""'
_LONGEST_LABEL = 28


class Reader(Protocol):
    """Hands out what is typed."""

    is_interactive: bool
    """Whether somebody is there to read a message and try again."""

    def read(self, label: str) -> str:
        """A line, or a block of lines. Raises EOFError at the end, KeyboardInterrupt."""


def is_open_block(text: str) -> bool:
    """Whether text begins with three quotes that nothing closes yet."""
    begun = text.lstrip()
    return begun.startswith(BLOCK) and (len(begun.rstrip()) < 2 * len(BLOCK) or not begun.rstrip().endswith(BLOCK))


class PlainReader:
    """Lines as the terminal itself edits them: nothing is drawn, which suits screen readers and dumb terminals."""

    is_interactive = True

    def read(self, label: str) -> str:
        text = self._line(label)
        while is_open_block(text):
            text += "\n" + self._line("")
        return text

    def _line(self, label: str) -> str:
        sys.stderr.write(label)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            sys.stderr.write("\n")
            raise EOFError
        return line.removesuffix("\n")


class ScriptReader:
    """Each line is a question; what is between three quotes is one, too. Empty lines are passed over."""

    is_interactive = False

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines

    def read(self, label: str) -> str:
        del label
        text = self._line()
        while not text.strip():
            text = self._line()
        while is_open_block(text):
            text += "\n" + self._line()
        return text

    def _line(self) -> str:
        line = self._lines.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def label(names: Sequence[str], *, is_spoken: bool = False) -> str:
    """What stands in front of the line that is typed, with the pictures that go with it; short, for the line's sake."""
    told = ", ".join(names)
    if len(told) > _LONGEST_LABEL:
        told = f"{len(names)} pictures" if len(names) > 1 else f"...{told[-_LONGEST_LABEL:]}"
    if is_spoken:
        return f"You, with {told}: " if told else "You: "
    return f"{told} > " if told else "> "
