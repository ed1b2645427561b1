"""What the documents say of the main table, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.blocks import NotMeasuredError, on_machine, percent, result, seconds, table

TASKS = ("what", "colour", "count", "where", "presence", "read", "describe", "all")
NEAR = 0.01
"""Of two settings whose means are no further apart, the cheaper one is taken."""


def shares(row: Any, task: str) -> list[float]:
    """Of right answers, one for each seed."""
    return [seed["accuracy"][task] for _, seed in sorted(row["seeds"].items())]


def with_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def chosen(rows: dict[str, Any]) -> str:
    """The setting that defaults should follow: the fewest FLOPs of those that are near the best."""
    settings = {name: row for name, row in rows.items() if row["group"] == "skip"}
    best = max(mean(shares(row, "all")) for row in settings.values())
    near = [name for name, row in settings.items() if mean(shares(row, "all")) >= best - NEAR]
    return min(near, key=lambda name: settings[name]["flops"])


def main_table() -> str:
    """Accuracy of every variant, what it takes, and what follows."""
    found = result("main_table")
    rows: dict[str, Any] = found["variants"]
    if not {"dense", "skip-middle", "skip-large", "skip-small"} <= rows.keys():
        raise NotMeasuredError("the main table is not done: go on with `python -m benchmarks.main_table`")
    design, times = found["design"], found.get("times")
    accuracy = [
        [row["title"], str(len(row["seeds"])), *(with_spread(shares(row, task)) for task in TASKS)]
        for row in rows.values()
    ]
    header = ["right answers, %", "seeds", *TASKS[:-1], "**mean**"]
    dense = rows["dense"]["flops"]
    costs = [
        [
            row["title"],
            f"{row['prefill_rows']:.3g}",
            f"{row['cache_rows']:.3g}",
            f"{row['flops'] / 1e9:.2f}",
            percent(row["flops"] / dense),
            *_times(times, name),
        ]
        for name, row in rows.items()
    ]
    measured = "" if times is None else f" Times are medians, all variants in turn; {on_machine(times)}."
    return (
        "![accuracy against FLOPs](../benchmarks/results/main_table.png)\n\n"
        + table(header, accuracy)
        + f"\n\nMean and standard deviation over seeds. {design['base_steps']:,} steps of a dense base, then"
        + f" {design['steps']:,} steps of {design['batch_size']} pictures for each, at most"
        + f" {design['learning_rate']:g} of learning rate;"
        + f" {design['test_pictures'] * design['questions_per_picture']:,} questions about unseen compositions."
        + f" {on_machine(found)}.\n\n"
        + table(
            ["", "rows in prefill", "in the cache", "prefill GFLOPs", "of dense", "a training step", "first token"],
            costs,
        )
        + "\n\nVisual rows, as means over layers; FLOPs of the decoder for one picture and 24 rows of text, and of what"
        + f" ranks, merges and pools. A training step is of {design['batch_size']} pictures that are encoded already; a"
        + f" first token begins with pixels.{measured}\n\n"
        + _said(rows)
    )


def _times(times: Any, name: str) -> list[str]:
    if times is None:
        return ["", ""]
    return [seconds(times[part][name]["median"]) if name in times[part] else "" for part in ("step", "first_token")]


def _said(rows: dict[str, Any]) -> str:
    name = chosen(rows)
    row, dense = rows[name], rows["dense"]
    points = 100 * (mean(shares(row, "all")) - mean(shares(dense, "all")))
    text = (
        f"Of the three settings, **{row['title']}** has the fewest FLOPs among those within {100 * NEAR:g} point of the"
        f" best: the defaults should follow it. It is {abs(points):.1f} points"
        f" {'above' if points > 0 else 'below'} dense at {percent(row['flops'] / dense['flops'])} of its FLOPs."
    )
    for kept in ("middle-kept", "seen-by-all-kept"):
        if kept in rows:
            same = [each["same_answers"] for each in rows[kept]["seeds"].values()]
            text += f" {rows[kept]['title']}: {percent(min(same))} of answers are word for word those with it."
    return text
