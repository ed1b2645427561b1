"""Whole processes: how long `svcli` takes from start to exit, and how much memory it holds. Imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import compared, spread

_LAUNCHER = Path(__file__).with_name("launch.py")
_SVCLI = (sys.executable, "-m", "svcli")


@dataclass(frozen=True)
class Process:
    """One process that ran to its end."""

    seconds: float
    peak_bytes: int
    stdout: str


def run(command: Sequence[str]) -> Process:
    """Runs `command` and waits for it. Raises SystemExit, with what it said, if it fails."""
    launched = subprocess.run(
        [sys.executable, "-I", "-S", str(_LAUNCHER), *command], capture_output=True, text=True, check=True
    )
    outcome = json.loads(launched.stdout)
    if outcome["returncode"] != 0:
        raise SystemExit(f"{' '.join(command)} failed: {launched.stderr.strip()}")
    return Process(outcome["seconds"], outcome["peak_bytes"], outcome["stdout"])


def measure_help(runs: int) -> dict[str, Any]:
    """`svcli --help`; the first run warms the file cache and does not count."""
    done = [run([*_SVCLI, "--help"]) for _ in range(runs + 1)][1:]
    return {"seconds": spread([process.seconds for process in done])}


def measure_chat(
    bundles: Mapping[str, Path], picture: Path, question: str, *, threads: int, tokens: int, runs: int
) -> dict[str, Any]:
    """One-shot chats of at most `tokens` tokens, the bundles in turn; the first of each does not count."""
    done: dict[str, list[Process]] = {name: [] for name in bundles}
    options = ["--json", "--threads", str(threads), "--max-new-tokens", str(tokens)]
    for _ in range(runs + 1):
        for name, bundle in bundles.items():
            done[name].append(run([*_SVCLI, "chat", "--model", str(bundle), *options, str(picture), question]))
    counted = {name: processes[1:] for name, processes in done.items()}
    answers = {name: json.loads(processes[0].stdout) for name, processes in done.items()}
    return {
        "seconds": compared({name: [each.seconds for each in counted[name]] for name in bundles}),
        "peak_bytes": compared({name: [each.peak_bytes for each in counted[name]] for name in bundles}),
        "answer_tokens": {name: answer["tokens"]["answer"] for name, answer in answers.items()},
    }
