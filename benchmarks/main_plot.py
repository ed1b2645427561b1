"""Draws the main table: accuracy against FLOPs, and what each part of Skip-Vision is worth.

python -m benchmarks.main_plot            # benchmarks/results/main_table.png
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.main_blocks import shares
from benchmarks.measuring import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people tell apart; markers tell them apart in grey print.
_STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#000000", "marker": "o"},
    "skip": {"color": "#0072B2", "marker": "s"},
    "rival": {"color": "#D55E00", "marker": "^"},
    "ablation": {"color": "#009E73", "marker": "D"},
}
_DPI = 150
_NAMES = 2.0
"""Where names begin, in GFLOPs: to the right of all but dense."""
_GAP = 0.06
"""Between two names, in parts of the range of heights."""


def bars(row: Any) -> tuple[float, list[list[float]]]:
    """Mean over seeds in percent, and how far the lowest and the highest seed are from it."""
    values = [100 * share for share in shares(row, "all")]
    middle = mean(values)
    return middle, [[middle - min(values)], [max(values) - middle]]


def against_flops(axes: Axes, rows: dict[str, Any]) -> None:
    """Dense, Skip-Vision and its rivals."""
    shown = [row for row in rows.values() if row["group"] in ("dense", "skip", "rival")]
    heights = [bars(row)[0] for row in shown]
    gap = _GAP * (max(heights) - min(heights))
    for row, at in zip(shown, apart(heights, gap), strict=True):
        middle, spread = bars(row)
        billions, style = row["flops"] / 1e9, _STYLES[row["group"]]
        axes.errorbar(billions, middle, spread, **style, capsize=3, linestyle="none")
        line = {"arrowstyle": "-", "color": style["color"], "linewidth": 0.4}
        name = {"fontsize": 8, "color": style["color"], "va": "center", "arrowprops": line}
        if row["group"] == "dense":
            axes.annotate(row["title"], (billions, middle), (billions - 0.12, middle), ha="right", **name)
        else:
            axes.annotate(row["title"], (billions, middle), (_NAMES, at), **name)
    settings = sorted((row["flops"] / 1e9, bars(row)[0]) for row in shown if row["group"] == "skip")
    axes.plot(*zip(*settings, strict=True), color=_STYLES["skip"]["color"], linewidth=0.8)
    axes.set_xlabel("prefill, GFLOPs (one picture, 24 rows of text)")
    axes.set_ylabel("right answers, mean over tasks, %")
    axes.set_xlim(left=0)


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved up where they are less than `gap` above the next one below."""
    moved = list(heights)
    below = float("-inf")
    for place in sorted(range(len(heights)), key=heights.__getitem__):
        below = moved[place] = max(heights[place], below + gap)
    return moved


def parts(axes: Axes, rows: dict[str, Any]) -> None:
    """The middle setting, and what becomes of it when one thing is changed."""
    shown = [rows["skip-middle"], *(row for row in rows.values() if row["group"] == "ablation")]
    for place, row in enumerate(reversed(shown)):
        middle, spread = bars(row)
        axes.errorbar(middle, place, xerr=spread, **_STYLES[row["group"]], capsize=3, linestyle="none")
    axes.axvline(bars(shown[0])[0], color=_STYLES["skip"]["color"], linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["title"] for row in reversed(shown)], fontsize=8)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("right answers, mean over tasks, %")


def draw(results: dict[str, Any], path: Path) -> None:
    """Both figures side by side, written in one move."""
    from matplotlib.figure import Figure

    rows = results["variants"]
    seeds = max(len(row["seeds"]) for row in rows.values())
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    against_flops(left, rows)
    parts(right, rows)
    floor = f"; blind: {bars(rows['blind'])[0]:.1f} %" if "blind" in rows else ""
    left.set_title(f"one further budget for all{floor}", fontsize=10)
    right.set_title("the middle setting, one thing changed", fontsize=10)
    figure.suptitle(f"Unseen compositions; mean, lowest and highest of {seeds} seed{'s' * (seeds > 1)}", fontsize=10)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=_DPI, metadata={"Software": None})
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "main_table.json")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "main_table.png")
    options = parser.parse_args()
    draw(json.loads(options.results.read_text(encoding="utf-8")), options.output)


if __name__ == "__main__":
    main()
