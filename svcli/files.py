"""Files and folders that results go to: looked at first, and written in one move, or by one process at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from skipvision.locks import acquire
from svcli.errors import UsageError


def check_targets(paths: Sequence[Path]) -> None:
    """Raises UsageError where one cannot be written, or is named twice."""
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file")
        if _is_device(path):
            continue
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path.parent}: no such folder")
        if not os.access(path.absolute().parent, os.W_OK):
            raise UsageError(f"{path.parent}: cannot be written to")
        if [each.absolute() for each in paths].count(path.absolute()) > 1:
            raise UsageError(f"{path}: named twice; name a file of its own for each")


def check_folder(path: Path) -> None:
    """Raises UsageError where `path`, which need not be there, can be no folder, or none that is written to."""
    for each in (path, *path.parents):
        if each.exists():
            if not each.is_dir():
                raise UsageError(f"{each} is a file; name a folder")
            if not os.access(each, os.W_OK | os.X_OK):
                raise UsageError(f"{each}: cannot be written to")
            return


def write(path: Path, content: bytes | str) -> None:
    """An older file stays whole until the new one is; text is UTF-8. Raises OSError, which names `path`."""
    data = content.encode() if isinstance(content, str) else content
    try:
        if _is_device(path):
            path.write_bytes(data)
            return
        handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.chmod(fresh, 0o644)
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def keep_others_out(file: IO[bytes], path: Path, command: str) -> None:
    """Until `file`, which is open at `path`, is closed, or its process ends, however that ends.

    Raises UsageError where another `command` does so. A device, and a file system without locks, keep nobody out.
    """
    if not _is_device(path) and not acquire(file):
        raise UsageError(f"{path}: another {command} is writing it; wait until it ends, or choose another")


def _is_device(path: Path) -> bool:
    """Whether it is such as /dev/null or a pipe, which must not be replaced by a file."""
    return path.exists() and not path.is_file()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
