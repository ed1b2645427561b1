"""Pictures as data sets have them: files in a folder, or bytes, or a part of a file. Imports no torch."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from skipvision.training.conversation import BrokenSampleError, Picture

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


@dataclass(frozen=True)
class PictureFile:
    """A file."""

    name: str
    path: str

    def open(self) -> BinaryIO:
        """Raises BrokenSampleError where there is none."""
        try:
            regular = stat.S_ISREG(os.stat(self.path).st_mode)  # a pipe would be waited for
            if regular:
                return Path(self.path).open("rb")
        except FileNotFoundError:
            raise BrokenSampleError(f"{self.name}: no such file", "missing picture") from None
        except (OSError, ValueError) as error:  # ValueError: halves of characters in the name
            reason = getattr(error, "strerror", None) or "no name for a file"
            raise BrokenSampleError(f"{self.name}: cannot be read ({reason})", "missing picture") from None
        raise BrokenSampleError(f"{self.name}: no file", "missing picture")


@dataclass(frozen=True)
class PictureBytes:
    """A picture that was handed over with its record."""

    name: str
    data: bytes = field(repr=False)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)


@dataclass(frozen=True)
class PicturePart:
    """A part of a file, such as a member of a tar."""

    name: str
    path: str
    start: int
    size: int

    def open(self) -> BinaryIO:
        """Raises BrokenSampleError where the file is gone."""
        try:
            return io.BufferedReader(_Part(self.path, self.start, self.size))
        except OSError as error:
            raise BrokenSampleError(f"{self.path}: cannot be read ({error.strerror})", "missing picture") from None


class _Part(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file of their own."""

    def __init__(self, path: str, start: int, size: int) -> None:
        self._file = io.FileIO(path)
        self._start, self._size, self._place = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._place))
        self._file.seek(self._start + self._place)
        count = self._file.readinto(memoryview(buffer)[:count])
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class PictureFolder:
    """Where a data set's pictures are: what it says of one becomes a picture, and no name leads out of the folder."""

    folder: str

    def __call__(self, value: object) -> Picture:
        """Of a name; of bytes; or of {bytes, path}, as `datasets` has them. Raises BrokenSampleError."""
        if isinstance(value, Mapping):
            data, path = value.get("bytes"), value.get("path")
            if not isinstance(data, bytes):
                value = path
            else:
                return PictureBytes(os.path.basename(path) if isinstance(path, str) and path else "its picture", data)
        if isinstance(value, bytes):
            return PictureBytes("its picture", value)
        if not isinstance(value, str) or not value or "\0" in value:
            raise BrokenSampleError("names a picture by no file name", "missing picture")
        if _URL.match(value):
            raise BrokenSampleError(f"{value[:80]}: a URL; download pictures beforehand", "missing picture")
        folder = os.path.abspath(self.folder)
        path = os.path.normpath(os.path.join(folder, value))
        if os.path.commonpath([folder, path]) != folder or path == folder:
            raise BrokenSampleError(f"{value}: leads out of {self.folder}", "missing picture")
        return PictureFile(value, path)
