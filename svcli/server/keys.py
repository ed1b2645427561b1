"""The key that requests need."""

from __future__ import annotations

import os
from pathlib import Path

from svcli.errors import UsageError

KEY_VARIABLE = "SVCLI_API_KEY"


def read_key(variable: str | None, file: Path | None) -> str | None:
    """The key in `file`, in the environment's `variable`, or in SVCLI_API_KEY if that is set.

    Raises UsageError for a key that is asked for and not there.
    """
    if variable is not None and file is not None:
        raise UsageError("--api-key-env and --api-key-file: one of them")
    if file is not None:
        place, key = str(file), file.read_bytes().decode(errors="replace").strip()
    else:
        place = variable or KEY_VARIABLE
        key = os.environ.get(place, "").strip()
        if variable is None and not key:
            return None
    if not key:
        raise UsageError(f"{place}: there is no key")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{place}: a key is of ASCII letters, digits and signs")
    return key
