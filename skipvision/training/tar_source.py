"""Conversations in tar shards, as WebDataset lays them out. Imports no torch.

Members with the same name up to the first dot of their last part are one sample: `0042.json` (a record) or `0042.txt`
(a caption), and `0042.jpg`, or `0042.0.jpg`, `0042.1.jpg` and so on. Libraries for this layout stream it, and shuffle
what is in a buffer. Here the order is decided elsewhere and must be the same when a run goes on: a shard's members are
looked up once, and each is then read from where it lies, out of the shard as it is. Nothing is unpacked.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from skipvision.training.conversation import BrokenSampleError, Conversation, DataSetError, Picture
from skipvision.training.formats import LAYOUTS, captioned, listed_pictures, read_record
from skipvision.training.json_source import MAX_RECORD_BYTES, check_unchanged, file_fingerprint, parse_record
from skipvision.training.picture_files import PicturePart

_PICTURE = re.compile(r"(?:\d+\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|ppm)")
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How files begin that gzip, bzip2, xz or zstd wrote."""


@dataclass(frozen=True)
class _Shard:
    """Where the members of one shard lie, those of a sample side by side."""

    path: str
    fingerprint: str
    keys: list[str]
    bounds: npt.NDArray[np.int64]
    """[K + 1] the first member of each key, and the end."""
    members: npt.NDArray[np.int64]
    """[M, 3] start, size, and place in `suffixes`."""
    suffixes: list[str]


class TarSource:
    """Shards in the order in which they are given."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        """Raises DataSetError for a shard that is missing, compressed, cut off, or has members that are no files."""
        self.name = name
        self._shards = [_look_up(path) for path in paths]
        self.fingerprint = "\n".join(shard.fingerprint for shard in self._shards)
        self._ends = np.cumsum([len(shard.keys) for shard in self._shards])
        if not len(self):
            raise DataSetError(f"{name}: holds no samples")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name_of(self, index: int) -> str:
        shard, place = self._find(index)
        return f"{shard.path} {shard.keys[place]}"

    def __getitem__(self, index: int) -> Conversation:
        shard, place = self._find(index)
        check_unchanged(shard.fingerprint, Path(shard.path))
        start, end = shard.bounds[place : place + 2]
        found: dict[str, PicturePart] = {}
        for offset, size, suffix in shard.members[start:end].tolist():
            ending = shard.suffixes[suffix]
            if ending in found:
                raise BrokenSampleError(f"has two members .{ending}", "unreadable")
            found[ending] = PicturePart(f"{shard.keys[place]}.{ending}", shard.path, offset, size)
        # Picture 10 stands behind picture 9.
        endings = sorted(filter(_PICTURE.fullmatch, found), key=lambda ending: (len(ending.split(".")[0]), ending))
        return _conversation(self.name_of(index), found, tuple(found[ending] for ending in endings))

    def _find(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard, index - int(self._ends[number]) + len(shard.keys)


def _conversation(name: str, members: dict[str, PicturePart], pictures: tuple[Picture, ...]) -> Conversation:
    record: object = None
    if "json" in members:
        record = parse_record(_read(members["json"]))
    # What gathers pictures from the web writes a caption, and what is known of the picture as JSON.
    if "txt" in members and not (isinstance(record, dict) and any(key in record for key in LAYOUTS)):
        try:
            return captioned(name, _read(members["txt"]).decode(), pictures)
        except UnicodeDecodeError:
            raise BrokenSampleError("its .txt is no UTF-8", "unreadable") from None
    if "json" not in members:
        raise BrokenSampleError("has neither .json nor .txt", "unreadable")
    if isinstance(record, dict):  # pictures are those in the shard, whatever the record calls them
        named = listed_pictures(record)
        if named and len(named) != len(pictures):
            raise BrokenSampleError(
                f"names {len(named)} pictures, and its shard has {len(pictures)}", "missing picture"
            )
        record = record | {"images": list(pictures), "image": None}
    return read_record(name, record, _itself)


def _itself(value: object) -> Picture:
    if not isinstance(value, PicturePart):
        raise BrokenSampleError(
            "a part of its turns names a picture, and those of a shard have no names", "marks differ"
        )
    return value


def _read(member: PicturePart) -> bytes:
    if member.size > MAX_RECORD_BYTES:
        raise BrokenSampleError(f"{member.name}: larger than {MAX_RECORD_BYTES >> 20} MB", "unreadable")
    with member.open() as file:
        return file.read()


def _look_up(path: Path) -> _Shard:
    groups: dict[str, list[tuple[int, int, int]]] = {}
    suffixes: dict[str, int] = {}
    fingerprint = file_fingerprint(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if head.startswith(_PACKED):
            raise DataSetError(f"{path}: is compressed, and only plain tar can be read at any place; unpack it to .tar")
        with tarfile.open(path, "r:") as archive:
            for key, suffix, member in _members(path, archive):
                number = suffixes.setdefault(suffix, len(suffixes))
                groups.setdefault(key, []).append((member.offset_data, member.size, number))
    except tarfile.TarError as error:
        raise DataSetError(f"{path}: no whole tar ({error}); fetch it again") from None
    except (OSError, ValueError) as error:
        if isinstance(error, DataSetError):
            raise
        raise DataSetError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return _Shard(
        str(path),
        fingerprint,
        list(groups),
        np.cumsum([0, *map(len, groups.values())]),
        np.array([member for group in groups.values() for member in group], np.int64).reshape(-1, 3),
        list(suffixes),
    )


def _members(path: Path, archive: tarfile.TarFile) -> Iterable[tuple[str, str, tarfile.TarInfo]]:
    """Key, suffix and place of each file but hidden ones."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # would otherwise grow with the shard
        folder, slash, name = member.name.rpartition("/")
        key, _, suffix = name.partition(".")
        if member.isdir() or (key == "" and suffix):
            continue
        if not member.isreg() or member.issparse():
            raise DataSetError(f"{path}: {member.name} is no plain file; pack the files themselves")
        if not suffix:
            raise DataSetError(
                f"{path}: {member.name} has no suffix, so nothing tells what it is; pack it without that"
            )
        yield f"{folder}{slash}{key}", suffix.lower(), member
