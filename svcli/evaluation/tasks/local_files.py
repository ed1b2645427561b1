"""Finding and reading what people have of a task: JSON, JSON lines, and tables of tabs with pictures in base64."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from svcli.evaluation.task import Task, TaskError
from svcli.evaluation.tasks.records import Record

_MAX_CELL = 2**27
"""Bytes of base64 in one cell."""


def absent(task: Task, folder: Path, split: str) -> TaskError:
    """The error for a folder that holds no form of a split, or for a split that there is not."""
    if split not in task.splits:
        return TaskError(f"{task.name} has no split {split}; it has {', '.join(task.splits)}")
    what = "holds no files" if folder.is_dir() else "is no folder, and should be one with files"
    return TaskError(f"{folder} {what} of {task.name}, split {split}: {task.layout}; they come from {task.source}")


def first(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these files or folders that is there."""
    return next((path for path in (folder / name for name in names) if path.exists()), None)


def pictures_folder(folder: Path, names: Sequence[str], task: Task) -> Path:
    """The first of these folders that is there. Raises TaskError."""
    found = next((path for path in (folder / name for name in names) if path.is_dir()), None)
    if found is None:
        raise TaskError(f"{folder} holds no pictures of {task.name} in {' or '.join(names)}; they are of {task.source}")
    return found


def json_lines(path: Path) -> Iterator[Record]:
    """A record for each line. Raises TaskError, too where there is none."""
    is_empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                is_empty = False
                yield _record(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")
    if is_empty:
        raise TaskError(f"{path}: holds no records")


def json_record(path: Path) -> Record:
    """What a file holds, as one record. Raises TaskError."""
    return _record(_parsed(path.read_bytes(), str(path)), str(path))


def json_entries(path: Path, under: str = "") -> Iterator[tuple[str, Record]]:
    """Entries of a list, by their numbers, or of a dictionary, by their keys; in the field `under`, if it has a name.

    Raises TaskError.
    """
    whole = _parsed(path.read_bytes(), str(path))
    if under:
        whole = whole.get(under) if isinstance(whole, dict) else None
    if isinstance(whole, dict):
        pairs = [(str(key), value, f"{path}, entry {key}") for key, value in whole.items()]
    elif isinstance(whole, list):
        pairs = [(str(number), value, f"{path}, entry {number}") for number, value in enumerate(whole, start=1)]
    else:
        raise TaskError(f"{path}: holds no records{f' in {under}' if under else ''}")
    for key, value, place in pairs:
        yield key, _record(value, place)


class Table:
    """A table of tabs, one record at a time, and again from where a record began. Raises TaskError."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        # The module's own setting; what it keeps short by default are pictures here.
        csv.field_size_limit(_MAX_CELL)
        with path.open("rb") as file:
            self._columns = next(self._rows(file), (0, 0, []))[2]
        missing = [name for name in columns if name not in self._columns]
        if missing:
            raise TaskError(f"{path}: no column {missing[0]}")

    def records(self) -> Iterator[tuple[int, Record]]:
        """Each with the place in the file where it begins."""
        with self.path.open("rb") as file:
            rows = self._rows(file)
            next(rows)
            for begin, line, row in rows:
                yield begin, self._named(row, f"{self.path}, line {line}")

    def at(self, begin: int) -> Record:
        """The record that begins there."""
        with self.path.open("rb") as file:
            file.seek(begin)
            _, _, row = next(self._rows(file))
        return self._named(row, f"{self.path}, byte {begin}")

    def _named(self, row: list[str], place: str) -> Record:
        if len(row) != len(self._columns):
            raise TaskError(f"{place}: {len(row)} columns, not {len(self._columns)}")
        return Record(dict(zip(self._columns, row, strict=True)), place)

    def _rows(self, file: IO[bytes]) -> Iterator[tuple[int, int, list[str]]]:
        """Where each begins, the number of its last line, and its cells."""
        read, number = file.tell(), 0

        def lines() -> Iterator[str]:
            nonlocal read, number
            for line in file:
                read, number = read + len(line), number + 1
                yield line.decode("utf-8-sig" if read == len(line) else "utf-8")

        reader = csv.reader(lines(), delimiter="\t", strict=True)
        while True:
            begin = read
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise TaskError(f"{self.path}, line {number}: no table of tabs ({error})") from None
            if row:
                yield begin, reader.line_num, row


def _parsed(data: bytes, place: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{place}: no JSON ({error})") from None


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise TaskError(f"{place}: no record")
    return Record(value, place)
