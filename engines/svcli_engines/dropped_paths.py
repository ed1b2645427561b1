"""Pictures in a line that was typed: a terminal pastes the quoted path of a file that is dropped on it. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from skipvision.pictures import ImageError, picture_size
from svcli_engines.picture_sources import file_path

SUFFIXES = frozenset(
    {
        ".apng",
        ".bmp",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    }
)
_BLANKS = re.compile(r"\s*")
_GAP = re.compile(r"[ \t]*")
_RUN = re.compile(r"\S+")
_PUNCTUATION = "?!.,;:)"
_LONGEST = 4096
"""Letters of a path."""
_ESCAPED_IN_DOUBLE = '"\\$`'


def dropped_paths(line: str) -> tuple[list[Path], str]:
    """The pictures that a line names by path, in order, and what else it says.

    A path may be quoted as shells do, with '...', "..." or backslashes, may start with ~ or file://, or, where it has
    no blanks, stand as it is; it counts where there is such a file and it looks like a picture. A line without one
    comes back as it was.
    """
    whole = line.strip()
    if _may_name(whole) and (path := _picture(whole)) is not None:
        return [path], ""
    paths: list[Path] = []
    said: list[str] = []
    start = place = 0
    while (place := _end(_BLANKS, line, place)) < len(line):
        found = _picture_at(line, place)
        if found is None:
            place = _end(_RUN, line, place)
            continue
        paths.append(found[0])
        said.append(line[start:place])
        start = place = _end(_GAP, line, found[1])
    if not paths:
        return [], line
    return paths, "".join([*said, line[start:]]).strip()


def _picture_at(line: str, start: int) -> tuple[Path, int] | None:
    """The picture whose path begins at `start`, and where the path ends."""
    run = line[start : _end(_RUN, line, start)]
    if not _may_name(run):
        return None
    candidates = sorted(_words(line, start), key=lambda each: -each[1])
    bare = run.rstrip(_PUNCTUATION)
    candidates += [(text, start + len(text)) for text in (run, bare) if text]
    return next(((path, end) for text, end in candidates if (path := _picture(text)) is not None), None)


def _words(line: str, start: int) -> Iterator[tuple[str, int]]:
    """What a shell would read from `start` on, and where it ends: at a blank, at punctuation in front of one, or, since
    two paths may be pasted without a blank between, where a quote closes."""
    text, place = "", start
    while place < len(line) and not line[place].isspace() and len(text) <= _LONGEST:
        letter = line[place]
        if letter == "'":
            close = line.find("'", place + 1)
            if close < 0:
                return
            text, place = text + line[place + 1 : close], close + 1
            yield text, place
        elif letter == '"':
            inside = _double_quoted(line, place + 1)
            if inside is None:
                return
            text, place = text + inside[0], inside[1]
            yield text, place
        elif letter == "\\" and place + 1 < len(line):
            text, place = text + line[place + 1], place + 2
        else:
            if letter in _PUNCTUATION:
                yield text, place
            text, place = text + letter, place + 1
    yield text, place


def _double_quoted(line: str, place: int) -> tuple[str, int] | None:
    """What stands from `place` to the closing quote, and the place behind it."""
    text = ""
    while place < len(line) and line[place] != '"':
        if line[place] == "\\" and line[place + 1 : place + 2] and line[place + 1] in _ESCAPED_IN_DOUBLE:
            place += 1
        text, place = text + line[place], place + 1
    return (text, place + 1) if place < len(line) else None


def _may_name(words: str) -> bool:
    """Most words are no paths: a question about a cat is not about the file of that name."""
    return any(letter in words for letter in "/.'\"\\")


def _picture(text: str) -> Path | None:
    """The path that `text` is, where there is such a file and it looks like a picture."""
    try:
        for path in dict.fromkeys((Path(text), Path(file_path(text)))):
            # Others would wait for a writer, or never end.
            if path.is_file() and (path.suffix.lower() in SUFFIXES or _has_header(path)):
                return path
    except (OSError, ValueError):  # no name that a file could have
        return None
    return None


def _has_header(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            picture_size(str(path), file)
    except ImageError:
        return False
    return True


def _end(pattern: re.Pattern[str], line: str, place: int) -> int:
    match = pattern.match(line, place)
    return match.end() if match else place
