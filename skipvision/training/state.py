"""States that a run can go on from: `states/step-000200/` with a safetensors shard of each process and state.json.

A shard holds rows of whatever learns and of AdamW's moments, and says in its metadata which; so a state of any number
of processes loads into any other. A folder has its name only once it is whole; nothing here unpickles. All processes
have to see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from skipvision.training.distributed import Processes, local, rows_of
from skipvision.training.errors import StateError, kind_of, reason

FORMAT = 1
_INFO = "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    best_step: int = 0
    """Of the best validation; 0 where there was none."""
    best_loss: float = 0.0
    broken: tuple[str, ...] = ()
    """Names of samples that were left out."""


@dataclass(frozen=True)
class _Info:
    """state.json."""

    format: int
    identity: dict[str, str]
    seed: int
    world: int
    torch: str
    progress: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    """Hashes."""


class States:
    """The states of one run."""

    def __init__(self, folder: Path, identity: Mapping[str, str], seed: int, keep: int, processes: Processes) -> None:
        self.folder, self.identity, self.seed, self.keep = folder, identity, seed, keep
        self.processes = processes

    def clean(self, *, fresh: bool) -> None:
        """Removes what a killed write left; all states where `fresh`. Called once, by all processes."""

        def remove() -> None:
            for each in self.folder.glob("*step-*" if fresh else ".step-*") if self.processes.is_first else ():
                shutil.rmtree(each)

        self._together(remove, "could not be cleared")

    def steps(self) -> list[int]:
        """Of the states that there are."""
        names = [re.fullmatch(r"step-(\d+)", each.name) for each in self.folder.glob("step-*")]
        return sorted(int(name[1]) for name in names if name is not None)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(self, progress: Progress, module: nn.Module, optimiser: torch.optim.Optimizer) -> Path:
        """Writes a state whole or not at all, then removes those that are not to be kept. Raises StateError."""
        final = self.path(progress.step)
        partial = final.with_name(f".{final.name}.partial")
        world = self.processes.world
        name = f"shard-{self.processes.rank + 1:05d}-of-{world:05d}.safetensors"

        def write_shard() -> tuple[str, str]:
            tensors, rows = self._pieces(module, optimiser)
            _write(tensors, {"rows": json.dumps(rows)}, partial / name)
            return name, _hash(partial / name)

        def finish(files: Mapping[str, str]) -> None:
            if not self.processes.is_first:
                return
            info = _Info(
                FORMAT,
                dict(self.identity),
                self.seed,
                world,
                torch.__version__,
                asdict(progress),
                dict(sorted(files.items())),
            )
            with (partial / _INFO).open("w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(info), indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            _folder_to_disk(partial)
            os.rename(partial, final)
            _folder_to_disk(self.folder)

        try:
            self._together(lambda: self._new_folder(partial), "could not be made")
            files = self._together(write_shard, f"{final.name} could not be written")
            self._together(lambda: finish(dict(files)), f"{final.name} could not be written")
        except (StateError, KeyboardInterrupt, SystemExit):
            if self.processes.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._prune(progress.best_step)
        return final

    def load(self, step: int, module: nn.Module, optimiser: torch.optim.Optimizer | None = None) -> Progress:
        """Fills what learns in `module`, and the moments where there is an `optimiser`, in place. Raises StateError."""
        folder = self.path(step)
        info = self._checked(folder)
        with ExitStack() as stack:
            shards = [_Shard(stack, folder / name) for name in info.files]
            weights = dict(_learning(module))
            for name, parameter in weights.items():
                self._fill(parameter.detach(), f"weight.{name}", shards, folder)
            if optimiser is not None and any(
                f"adam.{name}.step" in shard.names for name in weights for shard in shards
            ):
                for name, parameter in weights.items():
                    moments = {key: torch.zeros_like(parameter.detach()) for key in _MOMENTS}
                    moments["step"] = torch.zeros((), device=parameter.device)
                    for key, tensor in moments.items():
                        self._fill(tensor, f"adam.{name}.{key}", shards, folder)
                    optimiser.state[parameter] = moments
        return Progress(**(info.progress | {"broken": tuple(info.progress["broken"])}))

    def _checked(self, folder: Path) -> _Info:
        """What a state says of itself, if it is whole and ours."""
        way_out = self._way_out(folder)
        try:
            found = json.loads((folder / _INFO).read_text(encoding="utf-8"))
            version = found["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise StateError(f"{folder / _INFO}: missing or unreadable; {way_out}") from None
        if version != FORMAT:
            raise StateError(
                f"{folder}: a state of format {version}, and this version reads {FORMAT};"
                " go on with the version that wrote it, or start anew with --fresh"
            )
        try:
            info = _Info(**found)
            Progress(**info.progress)
            others = [name for name, known in self.identity.items() if info.identity.get(name) != known]
        except (TypeError, AttributeError):
            raise StateError(f"{folder / _INFO}: missing or unreadable; {way_out}") from None
        if others:
            raise StateError(
                f"{folder} belongs to another {' and '.join(others)}; use another folder, or start anew with --fresh"
            )
        mine = list(info.files.items())[self.processes.rank :: self.processes.world]
        altered = [name for name, known in mine if not (folder / name).is_file() or _hash(folder / name) != known]
        for name in (name for names in self.processes.exchange(altered) for name in names):
            raise StateError(f"{folder / name}: missing, cut or altered; {way_out}")
        return info

    def _way_out(self, folder: Path) -> str:
        earlier = [step for step in self.steps() if step < int(folder.name.removeprefix("step-"))]
        before = f"remove {folder} to go on from step {earlier[-1]}, or " if earlier else ""
        return f"{before}start anew with --fresh"

    def _pieces(self, module: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The rows that this process writes, and the number of the first of each."""
        tensors: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        for name, parameter in _learning(module):
            found = {f"weight.{name}": parameter.detach()}
            found |= {f"adam.{name}.{key}": tensor for key, tensor in optimiser.state.get(parameter, {}).items()}
            for key, tensor in found.items():
                span = self._rows(tensor)
                if len(span) > 0:
                    rows[key] = span.start
                    tensors[key] = _held(tensor, span)
        return tensors, rows

    def _rows(self, tensor: Tensor) -> range:
        """Of a tensor, those that this process has, or would have were it sharded; a scalar is the first one's."""
        return rows_of(len(tensor) if tensor.dim() else 1, self.processes.rank, self.processes.world)

    def _fill(self, tensor: Tensor, name: str, shards: list[_Shard], folder: Path) -> None:
        target = local(tensor)
        is_sharded = target is not tensor
        wanted = self._rows(tensor) if is_sharded else range(len(tensor) if tensor.dim() else 1)
        found = 0
        for shard in shards:
            if name not in shard.names:
                continue
            length, piece = shard.length(name), shard.file.get_slice(name)
            first = shard.rows[name]
            start, stop = max(wanted.start, first), min(wanted.stop, first + length)
            if start >= stop:
                continue
            rows = piece[start - first : stop - first] if tensor.dim() else shard.file.get_tensor(name)
            place = target[start - wanted.start : stop - wanted.start] if tensor.dim() else target
            if rows.shape != place.shape:
                break
            place.copy_(rows)
            found += stop - start
        if found != len(wanted):
            raise StateError(f"{folder} does not fit this model at {name}; {self._way_out(folder)}")

    def _new_folder(self, partial: Path) -> None:
        if self.processes.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _prune(self, best_step: int) -> None:

        def remove() -> None:
            old = set(self.steps()[: -self.keep]) - {best_step}
            for step in old if self.processes.is_first else ():
                hidden = self.folder / f".{self.path(step).name}.old"
                os.rename(self.path(step), hidden)
                shutil.rmtree(hidden)

        self._together(remove, "old ones could not be removed")

    def _together(self, action: Callable[[], Result], what: str) -> list[Result]:
        """What `action` gives in each process; StateError in all of them if it fails in one."""
        result, problem = None, None
        try:
            result = action()
        except (OSError, SafetensorError) as error:
            problem = reason(error)
        answers = self.processes.exchange((result, problem))
        for _, (code, words) in (each for each in answers if each[1] is not None):
            last = self.steps()
            kept = f"; the run goes on from step {last[-1]} when it is started again" if last else ""
            raise kind_of(code)(f"{self.folder}: {what} ({words}){kept}")
        return [each[0] for each in answers]


class _Shard:
    """One file of a state, open."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        try:
            self.file = stack.enter_context(safe_open(path, framework="pt"))
            self.rows: dict[str, int] = json.loads((self.file.metadata() or {})["rows"])
        except (OSError, SafetensorError, ValueError, KeyError):
            raise StateError(f"{path}: not a shard of a state; start anew with --fresh") from None
        self.names = set(self.rows)

    def length(self, name: str) -> int:
        shape = self.file.get_slice(name).get_shape()
        return int(shape[0]) if shape else 1


def _learning(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, each) for name, each in module.named_parameters() if each.requires_grad)


def _held(tensor: Tensor, span: range) -> Tensor:
    rows = local(tensor)
    if rows is tensor and tensor.dim():
        rows = rows[span.start : span.stop]
    return rows.cpu().contiguous()


def _write(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    save_file(dict(tensors), path, metadata)
    path.chmod(0o644)  # safetensors writes for the owner alone
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
