"""What a data set holds, sample by sample, before any of it is shown. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from skipvision.config import ModelConfig
from skipvision.training.conversation import Broken, BrokenSampleError, Source
from skipvision.training.samples import Measure, measure_sample
from skipvision.training.speaker import Speaker

Ints = npt.NDArray[np.int64]
Scanned = Callable[[int, int], None]
"""Takes the samples that are done, and all."""

_VERSION = 1
"""Of what is counted, and of the file."""
_BETWEEN_REPORTS = 16
"""Samples."""
_COUNTS = tuple(each.name for each in fields(Measure))


@dataclass(frozen=True)
class Index:
    """Samples of all sources, one source behind the other. All arrays are [N], and 0 for a broken sample."""

    sizes: tuple[int, ...]
    """Samples of each source; N is their sum."""
    rows: Ints
    """Visual ones included, skipped ones too."""
    kept: Ints
    """Rows that pass the FFN."""
    visual: Ints
    visual_kept: Ints
    visual_plain: Ints
    """Visual rows of the plain model."""
    answers: Ints
    """Rows that have something to say."""
    pictures: Ints
    broken: dict[int, Broken] = field(default_factory=dict)
    """By number of the sample."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def good(self) -> Ints:
        """Numbers of the samples that can be shown."""
        return np.flatnonzero(self.rows)

    @cached_property
    def starts(self) -> Ints:
        """[sources + 1] number of the first sample of each source, and N."""
        return np.cumsum([0, *self.sizes])

    def place(self, number: int) -> tuple[int, int]:
        """Source, and place in it, of a sample."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return source, number - int(self.starts[source])

    def save(self, path: Path, key: str) -> None:
        """Writes one file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        broken = json.dumps({number: asdict(each) for number, each in self.broken.items()}).encode()
        tensors: dict[str, npt.NDArray[np.int64] | npt.NDArray[np.uint8]] = {
            "sizes": np.array(self.sizes, np.int64),
            "broken": np.frombuffer(broken, np.uint8),
            **{name: np.ascontiguousarray(getattr(self, name)) for name in _COUNTS},
        }
        fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, fresh, {"key": key})
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path, key: str) -> Index | None:
        """None where there is none of this key, or a damaged one."""
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("key") != key:
                    return None
                arrays = {name: file.get_tensor(name) for name in ("sizes", "broken", *_COUNTS)}
            broken = json.loads(arrays.pop("broken").tobytes())
            sizes = tuple(arrays.pop("sizes").tolist())
            return Index(sizes, **arrays, broken={int(number): Broken(**each) for number, each in broken.items()})
        except (OSError, SafetensorError, ValueError, TypeError):
            return None


def scan(
    sources: Sequence[Source],
    speaker: Speaker,
    config: ModelConfig,
    max_length: int,
    *,
    decode: bool,
    report: Scanned = lambda _done, _total: None,
) -> Index:
    """Looks at each sample of each source; `decode` reads pictures to their ends, and not their headers alone."""
    sizes = tuple(map(len, sources))
    total, number = sum(sizes), 0
    counts = {name: np.zeros(total, np.int64) for name in _COUNTS}
    broken: dict[int, Broken] = {}
    for source in sources:
        for place in range(len(source)):
            try:
                measure = measure_sample(source, place, speaker, config, max_length, decode=decode)
            except BrokenSampleError as error:
                broken[number] = Broken(source.name_of(place), str(error), error.kind)
            else:
                for name, values in counts.items():
                    values[number] = getattr(measure, name)
            number += 1
            if number % _BETWEEN_REPORTS == 0 or number == total:
                report(number, total)
    return Index(sizes, **counts, broken=broken)


def scan_once(
    path: Path,
    sources: Sequence[Source],
    speaker: Speaker,
    config: ModelConfig,
    max_length: int,
    *,
    report: Scanned = lambda _done, _total: None,
) -> Index:
    """The index in the file `path`, where it is of these sources, this model and this length; or else a scan, which is
    then written there. Pictures that come or go later do not count, so that a run goes on with the samples that it had.
    """
    key = index_key(sources, speaker, config, max_length)
    index = Index.load(path, key)
    if index is None:
        index = scan(sources, speaker, config, max_length, decode=False, report=report)
        index.save(path, key)
    return index


def index_key(sources: Sequence[Source], speaker: Speaker, config: ModelConfig, max_length: int) -> str:
    """Tells what an index was made of from anything else."""
    said = {
        "version": _VERSION,
        "sources": [[source.fingerprint, len(source)] for source in sources],
        "speaker": dict(sorted(speaker.files().items())),
        "model": config.to_json(),
        "max_length": max_length,
    }
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
