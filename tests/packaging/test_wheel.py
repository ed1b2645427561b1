"""The wheel, built through the sdist, chats where there is nothing else, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PACKAGES = {"skipvision", "svcli", "svcli_engines", "svcli_export"}
MODEL = "svcli/models/skipvision-tiny"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and its [cpu] extra, and nothing else: not even pip."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert made.returncode == 0, made.stderr
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet")
    # The home that pip finds its settings and cache in is the real one: the fixture for tests is not active here.
    done = run(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[cpu]", cwd=folder.parent)
    assert done.returncode == 0, f"installing the wheel needs the package index; pip says:\n{done.stderr[-2000:]}"
    return folder / "bin"


def test_sdist_holds_what_a_build_and_a_reader_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "constraints.txt", "tests/conftest.py"}
    assert wanted <= names
    assert not {name for name in names if name.startswith((".venv", "runs/", "build/")) or "__pycache__" in name}


def test_wheel_holds_our_packages_the_model_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES
    assert {f"{package}/__init__.py" for package in PACKAGES} <= set(names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert "svcli_engines/plugins/kernels.cu" in names
    assert f"{MODEL}/manifest.json" in names
    assert {f"svcli/server/page/{name}" for name in ("index.html", "page.css", "page.js")} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_installed_wheel_answers_from_any_folder_without_torch(environment: Path, tmp_path: Path) -> None:
    Image.new("RGB", (320, 240), "red").save(tmp_path / "red.png")
    answered = run(environment / "svcli", "chat", "red.png", "what colour is this?", "--json", cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)["answer"]

    check = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'onnxscript') if u.find_spec(n)])"
    assert run(environment / "python", "-c", check, cwd=tmp_path).stdout.strip() == "[]"


def test_a_command_without_its_extra_names_it(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    done = run(environment / "svcli", "export", "checkpoint", "-o", "bundle", cwd=tmp_path)
    assert done.returncode == 3
    assert 'pip install "svcli[torch]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = run(environment / "svcli", "serve", cwd=tmp_path)
    assert done.returncode == 3
    assert 'pip install "svcli[serve]"' in done.stderr
