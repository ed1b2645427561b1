"""Two runs against each other: what may be said of them, and what not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from svcli.bench.report import TITLES, Figure, Report, UnlikeError
from svcli.bench.statistics import CHANCE, FEWEST, Ratio, drift, unpaired_ratio
from svcli.errors import UsageError

KINDS = ("machine", "versions", "model", "settings")


@dataclass(frozen=True)
class Line:
    """One figure of one side in both runs."""

    title: str
    medians: tuple[float, float]
    ratio: Ratio
    """The later run over the earlier one; its interval is widened for all lines that are read together."""
    verdict: str
    """`faster`, `slower`, or why nothing is said."""


@dataclass(frozen=True)
class Comparison:
    """What both runs say together."""

    differences: tuple[str, ...]
    """In what they were measured otherwise, though that was asked for; and what one of them alone has."""
    lines: tuple[Line, ...]

    @property
    def how_sure(self) -> str:
        """What the intervals are."""
        count, level = len(self.lines), 100 - 100 * CHANCE
        if count == 1:
            return f"The interval is at {level:g} %."
        return (
            f"{count} figures are compared, each interval at {100 - 100 * CHANCE / count:.4g} % (Bonferroni), so that"
            f" all together are at {level:g} %: of 100 comparisons of equal runs, at most 5 show any difference."
        )

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

    Raises UnlikeError for any other, and where they have no figure in common; UsageError for an unknown kind.
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
    differences = [f"{kind} differs: {', '.join(each)}" for kind, each in found.items() if each]
    first, second = _figures(before), _figures(after)
    shared = [title for title in first if title in second]
    if not shared:
        raise UnlikeError("A and B have no figure in common")
    for run, figures, other in (("A", first, second), ("B", second, first)):
        if alone := [title for title in figures if title not in other]:
            differences.append(f"in {run} alone, and not compared: {'; '.join(alone)}")
    is_crowded = before.machine.is_crowded or after.machine.is_crowded
    lines = [_line(title, first[title], second[title], len(shared), is_crowded) for title in shared]
    return Comparison(tuple(differences), tuple(lines))


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
    if isinstance(value, tuple):
        return " ".join(map(_short, value)) or "none"
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _figures(report: Report) -> dict[str, Figure]:
    """Times by what they are of."""
    found = {}
    for part, at, name, stage in report.parts():
        if part == "energy":
            continue
        place = {"stages": "", "batch": f"batch {at}, ", "context": f"{at} rows, ", "peer": f"{at}, "}[part]
        found.update({f"{place}{TITLES[name]}, {side}": figure for side, figure in stage.sides.items()})
    return found


def _line(title: str, before: Figure, after: Figure, num_compared: int, is_crowded: bool) -> Line:
    ratio = unpaired_ratio(after.values, before.values, num_compared)
    medians = before.spread.p50, after.spread.p50
    num_rounds = min(len(before.values), len(after.values))
    if is_crowded:
        return Line(title, medians, ratio, "open: the machine was busy with others")
    if num_rounds < FEWEST:
        return Line(title, medians, ratio, f"open: fewer than {FEWEST} rounds")
    verdict = ratio.verdict(num_rounds)
    moved = max(drift(before.values), drift(after.values))
    if verdict == "open":
        return Line(title, medians, ratio, "open")
    if abs(ratio.ratio - 1) <= moved:
        return Line(title, medians, ratio, f"open: times drifted by {moved:.0%} inside of a run")
    return Line(title, medians, ratio, "faster" if verdict == "lower" else "slower")
