"""One record of a task's files, and what can be asked of it. What is wrong with it is told with its place."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from skipvision.pictures import MAX_FILE_BYTES
from svcli.evaluation.task import TaskError


@dataclass(frozen=True)
class Record:
    """A line, a row or an entry."""

    fields: Mapping[str, Any]
    place: str
    """File, and line or row in it."""

    def broken(self, what: str) -> TaskError:
        """The error to raise for it."""
        return TaskError(f"{self.place}: {what}")

    def text(self, name: str) -> str:
        """A text that is not empty. Raises TaskError."""
        found = self.optional(name)
        if not found:
            raise self.broken(f"no {name}")
        return found

    def optional(self, name: str) -> str:
        """A text, or "" where there is none: tables write that as nothing or as nan. Raises TaskError."""
        found = self.fields.get(name)
        if found is None or found == "nan" or (isinstance(found, float) and math.isnan(found)):
            return ""
        if isinstance(found, bool) or not isinstance(found, (str, int, float)):
            raise self.broken(f"{name} is no text")
        return str(found)

    def number(self, name: str) -> int:
        """A whole number. Raises TaskError."""
        try:
            return int(self.text(name))
        except ValueError:
            raise self.broken(f"{name} is no whole number") from None

    def texts(self, name: str) -> list[str]:
        """Several texts. Raises TaskError."""
        found = self.fields.get(name)
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise self.broken(f"{name} is no list of texts")
        return list(found)

    def within(self, name: str) -> Record:
        """What a field holds, as a record. Raises TaskError."""
        found = self.fields.get(name)
        if not isinstance(found, dict):
            raise self.broken(f"no {name}")
        return Record(found, self.place)

    def picture(self, name: str) -> bytes:
        """A picture that the record holds: bytes, a table's {bytes, path}, or base64. Raises TaskError."""
        found = self.fields.get(name)
        if isinstance(found, dict):
            found = found.get("bytes")
        if isinstance(found, str):
            try:
                found = base64.b64decode(found, validate=True)
            except (binascii.Error, ValueError):
                raise self.broken(f"{name} is no base64") from None
        if not isinstance(found, bytes) or not found:
            raise self.broken(f"{name} is no picture")
        if len(found) > MAX_FILE_BYTES:
            raise self.broken(f"{name} is larger than {MAX_FILE_BYTES // 2**20} MB")
        return found

    def file(self, folder: Path, name: str) -> Path:
        """`folder / name`, which is there. Raises TaskError, too for a name that leads out of the folder.

        By its letters: people link folders and files of pictures to other disks.
        """
        parts = PurePosixPath(name).parts
        elsewhere = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts
        if elsewhere or "\\" in name or not name.isprintable():
            raise self.broken(f"the picture {name!r} is not in {folder}")
        path = folder / name
        if not path.is_file():
            raise self.broken(f"there is no picture {path}")
        return path
