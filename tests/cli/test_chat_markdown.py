"""Markdown that comes in pieces ends up as it would in one."""

from __future__ import annotations

import random

import pytest

from svcli.chat.markdown import LiveMarkdown
from tests.cli.screens import Screen

ANSWER = """# What is there

Six **hamburgers** on a `grey` ground, and a very long sentence about them that does not fit into one line.

- one
- two, of which *each* has
  - cheese
- three

```python
if a < b:
    print("<b>")
```

| thing | count |
| --- | --: |
| hamburger | 6 |

The end <b>of it</b>: 2 * 3 * 4 = 24,
and another line.
"""


def drawn(text: str, width: int, height: int, pieces: list[str], monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setattr("svcli.chat.markdown._SECONDS_BETWEEN_DRAWINGS", 0.0)
    screen = Screen(width, height)
    live = LiveMarkdown(screen.console())
    for piece in pieces:
        live.add(piece)
    live.finish()
    assert "".join(pieces) == text
    return screen


def cut(text: str, seed: int) -> list[str]:
    random_ = random.Random(seed)
    pieces = []
    while text:
        count = random_.randint(1, 9)
        pieces.append(text[:count])
        text = text[count:]
    return pieces


@pytest.mark.parametrize("width", [20, 40, 100])
@pytest.mark.parametrize("seed", range(3))
def test_in_pieces_it_looks_as_in_one(width: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(ANSWER, width, 60, [ANSWER], monkeypatch).lines
    assert drawn(ANSWER, width, 60, cut(ANSWER, seed), monkeypatch).lines == whole
    assert any("hamburgers" in line for line in whole)
    # What looks like HTML was said, and stays.
    assert any("<b>of" in line for line in whole)


@pytest.mark.parametrize("height", [3, 6])
def test_what_scrolls_out_of_a_small_screen_is_there_once(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(f"- number {number}" for number in range(30)) + "\n\nthe end"
    lines = drawn(text, 40, height, cut(text, 0), monkeypatch).lines
    assert [line.split()[-1] for line in lines if "number" in line] == [str(number) for number in range(30)]
    assert lines[-1] == "the end"


@pytest.mark.parametrize("words", ["日本語のとても長い文章です。" * 6, "🍔🍟👩‍👩‍👧‍👦 ❤️ " * 12, "e\u0301\u200d" * 50])
def test_wide_letters_do_not_break_lines(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"before\n\n{words}\n\nafter"
    screen = drawn(text, 20, 30, cut(text, 1), monkeypatch)
    lines = screen.lines
    assert (lines[0], lines[-1]) == ("before", "after")
    assert lines.count("before") == lines.count("after") == 1
    assert lines[1] == lines[-2] == ""


def test_a_line_that_only_grows_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = drawn("There are six.", 40, 10, ["There", " are", " six."], monkeypatch)
    plain = screen.getvalue().replace("\x1b[?7l", "").replace("\x1b[?7h", "")
    assert plain == "There are six.\n"


def test_nothing_to_say_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn("\n\n", 40, 10, ["\n", "\n"], monkeypatch).getvalue() == ""
