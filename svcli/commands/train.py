"""`svcli train`: a recipe becomes a checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svcli import completions, ui
from svcli.errors import FAILURE, UsageError
from svcli.models import model_folder

if TYPE_CHECKING:
    from skipvision.training.events import Event, Report
    from skipvision.training.scratch_recipe import ScratchRecipe
    from skipvision.training.tune_recipe import TuneRecipe
    from svcli.training.facts import History, RunFacts


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="TOML file that says what to train, and on what; or a preset.",
            autocompletion=completions.recipes,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the run; the checkpoint goes into it."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Another value than the recipe's, such as optim.steps=100; repeatable."
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole recipe as TOML, and leave.")
    ] = False,
    list_presets: Annotated[bool, typer.Option("--list", help="Name the presets, and leave.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew instead of going on where the run was stopped.")
    ] = False,
    cache: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Folder for encoded pictures, shared between runs of a model from nothing."
        ),
    ] = Path("build/features"),
) -> None:
    """Train a model from a recipe: one that there is, on conversations about pictures, or a small one from nothing.

    Started again after a stop, it goes on where it was. In a pipe each event is one JSON object on stdout.
    """
    from skipvision.training.alone import alone
    from skipvision.training.recipes import PRESETS, as_toml, read_recipe
    from skipvision.training.tune_recipe import TuneRecipe

    if list_presets:
        ui.pairs("Presets", list(PRESETS.items()))
        return
    if recipe is None:
        raise UsageError("name a recipe, or see the presets: svcli train --list")
    settings = read_recipe(recipe, changes or ())
    if print_config:
        ui.show(as_toml(settings).rstrip())
        return
    if output is None:
        raise UsageError("name the folder of the run: svcli train RECIPE -o FOLDER")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; name a folder for the run")
    output.mkdir(parents=True, exist_ok=True)
    with alone(output) if _is_first_process() else nullcontext():
        if isinstance(settings, TuneRecipe):
            _tune(settings, output, fresh=fresh)
        else:
            _train_scratch(settings, output, cache, fresh=fresh)


def _tune(recipe: TuneRecipe, output: Path, *, fresh: bool) -> None:
    from svcli.training import loggers

    loggers.check(recipe.log)
    folder = model_folder(recipe.base, is_quiet=not _is_first_process())

    def run(report: Report) -> Path:
        from skipvision.training.events import StageEvent
        from skipvision.training.tune import tune
        from svcli_export.tuning import read_base

        base = read_base(folder, recipe, lambda what, share: report(StageEvent(what, share, 1.0)))
        return tune(recipe, base, output, report, fresh=fresh)

    _watched(run, output, lambda stack: loggers.open_loggers(recipe, output, fresh=fresh, stack=stack))


def _train_scratch(recipe: ScratchRecipe, output: Path, cache: Path, *, fresh: bool) -> None:
    from skipvision.training.scratch import train as run

    _watched(lambda report: run(recipe, output, report, cache_root=cache, fresh=fresh), output)


def _watched(
    run: Callable[[Report], Path], output: Path, loggers: Callable[[ExitStack], list[Report]] = lambda _stack: []
) -> None:
    """Runs, and shows what it tells; of several processes, the first does."""
    if not _is_first_process():
        run(lambda _event: None)
        return
    from svcli.training.facts import RunFacts, read_history

    facts = RunFacts()
    with _told_how_to_go_on(facts, output), ExitStack() as stack:
        reports: list[Report] = [facts]
        if sys.stdout.isatty():
            from svcli.training.panel import Watch

            reports.append(stack.enter_context(Watch(facts)))
        else:
            from svcli.training.lines import JsonLines

            reports.append(JsonLines())
        reports += loggers(stack)
        checkpoint = run(lambda event: _tell(reports, event))
    history = read_history(output / "log.jsonl")
    if history.steps:
        _draw(output, history)
    if sys.stdout.isatty():
        from svcli.training.panel import show_summary

        show_summary(facts, history)
        ui.show(str(checkpoint))


def _is_first_process() -> bool:
    """Of those that torchrun has started: the one that shows what all of them do."""
    return int(os.environ.get("RANK", "0")) == 0


def _tell(reports: Sequence[Report], event: Event) -> None:
    for report in reports:
        report(event)


@contextmanager
def _told_how_to_go_on(facts: RunFacts, output: Path) -> Iterator[None]:
    """A sentence for whoever stops a run."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code == FAILURE:  # another process has said what failed
            raise
        if facts.resumable_step:
            ui.note(f"stopped; the same command, without --fresh, goes on from step {facts.resumable_step:,}")
        elif any(output.glob("states/step-*")):
            ui.note("stopped; the same command, without --fresh, goes on from the last state that is there")
        else:
            ui.note("stopped before anything was saved; the same command begins anew")
        raise


def _draw(output: Path, history: History) -> None:
    try:
        from svcli.plots import draw_losses

        draw_losses(output / "loss.png", history, output.resolve().name)
    except OSError as error:
        ui.note(f"{output / 'loss.png'}: could not be written ({error.strerror})")
    except ModuleNotFoundError:
        ui.note('matplotlib is not installed, so there is no loss.png: pip install "svcli[plots]"')
