"""What svcli takes from its surroundings: where the bundled model lies, and whether to show tracebacks."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_MODEL = "skipvision-tiny"


def bundled_model() -> Path:
    """The folder of the model that comes with svcli: inside the installed package, or in the tree of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "models" / DEFAULT_MODEL
    return installed if installed.is_dir() else package.parent / "models" / DEFAULT_MODEL


def debugging() -> bool:
    """Whether `SVCLI_DEBUG` asks for tracebacks."""
    return os.environ.get("SVCLI_DEBUG", "") not in ("", "0")


def state_folder() -> Path:
    """Where what a user typed is kept from run to run, as the XDG base directories have it."""
    named = os.environ.get("XDG_STATE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".local" / "state") / "svcli"
