"""The Dockerfiles, as far as they can be tried without Docker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.optional import missing

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instruction(text: str, name: str) -> str:
    """The last of that name, in one line."""
    found: list[str] = re.findall(rf"^{name} (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    return found[-1].strip()


def test_there_is_one_for_a_cpu_and_one_for_cuda() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path: Path) -> None:
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if tool is None:
        missing("hadolint")
    done = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_serves_as_nobody_special_from_bases_of_one_version(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)
    assert int(instruction(text, "USER")) > 0
    assert json.loads(instruction(text, "ENTRYPOINT")) == ["svcli"]
    assert json.loads(instruction(text, "CMD"))[:1] == ["serve"]
    assert instruction(text, "VOLUME") == "/bundles"
    assert "/health" in instruction(text, "HEALTHCHECK")


def test_the_command_of_the_image_is_one_that_svcli_takes() -> None:
    from typer.main import get_command

    from svcli.app import app

    for path in FILES:
        name, *words = json.loads(instruction(path.read_text(encoding="utf-8"), "CMD"))
        parsed = get_command(app).commands[name].make_context(name, words)  # type: ignore[attr-defined]
        assert parsed.params["host"] == "0.0.0.0"


@pytest.mark.slow
def test_the_wheel_is_built_from_what_docker_is_given(tmp_path: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in allowed:
        source, target = ROOT / name, tmp_path / "context" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), "context"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {"svcli/app.py", "svcli/models/skipvision-tiny/manifest.json"} <= set(archive.namelist())
