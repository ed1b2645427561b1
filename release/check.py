"""Builds sdist and wheel, installs each extra in an environment of its own, and tries what it is for.

python release/check.py [--only cpu,serve] [--keep FOLDER]

Run it from anywhere, with any Python that has venv; packages come from the index that pip is configured for. It ends with
1 where anything is not as it should be. What this machine cannot try is said in the same table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = "examples/hamburgers.png"
QUESTION = "How many hamburgers are there?"
ANSWER = "There are 6 hamburgers."
LACKING = 3
"""svcli's exit code for what this machine lacks."""
SECONDS = 900


class WrongError(RuntimeError):
    """What was not as it should be."""


class UntriedError(RuntimeError):
    """What cannot be tried here, and why."""


@dataclass(frozen=True)
class Place:
    """An environment, and the folder in which its commands run: with examples and recipes, and what earlier ones left."""

    environment: Path
    folder: Path

    def run(self, *command: str | Path, expected: int = 0) -> str:
        """stdout, and stderr behind it. Raises WrongError for another exit code."""
        program, *rest = map(str, command)
        done = subprocess.run(
            [str(self.environment / "bin" / program), *rest],
            cwd=self.folder,
            env=self.clean(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        said = done.stdout + done.stderr
        if done.returncode != expected:
            raise WrongError(f"{program} {' '.join(rest)} ended with {done.returncode}: {said.strip()[-600:]}")
        return said

    def clean(self) -> dict[str, str]:
        """Nothing of the source tree, nor of whoever runs this, but where pip looks."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "SVCLI"))
        }
        return kept | {"PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}", "XDG_STATE_HOME": str(self.folder)}

    def python(self, code: str) -> str:
        return self.run("python", "-c", code)


def expect(condition: bool, what: str) -> None:
    """Raises WrongError unless `condition` holds."""
    if not condition:
        raise WrongError(what)


def bare(place: Place) -> str:
    """Help and versions without any engine, and which extra is missing."""
    expect(place.run("svcli", "--version").startswith("svcli "), "no version")
    expect("Examples:" in place.run("svcli", "--help"), "no examples in the help")
    said = place.run("svcli", "chat", PICTURE, QUESTION, expected=LACKING)
    expect('pip install "svcli[cpu]"' in said, f"no remedy: {said}")
    return "help, versions, and the extra that is missing"


def cpu(place: Place) -> str:
    said = place.run("svcli", "chat", "--quiet", PICTURE, QUESTION)
    expect(said.strip() == ANSWER, f"another answer: {said}")
    place.run("svcli", "doctor")
    place.run("svcli", "inspect")
    absent = place.python("import importlib.util as u; print(u.find_spec('torch') is None)")
    expect(absent.strip() == "True", "torch is there")
    return "chat answers right, without torch"


def gpu(place: Place) -> str:
    said = place.run("svcli", "chat", "--quiet", PICTURE, QUESTION)
    expect(said.strip() == ANSWER, f"another answer: {said}")
    if not _has_gpu():
        said = place.run("svcli", "chat", "--engine", "onnxruntime-cuda", PICTURE, QUESTION, expected=LACKING)
        raise UntriedError(f"answers on the CPU; no GPU here, which it says: {said.strip().splitlines()[-1][:120]}")
    said = place.run("svcli", "chat", "--quiet", "--engine", "onnxruntime-cuda", PICTURE, QUESTION)
    expect(said.strip() == ANSWER, f"another answer on the GPU: {said}")
    return "chat answers right on the GPU"


def torch(place: Place) -> str:
    bundled = place.python("from svcli.settings import bundled_model as b; print(b())").strip()
    place.run("svcli", "export", bundled, "-o", "fp32", "--precision", "fp32", "--no-variants", "--overwrite")
    place.run("svcli", "export", bundled, "-o", "fp16", "--precision", "fp16", "--no-variants", "--overwrite")
    said = place.run("svcli", "chat", "--quiet", "--model", "fp16", PICTURE, QUESTION)
    expect(said.strip() == ANSWER, f"another answer: {said}")
    place.run("svcli", "verify", "fp32", "--engines", "onnxruntime", "--images", PICTURE)
    return "exports in fp32 and fp16, and holds ONNX Runtime against PyTorch"


def train(place: Place) -> str:
    expect("[optim]" in place.run("svcli", "train", "sv-llava-100", "--print-config"), "no recipe is printed")
    _train(place, "run", "optim.steps=2")
    expect((place.folder / "run" / "checkpoint" / "model.safetensors").is_file(), "no checkpoint")
    return "prints a recipe, and two steps end in a checkpoint"


def loggers(place: Place) -> str:
    _train(place, "logged", "optim.steps=1", "log.tensorboard=true")
    expect(any((place.folder / "logged" / "tensorboard").rglob("events*")), "no events of TensorBoard")
    place.python("import wandb")
    return "a step is logged to TensorBoard; wandb imports"


def data(place: Place) -> str:
    place.run("svcli", "data", "fetch", "--help")
    code = 'import resvg_py; s = \'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>\';'
    place.python(f"{code} assert bytes(resvg_py.svg_to_bytes(svg_string=s))[1:4] == b'PNG'")
    return "an SVG is drawn; nothing was downloaded"


def serve(place: Place) -> str:
    log = place.folder / "server.txt"
    with log.open("w") as stream:
        command = [str(place.environment / "bin" / "svcli"), "serve", "--port", "0"]
        process = subprocess.Popen(command, cwd=place.folder, env=place.clean(), stderr=stream)
    try:
        until = time.monotonic() + 60
        while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            expect(process.poll() is None and time.monotonic() < until, f"no server: {log.read_text()}")
            time.sleep(0.1)
        with urllib.request.urlopen(f"{found[0]}/health", timeout=10) as answer:
            expect(answer.status == 200, f"/health says {answer.status}")
        body = {"model": "skipvision-tiny", "messages": [{"role": "user", "content": "what is this?"}]}
        request = urllib.request.Request(
            f"{found[0]}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            expect(bool(json.load(answer)["choices"][0]["message"]["content"]), "an empty answer")
    finally:
        process.send_signal(signal.SIGTERM)
        ended = process.wait(60)
    expect(ended in (0, 128 + signal.SIGTERM), f"after SIGTERM it ended with {ended}")
    return "starts, is healthy, answers, and ends after SIGTERM"


def plots(place: Place) -> str:
    bundled = place.python("from svcli.settings import bundled_model as b; print(b())").strip()
    place.run("svcli", "profile", bundled, PICTURE, "-o", "figures")
    expect(len(list((place.folder / "figures").glob("*.png"))) == 3, "not three figures")
    return "three figures of a profile"


def rtx(place: Place) -> str:
    _need_fp16(place)
    place.run("svcli", "build-engine", "fp16", "--backend", "tensorrt-rtx", "--target", "sm_89")
    plans = list((place.folder / "fp16" / "plans").rglob("*.plan"))
    expect(len(plans) == 3, f"{len(plans)} plans")
    raise (
        UntriedError("plans are built for sm_89; none was run")
        if not _has_gpu()
        else UntriedError("plans were not run")
    )


def trt(place: Place) -> str:
    _need_fp16(place)
    said = place.run("svcli", "build-engine", "fp16", "--backend", "tensorrt", expected=LACKING)
    last = said.strip().splitlines()[-1]
    expect("tensorrt" in last.lower(), f"no remedy: {last}")
    raise UntriedError(f"TensorRT comes from its own index, which it says: {last[:120]}")


EXTRAS: dict[str, tuple[str, Callable[[Place], str]]] = {
    "none": ("", bare),
    "cpu": ("cpu", cpu),
    "torch": ("cpu,torch", torch),
    "serve": ("cpu,serve", serve),
    "rtx": ("cpu,rtx", rtx),
    "trt": ("cpu,trt", trt),
    "train": ("cpu,torch,train", train),
    "loggers": ("torch,train,loggers", loggers),
    "data": ("data", data),
    "plots": ("cpu,torch,plots", plots),
    "gpu": ("gpu", gpu),
}
"""By the extra that is tried: what is installed, and what shows that it works. `torch` leaves bundles for later ones."""


def build(folder: Path) -> Path:
    """The wheel that was made from the sdist, both looked into. Raises WrongError."""
    place = Place(folder / "builder", folder)
    _make_environment(place, ["build"])
    place.run("python", "-m", "build", "--outdir", folder / "dist", ROOT)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    shutil.rmtree(place.environment)
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "skipvision/__init__.py").read_text(), re.MULTILINE)
    expect(version is not None and f"-{version[1]}" in wheel.name, f"{wheel.name} has another version than the code")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = {"LICENSE", "CHANGELOG.md", "constraints.txt", "mkdocs.yml", "docker/cpu.Dockerfile", "release/check.py"}
    expect(wanted <= names, f"the sdist lacks {', '.join(sorted(wanted - names))}")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    expect("\n\n# svcli" in text, "the wheel's description is not the README")
    offered = set(re.findall(r"^Provides-Extra: (\S+)$", text, re.MULTILINE))
    expect(offered == EXTRAS.keys() - {"none"}, f"extras that are not tried, or not there: {offered ^ EXTRAS.keys()}")
    return wheel


def check(name: str, wheel: Path, folder: Path) -> tuple[str, str]:
    """A word and a sentence for one extra, whose environment is gone afterwards."""
    extras, attempt = EXTRAS[name]
    place = Place(folder / f"venv-{name}", folder / "work")
    started = time.monotonic()
    try:
        _make_environment(place, ["-c", str(ROOT / "constraints.txt"), f"{wheel}[{extras}]" if extras else str(wheel)])
        size = sum(path.lstat().st_size for path in place.environment.rglob("*")) / 1e6
        place.run("python", "-m", "pip", "check")
        word, sentence = "ok", attempt(place)
    except UntriedError as untried:
        word, sentence = "PART", str(untried)
    except (WrongError, OSError, ValueError, subprocess.TimeoutExpired) as wrong:
        return "FAIL", f"{wrong}"
    finally:
        shutil.rmtree(place.environment, ignore_errors=True)
    return word, f"{sentence} ({size:.0f} MB, {time.monotonic() - started:.0f} s)"


def _make_environment(place: Place, arguments: list[str]) -> None:
    made = [sys.executable, "-m", "venv", str(place.environment)]
    subprocess.run(made, check=True, capture_output=True)
    place.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def _train(place: Place, output: str, *settings: str) -> None:
    if not (place.folder / "fp32").is_dir():
        raise UntriedError("the bundle in fp32, which `torch` leaves, is not there")
    given = [word for setting in ("base=fp32", *settings) for word in ("--set", setting)]
    place.run("svcli", "train", "recipes/tune-tiny.toml", "-o", output, "--fresh", *given)


def _need_fp16(place: Place) -> None:
    if not (place.folder / "fp16").is_dir():
        raise UntriedError("the bundle in fp16, which `torch` leaves, is not there")


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the distribution, and try each extra in a fresh environment.")
    parser.add_argument("--only", metavar="EXTRAS", help=f"With commas between: {', '.join(EXTRAS)}.")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="Leave distribution and work here.")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(EXTRAS)
    unknown = set(chosen) - EXTRAS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="svcli-release-"))
    try:
        (folder / "work").mkdir(parents=True, exist_ok=True)
        for name in ("examples", "recipes"):
            shutil.copytree(ROOT / name, folder / "work" / name, dirs_exist_ok=True)
        print("building sdist and wheel", flush=True)
        try:
            wheel = build(folder)
        except WrongError as wrong:
            print(f"FAIL  {wrong}")
            return 1
        print(f"ok    {wheel.name}", flush=True)
        words = []
        for name in chosen:
            word, sentence = check(name, wheel, folder)
            words.append(word)
            print(f"{word:5} {name:8} {sentence}", flush=True)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    return int("FAIL" in words)


if __name__ == "__main__":
    sys.exit(main())
