"""One run at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipvision.locks import acquire
from skipvision.training.errors import TrainError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other runs out of `folder`, which is there, until this one ends, however it ends.

    Raises TrainError where there is one already. A file system without locks keeps nobody out.
    """
    with (folder / ".lock").open("w") as file:
        if not acquire(file):
            raise TrainError(f"{folder}: another run goes on in this folder; name another one, or stop that")
        yield
