"""Which samples are shown when. Everything comes from (seed, epoch), so that any process can work out any step.

An epoch is a row of *sequences*, each of one sample, or of several that fit into it where samples are packed. Every
`micro_batch_size` of them are a micro-batch, every `batch_size` a step. What is left over at the end of an epoch is a
smaller step: no sample waits for the next epoch, and none is dropped. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
MicroPlan = tuple[tuple[int, ...], ...]
"""Samples of each sequence of a micro-batch."""

_HELD_OUT, _TURNS, _EPOCHS = range(3)
"""Random streams; each epoch has one of its own."""
_FINEST = 10_000
"""Weights are taken as fractions with denominators up to this."""
_GROUP = 16
"""Micro-batches, at least, within which sequences are sorted by length."""
_WINDOW = 1024
"""Samples that are packed together: enough that hardly any room is left, few enough to stay in random order."""


class PlanError(ValueError):
    """Nothing can be trained on these samples; the message says what to do."""


@dataclass(frozen=True)
class Samples:
    """What is known of each sample before it is shown; all arrays are [N]."""

    rows: Ints
    """0 where a sample cannot be shown."""
    has_pictures: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float64]
    """How often it is shown in one epoch, on average."""


@dataclass(frozen=True)
class Epoch:
    """Sequences in order."""

    sequences: tuple[tuple[int, ...], ...]
    lengths: Ints
    """[S] rows of each sequence."""
    micro_batch_size: int

    @property
    def padding(self) -> float:
        """Share of a micro-batch's rows that pad its shorter sequences."""
        starts = range(0, len(self.lengths), self.micro_batch_size)
        micros = [self.lengths[start : start + self.micro_batch_size] for start in starts]
        return 1 - float(self.lengths.sum()) / max(1, sum(int(micro.max()) * len(micro) for micro in micros))


class Plan:
    """Steps over `samples`; `held_out` of them are never trained on."""

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        micro_batch_size: int,
        max_length: int,
        pack: bool = False,
        group_by_length: bool = True,
        held_out: int = 0,
        seed: int = 0,
    ) -> None:
        """Sizes in sequences, of which `micro_batch_size` divides `batch_size`. Raises PlanError where nothing is left
        to train on."""
        assert batch_size % micro_batch_size == 0
        assert samples.rows.max(initial=0) <= max_length
        self.samples, self.seed = samples, seed
        self.batch_size, self.micro_batch_size, self.max_length = batch_size, micro_batch_size, max_length
        self.pack, self.group_by_length = pack, group_by_length
        usable = np.flatnonzero(samples.rows > 0)
        if len(usable) <= held_out:
            what = "data.sources have no sample that can be shown"
            if len(usable):
                what = f"data.validation_samples takes {held_out} of {len(usable)} samples, and none is left"
            raise PlanError(f"{what}: nothing to train on")
        shuffled = self._random(_HELD_OUT).permutation(usable)
        self.held_out: Ints = np.sort(shuffled[:held_out])
        self.trained_on: Ints = np.sort(shuffled[held_out:])
        self._turns = self._random(_TURNS).permutation(len(self.trained_on))
        self._first_steps = [0]
        self._latest: tuple[int, Epoch] | None = None

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream))

    def shown(self, epoch: int) -> Ints:
        """Samples of an epoch, each as often as it is due: exactly, over epochs enough to make it whole."""
        times = np.zeros(len(self.trained_on), dtype=np.int64)
        weights = self.samples.weights[self.trained_on]
        for weight in np.unique(weights):
            share = max(Fraction(float(weight)).limit_denominator(_FINEST), Fraction(1, _FINEST))
            group = np.flatnonzero(weights == weight)
            # Its turn within the group shifts when a sample is due; whole numbers, since a rounded sum could miss one.
            turns = np.argsort(np.argsort(self._turns[group]))
            above, below = share.numerator * len(group), share.denominator * len(group)
            before, after = ((above * number + turns * share.denominator) // below for number in (epoch, epoch + 1))
            times[group] = after - before
        return np.repeat(self.trained_on, times)

    def epoch(self, number: int) -> Epoch:
        """The last one asked for is kept."""
        if self._latest is None or self._latest[0] != number:
            self._latest = number, self._ordered(number)
        return self._latest[1]

    def _ordered(self, number: int) -> Epoch:
        rng, size = self._random(_EPOCHS + number), self.micro_batch_size
        order = rng.permutation(self.shown(number))
        rows, has_pictures = self.samples.rows, self.samples.has_pictures
        sequences: list[tuple[int, ...]] = [(sample,) for sample in order.tolist()]
        if self.pack:
            windows = [order[start : start + _WINDOW] for start in range(0, len(order), _WINDOW)]
            sequences = [each for window in windows for each in packed(window, rows, self.max_length)]
            order = np.array([sample for each in sequences for sample in each], dtype=np.int64)
        starts = np.cumsum([0, *map(len, sequences)])[:-1]
        lengths = np.add.reduceat(rows[order], starts)
        places = rng.permutation(len(sequences))
        if self.group_by_length:
            places = self._grouped(places, lengths, np.logical_or.reduceat(has_pictures[order], starts))
        # A micro-batch that is not whole stays the last.
        whole = len(places) // size * size
        micros = rng.permutation(places[:whole].reshape(-1, size))
        places = np.concatenate([micros.ravel(), places[whole:]])
        return Epoch(tuple(sequences[place] for place in places), lengths[places], size)

    def _grouped(self, places: Ints, lengths: Ints, seeing: npt.NDArray[np.bool_]) -> Ints:
        """So that sequences of about the same length share a micro-batch, with pictures and without apart."""
        size = self.micro_batch_size
        group = max(self.batch_size, _GROUP * size)
        whole, rest = [], []
        for kind in (True, False):
            alike = places[seeing[places] == kind]
            cut = len(alike) // size * size
            groups = [alike[start : min(start + group, cut)] for start in range(0, cut, group)]
            whole += [each[np.argsort(-lengths[each], kind="stable")] for each in groups]
            rest.append(alike[cut:])
        return np.concatenate([*whole, *rest])

    def _micros(self, step: int) -> Sequence[MicroPlan]:
        number, first = self._epoch_of(step)
        epoch, size = self.epoch(number), self.micro_batch_size
        start = (step - first) * self.batch_size
        stop = min(start + self.batch_size, len(epoch.sequences))
        micros = [slice(place, min(place + size, stop)) for place in range(start, stop, size)]
        # Longest first: processes that work side by side get micro-batches of about one length.
        micros.sort(key=lambda micro: -int(epoch.lengths[micro].max()))
        return [epoch.sequences[micro] for micro in micros]

    def share(self, step: int, rank: int = 0, world: int = 1) -> Sequence[MicroPlan]:
        """Micro-batches of one of `world` processes, which take them in turn; as many in all, so that some may be
        empty."""
        return in_turn(self._micros(step), rank, world)

    def steps_of(self, number: int) -> int:
        """Of an epoch."""
        return self._first_step(number + 1) - self._first_step(number)

    def num_steps(self, epochs: float) -> int:
        """Of so many epochs; at least one."""
        whole = int(epochs)
        part = round((epochs - whole) * self.steps_of(whole)) if epochs > whole else 0
        return max(1, self._first_step(whole) + part)

    def _first_step(self, number: int) -> int:
        """Of an epoch; how many steps those before it have is known only when they are made."""
        while len(self._first_steps) <= number:
            sequences = len(self.epoch(len(self._first_steps) - 1).sequences)
            self._first_steps.append(self._first_steps[-1] + -(-sequences // self.batch_size))
        return self._first_steps[number]

    def _epoch_of(self, step: int) -> tuple[int, int]:
        """Its number and first step."""
        while self._first_steps[-1] <= step:
            self._first_step(len(self._first_steps))
        number = bisect_left(self._first_steps, step + 1) - 1
        return number, self._first_steps[number]


def in_turn(micros: Sequence[MicroPlan], rank: int, world: int) -> list[MicroPlan]:
    """Those of one process; as many in all of them, so that some may be empty."""
    rounds = -(-len(micros) // world)
    mine = list(micros[rank::world])
    return mine + [()] * (rounds - len(mine))


def by_length(samples: Ints, rows: Ints, micro_batch_size: int) -> list[MicroPlan]:
    """Each sample once, alone in its sequence, the longest first."""
    order = samples[np.argsort(-rows[samples], kind="stable")].tolist()
    starts = range(0, len(order), micro_batch_size)
    return [tuple((sample,) for sample in order[start : start + micro_batch_size]) for start in starts]


def packed(samples: Ints, rows: Ints, max_length: int) -> list[tuple[int, ...]]:
    """Samples in sequences of at most `max_length` rows: the longest first, each where it leaves the least room."""
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # rows that are free, and the sequence; sorted
    for sample in samples[np.argsort(-rows[samples], kind="stable")].tolist():
        length = int(rows[sample])
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, number = room.pop(place)
        else:
            free, number = max_length, len(sequences)
            sequences.append([])
        sequences[number].append(sample)
        insort(room, (free - length, number))
    return [tuple(each) for each in sequences]
