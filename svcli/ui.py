"""What is drawn: results go to stdout, all else to stderr. This, terminal_pictures.py, training/panel.py, and view.py,
markdown.py and side_by_side.py in chat/ alone know rich.

Plain text where the stream is no terminal; rich itself honours NO_COLOR and dumb terminals. It is imported where
something is drawn, since help needs none of it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

# Answers and file names may hold anything; none of it may steer the terminal.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_TABLE_STYLE: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": None, "pad_edge": False}
_UNBOUNDED = 10_000
_PLAIN = str.maketrans({"→": "->", "·": "|", "…": "..."})


def printable(text: str) -> str:
    """The text with every control character but newline and tab, and every half of a character, made visible."""
    return _CONTROL_CHARACTERS.sub("\ufffd", text)


def stdout() -> Console:
    from rich.console import Console

    class Results(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # Where no terminal sets a width, tables get room enough not to be folded.
    width = None if sys.stdout.isatty() else 160
    return Results(highlight=False, markup=False, emoji=False, width=width)


def stderr(*, is_plain: bool = False) -> Console:
    """`is_plain`: no escape sequence, whatever the terminal can."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, color_system=None if is_plain else "auto")


def error(message: str, console: Console | None = None) -> None:
    """What went wrong, in one sentence."""
    _remark("Error:", "bold red", message, console or stderr())


def note(message: str, console: Console | None = None) -> None:
    """What the user should know, though nothing went wrong."""
    _remark("Note:", "yellow", message, console or stderr())


def serving(line: str, example: str) -> None:
    """That a server is there, on stderr; on a terminal also how to try it."""
    console = stderr()
    console.print(encodable(console, printable(line)), soft_wrap=True)
    if console.is_terminal:
        console.print(encodable(console, printable(example)), style="dim", soft_wrap=True)


def show(line: str) -> None:
    """One line of a result."""
    console = stdout()
    console.print(encodable(console, printable(line)), soft_wrap=True)


def say(sentence: str) -> None:
    """A sentence of a result, for reading: one line for programs, whole words for people."""
    console = stdout()
    console.print(encodable(console, printable(sentence)), soft_wrap=not console.is_terminal)


def welcome(greeting: str, first_steps: Sequence[tuple[str, str]], more: str) -> None:
    """A greeting, what to try first (commands, and what each is for), and where there is more."""
    from rich.padding import Padding

    console = stdout()
    console.print(greeting, end="\n\n")
    width = max(len(command) for command, _ in first_steps)
    beside = console.width >= width + max(len(purpose) for _, purpose in first_steps) + 5
    for command, purpose in first_steps:
        console.print(
            f"  {command:{width}}" if beside else f"  {command}",
            style="bold",
            end="   " if beside else "\n",
            soft_wrap=True,
        )
        console.print(purpose if beside else Padding(purpose, (0, 0, 0, 4), expand=False), style="dim")
    console.print(f"\n{more}")


def pairs(title: str, rows: Sequence[tuple[str, str]], console: Console | None = None) -> None:
    """A title and what is known about it, one fact a line, on stdout or another console. Where names would take most of
    the width, each stands above what is known."""
    from rich.cells import cell_len
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = console or stdout()
    if 2 * max((cell_len(name) for name, _ in rows), default=0) > console.width:
        if title:
            console.print(Text(printable(title), style="bold"))
        for name, value in rows:
            console.print(Text(printable(name), style="dim", overflow="fold"))
            console.print(Padding(Text(printable(value), overflow="fold"), (0, 0, 0, 2), expand=False))
        console.print()
        return
    view = Table(title=printable(title), show_header=False, **_TABLE_STYLE)
    view.add_column(style="dim", no_wrap=True)
    view.add_column(overflow="fold")
    for row in rows:
        view.add_row(*map(printable, row))
    console.print(view, "")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout. Where that is too narrow for it, each row is one list of what its columns say."""
    from rich.measure import Measurement
    from rich.table import Table

    console = stdout()
    view = Table(title=title, header_style="dim", **_TABLE_STYLE)
    for column in columns:
        view.add_column(column, overflow="fold")
    for row in rows:
        view.add_row(*(encodable(console, printable(cell)) for cell in row))
    if Measurement.get(console, console.options.update(max_width=_UNBOUNDED), view).maximum <= console.width:
        console.print(view, "")
        return
    if title:
        console.print(title, style="bold")
    for row in rows:
        said = [f"{column} {cell}".strip() for column, cell in zip(columns[1:], row[1:], strict=True) if cell]
        for line in pack([printable(part) for part in (row[0], *said)], console.width):
            console.print(encodable(console, line))
    console.print()


def size(num_bytes: float) -> str:
    """Bytes in the unit that reads best."""
    divisor, unit = _unit(num_bytes)
    return f"{num_bytes / divisor:.3g} {unit}"


def size_change(before: float, after: float) -> str:
    """Two sizes in the unit that reads best for the larger; one of them where they are the same."""
    divisor, unit = _unit(max(before, after))
    first, second = (f"{each:.1f}" if each < 10 else f"{each:.0f}" for each in (before / divisor, after / divisor))
    return f"{first} {unit}" if before == after else f"{first}→{second} {unit}"


def flops(count: float) -> str:
    """FLOPs in the unit that reads best."""
    for power, unit in ((4, "T"), (3, "G"), (2, "M")):
        if count >= 1000**power:
            return f"{count / 1000**power:.3g} {unit}FLOP"
    return f"{count:.0f} FLOP"


def duration(seconds: float) -> str:
    """Milliseconds below a tenth of a second, else seconds."""
    return f"{seconds * 1000:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _remark(label: str, style: str, message: str, console: Console) -> None:
    from rich.text import Text

    text = Text.assemble((label, style), " ", encodable(console, printable(message)))
    # One line for programs, whole words for people.
    console.print(text, soft_wrap=not console.is_terminal)


def _unit(num_bytes: float) -> tuple[int, str]:
    for power, unit in enumerate(("B", "KiB", "MiB")):
        if num_bytes / 1024**power < 999.5:
            return 1024**power, unit
    return 1024**3, "GiB"


class Progress:
    """How far something long has come, on stderr: a bar on a terminal, else now and then a plain line."""

    SECONDS_BETWEEN_LINES = 30.0
    WIDTH_FOR_FACTS = 70
    """Where there is less room, the bar and the times are worth more."""

    def __init__(self, is_quiet: bool = False) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as BarProgress
        from rich.table import Column

        self._is_quiet = is_quiet
        self._console = stderr()
        self._live = not is_quiet and self._console.is_terminal and not self._console.is_dumb_terminal
        wide = self._console.width >= self.WIDTH_FOR_FACTS
        self._bar = BarProgress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            *([TextColumn("{task.fields[facts]}")] if wide else []),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            expand=True,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._what = ""
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def update(self, what: str, done: float, total: float, *facts: str) -> None:
        """`done` of `total` of `what`. Another `what` begins a bar of its own, so that its time left is its own."""
        joined = encodable(self._console, " · ".join(facts))
        if what != self._what:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total, facts=joined)
            self._bar.update(self._task, completed=done)
        elif self._task is not None:
            self._bar.update(self._task, completed=done, total=total, facts=joined)
        if not self._live and (what != self._what or time.monotonic() - self._last_line > self.SECONDS_BETWEEN_LINES):
            self.log(" ".join([what, f"{done / total:.0%}", *facts]))
        self._what = what

    def log(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self._is_quiet:
            return
        self._bar.console.print(printable(line), soft_wrap=True)
        self._last_line = time.monotonic()


def pack(parts: Sequence[str], width: int, separator: str = " · ") -> list[str]:
    """The parts joined into as few lines as fit `width`."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(separator) + len(part) <= width:
            lines[-1] += separator + part
        else:
            lines.append(part)
    return lines


def encodable(console: Console, text: str) -> str:
    """The text in letters that the console's encoding has."""
    try:
        text.encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return text.translate(_PLAIN)
    return text
