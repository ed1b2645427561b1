"""Runs of the toy tasks in processes of their own, one or several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
SECONDS = 120
"""How long a run may take on a busy machine; alone it takes three."""


@dataclass(frozen=True)
class Job:
    """A run of a toy task: settings of the task, and of the loop."""

    output: str
    kind: str = "toy"
    task: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def run_toys(*jobs: Job, world: int = 1, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """One after the other, in the same processes."""
    launcher = []
    if world > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    given = json.dumps([asdict(job) for job in jobs])
    return subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name("toy.py")), given, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def rows(output: Path, event: str) -> list[dict[str, Any]]:
    """Of one kind, of the log."""
    found = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in found if row.get("event") == event]


def losses(output: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step."""
    steps = [(row["step"], (row["loss"], row["grad_norm"])) for row in rows(output, "step")]
    assert len(dict(steps)) == len(steps), "a step has two rows"
    return dict(steps)


def weights(output: Path) -> dict[str, Tensor]:
    """Of the finished checkpoint."""
    return load_file(output / "checkpoint" / "model.safetensors")
