"""A terminal in memory, with what scrolled out of it."""

from __future__ import annotations

import io

import pyte
from rich.console import Console


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
        """From the first that scrolled out to the last that has something."""
        out = ["".join(row[column].data for column in range(self._screen.columns)) for row in self._screen.history.top]
        shown = [line.rstrip() for line in [*out, *self._screen.display]]
        while shown and not shown[-1]:
            shown.pop()
        return shown
