"""`svcli sweep`: one model at several skip settings, and the one to choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from svcli import completions, ui
from svcli.answer_options import Engine, Threads
from svcli.commands.eval import fail_unasked, named_task, task_folder, task_split
from svcli.commands.export import Precision
from svcli.engines import EngineName
from svcli.errors import UsageError
from svcli.files import check_folder, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skipvision.config import ModelConfig
    from skipvision.presets import Setting
    from svcli.evaluation.sweep import Choice, Point
    from svcli_export.manifest import Manifest

_BUNDLE, _RESULTS = "bundle", "answers"


def sweep(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A bundle, or what `svcli export` takes. Settings that a bundle has no graphs for are exported.",
            autocompletion=completions.bundles,
        ),
    ],
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="As of `svcli eval --list`.", autocompletion=completions.tasks)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Graphs, answers, table and plot; it goes on there."),
    ],
    settings: Annotated[
        str | None,
        typer.Option(
            metavar="R/S,...",
            help="Retained and skipped tokens of a picture, with commas between; what a bundle has, or else a few from"
            " a sixteenth to half of its tokens.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Files of the task.")] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The task's first if left out.", autocompletion=completions.splits),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N items alone.")] = None,
    within: Annotated[
        float, typer.Option(min=0, max=100, metavar="PERCENT", help="How far below the best a setting may be.")
    ] = 1.0,
    rounds: Annotated[
        int, typer.Option(min=0, metavar="N", help="Pictures that first tokens are timed on; 0: none is timed.")
    ] = 15,
    precision: Annotated[
        Precision | None, typer.Option(metavar="KIND", help="Of graphs that are exported; a bundle's own, or int8.")
    ] = None,
    engine: Engine = EngineName.ONNXRUNTIME,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in a folder that is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")] = False,
) -> None:
    """Ask a task at several skip settings, beside dense graphs and a blind model, and say which to choose.

    All settings are graphs on the same weights, so what they score is that of weights trained for one of them, if any:
    train the setting that you choose. Stopped, it goes on where it was.
    """
    chosen, name = named_task(task), task_split(named_task(task), split)
    folder = task_folder(chosen, data)
    check_folder(output)
    from svcli.evaluation.askers import BLIND, own_name
    from svcli.evaluation.task import is_scored

    if not is_scored(chosen, name):
        raise UsageError(f"{chosen.name}, {name}: scored elsewhere, so that no setting can be chosen by it here")
    from svcli.evaluation.run import Shard, Work
    from svcli.evaluation.session import Session
    from svcli.evaluation.sweep import askable, asked, choose, first_tokens, points, told
    from svcli_export.manifest import DENSE

    bundle, manifest, variants = _graphs(source, settings, output, precision, overwrite=overwrite, quiet=quiet)
    names = [own_name(manifest), *(each for each in variants if each != DENSE)]
    names += [DENSE] if DENSE in manifest.variants else []
    session = Session(
        bundle=bundle,
        task=chosen,
        folder=folder,
        split=name,
        limit=limit,
        shard=Shard(),
        engine=engine,
        threads=threads,
        out=output / _RESULTS,
        overwrite=overwrite,
        is_quiet=quiet,
    )
    report = session.run(only=[*names, BLIND], baselines=None)
    if not asked(report):
        fail_unasked(output / _RESULTS)
    items, names = askable(report, Work(chosen, folder, name, limit)), [each.name for each in asked(report)]
    times = first_tokens(names, bundle, manifest, items, engine, threads, rounds) if rounds else {}
    found = points(report, manifest, times)
    choice = choose(found, within / 100, chosen.metric)
    content = told(found, choice, report)
    write(output / "sweep.json", json.dumps(content, indent=2) + "\n")
    _draw(output / "sweep.png", found, choice, f"{chosen.title}, {name}", chosen.metric, quiet=quiet)
    if as_json:
        ui.show(json.dumps(content, indent=2))
        return
    _render(found, f"{chosen.title}, {name}", chosen.metric)
    for sentence in content["remarks"]:
        ui.say(sentence)
    ui.say(f"Choose {choice.setting}: {choice.reason}")
    ui.show(f"Results: {output}")


Variants = dict[str, "Setting | tuple[int, int] | Literal['off']"]
"""Skip settings by the names that they have in a bundle."""


def _graphs(
    source: str, settings: str | None, output: Path, precision: Precision | None, *, overwrite: bool, quiet: bool
) -> tuple[Path, Manifest, list[str]]:
    """A bundle with graphs of every setting, `source` itself or a new one, and the variants that are asked for."""
    from svcli.skip_option import parse_variants
    from svcli_export.manifest import MANIFEST_FILE, load_manifest

    words = None if settings is None else [each.strip() for each in settings.split(",") if each.strip()]
    wanted = None if words is None else parse_variants(words, "--settings")
    given, made = Path(source), output / _BUNDLE
    if (given / MANIFEST_FILE).is_file():
        manifest = load_manifest(given, quick=True)
        own = Precision(manifest.contract.precision)
        if not _missing(manifest, wanted or {}) and precision in (None, own):
            return given, manifest, _asked(manifest, wanted)
        precision = precision or own
    if (made / MANIFEST_FILE).is_file() and not overwrite:
        manifest = load_manifest(made, quick=True)
        if missing := _missing(manifest, wanted or {}):
            raise UsageError(f"{made} has no graphs for {', '.join(missing)}; choose another --output, or --overwrite")
        if not quiet:
            ui.note(f"the graphs in {made} are used as they are; --overwrite exports them anew")
        return made, manifest, _asked(manifest, wanted)
    manifest = _export(source, made, precision or Precision.INT8, wanted, overwrite=overwrite, quiet=quiet)
    return made, manifest, _asked(manifest, wanted)


def _export(
    source: str, made: Path, precision: Precision, wanted: Variants | None, *, overwrite: bool, quiet: bool
) -> Manifest:
    from svcli.models import model_folder
    from svcli.skip_option import parse_variants
    from svcli_export.bundle import export_bundle
    from svcli_export.manifest import DENSE, setting_text, variant_name
    from svcli_export.source import read_outline

    folder = model_folder(source)
    config = read_outline(folder).config
    own = variant_name(setting_text(config.skip))
    every = {**parse_variants(_few(config) if wanted is None else ()), **(wanted or {}), DENSE: "off"}
    with ui.Progress(is_quiet=quiet) as progress:
        return export_bundle(
            folder,
            made,
            precision=precision.value,
            variants={name: setting for name, setting in every.items() if name != own},
            default_variants=False,
            overwrite=overwrite,
            progress=lambda what, share: progress.update(what, share, 1.0),
        )


def _few(config: ModelConfig) -> list[str]:
    """Settings from a sixteenth to half of a picture's tokens; of the rest a quarter skips, the others are merged."""
    tokens = config.num_tokens
    retained = sorted({max(1, tokens // part) for part in (16, 8, 4, 2)})
    return [f"{each}/{(tokens - each) // 4}" for each in retained]


def _missing(manifest: Manifest, wanted: Variants) -> list[str]:
    from svcli_export.manifest import setting_text, variant_name

    there = {*manifest.variants, variant_name(setting_text(manifest.config.skip))}
    return [name for name in wanted if name not in there]


def _asked(manifest: Manifest, wanted: Variants | None) -> list[str]:
    return [name for name in manifest.variants if wanted is None or name in wanted]


def _draw(path: Path, found: Sequence[Point], choice: Choice, title: str, metric: str, *, quiet: bool) -> None:
    """The plot, or a line on what it takes."""
    try:
        from svcli.plots import draw_sweep

        draw_sweep(path, found, choice.setting, title, metric)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        if not quiet:
            ui.note('no plot, which matplotlib draws: pip install "svcli[plots]"')


def _render(found: Sequence[Point], title: str, metric: str) -> None:
    from svcli.evaluation.report import figure
    from svcli.evaluation.sweep import front

    best = {point.setting for point in front(found)}
    rows = []
    for point in found:
        around = point.interval
        rows.append(
            (
                point.setting,
                figure(point.figure) + (f" ({figure(around.low)} to {figure(around.high)})" if around else ""),
                f"{point.visual_tokens:.0f}",
                f"{point.cached_rows:.0f}",
                ui.flops(point.flops),
                "-" if point.first_token is None else ui.duration(point.first_token),
                "yes" if point.setting in best else "",
                "yes" if point.is_trained else "no",
            )
        )
    columns = ("", metric, "visual tokens", "KV rows", "FLOPs", "first token", "on the front", "trained")
    ui.table(title, columns, rows)
