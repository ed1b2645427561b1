"""Reads what a plan asks for, in processes of their own where there are any, in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from skipvision.config import ModelConfig
from skipvision.layout import Ints
from skipvision.training.collate import Batch, collate
from skipvision.training.conversation import Broken, BrokenSampleError, DataSetError, Source
from skipvision.training.plan import MicroPlan
from skipvision.training.samples import Sample, read_sample
from skipvision.training.speaker import Speaker


class ReadError(ValueError):
    """Reading ended; the message says what to do."""


@dataclass(frozen=True)
class Reader(Dataset["Batch | DataSetError"]):
    """Micro-batches by their plan. It can be pickled as its sources and its speaker can."""

    sources: Sequence[Source]
    places: Ints
    """[N, 2]: source of each sample, and its index there."""
    speaker: Speaker
    config: ModelConfig
    max_length: int

    def __getitem__(self, micro: MicroPlan) -> Batch | DataSetError:
        """Broken samples are left out, and named. An error is returned, since another process would dress it up."""
        broken: list[Broken] = []
        try:
            sequences = [[*self._read(sequence, broken)] for sequence in micro]
        except DataSetError as error:
            return error
        return collate(sequences, self.config, broken)

    def _read(self, sequence: Iterable[int], broken: list[Broken]) -> Iterator[Sample]:
        for sample in sequence:
            number, index = self.places[sample].tolist()
            source = self.sources[number]
            try:
                yield read_sample(source, index, self.speaker, self.config, self.max_length)
            except BrokenSampleError as error:
                broken.append(Broken(source.name_of(index), str(error), error.kind))

    def batches(self, micros: Iterable[MicroPlan], num_workers: int) -> Iterator[Batch]:
        """In this order, read ahead by `num_workers` processes; 0 reads each when it is asked for.

        Raises ReadError where such a process dies, and DataSetError.
        """
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=micros,
            num_workers=num_workers,
            # A forked process would inherit locks of threads that it does not have.
            multiprocessing_context="spawn" if num_workers else None,
            generator=torch.Generator(),  # or else it draws from the one that dropout draws from
        )
        try:
            for batch in loader:
                if isinstance(batch, DataSetError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ReadError(
                "a process that reads pictures ended (out of memory, perhaps): lower data.num_workers"
            ) from error
