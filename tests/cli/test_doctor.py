"""`svcli doctor` shows the facts, what works, and what mends the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from svcli import __version__
from svcli.app import app
from svcli_engines.environment import PACKAGES, Environment, Model, OnnxRuntime
from tests.cli.test_terminal import ESCAPE, environment, finish, spawn
from tests.engines.machines import LIGHT, laptop, server


def doctor(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts svcli on a machine of the test's choice."""

    def put(found: Environment) -> None:
        monkeypatch.setattr("svcli_engines.environment.look", lambda *_: found)

    return put


def test_a_laptop_without_a_gpu(on: Any) -> None:
    on(laptop())
    done = doctor()
    assert done.stderr == ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == f"svcli {__version__}"
    for line in (
        "Python 3.12.1, /venv/bin/python",
        "machine 8 cores, 16 GiB, 9 GiB of it free",
        "bundled model /src/models/skipvision-tiny: int8, all hashes good",
        "torch not installed",
        "ONNX Runtime 1.31.1: CPUExecutionProvider",
        "tensorrt not installed",
        "plugins there is no CUDA compiler",
        "NVIDIA driver libcuda.so.1 is not there",
        "working folder /home/me: 5 GiB free",
    ):
        assert line in lines
    works = lines[lines.index("What works") + 1 :]
    assert works[0] == 'yes svcli chat IMAGE "QUESTION"'
    train = works.index("no svcli train RECIPE -o FOLDER")
    assert works[train + 1] == 'pip install "svcli[torch]"'
    assert len([line for line in works if line.startswith(("yes ", "no "))]) == 11


def test_a_server_with_a_gpu(on: Any) -> None:
    on(server())
    lines = [" ".join(line.split()) for line in doctor().stdout.splitlines()]
    assert "NVIDIA driver 580.65.06, CUDA up to 13.0" in lines
    assert "GPU 0 NVIDIA H200, compute capability 9.0, 140 GiB" in lines
    assert "plugins kernels are compiled by nvrtc 13.0" in lines
    assert not any(line.startswith("no ") for line in lines)


def test_where_no_engine_runs_it_is_a_failure(on: Any) -> None:
    on(laptop(LIGHT - {"onnxruntime"}))
    done = doctor(code=1)
    assert 'no   svcli chat IMAGE "QUESTION"\n     pip install "svcli[cpu]"\n' in done.stdout
    on(laptop(model=Model("/src/models/skipvision-tiny", problem="weights.safetensors is missing")))
    assert "weights.safetensors is missing" in doctor(code=1).stdout


def test_two_onnxruntimes_are_warned_about(on: Any) -> None:
    on(laptop(LIGHT | {"onnxruntime-gpu"}))
    assert "overwrite each other" in doctor().stderr
    assert "overwrite each other" in json.loads(doctor("--json").stdout)["warnings"][0]


def shape(value: Any) -> Any:
    """Keys and types; of a list, those of its first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


WORKS = {"works": "bool", "command": "str", "remedy": "NoneType"}
SCHEMA = {
    "svcli": "str",
    "python": "str",
    "executable": "str",
    "machine": {"platform": "str", "cores": "int", "memory_bytes": "int", "memory_available_bytes": "int"},
    "packages": [{"name": "str", "distribution": "str", "version": "str"}],
    "onnxruntime": {"version": "str", "providers": ["str"], "problem": "NoneType"},
    "torch": {"cuda": "str"},
    "cuda": {
        "driver": "str",
        "cuda": "str",
        "gpus": [{"name": "str", "compute_capability": "str", "memory_bytes": "int"}],
        "source": "str",
        "problem": "NoneType",
    },
    "tensorrt": [{"name": "str", "version": "str", "problem": "NoneType"}],
    "plugins": {"compiler": "str", "problem": "NoneType"},
    "model": {"path": "str", "precision": "str", "problem": "NoneType"},
    "places": [{"name": "str", "path": "str", "exists": "bool", "free_bytes": "int"}],
    "warnings": [],
    "works": {
        "chat-cpu": WORKS,
        "chat-cuda": WORKS,
        "chat-torch-cuda": WORKS,
        "chat-tensorrt": WORKS,
        "chat-tensorrt-rtx": WORKS,
        "build-engine-tensorrt": WORKS,
        "build-engine-tensorrt-rtx": WORKS,
        "verify": WORKS,
        "export": WORKS,
        "train": WORKS,
        "data": WORKS,
    },
}
"""Of a machine that has everything. Programs read these keys: they stay."""
PACKAGE_NAMES = [
    "numpy",
    "pillow",
    "tokenizers",
    "jinja2",
    "pydantic",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "safetensors",
    "onnx",
    "resvg-py",
    "tensorrt",
    "tensorrt-rtx",
    "polygraphy",
    "cuda-bindings",
    "nvrtc",
]


def test_json_keys_are_pinned(on: Any) -> None:
    on(server())
    said = json.loads(doctor("--json").stdout)
    assert shape(said) == SCHEMA
    assert list(said) == list(SCHEMA)
    assert [package["name"] for package in said["packages"]] == PACKAGE_NAMES == list(PACKAGES)
    assert [flavour["name"] for flavour in said["tensorrt"]] == ["tensorrt", "tensorrt-rtx"]


def test_json_says_null_for_what_is_not_there(on: Any) -> None:
    on(laptop(LIGHT - {"onnxruntime"}, onnxruntime=OnnxRuntime(problem="not installed")))
    said = json.loads(doctor("--json", code=1).stdout)
    assert said["onnxruntime"] == {"version": None, "providers": [], "problem": "not installed"}
    assert said["cuda"]["gpus"] == []
    assert said["works"]["chat-cpu"] == {
        "works": False,
        "command": 'svcli chat IMAGE "QUESTION"',
        "remedy": 'pip install "svcli[cpu]"',
    }


def test_it_looks_at_the_bundled_model_and_the_folders_that_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def look(*arguments: Any) -> Environment:
        seen.extend(arguments)
        return laptop()

    monkeypatch.setattr("svcli_engines.environment.look", look)
    monkeypatch.setattr("svcli.commands.doctor.bundled_model", lambda: Path("/the/model"))
    doctor()
    model, places = seen
    assert model == Path("/the/model")
    assert list(places) == [
        "working folder",
        "training assets",
        "training cache",
        "compiled kernels",
        "temporary files",
    ]


def test_a_pipe_gets_plain_text_with_commands_in_one_piece(command: list[str]) -> None:
    done = subprocess.run([*command, "doctor"], capture_output=True, text=True, env=environment(), check=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert f"Python         {'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}" in done.stdout
    works = done.stdout.split("What works\n")[1].splitlines()
    assert all(line.startswith(("yes  svcli ", "no   svcli ", "     ")) for line in works)


@pytest.mark.parametrize("width", [30, 90])
def test_a_terminal_of_any_width_shows_every_fact(command: list[str], width: int) -> None:
    child = spawn(command, "doctor", width=width)
    screen = ESCAPE.sub("", finish(child)).replace("\r\n", "\n")
    assert child.exitstatus == 0
    tables, works = screen.split("What works\n")
    assert all(len(line) <= width for line in tables.splitlines())
    words = set(tables.split())
    assert {"onnxruntime-gpu", "tensorrt-rtx", "plugins"} <= words
    # Commands are left to the terminal to wrap, so that they can be copied.
    assert 'yes  svcli chat IMAGE "QUESTION"' in works
