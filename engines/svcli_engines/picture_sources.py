"""Where pictures come from: what a user types, or a client sends, to files, URLs and bytes. No torch."""

from __future__ import annotations

import base64
import binascii
import glob
import os
import re
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from skipvision.config import Transparency
from skipvision.pictures import MAX_FILE_BYTES, ImageError, LoadedImage, decode_picture, open_image
from svcli_engines.picture_urls import FetchLimits, url_name

MOST_MATCHES = 1000
"""Of one pattern."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class PictureSource:
    """One picture that is not read yet."""

    name: str
    """What messages call it."""
    where: Path | str | bytes
    """A file, an http or https URL, or the bytes themselves."""

    def open(self, transparency: Transparency = "white", limits: FetchLimits | None = None) -> LoadedImage:
        """Reads it, and fetches a URL within `limits`. Raises ImageError."""
        if isinstance(self.where, Path):
            return open_image(self.where, transparency)
        if isinstance(self.where, bytes):
            return decode_picture(self.name, self.where, transparency)
        # HTTP and TLS are for those who name a URL.
        from svcli_engines.picture_fetching import fetch_picture

        return decode_picture(self.name, fetch_picture(self.where, limits), transparency)


def find_pictures(text: str, stdin: BinaryIO | None = None) -> list[PictureSource]:
    """What a user calls a picture: a path, also with ~, a pattern such as *.png, a URL of http, https, file or data, or
    `-` for `stdin`, which is the process's own where none is given. A pattern's pictures are sorted.

    Raises ImageError for an empty text, a pattern without a match, another scheme, or an empty standard input.
    """
    if not text:
        raise ImageError("the name of a picture is empty")
    if text == "-":
        return [_from_stdin(stdin)]
    if text[:5].lower() == "data:" or (_SCHEME.match(text) and not text.lower().startswith("file:")):
        return [sent_picture(text)]
    path = file_path(text)
    # A file may be called such as "a[1].png".
    if not glob.has_magic(path) or os.path.lexists(path):
        return [PictureSource(path, Path(path))]
    try:
        found = list(islice(glob.iglob(path, recursive=True), MOST_MATCHES + 1))
    except ValueError:  # a null byte in the name
        found = []
    matches = [each for each in found if not os.path.isdir(each)]
    if not matches:
        raise ImageError(f"{text}: no file matches this pattern")
    if len(found) > MOST_MATCHES:
        raise ImageError(f"{text}: more than {MOST_MATCHES} files match this pattern")
    return [PictureSource(each, Path(each)) for each in sorted(matches)]


def sent_picture(url: str) -> PictureSource:
    """What a client may name, who has no files here: a URL of data, http or https.

    Raises ImageError for anything else, and for data that are not base64 or too large.
    """
    if url[:5].lower() == "data:":
        return PictureSource("the picture in a data: URL", _data(url))
    scheme = _SCHEME.match(url)
    if not scheme or scheme[1].lower() not in ("http", "https"):
        raise ImageError(f"{url_name(url)}: not a URL of http, https or data")
    return PictureSource(url_name(url), url)


def file_path(text: str) -> str:
    """The path that a user means by ~/picture.png or file:///picture.png. Raises ImageError for files elsewhere."""
    if not text.lower().startswith("file:"):
        return os.path.expanduser(text)
    try:
        parts = urlsplit(text)
    except ValueError:
        raise ImageError(f"{text}: not a URL that can be read") from None
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ImageError(f"{text}: not a file on this machine, which is file:///path")
    # What would be a query elsewhere: some write names as they are.
    rest = text.partition(parts.netloc + "/")[2] if parts.netloc else text[len("file:") :].lstrip("/")
    return unquote("/" + rest)


def _from_stdin(stdin: BinaryIO | None) -> PictureSource:
    stdin = stdin or sys.stdin.buffer
    if stdin.isatty():
        raise ImageError("-: standard input is a terminal; a picture comes through a pipe")
    data = stdin.read(MAX_FILE_BYTES + 1)
    if not data:
        raise ImageError("-: nothing came on standard input, which can be read once")
    return PictureSource("standard input", data)


def _data(url: str) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError("a data: URL of a picture is data:image/png;base64, and its bytes")
    if len(text) > MAX_FILE_BYTES * 3 // 2:
        raise ImageError(f"the picture in a data: URL: larger than {MAX_FILE_BYTES // 2**20} MB")
    bare = "".join((unquote(text) if "%" in text else text).split()).rstrip("=")
    try:
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("the picture in a data: URL: not base64") from None
