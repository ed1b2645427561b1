"""What measured times say, and where they were taken: shared by the scripts of this folder. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

from skipvision import __version__
from svcli.bench.cpu import available_cores, cpu_model
from svcli.bench.statistics import paired_ratio

RESULTS = Path(__file__).parent / "results"
BUNDLED = Path("models/skipvision-tiny")
"""What is measured where nothing else is named; from the root of the repository."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and how many there are."""
    p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
    return {"median": median, "p10": p10, "p90": p90, "runs": len(values)}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians, with the middle 95 % of what resampled rounds give.

    Round i of both was measured side by side, so that rounds are drawn in pairs.
    """
    return asdict(paired_ratio(numerators, denominators))


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Spread of `dense` and of `skipped`, and the ratio skipped to dense."""
    return {name: spread(seconds[name]) for name in ("dense", "skipped")} | {
        "ratio": ratio(seconds["skipped"], seconds["dense"])
    }


def surroundings(threads: int) -> dict[str, Any]:
    """Machine, date and versions. Call it before measuring: it notes how busy the machine was."""
    return {
        "date": str(date.today()),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "available_cores": available_cores(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "threads": threads,
        "versions": {"svcli": __version__, "python": platform.python_version()} | _versions(),
    }


def _versions() -> dict[str, str]:
    wanted = ("onnxruntime", "onnxruntime-gpu", "torch", "numpy")
    return {each.name: each.version for each in distributions() if each.name in wanted}


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Floats are cut to what was really measured. Stopped in between, the file of before is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not svcli.files: the check on a GPU runs where there is no typer.
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(_rounded(results), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
