"""Sets of conversations, wherever they are: any of them can be asked for any sample. Imports no torch."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from skipvision.hub import HubId
from skipvision.training.conversation import DataSetError, Source
from skipvision.training.json_source import JsonSource
from skipvision.training.tar_source import TarSource
from skipvision.training.tune_recipe import Format, SourceRecipe

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_FILES = 100_000
_FORMATS: dict[str, Format] = {
    ".json": "json",
    ".jsonl": "json",
    ".tar": "tar",
    ".parquet": "datasets",
    ".arrow": "datasets",
}


def open_sources(recipes: Sequence[SourceRecipe]) -> list[Source]:
    """One for each. Raises DataSetError for what is missing, empty or of no known format."""
    return [_open(recipe) for recipe in recipes]


def _open(recipe: SourceRecipe) -> Source:
    # Here, because tar and JSON need no library.
    from skipvision.training import dataset_source

    images = Path(recipe.images) if recipe.images else None
    if images is not None and not images.is_dir():
        raise DataSetError(f"{images}: no such folder; it is named as images of {recipe.path}")
    path = Path(recipe.path)
    kind = recipe.format if recipe.format != "auto" else _format(recipe.path)
    if kind == "datasets" and path.is_dir():
        return dataset_source.open_folder(path, recipe.split, images)
    if kind == "datasets" and path.suffix not in _FORMATS:
        return dataset_source.open_hub(recipe.path, recipe.split, images)
    paths = _expanded(recipe.path)
    if kind == "datasets":
        return dataset_source.open_files(recipe.path, paths, images)
    if kind == "tar":
        return TarSource(recipe.path, paths)
    if len(paths) > 1:
        raise DataSetError(f"{recipe.path}: {len(paths)} files; name each as a source of its own")
    return JsonSource(paths[0], images)


def _format(name: str) -> Format:
    """By the name alone."""
    suffix = Path(name).suffix.lower()
    if suffix in _FORMATS:
        return _FORMATS[suffix]
    if Path(name).is_dir() or (HubId.of(name) is not None and not Path(name).exists()):
        return "datasets"
    if Path(name).exists():
        raise DataSetError(f"{name}: its name tells no format; name one of json, datasets and tar as its format")
    raise DataSetError(f"{name}: no such file, folder or data set")


def _expanded(pattern: str) -> list[Path]:
    """The files of a name with {000..031}, {a,b}, * or ?. Raises DataSetError for those that are not there."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    paths: list[Path] = []
    for name in _unbraced(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not found or not Path(found[0]).exists():
            raise DataSetError(f"{name}: no such file")
        paths += map(Path, found)
    return paths


def _unbraced(pattern: str) -> list[str]:
    pieces = _BRACES.split(pattern)
    choices = [_choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    count = 1
    for each in choices:
        count *= len(each)
    if count > _MOST_FILES:
        raise DataSetError(f"{pattern}: means {count:,} files, and {_MOST_FILES:,} are the most")
    return ["".join(each) for each in itertools.product(*choices)]


def _choices(inside: str) -> Sequence[str]:
    found = _RANGE.fullmatch(inside)
    if found is None:
        return inside.split(",")
    first, last = int(found[1]), int(found[2])
    if last - first >= _MOST_FILES:
        raise DataSetError(f"{{{inside}}}: means more than {_MOST_FILES:,} files")
    return [f"{number:0{len(found[1])}}" for number in range(first, last + 1)]
