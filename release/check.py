"""Builds sdist and wheel, installs each extra in an environment of its own, and tries what it is for.

python -m release.check [--only cpu,serve] [--keep FOLDER]

Run it from the root of the repository, with any Python that has venv; packages come from the index that pip is
configured for. It ends with 1 where anything is not as it should be. What this machine cannot try is said in the same
table.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from release.place import Place, UntriedError, WrongError, expect
from release.smoke import EXTRAS

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path) -> Path:
    """The wheel that was made from the sdist, both looked into. Raises WrongError."""
    place = Place(folder / "builder", folder)
    place.make("build")
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
        place.make("-c", ROOT / "constraints.txt", f"{wheel}[{extras}]" if extras else wheel)
        size = sum(path.lstat().st_size for path in place.environment.rglob("*")) / 1e6
        place.run("python", "-m", "pip", "check")
        word, sentence = "ok", attempt(place)
    except UntriedError as untried:
        word, sentence = "PART", str(untried)
    except (WrongError, OSError, ValueError, subprocess.SubprocessError) as wrong:
        return "FAIL", f"{wrong}"
    finally:
        shutil.rmtree(place.environment, ignore_errors=True)
    return word, f"{sentence} ({size:.0f} MB, {time.monotonic() - started:.0f} s)"


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
        except (WrongError, OSError, ValueError, subprocess.SubprocessError) as wrong:
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
