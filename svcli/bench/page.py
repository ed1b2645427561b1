"""The report as one HTML page that asks nothing of anybody: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from svcli import ui
from svcli.bench.report import STAGES, TITLES, Point, Report, Stage
from svcli.bench.svg import Interval, bars, intervals, lines, stacks
from svcli.bench.tables import Table, tables
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
        *(_section(table) for table in tables(report)),
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
    return ui.printable(f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n')


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


def _section(table: Table) -> str:
    below = _soft(table.below) if table.below else ""
    return f"<h2>{escape(table.title)}</h2>{_table(table.header, table.rows)}{below}"


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
