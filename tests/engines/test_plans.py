"""plan.json says what plans were built from and for; what does not fit is refused with the command that mends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svcli_engines.plans import (
    MAX_NEW,
    PlanError,
    PlanRecord,
    PlanSet,
    RuntimeFacts,
    built_from,
    check_fits,
    check_sequences,
    find_plan_sets,
    load_record,
    phase_ranges,
    phase_spec,
    plan_files,
    write_record,
)
from svcli_export.contract import GraphName
from tests.engines.conftest import Exported
from tests.engines.fake_tensorrt import TARGET, VERSION, build_plans
from tests.export.tiny import SKIP

FACTS = RuntimeFacts("tensorrt", VERSION, TARGET)


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.bundle, tmp_path / "a bundle"))


@pytest.fixture
def plans(exported: Exported, bundle: Path) -> PlanSet:
    return build_plans(bundle, exported.manifest, "split")


def change(plans: PlanSet, edit: Callable[[dict[str, Any]], None]) -> None:
    path = plans.folder / "plan.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def refused(plans: PlanSet, exported: Exported, facts: RuntimeFacts | None = FACTS) -> str:
    with pytest.raises(PlanError) as refusal:
        check_fits(plans, load_record(plans), exported.manifest, facts)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert f"svcli build-engine '{plans.bundle}' --backend " in sentence
    return sentence


@pytest.mark.parametrize("layout", ["split", "shared"])
def test_what_was_just_built_fits(exported: Exported, bundle: Path, layout: Any) -> None:
    plans = build_plans(bundle, exported.manifest, layout)
    record = load_record(plans)
    check_fits(plans, record, exported.manifest, FACTS)
    assert record.layout == layout
    assert set(record.plans) == {path.name for path in plans.folder.glob("*.plan")} == set(plan_files(layout))
    assert not list(plans.folder.glob("*.tmp"))


def test_record_comes_back_as_it_was_written(plans: PlanSet) -> None:
    record = load_record(plans)
    write_record(plans.folder, record)
    assert load_record(plans) == record


def test_all_plan_sets_are_found(exported: Exported, bundle: Path) -> None:
    assert find_plan_sets(bundle) == []
    one = build_plans(bundle, exported.manifest, "split")
    other = build_plans(bundle, exported.manifest, "split", "tensorrt-rtx")
    (bundle / "plans" / "tensorrt-sm_75").mkdir()
    assert find_plan_sets(bundle) == [other, one]
    assert one.folder == bundle / "plans" / "tensorrt-sm_89"


def test_sources_are_the_graphs_and_the_weights(exported: Exported) -> None:
    assert set(built_from(exported.manifest)) == {"vision.onnx", "prefill.onnx", "decode.onnx", "weights.safetensors"}


def test_bundle_without_plans_names_the_command(bundle: Path) -> None:
    with pytest.raises(PlanError, match="has no plans of tensorrt-rtx for sm_120; build them with `svcli build-engine"):
        load_record(PlanSet(bundle, "tensorrt-rtx", "sm_120"))


@pytest.mark.parametrize(
    ("facts", "problem", "remedy"),
    [
        (replace(FACTS, version="11.4.0"), "tensorrt 10.15.1 built them and 11.4.0 is installed", "--target sm_89"),
        (replace(FACTS, target="sm_120"), "they are for sm_89 and this GPU is sm_120", "--target sm_120"),
        (replace(FACTS, backend="tensorrt-rtx"), "tensorrt-rtx is to run them", "--backend tensorrt-rtx"),
    ],
    ids=["version", "gpu", "flavour"],
)
def test_other_runtime_is_refused(
    exported: Exported, plans: PlanSet, facts: RuntimeFacts, problem: str, remedy: str
) -> None:
    sentence = refused(plans, exported, facts)
    assert problem in sentence
    assert remedy in sentence
    check_fits(plans, load_record(plans), exported.manifest)  # nothing is asked of a run time that is not named


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda record: record.update(format_version=1), "its format 1 is not the 2"),
        (lambda record: record.pop("format_version"), "its format None"),
        (lambda record: record.update(max_context=512), "built for 512 rows of context"),
        (lambda record: record.update(capacity=99), "(99 cached)"),
        (lambda record: record.update(precision="fp16"), "in fp16, and the bundle has"),
        (lambda record: record["sources"].update({"decode.onnx": "0"}), "decode.onnx has changed"),
        (lambda record: record["sources"].pop("weights.safetensors"), "weights.safetensors has changed"),
        (lambda record: record.update(colour="red"), "colour: Extra inputs"),
        (lambda record: record.pop("num_sequences"), "num_sequences: Field required"),
        (lambda record: record.update(num_sequences=0), "num_sequences: Input should be greater than 0"),
        (lambda record: record.pop("layout"), "layout: Field required"),
        (lambda record: record["plans"].pop("vision.plan"), "layout split has the plans"),
        (lambda record: record["plans"]["vision.plan"].update(size=0), "vision.plan.size"),
        (lambda record: record.update(target="sm_75"), "the plans in it are of tensorrt for sm_75"),
    ],
)
def test_other_record_is_refused(
    exported: Exported, plans: PlanSet, edit: Callable[[dict[str, Any]], None], problem: str
) -> None:
    change(plans, edit)
    assert problem in refused(plans, exported)


@pytest.mark.parametrize("text", ["", "[1]", '"x"', "\x00", '{"format_version": 1', "[" * 100_000])
def test_damaged_record_is_refused(exported: Exported, plans: PlanSet, text: str) -> None:
    (plans.folder / "plan.json").write_text(text)
    assert "plan.json is" in refused(plans, exported)


def test_plan_that_is_gone_cut_or_altered_is_refused(exported: Exported, plans: PlanSet) -> None:
    path = plans.folder / "decode.plan"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"decode.plan has {len(whole) - 1} bytes instead of {len(whole)}" in refused(plans, exported)
    path.write_bytes(whole[:-1] + b"?")
    assert "decode.plan was altered" in refused(plans, exported)
    check_fits(plans, load_record(plans), exported.manifest, check_files=False)
    path.unlink()
    assert "decode.plan is missing" in refused(plans, exported)


def test_prefill_and_decode_have_the_ranges_that_the_engine_needs(exported: Exported) -> None:
    contract = exported.manifest.contract
    phases: tuple[GraphName, ...] = ("vision", "prefill", "decode")
    ranges = {phase: phase_ranges(contract, "split", phase) for phase in phases}
    for name, phase in ranges.items():
        # A prefill of its own begins with an empty cache.
        assert phase.keys() == set(contract.graph(name).input_names) - ({"write_index"} if name == "prefill" else set())
        for each in phase.values():
            assert all(1 <= low <= usual <= high for low, usual, high in zip(each.min, each.opt, each.max, strict=True))
    prefill, decode = ranges["prefill"], ranges["decode"]
    assert prefill["visual"].min[0] == 1
    assert prefill["visual"].max[0] == ranges["vision"]["pixels"].max[0] == contract.max_images
    assert prefill["kept_index"].max == (1, contract.capacity)
    assert prefill["position_ids"].max == (1, contract.max_positions)
    assert prefill["position_ids"].opt[1] - prefill["kept_index"].opt[1] == SKIP.num_skipped
    assert decode["input_ids"].opt == (1, 1)
    assert decode["input_ids"].max == (1, min(MAX_NEW, contract.capacity))
    assert decode["past_key_values.0.key"].min == decode["past_key_values.0.key"].max == contract.cache_shape


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_shared_decoder_is_prefill_behind_a_cache(exported: Exported, phase: GraphName) -> None:
    contract = exported.manifest.contract
    names = phase_spec(contract, "shared", phase).input_names
    assert names == contract.graph("prefill").input_names
    assert "write_index" in names
    assert phase_spec(contract, "shared", "vision") == contract.graph("vision")
    ranges = phase_ranges(contract, "shared", phase)
    assert ranges.keys() == set(names)
    if phase == "decode":
        rows = {ranges[name].max for name in ("input_ids", "source", "position_ids", "visible_until", "kept_index")}
        assert rows == {(1, min(MAX_NEW, contract.capacity))}
        assert ranges["visual"].min == ranges["visual"].max


def test_several_sequences_have_a_profile_beside_that_of_one(exported: Exported) -> None:
    contract = exported.manifest.contract
    assert phase_ranges(contract, "split", "decode", 4) == phase_ranges(contract, "split", "decode")
    assert phase_ranges(contract, "split", "prefill", 4) == phase_ranges(contract, "split", "prefill")
    for name, each in phase_ranges(contract, "split", "batch", 4).items():
        rest = contract.cache_shape[1:] if name.startswith("past") else (() if name == "write_index" else (1,))
        assert (each.min, each.opt, each.max) == ((1, *rest), (4, *rest), (4, *rest))
    assert phase_spec(contract, "split", "batch", 4).inputs[0].shape == ("num_sequences", "num_new")
    assert phase_spec(contract, "split", "decode", 1).inputs[0].shape == (1, "num_new")


def test_plans_for_several_sequences_are_built_again_for_as_many(exported: Exported, bundle: Path) -> None:
    plans = build_plans(bundle, exported.manifest, "split", num_sequences=4)
    record = load_record(plans)
    (plans.folder / "decode.plan").unlink()
    assert refused(plans, exported).endswith("--target sm_89 --sequences 4`")
    check_sequences(plans, record, 4)
    with pytest.raises(PlanError, match=r"built for 4 sequences at a time, and 5 are asked for; .* --sequences 5`"):
        check_sequences(plans.as_built(record, exported.manifest.contract), record, 5)
    shared = build_plans(bundle, exported.manifest, "shared")
    change(shared, lambda data: data.update(num_sequences=4))
    assert "layout shared runs one sequence, not 4" in refused(shared, exported)


def test_record_is_a_closed_value(plans: PlanSet) -> None:
    record = load_record(plans)
    assert PlanRecord.model_validate_json(record.model_dump_json()) == record
