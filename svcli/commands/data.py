"""`svcli data`: the art, fonts and words that training pictures are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svcli import ui


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
