"""A path that a terminal pastes is a picture, wherever it stands; everything else stays a question."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from svcli_engines.dropped_paths import dropped_paths

QUESTIONS = [
    "what's this?",
    "is it the cat's",
    'say "hello" twice',
    "a/b or c.d",
    "5.5 C:\\dir",
    "it's",
    "",
    "naïve 猫?",
]
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: len(os.fsencode(name)) < 200
)


def single(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"


def double(path: str) -> str:
    return '"' + re.sub(r'(["\\$`])', r"\\\1", path) + '"'


def backslashed(path: str) -> str:
    return re.sub(r"([^A-Za-z0-9_./-])", r"\\\1", path)


def as_url(path: str) -> str:
    return Path(path).as_uri()


QUOTINGS = [shlex.quote, single, double, backslashed, as_url]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dropped")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / 'it\'s a "cat" (1).png'
    Image.new("RGB", (4, 4)).save(path)
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pictures_are_found_between_any_words_however_they_are_quoted(folder: Path, data: st.DataObject) -> None:
    names = data.draw(st.lists(NAMES, min_size=1, max_size=3))
    words = [data.draw(st.sampled_from(QUESTIONS)) for _ in range(len(names) + 1)]
    paths = [folder / f"{name}.PNG" for name in names]
    for path in paths:
        path.touch()
    parts = [words[0]]
    for path, word in zip(paths, words[1:], strict=True):
        # A question's own quotes may close only in the next question, and then they quote what is between.
        parts += [data.draw(st.sampled_from(QUOTINGS))(str(path)), word]
    found, rest = dropped_paths(" ".join(filter(None, parts)))
    assert found == paths
    assert rest == " ".join(filter(None, words))


@settings(max_examples=150, deadline=None)
@given(
    line=st.text(max_size=60) | st.lists(st.sampled_from(["'", '"', "\\", " ", "a", "/", ".", "~", "?"])).map("".join)
)
def test_a_line_without_a_picture_comes_back_as_it_was(line: str) -> None:
    assert dropped_paths(line) == ([], line)


@pytest.mark.parametrize("quote", QUOTINGS)
@pytest.mark.parametrize("line", ["{}", "{} ", " {}\n", "{}?", "{}).", "{} {}"])
def test_alone_and_before_punctuation(quote: Callable[[str], str], line: str, picture: Path) -> None:
    found, rest = dropped_paths(line.replace("{}", quote(str(picture))))
    assert found == [picture] * line.count("{}")
    assert rest == line.replace("{}", "").strip()


@pytest.mark.parametrize("quote", [single, double])
def test_quoted_paths_need_no_blank_between(quote: Callable[[str], str], tmp_path: Path) -> None:
    paths = [tmp_path / "a cat.png", tmp_path / "a dog.png"]
    for path in paths:
        path.touch()
    assert dropped_paths("".join(quote(str(path)) for path in paths) + "which?") == (paths, "which?")


def test_a_bare_path_is_found_and_its_blanks_where_it_stands_alone(picture: Path) -> None:
    assert dropped_paths(str(picture)) == ([picture], "")
    plain = picture.rename(picture.with_name("it's.png"))
    assert dropped_paths(f"what's in {plain}?") == ([plain], "what's in ?")
    assert dropped_paths(f"compare {plain}, {plain}: which?") == ([plain, plain], "compare , : which?")


def test_relative_paths_and_those_below_home(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    picture.rename(tmp_path / "cat.png")
    assert dropped_paths("what is in ./cat.png") == ([Path("cat.png")], "what is in")
    assert dropped_paths("cat.png what is it") == ([Path("cat.png")], "what is it")
    assert dropped_paths("~/cat.png what is it") == ([tmp_path / "cat.png"], "what is it")


def test_pictures_are_known_by_suffix_or_header_and_words_are_words(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cat").write_bytes(picture.read_bytes())
    Path("broken.jpg").write_bytes(b"no picture")
    Path("notes.txt").write_text("no picture")
    Path("folder.png").mkdir()
    os.mkfifo("pipe.png")
    assert dropped_paths("the cat here") == ([], "the cat here")
    assert dropped_paths("cat") == ([], "cat")
    assert dropped_paths("./cat here") == ([Path("cat")], "here")
    assert dropped_paths("./broken.jpg here") == ([Path("broken.jpg")], "here")
    for line in ("./notes.txt here", "./folder.png here", "./pipe.png here"):
        assert dropped_paths(line) == ([], line)


def test_lines_stay_apart(picture: Path) -> None:
    assert dropped_paths(f"first\n{single(str(picture))}\nlast") == ([picture], "first\n\nlast")


LONG = ["data:image/png;base64," + "ab/." * 100_000, "it's \" " * 5_000, "?" * 20_000 + "/"]


@pytest.mark.parametrize("line", LONG, ids=["data", "quotes", "punctuation"])
def test_long_lines_are_read_in_no_time(line: str) -> None:
    began = time.process_time()
    assert dropped_paths(line) == ([], line)
    assert time.process_time() - began < 5
