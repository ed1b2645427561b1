"""What was retained of a picture, shown to the user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svcli.chat.session import Session
from svcli.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from svcli.chat.view import ChatView


def marked_picture(session: Session, number: int) -> Image.Image:
    """Picture `number`, from 1 on, with what was retained of it marked.

    Raises UsageError where there is no such picture, or nobody can tell what was retained.
    """
    raise UsageError(f"picture {number}")


def show_picture(session: Session, number: int, view: ChatView) -> None:
    """Draws it in the terminal."""
    raise UsageError(f"picture {number}")


def save_overlay(session: Session, path: Path) -> None:
    """Writes it as PNG."""
