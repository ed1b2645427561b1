"""The loop of every run: steps, validation, states that it goes on from, and the checkpoint at its end.

Everything random at step s comes from (seed, s) and the samples themselves, so a run that was stopped goes on with the
very same steps.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from skipvision.training.conversation import Broken, broken_samples
from skipvision.training.distributed import Processes, joined, shard, split_again, whole
from skipvision.training.errors import NotFiniteError, TrainError, not_written
from skipvision.training.events import (
    BrokenEvent,
    DoneEvent,
    Event,
    Report,
    SavedEvent,
    Seconds,
    StepEvent,
    ValidationEvent,
)
from skipvision.training.run_log import RunLog
from skipvision.training.state import Progress, States
from skipvision.training.task import MicroBatch, Task
from skipvision.training.tune_recipe import Precision
from skipvision.training.update import Clock, Gathered, Updater

STATES = "states"
"""Where they are, in the run's folder."""
_LAST = 20
"""Steps whose mean loss is that of the run."""


@dataclass(frozen=True)
class LoopSettings:
    """How a task is run."""

    seed: int
    identity: Mapping[str, str]
    """Hashes of what is trained, by name, such as `recipe`: a state goes on with no others."""
    warmup_steps: int = 0
    warmup_share: float = 0.0
    """Of all steps, where `warmup_steps` is 0."""
    min_learning_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    save_every: int = 200
    keep: int = 2
    """The last states that are kept, beside the best by validation."""
    validate_every: int = 0
    """Steps between validations; 0: with each state."""
    final: Literal["best", "last"] = "best"
    """What the checkpoint is of; the last step where nothing was validated."""
    max_broken: int = 0
    """Samples that may be broken before the run stops."""
    precision: Precision = "auto"
    deterministic: bool = False
    device: str = "auto"
    """`auto`, `cuda` or `cpu`."""
    shard: bool = True
    """Split weights and optimiser over the processes, where there are several; else each has a copy."""


def run(
    task: Task,
    settings: LoopSettings,
    output: Path,
    report: Report,
    *,
    fresh: bool = False,
    begin: Callable[[], None] | None = None,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Runs `task` into `output` and returns the finished checkpoint's folder, `output/checkpoint`.

    With a state in `output/states` the run goes on from it, unless `fresh`. `begin` is what comes before the first step
    of a run that has none; `facts` are the first row of its log. Under torchrun, all processes call this, and the first
    reports. Raises TrainError; the last state is whole whenever.
    """
    with joined(settings.device) as processes, _kernels(settings.deterministic):
        return _Run(task, settings, output, report, processes).go(fresh, begin, facts or {})


class _Run:
    """A task under way in this process."""

    def __init__(self, task: Task, settings: LoopSettings, output: Path, report: Report, processes: Processes) -> None:
        self.task, self.settings, self.output, self.processes = task, settings, output, processes
        self._report = report
        self.log = RunLog(output / "log.jsonl")
        self.states = States(output / STATES, settings.identity, settings.seed, settings.keep, processes)
        if task.num_steps < 1:
            raise TrainError("there is nothing to train on: not one step of one sample")
        if settings.shard and processes.world > 1:
            shard(task.module, processes)
        else:
            task.module.to(processes.device)
        self.updater = Updater(task, settings, processes)
        self.progress = Progress()
        self.clock = Clock(processes.device)
        self.spent: Counter[str] = Counter()
        self.rows = 0

    def go(self, fresh: bool, begin: Callable[[], None] | None, facts: Mapping[str, object]) -> Path:
        """All of it."""
        self._start(fresh, begin, facts)
        first, total = self.progress.step, self.task.num_steps
        if first < total:
            self.clock.mark("other")
            batches = self.task.batches(first, self.processes.rank, self.processes.world)
            try:
                for step, micro_batches in zip(range(first, total), batches, strict=False):
                    self.clock.mark("data")
                    self._step(step, micro_batches, first)
                    self._after_step()
                    self.clock.mark("other")
            except NotFiniteError as error:  # in all processes
                raise TrainError(f"{error}; {self._rescue()}") from None
        assert self.progress.step == total, "a task gave fewer batches than steps"
        chosen = self._choose()
        checkpoint = self._write_checkpoint()
        self.clock.mark("other")
        self._spend(self.clock.read())
        last = [row["loss"] for row in self.log.rows() if row.get("event") == "step" and row["loss"] is not None]
        loss = sum(last[-_LAST:]) / len(last[-_LAST:]) if last else math.nan
        seconds = Seconds(**self.spent)
        best, broken = self.progress.best_step, len(self.progress.broken)
        self._tell(DoneEvent(checkpoint, total, loss, best, seconds, self.rows, broken, chosen))
        return checkpoint

    def _start(self, fresh: bool, begin: Callable[[], None] | None, facts: Mapping[str, object]) -> None:
        if self.processes.is_first:
            self.output.mkdir(parents=True, exist_ok=True)
        self.states.clean(fresh=fresh)
        steps = self.states.steps()
        if steps:
            self.progress = self.states.load(steps[-1], self.task.module, self.updater.optimiser)
        elif self.processes.is_first and fresh:
            self.log.path.unlink(missing_ok=True)
        if self.processes.is_first:
            self.log.start(self.progress.step, facts)
        if not steps and begin is not None:
            begin()
            self.states.save(self.progress, self.task.module, self.updater.optimiser)

    def _step(self, step: int, micro_batches: Sequence[MicroBatch], first: int) -> None:
        """One update, and what there is to say about it."""
        gathered = self.updater.gather(step, micro_batches, self.clock)
        self._count_broken(gathered.broken, step + 1)
        norm = self.updater.apply(step, gathered, micro_batches, self.clock)
        self.progress = replace(self.progress, step=step + 1)
        self.rows += gathered.counts.rows
        seconds = self.clock.read()
        self._spend(seconds)
        self._tell(self._step_event(gathered, norm, seconds, first))

    def _step_event(self, gathered: Gathered, norm: float, seconds: Seconds, first: int) -> StepEvent:
        step, total, updater = self.progress.step, self.task.num_steps, self.updater
        rate = max(updater.learning_rate(step - 1, peak) for peak in updater.peaks)
        left = sum(self.spent.values()) / (step - first) * (total - step)
        return StepEvent(
            step=step,
            total=total,
            loss=gathered.loss,
            learning_rate=rate,
            grad_norm=norm,
            **asdict(gathered.counts),
            seconds=seconds,
            memory=_peak_memory(self.processes.device),
            seconds_left=left,
            parts=gathered.parts,
        )

    def _count_broken(self, broken: Sequence[Broken], step: int) -> None:
        """A sample counts once, however often it comes; `step` is the one that it belongs to."""
        names = list(self.progress.broken)
        for each in broken:
            if each.name not in names:
                names.append(each.name)
                self._tell(BrokenEvent(each, len(names)), step)
        self.progress = replace(self.progress, broken=tuple(names))
        if len(names) > self.settings.max_broken:
            last = "; ".join(f"{each.name}: {each.reason}" for each in broken[-3:])
            raise TrainError(
                f"{broken_samples(len(names))}, and data.max_broken allows {self.settings.max_broken};"
                f" the last: {last}; `svcli data check` lists them all"
            )

    def _after_step(self) -> None:
        """Validation and state, where it is time for them. The best gets a state whenever it comes."""
        step, settings = self.progress.step, self.settings
        is_end = step == self.task.num_steps
        due = is_end or step % settings.save_every == 0
        if is_end or step % (settings.validate_every or settings.save_every) == 0:
            due = self._validate() or due
        if due:
            folder = self.states.save(self.progress, self.task.module, self.updater.optimiser)
            self._tell(SavedEvent(step, folder))

    def _validate(self) -> bool:
        """Whether it is the best so far."""
        self.task.module.eval()
        with torch.no_grad(), self.updater.autocast():
            found = self.task.validate()
        split_again(self.task.module)
        step = self.progress.step
        answers = self.processes.exchange([dict(found.scores), [asdict(each) for each in found.broken]])
        self._count_broken([Broken(**each) for _, broken in answers for each in broken], step)
        scores: dict[str, float] = answers[0][0]
        if not scores:
            return False
        loss = scores.get("loss", math.nan)
        best = math.isfinite(loss) and (self.progress.best_step == 0 or loss < self.progress.best_loss)
        if best:
            self.progress = replace(self.progress, best_step=step, best_loss=loss)
        self._tell(ValidationEvent(step, scores, best))
        return best

    def _choose(self) -> str:
        """Puts the weights that are to be written into the module; says which."""
        step, best = self.progress.step, self.progress.best_step
        if self.settings.final == "last" or best == 0:
            return f"the checkpoint is of the last step, {step}"
        if best not in self.states.steps():
            return f"the checkpoint is of the last step, {step}: the state of the best, {best}, is gone"
        if best != step:
            self.states.load(best, self.task.module)
        return f"the checkpoint is of step {best}, the best by validation (loss {self.progress.best_loss:.4f})"

    def _rescue(self) -> str:
        """A checkpoint of the last state, or of the best one, since the same run would end at the same step again."""
        steps, best = self.states.steps(), self.progress.best_step
        if not steps:
            return "no state was saved before it"
        step = best if best in steps and self.settings.final == "best" else steps[-1]
        self.states.load(step, self.task.module)
        which = "the best" if step == best else "the last"
        return f"{self._write_checkpoint()} is of step {step}, {which} that was saved"

    def _write_checkpoint(self) -> Path:
        folder = self.output / "checkpoint"
        state = {}
        for name, tensor in self.task.module.state_dict().items():
            full = whole(tensor.detach())
            if self.processes.is_first:
                state[name] = full.cpu()
        if self.processes.is_first:
            try:
                self.task.write_checkpoint(folder, state)
            except (OSError, SafetensorError) as error:
                raise not_written(folder, error, "writes it") from None
        self.processes.wait()
        return folder

    def _spend(self, seconds: Seconds) -> None:
        self.spent.update(asdict(seconds))

    def _tell(self, event: Event, step: int | None = None) -> None:
        if self.processes.is_first:
            self.log.write(event, self.progress.step if step is None else step)
            self._report(event)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@contextmanager
def _kernels(deterministic: bool) -> Iterator[None]:
    """Deterministic ones alone, where that is asked for."""
    if not deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads as it starts
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
