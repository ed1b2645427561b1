"""`svcli bench`: what each stage of an answer takes, dense against skipped, and what two such runs say together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from svcli import completions, ui
from svcli.answer_options import BundleArgument, Engine, Threads
from svcli.engines import EngineName
from svcli.errors import UsageError
from svcli.settings import bundled_model

if TYPE_CHECKING:
    from svcli.bench.report import Report, Stage

_RUN = "run"
_MOST = 1024
STOPPED = 130


class RunUnlessNamed(TyperGroup):
    """`svcli bench BUNDLE` is `svcli bench run BUNDLE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # While a shell completes the first word, it may still become a command.
        if not (ctx.resilient_parsing and not args) and (not args or args[0] not in self.commands):
            args = [_RUN, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Commands, and what may stand behind `run`."""
        command = self.commands[_RUN]
        inner = command.make_context(_RUN, [], parent=ctx, resilient_parsing=True)
        if incomplete.startswith("-"):
            return command.shell_complete(inner, incomplete)
        return [*super().shell_complete(ctx, incomplete), *command.params[0].shell_complete(inner, incomplete)]


def run(
    bundle: BundleArgument = None,
    pictures: Annotated[
        list[Path] | None, typer.Argument(metavar="PICTURE", help="Files; one that is drawn if left out.")
    ] = None,
    question: Annotated[
        str, typer.Option(metavar="TEXT", help="What is asked about them.")
    ] = "What is in the picture?",
    engine: Engine = EngineName.ONNXRUNTIME,
    threads: Threads = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The side that skips; the bundle's own graphs if left out.",
            autocompletion=completions.bundle_variants,
        ),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="The dense side is this bundle, of the same model (TensorRT)."),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="One side, without its dense twin.")] = False,
    rounds: Annotated[int, typer.Option(min=2, metavar="N", help="Answers of each side that count.")] = 30,
    warm_up: Annotated[int, typer.Option(min=1, metavar="N", help="Answers before them that do not.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Length of every answer, whatever it says.")] = 32,
    batch: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Also steps of so many sequences side by side, as 1,2,4.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Also prompts of so many rows, as the plain model counts.")
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME",
            help="Also the decoder in transformers, onnxruntime-genai, llama.cpp or openvino-genai.",
            autocompletion=completions.peers,
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Every round, for programs and `svcli bench compare`.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="One row for each figure.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="A page with plots, in itself.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Time each stage of an answer, with skipping and without, in turns.

    Picture, vision, prefill, first token, decode and end to end, each beside its FLOPs, bytes and roofline; memory, and
    energy where the machine tells it. Ratios are skipped over dense, with what 95 % of resampled rounds give. `svcli
    bench compare A.json B.json` holds two runs against each other. Ctrl-C ends it with the rounds that are done.
    """
    from svcli.bench.contestants import ask, sides
    from svcli.bench.measure import Plan, measure
    from svcli.bench.page import page
    from svcli.bench.report import as_csv, as_json
    from svcli.files import check_targets, write

    written = {"json": json_file, "csv": csv_file, "html": html_file}
    check_targets([path for path in written.values() if path is not None])
    plan = Plan(
        sides=sides(bundle or bundled_model(), engine, variant=variant, dense=dense, alone=alone, threads=threads),
        asked=ask(question, pictures or ()),
        rounds=rounds,
        warm_up=warm_up,
        tokens=tokens,
        batch=_counts("--batch", batch, _MOST),
        context=_counts("--context", context),
        peers=tuple(peers or ()),
    )
    try:
        with ui.Progress(is_quiet=quiet) as progress:
            found = measure(plan, lambda what, done, count: progress.update(what, done, count))
    except KeyboardInterrupt:
        ui.note("stopped before there was anything to tell; nothing was written")
        raise
    writers = {"json": as_json, "csv": as_csv, "html": page}
    for kind, path in written.items():
        if path is not None:
            write(path, writers[kind](found))
    render(found)
    if any(remark.startswith("stopped") for remark in found.remarks):
        raise typer.Exit(STOPPED)


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="What `svcli bench --json` wrote.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The same of another run.")],
    across: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="May differ: machine, versions, model or settings; else that is refused.",
            autocompletion=completions.differences,
        ),
    ] = None,
) -> None:
    """Hold two runs against each other: what became faster, what slower, and what cannot be told.

    A verdict stands only where the interval leaves 1 out and the change is larger than the drift inside of either run.
    """
    from svcli.bench.compare import compare_reports
    from svcli.bench.report import read_report

    found = compare_reports(read_report(before), read_report(after), tuple(across or ()))
    for difference in found.differences:
        ui.note(difference)
    ui.table(
        f"{after} over {before}",
        ("", "A", "B", "B / A", "verdict"),
        [(line.title, *map(_time, line.medians), _interval(line.ratio), line.verdict) for line in found.lines],
    )
    for sentence in found.conclusions:
        ui.show(sentence)


def render(report: Report) -> None:
    """The report on the terminal."""
    from svcli.bench.report import TITLES
    from svcli.bench.words import conclusions

    settings, names = report.settings, list(report.sides)
    ui.show(
        f"{report.model.name}, {report.model.precision}, {settings.engine}, {report.machine.gpu or report.machine.cpu}:"
        f" {report.num_rounds} rounds of {settings.tokens} tokens, {settings.warm_up} before them to warm up"
    )
    ui.show("")
    header = (
        "",
        *(f"{side} {mark}" for side in names for mark in ("p50", "p95")),
        *["skipped / dense"][: len(names) - 1],
    )
    ui.table(
        "Time",
        header,
        [(TITLES[name], *_times(stage, names), *_ratio(stage, names)) for name, stage in report.stages.items()],
    )
    _render_work(report, names)
    for title, points, unit in (
        ("Several sequences side by side", report.batch, "batch {}"),
        ("Longer prompts, rows as the plain model counts them", report.context, "{} rows"),
    ):
        rows = [
            (f"{unit.format(point.at)}, {TITLES[name]}", *_times(stage, names), *_ratio(stage, names))
            for point in points
            for name, stage in point.stages.items()
        ]
        if rows:
            ui.table(title, header, rows)
    _render_peers(report)
    _render_memory(report, names)
    for sentence in conclusions(report):
        ui.show(sentence)
    for remark in report.remarks:
        ui.note(remark)


def _render_work(report: Report, names: list[str]) -> None:
    from svcli.bench.report import TITLES

    rows = []
    for name, stage in report.stages.items():
        for side in names:
            figure = stage.sides[side]
            if figure.flops is None or figure.num_bytes is None:
                continue
            share = "" if figure.roof_share is None else f"{figure.roof_share:.0%}"
            at_best = "" if figure.roof_seconds is None else _time(figure.roof_seconds)
            rows.append((f"{TITLES[name]}, {side}", ui.flops(figure.flops), ui.size(figure.num_bytes), at_best, share))
    ui.table("Work, and the time that it takes at best", ("", "FLOPs", "bytes moved", "roofline", "reached"), rows)
    roof = report.roof
    if roof is None:
        ui.show("Roofline: this GPU's peaks are not known.")
    else:
        ui.show(
            f"Roofline: {roof.flops_per_second / 1e9:,.0f} GFLOP/s, {roof.bytes_per_second / 1e9:,.1f} GB/s"
            f" ({roof.source})."
        )
    ui.show("")


def _render_peers(report: Report) -> None:
    from svcli.bench.report import TITLES

    for peer in report.peers:
        names = list(next(iter(peer.stages.values())).sides)
        ui.table(
            f"{peer.title}; {peer.weights}",
            ("", *(f"{side} {mark}" for side in names for mark in ("p50", "p95")), "ours / theirs"),
            [(TITLES[name], *_times(stage, names), *_ratio(stage, names)) for name, stage in peer.stages.items()],
        )


def _render_memory(report: Report, names: list[str]) -> None:
    from svcli.bench.energy import NOT_TOLD

    held = [report.sides[name] for name in names]
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
        joules = (f"{stage.sides[name].spread.p50:.3g} J" for name in names)
        rows.append((f"energy of an answer, {source}", *joules))
    if not report.energy:
        rows.append(("energy of an answer", *[NOT_TOLD] * len(names)))
    ui.table("Memory and energy", ("", *names), rows)


def _times(stage: Stage, names: list[str]) -> list[str]:
    spreads = (stage.sides[side].spread for side in names)
    return [_time(value) for each in spreads for value in (each.p50, each.p95)]


def _ratio(stage: Stage, names: list[str]) -> list[str]:
    if len(names) < 2:
        return []
    return ["-" if stage.ratio is None else _interval(stage.ratio)]


def _interval(ratio: Any) -> str:
    return f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(num_bytes: int | None) -> str:
    return "not told" if num_bytes is None else ui.size(num_bytes)


def _counts(option: str, text: str | None, most: int | None = None) -> tuple[int, ...]:
    """Raises UsageError."""
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() and int(word) > 0 for word in words):
        raise UsageError(f"{option} {text}: write whole numbers above 0 with commas between them, such as 1,2,4")
    counts = tuple(sorted({int(word) for word in words}))
    if most is not None and counts[-1] > most:
        raise UsageError(f"{option} {counts[-1]}: {most} is the most")
    return counts
