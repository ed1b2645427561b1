"""Small plots as SVG, 380 units wide, so that their letters can be read on a narrow screen. All text is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 380
_ROW, _LEFT, _RIGHT = 34, 112, 12
_TOP, _BOTTOM, _HEIGHT = 18, 34, 210


@dataclass(frozen=True)
class Interval:
    """A value and what it may as well be."""

    label: str
    value: float
    low: float
    high: float
    style: str
    """CSS class."""


def stacks(title: str, rows: Mapping[str, Sequence[tuple[str, float]]], unit: str = "ms") -> str:
    """One bar a row, of parts one behind the other; a legend below."""
    longest = max(sum(value for _, value in parts) for parts in rows.values()) or 1.0
    names = list(dict.fromkeys(name for parts in rows.values() for name, _ in parts))
    height = _TOP + _ROW * len(rows) + 18 * math.ceil(len(names) / 2) + 8
    drawn, left, room = [], 66, WIDTH - 66 - 74
    for number, (row, parts) in enumerate(rows.items()):
        y, x = _TOP + _ROW * number, float(left)
        drawn.append(_text(left - 6, y + 15, row, "end"))
        for name, value in parts:
            wide = room * value / longest
            place = f'x="{x:.1f}" y="{y}" width="{wide:.1f}" height="22"'
            drawn.append(
                f'<rect class="part{names.index(name)}" {place}><title>{escape(name)} {value:.3g} {unit}</title></rect>'
            )
            x += wide
        drawn.append(_text(x + 5, y + 15, f"{sum(value for _, value in parts):.3g} {unit}"))
    below = _TOP + _ROW * len(rows) + 6
    for number, name in enumerate(names):
        x, y = 10 + 186 * (number % 2), below + 18 * (number // 2)
        drawn.append(f'<rect class="part{number}" x="{x}" y="{y}" width="11" height="11"/>')
        drawn.append(_text(x + 17, y + 10, name))
    return _svg(title, height, drawn)


def intervals(title: str, rows: Sequence[Interval], at_one: str) -> str:
    """A point with its interval a row, beside a line at 1 that is called `at_one`."""
    low, high = min(0.9, *(row.low for row in rows)), max(1.1, *(row.high for row in rows))
    margin = 0.06 * (high - low)
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    top = _TOP + 6
    bottom = top + 24 * len(rows)
    drawn = [f'<line class="one" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{top - 8}" y2="{bottom + 4}"/>']
    for number, row in enumerate(rows):
        y = top + 24 * number + 10
        drawn.append(_text(_LEFT - 8, y + 4, row.label, "end"))
        drawn.append(f'<line class="{row.style}" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}"/>')
        said = f"{row.label}: {row.value:.3f} ({row.low:.3f} to {row.high:.3f})"
        drawn.append(
            f'<circle class="{row.style}" cx="{x(row.value):.1f}" cy="{y}" r="4"><title>{escape(said)}</title></circle>'
        )
    drawn += [_text(x(tick), bottom + 18, f"{tick:g}", "middle") for tick in ticks(low, high, 6)]
    drawn.append(_text(x(1), 10, at_one, "middle"))
    return _svg(title, bottom + 26, drawn)


def bars(title: str, rows: Sequence[tuple[str, float, str]], said: Sequence[str]) -> str:
    """One bar a row: label, value, and CSS class; each has a word of `said` behind it."""
    longest = max(*(value for _, value, _ in rows), 1e-12)
    drawn, left, room = [], 160, WIDTH - 160 - 44
    for number, ((label, value, style), word) in enumerate(zip(rows, said, strict=True)):
        y = _TOP - 8 + 22 * number
        wide = room * value / longest
        drawn.append(_text(left - 8, y + 12, label, "end"))
        drawn.append(f'<rect class="{escape(style)}" x="{left}" y="{y}" width="{wide:.1f}" height="15"/>')
        drawn.append(_text(left + wide + 5, y + 12, word))
    return _svg(title, _TOP + 22 * len(rows), drawn)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], across: str, unit: str) -> str:
    """Lines through points (x, y), each in the CSS class of its name, y from 0."""
    points = [point for each in series.values() for point in each]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    top = max(y for _, y in points) or 1.0
    left, right, bottom = 52, WIDTH - 16, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        share = 0.5 if first == last else (x - first) / (last - first)
        return left + (right - left) * share, bottom - (bottom - _TOP) * y / (1.08 * top)

    drawn = []
    for tick in ticks(0, 1.08 * top, 4):
        y = place(first, tick)[1]
        drawn.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(_text(left - 6, y + 4, f"{tick:g}", "end"))
    places = {x: place(x, 0)[0] for x, _ in points}
    drawn += [_text(at, bottom + 15, f"{tick:g}", "middle") for tick, at in places.items()]
    for number, (name, found) in enumerate(series.items()):
        through = [place(*point) for point in found]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in through)
        drawn.append(f'<polyline class="{escape(name)}" points="{path}"/>')
        drawn += [f'<circle class="{escape(name)}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in through]
        drawn.append(f'<rect class="{escape(name)}" x="{left + 4 + 90 * number}" y="4" width="11" height="11"/>')
        drawn.append(_text(left + 20 + 90 * number, 14, name))
    drawn.append(_text((left + right) / 2, _HEIGHT - 4, across, "middle"))
    drawn.append(_text(2, 14, unit))
    return _svg(title, _HEIGHT, drawn)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most `most + 1` of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(start, math.floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, said: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def _svg(title: str, height: int, drawn: Sequence[str]) -> str:
    inside = "\n".join(drawn)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">\n{inside}\n</svg>'
