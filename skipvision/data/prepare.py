"""Unpacking the fetched packages into one compact cache of cut-outs, fonts and words."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from skipvision.data import packages
from skipvision.data.errors import DataError
from skipvision.data.kinds import KINDS, Kind

CUTOUTS = "cutouts.npz"
CUTOUTS_INDEX = "cutouts.json"
FONTS_INDEX = "fonts.json"
WORDS_INDEX = "words.json"

LONGEST_SIDE = 128
NUM_TEST_WORDS = 300
TEST_FONTS = ("ComicNeue", "Play")
# Faces that a reader tells from each other; hairlines and oblique twins stay out.
FACES = re.compile(
    r"(DejaVu(Sans|Serif|SansMono)(-Bold)?"
    r"|Liberation(Sans|Serif|Mono|SansNarrow)-(Regular|Bold|Italic)"
    r"|Free(Sans|Serif|Mono)(Bold)?"
    r"|FreeSerifBoldItalic|Humor-Sans|Lato-(Regular|Black|Italic|Semibold)"
    r"|ComicNeue-(Regular|Bold)|Play-(Regular|Bold)(?=\.ttf))\.(ttf|otf)"
)
UNFIT_WORDS = frozenset({"dead", "die", "hell", "kill", "sex"})
_STAMPS = "usr/share/tuxpaint/stamps"
_CLIPART = "usr/share/openclipart/svg"
_WORDS = "usr/share/dict/scowl/english-words.10"


@dataclass(frozen=True)
class _Found:
    kind: str
    style: str
    source: str
    split: str
    image: Image.Image


def prepare(root: Path) -> None:
    """Write the cut-outs, fonts and words that `load` reads; needs the fetched archives."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        scratch = Path(name)
        _prepare_cutouts(root, scratch)
        _prepare_fonts(root, scratch)
        _prepare_words(root, scratch)


def _prepare_cutouts(root: Path, scratch: Path) -> None:
    for package in (packages.STAMPS, packages.CLIPART):
        _unpack_deb(package.archive(root), scratch)
    for package in (packages.GOOGLE, packages.TWITTER):
        folder = package.name.rpartition("-")[2]
        wanted = [f"package/img/{folder}/64/{code}.png" for kind in KINDS for code in kind.emoji]
        _unpack_tar(package.archive(root), wanted, scratch)
    codes = [_openmoji_file(code) for kind in KINDS for code in kind.emoji]
    _unpack_tar(packages.OPENMOJI.archive(root), codes, scratch)

    found = [cutout for kind in KINDS for cutout in _cutouts(kind, scratch)]
    sizes = np.array([cutout.image.size[::-1] for cutout in found], dtype=np.int32)
    pixels = np.concatenate([np.asarray(cutout.image).reshape(-1) for cutout in found])
    np.savez_compressed(root / CUTOUTS, pixels=pixels, sizes=sizes)
    rows = [{"kind": c.kind, "style": c.style, "source": c.source, "split": c.split} for c in found]
    _write_json(root / CUTOUTS_INDEX, rows)


def _cutouts(kind: Kind, scratch: Path) -> Iterator[_Found]:
    held_out = held_out_photo(kind)
    for photo in kind.photo:
        split = "test" if photo == held_out else "train"
        image = _open(scratch / _STAMPS / f"{photo}.png")
        yield _Found(kind.name, "photo", photo, split, image)
    for code in kind.emoji:
        for style, folder in (("noto", "google"), ("twemoji", "twitter")):
            path = scratch / f"package/img/{folder}/64/{code}.png"
            yield _Found(kind.name, style, code, "train", _open(path))
        image = _open(scratch / _openmoji_file(code))
        yield _Found(kind.name, "openmoji", code, "test", image)
    for name in kind.clipart:
        if name.startswith("stamps/"):
            path = scratch / _STAMPS / name.removeprefix("stamps/")
        else:
            path = scratch / _CLIPART / name
        yield _Found(kind.name, "clipart", name, "train", _open(_with_suffix(path)))


def held_out_photo(kind: Kind) -> str | None:
    """Return the one photograph of the kind kept for tests, if it can spare one."""
    return min(kind.photo, key=lambda p: crc32(p.encode())) if len(kind.photo) > 1 else None


def _openmoji_file(code: str) -> str:
    # OpenMoji leaves the variation selector out of its names.
    return f"package/color/svg/{code.removesuffix('-fe0f').upper()}.svg"


def _with_suffix(path: Path) -> Path:
    for suffix in ("", ".png", ".svg", ".svgz"):
        if path.with_name(path.name + suffix).is_file():
            return path.with_name(path.name + suffix)
    raise DataError(f"{path.name} is not in its package: another version was fetched")


def _open(path: Path) -> Image.Image:
    """Return the picture cropped to what can be seen of it, at most LONGEST_SIDE long."""
    if path.suffix.startswith(".svg"):
        image = _rasterise(path)
    elif path.is_file():
        image = Image.open(path).convert("RGBA")
    else:
        raise DataError(f"{path.name} is not in its package: another version was fetched")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox()
    if box is None:
        raise DataError(f"{path.name} is empty")
    image = image.crop(box)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def _rasterise(path: Path) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("preparing the assets needs resvg-py: pip install resvg-py") from error
    # A dpi of 0, the default, makes every size given in points 0.
    png = resvg_py.svg_to_bytes(svg_path=str(path), dpi=96.0, width=4 * LONGEST_SIDE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _prepare_fonts(root: Path, scratch: Path) -> None:
    for package in packages.FONTS:
        _unpack_deb(package.archive(root), scratch)
    target = root / "fonts"
    target.mkdir(exist_ok=True)
    rows = []
    for path in sorted((scratch / "usr/share/fonts").glob("*/*/*.[ot]tf")):
        if not FACES.fullmatch(path.name):
            continue
        shutil.copyfile(path, target / path.name)
        family = path.stem.partition("-")[0]
        split = "test" if family in TEST_FONTS else "train"
        rows.append({"family": family, "file": f"fonts/{path.name}", "split": split})
    _write_json(root / FONTS_INDEX, rows)


def _prepare_words(root: Path, scratch: Path) -> None:
    _unpack_deb(packages.WORDS.archive(root), scratch)
    lines = (scratch / _WORDS).read_text(encoding="latin-1").split()
    words = {w for w in lines if re.fullmatch("[a-z]{2,7}", w)} - UNFIT_WORDS
    shuffled = sorted(words, key=lambda word: crc32(word.encode()))
    test, train = shuffled[:NUM_TEST_WORDS], shuffled[NUM_TEST_WORDS:]
    _write_json(root / WORDS_INDEX, {"train": sorted(train), "test": sorted(test)})


def _unpack_deb(archive: Path, target: Path) -> None:
    if shutil.which("dpkg-deb") is None:
        raise DataError("dpkg-deb is needed to unpack Debian packages: install dpkg")
    done = subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], capture_output=True)
    if done.returncode != 0:
        raise DataError(f"could not unpack {archive.name}: delete it and fetch again")


def _unpack_tar(archive: Path, names: list[str], target: Path) -> None:
    wanted = set(names)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in wanted and (file := tar.extractfile(member)) is not None:
                path = target / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=0) + "\n", encoding="utf-8")
