"""What is drawn fits the stream that it is drawn on."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from svcli import ui
from svcli.chat.view import ChatView

PARTS = ["256→66 visual tokens", "KV 1.5→0.4 MiB", "vision 82 ms", "prefill 15 ms", "210 tok/s", "onnxruntime int8"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_closing_line_breaks_between_parts_only(width: int) -> None:
    lines = ui.pack(PARTS, width)
    assert " · ".join(lines) == " · ".join(PARTS)
    assert all(len(line) <= width for line in lines)
    assert len(lines) == {20: 6, 40: 3, 80: 2, 200: 1}[width]


@pytest.mark.parametrize(("width", "lines"), [(20, ["title", "/a name", "  a purpose of some", "  words"]), (60, None)])
def test_names_that_take_most_of_the_width_stand_above(width: int, lines: list[str] | None) -> None:
    screen = io.StringIO()
    ui.pairs(
        "title", [("/a name", "a purpose of some words"), ("/b and a longer", "two")], Console(file=screen, width=width)
    )
    said = [line.rstrip() for line in screen.getvalue().splitlines()]
    if lines:
        assert said == [*lines, "/b and a longer", "  two", ""]
    else:
        assert "/a name          a purpose of some words" in said


def test_first_steps_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(ui, "stdout", lambda: Console(file=screen, width=24))
    ui.welcome(
        "Ask about a picture.", [("svcli a", "an answer, word by word"), ("svcli b --more", "less")], "And --help"
    )
    said = [line.rstrip() for line in screen.getvalue().splitlines()]
    first = ["  svcli a", "    an answer, word by", "    word", "  svcli b --more", "    less"]
    assert said == ["Ask about a picture.", "", *first, "", "And --help"]


@pytest.mark.parametrize(("is_terminal", "lines"), [(True, ["no difference is", "shown in it"]), (False, None)])
def test_a_sentence_breaks_between_words_for_people_alone(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, lines: list[str] | None
) -> None:
    screen, sentence = io.StringIO(), "no difference is shown in it"
    monkeypatch.setattr(
        ui, "stdout", lambda: Console(file=screen, width=20, force_terminal=is_terminal, color_system=None)
    )
    ui.say(sentence)
    assert [line.rstrip() for line in screen.getvalue().splitlines()] == (lines or [sentence])


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    assert ui.printable("a\x1b[31mb\n\tc\x07\x9b\ud800") == "a\ufffd[31mb\n\tc\ufffd\ufffd\ufffd"


def test_in_a_pipe_only_the_answer_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    view = ChatView()
    view.wait("looking")
    view.say("A red")
    view.say(" ball.")
    view.end_line()
    view.footer(PARTS)
    assert capsys.readouterr() == ("A red ball.\n", "")


def test_on_a_terminal_the_waiting_line_gives_way_to_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shared = Terminal()
    monkeypatch.setattr(sys, "stdout", shared)
    monkeypatch.setattr(sys, "stderr", shared)
    view = ChatView()
    view.wait("looking")
    view.say("Yes.")
    view.end_line()
    view.footer(PARTS[:1])
    # While a line is drawn, the terminal does not break it.
    assert "looking\x1b[0m\r\x1b[2K\x1b[?7lYes.\x1b[?7h\n" in shared.getvalue()
    assert "256→66 visual tokens" in shared.getvalue().splitlines()[-1]


def test_quiet_draws_nothing_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    view = ChatView(quiet=True)
    view.wait("looking")
    view.footer(PARTS)
    assert screen.getvalue() == ""


@pytest.mark.parametrize(("term", "colours"), [("dumb", False), ("xterm", True)])
def test_a_dumb_terminal_gets_no_escape_sequences(monkeypatch: pytest.MonkeyPatch, term: str, colours: bool) -> None:
    screen = Terminal()
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", screen)
    view = ChatView()
    view.wait("looking")
    view.footer(PARTS)
    ui.error("no such file")
    assert ("\x1b" in screen.getvalue()) == colours
    assert "no such file" in screen.getvalue()


def test_an_encoding_without_arrows_gets_plain_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    screen = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "dumb")
    ChatView().footer(PARTS[:2])
    assert raw.getvalue() == b"256->66 visual tokens | KV 1.5->0.4 MiB\n"


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (4_131_840, 1_213_440, "3.9→1.2 MiB"),
        (200 << 10, 50 << 10, "200→50 KiB"),
        (5 << 20, 1 << 10, "5.0→0.0 MiB"),
        (64 << 20, 64 << 20, "64 MiB"),
    ],
)
def test_two_sizes_share_a_unit(before: int, after: int, text: str) -> None:
    assert ui.size_change(before, after) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0004, "0 ms"), (0.0821, "82 ms"), (0.1, "0.10 s"), (12, "12.00 s")])
def test_durations(seconds: float, text: str) -> None:
    assert ui.duration(seconds) == text


def test_progress_without_a_terminal_is_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with ui.Progress() as progress:
        for done in range(100):
            progress.update("counting", done, 100, "fast")
        progress.update("resting", 1, 2)
    assert capsys.readouterr() == ("", "counting 0% fast\nresting 50%\n")


def test_progress_on_a_terminal_is_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with ui.Progress() as progress:
        progress.update("counting", 1, 2, "loss 1.0", "5 pictures/s")
        progress.log("half way")
    assert "counting" in screen.getvalue()
    assert "loss 1.0 · 5 pictures/s" in screen.getvalue()
    assert "half way" in screen.getvalue()
