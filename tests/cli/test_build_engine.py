"""`svcli build-engine` passes its options on, shows what it built, and says what is lacking; chat and inspect use it.

The builder is one that only writes its name (tests/engines/workshop.py); chat runs plans on a fake GPU.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from svcli.app import app
from svcli.engines import EngineName, open_pool
from svcli.errors import explain
from svcli_engines import tensorrt_engine
from svcli_engines.base import MachineError
from svcli_engines.build_options import BuildOptionError, LocalGpu
from svcli_engines.builder_process import BuildError
from svcli_engines.plans import Backend, PlanSet
from svcli_export.bundle import export_bundle
from svcli_export.manifest import load_manifest
from tests.engines import fake_tensorrt
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRT
from tests.engines.workshop import HERE, NOWHERE, SHARED, SPLIT, VERSION, Workshop, open_workshop

RTX = ("--backend", "tensorrt-rtx", "--target", "sm_89")
SET = f"tensorrt-rtx {VERSION} for sm_89, split layout, fp16"


def svcli(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return open_workshop(monkeypatch)


@pytest.fixture(scope="module")
def exported_fp16(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("fp16_bundle")
    export_bundle(checkpoint, folder, precision="fp16", max_context=96, max_images=2)
    return folder


@pytest.fixture
def fp16(exported_fp16: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_fp16, tmp_path / "bundle"))


@pytest.mark.usefixtures("workshop")
def test_plans_are_shown_with_the_memory_that_either_layout_takes(fp16: Path) -> None:
    done = svcli("build-engine", fp16, *RTX)
    shown = lines(done.stdout)
    assert shown[0] == f"{fp16}/plans/tensorrt-rtx-sm_89: {SET}"
    # 2 layers, 2 KV heads of 8, in fp16; of 16 patches 4 retained and 2 summaries are kept, of 2 pictures.
    assert shown[1] == "KV cache 6.0→4.8 KiB a layer, 96→76 rows; prompts up to 96 rows"
    assert [line.split()[:2] for line in shown[3:6]] == [[name, "7"] for name in SPLIT]
    assert all(line.endswith("none built in 1.00 s") for line in shown[3:6])
    assert any(re.fullmatch("weights, split .+: prefill and decode hold a copy each, as built", line) for line in shown)
    assert any(re.fullmatch("weights, shared .+: prefill and decode share one copy", line) for line in shown)
    contract = load_manifest(fp16).contract
    assert any(line.startswith("KV cache ") and line.endswith(f", {contract.capacity} rows") for line in shown)
    assert done.stderr.startswith("building plans 0% tensorrt-rtx-sm_89/vision.plan\n")
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.usefixtures("workshop")
def test_a_second_time_says_up_to_date(fp16: Path) -> None:
    svcli("build-engine", fp16, *RTX)
    done = svcli("build-engine", fp16, *RTX)
    assert sum(line.endswith("none up to date") for line in lines(done.stdout)) == len(SPLIT)
    assert done.stderr == ""


@pytest.mark.usefixtures("workshop")
def test_json_has_everything_under_keys_that_stay(fp16: Path) -> None:
    said = json.loads(svcli("build-engine", fp16, *RTX, "--json").stdout)
    assert list(said) == ["bundle", "kv_cache_bytes", "weight_bytes_by_layout", "plan_sets"]
    assert said["bundle"] == str(fp16)
    assert list(said["weight_bytes_by_layout"]) == ["split", "shared"]
    (plans,) = said["plan_sets"]
    assert list(plans) == ["path", "weight_bytes", "scratch_bytes", "record", "built", "up_to_date"]
    assert (plans["built"], plans["up_to_date"], plans["scratch_bytes"]) == (SPLIT, False, None)
    assert plans["record"] == json.loads((Path(plans["path"]) / "plan.json").read_text())
    again = json.loads(svcli("build-engine", fp16, *RTX, "--json").stdout)
    assert (again["plan_sets"][0]["built"], again["plan_sets"][0]["up_to_date"]) == ([], True)


def test_options_reach_the_builder(workshop: Workshop, fp16: Path, tmp_path: Path) -> None:
    workshop.gpu = HERE
    cache = tmp_path / "timings"
    options = ["--engine-layout", "shared", "--workspace", "3", "--max-context", "64", "--timing-cache", str(cache)]
    svcli("build-engine", fp16, *options)
    assert [job.plan.name for job in workshop.jobs] == SHARED
    for job in workshop.jobs:
        assert (job.target, job.workspace, job.timing_cache, job.runs_here) == ("sm_89", 3 << 20, cache, True)
    assert workshop.jobs[1].profiles[0]["input_ids"].max[1] == load_manifest(fp16).contract.capacity - (96 - 64)


def test_plans_for_several_sequences_have_kernels_for_one_too(
    workshop: Workshop, checkpoint: Path, tmp_path: Path
) -> None:
    fp16 = tmp_path / "bundle"
    export_bundle(checkpoint, fp16, precision="fp16", max_context=100, max_images=2)
    shown = lines(svcli("build-engine", fp16, *RTX, "--sequences", "4").stdout)
    assert shown[1].endswith("prompts up to 100 rows; 4 sequences at a time")
    assert any(line.endswith(", 80 rows, for each of 4 sequences") for line in shown)
    *others, decode = workshop.jobs
    assert [len(job.profiles) for job in others] == [1, 1]
    one, several = decode.profiles
    assert (one["write_index"].max, several["write_index"].min, several["write_index"].max) == ((1,), (1,), (4,))
    workshop.jobs.clear()
    svcli("build-engine", fp16, *RTX)
    assert workshop.taken() == ["decode.plan"]


def test_several_targets_are_several_sets(workshop: Workshop, fp16: Path) -> None:
    said = json.loads(svcli("build-engine", fp16, *RTX, "--target", "sm_120", "--json").stdout)
    assert [plans["record"]["target"] for plans in said["plan_sets"]] == ["sm_89", "sm_120"]
    assert workshop.taken() == SPLIT * 2


@pytest.mark.parametrize(
    ("options", "gpu", "code", "words"),
    [
        ([], NOWHERE, 3, "TensorRT builds on the GPU that runs the plans"),
        (["--backend", "tensorrt-rtx"], NOWHERE, 3, "such as --target sm_89"),
        (["--target", "sm_80"], HERE, 2, "not for sm_80"),
        ([*RTX, "--max-context", "1000"], NOWHERE, 2, "-long --precision fp16 --max-context 1000`"),
        ([*RTX, "--max-context", "20"], NOWHERE, 2, "no room for text"),
        ([*RTX, "--timing-cache", "x"], NOWHERE, 2, "leave it out"),
        ([*RTX, "--sequences", "2", "--engine-layout", "shared"], NOWHERE, 2, "a shared decoder runs one sequence"),
        ([*RTX, "--sequences", "2"], NOWHERE, 2, "-long --precision fp16 --max-context 100`"),
    ],
)
def test_what_cannot_be_built_is_one_sentence_and_the_fitting_exit_code(
    workshop: Workshop, fp16: Path, options: list[str], gpu: LocalGpu, code: int, words: str
) -> None:
    workshop.gpu = gpu
    done = svcli("build-engine", fp16, *options, code=code)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert words in line


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "openvino"],
        ["--engine-layout", "none"],
        ["--workspace", "0"],
        ["--max-context", "0"],
        ["--sequences", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(fp16: Path, options: list[str]) -> None:
    assert options[0] in svcli("build-engine", fp16, *options, code=2).stderr


@pytest.mark.usefixtures("workshop")
def test_int8_is_refused_with_an_export_that_mends_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_bundle(checkpoint, tmp_path / "in t8", precision="int8", max_context=96, max_images=2)
    refusal = svcli("build-engine", "in t8", *RTX, code=2).stderr
    _, *remedy = shlex.split(refusal.split("`")[1])
    svcli(*remedy)
    svcli("build-engine", "in t8-fp16", *RTX, "--max-context", "96")


def test_no_bundle_is_one_sentence(tmp_path: Path) -> None:
    assert "no such bundle folder" in svcli("build-engine", tmp_path / "none", *RTX, code=2).stderr


def test_a_failed_build_is_exit_code_1_and_leaves_no_plans(workshop: Workshop, fp16: Path) -> None:
    workshop.fails = {"decode.plan": BuildError("decode.plan could not be built: no kernel; the whole log is x.log")}
    done = svcli("build-engine", fp16, *RTX, code=1)
    assert done.stderr.splitlines()[-1].startswith("Error: decode.plan could not be built: no kernel")
    assert not (fp16 / "plans" / "tensorrt-rtx-sm_89").exists()


def test_what_a_machine_lacks_is_exit_code_3() -> None:
    assert explain(MachineError("install it")) == ("install it", 3)
    assert explain(BuildOptionError("write sm_89")) == ("write sm_89", 2)
    assert explain(BuildError("no kernel")) == ("no kernel", 1)


def test_every_option_explains_itself() -> None:
    shown = svcli("build-engine", "--help").stdout
    options = [line for line in shown.splitlines() if line.startswith("  -")]
    assert len(options) == 9
    assert all(re.search(r"\S  +\S", line) for line in options), shown


@pytest.mark.usefixtures("workshop")
def test_inspect_shows_plans(fp16: Path) -> None:
    assert json.loads(svcli("inspect", fp16, "--json").stdout)["plans"] == []
    svcli("build-engine", fp16, *RTX)
    done = svcli("inspect", fp16)
    assert done.stderr == ""
    shown = lines(done.stdout)
    title = f"{fp16}/plans/tensorrt-rtx-sm_89: {SET}"
    assert shown[shown.index(title) + 1].startswith("KV cache 6.0→4.8 KiB a layer")
    first = shown.index(title) + 3
    assert [line.split()[0] for line in shown[first : first + 3]] == SPLIT
    assert all(line.endswith("none ok") for line in shown[first : first + 3])
    (plans,) = json.loads(svcli("inspect", fp16, "--json").stdout)["plans"]
    assert plans["problem"] is None
    assert plans["record"]["plans"]["decode.plan"]["num_layers"] == 7


@pytest.mark.usefixtures("workshop")
def test_inspect_names_plans_that_do_not_fit_and_what_mends_them(fp16: Path) -> None:
    svcli("build-engine", fp16, *RTX, "--target", "sm_120")
    (fp16 / "plans" / "tensorrt-rtx-sm_89" / "decode.plan").unlink()
    (fp16 / "plans" / "tensorrt-rtx-sm_120" / "plan.json").write_text("{}")
    done = svcli("inspect", fp16, code=1)
    note, error = done.stderr.splitlines()
    assert note.startswith("Note: ")
    assert "tensorrt-rtx-sm_89: decode.plan is missing; build them again with `svcli build-engine" in note
    assert error.startswith("Error: ")
    assert "--target sm_120`" in error
    shown = lines(done.stdout)
    assert f"{fp16}/plans/tensorrt-rtx-sm_120: unreadable" in shown
    assert [line.rpartition("none ")[2] for line in shown if line.partition(" ")[0] in SPLIT] == [
        "ok",
        "ok",
        "is missing",
    ]
    said = json.loads(svcli("inspect", fp16, "--json", code=1).stdout)["plans"]
    assert [plans["record"] is None for plans in said] == [True, False]
    assert all("build them again" in plans["problem"] for plans in said)


@pytest.mark.usefixtures("workshop")
def test_inspect_tells_plans_of_another_bundle_from_damaged_ones(fp16: Path) -> None:
    svcli("build-engine", fp16, *RTX)
    record = fp16 / "plans" / "tensorrt-rtx-sm_89" / "plan.json"
    data = json.loads(record.read_text())
    data["sources"]["decode.onnx"] = "0"
    record.write_text(json.dumps(data))
    shown = lines(svcli("inspect", fp16, code=1).stdout)
    assert sum(line.endswith("none does not fit") for line in shown) == len(SPLIT)
    record.unlink()
    done = svcli("inspect", fp16, code=1)
    assert f"{record.parent}: unreadable" in lines(done.stdout)
    assert "plan.json is missing; build them again with" in done.stderr


class Gpu:
    """The engine that chat opens runs on this one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, rtx: bool) -> None:
        self.cuda = FakeCuda()
        engine = partial(tensorrt_engine.TensorRTEngine, tensorrt=FakeTensorRT(self.cuda, rtx=rtx), cuda=self.cuda)
        monkeypatch.setattr(tensorrt_engine, "TensorRTEngine", engine)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_chat_on_plans_answers_as_on_onnxruntime(
    bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    planned = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    fake_tensorrt.build_plans(planned, load_manifest(planned), "split", backend)
    gpu = Gpu(monkeypatch, rtx=backend == "tensorrt-rtx")

    def said(*options: str) -> dict[str, Any]:
        done = svcli("chat", picture, "what is this?", "--model", planned, "--max-new-tokens", "5", "--json", *options)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    found, expected = said("--engine", backend), said()
    assert found["engine"] == f"{backend}-sm_89"
    assert found["answer"] == expected["answer"]
    assert found["kv_cache"] == expected["kv_cache"]
    gpu.cuda.check_released()


def test_many_answers_take_as_many_slots_as_the_plans_are_for(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, manifest = Path(shutil.copytree(bundle, tmp_path / "bundle")), load_manifest(bundle)
    fake_tensorrt.build_plans(planned, manifest, "split", num_sequences=3)
    cuda = FakeCuda()
    pool = partial(tensorrt_engine.TensorRTPool, tensorrt=FakeTensorRT(cuda), cuda=cuda)
    monkeypatch.setattr(tensorrt_engine, "TensorRTPool", pool)
    for parallel, num_slots in ((None, 3), (2, 2)):
        with closing(open_pool(EngineName.TENSORRT, planned, manifest, parallel=parallel)) as opened:
            assert len(opened.slots) == num_slots
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "what is this?"}\n' * 4)
    asked: list[str | Path] = ["ask", questions, "--model", planned, "--engine", "tensorrt", "--max-new-tokens", "4"]
    svcli(*asked, "-o", tmp_path / "answers.jsonl")
    told = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(told) == 4
    assert len(set(told)) == 1
    refused = svcli(*asked, "-o", tmp_path / "others.jsonl", "--parallel", "4", code=1)
    assert refused.stderr.count("\n") == 1
    assert "built for 3 sequences at a time, and 4 are asked for; build them again with `svcli" in refused.stderr
    cuda.check_released()


def test_many_answers_on_pytorch_have_slots_of_their_own(bundle: Path) -> None:
    with closing(open_pool(EngineName.TORCH, bundle, load_manifest(bundle), parallel=3)) as pool:
        assert [slot.name for slot in pool.slots] == ["torch-cpu"] * 3


def test_chat_without_plans_names_the_command_that_builds_them(
    bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch, rtx=False)
    done = svcli("chat", picture, "what?", "--model", bundle, "--engine", "tensorrt", code=1)
    assert PlanSet(bundle, "tensorrt", "sm_89").command in done.stderr
    assert done.stdout == ""
    gpu.cuda.check_released()


def test_threads_are_for_onnxruntime(bundle: Path, picture: Path) -> None:
    options = ["--engine", "tensorrt", "--threads", "2"]
    assert "--threads is for onnxruntime" in svcli("chat", picture, "what?", "--model", bundle, *options, code=2).stderr
