"""Markdown that is drawn while it is being written. Knows rich.

Whole blocks are drawn once and let go of. Of the block that is still growing, only lines that changed are drawn again,
and never one that has scrolled out of reach: that stays as it was. So does what a terminal that became narrower has
broken into lines in its own way, and the answer goes on below.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence

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
        self._columns = console.width
        """Of the terminal, when they were drawn."""
        self._num_before = 0
        """Letters of the block that stand in front of them, since before the terminal became narrower."""
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
        self._text, self._drawn, self._num_before, self._above = "", [], 0, False

    def _draw(self) -> None:
        self._fit()
        *whole, self._text = self._blocks()
        for block in whole:
            self._show(self._lines(block))
            if self._drawn:
                self._write("\n")
            if self._drawn or self._num_before:
                self._drawn, self._num_before, self._above = [], 0, True
        self._show(self._lines(self._text))

    def _fit(self) -> None:
        """Leaves what is drawn as it is where the terminal has broken it anew: where that stands now, nobody knows."""
        columns, before = self._console.width, self._columns
        self._columns = columns
        if columns < before and self._drawn:
            again = self._lines(self._text.rstrip())
            self._num_before += _num_common(_letters(self._drawn), _letters(again))
            self._drawn = []
            self._write("\n")

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
        width = max(self._columns - 1, 1)
        view = Markdown("", code_theme="ansi_dark", hyperlinks=False)
        view.parsed = self._parser.parse(_with_breaks(text))
        with self._console.capture() as captured:
            self._console.print(view, width=width)
        lines = [line.rstrip(" ") for line in captured.get().strip("\n").split("\n")]
        while lines and not Text.from_ansi(lines[0]).plain.strip():
            del lines[0]
        while lines and not Text.from_ansi(lines[-1]).plain.strip():
            del lines[-1]
        if self._num_before:
            return self._behind(lines)
        return ["", *lines] if lines and self._above else lines

    def _behind(self, lines: list[str]) -> list[str]:
        """What follows the letters that are there already."""
        left = self._num_before
        for number, line in enumerate(lines):
            here = len(_letters([line]))
            if here > left:
                return [self._cut(line, left), *lines[number + 1 :]]
            left -= here
        return []

    def _cut(self, line: str, num_letters: int) -> str:
        text = Text.from_ansi(line)
        place = 0
        while num_letters or text.plain[place].isspace():
            num_letters -= _is_letter(text.plain[place])
            place += 1
        with self._console.capture() as captured:
            self._console.print(text[place:], end="", soft_wrap=True)
        return captured.get()

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
            # Line by line: tmux keeps a copy of a screen that is erased from its first letter on.
            new = "\n".join(f"{line}\x1b[K" for line in lines[first:])
            out = "\r" + (f"\x1b[{up}A" if up else "") + new + "\x1b[J"
        self._drawn = lines
        self._write(_NO_WRAP + out + _WRAP)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def _num_common(old: Sequence[str], new: Sequence[str]) -> int:
    count = 0
    while count < min(len(old), len(new)) and old[count] == new[count]:
        count += 1
    return count


def _letters(lines: list[str]) -> str:
    """What is there in any width."""
    return "".join(filter(_is_letter, Text.from_ansi("\n".join(lines)).plain))


def _is_letter(letter: str) -> bool:
    return not letter.isspace() and letter not in "─━"


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
