"""What the bundled model scores beside its baselines, and at other skip settings, on the same weights.

    python -m benchmarks.reduction --assets build/assets [--limit 2400]

`svcli eval` asks unseen compositions and the official test questions of easy-VQA; `svcli sweep` the former at several
settings. Answers go to build/reduction; killed and started again, it goes on. First tokens are timed at the end, all
settings in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import BUNDLED, RESULTS, surroundings, write_results
from svcli.bench.cpu import available_cores

RESULT = RESULTS / "reduction.json"
SETTINGS = "24/40,44/69,96/64,128/32"
"""Retained and skipped: those of the main table, one of which the model was trained with, and one above."""
_ANSWERS = Path("build/reduction")


def evaluated(task: str, options: argparse.Namespace) -> Any:
    """What `svcli eval` says of the bundle and all baselines."""
    arguments = ["eval", str(options.bundle), task, "--split", "test", "-o", str(options.work / task)]
    return told([*arguments, *common(options)])


def swept(options: argparse.Namespace) -> Any:
    """What `svcli sweep` says."""
    arguments = ["sweep", str(options.bundle), "bundled", "--split", "test", "-o", str(options.work / "sweep")]
    return told([*arguments, "--settings", SETTINGS, *common(options)])


def common(options: argparse.Namespace) -> list[str]:
    arguments = ["--data", str(options.assets), "--limit", str(options.limit), "--threads", str(options.threads)]
    return [*arguments, "--json", *["--overwrite"] * options.overwrite]


def told(arguments: list[str]) -> Any:
    """The JSON object of a command."""
    done = subprocess.run([sys.executable, "-m", "svcli", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"svcli {arguments[0]} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--assets", type=Path, required=True, help="folder that `svcli data fetch` filled")
    parser.add_argument("--limit", type=int, default=2400, help="questions of each task")
    parser.add_argument("--overwrite", action="store_true", help="ask anew what was answered before")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--work", type=Path, default=_ANSWERS)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> None:
    """Asks everything and writes it down."""
    options = parse()
    found = surroundings(options.threads) | {"limit": options.limit}
    found["eval"] = {task: evaluated(task, options) for task in ("bundled", "easy-vqa")}
    found["sweep"] = swept(options)
    write_results(found, options.output)
    print(found["sweep"]["choice"]["reason"])


if __name__ == "__main__":
    main()
