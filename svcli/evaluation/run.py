"""Asks the items of a task, one after another, and writes down what came of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from PIL import Image

from skipvision.config import Transparency
from skipvision.pictures import ImageError, open_image
from svcli.evaluation.asker import Asker
from svcli.evaluation.results import Line, Results
from svcli.evaluation.task import Item, Task, TaskError
from svcli_engines.base import EngineError, MachineError
from svcli_engines.processor import PromptError

_DIGEST_BYTES = 8


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of all items. Which part an item is in depends on its id alone."""

    number: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, item: Item) -> bool:
        return int.from_bytes(_digest(item.id.encode()), "big") % self.count == self.number


@dataclass(frozen=True)
class Work:
    """The items to ask: the first `limit` of a split, and of these the ones of a shard."""

    task: Task
    folder: Path
    split: str
    limit: int | None = None
    shard: Shard = Shard()

    def items(self) -> Iterator[tuple[Item, str]]:
        """Each with the key of its pictures. Raises TaskError."""
        return ((item, key) for item, key in self._all() if self.shard.has(item))

    def count(self) -> tuple[int, int, str]:
        """How many items the shard has, how many there are in all, and a digest of all of them.

        Raises TaskError for files that are not there or not right, for none at all, and for ids that are not unique.
        """
        digest, ids, num_mine = hashlib.blake2b(digest_size=_DIGEST_BYTES), set[str](), 0
        for item, key in self._all():
            if item.id in ids:
                raise TaskError(f"{self.folder}: two items of {self.task.name} have the id {item.id}")
            ids.add(item.id)
            num_mine += self.shard.has(item)
            digest.update(json.dumps([item.id, item.question, item.truth, item.group, key]).encode())
        if not ids:
            raise TaskError(f"{self.folder}: holds no items of {self.task.name}, split {self.split}")
        return num_mine, len(ids), digest.hexdigest()

    def _all(self) -> Iterator[tuple[Item, str]]:
        pictures, key = tuple[Path | bytes, ...](), ""
        for item in islice(self.task.items(self.folder, self.split), self.limit):
            if not item.pictures:
                yield item, item.id  # it shares nothing with another
                continue
            if not key or item.pictures is not pictures:
                pictures = item.pictures
                key = _digest(b"".join(self._identity(each) for each in pictures)).hex()
            yield item, key

    def _identity(self, picture: Path | bytes) -> bytes:
        """What is in it; of a file, its name and size: to hash it would take as long as to look at it."""
        if isinstance(picture, bytes):
            return _digest(picture)
        name = picture.relative_to(self.folder) if picture.is_relative_to(self.folder) else picture
        return f"{name.as_posix()} {picture.stat().st_size if picture.is_file() else 'missing'}\n".encode()


def answer(work: Work, asker: Asker, results: Results, transparency: Transparency) -> Iterator[Line]:
    """Yields a line for each item that `results` does not have yet, when it has been written.

    What cannot be asked counts as wrong, and has its error; another call asks it again. Raises TaskError, and what no
    item is to blame for.
    """
    done = {line.item.id for line in results.lines}
    shown, images = "", list[Image.Image]()
    for item, key in work.items():
        if item.id in done:
            continue
        bare = replace(item, pictures=())
        looked = key != shown
        try:
            if looked:
                shown, images = "", []
                images = [open_image(each, transparency).image for each in item.pictures if asker.looks]
                shown = key
            said = asker.answer(item.question, images, work.task.max_new_tokens)
        except MachineError:
            raise
        except (ImageError, EngineError, PromptError) as error:
            line = Line(bare, key, None, "", 0.0, error=str(error))
        else:
            found = work.task.read(item, said.text)
            score = work.task.score(item, found)
            line = Line(bare, key, said, found, score, looked=looked and bool(item.pictures))
        results.append(line)
        yield line


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
