"""Measured values and what they had to do, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from svcli.bench.report import Figure, Roof, Stage
from svcli.bench.statistics import paired_ratio, spread
from svcli.bench.work import Work, roof_seconds


def compared(
    seconds: Mapping[str, Sequence[float]],
    pieces: Mapping[str, tuple[Work, ...] | None] | None = None,
    roof: Roof | None = None,
) -> Stage:
    """One measure of all sides, and of two their ratio. A counter that stood still gives none."""
    figures = {side: figure(values, (pieces or {}).get(side), roof) for side, values in seconds.items()}
    ratio = None
    if len(seconds) == 2:
        first, second = seconds.values()
        ratio = paired_ratio(second, first) if min(*first, *second) > 0 else None
    return Stage(sides=figures, ratio=ratio)


def figure(values: Sequence[float], pieces: tuple[Work, ...] | None = None, roof: Roof | None = None) -> Figure:
    if pieces is None:
        return Figure(values=tuple(values), spread=spread(values))
    return Figure(
        values=tuple(values),
        spread=spread(values),
        flops=sum(piece.flops for piece in pieces),
        num_bytes=sum(piece.num_bytes for piece in pieces),
        roof_seconds=roof_seconds(pieces, roof),
    )
