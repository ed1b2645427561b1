"""Locks on files, which end with the process that holds them."""

from __future__ import annotations

import fcntl
from typing import IO, Any


def acquire(file: IO[Any]) -> bool:
    """Whether nobody else holds `file`, which is held then until it is closed. True where a disk has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
