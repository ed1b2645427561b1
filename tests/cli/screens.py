"""Terminals in memory: one that is drawn on, and one that a process runs in."""

from __future__ import annotations

import io
import os
import termios
import time
from pathlib import Path
from typing import Any

import pexpect
import pyte
from rich.console import Console

_SECONDS = 120.0
"""Longer than anything here takes, however busy the machine is."""


def _lines(screen: Any) -> list[str]:
    """From the first that scrolled out to the last that has something."""
    out = ["".join(row[column].data for column in range(screen.columns)) for row in screen.history.top]
    shown = [line.rstrip() for line in [*out, *screen.display]]
    while shown and not shown[-1]:
        shown.pop()
    return shown


class Screen(io.StringIO):
    """Shows what is written to it as a terminal would."""

    def __init__(self, width: int = 40, height: int = 10) -> None:
        super().__init__()
        self._screen = pyte.HistoryScreen(width, height, history=10_000)
        self._stream = pyte.Stream(self._screen)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        return super().write(text)

    def console(self) -> Console:
        """That draws on it."""
        screen = self._screen
        return Console(
            file=self, force_terminal=True, width=screen.columns, height=screen.lines, color_system=None, emoji=False
        )

    @property
    def lines(self) -> list[str]:
        return _lines(self._screen)


class Conversation:
    """`svcli chat` in a terminal of its own."""

    def __init__(
        self,
        command: list[str],
        *arguments: str | Path,
        width: int = 100,
        height: int = 40,
        changes: dict[str, str] | None = None,
    ) -> None:
        self._screen = pyte.HistoryScreen(width, height, history=10_000)
        self._stream = pyte.Stream(self._screen)
        self.raw = ""
        self.child = pexpect.spawn(
            command[0],
            [*command[1:], "chat", *map(str, arguments)],
            env={**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **(changes or {})},
            dimensions=(height, width),
            encoding="utf-8",
        )
        self.child.delaybeforesend = None
        self._modes = termios.tcgetattr(self.child.child_fd)

    @property
    def lines(self) -> list[str]:
        return _lines(self._screen)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def type(self, keys: str) -> None:
        self.child.send(keys)

    def until(self, *words: str, count: int = 1) -> str:
        """Waits until all of them, the first one `count` times, can be read; returns what can."""
        end = time.monotonic() + _SECONDS
        while not (self.text.count(words[0]) >= count and all(word in self.text for word in words)):
            assert time.monotonic() < end, f"{words} did not appear:\n{self.text}"
            assert self._read(), f"it ended without {words}:\n{self.text}"
        return self.text

    def grow(self, num_lines: int) -> None:
        """Waits until so many lines can be read."""
        end = time.monotonic() + _SECONDS
        while len(self.lines) < num_lines:
            assert time.monotonic() < end, f"no {num_lines} lines:\n{self.text}"
            assert self._read(), f"it ended:\n{self.text}"

    def ask(self, line: str, *words: str) -> str:
        """Types a line and waits for the words behind it."""
        self.type(line + "\r")
        return self.until(*words)

    def leave(self, keys: str = "") -> int:
        """The exit code, once it has ended, with the terminal as it was."""
        if keys:
            self.type(keys)
        start = time.monotonic()
        while self._read():
            assert time.monotonic() < start + _SECONDS, f"it does not end:\n{self.text}"
        assert termios.tcgetattr(self.child.child_fd) == self._modes
        self.child.close()
        code: int = self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus
        return code

    def _read(self) -> bool:
        try:
            text = self.child.read_nonblocking(4096, timeout=0.2)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += text
        self._stream.feed(text)
        return True
