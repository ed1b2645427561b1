"""`svcli bench` on the bundled model, with every peer that is installed; its JSON file is the result.

python -m benchmarks.bench [models/skipvision-tiny] [--rounds 30]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.measuring import BUNDLED, RESULTS
from svcli.bench.peers import PEERS, check_peers
from svcli.engines import EngineName
from svcli_engines.base import MachineError

RESULT = RESULTS / "bench.json"


def peers() -> list[str]:
    """Those that are installed; of the others it is said what is missing."""
    return [name for name in PEERS if _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        check_peers([name], EngineName.ONNXRUNTIME)
    except MachineError as error:
        print(error, file=sys.stderr)
        return False
    return True


def command(options: argparse.Namespace) -> list[str]:
    """Stages, sequences side by side, longer prompts, and peers."""
    bench = [sys.executable, "-m", "svcli", "bench", str(options.bundle), "examples/hamburgers.png"]
    bench += ["--rounds", str(options.rounds), "--batch", "1,2,4", "--context", "300,600,800"]
    return [*bench, "--json", str(options.output), *(f"--peer={name}" for name in peers())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    raise SystemExit(subprocess.run(command(parser.parse_args()), check=False).returncode)


if __name__ == "__main__":
    main()
