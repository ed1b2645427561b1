"""A training run as a person watches it, on stderr: a panel on a terminal, plain lines elsewhere. Knows rich.

Lines worth keeping stay above the panel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType, Segment
from rich.table import Table
from rich.text import Text

from skipvision.training.events import BrokenEvent, Event, SavedEvent, StageEvent, StepEvent, ValidationEvent
from svcli import ui
from svcli.training.facts import History, RunFacts, time_split

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDEST = 100
_ROOM_FOR_ECHO = 3
"""Columns: `^C` behind a full line would begin another one, and rich would go up by one too few."""
_REFRESHES = 4
"""A second."""
_BROKEN_SHOWN = 20
"""Broken samples that get a line each; all of them are in the run's log."""


class Watch:
    """Shows a run while it goes on; each event is given to it."""

    def __init__(self, facts: RunFacts) -> None:
        """`facts` takes each event before this does."""
        self.facts = facts
        self._console = ui.stderr()
        self._drawn: RenderableType = ""
        self._drawn_width = self._console.width
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._draw, refresh_per_second=_REFRESHES, transient=True
            )
        self._stage = ""
        self._last_line = self._last_step = -math.inf

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        if self._live:
            # Of a run that was stopped, what it last was remains to be read.
            self._live.transient = kind is None or self.facts.step is None
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Keeps what is worth a line; the panel itself is drawn by the clock."""
        if isinstance(event, StageEvent):
            if self._live is None and (event.what != self._stage or _is_time(self._last_line)):
                self._keep(f"{event.what} {event.done / (event.total or 1):.0%}")
            self._stage = event.what
        elif isinstance(event, StepEvent):
            if self._live is None and _is_time(self._last_step):
                self._keep(" · ".join(self._short(event)))
                self._last_step = self._last_line
        elif isinstance(event, ValidationEvent):
            self._keep(f"step {event.step:,}: validation {scores_told(event)}{', the best' if event.best else ''}")
        elif isinstance(event, SavedEvent):
            self._keep(f"step {event.step:,}: saved")
        elif isinstance(event, BrokenEvent) and event.count <= _BROKEN_SHOWN:
            self._keep(f"left out: {event.broken.name}: {event.broken.reason}")
            if event.count == _BROKEN_SHOWN:
                self._keep("more that are left out are counted here, and named in log.jsonl")

    def _keep(self, line: str) -> None:
        if self._live:
            self._live.refresh()
        self._console.print(ui.encodable(self._console, ui.printable(line)), soft_wrap=self._live is None)
        self._last_line = time.monotonic()

    def _short(self, step: StepEvent) -> list[str]:
        return [
            f"step {step.step:,} of {step.total:,}",
            f"loss {self.facts.smoothed:.4f}",
            f"{self.facts.tokens_per_second:,.0f} tokens/s",
            f"{clock(step.seconds_left)} left",
        ]

    def _draw(self) -> RenderableType:
        """Asked for by the clock, in a thread of rich's."""
        self._erase_folded()
        self._drawn, self._drawn_width = self._panel(), self._console.width
        return self._drawn

    def _erase_folded(self) -> None:
        """A terminal that was made narrower has folded the panel's lines: rich, which goes up by as many as it has
        written, would leave some behind."""
        width = self._console.width
        if width < self._drawn_width:
            options = self._console.options.update(width=self._drawn_width)
            lines = self._console.render_lines(self._drawn, options, pad=False)
            folds = sum(max(0, math.ceil(Segment.get_line_length(line) / width) - 1) for line in lines)
            self._console.control(Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * folds))

    def _panel(self) -> RenderableType:
        facts, width = self.facts, max(10, min(self._console.width - _ROOM_FOR_ECHO, _WIDEST))
        shown: list[RenderableType] = []
        stage, step = facts.stage, facts.step
        if step is None and stage is None:
            return Text("starting", style="dim")
        if step is not None:
            told = f"{step.step:,} of {step.total:,}", f"{clock(step.seconds_left)} left"
            shown.append(_bar("training", step.step, step.total, told, width))
        if stage is not None:
            shown.append(
                _bar(stage.what, stage.done, stage.total or 1, (f"{stage.done / (stage.total or 1):.0%}",), width)
            )
        if step is not None:
            shown.append(self._facts(step, width))
        return Constrain(Group(*shown), width)

    def _facts(self, step: StepEvent, width: int) -> Table:
        grid = Table.grid(padding=(0, 2, 0, 0))
        names, values = [], []
        for name, parts in self._lines(step):
            names.append(name)
            values.append(parts)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        room = width - max(map(len, names)) - 2
        for name, parts in zip(names, values, strict=True):
            lines = ui.pack([ui.encodable(self._console, part) for part in parts if part], room)
            grid.add_row(name, ui.encodable(self._console, "\n".join(lines)))
        return grid

    def _lines(self, step: StepEvent) -> list[tuple[str, Sequence[str]]]:
        facts = self.facts
        lines: list[tuple[str, Sequence[str]]] = [
            ("loss", (f"{facts.smoothed:.4f}", f"last {step.loss:.4f}", self._curve(24))),
        ]
        last, best = facts.validation, facts.best
        if last is not None:
            told = f"best {scores_told(best)} at {best.step:,}" if best is not None and best is not last else ""
            lines.append(("validation", (f"{scores_told(last)} at {last.step:,}", told)))
        lines.append(("learning", (f"rate {step.learning_rate:.2e}", f"gradient {step.grad_norm:.3g}")))
        lines.append(("speed", (f"{facts.tokens_per_second:,.0f} tokens/s", f"{facts.rows_per_second:,.0f} rows/s")))
        if step.visual_plain:
            lines.append(("visual", (visual_told(step.visual_kept, step.visual_plain),)))
        lines.append(("time", [f"{name} {share:.0%}" for name, _, share in time_split(facts.seconds)]))
        lines.append(("memory", (ui.size(step.memory),)))
        if facts.broken:
            lines.append(("broken", (f"{facts.broken:,} left out",)))
        return lines

    def _curve(self, width: int) -> str:
        return sparkline(self.facts.losses, width) if _has_blocks(self._console) else ""


def show_summary(facts: RunFacts, history: History) -> None:
    """What the run was and cost, on stderr, and what to do with it."""
    done = facts.done
    assert done is not None
    rows = [("steps", _with_life(done.steps, len(facts.losses))), ("samples", f"{facts.samples:,}")]
    if done.broken:
        rows.append(("broken", f"{done.broken:,} left out"))
    split = [f"{name} {seconds:.1f} s, {share:.0%}" for name, seconds, share in time_split(done.seconds)]
    rows.append(("time", clock(done.seconds.total)))
    rows += [("", part) for part in split]
    stepping = done.seconds.total - done.seconds.other
    if facts.losses and stepping > 0:
        rows.append(("speed", f"{facts.tokens / stepping:,.0f} tokens/s, {done.rows / stepping:,.0f} rows/s"))
    if facts.visual_plain:
        rows.append(("visual", visual_told(facts.visual_kept, facts.visual_plain)))
    rows.append(("loss", f"{done.loss:.4f}"))
    if best := history.best_loss():
        rows.append(("validation", f"best {best[1]:.4f} at step {best[0]:,}"))
    rows.append(("checkpoint", str(done.checkpoint)))
    if done.chosen:
        rows.append(("", done.chosen.removeprefix("the checkpoint is ")))
    rows.append(("next", f"svcli export {done.checkpoint} -o {done.checkpoint.parent.name or 'my'}-bundle"))
    ui.pairs("Trained", rows, console=ui.stderr())


def _with_life(steps: int, of_this_life: int) -> str:
    return f"{steps:,}" if of_this_life == steps else f"{steps:,}, {of_this_life:,} of them since it went on"


def _bar(name: str, done: float, total: float, told: Sequence[str], width: int) -> Table:
    """A line: name, bar, and what is told behind it; on a narrow terminal the name gives way."""
    words = "  ".join(told)
    label = name if len(name) + len(words) + 14 <= width else ""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(
        Text(label, style="bold"),
        ProgressBar(total, min(done, total), width=max(4, width - len(label) - len(words) - 3)),
        Text(words),
    )
    return grid


def scores_told(event: ValidationEvent) -> str:
    """The scores in words; the loss first."""
    scores = sorted(event.scores.items(), key=lambda item: item[0] != "loss")
    return ", ".join(f"{name} {value:.4f}" for name, value in scores)


def visual_told(kept: int, plain: int) -> str:
    """How many of the plain model's visual tokens pass the FFN and stay in the cache."""
    return f"{kept:,} of {plain:,} kept, {kept / plain:.0%}"


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The curve of all finite values in at most `width` letters, each the mean of its part."""
    finite = [value for value in values if math.isfinite(value)]
    columns = min(width, len(finite))
    if columns < 2:
        return ""
    bounds = [len(finite) * column // columns for column in range(columns + 1)]
    means = [math.fsum(finite[first:last]) / (last - first) for first, last in pairwise(bounds)]
    low, height = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[min(7, int(8 * (mean - low) / height))] for mean in means)


def _is_time(last_line: float) -> bool:
    return time.monotonic() - last_line > ui.Progress.SECONDS_BETWEEN_LINES


def _has_blocks(console: Console) -> bool:
    try:
        _BLOCKS.encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True
