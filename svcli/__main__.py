"""The entry point: `svcli`, or `python -m svcli`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Literal, NoReturn, TextIO

INTERRUPTED = 130
"""What a shell reports for a process that Ctrl-C has ended."""
MACHINE = 3
"""This machine lacks something: TensorRT, a GPU, a driver, a package, memory, room on the disk."""


def main() -> None:
    """Run the command line, and leave quietly when interrupted, even while modules are still being imported."""
    try:
        _main()
    except SystemExit as end:
        if "WORLD_SIZE" in os.environ:
            from skipvision.training.ending import end_at_once, is_one_of_several

            if is_one_of_several():
                end_at_once(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _main() -> None:
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _leave)
        # A stream that was closed before the start is None, which nobody expects.
        sys.stdin = sys.stdin or _nowhere("r")
        sys.stdout, sys.stderr = (stream or _nowhere("w") for stream in (sys.stdout, sys.stderr))
        from svcli.app import app

        # A locale that is not UTF-8 must not turn an answer into an encoding error.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            app(prog_name="svcli")
        finally:
            # What help and versions have left there would else be written, and fail, when nobody can tell it any more.
            sys.stdout.flush()
    except SystemExit as end:
        # Where the reader of help has gone, typer ends with 1, and where that of notes has, rich does.
        if isinstance(end.__context__, BrokenPipeError):
            _leave_as_the_reader_did()
        raise
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except ImportError as error:
        # Of a package that even telling errors needs; commands tell their own.
        from svcli.settings import debugging

        if debugging():
            raise
        what = (error.name or str(error)).split(".")[0]
        lacks = "is needed and not installed" if isinstance(error, ModuleNotFoundError) else "cannot be imported"
        sys.stderr.write(f"Error: {what} {lacks}: pip install --force-reinstall svcli\n")
        sys.exit(MACHINE)
    except OSError as error:
        # Of the texts that no command writes; commands tell their own.
        if isinstance(error, BrokenPipeError):
            _leave_as_the_reader_did()
        from svcli import ui
        from svcli.errors import explain, silence_stdout

        silence_stdout()
        message, code = explain(error)
        ui.error(message)
        sys.exit(code)


def _leave_as_the_reader_did() -> NoReturn:
    """Ends without a word, with the code of a process that the signal of a broken pipe has ended."""
    from svcli.errors import BROKEN_PIPE, silence_stdout

    silence_stdout()
    sys.exit(BROKEN_PIPE)


def _nowhere(mode: Literal["r", "w"]) -> TextIO:
    return Path(os.devnull).open(mode)


def _leave(number: int, _frame: object) -> None:
    """Ends as Ctrl-C does: what is half-written goes, helpers end."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
