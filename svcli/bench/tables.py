"""The report as tables, which the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from svcli import ui
from svcli.bench.energy import NOT_TOLD
from svcli.bench.report import TITLES, Point, Report, Side, Stage
from svcli.bench.statistics import Ratio


@dataclass(frozen=True)
class Table:
    """What stands in its cells is text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    below: str = ""
    """What else must be known to read it."""


def tables(report: Report) -> Iterator[Table]:
    """All of them, in the order in which they are read."""
    names = tuple(report.sides)
    yield Table("Time", _header(names, "skipped / dense"), tuple(_times(report.stages, names)))
    yield _work(report)
    for title, points, unit in (
        ("Several sequences side by side", report.batch, "batch {}, "),
        ("Longer prompts, rows as the plain model counts them", report.context, "{} rows, "),
    ):
        if points:
            yield Table(title, _header(names, "skipped / dense"), tuple(_sweep(points, names, unit)))
    for peer in report.peers:
        sides = tuple(next(iter(peer.stages.values())).sides)
        yield Table(peer.title, _header(sides, "ours / theirs"), tuple(_times(peer.stages, sides)), f"{peer.weights}.")
    if report.failed_peers:
        failed = tuple((peer.place, peer.why) for peer in report.failed_peers)
        yield Table("Peers that could not be measured", ("", "why"), failed)
    yield _memory(report)


def time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def interval(ratio: Ratio) -> str:
    return f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _header(names: Sequence[str], ratio: str) -> tuple[str, ...]:
    spreads = (f"{side} {mark}" for side in names for mark in ("p50", "p95"))
    return ("", *spreads, *[ratio] * (len(names) > 1))


def _times(stages: Mapping[str, Stage], names: Sequence[str], place: str = "") -> Iterator[tuple[str, ...]]:
    for name, stage in stages.items():
        spreads = (stage.sides[side].spread for side in names)
        cells = (time(value) for each in spreads for value in (each.p50, each.p95))
        ratio = "-" if stage.ratio is None else interval(stage.ratio)
        yield (f"{place}{TITLES[name]}", *cells, *[ratio] * (len(names) > 1))


def _sweep(points: Sequence[Point], names: Sequence[str], unit: str) -> Iterator[tuple[str, ...]]:
    for point in points:
        yield from _times(point.stages, names, unit.format(point.at))


def _work(report: Report) -> Table:
    rows = []
    for name, stage in report.stages.items():
        for side, figure in stage.sides.items():
            if figure.flops is None or figure.num_bytes is None:
                continue
            best = "" if figure.roof_seconds is None else time(figure.roof_seconds)
            share = "" if figure.roof_share is None else f"{figure.roof_share:.0%}"
            rows.append((f"{TITLES[name]}, {side}", ui.flops(figure.flops), ui.size(figure.num_bytes), best, share))
    roof = report.roof
    known = (
        "Roofline: this GPU's peaks are not known."
        if roof is None
        else f"Roofline: {roof.flops_per_second / 1e9:,.0f} GFLOP/s, {roof.bytes_per_second / 1e9:,.1f} GB/s"
        f" ({roof.source})."
    )
    header = "", "FLOPs", "bytes moved", "roofline", "reached"
    return Table("Work, and the time that it takes at best", header, tuple(rows), known)


def _memory(report: Report) -> Table:
    held: tuple[Side, ...] = tuple(report.sides.values())
    rows = [
        ("rows of the prompt", *(f"{side.prompt_rows:,}" for side in held)),
        ("KV rows behind it", *(f"{side.kv_rows:,}" for side in held)),
        ("KV cache of the prompt", *(ui.size(side.kv_bytes) for side in held)),
        ("KV cache at the end", *(ui.size(side.kv_bytes_end) for side in held)),
        ("KV cache reserved", *(ui.size(side.kv_bytes_reserved) for side in held)),
        ("peak memory of a process", *(_size(side.peak_bytes) for side in held)),
    ]
    if any(side.gpu_bytes is not None for side in held):
        rows.append(("memory on the GPU", *(_size(side.gpu_bytes) for side in held)))
    for source, stage in report.energy.items():
        joules = (f"{stage.sides[name].spread.p50:.3g} J" for name in report.sides)
        rows.append((f"energy of an answer, {source}", *joules))
    if not report.energy:
        rows.append(("energy of an answer", *[NOT_TOLD] * len(held)))
    return Table("Memory and energy", ("", *report.sides), tuple(rows))


def _size(num_bytes: int | None) -> str:
    return "not told" if num_bytes is None else ui.size(num_bytes)
