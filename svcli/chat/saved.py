"""A conversation as a file: what was said, and where its pictures are."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from svcli.chat.facts import settings
from svcli.chat.pictures import Picture, open_pictures
from svcli.chat.session import Session
from svcli.errors import UsageError

if TYPE_CHECKING:
    from svcli_export.chat import Message

_FORMAT = "svcli conversation"
_VERSION = 1


def save(session: Session, path: Path) -> None:
    """Writes it, whole or not at all. Raises UsageError where another file would be lost, or OSError."""
    if path.exists() and _read(path) is None:
        raise UsageError(f"{path}: there is a file that is no saved conversation; choose another name")
    shown = iter(session.shown)
    messages = [
        {
            "role": message.role,
            "content": message.content,
            "pictures": [next(shown).reference for _ in range(message.images)],
            **({} if message.ids is None else {"ids": list(message.ids)}),
        }
        for message in session.messages
    ]
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": str(session.model.bundle),
        "tokenizer": _tokenizer(session),
        "settings": settings(session.sampling),
        "messages": messages,
        "waiting": [picture.reference for picture in session.waiting],
    }
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        half.replace(path)
    except OSError as error:
        error.filename = str(path)  # the half one means nothing to anybody
        raise
    finally:
        half.unlink(missing_ok=True)


def load(session: Session, path: Path, *, allow_private: bool = False) -> None:
    """Goes on with a saved conversation in place of this one; pictures are opened again.

    Raises UsageError for what is none, ImageError for a picture that is gone, or OSError; nothing has changed then.
    """
    from svcli_export.chat import Message

    content = _read(path)
    if content is None:
        raise UsageError(f"{path}: this is no conversation that /save wrote")
    # Ids belong to a tokenizer; another reads the words.
    knows_ids = content.get("tokenizer") == _tokenizer(session)
    transparency = session.model.manifest.image.transparency
    shown: list[Picture] = []
    messages: list[Message] = []
    try:
        for each in content["messages"]:
            pictures = open_pictures(each["pictures"], transparency, allow_private=allow_private)
            ids = tuple(each["ids"]) if knows_ids and "ids" in each else None
            messages.append(Message(_role(each["role"]), str(each["content"]), len(pictures), ids))
            shown += pictures
        waiting = open_pictures(content["waiting"], transparency, allow_private=allow_private)
        sampling = replace(session.sampling, **content["settings"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: the conversation in it is damaged ({error})") from None
    vocabulary, picture_id = range(session.model.manifest.config.text.vocab_size), session.model.manifest.chat.image_id
    for message in messages:
        if any(number not in vocabulary or number == picture_id for number in message.ids or ()):
            raise UsageError(f"{path}: the conversation in it is damaged (ids that no answer has)")
    session.messages, session.shown, session.waiting = messages, shown, waiting
    session.sampling = sampling


def _read(path: Path) -> dict[str, Any] | None:
    """What `save` wrote; None for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    known = isinstance(content, dict) and content.get("format") == _FORMAT and content.get("version") == _VERSION
    return content if known else None


def _role(name: str) -> Literal["system", "user", "assistant"]:
    """Raises KeyError for one that there is not."""
    roles: dict[str, Literal["system", "user", "assistant"]]
    roles = {"system": "system", "user": "user", "assistant": "assistant"}
    return roles[name]


def _tokenizer(session: Session) -> str:
    return session.model.manifest.files["tokenizer.json"].sha256
