"""Draws docs/layout_orders.svg and docs/layout_masks.svg: a small prompt as `TokenLayout` lays it out.

Run it from the root of the repository: python docs/layout_figures.py
"""

from __future__ import annotations

from pathlib import Path

from skipvision.config import Visibility
from skipvision.layout import RETAINED, SKIPPED, SUMMARY, TEXT, ImageSpan, Ints, TokenLayout

SEGMENTS = (2, ImageSpan(num_retained=4, num_skipped=3, num_summary=2), 3)
"""Two rows of text, a picture, three rows of text."""

COLOURS = {TEXT: "#8a94a6", RETAINED: "#2f6fde", SUMMARY: "#e08a1e", SKIPPED: "#c9d1dd"}
NAMES = {TEXT: "text", RETAINED: "retained", SUMMARY: "summary", SKIPPED: "skipped"}
INK, FAINT, EMPTY = "#1d2433", "#5d6778", "#f1f3f7"
FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
CELL, GAP, LEFT = 38, 3, 24


def orders() -> str:
    """Each row as a box with its position id, in attention order above and in memory order below."""
    layout = TokenLayout(SEGMENTS)
    parts: list[str] = []
    rows = (
        ("Attention order", "who stands before whom; numbers are position ids", range(layout.length), 20),
        ("Memory order", "kept rows, then skipped ones, with the positions that they had", layout.positions, 150),
    )
    for title, why, positions, y in rows:
        parts += [_text(LEFT, y + 14, title, weight="bold"), _text(LEFT, y + 32, why, FAINT, 13)]
        for column, position in enumerate(positions):
            parts += _box(LEFT + column * (CELL + GAP), y + 44, int(layout.kinds[position]), str(position))
    kept = LEFT + layout.num_kept * (CELL + GAP) - GAP
    parts.append(f'<path d="M{LEFT} 240 V247 H{kept} V240" fill="none" stroke="{FAINT}"/>')
    parts.append(_text(LEFT, 265, f"[:{layout.num_kept}] feed-forward layers and KV cache", FAINT, 13))
    width = LEFT + layout.length * (CELL + GAP) + LEFT - GAP
    return _svg(width, 310, [*parts, *_legend(285)])


def masks() -> str:
    """Which row attends to which, in attention order, for both rules of visibility."""
    parts: list[str] = []
    side = 20
    titles: tuple[tuple[Visibility, str], ...] = (
        ("image", "visibility image: the same picture alone"),
        ("all", "visibility all: every later row"),
    )
    for number, (visibility, title) in enumerate(titles):
        layout = TokenLayout(SEGMENTS, visibility)
        left, top = LEFT + number * (layout.length * side + 60), 62
        parts.append(_text(left, 34, title, weight="bold"))
        seen = attends(layout)
        for asking in range(layout.length):
            for asked in range(layout.length):
                colour = COLOURS[int(layout.kinds[asked])] if seen[asking, asked] else EMPTY
                parts.append(_rect(left + asked * side, top + asking * side, side - 2, side - 2, colour))
    layout = TokenLayout(SEGMENTS)
    bottom = 62 + layout.length * side + 22
    width = LEFT + 2 * layout.length * side + 60 + LEFT
    return _svg(width, bottom + 25, [*parts, *_legend(bottom)])


def attends(layout: TokenLayout) -> Ints:
    """[L, L] whether the row at one position (first axis) attends to that at another, as the decoder's mask says."""
    positions, until = layout.positions, layout.visible_until
    asking, asked = positions[:, None], positions[None, :]
    in_memory_order = (asked <= asking) & (asking <= until[None, :])
    back = positions.argsort()
    return in_memory_order[back][:, back].astype("int64")


def _legend(y: int) -> list[str]:
    parts, x = [], LEFT
    for kind, name in NAMES.items():
        parts += [_rect(x, y, 14, 14, COLOURS[kind]), _text(x + 20, y + 12, name, FAINT, 13)]
        x += 110
    return parts


def _box(x: int, y: int, kind: int, label: str) -> list[str]:
    dark = kind == SKIPPED
    return [
        _rect(x, y, CELL, CELL, COLOURS[kind]),
        _text(x + 12 if len(label) == 1 else x + 9, y + 25, label, INK if dark else "#ffffff"),
    ]


def _rect(x: int, y: int, width: int, height: int, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{colour}"/>'


def _text(x: int, y: int, words: str, colour: str = INK, size: int = 14, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{colour}">{words}</text>'


def _svg(width: int, height: int, parts: list[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{FONTS}">',
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


FIGURES = {"layout_orders.svg": orders, "layout_masks.svg": masks}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (Path(__file__).parent / name).write_text(draw(), encoding="utf-8")
        print(f"wrote {name}")
