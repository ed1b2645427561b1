"""What a build of plans is asked for, and whether the bundle and this machine can give it. Imports no TensorRT."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svcli_engines import environment
from svcli_engines.base import MachineError
from svcli_engines.builder_process import BuildError, Tools
from svcli_engines.plans import PLACES, Backend, EngineLayout
from svcli_export.manifest import Manifest

_TARGET = re.compile(r"sm_\d{2,3}")
_REFUSED = frozenset({"sm_75"})
"""What TensorRT-RTX names, and builds no vision graph for."""
_ALIGNMENT = 256
"""Bytes, of which every cache begins at a multiple, those of several sequences in one buffer too."""
_BYTES = 2
"""Of a number in fp16."""
_GROWTH, _SLACK = 1.25, 16 << 20
"""A plan is its weights, some of them packed anew, and code."""


class BuildOptionError(ValueError):
    """Options, or a bundle, of which no plan can be built; the message says what would do."""


@dataclass(frozen=True)
class Options:
    """How plans are built."""

    backend: Backend
    layout: EngineLayout = "split"
    max_context: int | None = None
    """Rows of the longest prompt, as the plain model counts them; the bundle's own limit if None."""
    workspace: int | None = None
    """Most bytes of scratch memory for a kernel; TensorRT's own limit if None."""
    num_sequences: int = 1
    """That decode runs at once, at most."""
    timing_cache: Path | None = None
    """Where TensorRT keeps what it measured from one build to the next."""


@dataclass(frozen=True)
class LocalGpu:
    """The first GPU here."""

    target: str | None
    """Compute capability, such as `sm_89`; None where no GPU can be used."""
    problem: str | None
    driver: int | None
    """Newest CUDA that the driver runs, such as 13000."""


def check_options(bundle: Path, manifest: Manifest, options: Options, targets: Sequence[str]) -> None:
    """Raises BuildOptionError where options do not fit the bundle, or each other."""
    contract = manifest.contract
    if contract.precision != "fp16":
        raise BuildOptionError(
            f"{bundle} is in {contract.precision}, and TensorRT takes fp16; write it as such: {_export(bundle, 'fp16')}"
        )
    if manifest.config.tiles is not None:
        raise BuildOptionError(
            f"{bundle} sees pictures in tiles, and plans for that are not there yet; chat with it without --engine"
        )
    if options.max_context is not None and options.max_context > contract.max_context:
        raise BuildOptionError(
            f"--max-context {options.max_context} is more than the {contract.max_context} that are baked into {bundle};"
            f" write it anew: {_export(bundle, 'long', f'--max-context {options.max_context}')}"
        )
    if options.num_sequences > 1:
        _check_sequences(bundle, manifest, options)
    for target in targets:
        if not _TARGET.fullmatch(target):
            raise BuildOptionError(f"--target {target}: write a compute capability, such as sm_89 for 8.9")
    if options.timing_cache is None:
        return
    if options.backend == "tensorrt-rtx":
        raise BuildOptionError("--timing-cache: TensorRT-RTX measures nothing while it builds; leave it out")
    if not options.timing_cache.absolute().parent.is_dir():
        raise BuildOptionError(f"--timing-cache {options.timing_cache}: there is no such folder to write it to")


def _check_sequences(bundle: Path, manifest: Manifest, options: Options) -> None:
    contract, asked = manifest.contract, f"--sequences {options.num_sequences}"
    if "batch" not in PLACES[options.layout]:
        raise BuildOptionError(f"{asked}: a shared decoder runs one sequence; leave --engine-layout out")
    row = contract.num_kv_heads * contract.head_dim * _BYTES
    more = next(rows for rows in range(_ALIGNMENT) if (contract.capacity + rows) * row % _ALIGNMENT == 0)
    if more:
        context = contract.max_context + more
        raise BuildOptionError(
            f"{asked}: a KV cache of {contract.capacity} rows would not let the next one begin at a multiple of"
            f" {_ALIGNMENT} bytes; write the bundle anew: {_export(bundle, 'long', f'--max-context {context}')}"
        )


def find_gpu() -> LocalGpu:
    """What the driver says, asked in a process of its own."""
    found = environment.find_cuda()
    capability = found.gpus[0].compute_capability if found.gpus and found.problem is None else None
    major, _, minor = (found.cuda or "").partition(".")
    return LocalGpu(
        target=None if capability is None else f"sm_{capability.replace('.', '')}",
        problem=found.problem or (None if capability else "it does not say its compute capability"),
        driver=1000 * int(major) + 10 * int(minor) if major.isdigit() and minor.isdigit() else None,
    )


def check_gpu(backend: Backend, targets: Sequence[str], gpu: LocalGpu) -> None:
    """Raises MachineError where a GPU is needed and none can be used."""
    if gpu.target is not None:
        return
    if backend == "tensorrt":
        raise MachineError(
            f"TensorRT builds on the GPU that runs the plans, and none can be used here ({gpu.problem}); mend what"
            " `svcli doctor` says of it, or build with --backend tensorrt-rtx --target sm_89, which needs none"
        )
    if not targets:
        raise MachineError(
            f"there is no GPU here to build for ({gpu.problem}); name the one that is going to run the plans, such as"
            " --target sm_89"
        )


def choose_targets(backend: Backend, targets: Sequence[str], gpu: LocalGpu, tools: Tools) -> list[str]:
    """Those to build for, without repeats: `targets`, or the GPU here.

    Raises BuildOptionError for one that the backend cannot build for.
    """
    wanted = list(dict.fromkeys(targets)) or [str(gpu.target)]
    for target in wanted:
        if backend == "tensorrt" and target != gpu.target:
            raise BuildOptionError(
                f"TensorRT builds for the GPU that it runs on, {gpu.target} here, not for {target}; build on such a"
                " machine, or with --backend tensorrt-rtx"
            )
        if backend == "tensorrt-rtx" and target in _REFUSED:
            raise BuildOptionError(
                f"TensorRT-RTX has no matrix product in fp32 for {target}, which merging tokens takes; build with"
                " --backend tensorrt on such a machine"
            )
        if tools.targets and target not in tools.targets:
            known = [each for each in tools.targets if each not in _REFUSED]
            raise BuildOptionError(f"{backend} {tools.version} builds for {', '.join(known)}, not for {target}")
    return wanted


def check_place(bundle: Path, folders: Sequence[Path]) -> None:
    """Raises BuildError where a bundle, or one of the `folders` in it that are to be replaced, cannot be written to."""
    for folder in folders:
        for place in (folder, folder.parent, bundle):
            if place.exists() and not os.access(place, os.W_OK):
                raise BuildError(f"{place} cannot be written to; copy the bundle to a folder of yours and build there")


def check_room(bundle: Path, weight_bytes: Sequence[int]) -> None:
    """Raises MachineError where the disk has less room than plans of these weights take, beside those there are."""
    needed = sum(int(_GROWTH * size) + _SLACK for size in weight_bytes)
    free = shutil.disk_usage(bundle).free
    if needed > free:
        raise MachineError(
            f"the plans take about {needed >> 20} MiB and the disk of {bundle} has {free >> 20} MiB left; free some"
            " room, or copy the bundle to a larger disk"
        )


def _export(bundle: Path, suffix: str, *options: str) -> str:
    """The command that writes the same bundle in fp16, into the working directory."""
    target = shlex.quote(f"{bundle.resolve().name}-{suffix}")
    return f"`{' '.join(['svcli export', shlex.quote(str(bundle)), '-o', target, '--precision fp16', *options])}`"
