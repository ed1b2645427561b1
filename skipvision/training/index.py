"""What a data set holds, sample by sample, before any of it is shown. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from skipvision.config import ModelConfig
from skipvision.training.conversation import Broken, BrokenSampleError, Source
from skipvision.training.errors import not_written
from skipvision.training.samples import Measure, measure_sample
from skipvision.training.speaker import Speaker

Ints = npt.NDArray[np.int64]
Scanned = Callable[[int, int], None]
"""Takes the samples that are done, and all."""

_VERSION = 1
"""Of what is counted, and of the file."""
_SPAN = 16
"""Samples that are looked at between reports."""
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
    def starts(self) -> Ints:
        """[sources + 1] number of the first sample of each source, and N."""
        return np.cumsum([0, *self.sizes])

    def save(self, path: Path, key: str) -> None:
        """Writes one file, atomically. Raises StateError."""
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
        except (OSError, SafetensorError) as error:
            raise not_written(path, error) from None
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
    workers: int = 0,
) -> Index:
    """Looks at each sample of each source; `decode` reads pictures to their ends, and not their headers alone.

    `workers` processes do so side by side; 0: this one.
    """
    look = _Look(sources, speaker, config, max_length, decode)
    total = sum(look.sizes)
    spans = [range(start, min(start + _SPAN, total)) for start in range(0, total, _SPAN)]
    if not workers:
        return _gathered(look.sizes, spans, map(look, spans), report)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(look,))
    try:
        return _gathered(look.sizes, spans, pool.map(_looked, spans), report)
    finally:
        pool.shutdown(cancel_futures=True)


def _gathered(
    sizes: tuple[int, ...], spans: Sequence[range], found: Iterable[Sequence[Measure | Broken]], report: Scanned
) -> Index:
    total = sum(sizes)
    counts = {name: np.zeros(total, np.int64) for name in _COUNTS}
    broken: dict[int, Broken] = {}
    for span, outcomes in zip(spans, found, strict=True):
        for number, outcome in zip(span, outcomes, strict=True):
            if isinstance(outcome, Broken):
                broken[number] = outcome
                continue
            for name, values in counts.items():
                values[number] = getattr(outcome, name)
        report(span.stop, total)
    return Index(sizes, **counts, broken=broken)


@dataclass(frozen=True)
class _Look:
    """Measures samples by their numbers."""

    sources: Sequence[Source]
    speaker: Speaker
    config: ModelConfig
    max_length: int
    decode: bool

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.sources))

    def __call__(self, numbers: range) -> list[Measure | Broken]:
        starts = np.cumsum([0, *self.sizes])
        found: list[Measure | Broken] = []
        for number in numbers:
            place = int(np.searchsorted(starts, number, side="right")) - 1
            source, index = self.sources[place], number - int(starts[place])
            try:
                found.append(
                    measure_sample(source, index, self.speaker, self.config, self.max_length, decode=self.decode)
                )
            except BrokenSampleError as error:
                found.append(Broken(source.name_of(index), str(error), error.kind))
        return found


_look: _Look | None = None
"""Of a process that looks at samples for another one."""


def _begin(look: _Look) -> None:
    global _look
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    _look = look


def _looked(numbers: range) -> list[Measure | Broken]:
    assert _look is not None
    return _look(numbers)


def scan_once(
    path: Path,
    sources: Sequence[Source],
    speaker: Speaker,
    config: ModelConfig,
    max_length: int,
    *,
    report: Scanned = lambda _done, _total: None,
    workers: int = 0,
) -> Index:
    """The index in the file `path`, where it is of these sources, this model and this length; or else a scan, which is
    then written there. Pictures that come or go later do not count, so that a run goes on with the samples that it had.
    """
    key = index_key(sources, speaker, config, max_length)
    index = Index.load(path, key)
    if index is None:
        index = scan(sources, speaker, config, max_length, decode=False, report=report, workers=workers)
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
