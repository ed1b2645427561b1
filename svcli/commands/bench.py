"""`svcli bench`: what each stage of an answer takes, dense against skipped, and what two such runs say together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from svcli import completions, ui
from svcli.answer_options import BundleArgument, Engine, Threads
from svcli.engines import EngineName
from svcli.errors import FAILURE, UsageError, explain
from svcli.settings import bundled_model

if TYPE_CHECKING:
    from svcli.bench.report import Report

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
    bench compare A.json B.json` holds two runs against each other. Ctrl-C ends it with the rounds that are done. A peer
    that fails costs its own figures alone; the exit code is 1 then.
    """
    from svcli.bench.contestants import ask, sides
    from svcli.bench.measure import Plan, measure
    from svcli.bench.page import page
    from svcli.bench.report import as_csv, as_json
    from svcli.files import check_targets

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
        peers=tuple(dict.fromkeys(peers or ())),
    )
    try:
        with ui.Progress(is_quiet=quiet) as progress:
            found = measure(plan, lambda what, done, count: progress.update(what, done, count))
    except KeyboardInterrupt:
        ui.note("stopped before there was anything to tell; nothing was written")
        raise
    writers = {"json": as_json, "csv": as_csv, "html": page}
    # What was measured is shown, and goes to the other files, where one cannot be written.
    failures = [_failure(path, writers[kind](found)) for kind, path in written.items() if path is not None]
    unwritten = [explain(error) for error in failures if error is not None]
    render(found)
    for message, _ in unwritten:
        ui.error(message)
    for peer in found.failed_peers:
        ui.error(f"{peer.place} was not measured: {peer.why}")
    if any(remark.startswith("stopped") for remark in found.remarks):
        raise typer.Exit(STOPPED)
    if unwritten:
        raise typer.Exit(unwritten[0][1])
    if found.failed_peers:
        raise typer.Exit(FAILURE)


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
    Intervals are widened for as many figures as are compared, so that equal runs seldom show any difference.
    """
    from svcli.bench.compare import compare_reports
    from svcli.bench.report import read_report
    from svcli.bench.tables import interval, time

    found = compare_reports(read_report(before), read_report(after), tuple(across or ()))
    for difference in found.differences:
        ui.note(difference)
    ui.table(
        f"{after} over {before}",
        ("", "A", "B", "B / A", "verdict"),
        [(line.title, *map(time, line.medians), interval(line.ratio), line.verdict) for line in found.lines],
    )
    ui.say(found.how_sure)
    for sentence in found.conclusions:
        ui.say(sentence)


def render(report: Report) -> None:
    """The report on the terminal."""
    from svcli.bench.tables import tables
    from svcli.bench.words import conclusions

    settings = report.settings
    ui.say(
        f"{report.model.name}, {report.model.precision}, {settings.engine}, {report.machine.gpu or report.machine.cpu}:"
        f" {report.num_rounds} rounds of {settings.tokens} tokens, {settings.warm_up} before them to warm up"
    )
    ui.show("")
    for table in tables(report):
        ui.table(table.title, table.header, table.rows)
        if table.below:
            ui.say(table.below)
            ui.show("")
    for sentence in conclusions(report):
        ui.say(sentence)
    for remark in report.remarks:
        ui.note(remark)


def _failure(path: Path, content: str) -> OSError | None:
    """What was raised where it could not be written."""
    from svcli.files import write

    try:
        write(path, content)
    except OSError as error:
        return error
    return None


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
