"""`svcli train`: a recipe becomes a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svcli import ui

if TYPE_CHECKING:
    from skipvision.training.scratch import TrainEvent


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file that says what to train, and on what.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the run; the checkpoint goes into it.")
    ],
    cache: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for encoded pictures, shared between runs.")
    ] = Path("build/features"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew instead of going on where the run was stopped.")
    ] = False,
) -> None:
    """Train a model from a recipe.

    Started again after a stop, it goes on where it was.
    """
    from skipvision.training.recipes import read_scratch_recipe
    from skipvision.training.scratch import train as run

    settings = read_scratch_recipe(recipe)
    try:
        with ui.Progress() as progress:
            progress.update("preparing", 0, 1)
            checkpoint = run(settings, output, lambda event: _show(event, progress), cache_root=cache, fresh=fresh)
    except KeyboardInterrupt:
        ui.note("stopped; the same command, without --fresh, goes on from the last save")
        raise
    ui.show(str(checkpoint))


def _show(event: TrainEvent, progress: ui.Progress) -> None:
    if event.accuracy is not None:
        shares = ", ".join(f"{task} {share:.1%}" for task, share in event.accuracy.items())
        progress.log(f"step {event.done}: validation {shares}")
        return
    facts = [f"{event.rate:.0f} pictures/s"]
    if event.stage != "encode":
        facts.insert(0, f"loss {event.loss:.3f}")
    what = {"encode": "encoding pictures", "align": "aligning the projector", "train": "training"}[event.stage]
    progress.update(what, event.done, event.total, *facts)
