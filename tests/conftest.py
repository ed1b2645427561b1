"""For every test: no network, and no trace of, or influence from, the home and settings of whoever runs it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes is a matter of what else the machine does.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def isolated_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    home: Path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(variable, str(home / variable.lower()))
    for variable in ("SVCLI_DEBUG", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections from this process fail but for those to other processes on this machine; the packaging test installs
    from a process of its own."""
    connect = socket.socket.connect

    def refuse(this: socket.socket, address: Any) -> None:
        if this.family != socket.AF_UNIX:
            raise AssertionError(f"a test tried to connect to {address}")
        connect(this, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
