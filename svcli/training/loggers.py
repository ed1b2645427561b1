"""TensorBoard and Weights & Biases: each takes the events of a run. Both packages are optional."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvision.training.events import Event, Report, StepEvent, ValidationEvent
from skipvision.training.recipes import as_toml
from skipvision.training.tune_recipe import LogRecipe, TuneRecipe
from svcli.training.facts import time_split, tokens_of

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class LoggerError(ValueError):
    """A logger that cannot start; the message says why."""


def check(recipe: LogRecipe) -> None:
    """Raises ModuleNotFoundError for a logger whose package is not installed."""
    if recipe.tensorboard:
        import tensorboard  # noqa: F401
    if recipe.wandb:
        import wandb  # noqa: F401


def open_loggers(recipe: TuneRecipe, folder: Path, *, fresh: bool, stack: ExitStack) -> list[Report]:
    """What the recipe of the run in `folder` asks for, to be closed by `stack`. Raises LoggerError."""
    loggers: list[Report] = []
    if recipe.log.tensorboard:
        loggers.append(stack.enter_context(TensorBoard(folder / "tensorboard", as_toml(recipe))))
    if recipe.log.wandb:
        loggers.append(stack.enter_context(WeightsAndBiases(recipe.log.wandb, folder, asdict(recipe), fresh=fresh)))
    return loggers


def scalars(event: Event) -> dict[str, float]:
    """Figures of a step or a validation by the names that they are logged under."""
    if isinstance(event, ValidationEvent):
        return {f"validation/{name}": score for name, score in event.scores.items()}
    if not isinstance(event, StepEvent):
        return {}
    seconds = event.seconds.total
    found = {
        "train/loss": event.loss,
        "train/learning_rate": event.learning_rate,
        "train/grad_norm": event.grad_norm,
        "memory/bytes": float(event.memory),
    }
    found |= {f"train/{name}": value for name, value in event.parts.items()}
    found |= {f"seconds/{name}": value for name, value, _ in time_split(event.seconds)}
    if seconds:
        found |= {"speed/tokens_per_second": tokens_of(event) / seconds, "speed/rows_per_second": event.rows / seconds}
    if event.visual_plain:
        found["visual/kept_share"] = event.visual_kept / event.visual_plain
    return found


class TensorBoard(AbstractContextManager["TensorBoard"]):
    """Event files in `folder`. What a run does again after a stop replaces what was there."""

    def __init__(self, folder: Path, text: str) -> None:
        self._folder, self._text = folder, text
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        """Takes the next event."""
        found = scalars(event)
        if not found:
            return
        assert isinstance(event, (StepEvent, ValidationEvent))
        if self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            # Only now it is known which step is the first one of this life.
            self._writer = SummaryWriter(str(self._folder), purge_step=event.step)
            self._writer.add_text("recipe", f"```toml\n{self._text}\n```", event.step)
        for name, value in found.items():
            self._writer.add_scalar(name, value, event.step)
        if isinstance(event, ValidationEvent):
            self._writer.flush()

    def __exit__(self, *_error: object) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(AbstractContextManager["WeightsAndBiases"]):
    """A run of that service, which goes on under its name when this one does.

    The service takes no step twice: what is done again after a stop, to the same figures, it leaves out.
    """

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any], *, fresh: bool) -> None:
        """Raises LoggerError where the service refuses."""
        import wandb

        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.name,
                id=_run_id(folder, fresh),
                resume="allow",
                config=dict(settings),
                dir=str(folder),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = (str(error).strip().splitlines() or ["it gave no reason"])[0]
            raise LoggerError(f"Weights & Biases: {reason}") from None

    def __call__(self, event: Event) -> None:
        """Takes the next event."""
        if isinstance(event, (StepEvent, ValidationEvent)):
            self._run.log(scalars(event), step=event.step)

    def __exit__(self, kind: object, *_error: object) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def _run_id(folder: Path, fresh: bool) -> str:
    """Kept in the run's folder, so that two machines with folders of the same name have runs of their own."""
    file = folder / "wandb-id"
    if fresh or not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(secrets.token_hex(8), encoding="utf-8")
        os.replace(partial, file)
    return file.read_text(encoding="utf-8").strip()
