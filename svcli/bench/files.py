"""Where results go: looked at before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from svcli.errors import UsageError


def check_targets(paths: Sequence[Path]) -> None:
    """Raises UsageError where one cannot be written, or is named twice."""
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path.parent}: no such folder")
        if not os.access(path.absolute().parent, os.W_OK):
            raise UsageError(f"{path.parent}: cannot be written to")
    if len({path.absolute() for path in paths}) < len(paths):
        raise UsageError("--json, --csv and --html: name a file of its own for each")
