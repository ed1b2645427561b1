"""What people and clients call a picture is found, or refused in one sentence."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from svcli_engines import picture_fetching, picture_sources
from svcli_engines.images import ImageError
from svcli_engines.picture_sources import find_pictures, sent_picture
from svcli_engines.picture_urls import FetchLimits


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


def as_data(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.png", "a.png", "c[1].png", "sub/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.png", ["a.png"]),
        ("~/a.png", ["{}/a.png"]),
        ("*.png", ["a.png", "b.png", "c[1].png"]),
        ("[ab].png", ["a.png", "b.png"]),
        ("**/*.png", ["a.png", "b.png", "c[1].png", "sub/d.png"]),
        ("~/s*/d.png", ["{}/sub/d.png"]),
        ("s*/*", ["sub/d.png"]),
        ("c[1].png", ["c[1].png"]),
        ("file://{}/a.png", ["{}/a.png"]),
        ("FILE://localhost{}/a.png", ["{}/a.png"]),
        ("file:{}/c%5B1%5D.png", ["{}/c[1].png"]),
    ],
)
def test_files_are_found_in_order(text: str, names: list[str], folder: Path) -> None:
    found = find_pictures(text.format(folder))
    assert [each.name for each in found] == [name.format(folder) for name in names]
    assert all(each.open().image.getpixel((0, 0)) == (255, 0, 0) for each in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the name of a picture is empty"),
        ("x*.png", "x*.png: no file matches this pattern"),
        ("s*", "s*: no file matches this pattern"),
        ("ftp://host/a.png?key=1", "ftp://host/a.png: not a URL of http, https or data"),
        ("file://other/a.png", "file://other/a.png: not a file on this machine, which is file:///path"),
        ("file://[x/a.png", "file://[x/a.png: not a URL that can be read"),
        ("data:image/png,abc", "a data: URL of a picture is data:image/png;base64, and its bytes"),
        ("data:image/png;base64", "a data: URL of a picture is data:image/png;base64, and its bytes"),
        ("data:image/png;base64,a", "the picture in a data: URL: not base64"),
        ("data:image/png;base64,äöü", "the picture in a data: URL: not base64"),
        ("data:image/png;base64,!!!!", "the picture in a data: URL: not base64"),
    ],
)
def test_what_names_no_picture_is_refused(text: str, message: str, folder: Path) -> None:
    assert folder
    with pytest.raises(ImageError) as refused:
        find_pictures(text)
    assert str(refused.value) == message


@pytest.mark.parametrize("text", ["missing.png", "sub", "~nobody/a.png", "a\0.png", "a" * 5000])
def test_a_path_that_is_no_picture_is_told_when_it_is_opened(text: str, folder: Path) -> None:
    assert folder
    (source,) = find_pictures(text)
    with pytest.raises(ImageError, match=r"no such file|a folder|cannot be read"):
        source.open()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("\0[]*?{}~:%/a!-,;", min_size=1, max_size=30), start=st.sampled_from(["x/", "data:", "file:x", "a://"])
)
def test_whatever_is_typed_is_a_source_or_a_sentence(text: str, start: str, folder: Path) -> None:
    assert folder
    try:
        sources = find_pictures(start + text)
    except ImageError:
        return
    for source in sources:
        with pytest.raises(ImageError):
            source.open()


def test_a_pattern_for_too_many_files_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder
    monkeypatch.setattr(picture_sources, "MOST_MATCHES", 2)
    with pytest.raises(ImageError, match="more than 2 files match"):
        find_pictures("*.png")


def test_standard_input_is_read_once_and_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.BytesIO(png("blue"))
    (source,) = find_pictures("-", stdin)
    assert [source.open().image.getpixel((0, 0)) for _ in range(2)] == [(0, 0, 255)] * 2
    with pytest.raises(ImageError, match="nothing came on standard input"):
        find_pictures("-", stdin)
    monkeypatch.setattr(picture_sources, "MAX_FILE_BYTES", 10)
    endless = open("/dev/zero", "rb")  # noqa: SIM115
    with endless:
        (source,) = find_pictures("-", endless)
    assert isinstance(source.where, bytes)
    assert len(source.where) == 11


def test_a_terminal_is_no_picture() -> None:
    leader, follower = os.openpty()
    with os.fdopen(follower, "rb", buffering=0) as terminal, pytest.raises(ImageError, match="is a terminal"):
        find_pictures("-", terminal)
    os.close(leader)


@pytest.mark.parametrize(
    "url",
    [
        as_data(png()),
        as_data(png()).rstrip("="),
        as_data(png()).replace("data:image/png", "DATA:"),
        as_data(png()).replace("+", "%2B").replace("=", "%3D"),
        as_data(png())[:60] + "\n " + as_data(png())[60:],
    ],
)
def test_data_are_decoded_whatever_they_call_themselves(url: str) -> None:
    (source,) = find_pictures(url)
    assert source.open().image.size == (2, 3)
    assert source == sent_picture(url)


def test_data_are_bounded_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_sources, "MAX_FILE_BYTES", 2**20)
    with pytest.raises(ImageError, match="larger than 1 MB"):
        sent_picture("data:;base64," + "A" * (2 * 2**20))


def test_data_that_are_no_picture_are_told_when_they_are_opened() -> None:
    with pytest.raises(ImageError, match=r"^the picture in a data: URL: not a picture that can be read"):
        sent_picture(as_data(b"no picture")).open()


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "~/a.png", "*.png", "-", "", "file:///a.png", "ftp://host/a.png", "//host/a.png"]
)
def test_clients_name_no_files(text: str) -> None:
    with pytest.raises(ImageError, match="not a URL of http, https or data"):
        sent_picture(text)


def test_a_url_is_fetched_when_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(url: str, limits: FetchLimits | None) -> bytes:
        asked.append((url, limits))
        return png()

    monkeypatch.setattr(picture_fetching, "fetch_picture", fetch)
    (source,) = find_pictures("HTTPS://host/a.png?key=secret#there")
    assert source.name == "HTTPS://host/a.png"
    assert asked == []
    limits = FetchLimits(seconds=1)
    assert source.open(limits=limits).image.size == (2, 3)
    assert asked == [("HTTPS://host/a.png?key=secret#there", limits)]
