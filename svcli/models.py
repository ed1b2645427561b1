"""Models as they are named on the command line: a folder, or an id on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from svcli import ui


def model_folder(
    name: str, *, with_weights: bool = True, check: Callable[[str], object] | None = None, is_quiet: bool = False
) -> Path:
    """The folder of the model, fetched from the hub if it must be, with a bar on stderr unless `is_quiet`.

    `check` raises ConfigError for the config.json of a model that is not wanted; it knows whole families if left out.
    Raises what `skipvision.hub.find_model` does, and UnreachableError where the network goes in between.
    """
    from skipvision.families import read_model
    from skipvision.hub import find_model

    notes: list[str] = []
    with ui.Progress(is_quiet) as progress:
        folder = find_model(
            name,
            with_weights=with_weights,
            check=check or read_model,
            progress=lambda what, done, total: progress.update(
                what, done, max(total, 1), f"{ui.size(done)} of {ui.size(total)}"
            ),
            note=notes.append,
        )
    for sentence in () if is_quiet else notes:
        ui.note(sentence)
    return folder
