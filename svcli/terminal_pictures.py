"""Pictures on the terminal, by the best means that it has: graphics of its own, half blocks in colour, or their size.

What the environment says decides. Sixel has no sign there, so that a terminal can be asked for it (`ask_for_sixel`),
and for nothing else. Inside tmux and its like, behind which any terminal may be, there are half blocks.
"""

from __future__ import annotations

import os
import re
import select
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from svcli.terminal_graphics import MOST_COLOURS, iterm2, kitty, sixel

if TYPE_CHECKING:
    from PIL import Image

Graphics = Literal["kitty", "iterm2", "sixel", "blocks", "text"]

_BLOCK = "▀"
_CELL = 8, 16
"""Width and height in pixels of a letter where the terminal does not say: less than most have, so that pictures fit."""
_SECONDS = 0.2
_ATTRIBUTES = re.compile(rb"\x1b\[\?([0-9;]*)c")
"""How a terminal answers when it is asked what it can (DA1)."""
_SIXEL = b"4"
_COLOURS = re.compile(rb"\x1b\[\?1;(\d+);?(\d*)[0-9;]*S")
"""And when it is asked how many colours it has for that (XTSMGRAPHICS): 0, and their number."""
_QUESTIONS = "\x1b[?1;1;0S\x1b[c"
"""Nearly all answer the second, and only after the first."""
_MULTIPLEXERS = ("TMUX", "STY", "ZELLIJ")
_KITTY_TERMS = ("xterm-kitty", "xterm-ghostty")
_KITTY_PROGRAMS = ("kitty", "ghostty")
_ITERM2_PROGRAMS = ("iTerm.app", "iTerm2", "WezTerm", "mintty")
_SIXEL_TERMS = ("foot", "mlterm", "yaft", "contour")


@dataclass(frozen=True)
class Answer:
    """What came when the terminal was asked."""

    num_colours: int
    """Of pictures in Sixel; 0 where it has none."""
    typed: bytes
    """What the user typed meanwhile: it belongs in front of whatever is read next."""


def draw(
    image: Image.Image,
    console: Console,
    width: int | None = None,
    *,
    num_colours: int = 0,
    graphics: Graphics | None = None,
) -> None:
    """An RGB picture at most `width` columns wide, half as high as the terminal, and no larger than it is.

    `num_colours`: what the terminal said to `ask_for_sixel`. `graphics`: by what means, if not by those that
    `graphics_of` finds.
    """
    graphics = graphics or graphics_of(console, os.environ, num_colours)
    if graphics == "text":
        console.print(f"picture {image.width} x {image.height}", soft_wrap=True, highlight=False)
        return
    cell = _cell(console)
    columns = max(1, min(width or console.width, console.width))
    lines = max(1, console.height // 2)
    # Of half blocks, one shows at least one pixel.
    largest = float(cell[0]) if graphics == "blocks" else 1.0
    scale = min(columns * cell[0] / image.width, lines * cell[1] / image.height, largest)
    wide, high = (max(1, int(length * scale)) for length in image.size)
    columns, lines = (max(1, round(length / each)) for length, each in zip((wide, high), cell, strict=True))
    if graphics == "blocks":
        console.print(_blocks(image, columns, lines), end="")
        return
    resized = image.resize((wide, high))
    if graphics == "kitty":
        sequence = kitty(resized, columns)
    else:
        sequence = (
            iterm2(resized, columns, lines) if graphics == "iterm2" else sixel(resized, num_colours or MOST_COLOURS)
        )
    console.file.write(sequence + "\n")
    console.file.flush()


def graphics_of(console: Console, environ: Mapping[str, str], num_colours: int = 0) -> Graphics:
    """The best means of the terminal behind `console`; `num_colours` as in `draw`."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    is_plain = not console.is_terminal or console.is_dumb_terminal or console.no_color
    if is_plain or console.color_system not in ("256", "truecolor"):
        return "text"
    if console.file.isatty() and not _is_multiplexed(environ):
        if term in _KITTY_TERMS or program in _KITTY_PROGRAMS or "KITTY_WINDOW_ID" in environ:
            return "kitty"
        if program in _ITERM2_PROGRAMS or environ.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
        if num_colours or term.partition("-")[0] in _SIXEL_TERMS:
            return "sixel"
    try:
        _BLOCK.encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return "text"
    return "blocks"


def ask_for_sixel(console: Console, environ: Mapping[str, str], seconds: float = _SECONDS) -> Answer:
    """Asks the terminal of `console` and of standard input whether it can Sixel, and waits so long for the answer.

    Nothing is asked where the environment says enough, where somebody has typed already, or in the background.
    """
    if graphics_of(console, environ) != "blocks" or _is_multiplexed(environ):
        return Answer(0, b"")
    try:
        source = sys.stdin.fileno()
        if not os.isatty(source) or os.tcgetpgrp(source) != os.getpgrp():
            return Answer(0, b"")
    except (OSError, ValueError):
        return Answer(0, b"")
    return _ask(source, console, seconds)


def _ask(source: int, console: Console, seconds: float) -> Answer:
    # Not on every system that has the rest.
    import termios

    before = termios.tcgetattr(source)
    quiet = termios.tcgetattr(source)
    quiet[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(source, termios.TCSANOW, quiet)
    heard = b""
    try:
        if select.select([source], [], [], 0)[0]:
            return Answer(0, b"")
        console.file.write(_QUESTIONS)
        console.file.flush()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([source], [], [], left)[0]:
            heard += (piece := os.read(source, 1024))
            if not piece:
                break
            if answer := _ATTRIBUTES.search(heard):
                return _understood(heard, answer)
        return Answer(0, heard)
    finally:
        termios.tcsetattr(source, termios.TCSANOW, before)


def _understood(heard: bytes, attributes: re.Match[bytes]) -> Answer:
    typed = heard[: attributes.start()] + heard[attributes.end() :]
    colours = _COLOURS.search(typed)
    if colours:
        typed = typed[: colours.start()] + typed[colours.end() :]
    if _SIXEL not in attributes[1].split(b";"):
        return Answer(0, typed)
    told = int(colours[2] or 0) if colours and colours[1] == b"0" else 0
    return Answer(told or MOST_COLOURS, typed)


def _is_multiplexed(environ: Mapping[str, str]) -> bool:
    return any(name in environ for name in _MULTIPLEXERS) or environ.get("TERM", "").startswith(("tmux", "screen"))


def _blocks(image: Image.Image, columns: int, lines: int) -> Segments:
    """Two pixels a letter: the upper half in the colour of the letter, the lower in that of its ground."""
    from PIL import Image

    data = image.resize((columns, 2 * lines), Image.Resampling.LANCZOS).tobytes()
    colours = [Color.from_rgb(*data[start : start + 3]) for start in range(0, len(data), 3)]
    segments: list[Segment] = []
    for top in range(0, len(colours), 2 * columns):
        pairs = zip(colours[top : top + columns], colours[top + columns : top + 2 * columns], strict=True)
        segments += [Segment(_BLOCK, Style(color=upper, bgcolor=lower)) for upper, lower in pairs]
        segments.append(Segment.line())
    return Segments(segments)


def _cell(console: Console) -> tuple[int, int]:
    """Width and height in pixels of one letter."""
    import fcntl
    import termios

    try:
        answer = fcntl.ioctl(console.file.fileno(), termios.TIOCGWINSZ, bytes(8))
    except (OSError, ValueError):
        return _CELL
    lines, columns, width, height = struct.unpack("HHHH", answer)
    return (width // columns, height // lines) if lines and columns and width >= columns and height >= lines else _CELL
