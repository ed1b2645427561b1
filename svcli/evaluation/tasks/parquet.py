"""Parquet files, which the Hugging Face copies of tasks are: a few rows at a time, so that pictures do not pile up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from svcli.evaluation.task import TaskError
from svcli.evaluation.tasks.records import Record

_ROWS = 8
"""That are in memory at a time; some tasks have seven pictures in each."""
_MAX_GROUP = 8 * 2**30
"""Bytes that a file may say one of its row groups takes. Those of real sets take a twentieth."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})[.-]")


def parquet_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Those of the first pattern that fits any, in order; none where none does.

    Raises TaskError where parts of a set are missing, which would give another score.
    """
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            _check_shards(found)
            return found
    return []


def rows(paths: Sequence[Path], columns: Sequence[str], others: Sequence[str] = ()) -> Iterator[Record]:
    """Of all files, one after another, with `columns`, and with those of `others` that are there. Raises TaskError."""
    for path in paths:
        yield from _rows(path, columns, others)


def _rows(path: Path, columns: Sequence[str], others: Sequence[str]) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            names = file.schema_arrow.names
            missing = [name for name in columns if name not in names]
            if missing:
                raise TaskError(f"{path}: no column {missing[0]}")
            for number in range(file.num_row_groups):
                if file.metadata.row_group(number).total_byte_size > _MAX_GROUP:
                    raise TaskError(f"{path}: a row group of more than {_MAX_GROUP // 2**30} GB")
            wanted = [*columns, *(name for name in others if name in names)]
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=wanted):
                fields: list[dict[str, Any]] = batch.to_pylist()
                for each in fields:
                    number += 1
                    yield Record(each, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: no Parquet file that can be read ({_line(error)})") from None


def _check_shards(paths: Sequence[Path]) -> None:
    found = [(path, match) for path in paths if (match := _SHARD.search(path.name))]
    for folder in {path.parent for path, _ in found}:
        numbers = {(int(match[1]), int(match[2])) for path, match in found if path.parent == folder}
        count = max(count for _, count in numbers)
        absent = sorted(set(range(count)) - {number for number, _ in numbers})
        if absent:
            raise TaskError(f"{folder}: of {count} Parquet files, number {absent[0]:05d} is missing")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
