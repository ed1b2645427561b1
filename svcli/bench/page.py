"""The report as one HTML page that asks nothing of anybody: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from svcli import ui
from svcli.bench.energy import NOT_TOLD
from svcli.bench.report import STAGES, TITLES, Point, Report, Stage
from svcli.bench.statistics import Ratio
from svcli.bench.svg import Interval, bars, intervals, lines, stacks
from svcli.bench.words import conclusions

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60656c; --paper: #fff; --card: #f5f6f7; --rule: #d9dce0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eceef0; --soft: #a5abb3; --paper: #15181b; --card: #1f2327; --rule: #3a4047; } }
body { margin: 0 auto; padding: 16px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .2em 0; } h2 { font-size: 1.1rem; margin: 1.6em 0 .5em; }
h3 { font-size: 1rem; margin: 0 0 .5em; } p { margin: .4em 0; } .soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; margin-top: 1.2em; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.card { background: var(--card); border-radius: 8px; padding: 14px; } svg { width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1em; font-size: .9rem; } dd { margin: 0; }
dt { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: var(--soft); }
text { font: 11px system-ui, sans-serif; fill: var(--ink); }
rect.dense, circle.dense, rect.theirs { fill: #d55e00; } rect.skipped, circle.skipped, rect.ours { fill: #0072b2; }
polyline { fill: none; stroke-width: 2; } polyline.dense { stroke: #d55e00; } polyline.skipped { stroke: #0072b2; }
line.lower, line.higher, line.open { stroke-width: 3; } line.lower { stroke: #009e73; } circle.lower { fill: #009e73; }
line.higher { stroke: #cc3311; } circle.higher { fill: #cc3311; } line.open { stroke: #8b929a; }
circle.open { fill: #8b929a; } line.one { stroke: var(--soft); stroke-dasharray: 3 3; }
line.grid { stroke: var(--rule); }
.part0 { fill: #999999; } .part1 { fill: #e69f00; } .part2 { fill: #0072b2; } .part3 { fill: #56b4e9; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_MS = 1000


def page(report: Report) -> str:
    """The whole page."""
    settings, machine = report.settings, report.machine
    title = f"svcli bench: {report.model.name}"
    said = conclusions(report)
    parts = [
        f"<h1>{escape(title)}</h1>",
        _soft(_where(report)),
        *(f"<p>{escape(sentence)}</p>" for sentence in said),
        *(f"<p><strong>Note:</strong> {escape(remark)}</p>" for remark in report.remarks),
        f'<div class="cards">{"".join(_cards(report))}</div>',
        "<h2>Time</h2>",
        _times(report),
        "<h2>Work, and the time that it takes at best</h2>",
        _work(report),
        *_peers(report),
        "<h2>Memory and energy</h2>",
        _memory(report),
        "<h2>How it was measured</h2>",
        _facts(
            [
                (
                    "model",
                    f"{report.model.name}, weights {report.model.weights[:12]}, skip {_setting(report)}",
                ),
                ("machine", f"{machine.gpu or machine.cpu}, {machine.cores} cores, load before {machine.load_before}"),
                ("versions", ", ".join(f"{name} {number}" for name, number in report.versions.items())),
                ("question", settings.question),
                ("pictures", ", ".join(each[:12] for each in settings.pictures)),
            ],
        ),
        _soft(
            "Ratios are skipped over dense. Both sides answer once in each round, in an order that turns;"
            " intervals are the middle 95 % of what resampled rounds give, drawn in pairs."
        ),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _where(report: Report) -> str:
    settings = report.settings
    return (
        f"{report.date} · {report.machine.gpu or report.machine.cpu} · {settings.engine}, {report.model.precision} ·"
        f" {report.num_rounds} rounds of {settings.tokens} tokens"
    )


def _cards(report: Report) -> list[str]:
    later = report.settings.tokens - 1
    answer = {
        side: [
            (TITLES[name], _MS * report.stages[name].sides[side].spread.p50)
            for name in ("picture", "vision", "prefill")
        ]
        + [(f"decode, {later} tokens", _MS * later * report.stages["decode"].sides[side].spread.p50)]
        for side in report.sides
    }
    cards = [_card("Where the time of an answer goes", stacks("Time of an answer by stage", answer))]
    is_crowded = report.machine.is_crowded
    rows = [_interval(TITLES[name], report.stages[name], is_crowded) for name in STAGES]
    if known := [row for row in rows if row is not None]:
        cards.append(_card("Skipped over dense, with 95 % intervals", intervals("Ratios", known, "no difference")))
    reached = [
        (f"{TITLES[name]}, {side}", share, side)
        for name, stage in report.stages.items()
        for side, figure in stage.sides.items()
        if (share := figure.roof_share) is not None and name != "end_to_end"
    ]
    if reached:
        said = [f"{share:.0%}" for _, share, _ in reached]
        cards.append(_card("Share of the roofline that is reached", bars("Share of the roofline", reached, said)))
    cards += _sweep("A token of each of several sequences", report.batch, "decode", "sequences")
    cards += _sweep("Prefill of longer prompts", report.context, "prefill", "rows, as the plain model counts")
    cards += _sweep("A token behind longer prompts", report.context, "decode", "rows, as the plain model counts")
    return cards


def _sweep(title: str, points: Sequence[Point], name: str, across: str) -> list[str]:
    if not points:
        return []
    series = {
        side: [(point.at, _MS * point.stages[name].sides[side].spread.p50) for point in points]
        for side in points[0].stages[name].sides
    }
    return [_card(title, lines(title, series, across, "ms"))]


def _interval(label: str, stage: Stage, is_crowded: bool) -> Interval | None:
    found, style = stage.ratio, "open" if is_crowded else stage.verdict
    return None if found is None else Interval(label, found.ratio, found.low, found.high, style)


def _card(title: str, drawing: str) -> str:
    return f'<section class="card"><h3>{escape(title)}</h3>{drawing}</section>'


def _times(report: Report) -> str:
    sides = list(report.sides)
    head = [
        "",
        *(f"{side} {mark}" for side in sides for mark in ("p50", "p95")),
        *["skipped / dense"] * (len(sides) > 1),
    ]
    rows = []
    for part, at, name, stage in report.parts():
        if part in ("energy", "peer"):
            continue
        place = {"stages": "", "batch": f"batch {at}, ", "context": f"{at} rows, "}[part]
        spreads = [stage.sides[side].spread for side in sides]
        cells = [_time(value) for each in spreads for value in (each.p50, each.p95)]
        rows.append((place + TITLES[name], *cells, *[_ratio(stage.ratio)] * (len(sides) > 1)))
    return _table(head, rows)


def _work(report: Report) -> str:
    rows = []
    for name, stage in report.stages.items():
        for side, figure in stage.sides.items():
            if figure.flops is None or figure.num_bytes is None:
                continue
            best = "" if figure.roof_seconds is None else _time(figure.roof_seconds)
            share = "" if figure.roof_share is None else f"{figure.roof_share:.0%}"
            rows.append((f"{TITLES[name]}, {side}", ui.flops(figure.flops), ui.size(figure.num_bytes), best, share))
    roof = report.roof
    known = (
        "The peaks of this GPU are not known."
        if roof is None
        else f"Roofline: {roof.flops_per_second / 1e9:,.0f} GFLOP/s and {roof.bytes_per_second / 1e9:,.1f} GB/s,"
        f" {roof.source}."
    )
    return _table(("", "FLOPs", "bytes moved", "roofline", "reached"), rows) + _soft(known)


def _peers(report: Report) -> list[str]:
    parts = []
    for peer in report.peers:
        rows = []
        for name, stage in peer.stages.items():
            cells = [_time(value) for each in stage.sides.values() for value in (each.spread.p50, each.spread.p95)]
            rows.append((TITLES[name], *cells, _ratio(stage.ratio)))
        sides = [f"{side} {mark}" for side in stage.sides for mark in ("p50", "p95")]
        parts += [f"<h2>{escape(peer.title)}</h2>", _soft(peer.weights), _table(("", *sides, "ours / theirs"), rows)]
    return parts


def _memory(report: Report) -> str:
    held = list(report.sides.values())
    rows: list[tuple[str, ...]] = [
        ("rows of the prompt", *(str(side.prompt_rows) for side in held)),
        ("KV rows behind it", *(str(side.kv_rows) for side in held)),
        ("KV cache of the prompt", *(ui.size(side.kv_bytes) for side in held)),
        ("KV cache at the end", *(ui.size(side.kv_bytes_end) for side in held)),
        ("KV cache reserved", *(ui.size(side.kv_bytes_reserved) for side in held)),
        ("peak memory of a process", *(_size(side.peak_bytes) for side in held)),
        ("memory on the GPU", *(_size(side.gpu_bytes) for side in held)),
    ]
    for source, stage in report.energy.items():
        rows.append((f"energy of an answer, {source}", *(f"{each.spread.p50:.3g} J" for each in stage.sides.values())))
    if not report.energy:
        rows.append(("energy of an answer", *[NOT_TOLD] * len(held)))
    return _table(("", *report.sides), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
    inside = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{inside}</table></div>'


def _soft(said: str) -> str:
    return f'<p class="soft">{escape(said)}</p>'


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    inside = "".join(f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in rows)
    return f"<dl>{inside}</dl>"


def _setting(report: Report) -> str:
    skip = report.model.skip
    return "off" if skip is None else f"{skip.get('num_retained')}/{skip.get('num_skipped')}"


def _ratio(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _time(seconds: float) -> str:
    return f"{seconds * _MS:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(num_bytes: int | None) -> str:
    return "not told" if num_bytes is None else ui.size(num_bytes)
