"""Fetching, preparing and loading, without any registry."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from skipvision.data import assets, easy_vqa, packages, prepare
from skipvision.data.errors import DataError
from skipvision.data.judge import is_right
from skipvision.data.kinds import KINDS, Kind
from skipvision.data.packages import Package


def test_every_archive_has_its_own_name() -> None:
    assert len({package.pattern for package in packages.PACKAGES}) == len(packages.PACKAGES)
    for package in packages.PACKAGES:
        assert bool(package.sha256) == (package.registry != "debian")
        assert package.licence


@pytest.mark.parametrize(
    ("package", "command"),
    [
        (packages.EASY_VQA, ["-m", "pip", "download", "--quiet", "--no-deps", "easy-vqa==1.0"]),
        (packages.OPENMOJI, ["pack", "--silent", "openmoji@17.0.0"]),
        (packages.WORDS, ["download", "-qq", "scowl"]),
    ],
)
def test_archives_come_through_the_registry_clients(package: Package, command: list[str]) -> None:
    assert package.command()[1:] == command


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "noise\nno such package\n")

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", fail)
    with pytest.raises(DataError, match=r"could not fetch emoji-datasource-google with npm: no such package$"):
        packages.fetch(tmp_path)


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(DataError, match="npm is needed to fetch emoji-datasource-google"):
        packages.fetch(tmp_path)


def test_a_changed_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "emoji-datasource-google-16.0.0.tgz").write_bytes(b"something else")
    with pytest.raises(DataError, match="not the expected file: delete it"):
        packages.fetch(tmp_path)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fetch and prepare them first"):
        assets.load(tmp_path)
    with pytest.raises(DataError, match=r"tuxpaint-stamps-default is not in .*: fetch the assets first"):
        prepare.prepare(tmp_path)


def test_a_kind_keeps_back_one_photograph_if_it_has_two() -> None:
    for kind in KINDS:
        held_out = prepare.held_out_photo(kind)
        assert (held_out in kind.photo) == (len(kind.photo) > 1)
    assert prepare.held_out_photo(Kind("dog", "dogs", ("1f415",), ("only",))) is None


def test_art_is_cropped_and_made_small(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (400, 300))
    picture.paste((255, 0, 0, 255), (100, 50, 300, 150))
    picture.save(tmp_path / "thing.png")
    cut = prepare._open(tmp_path / "thing.png")
    assert (cut.size, cut.mode) == ((128, 64), "RGBA")
    with pytest.raises(DataError, match=r"nothing\.png is not in its package"):
        prepare._open(tmp_path / "nothing.png")
    Image.new("RGBA", (9, 9)).save(tmp_path / "empty.png")
    with pytest.raises(DataError, match=r"empty\.png is empty"):
        prepare._open(tmp_path / "empty.png")


def test_loading_gives_back_the_prepared_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((5, 7, 4), (3, 2, 4))]
    sizes = np.array([p.shape[:2] for p in pictures], np.int32)
    np.savez_compressed(tmp_path / prepare.CUTOUTS, pixels=np.concatenate([p.ravel() for p in pictures]), sizes=sizes)
    rows = [
        {"kind": "dog", "style": "photo", "source": "a", "split": "train"},
        {"kind": "cat", "style": "photo", "source": "b", "split": "test"},
    ]
    fonts = [{"family": "Play", "file": "fonts/Play.ttf", "split": "test"}]
    (tmp_path / prepare.CUTOUTS_INDEX).write_text(json.dumps(rows))
    (tmp_path / prepare.FONTS_INDEX).write_text(json.dumps(fonts))
    (tmp_path / prepare.WORDS_INDEX).write_text(json.dumps({"train": ["a"], "test": ["b"]}))
    loaded = assets.load(tmp_path)
    for cutout, picture in zip(loaded.cutouts, pictures, strict=True):
        assert np.array_equal(np.asarray(cutout.image), picture)
    assert [c.held_out for c in loaded.cutouts] == [False, True]
    assert loaded.fonts_for("test_font")[0].path == str(tmp_path / "fonts/Play.ttf")
    assert (loaded.words_for("val"), loaded.words_for("test")) == (("a",), ("b",))


def test_easy_vqa_is_read_from_its_wheel(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "0.png")
    rows = [["what shape is it?", "circle", 0], ["is there not a red shape?", "no", 0]]
    with ZipFile(tmp_path / "easy_vqa-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "0.png", "easy_vqa/data/test/images/0.png")
        wheel.writestr("easy_vqa/data/test/questions.json", json.dumps(rows))
    ((image, questions),) = easy_vqa.load(tmp_path, "test")
    assert image.size == (64, 64)
    assert [q.answer for q in questions] == ["It is a circle.", "No."]
    assert all(q.task == "easy_vqa" and is_right(q, q.answer) for q in questions)
    assert easy_vqa.sentence("teal") == "It is teal."
