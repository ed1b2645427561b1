"""All results of a folder, of every asker and shard, as one report."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from svcli.chat.model import DENSE, SKIPPED
from svcli.evaluation.askers import BASELINES
from svcli.evaluation.report import Report
from svcli.evaluation.results import Header, Line, ResultsError, difference, read
from svcli.evaluation.run import Shard
from svcli.evaluation.task import Exports
from svcli.evaluation.tasks.registry import TASKS
from svcli.files import write

SUMMARY = "summary.json"
_ORDER = (SKIPPED, DENSE, "", *(name for name in BASELINES if name != DENSE))
"""Of askers; the gap is for variants."""


def results_path(folder: Path, asker: str, shard: Shard) -> Path:
    """Where an asker's answers to a shard are."""
    part = f".{shard.number}-of-{shard.count}" if shard.count > 1 else ""
    return folder / f"{asker.replace(':', '-')}{part}.jsonl"


def check_neighbours(folder: Path, header: Header, own: Collection[Path]) -> None:
    """Raises ResultsError where files of the folder beside one's `own` are of another run."""
    for path, other, _ in _read(folder, own):
        if other.run != header.run:
            raise ResultsError(f"{path}: {difference(other.run, header.run)}; choose another folder, or remove it")


def collect(folder: Path) -> Report:
    """What the folder's results say. Raises ResultsError where there are none, or of several runs."""
    found = _read(folder)
    if not found:
        raise ResultsError(f"{folder}: holds no results of svcli eval")
    (path, header, _), answers = found[0], dict[str, dict[str, Line]]()
    for other, each, _ in found:
        if each.run != header.run:
            raise ResultsError(f"{other} and {path} are of different runs; give each a folder of its own")
    if header.task not in TASKS:
        raise ResultsError(f"{path}: of the task {header.task}, which this version of svcli does not have")
    for _, each, lines in found:
        held = answers.setdefault(each.asker, {})
        # Shards of different counts overlap: what one could not ask, another may have asked.
        held.update((line.item.id, line) for line in lines if line.said is not None or line.item.id not in held)
    order = sorted(answers, key=lambda name: (_place(name), name))
    by_asker = {name: list(answers[name].values()) for name in order}
    return Report.of(TASKS[header.task], header.split, by_asker, header.num_all)


def told(folder: Path) -> dict[str, str]:
    """What the first file says of where its answers come from. Raises ResultsError where it does not."""
    for path, header, _ in _read(folder):
        if {"bundle", "data"} <= header.told.keys():
            return header.told
        raise ResultsError(f"{path}: does not say where its bundle and its data were")
    raise ResultsError(f"{folder}: holds no results of svcli eval")


def write_summary(folder: Path, report: Report) -> None:
    """As JSON beside the answers."""
    write(folder / SUMMARY, json.dumps(report.told(), indent=2) + "\n")


def export_answers(report: Report, path: Path) -> None:
    """Those of the first asker, as whoever judges them elsewhere reads them."""
    assert isinstance(report.task, Exports)
    write(path, report.task.exported([line.judged for line in report.answers[0].lines]))


def _place(name: str) -> int:
    """The bundle as it is goes first, and other settings of it before what is left of pictures otherwise."""
    kind = name.partition(":")[0]
    return _ORDER.index(kind) if kind in _ORDER else _ORDER.index("")


def _read(folder: Path, but: Collection[Path] = ()) -> list[tuple[Path, Header, list[Line]]]:
    found = ((path, read(path)) for path in sorted(folder.glob("*.jsonl")) if path not in but)
    return [(path, *held) for path, held in found if held is not None]
