"""constraints.txt pins everything that an install brings, so that it brings the same tomorrow."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
PINS = [Requirement(line) for line in LINES]


def closure(requirements: list[str]) -> set[str]:
    """Canonical names of the requirements and all that they need here; what is not installed ends its branch."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            waiting += [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
    return found


@pytest.mark.parametrize("extra", ["", *EXTRAS, *GROUPS])
def test_everything_that_an_install_brings_is_pinned(extra: str) -> None:
    groups = {"": PROJECT["project"]["dependencies"], **EXTRAS, **GROUPS}
    pinned = {canonicalize_name(pin.name) for pin in PINS}
    assert closure(groups[extra]) <= pinned


def test_every_pin_is_exact_and_stands_once_for_each_python() -> None:
    for version in ("3.10", "3.11", "3.12", "3.13"):
        names = [
            canonicalize_name(pin.name)
            for pin in PINS
            if pin.marker is None or pin.marker.evaluate({"python_version": version})
        ]
        assert len(names) == len(set(names))
    assert all(str(pin.specifier).startswith("==") for pin in PINS)
