"""One step of a run: forward and backward of each micro-batch, one gradient over all processes, one update."""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from skipvision.training.conversation import Broken
from skipvision.training.distributed import Processes, local
from skipvision.training.errors import NoMemoryError, NotFiniteError
from skipvision.training.events import Seconds
from skipvision.training.precision import compute_dtype
from skipvision.training.task import Counts, MicroBatch, Objective, Task

if TYPE_CHECKING:
    from skipvision.training.loop import LoopSettings

_NAMED = 8
"""Samples that a message names."""


class Clock:
    """Where the time goes. On a GPU, by its own events: it computes behind what Python says."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.mark("start")

    def mark(self, what: str) -> None:
        """All since the last mark was `what`, a field of Seconds."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((what, event))
        else:
            self._marks.append((what, time.perf_counter()))

    def read(self) -> Seconds:
        """All up to the last mark, from which it goes on."""
        spent: defaultdict[str, float] = defaultdict(float)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for (_, start), (what, end) in pairwise(self._marks):
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                spent[what] += start.elapsed_time(end) / 1000
            elif isinstance(start, float) and isinstance(end, float):
                spent[what] += end - start
        self._marks = self._marks[-1:]
        return Seconds(**spent)


@dataclass(frozen=True)
class Gathered:
    """What the micro-batches of a step came to, over all processes; their gradients wait in the weights."""

    weight: float
    loss: float
    parts: dict[str, float]
    counts: Counts
    broken: tuple[Broken, ...]


class Updater:
    """AdamW on what learns in a task's module."""

    def __init__(self, task: Task, settings: LoopSettings, processes: Processes) -> None:
        """The module is on its device, and sharded where it is to be."""
        self.module, self.settings, self.processes = task.module, settings, processes
        groups = task.parameter_groups()
        self.peaks = [float(cast("float", group["lr"])) for group in groups]
        self.warmup = settings.warmup_steps or math.ceil(settings.warmup_share * task.num_steps)
        self.num_steps = task.num_steps
        self.optimiser = torch.optim.AdamW(groups, betas=settings.betas, fused=True)
        self.learning = [each for group in self.optimiser.param_groups for each in group["params"]]

    def learning_rate(self, step: int, peak: float) -> float:
        """Linear warm-up, then a cosine down to the minimum; `step` from 0 on."""
        if step < self.warmup:
            return peak * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.num_steps - self.warmup)
        low = min(peak, self.settings.min_learning_rate)
        return low + (peak - low) * (1 + math.cos(math.pi * share)) / 2

    def autocast(self) -> AbstractContextManager[object]:
        """What the forward pass computes in; weights stay fp32."""
        kind, wanted = self.processes.device.type, self.settings.precision
        if wanted == "auto":
            fast = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else None
            dtype = compute_dtype() if fast is None else torch.bfloat16 if fast else torch.float32
        else:
            dtype = torch.bfloat16 if wanted == "bf16" else torch.float32
        return torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def gather(self, step: int, micro_batches: Sequence[MicroBatch], clock: Clock) -> Gathered:
        """Forward and backward. Raises NotFiniteError for a loss, NoMemoryError."""
        self.module.train()
        objectives = []
        for place, micro_batch in enumerate(micro_batches):
            is_last = place == len(micro_batches) - 1
            torch.manual_seed(_seed(self.settings.seed, step, micro_batch))
            with _within_memory(step, micro_batch):
                with self.autocast():
                    objective: Objective = self.module(micro_batch)
                total = objective.total
                if isinstance(self.module, FSDPModule):
                    self.module.set_requires_gradient_sync(is_last)
                    total = total + self._nothing() if is_last else total
                clock.mark("forward")
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
                clock.mark("backward")
            objectives.append(objective)
        gathered = self._sums(step, micro_batches, objectives)
        clock.mark("optimiser")
        return gathered

    def _nothing(self) -> Tensor:
        """Zero, that yet depends on all that the root of FSDP holds: a process in which a weight is not used, as where
        it sees no picture, would exchange other gradients than the others."""
        held = [each for each in self.module.parameters() if each.requires_grad and local(each) is each]
        return sum((each.sum() * 0 for each in held), torch.zeros((), device=self.processes.device))

    def _sums(self, step: int, micro_batches: Sequence[MicroBatch], objectives: list[Objective]) -> Gathered:
        # The GPU is waited for once.
        flat = [each for one in objectives for each in (one.total, one.answer_loss, *one.parts.values())]
        values = iter(torch.stack([each.detach().float() for each in flat]).tolist() if flat else ())
        sums: defaultdict[str, float] = defaultdict(float)
        unfit: list[str] = []
        for micro_batch, objective in zip(micro_batches, objectives, strict=True):
            numbers = [next(values), next(values)]
            parts = {name: next(values) for name in objective.parts}
            if not all(map(math.isfinite, [*numbers, *parts.values()])):
                unfit += micro_batch.names
            found = {"weight": objective.weight, "loss": numbers[1]}
            found |= {f"part {name}": value for name, value in parts.items()}
            found |= {f"count {name}": count for name, count in asdict(micro_batch.counts).items()}
            _add(sums, found)
        broken = [(each.name, each.reason, each.kind) for micro_batch in micro_batches for each in micro_batch.broken]
        answers = self.processes.exchange([sums, unfit, broken])
        unfit = [name for _, names, _ in answers for name in names]
        if unfit:
            raise NotFiniteError(
                f"step {step + 1}: the loss is not a finite number in a batch of {_listed(unfit)}; {_ADVICE}"
            )
        totals: defaultdict[str, float] = defaultdict(float)
        for each, _, _ in answers:
            _add(totals, each)
        weight = totals["weight"]
        return Gathered(
            weight,
            totals["loss"] / weight if weight else math.nan,
            {name[5:]: total / weight for name, total in totals.items() if name.startswith("part ") and weight},
            Counts(**{each.name: int(totals[f"count {each.name}"]) for each in fields(Counts)}),
            tuple(Broken(*each) for _, _, names in answers for each in names),
        )

    def apply(self, step: int, gathered: Gathered, micro_batches: Sequence[MicroBatch], clock: Clock) -> float:
        """The update; returns the norm of the gradient before clipping. Raises NotFiniteError."""
        if gathered.weight == 0:
            self.optimiser.zero_grad(set_to_none=True)
            return 0.0
        for parameter in self.learning:
            # What a step did not use gets nothing from it, in however many processes.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [local(cast("Tensor", each.grad)) for each in self.learning]
        if not isinstance(self.module, FSDPModule):
            self.processes.add_up(gradients)
        norm = float(nn.utils.get_total_norm(gradients)) / gathered.weight
        if isinstance(self.module, FSDPModule):
            norm = math.hypot(*self.processes.exchange(norm))
        if not math.isfinite(norm):
            everywhere = self.processes.exchange([name for each in micro_batches for name in each.names])
            names = [name for each in everywhere for name in each]
            raise NotFiniteError(
                f"step {step + 1}: the gradient is not finite in a batch of {_listed(names)}; {_ADVICE}"
            )
        scale = min(1.0, self.settings.max_grad_norm / (norm + 1e-6)) / gathered.weight
        for gradient in gradients:
            gradient.mul_(scale)
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = self.learning_rate(step, peak)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        clock.mark("optimiser")
        return norm


_ADVICE = "look at these samples, or start anew with a lower learning rate"


@contextmanager
def _within_memory(step: int, micro_batch: MicroBatch) -> Iterator[None]:
    """Says what to do where memory ends; on a CPU, where the system does not end the process instead."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise NoMemoryError(
            f"step {step + 1}: memory does not hold the {micro_batch.counts.rows:,} rows of"
            f" {_listed(micro_batch.names)}; lower optim.micro_batch_size or data.max_length, or set"
            " checkpoint_activations = true"
        ) from None


def _add(sums: defaultdict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] += value


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _seed(seed: int, step: int, micro_batch: MicroBatch) -> int:
    """Dropout goes with the samples, in whichever process they are."""
    text = "\0".join([str(seed), str(step), *micro_batch.names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
