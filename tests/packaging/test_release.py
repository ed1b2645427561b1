"""What a release is tried with tries every extra, and can fail."""

from __future__ import annotations

import shlex
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from release.place import Place, WrongError
from release.smoke import EXTRAS, bare, cpu, serve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections lead to this machine alone."""
    connect = socket.socket.connect

    def refuse(this: socket.socket, address: Any) -> None:
        if this.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            raise AssertionError(f"a test tried to connect to {address}")
        connect(this, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An environment whose programs are those of the tests, with every extra."""
    (tmp_path / "bin").mkdir()
    paths = ":".join(str(ROOT / folder) for folder in ("", "export", "engines"))
    for name, call in {"python": sys.executable, "svcli": f"{sys.executable} -m svcli"}.items():
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexport PYTHONPATH={shlex.quote(paths)}\nexec {call} "$@"\n')
        program.chmod(0o755)
    shutil.copytree(ROOT / "examples", tmp_path / "work" / "examples")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Place(tmp_path, tmp_path / "work")


def test_every_extra_is_tried_and_stands_in_the_document() -> None:
    assert EXTRAS.keys() - {"none"} == PROJECT["optional-dependencies"].keys()
    text = (ROOT / "docs" / "releasing.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in PROJECT["optional-dependencies"])
    for name, (installed, _attempt) in EXTRAS.items():
        assert name == "none" or name in installed.split(",")
        assert set(installed.split(",")) - {""} <= PROJECT["optional-dependencies"].keys()


def test_another_exit_code_than_expected_is_told_with_what_was_said(here: Place) -> None:
    with pytest.raises(WrongError, match="svcli inspect nowhere ended with 2: Error: nowhere"):
        here.run("svcli", "inspect", "nowhere")
    assert "Error: nowhere" in here.run("svcli", "inspect", "nowhere", expected=2)


@pytest.mark.slow
def test_what_should_be_missing_and_is_there_fails(here: Place) -> None:
    with pytest.raises(WrongError, match=r"svcli chat .* ended with 0"):
        bare(here)
    with pytest.raises(WrongError, match="torch is there"):
        cpu(here)


@pytest.mark.slow
def test_the_server_is_tried_for_real(here: Place) -> None:
    assert serve(here) == "starts, is healthy, answers, and ends after SIGTERM"
