"""`svcli ask`: a file of questions, answered side by side and written in order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from svcli import ui
from svcli.answer_options import (
    PRIVATE_REMEDY,
    Bundle,
    Engine,
    MaxNewTokens,
    Parallel,
    PrivateUrls,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from svcli.engines import EngineName, open_pool
from svcli.errors import UsageError
from svcli.files import keep_others_out, naming
from svcli.settings import bundled_model

if TYPE_CHECKING:
    from PIL import Image

    from svcli_engines.batch import Outcome, Row

_FAILED = 1


class ResumeError(UsageError):
    """An output file that another run has written."""


def ask(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help='JSON lines: {"image": PATH or URL, "question": TEXT}; `images` for several, `system`, and any other.',
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON lines; goes on where it ends.")],
    model: Bundle = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where paths of pictures start; DATA's folder if left out.")
    ] = None,
    engine: Engine = EngineName.ONNXRUNTIME,
    threads: Threads = None,
    parallel: Parallel = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 128,
    allow_private_urls: PrivateUrls = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where FILE exists.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Answer a file of questions about pictures.

    Each line of FILE says its row, the input, and the answer or an error. A row that fails is passed over, and the exit
    code is 1 then. Killed and started again, it goes on behind the last whole line.
    """
    import hashlib

    from svcli_engines.batch import answer_rows
    from svcli_engines.picture_sources import PictureSource, file_path, sent_picture
    from svcli_engines.picture_urls import FetchLimits
    from svcli_engines.processor import Processor
    from svcli_engines.sampling import Sampling
    from svcli_engines.schedule import Scheduler
    from svcli_export.manifest import load_manifest

    if not data.is_file():
        raise UsageError(f"{data}: {'not a file of lines' if data.exists() else 'no such file'}")
    sampling = Sampling(temperature, top_k, top_p, seed, max_new_tokens)
    bundle = model or bundled_model()
    manifest = load_manifest(bundle, quick=True)
    settings = {"model": manifest.files["weights.safetensors"].sha256, "skip": manifest.model.get("skip")}
    settings |= {"precision": manifest.contract.precision, **vars(sampling)}
    run = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    total = sum(1 for _ in _rows(data))
    if total == 0:
        raise UsageError(f"{data}: holds no questions")
    if output.exists() and output.samefile(data):
        raise UsageError(f"--output {output} is DATA itself; choose another file")
    root = images or data.parent

    limits = FetchLimits(allow_private=allow_private_urls, private_remedy=PRIVATE_REMEDY)

    def open_picture(place: str) -> Image.Image:
        if "://" in place or place.startswith("data:"):
            source = sent_picture(place)
        else:
            source = PictureSource(place, root / file_path(place))
        return source.open(manifest.image.transparency, limits).image

    progress = ui.Progress(is_quiet=quiet)
    with progress, naming(output), output.open("ab") as file:
        keep_others_out(file, output, "svcli ask")
        if overwrite and output.is_file():
            os.truncate(output, 0)
        done, num_failed = _done(output, data, run)
        if done:
            progress.log(f"{done} of {total} rows are answered already")
        if done == total:
            _end(progress, total, num_failed, output)
            return
        pool = open_pool(engine, bundle, manifest, threads=threads, parallel=parallel)
        scheduler = Scheduler(pool, Processor(bundle, manifest), max_waiting=4 * len(pool.slots))
        rows = (row for row in _rows(data) if row.number > done)
        outcomes = answer_rows(scheduler, rows, open_picture, sampling, at_once=2 * len(pool.slots))
        started, num_tokens = perf_counter(), 0
        try:
            with closing(outcomes):
                for number, outcome in enumerate(outcomes, start=done + 1):
                    _write(file, outcome, run)
                    num_failed += outcome.error is not None
                    num_tokens += outcome.stats.num_tokens if outcome.stats else 0
                    seconds = perf_counter() - started
                    facts = [f"{(number - done) / seconds:.3g} rows/s", f"{num_tokens / seconds:.3g} tok/s"]
                    progress.update("asking", number, total, *facts, *([f"{num_failed} failed"] if num_failed else []))
        finally:
            scheduler.close()
    _end(progress, total, num_failed, output)


def _rows(data: Path) -> Iterator[Row]:
    from svcli_engines.batch import MAX_LINE, Row

    with data.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            whole = line
            while not whole.endswith(b"\n") and (whole := file.readline(MAX_LINE + 1)):
                pass  # the rest of a line that is too long
            if line.strip():
                number += 1
                yield Row.of(number, line)


def _done(output: Path, data: Path, run: str) -> tuple[int, int]:
    """Rows that `output` holds, and how many of them failed; what stands behind the last whole line is cut off.

    Raises ResumeError for lines of another run.
    """
    if not output.is_file():
        return 0, 0  # such as /dev/stdout, which cannot be read again
    other = ResumeError(
        f"{output} holds something else than answers to {data} with these settings; choose another file, or --overwrite"
    )
    num_done = num_failed = end = 0
    rows = _rows(data)
    with output.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                written = json.loads(line)
                same = written["run"] == run and written["input"] == next(rows).record
            except (ValueError, KeyError, TypeError, StopIteration):
                same = False
            if not same:
                raise other
            num_done, end = num_done + 1, end + len(line)
            num_failed += written.get("error") is not None
    if end < output.stat().st_size:
        os.truncate(output, end)
    return num_done, num_failed


def _write(file: IO[bytes], outcome: Outcome, run: str) -> None:
    said: dict[str, Any] = {"row": outcome.row.number, "run": run, "input": outcome.row.record}
    if outcome.stats is None:
        said |= {"error": outcome.error}
    else:
        stats = outcome.stats
        said |= {"answer": outcome.answer, "stop_reason": stats.stop_reason}
        said |= {
            "tokens": {
                "answer": stats.num_tokens,
                "visual_full": stats.visual_tokens_full,
                "visual_kept": stats.visual_tokens_kept,
            }
        }
    # Half of a character is written as JSON has it, so that the row is known again.
    file.write(json.dumps(said, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    file.flush()


def _end(progress: ui.Progress, total: int, num_failed: int, output: Path) -> None:
    progress.log(f"{total - num_failed} of {total} rows are answered: {output}")
    if num_failed:
        ui.error(f'{num_failed} of {total} rows failed; "error" in {output} says why')
        raise typer.Exit(_FAILED)
