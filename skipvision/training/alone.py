"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipvision.training.errors import TrainError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other runs out of `folder`, which is there, until this one ends, however it ends.

    Raises TrainError where there is one already. A file system without locks keeps nobody out.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainError(f"{folder}: another run goes on in this folder; name another one, or stop that") from None
        except OSError:
            pass
        yield
