"""`svcli eval`: what a bundle scores on a task, beside the baselines that keep its score honest."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from svcli import completions, ui
from svcli.answer_options import Engine, Threads
from svcli.engines import EngineName
from svcli.errors import FAILURE, UsageError
from svcli.files import check_folder, check_targets
from svcli.settings import bundled_model

if TYPE_CHECKING:
    from svcli.evaluation.report import Report
    from svcli.evaluation.task import Task

_DEFAULT_OUT = Path("eval")


@dataclass(frozen=True)
class Wanted:
    """What becomes of a report."""

    html: Path | None
    export: Path | None
    as_json: bool

    def check(self, task: Task, split: str) -> None:
        """Raises UsageError, before anything is asked."""
        from svcli.evaluation.task import Exports, is_scored

        if self.html is not None and not is_scored(task, split):
            raise UsageError(
                f"--html: what is wrong in {task.name}, {split}, only its judge can tell; --export asks it"
            )
        if self.export is not None and not isinstance(task, Exports):
            raise UsageError(f"--export: {task.name} is scored here, and nobody else reads its answers")
        files = [path for path in (self.html, self.export) if path is not None]
        for path in files:
            check_folder(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
        check_targets(files)


def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BUNDLE] TASK",
            show_default=False,
            help="The bundled model if left out; --list has the tasks.",
            autocompletion=completions.bundles_and_tasks,
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Files of the task; --list says which.")] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The task's first if left out.", autocompletion=completions.splits),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N items alone.")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Part I, from 0 on, of N; other processes take the others.")
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Asked beside the bundle, with commas between; all that it allows if left out, or none.",
            autocompletion=completions.askers,
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Ask these alone, such as skipped or dense.", autocompletion=completions.askers
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Results; goes on where they end. eval/BUNDLE/TASK-SPLIT."),
    ] = None,
    merge: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Ask nothing: what the results in FOLDER say, of all shards.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE", help="Wrong answers with their pictures, as one HTML file.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The bundle's answers as the task's judge or test server reads them."),
    ] = None,
    engine: Engine = EngineName.ONNXRUNTIME,
    threads: Threads = None,
    listed: Annotated[
        bool, typer.Option("--list", help="The tasks: where their files come from, and which they need.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where there are results.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")] = False,
) -> None:
    """Score a bundle on a task, with an interval, beside dense graphs and other baselines.

    Every answer is written down when it is there. Killed and started again, it goes on behind the last one.
    """
    if listed:
        _list(as_json)
        return
    wanted = Wanted(html, export, as_json)
    if merge is not None:
        is_other_engine = engine != EngineName.ONNXRUNTIME
        if any((words, split, limit, shard, baselines, only, out, threads, overwrite, is_other_engine)):
            raise UsageError("--merge asks nothing: it goes with --data, --html, --export, --json and --quiet alone")
        _merge(merge, data, wanted)
        return
    if only is not None and baselines is not None:
        raise UsageError("--only and --baselines: name what is asked with one of them")
    if only is not None and not _names(only):
        raise UsageError("--only: name at least one, such as skipped")
    if not words or len(words) > 2:
        raise UsageError("name a task: svcli eval [BUNDLE] TASK; `svcli eval --list` has them")
    from svcli.evaluation.run import Shard
    from svcli.evaluation.session import Session

    task = named_task(words[-1])
    bundle = Path(words[0]) if len(words) == 2 else bundled_model()
    split = task_split(task, split)
    wanted.check(task, split)
    place = "-".join([task.name, split, *([f"first{limit}"] if limit else [])])
    results = out or _DEFAULT_OUT / bundle.resolve().name / place
    check_folder(results)
    work = Session(
        bundle=bundle,
        task=task,
        folder=task_folder(task, data),
        split=split,
        limit=limit,
        shard=Shard(*_shard(shard)),
        engine=engine,
        threads=threads,
        out=results,
        overwrite=overwrite,
        is_quiet=quiet,
    )
    report = work.run(only=_names(only), baselines=_names(baselines))
    _end(report, work.out, work.folder, bundle, wanted)


def _end(report: Report, out: Path, folder: Path, bundle: Path | None, wanted: Wanted) -> None:
    from svcli.evaluation.collect import write_summary

    write_summary(out, report)
    if not report.answers:
        raise UsageError(f"{out}: none of the items is in this shard; ask more of them, or fewer shards")
    # Files first: whoever reads the table may leave.
    if wanted.html is not None:
        from svcli.evaluation.page import write_page

        write_page(wanted.html, report, folder, bundle)
    if wanted.export is not None:
        from svcli.evaluation.collect import export_answers

        export_answers(report, wanted.export)
    if wanted.as_json:
        ui.show(json.dumps(report.told() | {"results": str(out)}, indent=2))
    else:
        _render(report, out)
    for what, path in {"Wrong answers": wanted.html, "Answers for the judge": wanted.export}.items():
        if path is not None and not wanted.as_json:
            ui.show(f"{what}: {path}")
    if all(each.all_failed for each in report.answers):
        fail_unasked(out)


def fail_unasked(out: Path) -> NoReturn:
    """Ends the command: the folder has no answer."""
    ui.error(f'nothing could be asked; "error" in the files of {out} says why')
    raise typer.Exit(FAILURE)


def _merge(folder: Path, data: Path | None, wanted: Wanted) -> None:
    from svcli.evaluation.collect import collect, told

    report, known = collect(folder), told(folder)
    wanted.check(report.task, report.split)
    bundle = Path(known["bundle"])
    _end(report, folder, data or Path(known["data"]), bundle if bundle.is_dir() else None, wanted)


def _render(report: Report, out: Path) -> None:
    from svcli.evaluation.report import figure

    rows = []
    for each in report.answers:
        interval, above = each.interval, report.to_dense.get(each.name)
        around = "" if interval is None else f" ({figure(interval.low)} to {figure(interval.high)})"
        rows.append(
            (
                each.name,
                f"{figure(each.value)}{around}",
                "" if above is None else f"{above.value:+.3g} ({figure(above.low)} to {figure(above.high)})",
                f"{len(each.lines):,}",
                _count(each.mean("visual_tokens")),
                _count(each.mean("cached_rows")),
                "-" if (flops := each.mean("flops")) is None else ui.flops(flops),
                "-" if each.first_token is None else ui.duration(each.first_token),
            )
        )
    columns = ("", report.task.metric, "over dense", "items", "visual tokens", "KV rows", "FLOPs", "first token")
    shown = [number for number, name in enumerate(columns) if name != "over dense" or report.to_dense]
    ui.table(
        f"{report.task.title}, {report.split}",
        [columns[number] for number in shown],
        [[row[number] for number in shown] for row in rows],
    )
    others = dict.fromkeys(name for each in report.answers for name in each.others)
    groups = dict.fromkeys(name for each in report.answers for name in each.groups)
    more = [(name, *(figure(each.others.get(name)) for each in report.answers)) for name in others]
    more += [(name, *(figure(each.groups.get(name)) for each in report.answers)) for name in groups]
    if more:
        ui.table("", ("", *(each.name for each in report.answers)), more)
    for sentence in report.sentences():
        ui.say(sentence)
    if methods := sorted({each.interval.method for each in report.answers if each.interval is not None}):
        paired = sorted({each.method for each in report.to_own.values() if each is not None})
        beside = f"; of differences, on the same items, {' and '.join(paired)}" if paired else ""
        ui.say(f"Intervals: 95 %, {' and '.join(methods)}{beside}.")
    ui.show(f"Results: {out}")


def _count(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.0f}"


def _list(as_json: bool) -> None:
    from svcli.evaluation.tasks.registry import TASKS

    if as_json:
        facts = ("name", "title", "source", "layout", "splits", "metric")
        ui.show(json.dumps([{fact: getattr(task, fact) for fact in facts} for task in TASKS.values()], indent=2))
        return
    for task in TASKS.values():
        ui.pairs(
            f"{task.name}: {task.title}",
            [
                ("from", task.source),
                ("needs", task.layout),
                ("splits", ", ".join(task.splits)),
                ("metric", task.metric),
            ],
        )


def named_task(name: str) -> Task:
    """Raises UsageError where there is none."""
    from svcli.evaluation.tasks.registry import TASKS

    if name not in TASKS:
        raise UsageError(f"{name}: no such task; choose among {', '.join(TASKS)}")
    return TASKS[name]


def task_split(task: Task, name: str | None) -> str:
    """`name`, or the task's first. Raises UsageError."""
    if name is not None and name not in task.splits:
        raise UsageError(f"--split {name}: {task.name} has {', '.join(task.splits)}")
    return name or task.splits[0]


def task_folder(task: Task, data: Path | None) -> Path:
    """Where the files of a task are. Raises UsageError where that must be said."""
    from svcli.evaluation.tasks.registry import FETCHED

    if data is None and task.name not in FETCHED:
        raise UsageError(f"--data FOLDER: {task.name} needs its files, {task.layout}")
    return data or FETCHED[task.name]


def _shard(text: str | None) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text or "0/1")
    if found is None or int(found[1]) >= int(found[2]):
        raise UsageError(f"--shard {text}: write I/N, I from 0 to N - 1, such as 0/4")
    return int(found[1]), int(found[2])


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [] if names == ["none"] else names
