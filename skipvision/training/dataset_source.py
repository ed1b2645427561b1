"""Conversations that the `datasets` library reads: folders of save_to_disk, Parquet, Arrow, and ids on the hub.

It runs no code of a data set: loading scripts are gone from it. Pictures stay encoded until they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvision.training.conversation import BrokenSampleError, Conversation, DataSetError
from skipvision.training.formats import COLUMNS, LAYOUTS, read_record
from skipvision.training.picture_files import PictureFolder

if TYPE_CHECKING:
    from datasets import Dataset


class DatasetSource:
    """One split."""

    def __init__(self, name: str, dataset: Dataset, pictures: PictureFolder) -> None:
        """Raises DataSetError where no column is known."""
        columns = [column for column in dataset.column_names if column in COLUMNS]
        if not set(columns) & set(LAYOUTS):
            raise DataSetError(
                f"{name}: has none of the columns {', '.join(LAYOUTS)}, but {', '.join(dataset.column_names[:12])}"
            )
        if not len(dataset):
            raise DataSetError(f"{name}: holds no samples")
        self.name = name
        self.fingerprint = f"{name} {dataset._fingerprint} {len(dataset)}"
        self._rows = _undecoded(dataset.select_columns(columns).with_format(None))
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._rows)

    def name_of(self, index: int) -> str:
        return f"{self.name} row {index}"

    def __getitem__(self, index: int) -> Conversation:
        try:
            row = self._rows[int(index)]
        except (ValueError, OSError) as error:  # as Arrow calls what is damaged
            raise BrokenSampleError(f"cannot be read ({str(error)[:200]})", "unreadable") from None
        return read_record(self.name_of(index), row, self._pictures)


def open_files(name: str, paths: Sequence[Path], images: Path | None) -> DatasetSource:
    """Of Parquet or Arrow files, which are one split. Raises DataSetError."""
    from datasets import Dataset, concatenate_datasets

    pictures = PictureFolder(str(paths[0].parent if images is None else images))
    with _reported(name):
        if paths[0].suffix == ".arrow":  # mapped from where they are
            dataset = concatenate_datasets([Dataset.from_file(str(path)) for path in paths])
        else:
            dataset = Dataset.from_parquet([str(path) for path in paths])
        return DatasetSource(name, dataset, pictures)


def open_folder(folder: Path, split: str, images: Path | None) -> DatasetSource:
    """Of what save_to_disk wrote, or of Parquet or Arrow files whose names begin with the split's.

    Raises DataSetError.
    """
    from datasets import load_from_disk

    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if not saved:
        return open_files(str(folder), _files(folder, split), images or folder)
    with _reported(str(folder)):
        dataset = load_from_disk(str(folder))
        if isinstance(dataset, dict):
            if split not in dataset:
                raise DataSetError(f"{folder}: has no split {split}, but {', '.join(dataset)}; name one by split")
            dataset = dataset[split]
        return DatasetSource(str(folder), dataset, PictureFolder(str(images or folder)))


def open_hub(name: str, split: str, images: Path | None) -> DatasetSource:
    """Of a data set on the hub, which `datasets` keeps in its cache. Raises DataSetError."""
    from datasets import load_dataset

    repo, _, revision = name.partition("@")
    with _reported(name):
        dataset = load_dataset(repo, split=split, revision=revision or None)
        return DatasetSource(name, dataset, PictureFolder(str(images or ".")))


def _files(folder: Path, split: str) -> list[Path]:
    for suffix in (".parquet", ".arrow"):
        found = sorted(folder.rglob(f"*{suffix}"))
        chosen = [path for path in found if path.name.startswith(split)]
        if chosen or len(found) == 1:
            return chosen or found
        if found:
            raise DataSetError(f"{folder}: has no {split}*{suffix}, but {found[0].name}; name the files by a pattern")
    raise DataSetError(f"{folder}: holds no data set; name its files, or shards by a pattern such as {folder}/*.tar")


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Without the library's bars, and with one sentence for all that it raises."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    except DataSetError:
        raise
    except Exception as error:  # a broken file raises whatever Arrow, fsspec or the hub's client do
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataSetError(f"{name}: cannot be read as a data set ({lines[0][:200]})") from None
    finally:
        if were_shown:
            enable_progress_bars()


def _undecoded(dataset: Dataset) -> Dataset:
    """With pictures as {bytes, path}."""
    from datasets import Image, List

    for column in ("image", "images"):
        feature: Any = dataset.features.get(column)
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    return dataset
