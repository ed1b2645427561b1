"""A bundle becomes plans: one folder a target, each put in place in one move.

Building needs onnx, and torch for the shared layout. TensorRT and polygraphy are loaded in the builder's process only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import skipvision
from skipvision.folders import write_directory
from svcli_engines.base import MachineError
from svcli_engines.build_options import (
    LocalGpu,
    Options,
    check_gpu,
    check_options,
    check_place,
    check_room,
    choose_targets,
    find_gpu,
)
from svcli_engines.builder_process import BuildError, Job, Task, Tools, build, find_tools
from svcli_engines.plans import (
    FORMAT_VERSION,
    PLANS_FOLDER,
    RECIPES_FILE,
    EngineLayout,
    PlanFile,
    PlanRecord,
    PlanSet,
    built_from,
    write_record,
)
from svcli_export.contract import Contract
from svcli_export.manifest import Manifest, file_entry, load_manifest

if TYPE_CHECKING:
    from svcli_engines.build_orders import Order, Part

Progress = Callable[[str, float, float, str], None]
"""Called with what is being done, how much of it is done, how much there is, and the file at hand."""


@dataclass(frozen=True)
class Outcome:
    """The plan set of one target, as it is now."""

    plans: PlanSet
    record: PlanRecord
    built: tuple[str, ...]
    """Files that were built; none where all were up to date."""


@dataclass(frozen=True)
class Result:
    """The plan sets of all targets, and what a bundle takes on a GPU beside scratch memory."""

    outcomes: tuple[Outcome, ...]
    weight_bytes: dict[EngineLayout, int]
    """With either layout."""
    contract: Contract
    """Of the bundle."""


def build_plans(
    bundle: Path,
    options: Options,
    targets: Sequence[str] = (),
    progress: Progress = lambda _what, _done, _total, _file: None,
) -> Result:
    """Builds the plans of a bundle for each of `targets`, for the GPU here if there are none.

    What was built from the same already is kept. An interrupted or failed build leaves an older set as it was.

    Raises BuildOptionError, MachineError, BuildError, or what the parts raise: BundleError, ContractError, GraphError
    (all ValueError).
    """
    manifest = load_manifest(bundle)
    check_options(bundle, manifest, options, targets)
    gpu = find_gpu()
    check_gpu(options.backend, targets, gpu)
    tools = find_tools(options.backend, gpu.driver)
    wanted = choose_targets(options.backend, targets, gpu, tools)
    try:
        from svcli_engines.build_orders import plan_order, plan_parts
        from svcli_engines.plan_graphs import layout_weight_bytes
    except ModuleNotFoundError as error:
        raise MachineError(
            f"{error.name} is needed for building plans, and missing: pip install {error.name}"
        ) from None
    parts = plan_parts(bundle, manifest, options)
    sets = [PlanSet(bundle, options.backend, target, options.layout) for target in wanted]
    done, outcomes = 0, []
    with _alone(bundle):
        orders = [plan_order(plans, manifest, options, parts, tools) for plans in sets]
        check_place(bundle, [order.plans.folder for order in orders if order.missing])
        check_room(bundle, [part.weight_bytes for order in orders for part in order.missing])
        total = sum(part.weight_bytes for order in orders for part in order.missing)
        for order in orders:
            work = _Work(manifest, options, parts, tools, gpu, order, partial(_tell, progress, order, done, total))
            try:
                outcomes.append(work.run())
            except (BuildError, MachineError) as error:
                raise _among(error, [each.plans.target for each in orders], len(outcomes)) from None
            done += sum(part.weight_bytes for part in order.missing)
    return Result(tuple(outcomes), layout_weight_bytes(bundle, manifest), manifest.contract)


def _among(error: BuildError | MachineError, targets: Sequence[str], num_done: int) -> BuildError | MachineError:
    """The error, with what became of the other targets."""
    done, left = targets[:num_done], targets[num_done + 1 :]
    others = [f"{', '.join(names)} {what}" for names, what in ((done, "done"), (left, "not tried")) if names]
    return type(error)("; ".join([str(error), *others]))


@contextmanager
def _alone(bundle: Path) -> Iterator[None]:
    """Nobody else builds plans of this bundle meanwhile, so that what a killed build left behind can go.

    Raises BuildError where somebody does.
    """
    descriptor = os.open(bundle, os.O_RDONLY)
    try:
        _lock(descriptor, bundle)
        for left in (*bundle.glob(".tensorrt*.onnx"), *(bundle / PLANS_FOLDER).glob(".tensorrt*")):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, bundle: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BuildError(f"{bundle}: its plans are being built by another process; wait for that to end") from None


def _tell(progress: Progress, order: Order, before: float, total: float, file: str, done: float) -> None:
    progress("building plans", before + done, total, f"{order.plans.folder.name}/{file}")


@dataclass(frozen=True)
class _Work:
    """Building one set."""

    manifest: Manifest
    options: Options
    parts: Sequence[Part]
    tools: Tools
    gpu: LocalGpu
    order: Order
    progress: Callable[[str, float], None]
    """Called with the file at hand, and the bytes of weights that are in plans."""

    def run(self) -> Outcome:
        order = self.order
        if order.old is not None and not order.missing and order.old == self._record(order.kept):
            return Outcome(order.plans, order.old, ())
        records: list[PlanRecord] = []

        def write(folder: Path) -> None:
            record = self._record(self._fill(folder))
            (folder / RECIPES_FILE).write_text(json.dumps(order.recipes, indent=1) + "\n", encoding="utf-8")
            write_record(folder, record)
            records.append(record)

        try:
            if order.missing:
                order.plans.log.parent.mkdir(exist_ok=True)
                order.plans.log.write_bytes(b"")
            write_directory(order.plans.folder, write)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise MachineError(f"the disk of {order.plans.bundle} is full; free some room and build again") from None
        return Outcome(order.plans, records[0], tuple(part.file for part in order.missing))

    def _fill(self, folder: Path) -> dict[str, PlanFile]:
        """Puts every plan into `folder`."""
        files: dict[str, PlanFile] = {}
        done = 0
        for part in self.parts:
            if part.file in self.order.kept:
                _take(self.order.plans.folder / part.file, folder / part.file)
                files[part.file] = self.order.kept[part.file]
                continue
            self.progress(part.file, done)
            files[part.file] = self._build(part, folder / part.file, done)
            done += part.weight_bytes
            self.progress(part.file, done)
        return files

    def _build(self, part: Part, path: Path, done: int) -> PlanFile:
        """Builds one plan into the file `path`; `done` is what `progress` was told before."""
        with _beside_weights(self.order.plans, part) as graph:
            job = Job(
                graph=graph,
                plan=path,
                target=self.order.plans.target,
                profiles=part.profiles,
                caches=part.caches,
                num_plugins=part.num_plugins,
                workspace=self.options.workspace,
                timing_cache=self.options.timing_cache,
                runs_here=self.gpu.target == self.order.plans.target,
            )
            task = Task(backend=self.options.backend, driver=self.gpu.driver, job=job)
            tell = self.progress
            built = build(task, self.order.plans.log, lambda share: tell(part.file, done + share * part.weight_bytes))
        if built.version != self.tools.version:
            raise BuildError(f"{self.options.backend} became {built.version} during the build; build again")
        entry = file_entry(path)
        return PlanFile(
            size=entry.size,
            sha256=entry.sha256,
            num_layers=built.num_layers,
            scratch_bytes=built.scratch_bytes,
            weight_bytes=part.weight_bytes,
            profiles=part.profiles,
            plugins=part.plugins,
            kernel_sha256=part.kernel_sha256,
            build_seconds=built.seconds,
        )

    def _record(self, files: Mapping[str, PlanFile]) -> PlanRecord:
        contract = self.manifest.contract
        return PlanRecord(
            format_version=FORMAT_VERSION,
            svcli=skipvision.__version__,
            backend=self.options.backend,
            backend_version=self.tools.version,
            target=self.order.plans.target,
            layout=self.options.layout,
            precision=contract.precision,
            max_context=self.options.max_context or contract.max_context,
            capacity=contract.capacity,
            num_sequences=self.options.num_sequences,
            sources=built_from(self.manifest),
            plans=dict(files),
        )


@contextmanager
def _beside_weights(plans: PlanSet, part: Part) -> Iterator[Path]:
    """A file with the graph, for a while: its weights are looked for in the folder where it lies."""
    prefix = f".{plans.folder.name}.{part.file}."
    with tempfile.NamedTemporaryFile(dir=plans.bundle, prefix=prefix, suffix=".onnx") as file:
        file.write(part.graph.SerializeToString())
        file.flush()
        yield Path(file.name)


def _take(old: Path, new: Path) -> None:
    """The same file in another folder, without a copy where the disk can do that."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)
