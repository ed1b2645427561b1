"""How a process ends that torchrun has started. Imports no torch."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def is_one_of_several() -> bool:
    """Whether torchrun has started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def end_at_once(code: int) -> NoReturn:
    """Ends this process with `code`, without the interpreter's own end.

    In that, PyTorch 2.13 (gloo) aborts now and then, "terminate called without an active exception", after all is done
    and written. torchrun takes it for a failed run.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
