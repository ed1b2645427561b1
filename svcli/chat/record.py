"""Turns for programs: JSON on stdout, and logs that grow, as JSON lines or in SQLite."""

from __future__ import annotations

import json
import os
import stat
import uuid
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from svcli import ui
from svcli.errors import UsageError

_DATABASES = (".sqlite", ".sqlite3", ".db")
_COLUMNS = ("time", "conversation", "model", "variant", "question", "images", "answer", "stop_reason", "turn")


class Sink(Protocol):
    """Is given pieces of an answer, and then the whole turn."""

    def piece(self, text: str) -> None: ...

    def turn(self, told: dict[str, Any]) -> None: ...


class Objects:
    """One JSON object a turn on stdout."""

    def piece(self, text: str) -> None:
        """The turn has it."""

    def turn(self, told: dict[str, Any]) -> None:
        ui.show(json.dumps(told))


class Events:
    """JSON lines on stdout: pieces as they come, then the turn."""

    def piece(self, text: str) -> None:
        if text:
            self._show({"event": "piece", "text": text})

    def turn(self, told: dict[str, Any]) -> None:
        self._show({"event": "turn", **told})

    def _show(self, event: dict[str, Any]) -> None:
        ui.show(json.dumps(event))


class LineLog:
    """A file with one JSON object a turn."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it cannot be written."""
        self._path, self._conversation = path, uuid.uuid4().hex
        self._append("")

    def piece(self, text: str) -> None:
        """The turn has it."""

    def turn(self, told: dict[str, Any]) -> None:
        self._append(json.dumps({"time": _now(), "conversation": self._conversation, **told}) + "\n")

    def _append(self, text: str) -> None:
        # One write to a file that is open for appending: two conversations do not tear each other's lines.
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            line = (_line_end(file) + text if text else "").encode()
            written = os.write(file, line)
            while written < len(line):  # a disk that fills up takes a part, and refuses only the next
                written += os.write(file, line[written:])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        finally:
            os.close(file)


class DatabaseLog:
    """A table `turns` in SQLite; `turn` has the whole as JSON."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError where it is no database, OSError where it cannot be written."""
        import sqlite3

        self._path, self._conversation = path, uuid.uuid4().hex
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            self._run(f"CREATE TABLE IF NOT EXISTS turns ({', '.join(f'{column} TEXT' for column in _COLUMNS)})")
        except sqlite3.Error as error:
            raise UsageError(f"{path}: no log can be kept there ({error})") from None

    def piece(self, text: str) -> None:
        """The turn has it."""

    def turn(self, told: dict[str, Any]) -> None:
        import sqlite3

        row = {**told, "time": _now(), "conversation": self._conversation, "turn": json.dumps(told)}
        row["images"] = json.dumps(told["images"])
        values = [row[column] for column in _COLUMNS]
        # Half of a character, as in the name of a file, has no place in a database.
        encodable = [each.encode(errors="replace").decode() for each in values]
        try:
            self._run(f"INSERT INTO turns VALUES ({', '.join('?' * len(_COLUMNS))})", *encodable)
        except sqlite3.Error as error:
            raise UsageError(f"{self._path}: the log could not be written ({error})") from None

    def _run(self, statement: str, *values: str) -> None:
        import sqlite3

        with closing(sqlite3.connect(self._path, timeout=10)) as database, database:
            database.execute(statement, values)


def open_log(path: Path) -> Sink:
    """Of the kind that the file's name says. Raises UsageError, or OSError where it cannot be written."""
    if path.suffix.lower() in _DATABASES:
        return DatabaseLog(path)
    if path.suffix.lower() == ".jsonl":
        return LineLog(path)
    raise UsageError(f"{path}: a log ends with .jsonl, or with {' or '.join(_DATABASES)} for SQLite")


def _line_end(file: int) -> str:
    """What is missing at the end of a file whose last line is not whole, as where the disk was full."""
    length = os.lseek(file, 0, os.SEEK_END) if stat.S_ISREG(os.fstat(file).st_mode) else 0
    return "\n" if length and os.pread(file, 1, length - 1) != b"\n" else ""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
