"""A conversation as a person sees it. Answers go to stdout as they come, everything else to stderr. Knows rich."""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from svcli import ui
from svcli.errors import UsageError

if TYPE_CHECKING:
    from svcli.chat.markdown import LiveMarkdown


class ChatView:
    """However it is left, nothing stays behind on the line where the terminal goes on.

    `quiet`: no notes and no closing lines. `plain`: nothing is drawn over and nothing decorated, for screen readers.
    `tells_answers` is False where answers are told otherwise, as JSON.
    """

    def __init__(self, quiet: bool = False, plain: bool = False, tells_answers: bool = True) -> None:
        self._console = ui.stderr(is_plain=plain)
        self._quiet, self._tells_answers = quiet, tells_answers
        self.is_spoken = plain
        """Words are chosen to be read aloud."""
        self.is_plain = plain or self._console.is_dumb_terminal
        """Nothing is drawn over."""
        self._decorated = self._console.is_terminal and not quiet
        self._waiting = False
        self._at_line_start = True
        results = ui.stdout()
        self._markdown: LiveMarkdown | None = None
        if _draws(results) and not self.is_plain:
            # Its parser takes longer to load than all the rest, for nothing in a pipe.
            from svcli.chat.markdown import LiveMarkdown

            self._markdown = LiveMarkdown(results)

    def __enter__(self) -> ChatView:
        return self

    def __exit__(self, *_error: object) -> None:
        self.end_line()

    @property
    def width(self) -> int:
        """Columns, of what is told beside answers."""
        return self._console.width

    def wait(self, message: str) -> None:
        """Say what takes time; whatever comes next takes its place."""
        if self._decorated and not self.is_plain:
            self._erase()
            text = ui.encodable(self._console, ui.printable(message))
            self._console.print(text, style="dim", end="", no_wrap=True, overflow="ellipsis")
            self._waiting = True

    def say(self, text: str) -> None:
        """A piece of the answer, at once."""
        if not text or not self._tells_answers:
            return
        self._erase()
        shown = ui.printable(text)
        # Before the text is out: Ctrl-C may come as soon as a reader has it.
        self._at_line_start = text.endswith("\n") and self._markdown is None
        if self._markdown is not None:
            self._markdown.add(shown)
        else:
            sys.stdout.write(shown)
            sys.stdout.flush()

    def end_line(self) -> None:
        """The answer is over, or broken off: what follows begins on a line of its own."""
        self._erase()
        if self._at_line_start:
            return
        self._at_line_start = True
        if self._markdown is not None:
            self._markdown.finish()
        else:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def note(self, *messages: str) -> None:
        """What the user should know about the pictures or the answer."""
        if messages and not self._quiet:
            self.end_line()
            for message in messages:
                ui.note(message, self._console)

    def error(self, message: str) -> None:
        """What went wrong, where the conversation goes on."""
        self.end_line()
        ui.error(message, self._console)

    def tell(self, *lines: str, dim: bool = False) -> None:
        """What a command was asked for."""
        self.end_line()
        for line in lines:
            text = ui.encodable(self._console, ui.printable(line))
            # One line for programs, whole words for people.
            self._console.print(text, style="dim" if dim else None, soft_wrap=not self._console.is_terminal)

    def pairs(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A title and what is known about it."""
        self.end_line()
        if self.is_spoken:
            self.tell(*([title] if title else []), *(f"{name}: {value}" for name, value in rows))
        else:
            encoded = [(ui.encodable(self._console, name), ui.encodable(self._console, value)) for name, value in rows]
            ui.pairs(title, encoded, self._console)

    def footer(self, parts: Sequence[str]) -> None:
        """`parts` as one dim line, broken only between parts, on a terminal only."""
        if self._decorated:
            separator = "; " if self.is_spoken else " · "
            for line in ui.pack(parts, self._console.width, separator):
                self._console.print(ui.encodable(self._console, line), style="dim", soft_wrap=True)

    def copy(self, text: str) -> None:
        """To the clipboard of the terminal (OSC 52). Raises UsageError where there is none."""
        if not self._console.is_terminal or self.is_plain:
            raise UsageError("there is no terminal here whose clipboard could be asked")
        encoded = base64.b64encode(text.encode(errors="replace")).decode()
        self._console.file.write(f"\x1b]52;c;{encoded}\a")
        self._console.file.flush()

    def _erase(self) -> None:
        if self._waiting:
            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            self._waiting = False


def _draws(console: Console) -> bool:
    """Whether lines can be drawn over, with bullets and frames."""
    return console.is_terminal and not console.is_dumb_terminal and "utf" in console.encoding.lower()
