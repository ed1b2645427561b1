"""One model at several skip settings: what each scores and takes, and the one to choose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from skipvision.pictures import open_image
from svcli.engines import EngineName
from svcli.evaluation.askers import BLIND, BundleAsker, own_name
from svcli.evaluation.intervals import Interval
from svcli.evaluation.report import Answers, Report
from svcli.evaluation.run import Work
from svcli.evaluation.task import Item
from svcli_export.manifest import DENSE, Manifest, setting_text

_WARM_UP = 1
"""Rounds that do not count."""


@dataclass(frozen=True)
class Point:
    """One setting."""

    setting: str
    """As users write it: `44/69`, or `off`."""
    asker: str
    figure: float
    """In the unit of the task's metric."""
    interval: Interval | None
    over_best: Interval | None
    """How much it is above the best figure, on the same items; None of the best one, or where it cannot be told."""
    visual_tokens: float
    """Means over items."""
    cached_rows: float
    flops: float
    first_token: float | None
    """Median seconds, from pixels on, all settings in turn; None where it was not measured."""
    is_trained: bool
    """Whether the model was trained with this setting."""


@dataclass(frozen=True)
class Choice:
    """The setting to choose, and why."""

    setting: str
    reason: str


def asked(report: Report) -> tuple[Answers, ...]:
    """Who answers with a picture, but for those who could be asked nothing: they have neither a figure nor a cost."""
    return tuple(each for each in report.answers if each.name != BLIND and not each.all_failed)


def points(report: Report, manifest: Manifest, first_tokens: dict[str, float]) -> tuple[Point, ...]:
    """Of all who were `asked`, fewest FLOPs first."""
    answers = sorted(asked(report), key=lambda each: (each.mean("flops") or 0.0, -each.sample.value))
    best = max(answers, key=lambda each: each.sample.value, default=None)
    found = []
    for each in answers:
        own = manifest if each.name == own_name(manifest) else manifest.variant(each.name)
        found.append(
            Point(
                setting=setting_text(own.config.skip),
                asker=each.name,
                figure=each.sample.value,
                interval=each.interval,
                over_best=None if best is None or each is best else each.over(best),
                visual_tokens=each.mean("visual_tokens") or 0.0,
                cached_rows=each.mean("cached_rows") or 0.0,
                flops=each.mean("flops") or 0.0,
                first_token=first_tokens.get(each.name),
                # Variants are other settings of the same weights.
                is_trained=own is manifest and (own.config.skip is None or own.config.skip_trained),
            )
        )
    return tuple(found)


def front(found: Sequence[Point]) -> tuple[Point, ...]:
    """Those that no other beats: none scores as much for less. `found`: the cheapest first, as of `points`."""
    best, kept = float("-inf"), []
    for point in found:
        if point.figure > best:
            best = point.figure
            kept.append(point)
    return tuple(kept)


def choose(found: Sequence[Point], within: float, metric: str) -> Choice:
    """The fewest FLOPs among the settings whose figure is at most `within`, a share, below the best one.

    Figures decide. Intervals of the differences to the best one say what chance leaves open: that the chosen setting is
    further below, and that a cheaper one is not. `found`: not empty, the cheapest first, as of `points`.
    """
    best = max(found, key=lambda point: point.figure)
    margin = within * abs(best.figure)
    chosen = next(point for point in found if point.figure >= best.figure - margin)
    if chosen is not best:
        reason = f"it has the fewest FLOPs of those at most {within:.1%} below the best {metric}"
        reason += f", {chosen.figure:.4g} to {best.figure:.4g} of {_named(best)}"
    elif best is found[0]:
        reason = f"it has the best {metric}, and none has fewer FLOPs"
    else:
        reason = f"it has the best {metric}, and every setting with fewer FLOPs is more than {within:.1%} lower"
    over = chosen.over_best
    if over is not None:
        reason += f", a difference of {over.value:+.3g} ({over.low:+.3g} to {over.high:+.3g}) on the same items"
    dense = next((point for point in found if point.asker == DENSE), None)
    if dense is not None and chosen is not dense:
        reason += f"; it takes {chosen.flops / dense.flops:.0%} of the FLOPs of dense"
    if left_open := _left_open(found[: found.index(chosen)], over, margin, within):
        reason += f"; so few items leave open {left_open}: ask more of them before you rely on it"
    if not chosen.is_trained:
        reason += "; the model was not trained with it, so train it with this setting and look again"
    return Choice(chosen.setting, f"{reason}.")


def _left_open(cheaper: Sequence[Point], over: Interval | None, margin: float, within: float) -> str:
    """What may be otherwise than the figures have it."""
    said = []
    if over is not None and over.low < -margin:
        said.append(f"that it is {abs(over.low):.3g} below")
    as_good = [each.setting for each in cheaper if each.over_best is not None and each.over_best.high >= -margin]
    if as_good:
        said.append(f"that {' or '.join(as_good)} is no more than {within:.1%} below")
    return ", and ".join(said)


def askable(report: Report, work: Work) -> Iterator[Item]:
    """Items with pictures that none of those who were `asked` failed at."""
    failed = {line.item.id for each in asked(report) for line in each.lines if line.said is None}
    return (item for item, _ in work.items() if item.pictures and item.id not in failed)


def first_tokens(
    names: Sequence[str],
    bundle: Path,
    manifest: Manifest,
    items: Iterable[Item],
    engine: EngineName,
    threads: int | None,
    rounds: int,
) -> dict[str, float]:
    """Median seconds from pixels to the first token of each, all of them in turn on the same pictures."""
    shown = list(islice(items, rounds + _WARM_UP))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        askers = []
        for name in names:
            askers.append(BundleAsker(name, bundle, manifest, engine, threads, keeps_pictures=False))
            stack.callback(askers[-1].close)
        for number in range(rounds + _WARM_UP if shown else 0):
            item = shown[number % len(shown)]
            images: list[Image.Image] = [open_image(each, manifest.image.transparency).image for each in item.pictures]
            for asker in askers if number % 2 else reversed(askers):
                said = asker.answer(item.question, images, 1)
                if number >= _WARM_UP:
                    seconds[asker.name].append(said.first_token)
    return {name: median(each) for name, each in seconds.items() if each}


def remarks(found: Sequence[Point], report: Report) -> list[str]:
    """What must be known beside: items that could not be asked, and whether the task needs pictures at all."""
    said = [*report.few(), *report.failed()]
    blind = next((each for each in report.answers if each.name == BLIND), None)
    if blind is not None:
        best = max(point.figure for point in found)
        useless = "" if best > blind.sample.value else ": these items do not need one, and tell nothing of settings"
        said.append(f"Without a picture: {blind.sample.value:.4g}, with it at best {best:.4g}{useless}.")
    if not all(point.is_trained for point in found):
        said.append("Settings that the weights were not trained with score less than they could.")
    return said


def told(found: Sequence[Point], choice: Choice, report: Report) -> dict[str, Any]:
    """For programs."""
    return {
        "task": report.task.name,
        "split": report.split,
        "metric": report.task.metric,
        "settings": [asdict(point) for point in found],
        "front": [point.setting for point in front(found)],
        "choice": asdict(choice),
        "remarks": remarks(found, report),
    }


def _named(point: Point) -> str:
    return "dense" if point.asker == DENSE else point.setting
