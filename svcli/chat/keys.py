"""Keys that are pressed while nobody reads: not shown, and kept for whoever reads next."""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_keys(*, as_pressed: bool = False) -> Iterator[None]:
    """Meanwhile no key is shown. Lines are kept as the terminal edits them; `as_pressed`: each key as it is, for a line
    editor that takes it up, since the terminal's own Ctrl-D would reach it as nothing. Ctrl-C stays Ctrl-C.

    Where stdin is no terminal, nothing is changed.
    """
    try:
        before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    except (OSError, ValueError, termios.error, AttributeError):
        before = None
    if before is None:
        yield
        return
    incoming, outgoing, control, local, *speeds, letters = before
    local &= ~termios.ECHO
    if as_pressed:
        incoming, local, letters = incoming & ~termios.ICRNL, local & ~termios.ICANON, [*letters]
        letters[termios.VMIN], letters[termios.VTIME] = 1, 0
    termios.tcsetattr(sys.stdin, termios.TCSANOW, [incoming, outgoing, control, local, *speeds, letters])
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
