"""Conversations in a JSON array or in JSON lines: where each record lies is looked up once. Imports no torch."""

from __future__ import annotations

import json
import mmap
import re
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from skipvision.training.conversation import BrokenSampleError, Conversation, DataSetError
from skipvision.training.formats import read_record
from skipvision.training.picture_files import PictureFolder

Ints = npt.NDArray[np.int64]

MAX_RECORD_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_BLANKS = re.compile(f"[{_BLANK.decode()}]*")
_CHUNK = 1 << 24
_SHORT = 64
"""Bytes; a longer line is not looked at to see whether it is blank."""


class JsonSource:
    """One file. Only places are in memory; a record is read and parsed when it is asked for."""

    def __init__(self, path: Path, images: Path | None = None) -> None:
        """Raises DataSetError for what is no such file, or is empty."""
        self.name = str(path)
        self.fingerprint = file_fingerprint(path)
        self._pictures = PictureFolder(str(path.parent if images is None else images))
        try:
            with path.open("rb") as file:
                self._word, (self._starts, self._ends, self._numbers) = _places(self.name, file.fileno(), file.read(64))
        except OSError as error:
            raise DataSetError(f"{path}: cannot be read ({error.strerror})") from None
        if not len(self):
            raise DataSetError(f"{path}: holds no samples")

    def __len__(self) -> int:
        return len(self._starts)

    def name_of(self, index: int) -> str:
        return f"{self.name} {self._word} {self._numbers[index]}"

    def __getitem__(self, index: int) -> Conversation:
        """Raises BrokenSampleError, and DataSetError where the file has changed: places in it mean nothing then."""
        start, end = int(self._starts[index]), int(self._ends[index])
        check_unchanged(self.fingerprint, Path(self.name))
        if end - start > MAX_RECORD_BYTES:
            raise BrokenSampleError(f"larger than {MAX_RECORD_BYTES >> 20} MB", "unreadable")
        try:
            with Path(self.name).open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise BrokenSampleError(f"{self.name}: cannot be read ({error.strerror})", "unreadable") from None
        return read_record(self.name_of(index), parse_record(data), self._pictures)


def parse_record(data: bytes) -> object:
    """Raises BrokenSampleError."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError:
        raise BrokenSampleError("is no UTF-8", "unreadable") from None
    except RecursionError:
        raise BrokenSampleError("is nested too deeply", "unreadable") from None
    except ValueError as error:
        raise BrokenSampleError(f"is no JSON ({error})", "unreadable") from None


def file_fingerprint(path: Path) -> str:
    """Raises DataSetError where there is no such file."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataSetError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise DataSetError(f"{path}: no file that can be read at any place")
    return f"{path.resolve()} {found.st_size} {found.st_mtime_ns}"


def check_unchanged(fingerprint: str, path: Path) -> None:
    """Raises DataSetError where the file is another than it was."""
    if file_fingerprint(path) != fingerprint:
        raise DataSetError(f"{path}: has changed since it was opened; a run on what it holds now begins with --fresh")


def _places(name: str, number: int, head: bytes) -> tuple[str, tuple[Ints, Ints, Ints]]:
    """What a record is called; starts, ends and numbers of all."""
    begin = len(_BOM) if head.startswith(_BOM) else 0
    if not head:
        raise DataSetError(f"{name}: the file is empty")
    with mmap.mmap(number, 0, access=mmap.ACCESS_READ) as data:
        while begin < len(data) and data[begin] in _BLANK:
            begin += 1
        if begin == len(data):
            raise DataSetError(f"{name}: holds no samples")
        first = data[begin : begin + 1]
        if first == b"[":
            return "record", _elements(name, data, begin)
        if first != b"{" or data[begin : begin + 3].strip() == b"{":
            raise DataSetError(f"{name}: neither a JSON array nor one JSON object a line; write it as one of them")
        return "line", _lines(data)


def _lines(data: mmap.mmap) -> tuple[Ints, Ints, Ints]:
    """Of lines that are not blank."""
    found = (
        np.flatnonzero(np.frombuffer(data[start : start + _CHUNK], np.uint8) == 10) + start + 1
        for start in range(0, len(data), _CHUNK)
    )
    starts = np.concatenate([np.zeros(1, np.int64), *found])
    ends = np.append(starts[1:] - 1, len(data))
    if data[: len(_BOM)] == _BOM:
        starts[0] = len(_BOM)
    short = ends - starts < _SHORT
    blank = [place for place in np.flatnonzero(short) if not data[starts[place] : ends[place]].strip(_BLANK)]
    keep = np.ones(len(starts), bool)
    keep[blank] = False
    return starts[keep], ends[keep], np.flatnonzero(keep) + 1


def _elements(name: str, data: mmap.mmap, begin: int) -> tuple[Ints, Ints, Ints]:
    """Of an array. Bytes are read as characters: outside of strings JSON is ASCII, and strings are thrown away."""
    text = str(data, "latin-1")
    decoder = json.JSONDecoder()
    starts: list[int] = []
    ends: list[int] = []
    place = _skip(text, begin + 1)
    while text[place : place + 1] != "]":
        try:
            if starts:
                if text[place : place + 1] != ",":
                    raise ValueError("no comma")
                place = _skip(text, place + 1)
            starts.append(place)
            place = decoder.raw_decode(text, place)[1]
        except (ValueError, RecursionError):
            raise DataSetError(
                f"{name}: no JSON from record {max(len(starts), 1)} on (byte {place:,}); one broken line of JSON lines"
                " would not hide the others"
            ) from None
        ends.append(place)
        place = _skip(text, place)
    if _skip(text, place + 1) != len(text):
        raise DataSetError(f"{name}: goes on behind the end of its array; take away what is there")
    return np.array(starts, np.int64), np.array(ends, np.int64), np.arange(1, len(starts) + 1)


def _skip(text: str, place: int) -> int:
    """The place of the next character that is not blank."""
    found = _BLANKS.match(text, place)
    assert found is not None
    return found.end()
