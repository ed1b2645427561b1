"""Runs a command and prints what it took: python -I -S launch.py COMMAND...

A small process of its own, because Linux counts what a parent holds at the fork into the peak memory of its child.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time


def main() -> None:
    """Prints one JSON object."""
    start = time.perf_counter()
    done = subprocess.run(sys.argv[1:], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # Linux counts KiB
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "returncode": done.returncode, "stdout": done.stdout}))
    sys.stderr.write(done.stderr)


if __name__ == "__main__":
    main()
