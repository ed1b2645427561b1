"""`svcli data fetch` fetches, then prepares, in the folder that recipes name."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from skipvision.data.errors import DataError
from skipvision.training.scratch_recipe import ScratchRecipe
from svcli.app import app


@pytest.mark.parametrize("given", [True, False])
def test_fetch_then_prepare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: bool) -> None:
    seen: list[tuple[str, Path]] = []
    monkeypatch.setattr("skipvision.data.assets.fetch", lambda root: seen.append(("fetch", root)))
    monkeypatch.setattr("skipvision.data.assets.prepare", lambda root: seen.append(("prepare", root)))
    done = CliRunner().invoke(app, ["data", "fetch", *([str(tmp_path)] if given else [])])
    folder = tmp_path if given else Path(str(ScratchRecipe.__dataclass_fields__["assets"].default))
    assert done.exit_code == 0, done.output
    assert seen == [("fetch", folder), ("prepare", folder)]
    assert done.stdout == f"{folder}\n"
    assert "downloading packages" in done.stderr


def test_what_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(_root: Path) -> None:
        raise DataError("npm is needed to fetch openmoji: install it first")

    monkeypatch.setattr("skipvision.data.assets.fetch", fetch)
    done = CliRunner().invoke(app, ["data", "fetch", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "Error: npm is needed to fetch openmoji: install it first"
