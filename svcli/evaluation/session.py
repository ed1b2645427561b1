"""One call of `svcli eval`: every asker answers every item that it has not answered yet."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from importlib import metadata
from pathlib import Path

from svcli import __version__, ui
from svcli.engines import EngineName
from svcli.evaluation.askers import BASELINES, AskerError, full_name, open_asker, own_name
from svcli.evaluation.collect import check_neighbours, collect, results_path
from svcli.evaluation.report import Report
from svcli.evaluation.results import Header, Results
from svcli.evaluation.run import Shard, Work, answer
from svcli.evaluation.task import Task, is_scored
from svcli.remarks import dense_remarks, remarks
from svcli_export.manifest import MANIFEST_FILE, Manifest, load_manifest

_MATTERS = {
    EngineName.ONNXRUNTIME: ("onnxruntime",),
    EngineName.ONNXRUNTIME_CUDA: ("onnxruntime-gpu",),
    EngineName.TORCH: ("torch",),
    EngineName.TORCH_CUDA: ("torch",),
    EngineName.TENSORRT: ("tensorrt-cu13", "tensorrt"),
    EngineName.TENSORRT_RTX: ("tensorrt-rtx-cu13",),
}
"""Packages whose version may change an answer, beside those that prepare pictures and prompts."""


@dataclass(frozen=True)
class Session:
    """What is asked of whom, and where the results go."""

    bundle: Path
    task: Task
    folder: Path
    split: str
    limit: int | None
    shard: Shard
    engine: EngineName
    threads: int | None
    out: Path
    overwrite: bool
    is_quiet: bool

    def run(self, *, only: Sequence[str] | None, baselines: Sequence[str] | None) -> Report:
        """Of all that `out` holds then, other shards included.

        `only` are all askers, or else `baselines` are those beside the bundle as it is; None: whatever it allows.
        Raises AskerError for one that is named and not allowed, TaskError, ResultsError, UsageError where another
        process writes one of the files, and what engines raise.
        """
        names = self._names(only, baselines)
        work = Work(self.task, self.folder, self.split, self.limit, self.shard)
        num_items, num_all, files = work.count()
        headers = [self._header(name, num_items, num_all, files) for name in names]
        check_neighbours(self.out, headers[0], [results_path(self.out, name, self.shard) for name in names])
        live = not self.is_quiet and sys.stderr.isatty()
        with ui.Progress(is_quiet=not live) as progress:
            try:
                # All of them first: what cannot go on is told before anything is asked.
                with ExitStack() as stack:
                    held = [stack.enter_context(self._open(header)) for header in headers]
                    for results in held:
                        self._ask(work, results, progress)
            except KeyboardInterrupt:
                self._note(f"what was answered is kept in {self.out}; the same command goes on")
                raise
        if "dense" in names:
            self._note(*dense_remarks(self._manifest))
        return collect(self.out)

    def _open(self, header: Header) -> Results:
        return Results(results_path(self.out, header.asker, self.shard), header, overwrite=self.overwrite)

    def _ask(self, work: Work, results: Results, progress: ui.Progress) -> None:
        name = results.header.asker
        done, total = len(results.lines), results.header.num_items
        if done:
            self._note(f"{name}: {done} of {total} items are answered already")
        if done == total:
            return
        score = sum(line.score for line in results.lines)
        with closing(open_asker(name, self.bundle, self._manifest, self.engine, self.threads)) as asker:
            progress.update(name, done, total)
            for line in answer(work, asker, results, self._manifest.image.transparency):
                done, score = done + 1, score + line.score
                facts = [f"score {score / done:.1%}"] if is_scored(self.task, self.split) else []
                progress.update(name, done, total, f"{done}/{total}", *facts)

    def _names(self, only: Sequence[str] | None, baselines: Sequence[str] | None) -> list[str]:
        if only is not None:
            return list(dict.fromkeys(full_name(name, self._manifest) for name in only))
        if baselines is not None:
            beside = [full_name(name, self._manifest) for name in baselines]
        else:
            beside = [name for each in BASELINES if (name := self._allowed(each))]
        return list(dict.fromkeys([own_name(self._manifest), *beside]))

    def _allowed(self, name: str) -> str | None:
        try:
            return full_name(name, self._manifest)
        except AskerError as error:
            self._note(f"not asked, {error}")
            return None

    def _header(self, name: str, num_items: int, num_all: int, files: str) -> Header:
        return Header(
            task=self.task.name,
            split=self.split,
            asker=name,
            limit=self.limit,
            shard=str(self.shard),
            num_items=num_items,
            num_all=num_all,
            files=files,
            bundle=hashlib.sha256((self.bundle / MANIFEST_FILE).read_bytes()).hexdigest(),
            engine=self.engine.value,
            versions=self._versions,
            told={
                "bundle": str(self.bundle.resolve()),
                "data": str(self.folder.resolve()),
                "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        )

    @cached_property
    def _manifest(self) -> Manifest:
        manifest = load_manifest(self.bundle, quick=True)
        self._note(*remarks(manifest.config))
        return manifest

    @cached_property
    def _versions(self) -> dict[str, str]:
        names = (*_MATTERS[self.engine], "numpy", "pillow", "tokenizers")
        found = {name: version for name in names if (version := _version(name))}
        return {"svcli": __version__, **found}

    def _note(self, *sentences: str) -> None:
        for sentence in () if self.is_quiet else sentences:
            ui.note(sentence)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
