"""A comparison as a person reads it, on stdout. Knows rich."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svcli import ui
from svcli.chat.compare import Comparison, Side, parted
from svcli.chat.view import ChatView

_WIDTH_FOR_TWO = 72
"""Columns from which on both answers stand side by side."""


def show_comparison(found: Comparison, view: ChatView) -> None:
    """Both answers, where they part, and what each took."""
    view.end_line()
    console = ui.stdout()
    is_drawn = console.is_terminal and not view.is_plain
    sides = (found.dense, found.skipped)
    answers = [_marked(side, found, is_drawn) for side in sides]
    if is_drawn and console.width >= _WIDTH_FOR_TWO:
        both = Table(box=None, pad_edge=False, header_style="dim", expand=True, padding=(0, 2, 0, 0))
        for side in sides:
            both.add_column(side.variant, overflow="fold", ratio=1)
        both.add_row(*answers)
        console.print(both)
    else:
        for side, answer in zip(sides, answers, strict=True):
            console.print(Text(f"{side.variant}:", style="dim"), soft_wrap=not is_drawn)
            console.print(answer, soft_wrap=not is_drawn)
    console.print()
    console.print(ui.encodable(console, _where(found)), soft_wrap=not is_drawn)
    console.print()
    if view.is_spoken:
        for name, dense, skipped, ratio in found.rows():
            console.print(f"{name}: dense {dense}, skipped {skipped}, ratio {ratio}", soft_wrap=True)
    else:
        ui.table("", ["", found.dense.variant, found.skipped.variant, "ratio"], found.rows())
    engine = found.dense.runs[0]
    runs = f"{found.num_runs} runs" if found.num_runs > 1 else "1 run"
    _say(
        console,
        f"Times are medians of n = {runs} of each in turns, behind one that does not count, and ratios have their"
        " range over pairs;"
        f" {engine.engine} {engine.precision}.",
        is_drawn,
    )
    view.note(*found.notes)


def _where(found: Comparison) -> str:
    if found.is_same:
        return f"Both say the same, {len(found.dense.ids)} tokens."
    return f"They say the same for {found.common_tokens} tokens, and part at word {found.common_words + 1}."


def _marked(side: Side, found: Comparison, is_drawn: bool) -> Text:
    """The answer, with the word marked where it parts from the other."""
    same, word, rest = map(ui.printable, parted(side.answer, found.common_words))
    if not word or found.is_same:
        return Text(same + word + rest)
    if is_drawn:
        return Text.assemble(same, (word, "bold reverse"), rest)
    return Text(f"{same}>>{word}<<{rest}")


def _say(console: Console, line: str, is_drawn: bool) -> None:
    console.print(ui.encodable(console, line), soft_wrap=not is_drawn)
