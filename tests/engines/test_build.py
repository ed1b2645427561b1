"""Which plans are built, what is left in the bundle, and what is refused; then TensorRT-RTX itself, where it is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import skipvision
from svcli.settings import bundled_model
from svcli_engines import build as build_module
from svcli_engines import build_orders, environment
from svcli_engines.base import MachineError
from svcli_engines.build import Result, build_plans
from svcli_engines.build_options import BuildOptionError, LocalGpu, Options, find_gpu
from svcli_engines.builder_process import BuildError, Job, Task, Tools
from svcli_engines.builder_process import build as build_for_real
from svcli_engines.environment import Cuda, Gpu
from svcli_engines.plans import (
    RECIPES_FILE,
    Backend,
    EngineLayout,
    PlanError,
    PlanSet,
    RuntimeFacts,
    check_fits,
    find_plan_sets,
    load_record,
    phase_ranges,
)
from svcli_export.bundle import export_bundle
from svcli_export.contract import ContractError
from svcli_export.manifest import FileEntry, file_entry, load_manifest
from tests.engines.conftest import Exported, export_tiny
from tests.engines.workshop import HERE, NOWHERE, SHARED, SPLIT, VERSION, Workshop, open_workshop
from tests.optional import missing

RTX = Options("tensorrt-rtx")


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return open_workshop(monkeypatch)


@pytest.fixture(scope="module")
def exported_fp16(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("fp16"), precision="fp16")


@pytest.fixture
def bundle(exported_fp16: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_fp16.bundle, tmp_path / "a bundle"))


def files(bundle: Path) -> set[str]:
    return {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}


def refused(bundle: Path, options: Options, *targets: str, error: type[Exception] = BuildOptionError) -> str:
    before = files(bundle)
    with pytest.raises(error) as refusal:
        build_plans(bundle, options, targets)
    assert files(bundle) == before
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(("layout", "names"), [("split", SPLIT), ("shared", SHARED)])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_bundle_gets_plans_that_the_engine_accepts(
    workshop: Workshop, bundle: Path, backend: Backend, layout: EngineLayout, names: list[str]
) -> None:
    workshop.gpu = HERE
    before = files(bundle)
    result = build_plans(bundle, Options(backend, layout, workspace=1 << 20))
    (outcome,) = result.outcomes
    assert outcome.built == tuple(names)
    assert outcome.plans == PlanSet(bundle, backend, "sm_89")
    assert find_plan_sets(bundle) == [outcome.plans]
    manifest = load_manifest(bundle)
    record = load_record(outcome.plans)
    assert record == outcome.record
    check_fits(outcome.plans, record, manifest, RuntimeFacts(backend, VERSION, "sm_89"))
    place = f"plans/{backend}-sm_89"
    assert files(bundle) - before == {
        f"{place}.log",
        *(f"{place}/{name}" for name in [*names, "plan.json", RECIPES_FILE]),
    }
    plugins = ("SummaryMerge", "SummaryPartial", "TokenGather") if backend == "tensorrt" else ()
    assert record.plans["vision.plan"].plugins == plugins
    assert result.contract == manifest.contract
    built_weights = sum(plan.weight_bytes for plan in record.plans.values())
    # The shared decoder has some numbers of its own, beside the weights.
    assert result.weight_bytes[layout] == pytest.approx(built_weights, rel=0.02)
    assert result.weight_bytes["shared"] < result.weight_bytes["split"]


def test_what_the_builder_is_asked_is_what_the_contract_says(workshop: Workshop, bundle: Path) -> None:
    workshop.gpu = HERE
    build_plans(bundle, Options("tensorrt", "shared", workspace=3 << 20, timing_cache=bundle.parent / "timings"))
    contract = load_manifest(bundle).contract
    vision, decoder = workshop.jobs
    assert vision.profiles == (phase_ranges(contract, "shared", "vision"),)
    assert decoder.profiles == tuple(phase_ranges(contract, "shared", phase) for phase in ("prefill", "decode"))
    assert vision.caches == {}
    assert len(decoder.caches) == 2 * contract.num_layers
    assert decoder.caches["past_key_values.1.value"] == "present.1.value"
    assert (vision.num_plugins, decoder.num_plugins) == (10, 1 + 2 * contract.num_layers)
    for job in (vision, decoder):
        assert (job.target, job.workspace, job.runs_here) == ("sm_89", 3 << 20, True)
        assert job.timing_cache == bundle.parent / "timings"


def test_rtx_builds_for_gpus_that_are_not_here(workshop: Workshop, bundle: Path) -> None:
    outcomes = build_plans(bundle, RTX, ["sm_89", "sm_120", "sm_89"]).outcomes
    assert [outcome.plans.target for outcome in outcomes] == ["sm_89", "sm_120"]
    assert {job.runs_here for job in workshop.jobs} == {False}
    assert {job.num_plugins for job in workshop.jobs} == {0}
    assert workshop.taken() == SPLIT * 2
    workshop.gpu = LocalGpu("sm_120", None, 13000)
    (outcome,) = build_plans(bundle, RTX).outcomes
    assert (outcome.plans.target, outcome.built) == ("sm_120", ())


def test_progress_is_that_of_all_targets_together(workshop: Workshop, bundle: Path) -> None:
    told: list[tuple[str, float, float, str]] = []

    def note(what: str, done: float, total: float, file: str) -> None:
        told.append((what, done, total, file))

    build_plans(bundle, RTX, ["sm_80", "sm_89"], note)
    done = [each[1] for each in told]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == told[-1][2]
    assert {(each[0], each[2]) for each in told} == {("building plans", told[0][2])}
    names = list(dict.fromkeys(each[3] for each in told))
    assert names == [f"tensorrt-rtx-{target}/{name}" for target in ("sm_80", "sm_89") for name in SPLIT]
    assert workshop.taken() == SPLIT * 2


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}


def test_what_is_up_to_date_is_left_alone(workshop: Workshop, bundle: Path) -> None:
    (first,) = build_plans(bundle, RTX, ["sm_89"]).outcomes
    before = state(first.plans.folder)
    workshop.taken()
    (second,) = build_plans(bundle, RTX, ["sm_89"]).outcomes
    assert (second.built, second.record) == ((), first.record)
    assert workshop.taken() == []
    assert state(first.plans.folder) == before


def spoil(name: str) -> Callable[[PlanSet], None]:
    def edit(plans: PlanSet) -> None:
        path = plans.folder / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    return edit


def drop(name: str) -> Callable[[PlanSet], None]:
    return lambda plans: (plans.folder / name).unlink()


@pytest.mark.parametrize(
    ("edit", "again"),
    [
        (spoil("prefill.plan"), ["prefill.plan"]),
        (drop("decode.plan"), ["decode.plan"]),
        (spoil("plan.json"), SPLIT),
        (drop("plan.json"), SPLIT),
        (drop(RECIPES_FILE), SPLIT),
        (spoil(RECIPES_FILE), SPLIT),
        (lambda plans: (plans.folder / RECIPES_FILE).write_text("[]"), SPLIT),
    ],
    ids=["altered", "gone", "bad record", "no record", "no recipes", "bad recipes", "other recipes"],
)
def test_what_is_gone_or_altered_is_built_again(
    workshop: Workshop, bundle: Path, edit: Callable[[PlanSet], object], again: list[str]
) -> None:
    (first,) = build_plans(bundle, RTX, ["sm_89"]).outcomes
    kept = {name: (first.plans.folder / name).read_bytes() for name in SPLIT if name not in again}
    workshop.taken()
    edit(first.plans)
    (second,) = build_plans(bundle, RTX, ["sm_89"]).outcomes
    assert list(second.built) == again == workshop.taken()
    assert all((first.plans.folder / name).read_bytes() == content for name, content in kept.items())
    check_fits(second.plans, load_record(second.plans), load_manifest(bundle))


def test_other_options_or_builders_mean_other_plans(workshop: Workshop, bundle: Path) -> None:
    def built(options: Options) -> list[str]:
        build_plans(bundle, options, ["sm_89"])
        return workshop.taken()

    assert built(RTX) == SPLIT
    assert built(Options("tensorrt-rtx", workspace=1 << 20)) == SPLIT
    assert built(Options("tensorrt-rtx", workspace=1 << 20)) == []
    assert built(Options("tensorrt-rtx", "shared", workspace=1 << 20)) == ["decoder.plan"]
    assert built(Options("tensorrt-rtx", "shared", max_context=80, workspace=1 << 20)) == ["decoder.plan"]
    workshop.version = "1.8.0"
    assert built(Options("tensorrt-rtx", "shared", max_context=80, workspace=1 << 20)) == SHARED


def test_other_kernels_mean_other_plans_with_plugins(
    workshop: Workshop, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.gpu = HERE
    build_plans(bundle, Options("tensorrt"))
    workshop.taken()
    (tmp_path / "kernels.cu").write_text("// others")
    monkeypatch.setattr(build_orders, "SOURCE", tmp_path / "kernels.cu")
    (outcome,) = build_plans(bundle, Options("tensorrt")).outcomes
    assert workshop.taken() == ["vision.plan", "prefill.plan"]
    assert outcome.record.plans["decode.plan"].kernel_sha256 == ""


def test_other_weights_mean_other_plans(workshop: Workshop, bundle: Path) -> None:
    build_plans(bundle, RTX, ["sm_89"])
    weights = bundle / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][weights.name] = file_entry(weights).model_dump()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    workshop.taken()
    (outcome,) = build_plans(bundle, RTX, ["sm_89"]).outcomes
    assert workshop.taken() == SPLIT
    check_fits(outcome.plans, outcome.record, load_manifest(bundle))


def test_another_svcli_with_the_same_graphs_only_writes_its_name(
    workshop: Workshop, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = build_plans(bundle, RTX, ["sm_89"]).outcomes
    workshop.taken()
    monkeypatch.setattr(skipvision, "__version__", "99.0")
    (second,) = build_plans(bundle, RTX, ["sm_89"]).outcomes
    assert (second.built, workshop.taken()) == ((), [])
    assert load_record(first.plans).svcli == "99.0"


@pytest.mark.parametrize("failure", [BuildError("no kernel"), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
def test_a_build_that_fails_leaves_the_older_set_as_it_was(
    workshop: Workshop, bundle: Path, failure: BaseException
) -> None:
    (first,) = build_plans(bundle, RTX, ["sm_89"]).outcomes
    before, listed = state(first.plans.folder), files(bundle)
    workshop.fails = {"decode.plan": failure}
    with pytest.raises(type(failure)):
        build_plans(bundle, Options("tensorrt-rtx", workspace=1 << 20), ["sm_89"])
    assert state(first.plans.folder) == before
    assert files(bundle) == listed
    assert not [path for path in (bundle / "plans").iterdir() if path.name.startswith(".")]
    assert (bundle / "plans" / "tensorrt-rtx-sm_89.log").read_text().splitlines() == SPLIT


def test_one_build_of_a_bundle_at_a_time(workshop: Workshop, bundle: Path) -> None:
    holder = os.open(bundle, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    sentence = refused(bundle, RTX, "sm_89", error=BuildError)
    assert "are being built by another process; wait for that to end" in sentence
    assert workshop.taken() == []
    os.close(holder)
    build_plans(bundle, RTX, ["sm_89"])


@pytest.mark.usefixtures("workshop")
def test_what_a_killed_build_left_goes_with_the_next_one(bundle: Path, tmp_path: Path) -> None:
    before = files(bundle)
    left = bundle / "plans" / ".tensorrt-rtx-sm_80.abc"
    left.mkdir(parents=True)
    (left / "vision.plan").write_text("half")
    (bundle / ".tensorrt-rtx-sm_80.vision.plan.abc.onnx").write_text("half")
    (tmp_path / "elsewhere").mkdir()
    (bundle / "plans" / ".tensorrt-rtx-sm_86.abc").symlink_to(tmp_path / "elsewhere")
    (outcome,) = build_plans(bundle, RTX, ["sm_89"]).outcomes
    assert {name for name in files(bundle) if not name.startswith("plans/")} == before
    assert {path.name for path in (bundle / "plans").iterdir()} == {outcome.plans.folder.name, outcome.plans.log.name}
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.usefixtures("workshop")
def test_a_set_that_lies_on_another_disk_stays_there(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "large disk" / "set").mkdir(parents=True)
    (bundle / "plans").mkdir()
    link = bundle / "plans" / "tensorrt-rtx-sm_89"
    link.symlink_to(tmp_path / "large disk" / "set")
    for layout in ("split", "shared"):
        build_plans(bundle, Options("tensorrt-rtx", layout), ["sm_89"])
    assert link.is_symlink()
    assert (tmp_path / "large disk" / "set" / "decoder.plan").is_file()
    assert sorted(path.name for path in (tmp_path / "large disk").iterdir()) == ["set"]


@pytest.mark.parametrize("module", ["plan_builder.py", "plugins/registration.py", "plugins/launch.py"])
def test_other_code_that_builds_means_other_plans(
    workshop: Workshop, bundle: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    workshop.gpu = HERE
    build_plans(bundle, Options("tensorrt"))
    workshop.taken()
    entry = file_entry

    def changed(path: Path) -> FileEntry:
        return FileEntry(sha256="other", size=1) if path.as_posix().endswith(module) else entry(path)

    monkeypatch.setattr(build_orders, "file_entry", changed)
    build_plans(bundle, Options("tensorrt"))
    assert workshop.taken() == (SPLIT if module == "plan_builder.py" else ["vision.plan", "prefill.plan"])


@pytest.mark.usefixtures("workshop")
def test_what_mends_a_set_builds_it_as_it_was(bundle: Path) -> None:
    (outcome,) = build_plans(bundle, Options("tensorrt-rtx", "shared", max_context=64), ["sm_89"]).outcomes
    (outcome.plans.folder / "decoder.plan").unlink()
    with pytest.raises(PlanError, match="--target sm_89 --engine-layout shared --max-context 64`"):
        check_fits(PlanSet(bundle, "tensorrt-rtx", "sm_89"), outcome.record, load_manifest(bundle))


@pytest.mark.parametrize("failure", [BuildError("no kernel"), MachineError("no memory")])
def test_a_failure_says_what_became_of_the_other_targets(
    workshop: Workshop, bundle: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    build_one = workshop.build

    def build(task: Task, log: Path, progress: Any) -> Any:
        if "sm_89" in log.name:
            raise failure
        return build_one(task, log, progress)

    monkeypatch.setattr(build_module, "build", build)
    with pytest.raises(type(failure), match=r"^no \w+; sm_80 done; sm_120 not tried$"):
        build_plans(bundle, RTX, ["sm_80", "sm_89", "sm_120"])
    assert [plans.target for plans in find_plan_sets(bundle)] == ["sm_80"]


def test_a_bundle_that_cannot_be_written_to_is_said_before_anything_is_built(
    workshop: Workshop, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_plans(bundle, RTX, ["sm_89"])
    workshop.taken()
    monkeypatch.setattr("os.access", lambda place, _mode: Path(place).name != "plans")
    build_plans(bundle, RTX, ["sm_89"])  # up to date: there is nothing to write
    sentence = refused(bundle, RTX, "sm_80", error=BuildError)
    assert f"{bundle / 'plans'} cannot be written to; copy the bundle" in sentence
    assert workshop.taken() == []


def test_a_full_disk_while_writing_is_something_lacking(workshop: Workshop, bundle: Path) -> None:
    workshop.fails = {"vision.plan": OSError(errno.ENOSPC, "No space left on device")}
    with pytest.raises(MachineError, match="is full; free some room"):
        build_plans(bundle, RTX, ["sm_89"])


def test_a_full_disk_is_noticed_before_anything_is_built(
    workshop: Workshop, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    sentence = refused(bundle, RTX, "sm_89", error=MachineError)
    assert f"the disk of {bundle} has 5 MiB left" in sentence
    assert workshop.taken() == []


@pytest.mark.usefixtures("workshop")
def test_a_builder_that_changes_meanwhile_is_not_recorded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Tools(version="1.7.0", targets=("sm_89",))
    monkeypatch.setattr(build_module, "find_tools", lambda _backend, _driver: found)
    with pytest.raises(BuildError, match=r"became 1\.7\.1 during the build"):
        build_plans(bundle, RTX, ["sm_89"])
    assert find_plan_sets(bundle) == []


def test_a_smaller_context_bounds_prompts_and_leaves_the_cache(workshop: Workshop, bundle: Path) -> None:
    contract = load_manifest(bundle).contract
    (outcome,) = build_plans(bundle, Options("tensorrt-rtx", max_context=64), ["sm_89"]).outcomes
    check_fits(outcome.plans, load_record(outcome.plans), load_manifest(bundle))
    vision, prefill, _ = (job.profiles[0] for job in workshop.jobs)
    assert prefill["input_ids"].max == (1, contract.capacity - (contract.max_context - 64))
    assert prefill["position_ids"].max == (1, contract.max_positions - (contract.max_context - 64))
    assert prefill["past_key_values.0.key"].max == contract.cache_shape
    assert vision == phase_ranges(contract, "split", "vision")


def test_a_larger_context_is_refused_with_the_export_that_has_it(workshop: Workshop, bundle: Path) -> None:
    sentence = refused(bundle, Options("tensorrt-rtx", max_context=97), "sm_89")
    assert "--max-context 97 is more than the 96 that are baked into" in sentence
    assert "--precision fp16 --max-context 97`" in sentence
    assert workshop.taken() == []


def test_a_context_without_room_for_pictures_is_refused(workshop: Workshop, bundle: Path) -> None:
    assert "leaves no room for text" in refused(
        bundle, Options("tensorrt-rtx", max_context=32), "sm_89", error=ContractError
    )
    assert workshop.taken() == []


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.usefixtures("workshop")
def test_other_precisions_are_refused_with_the_export_that_gives_fp16(tmp_path: Path, precision: Any) -> None:
    exported = export_tiny(tmp_path, precision=precision)
    sentence = refused(exported.bundle, RTX, "sm_89")
    assert f"is in {precision}, and TensorRT takes fp16" in sentence
    assert f"`svcli export {exported.bundle} -o {exported.bundle.name}-fp16 --precision fp16`" in sentence


@pytest.mark.parametrize(
    ("gpu", "options", "targets", "words"),
    [
        (NOWHERE, RTX, ["8.9"], "--target 8.9: write a compute capability, such as sm_89"),
        (NOWHERE, RTX, ["sm_89x"], "--target sm_89x"),
        (NOWHERE, RTX, ["sm_90"], "tensorrt-rtx 1.7.1 builds for sm_80, sm_89, sm_120, not for sm_90"),
        (LocalGpu("sm_90", None, 13000), RTX, [], "builds for sm_80, sm_89, sm_120, not for sm_90"),
        (NOWHERE, RTX, ["sm_75"], "no matrix product in fp32 for sm_75"),
        (HERE, Options("tensorrt"), ["sm_80"], "sm_89 here, not for sm_80; build on such a machine"),
        (NOWHERE, Options("tensorrt-rtx", timing_cache=Path("x")), ["sm_89"], "TensorRT-RTX measures nothing"),
        (HERE, Options("tensorrt", timing_cache=Path("/nowhere/x")), [], "there is no such folder"),
    ],
)
def test_options_that_cannot_work_are_refused(
    workshop: Workshop, bundle: Path, gpu: LocalGpu, options: Options, targets: list[str], words: str
) -> None:
    workshop.gpu = gpu
    assert words in refused(bundle, options, *targets)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (RTX, "there is no GPU here to build for (libcuda.so.1 is not there); name the one that is going to run"),
        (Options("tensorrt"), "none can be used here (libcuda.so.1 is not there); mend what `svcli doctor` says of it"),
    ],
)
@pytest.mark.usefixtures("workshop")
def test_no_gpu_where_one_is_needed_is_something_lacking(bundle: Path, options: Options, words: str) -> None:
    assert words in refused(bundle, options, error=MachineError)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Cuda("580.65", "13.0", (Gpu("RTX 4090", "8.9", 1), Gpu("old", "7.5", 1)), "nvidia-smi"), HERE),
        (Cuda("580.65", "12.4", (Gpu("B200", "10.0", 1),), "libcuda"), LocalGpu("sm_100", None, 12040)),
        (Cuda(problem="libcuda.so.1 is not there"), NOWHERE),
        (
            Cuda(
                "580.65", "13.0", (Gpu("RTX 4090", "8.9", 1),), "nvidia-smi", "the driver is too old for this library"
            ),
            LocalGpu(None, "the driver is too old for this library", 13000),
        ),
        (
            Cuda("580.65", "13.0", (Gpu("odd", None, 1),), "libcuda"),
            LocalGpu(None, "it does not say its compute capability", 13000),
        ),
    ],
)
def test_the_gpu_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, found: Cuda, expected: LocalGpu) -> None:
    monkeypatch.setattr(environment, "find_cuda", lambda: found)
    assert find_gpu() == expected


# From here on TensorRT-RTX itself builds, without a GPU. `make test` installs it.
PACKAGES = ("tensorrt_rtx", "polygraphy")
CI_TARGETS = ("sm_80", "sm_89", "sm_120")


@pytest.fixture(scope="module")
def rtx() -> None:
    if any(find_spec(name) is None for name in PACKAGES):
        missing("tensorrt-rtx")


@pytest.fixture(scope="module")
def bundled_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in fp16; its int8 weights stay as rounded as they are."""
    folder = tmp_path_factory.mktemp("bundled") / "bundle"
    export_bundle(bundled_model(), folder, precision="fp16")
    return folder


def assert_built(result: Result, bundle: Path, names: list[str]) -> None:
    for outcome in result.outcomes:
        assert list(outcome.built) == names
        record = load_record(outcome.plans)
        check_fits(outcome.plans, record, load_manifest(bundle))
        for name, plan in record.plans.items():
            # Nothing may be left out of a plan but what two names share: a tied head is the embedding's bytes.
            assert plan.size > plan.weight_bytes / 2, name
            assert plan.num_layers > 0
            assert plan.plugins == ()
        assert outcome.plans.folder.with_name(f"{outcome.plans.folder.name}.log").stat().st_size > 0


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_rtx_is_caught_where_a_cache_update_is_no_native_layer(bundle: Path) -> None:
    """The graph as it was exported: its caches are updated by ScatterElements."""
    contract = load_manifest(bundle).contract
    caches = {f"past_key_values.{layer}.key": f"present.{layer}.key" for layer in range(contract.num_layers)}
    job = Job(
        graph=bundle / "decode.onnx",
        plan=bundle / "decode.plan",
        target="sm_89",
        profiles=(phase_ranges(contract, "split", "decode"),),
        caches=caches,
        num_plugins=0,
    )
    with pytest.raises(BuildError, match=f"of {len(caches)} cache updates 0 are layers that write in place"):
        build_for_real(Task(backend="tensorrt-rtx", job=job), bundle / "log", lambda _: None)
    assert not job.plan.exists()


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("layout", "names", "targets"),
    [("split", SPLIT, CI_TARGETS), ("shared", SHARED, ("sm_89",))],
    ids=["split", "shared"],
)
def test_rtx_builds_the_bundled_model_for_every_target_that_is_promised(
    bundled_fp16: Path, tmp_path: Path, layout: EngineLayout, names: list[str], targets: tuple[str, ...]
) -> None:
    """Every cache update is a native layer, or the builder's own check would have ended it: see above."""
    bundle = Path(shutil.copytree(bundled_fp16, tmp_path / "bundle"))
    shares: list[float] = []
    options = Options("tensorrt-rtx", layout)
    result = build_plans(bundle, options, targets, lambda _what, done, total, _file: shares.append(done / total))
    assert [outcome.plans.target for outcome in result.outcomes] == list(targets)
    assert_built(result, bundle, names)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(outcome.built == () for outcome in build_plans(bundle, options, targets).outcomes)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_rtx_builds_decode_of_several_sequences(bundled_fp16: Path, tmp_path: Path) -> None:
    """Beside that of one, in one plan, with every cache update a native layer."""
    bundle = Path(shutil.copytree(bundled_fp16, tmp_path / "bundle"))
    result = build_plans(bundle, replace(RTX, num_sequences=8), CI_TARGETS)
    assert_built(result, bundle, SPLIT)
    for outcome in result.outcomes:
        assert outcome.record.num_sequences == 8
        one, several = outcome.record.plans["decode.plan"].profiles
        assert (one["input_ids"].max[0], several["input_ids"].max) == (1, (8, 1))


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_a_head_size_that_rtx_has_no_fused_kernel_for_is_built_all_the_same(bundle: Path) -> None:
    assert load_manifest(bundle).config.text.head_dim == 8
    assert_built(build_plans(bundle, RTX, ["sm_89"]), bundle, SPLIT)
