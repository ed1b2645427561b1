"""plan.json beside the TensorRT plans of a bundle: what they were built from and for. Imports no torch, no TensorRT.

One plan set is one folder, `BUNDLE/plans/<backend>-<target>/`. `svcli build-engine` writes it, the engine checks it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from svcli_export.contract import NUM_SEQUENCES, Contract, GraphName, GraphSpec, Precision, TensorSpec
from svcli_export.manifest import Manifest, file_entry, required_files

FORMAT_VERSION = 2
RECORD_FILE = "plan.json"
RECIPES_FILE = "recipes.json"
"""Beside it: of each plan one hash of all that it was built from."""
PLANS_FOLDER = "plans"

Backend = Literal["tensorrt", "tensorrt-rtx"]
EngineLayout = Literal["split", "shared"]
"""`split`: one plan a phase. `shared`: prefill and decode are profiles of one plan, which holds the weights once."""

Place = tuple[str, int]
"""A plan file and its optimisation profile."""
PlanPhase = Literal["vision", "prefill", "decode", "batch"]
"""A graph, or decode of one id in each of several sequences, which has kernels of its own."""
PLACES: dict[EngineLayout, dict[PlanPhase, Place]] = {
    "split": {
        "vision": ("vision.plan", 0),
        "prefill": ("prefill.plan", 0),
        "decode": ("decode.plan", 0),
        "batch": ("decode.plan", 1),
    },
    "shared": {"vision": ("vision.plan", 0), "prefill": ("decoder.plan", 0), "decode": ("decoder.plan", 1)},
}
"""Where each phase is found; there is no `batch` in plans for one sequence."""

MAX_NEW = 256
"""Ids that one run of decode takes; the engine cuts longer questions. More would only grow the scratch memory."""
_USUAL_TEXT = 64
"""Text rows of the prompt that prefill is tuned for, beside one picture."""


class PlanError(ValueError):
    """Plans that cannot be used; one sentence with what is wrong and the command that mends it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShapeRange(_Strict):
    """What one input of one profile may be; kernels are tuned for `opt`."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class PlanFile(_Strict):
    """One plan as it was built. Two builds differ in their bytes, so `sha256` only tells whether this file is whole."""

    size: PositiveInt
    sha256: str
    num_layers: int
    scratch_bytes: int | None
    """Device memory for activations; None where the builder does not say."""
    weight_bytes: int
    profiles: tuple[dict[str, ShapeRange], ...]
    """Input name to range, one dictionary a profile."""
    plugins: tuple[str, ...]
    kernel_sha256: str
    """Of the source of the plugins' kernels; empty where there are none."""
    build_seconds: float


class PlanRecord(_Strict):
    """plan.json."""

    format_version: int
    svcli: str
    """Version that built the set."""
    backend: Backend
    backend_version: str
    target: str
    """Compute capability, such as `sm_89`."""
    layout: EngineLayout
    precision: Precision
    max_context: int
    """Rows of the longest prompt, as the plain model counts them."""
    capacity: int
    num_sequences: PositiveInt
    """That decode runs at once."""
    sources: dict[str, str]
    """sha256 of each graph and of the weights, from the bundle's manifest."""
    plans: dict[str, PlanFile]
    """By file name."""

    @model_validator(mode="after")
    def _plans_of_the_layout(self) -> PlanRecord:
        wanted = set(plan_files(self.layout))
        if wanted != self.plans.keys():
            raise ValueError(f"layout {self.layout} has the plans {', '.join(sorted(wanted))}")
        if self.num_sequences > 1 and "batch" not in PLACES[self.layout]:
            raise ValueError(f"layout {self.layout} runs one sequence, not {self.num_sequences}")
        return self


@dataclass(frozen=True)
class PlanSet:
    """Where the plans of one backend for one kind of GPU are."""

    bundle: Path
    backend: Backend
    target: str
    layout: EngineLayout = field(default="split", compare=False)
    max_context: int | None = field(default=None, compare=False)
    """Where plans are to be built for less than the bundle's."""
    num_sequences: int = field(default=1, compare=False)

    @property
    def folder(self) -> Path:
        return self.bundle / PLANS_FOLDER / f"{self.backend}-{self.target}"

    @property
    def log(self) -> Path:
        """What was printed while they were built."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def command(self) -> str:
        """What builds them."""
        words = ["svcli", "build-engine", str(self.bundle), "--backend", self.backend, "--target", self.target]
        words += [] if self.layout == "split" else ["--engine-layout", self.layout]
        words += [] if self.max_context is None else ["--max-context", str(self.max_context)]
        words += [] if self.num_sequences == 1 else ["--sequences", str(self.num_sequences)]
        return f"`{shlex.join(words)}`"

    def as_built(self, record: PlanRecord, contract: Contract) -> PlanSet:
        """The same set, to be built as it was."""
        shorter = record.max_context < contract.max_context
        max_context = record.max_context if shorter else None
        return replace(self, layout=record.layout, max_context=max_context, num_sequences=record.num_sequences)


@dataclass(frozen=True)
class RuntimeFacts:
    """What plans are going to be run by."""

    backend: Backend
    version: str
    target: str


def plan_files(layout: EngineLayout) -> tuple[str, ...]:
    return tuple(dict.fromkeys(file for file, _ in PLACES[layout].values()))


def built_from(manifest: Manifest) -> dict[str, str]:
    """`sources` of plans that are built from this bundle now."""
    inputs = (name for name in required_files(manifest.contract) if name.endswith((".onnx", ".safetensors")))
    return {name: manifest.files[name].sha256 for name in inputs}


def write_record(folder: Path, record: PlanRecord) -> None:
    """Writes plan.json beside the plans, in one move."""
    path = folder / RECORD_FILE
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def find_plan_sets(bundle: Path) -> list[PlanSet]:
    """Every plan set of a bundle, by name, whatever its state."""
    found = {
        PlanSet(bundle, backend, path.parent.name.removeprefix(f"{backend}-"))
        for backend in get_args(Backend)
        for file in (RECORD_FILE, "*.plan")
        for path in (bundle / PLANS_FOLDER).glob(f"{backend}-sm_*/{file}")
    }
    return sorted(found, key=lambda plans: plans.folder.name)


def load_record(plans: PlanSet) -> PlanRecord:
    """Raises PlanError for plans that are not there, an unreadable record, or one of another format or another set."""
    data = _read(plans)
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise refusal(plans, f"its format {version!r} is not the {FORMAT_VERSION} that is read here")
    try:
        record = PlanRecord.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its plans"
        what = first["msg"].removeprefix("Value error, ")
        raise refusal(plans, f"{RECORD_FILE} at {where}: {what}") from None
    if (record.backend, record.target) != (plans.backend, plans.target):
        raise refusal(plans, f"the plans in it are of {record.backend} for {record.target}")
    return record


def check_fits(
    plans: PlanSet,
    record: PlanRecord,
    manifest: Manifest,
    facts: RuntimeFacts | None = None,
    *,
    check_files: bool = True,
) -> None:
    """Raises PlanError where plans do not fit the bundle, the run time or the GPU, or are missing, cut or altered.

    Without `check_files` plans are not hashed.
    """
    check_record(plans, record, manifest, facts)
    for name, problem in plan_problems(plans, record, check_files=check_files).items():
        raise refusal(plans.as_built(record, manifest.contract), f"{name} {problem}")


def check_record(plans: PlanSet, record: PlanRecord, manifest: Manifest, facts: RuntimeFacts | None = None) -> None:
    """The same, but for the files; without `facts` only the bundle is looked at."""
    contract = manifest.contract
    plans = plans.as_built(record, contract)
    if facts is not None:
        _check_runtime(plans, record, facts)
    built, wanted = (record.capacity, record.precision), (contract.capacity, contract.precision)
    if built != wanted or record.max_context > contract.max_context:
        sides = (record.max_context, *built), (contract.max_context, *wanted)
        was, now = (f"{context} rows of context ({rows} cached) in {kind}" for context, rows, kind in sides)
        raise refusal(plans, f"built for {was}, and the bundle has {now}")
    sources = built_from(manifest)
    if record.sources != sources:
        changed = sorted(
            name for name in sources.keys() | record.sources if sources.get(name) != record.sources.get(name)
        )
        raise refusal(plans, f"the bundle's {changed[0]} has changed since the plans were built")


def plan_problems(plans: PlanSet, record: PlanRecord, *, check_files: bool = True) -> dict[str, str]:
    """What is wrong with which plan: missing, cut, or altered."""
    problems = {}
    for name, plan in record.plans.items():
        path = plans.folder / name
        if not path.is_file():
            problems[name] = "is missing"
        elif path.stat().st_size != plan.size:
            problems[name] = f"has {path.stat().st_size} bytes instead of {plan.size}"
        elif check_files and file_entry(path).sha256 != plan.sha256:
            problems[name] = "was altered (its sha256 differs)"
    return problems


def check_sequences(plans: PlanSet, record: PlanRecord, wanted: int) -> None:
    """Raises PlanError where decode runs fewer sequences at once."""
    if wanted > record.num_sequences:
        many = f"{record.num_sequences} sequence{'s' if record.num_sequences > 1 else ''}"
        remedy = replace(plans, num_sequences=wanted, layout="split")
        raise refusal(plans, f"built for {many} at a time, and {wanted} are asked for", remedy)


def phase_spec(contract: Contract, layout: EngineLayout, phase: PlanPhase, num_sequences: int = 1) -> GraphSpec:
    """What the plan of a phase takes and gives: one sequence, or as many as there are, up to `num_sequences`.

    The shared decoder is prefill behind a cache, which decode feeds new ids without pictures or skipped rows. Prefill
    with a plan of its own begins with an empty cache.
    """
    graph: GraphName = "decode" if phase == "batch" else phase
    spec = contract.graph("prefill" if layout == "shared" and phase == "decode" else graph)
    taken = [tensor for tensor in spec.inputs if (layout, phase, tensor.name) != ("split", "prefill", "write_index")]
    if num_sequences > 1:
        return spec.model_copy(update={"inputs": tuple(taken)})
    inputs, outputs = (tuple(map(_of_one_sequence, tensors)) for tensors in (taken, spec.outputs))
    return spec.model_copy(update={"inputs": inputs, "outputs": outputs})


def _of_one_sequence(tensor: TensorSpec) -> TensorSpec:
    return tensor.model_copy(update={"shape": tuple(1 if each == NUM_SEQUENCES else each for each in tensor.shape)})


def phase_ranges(
    contract: Contract, layout: EngineLayout, phase: PlanPhase, num_sequences: int = 1
) -> dict[str, ShapeRange]:
    """Range of every input of a phase: what its profile must allow for the engine to work.

    A prompt without pictures binds one picture's rows that nothing refers to, so no dimension is ever 0.
    """
    sizes = _sizes(contract, phase, num_sequences)

    def shape(dimensions: tuple[int | str, ...], which: int) -> tuple[int, ...]:
        return tuple(each if isinstance(each, int) else sizes[each][which] for each in dimensions)

    return {
        tensor.name: ShapeRange(**{which: shape(tensor.shape, n) for n, which in enumerate(("min", "opt", "max"))})
        for tensor in phase_spec(contract, layout, phase, num_sequences).inputs
    }


def refusal(plans: PlanSet, problem: str, remedy: PlanSet | None = None) -> PlanError:
    """The error for a plan set with a problem; `remedy` is what to build, where that is another set."""
    return PlanError(f"{plans.folder}: {problem}; build them again with {(remedy or plans).command}")


def _sizes(contract: Contract, phase: PlanPhase, num_sequences: int) -> Mapping[str, tuple[int, int, int]]:
    """Smallest, usual and largest of each free dimension."""
    if phase == "batch":
        return {"num_new": (1, 1, 1), NUM_SEQUENCES: (1, num_sequences, num_sequences)}
    if phase == "decode":
        new = 1, 1, min(MAX_NEW, contract.capacity)
        rows = dict.fromkeys(("num_new", "num_ids", "num_rows", "num_kept"), new)
        return {**rows, "num_images": (1, 1, 1), NUM_SEQUENCES: (1, 1, 1)}
    if phase == "vision":
        return {"num_images": (1, 1, contract.max_images)}
    visual = next(tensor for tensor in contract.graph("prefill").inputs if tensor.name == "visual")
    span, skipped = int(visual.shape[1]), (contract.max_positions - contract.capacity) // contract.max_images
    text = min(_USUAL_TEXT, contract.capacity - (span - skipped))
    return {
        "num_images": (1, 1, contract.max_images),
        "num_ids": (1, text, contract.capacity),
        "num_rows": (1, text + span, contract.max_positions),
        "num_kept": (1, text + span - skipped, contract.capacity),
    }


def _check_runtime(plans: PlanSet, record: PlanRecord, facts: RuntimeFacts) -> None:
    here = replace(plans, backend=facts.backend, target=facts.target)
    if record.backend != facts.backend:
        raise refusal(plans, f"{record.backend} built them and {facts.backend} is to run them", here)
    if record.backend_version != facts.version:
        version = f"{record.backend} {record.backend_version} built them and {facts.version} is installed"
        raise refusal(plans, version, here)
    if record.target != facts.target:
        raise refusal(plans, f"they are for {record.target} and this GPU is {facts.target}", here)


def _read(plans: PlanSet) -> dict[str, Any]:
    try:
        data = json.loads((plans.folder / RECORD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if plans.folder.is_dir():
            raise refusal(plans, f"{RECORD_FILE} is missing") from None
        raise PlanError(
            f"{plans.bundle} has no plans of {plans.backend} for {plans.target}; build them with {plans.command}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(plans, f"{RECORD_FILE} is unreadable ({error})") from None
    if not isinstance(data, dict):
        raise refusal(plans, f"{RECORD_FILE} is not a JSON object")
    return data
