"""Two runs against each other: what may be said of them, and what not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from svcli.bench.report import TITLES, Report, Stage, UnlikeError
from svcli.bench.statistics import FEWEST, Ratio, drift, unpaired_ratio
from svcli.errors import UsageError

KINDS = ("machine", "versions", "model", "settings")


@dataclass(frozen=True)
class Line:
    """One figure of one side in both runs."""

    title: str
    medians: tuple[float, float]
    ratio: Ratio
    """The later run over the earlier one."""
    verdict: str
    """`faster`, `slower`, or why nothing is said."""


@dataclass(frozen=True)
class Comparison:
    """What both runs say together."""

    differences: tuple[str, ...]
    """In what they were measured otherwise, though that was asked for."""
    lines: tuple[Line, ...]

    @property
    def conclusions(self) -> tuple[str, ...]:
        """A sentence each."""
        said = []
        for verdict, verb in (("faster", "B is faster in"), ("slower", "B is slower in")):
            if found := [line.title for line in self.lines if line.verdict == verdict]:
                said.append(f"{verb} {', '.join(found)}.")
        return tuple(said) or ("No difference between A and B is shown.",)


def compare_reports(before: Report, after: Report, across: tuple[str, ...] = ()) -> Comparison:
    """`across`: kinds of differences that are meant.

    Raises UnlikeError for any other, UsageError for an unknown kind.
    """
    if unknown := [kind for kind in across if kind not in KINDS]:
        raise UsageError(f"--across {unknown[0]}: choose among {', '.join(KINDS)}")
    found = {kind: list(_differences(_identity(before)[kind], _identity(after)[kind])) for kind in KINDS}
    others = {peer.name: peer.version for peer in after.peers}
    found["versions"] += [
        f"{peer.name} {peer.version} -> {others[peer.name]}"
        for peer in before.peers
        if others.get(peer.name, peer.version) != peer.version
    ]
    unlike = {kind: each for kind, each in found.items() if each and kind not in across}
    if unlike:
        what = "; ".join(f"{kind}: {', '.join(each)}" for kind, each in unlike.items())
        options = " ".join(f"--across {kind}" for kind in unlike)
        raise UnlikeError(
            f"A and B were not measured alike ({what}); to hold them against each other all the same: {options}"
        )
    differences = tuple(f"{kind} differs: {', '.join(each)}" for kind, each in found.items() if each)
    return Comparison(differences, tuple(_lines(before, after)))


def _identity(report: Report) -> dict[str, Mapping[str, Any]]:
    """What must be the same for figures to be held against each other, by kind."""
    machine, model = report.machine.model_dump(), report.model.model_dump()
    del machine["load_before"], machine["others"], model["name"]
    settings = report.settings.model_dump()
    del settings["warm_up"]
    return {"machine": machine, "versions": report.versions, "model": model, "settings": settings}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(first.keys() | second.keys()):
        mine, other = first.get(name), second.get(name)
        if mine != other:
            yield f"{name} {_short(mine)} -> {_short(other)}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _lines(before: Report, after: Report) -> Iterator[Line]:
    is_crowded = before.machine.is_crowded or after.machine.is_crowded
    later = {(part, at, name): stage for part, at, name, stage in after.parts() if part != "energy"}
    for part, at, name, stage in before.parts():
        other = later.get((part, at, name))
        if other is None:
            continue
        place = {"stages": "", "batch": f"batch {at}, ", "context": f"{at} rows, ", "peer": f"{at}, "}[part]
        for side in stage.sides:
            if side in other.sides:
                yield _line(f"{place}{TITLES[name]}, {side}", stage, other, side, is_crowded)


def _line(title: str, before: Stage, after: Stage, side: str, is_crowded: bool) -> Line:
    first, second = before.sides[side], after.sides[side]
    ratio = unpaired_ratio(second.values, first.values)
    medians = first.spread.p50, second.spread.p50
    num_rounds = min(len(first.values), len(second.values))
    if is_crowded:
        return Line(title, medians, ratio, "open: the machine was busy with others")
    if num_rounds < FEWEST:
        return Line(title, medians, ratio, f"open: fewer than {FEWEST} rounds")
    verdict = ratio.verdict(num_rounds)
    moved = max(drift(first.values), drift(second.values))
    if verdict == "open":
        return Line(title, medians, ratio, "open")
    if abs(ratio.ratio - 1) <= moved:
        return Line(title, medians, ratio, f"open: times drifted by {moved:.0%} inside of a run")
    return Line(title, medians, ratio, "faster" if verdict == "lower" else "slower")
