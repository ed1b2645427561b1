"""A terminal that changes its width while an answer comes, in tmux, which breaks lines anew as most terminals do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_chat_markdown import ANSWER
from tests.optional import missing

ROOT = Path(__file__).parents[2]
HEIGHT = 50
SECONDS = 120.0
"""Longer than anything here takes, however busy the machine is."""
PROGRAM = """
import os, sys, time, tty
from pathlib import Path
sys.path[:0] = {paths!r}
from svcli import ui
from svcli.chat import markdown
folder, text = Path({folder!r}), {text!r}
tty.setcbreak(0)
def tell(name):
    # A terminal answers what it is when it has drawn what came before.
    os.write(1, b"\\x1b[c")
    while os.read(0, 1) != b"c":
        pass
    (folder / name).touch()
live = markdown.LiveMarkdown(ui.stdout())
half = len(text) // 2
for number, part in enumerate((text[:half], text[half:])):
    for place in range(0, len(part), 7):
        live._next_drawing = 0.0  # each piece is drawn
        live.add(part[place : place + 7])
    if number == 0:
        tell("half")
        while os.get_terminal_size().columns != {width}:
            time.sleep(0.01)
live.finish()
tell("done")
time.sleep(600)
"""


class Tmux:
    """One window of a server of its own."""

    def __init__(self, folder: Path, width: int, *command: str) -> None:
        """With its socket in `folder`."""
        self._folder = folder
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
        size = ("-x", str(width), "-y", str(HEIGHT))
        self._run("-f", "/dev/null", "new-session", "-d", *size, *command, env=environment)

    def resize(self, width: int) -> None:
        self._run("resize-window", "-x", str(width), "-y", str(HEIGHT))

    @property
    def lines(self) -> list[str]:
        """All that was ever shown, as it stands now."""
        return self._run("capture-pane", "-p", "-S", "-").rstrip().split("\n")

    def end(self) -> None:
        self._run("kill-server")

    def _run(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        # From the folder, since paths of sockets are short.
        command = ["tmux", "-u", "-S", "socket", *arguments]
        return subprocess.run(command, cwd=self._folder, check=True, capture_output=True, text=True, env=env).stdout


def wait_for(path: Path) -> None:
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < end, f"there is no {path.name}"
        time.sleep(0.01)


@pytest.fixture
def windows() -> Iterator[list[Tmux]]:
    if shutil.which("tmux") is None:
        missing("tmux")
    opened: list[Tmux] = []
    yield opened
    for window in opened:
        window.end()


PARAGRAPH = "Six hamburgers on a grey ground, and 日本語 🍔 in a sentence " * 6
LIST = "\n".join(f"- number {number}, which is followed by a few more words than fit" for number in range(8))


@pytest.mark.parametrize("text", [PARAGRAPH.strip(), f"before\n\n{LIST}\n\nafter", ANSWER], ids=["one", "list", "all"])
@pytest.mark.parametrize(("before", "after"), [(100, 40), (40, 100), (60, 23)])
def test_an_answer_is_there_once(text: str, before: int, after: int, windows: list[Tmux], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("changed", "as_it_ends")]
    shown = []
    for folder, width in zip(folders, (before, after), strict=True):
        folder.mkdir()
        paths = [str(ROOT), str(ROOT / "export"), str(ROOT / "engines")]
        program = PROGRAM.format(paths=paths, folder=str(folder), text=text, width=after)
        window = Tmux(folder, width, sys.executable, "-c", program)
        windows.append(window)
        wait_for(folder / "half")
        if width != after:
            window.resize(after)
        wait_for(folder / "done")
        shown.append(window.lines)
    letters = [re.sub(r"\W", "", "".join(lines)) for lines in shown]
    assert letters[0] == letters[1]
    if before < after and text != ANSWER:  # whose first blocks were whole, and let go of, in the width of before
        assert shown[0] == shown[1]
