"""A file of judged answers: JSON lines, the first of which says whose they are. A run that was killed goes on in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import monotonic
from typing import IO, Any

from svcli.evaluation.asker import Said
from svcli.evaluation.task import Item, Judged
from svcli.files import keep_others_out, naming

FORMAT = 1
_SECONDS_BETWEEN_SYNCS = 5.0


class ResultsError(ValueError):
    """A file of results that cannot be used; one sentence that names it."""


@dataclass(frozen=True)
class Header:
    """Whose answers a file holds. Files that differ in what is compared hold answers that cannot be mixed."""

    task: str
    split: str
    asker: str
    limit: int | None
    shard: str
    """Such as 0/4; 0/1 is all of them."""
    num_items: int
    """In this shard."""
    num_all: int
    files: str
    """Digest of all items, and of their pictures or the pictures' names and sizes."""
    bundle: str
    """Digest of its manifest, which has those of its files."""
    engine: str
    versions: dict[str, str]
    told: dict[str, str] = field(default_factory=dict, compare=False)
    """What nothing depends on: the bundle's name, the folder of the data."""

    @property
    def run(self) -> Header:
        """What all files of one run have in common: whoever answers, and whichever shard."""
        return replace(self, asker="", shard="", num_items=0)


@dataclass(frozen=True)
class Line:
    """An item and what came of it."""

    item: Item
    """Without its pictures."""
    pictures: str
    """The same for items that show the same pictures; they are no independent draws."""
    said: Said | None
    """None where it could not be asked."""
    answer: str
    score: float
    error: str = ""
    looked: bool = False
    """It has pictures, and they were not those of the item before: the time to the first token has the encoder's."""

    @property
    def judged(self) -> Judged:
        return Judged(self.item, "" if self.said is None else self.said.text, self.answer, self.score)

    def told(self) -> dict[str, Any]:
        item = {"id": self.item.id, "group": self.item.group, "question": self.item.question, "truth": self.item.truth}
        common = item | {"pictures": self.pictures, "answer": self.answer, "score": self.score}
        if self.said is None:
            return common | {"error": self.error}
        said = asdict(self.said) | {"retained": [ranges(each) for each in self.said.retained]}
        return common | {"looked": self.looked} | said

    @staticmethod
    def of(told: dict[str, Any]) -> Line:
        """Raises KeyError, TypeError or ValueError for what `told` has not written."""
        item = Item(told["id"], told["question"], (), told["truth"], told["group"])
        answer = str(told["answer"]), float(told["score"])
        if "error" in told:
            return Line(item, told["pictures"], None, *answer, error=str(told["error"]))
        values = {each.name: told[each.name] for each in fields(Said)}
        said = Said(**values | {"retained": tuple(numbers(each) for each in values["retained"])})
        return Line(item, told["pictures"], said, *answer, looked=bool(told["looked"]))


class Results:
    """The file of one asker and one shard, open for appending."""

    def __init__(self, path: Path, header: Header, *, overwrite: bool = False) -> None:
        """What stands behind the last whole line is cut off. Items that could not be asked are not among `lines`.

        Raises ResultsError for another run's file or a broken one, UsageError for one that is being written.
        """
        self.path, self.header = path, header
        self._failed = dict[str, Line]()
        """What could not be asked before, by item."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b")
        try:
            keep_others_out(self._file, path, "svcli eval")
            if overwrite:
                os.truncate(path, 0)
            self.lines = self._begin()
        except BaseException:
            with naming(path):
                self._file.close()
            raise
        self._synced = monotonic()

    def _begin(self) -> list[Line]:
        self._file.seek(0)
        whole = [line for line in self._file if line.endswith(b"\n")]
        if not whole:
            os.truncate(self.path, 0)
            self._write({"svcli eval": FORMAT, **asdict(self.header)})
            return []
        found, lines = _parse(self.path, whole)
        if found != self.header:
            raise ResultsError(f"{self.path}: {difference(found, self.header)}; choose another folder, or --overwrite")
        os.truncate(self.path, sum(map(len, whole)))
        self._failed = {line.item.id: line for line in lines if line.said is None}
        return [line for line in lines if line.said is not None]

    def append(self, line: Line) -> None:
        """What was appended is there after the process was killed; of a machine that fails, but for some seconds.

        A line that is there already, of an item that could not be asked, is not written twice.
        """
        if self._failed.get(line.item.id) != line:
            self._write(line.told())
        self.lines.append(line)
        if monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            self._sync()

    def close(self) -> None:
        if not self._file.closed:
            # Closing writes what a full disk had no room for once more.
            with naming(self.path), self._file:
                self._sync()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _write(self, told: dict[str, Any]) -> None:
        with naming(self.path):
            self._file.write(json.dumps(told, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()

    def _sync(self) -> None:
        with naming(self.path):
            os.fsync(self._file.fileno())
        self._synced = monotonic()


def read(path: Path) -> tuple[Header, list[Line]] | None:
    """What a file holds, but for a last line that is cut; None where that is the header. Of each item the last line.

    Raises ResultsError for a file that `Results` has not written.
    """
    with path.open("rb") as file:
        whole = [line for line in file if line.endswith(b"\n")]
    return _parse(path, whole) if whole else None


def ranges(values: Sequence[int]) -> str:
    """Numbers in the order of their size, such as `0-3 7`."""
    found: list[list[int]] = []
    for value in sorted(values):
        if found and value == found[-1][1] + 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    return " ".join(f"{first}-{last}" if first < last else str(first) for first, last in found)


def numbers(text: str) -> tuple[int, ...]:
    """The same back."""
    return tuple(_numbers(text))


def _numbers(text: str) -> Iterator[int]:
    for part in text.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _parse(path: Path, whole: Sequence[bytes]) -> tuple[Header, list[Line]]:
    try:
        told = json.loads(whole[0])
        if told.pop("svcli eval") != FORMAT:
            raise ResultsError(f"{path}: written by another version of svcli; choose another folder, or --overwrite")
        header = Header(**told)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        raise ResultsError(f"{path}: no file of svcli eval; choose another folder, or --overwrite") from None
    lines = (_line(path, number, line) for number, line in enumerate(whole[1:], start=2))
    return header, list({line.item.id: line for line in lines}.values())


def _line(path: Path, number: int, line: bytes) -> Line:
    try:
        return Line.of(json.loads(line))
    except (KeyError, TypeError, ValueError):
        raise ResultsError(f"{path}: line {number} is broken; take it out, or --overwrite") from None


def difference(found: Header, wanted: Header) -> str:
    """The first thing in which the answers of `found` are not those of `wanted`."""
    for each in fields(Header):
        theirs, mine = getattr(found, each.name), getattr(wanted, each.name)
        if not each.compare or mine == theirs:
            continue
        if each.name == "bundle":
            return "holds answers of another bundle"
        if each.name in ("files", "num_items", "num_all"):
            return "holds answers about other files"
        return f"holds answers of another run ({each.name}: {_short(theirs)}, now {_short(mine)})"
    return "holds the answers of this run"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return "none" if value is None else str(value)
