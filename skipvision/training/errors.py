"""What ends a run; each message is one sentence that says what to do. Imports no safetensors."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TrainError(ValueError):
    """A run that cannot start or go on."""


class StateError(TrainError):
    """A resumable state, or another file of a run, that cannot be read or written."""


class NotFiniteError(TrainError):
    """A loss or a gradient that is no finite number."""


class NoMemoryError(TrainError):
    """A batch that memory does not hold."""


class NoRoomError(StateError):
    """A disk too full for it."""


def not_written(what: Path, error: Exception, then: str = "goes on") -> StateError:
    """What is to be raised for what the system or safetensors has raised; `then` says what the same command does
    later."""
    code, words = reason(error)
    return kind_of(code)(f"{what}: could not be written ({words}); the same command {then} once that is mended")


def kind_of(code: int | None) -> type[StateError]:
    """By the system's number."""
    return NoRoomError if code in _FULL else StateError


def reason(error: Exception) -> tuple[int | None, str]:
    """The system's number and words; safetensors has them in its message alone."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    match = re.search(r"os error (\d+)", str(error))
    return (int(match[1]), os.strerror(int(match[1]))) if match else (None, str(error))
