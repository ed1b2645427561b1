"""The entry point: `svcli`, or `python -m svcli`."""

from __future__ import annotations

import sys

INTERRUPTED = 130
"""What a shell reports for a process that Ctrl-C has ended."""


def main() -> None:
    """Run the command line, and leave quietly when interrupted, even while modules are still being imported."""
    try:
        from svcli.app import app

        # A locale that is not UTF-8 must not turn an answer into an encoding error.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        app(prog_name="svcli")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
