"""Writing a folder in one move, so that it is never half there. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Fills a new folder by `write` and only then puts it in place of `directory`, so that it is never half there."""
    directory = directory.resolve()  # what a link leads to is replaced, not the link
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        error.filename = str(directory)  # and not a name that nobody gave
        raise
    try:
        fresh.chmod(0o755)
        write(fresh)
        if directory.exists():
            _exchange(fresh, directory)
        else:
            os.replace(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Swaps two folders in one step (Linux renameat2), so that neither name is ever without a folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, rename_exchange = -100, 2
    if libc.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))
