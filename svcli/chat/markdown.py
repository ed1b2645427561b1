"""Markdown that is drawn while it is being written. Knows rich.

Whole blocks are drawn once and let go of. Of the block that is still growing, only lines that changed are drawn again,
and never one that has scrolled out of reach: that stays as it was.
"""

from __future__ import annotations

import math
import re
import time

from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

_SECONDS_BETWEEN_DRAWINGS = 0.05
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)
# A terminal may think a character wider than we do: what does not fit is cut off, and never begins another line.
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"


class LiveMarkdown:
    """One answer on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # What looks like HTML is something that the model said, and must not vanish.
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self._text = ""
        """From the first block on that is not whole."""
        self._drawn: list[str] = []
        """Lines of it on the screen."""
        self._width = 0
        self._above = False
        """Something is drawn above this block."""
        self._next_drawing = -math.inf

    def add(self, text: str) -> None:
        """A piece that is already free of control characters."""
        self._text += text
        start = time.monotonic()
        if start >= self._next_drawing:
            self._draw()
            # A long block takes long to draw; most of the time is for the model.
            end = time.monotonic()
            self._next_drawing = end + max(_SECONDS_BETWEEN_DRAWINGS, 9 * (end - start))

    def finish(self) -> None:
        """The answer is over; the cursor stands at the beginning of a line behind it."""
        self._draw()
        if self._drawn:
            self._write("\n")
        self._text, self._drawn, self._above = "", [], False

    def _draw(self) -> None:
        *whole, self._text = self._blocks()
        for block in whole:
            self._show(self._lines(block))
            if self._drawn:
                self._write("\n")
                self._drawn, self._above = [], True
        self._show(self._lines(self._text))

    def _blocks(self) -> list[str]:
        """All but the last cannot change any more."""
        tokens = self._parser.parse(self._text)
        starts = sorted({token.map[0] for token in tokens if token.level == 0 and token.map})
        lines = self._text.split("\n")
        ends = [*starts[1:], len(lines)]
        # Links that are defined on top are part of the first block.
        return ["\n".join(lines[start:end]) for start, end in zip([0, *starts[1:]], ends, strict=True)]

    def _lines(self, text: str) -> list[str]:
        if not text.strip():
            return []
        # The last column stays free: a full line would begin another one on some terminals.
        self._width = max(self._console.width - 1, 1)
        view = Markdown("", code_theme="ansi_dark", hyperlinks=False)
        view.parsed = self._parser.parse(_with_breaks(text))
        with self._console.capture() as captured:
            self._console.print(view, width=self._width)
        lines = [line.rstrip(" ") for line in captured.get().strip("\n").split("\n")]
        while lines and not Text.from_ansi(lines[0]).plain.strip():
            del lines[0]
        while lines and not Text.from_ansi(lines[-1]).plain.strip():
            del lines[-1]
        return ["", *lines] if lines and self._above else lines

    def _show(self, lines: list[str]) -> None:
        """Puts `lines` in place of those that are drawn; the cursor stands behind the last one."""
        old = self._drawn
        if lines == old:
            return
        # Lines above the screen stay as they are, and with nothing behind the last one, that is where the cursor goes.
        first = max(min(_num_common(old, lines), max(len(lines) - 1, 0)), len(old) - max(self._console.height - 1, 1))
        new = "\n".join(lines[first:])
        if first >= len(old):
            out = ("\n" if old else "") + new
        elif first == len(old) - 1 and new.startswith(old[first]):
            out = new[len(old[first]) :]  # the last line grows
        else:
            up = len(old) - 1 - first
            out = "\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J" + new
        self._drawn = lines
        self._write(_NO_WRAP + out + _WRAP)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def _num_common(old: list[str], new: list[str]) -> int:
    count = 0
    while count < min(len(old), len(new)) and old[count] == new[count]:
        count += 1
    return count


def _with_breaks(text: str) -> str:
    """Lines end where the model ended them, outside of code."""
    lines, fence = text.split("\n"), ""
    for number, line in enumerate(lines[:-1]):
        found = _FENCE.match(line)
        if found and not fence:
            fence = found[1]
        elif found and found[1].startswith(fence) and not line.strip(" `~"):
            fence = ""
        elif not fence and line.strip() and not line.endswith("\\"):
            lines[number] = line.rstrip() + "  "
    return "\n".join(lines)
