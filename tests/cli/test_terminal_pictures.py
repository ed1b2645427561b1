"""A picture on a terminal: what each kind is sent is the picture, fits, and nothing else reaches it."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from svcli import terminal_pictures
from svcli.terminal_graphics import iterm2, kitty, sixel
from svcli.terminal_pictures import Answer, Graphics, ask_for_sixel, draw, graphics_of

XTERM = {"TERM": "xterm-256color"}


class Terminal(io.StringIO):
    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


def console(environ: dict[str, str], width: int = 80, height: int = 24, encoding: str = "utf-8") -> Console:
    return Console(file=Terminal(encoding), width=width, height=height, _environ=environ)


def drawn(image: Image.Image, graphics: Graphics, width: int | None = None, columns: int = 80, height: int = 24) -> str:
    screen = console(XTERM, columns, height)
    draw(image, screen, width, graphics=graphics)
    assert isinstance(screen.file, Terminal)
    return screen.file.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Of any colours."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def decoded_sixel(sequence: str) -> Image.Image:
    """By the rules of the VT340: `#` sets or takes a colour, `!` repeats, `$` goes back, `-` goes down."""
    match = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\', sequence, re.DOTALL)
    assert match
    width, height = int(match[1]), int(match[2])
    canvas = np.full((height + 5, width, 3), -1)
    colours: dict[int, list[int]] = {}
    x = y = 0
    colour = [-1, -1, -1]
    for part in re.findall(r"#\d+;2;\d+;\d+;\d+|#\d+|!\d+[?-~]|[?-~]|[$-]", match[3]):
        if part.startswith("#"):
            number, *rest = map(int, part[1:].split(";"))
            if rest:
                colours[number] = rest[1:]
            else:
                colour = colours[number]
        elif part in "$-":
            x, y = 0, y + (6 if part == "-" else 0)
        else:
            count, letter = (int(part[1:-1]), part[-1]) if part.startswith("!") else (1, part)
            bits = ord(letter) - ord("?")
            for bit in range(6):
                if bits >> bit & 1:
                    canvas[y + bit, x : x + count] = colour
            x += count
    assert canvas.max() <= 100
    assert (canvas[height:] == -1).all()
    assert (canvas[:height] >= 0).all()
    return Image.fromarray((canvas[:height] * 255 / 100).round().astype(np.uint8))


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 40), height=st.integers(1, 40), num_colours=st.sampled_from([2, 16, 256, 1024]))
def test_sixel_draws_every_pixel_in_its_colour(width: int, height: int, num_colours: int) -> None:
    image = photo(width, height)
    reduced = np.asarray(image.quantize(min(num_colours, 256)).convert("RGB")).astype(int)
    sequence = sixel(image, num_colours)
    # Colours are told in hundredths.
    assert np.abs(np.asarray(decoded_sixel(sequence)).astype(int) - reduced).max() <= 2
    assert max(map(int, re.findall(r"#(\d+)", sequence))) < num_colours


def test_sixel_is_short_where_the_picture_is_flat() -> None:
    flat = sixel(Image.new("RGB", (800, 600), "blue"))
    assert decoded_sixel(flat).getcolors() == [(480_000, (0, 0, 255))]
    assert len(flat) < 2000


def test_sixel_has_as_many_colours_as_the_terminal_said() -> None:
    screen = console(XTERM)
    draw(photo(30, 30), screen, num_colours=16, graphics="sixel")
    assert isinstance(screen.file, Terminal)
    assert len(set(re.findall(r"#\d+;2;", screen.file.getvalue()))) == 16


def test_kitty_gets_the_picture_in_pieces_and_is_asked_for_no_answer() -> None:
    image = photo(120, 90)
    pieces = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", kitty(image, 30))
    assert "".join(f"\x1b_G{head};{data}\x1b\\" for head, data in pieces) == kitty(image, 30)
    assert len(pieces) > 2
    assert all(len(data) <= 4096 for _, data in pieces)
    assert pieces[0][0] == "a=T,f=100,q=2,c=30,m=1"
    assert [head for head, _ in pieces[1:]] == ["m=1"] * (len(pieces) - 2) + ["m=0"]
    shown = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces))))
    assert shown.tobytes() == image.tobytes()


def test_iterm2_gets_the_picture_and_its_place() -> None:
    image = photo(12, 9)
    match = re.fullmatch(
        r"\x1b\]1337;File=size=(\d+);width=30;height=10;preserveAspectRatio=1;inline=1:(.*)\x07", iterm2(image, 30, 10)
    )
    assert match
    data = base64.b64decode(match[2])
    assert len(data) == int(match[1])
    assert Image.open(io.BytesIO(data)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("environ", "graphics"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        (XTERM | {"KITTY_WINDOW_ID": "1"}, "kitty"),
        (XTERM | {"TERM_PROGRAM": "ghostty"}, "kitty"),
        (XTERM | {"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        (XTERM | {"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        (XTERM | {"LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot", "COLORTERM": "truecolor"}, "sixel"),
        (XTERM, "blocks"),
        (XTERM | {"TERM_PROGRAM": "vscode"}, "blocks"),
        (XTERM | {"KITTY_WINDOW_ID": "1", "TMUX": "/tmp/tmux"}, "blocks"),
        ({"TERM": "tmux-256color", "LC_TERMINAL": "iTerm2"}, "blocks"),
        ({"TERM": "screen-256color", "TERM_PROGRAM": "iTerm.app"}, "blocks"),
        (XTERM | {"ZELLIJ": "0", "TERM_PROGRAM": "WezTerm"}, "blocks"),
        ({"TERM": "xterm"}, "text"),
        ({"TERM": "dumb"}, "text"),
        ({"TERM": "unknown", "KITTY_WINDOW_ID": "1"}, "text"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, "text"),
        ({}, "text"),
    ],
)
def test_the_environment_tells_what_a_terminal_can(environ: dict[str, str], graphics: Graphics) -> None:
    assert graphics_of(console(environ), environ) == graphics


def test_a_terminal_that_says_that_it_can_sixel_is_believed_but_for_tmux() -> None:
    assert graphics_of(console(XTERM), XTERM, num_colours=16) == "sixel"
    inside = XTERM | {"TMUX": "/tmp/tmux"}
    assert graphics_of(console(inside), inside, num_colours=16) == "blocks"


def test_where_there_is_no_terminal_or_no_such_letter_there_is_text() -> None:
    environ = {"TERM": "xterm-kitty"}
    assert graphics_of(Console(file=io.StringIO(), _environ=environ), environ) == "text"
    forced = environ | {"FORCE_COLOR": "1"}
    assert graphics_of(Console(file=io.StringIO(), _environ=forced), forced) == "blocks"
    assert graphics_of(console(XTERM, encoding="ascii"), XTERM) == "text"


def test_text_says_how_large_the_picture_is() -> None:
    assert drawn(photo(640, 480), "text") == "picture 640 x 480\n"
    assert drawn(photo(640, 480), "text", columns=5) == "picture 640 x 480\n"


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    columns=st.sampled_from([10, 40, 70, 120]),
    height=st.sampled_from([1, 3, 24, 50]),
    width=st.none() | st.integers(1, 200),
)
def test_half_blocks_fit_and_keep_their_proportions(
    size: tuple[int, int], columns: int, height: int, width: int | None
) -> None:
    lines = drawn(photo(*size), "blocks", width, columns, height).splitlines()
    letters = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert set("".join(letters)) == {"▀"}
    assert len(set(map(len, letters))) == 1
    across, down = len(letters[0]), len(letters)
    assert across <= min(columns, width or columns, size[0])
    assert down <= max(1, height // 2)
    # To half a letter, or one where there is no less.
    exact = min(min(columns, width or columns) / size[0], max(1, height // 2) * 2 / size[1], 1)
    assert abs(across - size[0] * exact) <= 1
    assert abs(2 * down - size[1] * exact) <= 2


def test_half_blocks_show_two_pixels_a_letter() -> None:
    image = Image.new("RGB", (1, 2), (255, 0, 0))
    image.putpixel((0, 1), (0, 0, 255))
    screen = console(XTERM | {"COLORTERM": "truecolor"})
    draw(image, screen, graphics="blocks")
    assert isinstance(screen.file, Terminal)
    assert screen.file.getvalue() == "\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[0m\n"


@pytest.mark.parametrize("size", [(1000, 500), (500, 3000), (4, 3), (5000, 1)])
def test_graphics_fit_and_are_no_larger_than_the_picture(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal_pictures, "_cell", lambda _console: (10, 20))
    image = Image.new("RGB", size, "red")
    screen = decoded_sixel(drawn(image, "sixel", 30).rstrip("\n"))
    scale = min(300 / size[0], 240 / size[1], 1)
    assert screen.size == tuple(max(1, int(length * scale)) for length in size)
    columns, lines = (max(1, round(length / each)) for length, each in zip(screen.size, (10, 20), strict=True))
    assert f"width={columns};height={lines};" in drawn(image, "iterm2", 30)
    assert f",c={columns},m=0;" in drawn(image, "kitty", 30)
    assert columns <= 30
    assert lines <= 12
    for graphics in ("kitty", "iterm2", "sixel"):
        assert drawn(image, graphics).endswith("\n")


@contextmanager
def terminal(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[bytes], bytes], typed: bytes = b""
) -> Iterator[tuple[Console, int]]:
    """A console on a pseudo-terminal whose other end answers what it is asked, and where `typed` was typed before."""
    leader, follower = os.openpty()
    over = threading.Event()
    os.write(leader, typed)
    echo = b""
    while len(echo) < len(typed.replace(b"\n", b"\r\n")):  # it has arrived, too
        echo += os.read(leader, 1024)

    def run() -> None:
        asked = b""
        while not over.is_set():
            try:
                asked += os.read(leader, 1024)
            except OSError:
                return
            if b"\x1b[c" in asked:
                os.write(leader, answer(asked))
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        with os.fdopen(os.dup(follower), "r") as stdin, os.fdopen(os.dup(follower), "w") as stdout:
            monkeypatch.setattr(sys, "stdin", stdin)
            monkeypatch.setattr(os, "tcgetpgrp", lambda _fd: os.getpgrp())
            yield Console(file=stdout, _environ=XTERM), follower
    finally:
        over.set()
        os.close(follower)
        thread.join(5)
        os.close(leader)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"\x1b[?62;4;22c", Answer(256, b"")),
        (b"\x1b[?4c", Answer(256, b"")),
        (b"\x1b[?64;14;44c", Answer(0, b"")),
        (b"\x1b[?6c", Answer(0, b"")),
        (b"\x1b[?1;0;16S\x1b[?63;4c", Answer(16, b"")),
        (b"\x1b[?1;0;1024Swhat\x1b[?63;4c", Answer(1024, b"what")),
        (b"\x1b[?1;3;0S\x1b[?63;4c", Answer(256, b"")),
        (b"\x1b[?1;3S\x1b[?63;4c", Answer(256, b"")),
        (b"\x1b[?1;0;16S\x1b[?63c", Answer(0, b"")),
        (b"what \x1b[?62;4cis\n", Answer(256, b"what is\n")),
        (b"\x1b[A\x1b[?62c", Answer(0, b"\x1b[A")),
        (b"typed", Answer(0, b"typed")),
        (b"", Answer(0, b"")),
    ],
)
def test_a_terminal_is_asked_for_sixel_and_nothing_that_was_typed_is_lost(
    answer: bytes, expected: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch, lambda _asked: answer) as (screen, follower):
        before = termios.tcgetattr(follower)
        began = time.monotonic()
        # Answers that come are not waited for that long; behind what is none, the whole time is.
        assert ask_for_sixel(screen, XTERM, 20 if b"c" in answer else 2) == expected
        assert time.monotonic() - began < 10
        assert termios.tcgetattr(follower) == before


@pytest.mark.parametrize("typed", [b"what is\n", b"half a line"])
def test_nothing_is_asked_where_somebody_types(typed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, lambda _asked: b"\x1b[?4c", typed) as (screen, follower):
        assert ask_for_sixel(screen, XTERM, 1) == Answer(0, b"")
        assert os.read(follower, 100) == typed


def test_nothing_is_asked_where_the_environment_says_enough_or_nobody_would_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for environ in (
        {"TERM": "xterm-kitty"},
        {"TERM": "dumb"},
        XTERM | {"TMUX": "/tmp/tmux"},
        {"TERM": "foot-256color"},
    ):
        screen = console(environ)
        assert ask_for_sixel(screen, environ) == Answer(0, b"")
        assert isinstance(screen.file, Terminal)
        assert screen.file.getvalue() == ""
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open() as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        screen = console(XTERM)
        assert ask_for_sixel(screen, XTERM) == Answer(0, b"")
        assert isinstance(screen.file, Terminal)
        assert screen.file.getvalue() == ""
