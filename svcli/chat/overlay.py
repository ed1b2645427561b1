"""What the model retained of a picture, drawn in the terminal or written as PNG."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from svcli import ui
from svcli.chat.pictures import Picture
from svcli.chat.session import Session
from svcli.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from svcli.chat.view import ChatView


def marked(session: Session, picture: Picture) -> Image.Image:
    """One of the session's pictures, with what was retained of it marked.

    Raises OverlayError where nothing was selected or this engine cannot tell.
    """
    from svcli_engines.overlay import mark_retained

    runner = session.runner
    # What is encoded here, the next question need not encode again.
    runner.conversation.images = [each.image for each in session.pictures]
    seen, retained = runner.conversation.retained(picture.image)
    return mark_retained(picture.image, retained, runner.manifest.config, runner.manifest.image, seen.cut)


def show_picture(session: Session, number: int, view: ChatView) -> None:
    """Draws picture `number`, from 1 on; without marks, and saying so, where nothing can be marked.

    Raises UsageError where there is no such picture, or the terminal draws none.
    """
    from svcli.terminal_pictures import draw, graphics_of
    from svcli_engines.overlay import OverlayError

    if not 0 < number <= len(session.pictures):
        raise UsageError(f"there is no picture {number}; /image list shows all")
    picture, console = session.pictures[number - 1], ui.stderr(is_plain=view.is_plain)
    if graphics_of(console, os.environ) == "text":
        raise UsageError("no pictures are drawn here; `svcli chat --save-overlay PNG` writes what was retained of one")
    view.wait("looking...")
    image, told = picture.image, picture.name
    try:
        image = marked(session, picture)
        told = f"{picture.name}: what is not grey was retained"
    except OverlayError as error:
        view.note(str(error))
    view.end_line()
    draw(image, console)
    view.tell(told)


def save_overlay(session: Session, path: Path) -> None:
    """Writes the picture with its marks as PNG; of several, each with its number behind the name.

    Raises OverlayError as `marked` does, or OSError, behind which there is no file that is not whole.
    """
    pictures = session.pictures
    if not pictures:
        raise UsageError("there is no picture to mark")
    for number, picture in enumerate(pictures, 1):
        place = path if len(pictures) == 1 else path.with_stem(f"{path.stem}-{number}")
        file = io.BytesIO()
        marked(session, picture).save(file, "PNG")
        _write(place, file.getvalue())


def _write(path: Path, content: bytes) -> None:
    existed = path.exists()
    try:
        path.write_bytes(content)
    except OSError as error:
        if not existed:
            path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
