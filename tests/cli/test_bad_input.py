"""Bad input ends in one sentence and exit code 1 or 2, never in a traceback, never in a wrong answer in silence."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from svcli.app import app


def chat(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments), "--max-new-tokens", "4"])


def refused(done: Result, code: int, *words: str) -> None:
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "unexpected" not in line
    assert all(word in line for word in words), line


def answered(done: Result, note: str = "") -> None:
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()
    assert note in done.stderr


def folder(path: Path) -> None:
    path.mkdir()


def text_file(path: Path) -> None:
    path.write_text("this is no picture\n")


def empty_file(path: Path) -> None:
    path.touch()


def cut_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:5000])


def bomb(path: Path) -> None:
    """30,000 x 30,000 pixels in a file of a few bytes: a PNG whose header promises them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (None, "no such file"),
        (folder, "folder"),
        (text_file, "not a picture"),
        (empty_file, "empty"),
        (cut_jpeg, "damaged"),
        (bomb, "megapixels"),
    ],
)
def test_what_is_no_picture_is_refused(
    bundle: Path, tmp_path: Path, make: Callable[[Path], None] | None, words: str
) -> None:
    path = tmp_path / "picture.jpg"
    if make is not None:
        make(path)
    refused(chat(path, "what is this?", "--model", bundle), 2, "picture.jpg", words)


def test_a_file_that_may_not_be_read_is_refused(bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = Path.open

    def deny(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == picture:
            raise PermissionError(13, "Permission denied")
        return really(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", deny)
    done = chat(picture, "what is this?", "--model", bundle)
    refused(done, 2, "red.png", "Permission denied")


def one_pixel(path: Path) -> None:
    Image.new("RGB", (1, 1), "blue").save(path)


def cmyk(path: Path) -> None:
    Image.new("CMYK", (40, 30), (0, 200, 200, 10)).save(path, "JPEG")


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)).save(path, "PNG")


def palette_with_alpha(path: Path) -> None:
    image = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (10, 10, 20, 20))
    image.quantize(8).save(path, "PNG")


def very_long(path: Path) -> None:
    Image.new("RGB", (5000, 1), "blue").save(path)


@pytest.mark.parametrize("make", [one_pixel, cmyk, sixteen_bit, palette_with_alpha, very_long])
def test_odd_pictures_are_answered(bundle: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "picture.png"
    make(path)
    answered(chat(path, "what is this?", "--model", bundle))


def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(bundle: Path, tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    red.save(tmp_path / "still.gif")
    moving = chat(tmp_path / "moving.gif", "what is this?", "--model", bundle)
    answered(moving, "only the first")
    assert moving.stdout == chat(tmp_path / "still.gif", "what is this?", "--model", bundle).stdout


@pytest.mark.parametrize("question", ["", "  ", "\n"])
def test_an_empty_question_is_refused(bundle: Path, picture: Path, question: str) -> None:
    refused(chat(picture, question, "--model", bundle), 2, "question is empty")


def test_a_question_beyond_the_context_is_refused(bundle: Path, picture: Path) -> None:
    refused(chat(picture, "what is this? " * 200, "--model", bundle), 2, "context", "76")


def test_more_pictures_than_the_bundle_takes_are_refused(bundle: Path, picture: Path) -> None:
    refused(chat(picture, picture, picture, "what is this?", "--model", bundle), 2, "3 pictures", "2")


def test_a_picture_without_a_question_is_refused(bundle: Path, picture: Path) -> None:
    refused(chat(picture, "--model", bundle), 2, "no question")
    refused(chat("--model", bundle), 2, "no question")
    refused(chat("what is this?", "--model", bundle), 2, "no such picture")
    refused(chat("what is this?", picture, "--model", bundle), 2, "comes last")


def change_manifest(bundle: Path, **changes: Any) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ("vision.onnx", "prefill.onnx", "decode.onnx", "weights.safetensors", "tokenizer.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_a_damaged_bundle_is_refused(bundle: Path, picture: Path, tmp_path: Path, name: str, damage: str) -> None:
    broken = shutil.copytree(bundle, tmp_path / "bundle")
    path = broken / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        flip_a_byte(path)
    refused(chat(picture, "what is this?", "--model", broken), 1, name, "svcli export")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 99}, "99"),
        ({"surprise": 1}, "surprise"),
        ({"model": {}}, "manifest.json"),
        ({"files": {}}, "manifest.json"),
    ],
)
def test_a_manifest_of_another_version_or_shape_is_refused(
    bundle: Path, picture: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    broken = shutil.copytree(bundle, tmp_path / "bundle")
    change_manifest(broken, **changes)
    refused(chat(picture, "what is this?", "--model", broken), 1, words)


def test_what_is_no_bundle_is_refused(picture: Path, tmp_path: Path) -> None:
    refused(chat(picture, "what is this?", "--model", tmp_path / "nowhere"), 2, "nowhere")
    refused(chat(picture, "what is this?", "--model", tmp_path), 2, "manifest.json")
    (tmp_path / "manifest.json").write_text("{")
    refused(chat(picture, "what is this?", "--model", tmp_path), 1, "manifest.json")


def test_a_real_process_says_one_sentence_too(command: list[str], bundle: Path, tmp_path: Path) -> None:
    text_file(tmp_path / "text.jpg")
    done = subprocess.run(
        [*command, "chat", "text.jpg", "what?", "--model", bundle],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: text.jpg: not a picture")
    assert len(done.stderr.splitlines()) == 1
