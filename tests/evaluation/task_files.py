"""What tests of tasks make their files of."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

from svcli.evaluation.task import Item, Judged, Task

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(colour: str = "red") -> bytes:
    """A picture of a few pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(colour: str = "red") -> str:
    return base64.b64encode(png(colour)).decode()


def held(colour: str = "red") -> dict[str, Any]:
    """A picture as the `datasets` library stores it."""
    return {"bytes": png(colour), "path": f"{colour}.png"}


def put(path: Path, data: bytes | str | None = None) -> Path:
    """A file, by default with a picture, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if data is None else data.encode() if isinstance(data, str) else data)
    return path


def put_json(path: Path, value: Any) -> Path:
    return put(path, json.dumps(value))


def put_lines(path: Path, values: Iterable[Any]) -> Path:
    return put(path, "".join(f"{json.dumps(value)}\n" for value in values))


def put_parquet(path: Path, rows: Sequence[Mapping[str, Any]], row_group: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=row_group)
    return path


def put_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table of tabs, quoted as pandas does."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return put(path, buffer.getvalue())


def asked(task: Task, folder: Path, split: str | None = None) -> dict[str, Item]:
    """All items by their ids, which are unique, and JSON goes through unchanged."""
    items = list(task.items(folder, split or task.splits[0]))
    found = {item.id: item for item in items}
    assert len(found) == len(items)
    for item in items:
        assert json.loads(json.dumps(item.truth)) == item.truth
    return found


def judged(task: Task, items: Mapping[str, Item], said: Mapping[str, str]) -> list[Judged]:
    """What came of these answers."""
    found = []
    for key, text in said.items():
        answer = task.read(items[key], text)
        found.append(Judged(items[key], text, answer, task.score(items[key], answer)))
    return found


def twice(judged: Sequence[Judged]) -> list[Judged]:
    """The same, and all of it again as other items, which is how intervals draw a picture twice."""
    again = (replace(each, item=replace(each.item, id=f"1~{each.item.id}")) for each in judged)
    return [*judged, *again]
