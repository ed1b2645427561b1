"""`svcli data`: what models are trained on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svcli import ui
from svcli.errors import FAILURE, UsageError
from svcli.models import model_folder

if TYPE_CHECKING:
    from skipvision.training.check import DataFacts, SourceFacts
    from skipvision.training.tune_recipe import TuneRecipe

_FIRST = 3
"""Samples of each kind of fault that are named."""


def fetch(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where recipes look for it.")] = Path("build/assets"),
) -> None:
    """Download and unpack the packages with art, fonts and words."""
    from skipvision.data import assets

    with ui.Progress() as progress:
        progress.update("downloading packages", 0, 2)
        assets.fetch(folder)
        progress.update("unpacking art, fonts and words", 1, 2)
        assets.prepare(folder)
        progress.update("done", 2, 2)
    ui.show(str(folder))


def check(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE | SOURCE...", help="TOML file that says what to train, and on what; with --base, data sets."
        ),
    ],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model that is to be trained, where there is no recipe.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="With --base: what names of pictures are relative to.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, metavar="ROWS", help="With --base: rows that one sample may have.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, such as data.pack=true.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Processes that read; data.num_workers if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Read all conversations and pictures of a recipe, and name what is broken.

    Exits with 1 where a run would stop: more is broken than the recipe allows, or nothing is left to train on.
    """
    recipe = _recipe(names, base, images, max_length, settings or [])
    from skipvision.training.check import check_data
    from svcli_export.tuning import read_speaker

    speaker, config = read_speaker(model_folder(recipe.base), recipe)
    with ui.Progress() as progress:

        def report(done: int, total: int) -> None:
            progress.update("reading samples", done, total, f"{done:,} of {total:,}")

        found = check_data(recipe, speaker, config, report, recipe.data.num_workers if workers is None else workers)
    if as_json:
        ui.show(json.dumps(asdict(found), indent=2))
    else:
        _render(found, recipe)
    if found.problem is not None:
        ui.error(found.problem)
        raise typer.Exit(FAILURE)


def _recipe(
    names: list[str], base: str | None, images: str | None, max_length: int | None, settings: list[str]
) -> TuneRecipe:
    """Raises UsageError for options that do not fit together, ConfigError for a recipe that is wrong."""
    from skipvision.training.recipes import read_recipe
    from skipvision.training.tune_recipe import SourceRecipe, TuneData, TuneRecipe

    if base is None:
        if images is not None or max_length is not None:
            raise UsageError("--images and --max-length go with --base; a recipe says both itself")
        if len(names) > 1:
            raise UsageError("one recipe at a time; data sets alone need --base, the model that reads them")
        recipe = read_recipe(names[0], settings)
        if not isinstance(recipe, TuneRecipe):
            raise UsageError(f"{names[0]}: makes its own pictures and questions, so there is nothing to check")
        return recipe
    if settings:
        raise UsageError("--set changes a recipe, and --base goes without one")
    sources = tuple(SourceRecipe(name, images=images or "") for name in names)
    return TuneRecipe(base, TuneData(sources, max_length=max_length or TuneData.max_length))


def _render(found: DataFacts, recipe: TuneRecipe) -> None:
    rows = [_row(each) for each in found.sources]
    if len(rows) > 1:
        rows.append(_row(found.whole))
    counted = ("", "samples", "broken", "with pictures", "pictures", "text alone")
    ui.table("samples", counted, [row[:6] for row in rows])
    spread = ("", "rows: mean", "p50", "p95", "most", "answer tokens: mean", "p50", "p95", "most")
    ui.table("of one sample", spread, [(row[0], *row[6:14]) for row in rows])
    if found.whole.pictures:
        ui.table("visual rows", ("", "kept", "skipped", "plain model's"), [(row[0], *row[14:]) for row in rows])
    for kind, count in found.whole.broken.items():
        ui.show(f"{kind}: {count:,}")
        for each in [each for each in found.broken if each.kind == kind][:_FIRST]:
            ui.show(f"  {each.name}: {each.reason}")
    if any(count > _FIRST for count in found.whole.broken.values()):
        ui.show("--json names all.")
    if found.steps_per_epoch:
        ui.show(f"Steps of an epoch: {found.steps_per_epoch:,}, of {recipe.optim.batch_size:,} sequences each.")


def _row(facts: SourceFacts) -> tuple[str, ...]:
    rows, answers = facts.rows, facts.answer_tokens
    numbers = (
        *(facts.samples, sum(facts.broken.values()), facts.with_pictures, facts.pictures, facts.text_alone),
        *(round(rows.mean), rows.p50, rows.p95, rows.most),
        *(round(answers.mean), answers.p50, answers.p95, answers.most),
        *(facts.visual_kept, facts.visual_skipped, facts.visual_plain),
    )
    return facts.name, *(f"{number:,}" for number in numbers)
