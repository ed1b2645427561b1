"""What the documents say of `svcli bench`, `svcli eval` and `svcli sweep`, run on the bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.blocks import NotMeasuredError, mebibytes, on_machine, percent, result, seconds, table
from svcli.bench.report import TITLES, Peer, Report, Stage
from svcli.bench.words import conclusions

_ASKERS = {
    "skipped": "skipping, as trained",
    "dense": "dense, the same weights",
    "random": "{} rows drawn at random",
    "pool": "pooled to {} rows",
    "blind": "blind",
}
_ALIKE = 1.25
"""From here on times of two runs are not of one machine."""
_TIMES = ["", "dense p50", "dense p95", "skipped p50", "skipped p95", "skipped to dense", "95 %"]


def bench() -> str:
    """Stages, several sequences, longer prompts, and what they say."""
    report = _report()
    rows = [[TITLES[name], *_times(stage)] for name, stage in report.stages.items()]
    for points, place in ((report.batch, "{} side by side"), (report.context, "{} rows")):
        rows += [
            [f"{place.format(point.at)}: {TITLES[name]}", *_times(stage)]
            for point in points
            for name, stage in point.stages.items()
        ]
    settings = report.settings
    how = (
        f"{report.num_rounds} rounds of {settings.tokens} tokens, in turn; {report.model.precision}, {settings.engine},"
        f" {report.machine.cpu}, {report.machine.cores} cores, onnxruntime {report.versions['onnxruntime']},"
        f" {report.date}. Rows are those of the plain model.{_unlike_speed(report)}"
    )
    said = [*conclusions(report), *(f"Note: {remark}." for remark in report.remarks)]
    return f"{table(_TIMES, rows)}\n\n{how}\n\n" + "\n".join(f"- {sentence}" for sentence in said)


def _unlike_speed(report: Report) -> str:
    """Machines of one name are not always equally fast."""
    before = result("speed")["onnxruntime"]["vision"]["dense"]["median"]
    times = report.stages["vision"].sides["dense"].spread.p50 / before
    if 1 / _ALIKE < times < _ALIKE:
        return ""
    return f" Vision takes {times:.2g} times as long as in `benchmarks.speed`, so compare inside of one table alone."


def bench_work() -> str:
    """FLOPs and bytes of each stage, and how much of the roofline is reached."""
    report, rows = _report(), []
    for name, stage in report.stages.items():
        for side, figure in stage.sides.items():
            if figure.flops is None or figure.num_bytes is None or figure.roof_seconds is None:
                continue
            counted = [f"{figure.flops / 1e9:.3g}", mebibytes(figure.num_bytes), seconds(figure.roof_seconds)]
            rows.append([f"{TITLES[name]}, {side}", *counted, percent(figure.roof_share or 0.0)])
    roof = report.roof
    said = "" if roof is None else f"{roof.flops_per_second / 1e9:,.0f} GFLOP/s and {roof.bytes_per_second / 1e9:,.1f}"
    return table(["", "GFLOPs", "moved", "roofline", "reached"], rows) + (
        f"\n\nThe roofline is {said} GB/s, {roof.source}." if roof else ""
    )


def bench_peers() -> str:
    """Other run times on the same decoder, and about the picture."""
    report, rows = _report(), []
    if not report.peers:
        raise NotMeasuredError("no peer of `svcli bench` was installed; docs/bench.md says what each needs")
    for peer in report.peers:
        for name, stage in peer.stages.items():
            ours = next(side for side in stage.sides if side != peer.name)
            sides = (stage.sides[peer.name], stage.sides[ours])
            spent = [seconds(side.spread.p50) for side in sides]
            rows.append([_run_time(peer), peer.weights, TITLES[name], *spent, *_ratio(stage)])
    held = table(["", "weights", "", "theirs p50", "ours p50", "ours to theirs", "95 %"], rows, texts=3)
    counts = ", ".join(dict.fromkeys(f"{peer.rows} rows" for peer in report.peers if peer.what == "text"))
    return (
        f"{held}\n\nDecoders on plain text where nothing else is said, {counts} in prefill, {report.num_rounds} rounds,"
        " in turn with ours; none of them skips. About a picture, rows are those in both KV caches behind the prompt."
        + "".join(f"\n\nNot measured: {peer.place}, as {peer.why}." for peer in report.failed_peers)
    )


def _run_time(peer: Peer) -> str:
    named = f"{peer.name} {peer.version}"
    return named if peer.own_rows is None else f"{named}, {peer.what}, {peer.rows} rows beside {peer.own_rows}"


def baselines() -> str:
    """The bundled model, and who keeps its score honest."""
    found = result("reduction")
    tasks = found["eval"]
    rows = []
    for name, own in tasks["bundled"]["askers"].items():
        kind, _, count = name.partition(":")
        scored = [_interval(task["askers"][name]["interval"]) for task in tasks.values()]
        over = own["own above it"]
        rows.append(
            [
                _ASKERS[kind].format(count),
                *scored,
                "" if over is None else _points(over),
                f"{own['visual_tokens']:.0f}",
                f"{own['cached_rows']:.0f}",
                f"{own['flops'] / 1e9:.1f}",
            ]
        )
    header = ["", "unseen compositions", "easy-VQA", "skipping above it", "visual tokens", "KV rows", "GFLOPs"]
    items = next(iter(tasks["bundled"]["askers"].values()))["items"]
    return table(header, rows) + (
        f"\n\nRight answers of {items:,} questions each, with 95 % intervals over pictures. All run on the weights"
        " that were trained with skipping; what a model trained for each would answer, the twins and the main table"
        " tell. The difference is of unseen compositions, in points. KV rows are those"
        f" of picture and question. {on_machine(found)}."
    )


def sweep() -> str:
    """Settings of the bundled model, and the one that is chosen."""
    found = result("reduction")
    held = found["sweep"]
    rows = [
        [
            _setting(each),
            _interval(each["interval"]),
            "" if each["over_best"] is None else _points(each["over_best"]),
            f"{each['visual_tokens']:.0f}",
            f"{each['cached_rows']:.0f}",
            f"{each['flops'] / 1e9:.1f}",
            seconds(each["first_token"]),
            "yes" if each["setting"] in held["front"] else "",
        ]
        for each in held["settings"]
    ]
    header = ["", "right answers", "above the best", "visual tokens", "KV rows", "GFLOPs", "first token", "front"]
    return table(header, rows) + (
        f"\n\n`svcli sweep` chooses **{held['choice']['setting']}**: {held['choice']['reason']} FLOPs and first token"
        f" include the encoder, which skips nothing. {' '.join(held['remarks'])} {on_machine(found)}."
    )


def _setting(found: Any) -> str:
    name = "dense" if found["setting"] == "off" else str(found["setting"])
    return f"{name}, trained" if found["is_trained"] else name


def _report() -> Report:
    return Report.model_validate(result("bench"))


def _times(stage: Stage) -> list[str]:
    spreads = [figure.spread for figure in stage.sides.values()]
    return [*(seconds(value) for each in spreads for value in (each.p50, each.p95)), *_ratio(stage)]


def _ratio(stage: Stage) -> Sequence[str]:
    found = stage.ratio
    return ("", "") if found is None else (f"{found.ratio:.2f}", f"{found.low:.2f} to {found.high:.2f}")


def _interval(found: Any) -> str:
    return f"{found['value']:.1f} % ({found['low']:.1f} to {found['high']:.1f})"


def _points(found: Any) -> str:
    return f"{found['value']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


BLOCKS = {"bench": bench, "bench_work": bench_work, "bench_peers": bench_peers, "baselines": baselines, "sweep": sweep}
