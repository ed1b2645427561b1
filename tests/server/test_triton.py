"""A model repository is written, and its model answers as the engine does; Triton's own side is a stand-in."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from svcli.app import app
from svcli.settings import bundled_model
from svcli.triton.config import COUNTS, INPUTS, OUTPUTS, answering_config
from svcli.triton.repository import RepositoryError, write_model
from svcli.triton.settings import SettingError, Settings
from svcli_engines.generate import Conversation
from svcli_engines.onnx_engine import OnnxEngine, OnnxPool
from svcli_engines.plans import (
    FORMAT_VERSION,
    Backend,
    PlanError,
    PlanFile,
    PlanRecord,
    PlanSet,
    built_from,
    plan_files,
    write_record,
)
from svcli_engines.processor import Processor
from svcli_export.chat import Message
from svcli_export.manifest import NoVariantError, file_entry, load_manifest
from tests.server import triton_stand_in as stand_in
from tests.server.triton_stand_in import Request, Sender

ROOT = Path(__file__).parents[2]
PICTURE = (ROOT / "examples" / "hamburgers.png").read_bytes()
QUESTION = "How many hamburgers are there?"
NAME = "tiny"
NO_QUESTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "one of text_input and messages is needed"),
    ({"text_input": b"a", "messages": b"[]"}, "one of text_input and messages is needed"),
    ({"text_input": b"  "}, "the question is empty"),
    ({"text_input": b"\xff"}, "text_input: not UTF-8"),
    ({"text_input": [b"a", b"b"]}, "text_input: one value is needed, not 2"),
    ({"text_input": b"a", "image": [b"bad"]}, "not a picture"),
    ({"text_input": b"a", "image": [b"data:image/png;base64,!"]}, "not base64"),
    ({"text_input": b"a", "image": [b"a"] * 9}, "image: 9 are more than"),
    ({"text_input": b"a", "temperature": -1.0}, "temperature must be 0 or more"),
    ({"text_input": b"a", "max_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"text_input": b"a", "stop": [b"a"] * 5}, "stop: more than 4"),
    ({"text_input": b"a " * 2000}, "rows of context"),
    ({"messages": b"{"}, "messages: invalid JSON"),
    ({"messages": b"\xff"}, "messages: invalid JSON"),
    ({"messages": b"[]"}, "messages: list should have at least 1 item"),
    ({"messages": b'[{"role": "user", "content": "a", "x": 1}]'}, "messages.0.x: extra inputs"),
    ({"messages": b'[{"role": "user", "content": [{"type": "image"}]}]'}, "image: 0 were sent"),
    ({"messages": b'[{"role": "assistant", "content": "a"}]'}, "the last must be a user's"),
]
NUMPY = {
    "TYPE_STRING": np.object_,
    "TYPE_BOOL": np.bool_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
}


def parsed(text: str) -> list[tuple[str, Any]]:
    """Protocol buffers' text format, as much of it as config.pbtxt has: fields in order, those with fields as lists."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|[{}\[\]:,]', text)
    assert "".join(tokens) == re.sub(r"\s", "", text)

    def value() -> Any:
        token = tokens.pop(0)
        if token == "{":
            return fields()
        if token == "[":
            found = []
            while tokens[0] != "]":
                found.append(value())
                if tokens[0] == ",":
                    tokens.pop(0)
            tokens.pop(0)
            return found
        return json.loads(token) if re.match(r'["\d-]|true|false', token) else token

    def fields() -> list[tuple[str, Any]]:
        found = []
        while tokens and tokens[0] != "}":
            name = tokens.pop(0)
            if tokens[0] == ":":
                tokens.pop(0)
            found.append((name, value()))
        if tokens:
            tokens.pop(0)
        return found

    return fields()


def inputs(**values: Any) -> dict[str, Any]:
    """Arrays of the types that config.pbtxt promises."""
    kinds = {each.name: NUMPY[each.kind] for each in INPUTS}
    return {
        name: np.array(value if isinstance(value, list) else [value], kinds.get(name, np.object_))
        for name, value in values.items()
    }


Opener = Callable[..., Any]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Writes a repository, and loads its model as Triton does."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    monkeypatch.setattr(stand_in.MetricFamily, "known", {})
    monkeypatch.setattr(stand_in.Logger, "errors", [])
    models = []

    def load(**options: Any) -> Any:
        settings = Settings(**{"threads": 1, "parallel": 2} | options)
        folder = write_model(bundled_model(), tmp_path, NAME, settings, overwrite=True)
        spec = importlib.util.spec_from_file_location("model_of_triton", folder / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        given = [value for name, value in parsed((folder / "config.pbtxt").read_text()) if name == "parameters"]
        parameters = {dict(each)["key"]: dict(dict(each)["value"]) for each in given}
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps({"parameters": parameters}),
                "model_repository": str(folder),
                "model_version": "1",
                "model_name": NAME,
            }
        )
        models.append(model)
        return model

    yield load
    for model in models:
        model.finalize()


def ask(model: Any, **values: Any) -> Sender:
    request = Request(inputs(**values))
    assert model.execute([request]) is None
    return request.sender


@cache
def said() -> str:
    """By the engine, without any server."""
    manifest = load_manifest(bundled_model())
    processor = Processor(bundled_model(), manifest)
    engine = OnnxEngine(bundled_model(), manifest, num_threads=1)
    image = Image.open(BytesIO(PICTURE)).convert("RGB")
    events = Conversation(engine, processor).answer([Message("user", QUESTION, images=1)], [image])
    text = "".join(event.text for event in events if hasattr(event, "text"))
    engine.close()
    return text


def write_plans(plans: PlanSet) -> None:
    """A whole plan set, but that its plans are nothing that TensorRT would load."""
    manifest = load_manifest(plans.bundle)
    contract = manifest.contract
    plans.folder.mkdir(parents=True)
    files = {}
    for name in plan_files("split"):
        (plans.folder / name).write_bytes(b"plan")
        entry = file_entry(plans.folder / name)
        files[name] = PlanFile(
            size=entry.size,
            sha256=entry.sha256,
            num_layers=1,
            scratch_bytes=None,
            weight_bytes=1,
            profiles=(),
            plugins=(),
            kernel_sha256="",
            build_seconds=1.0,
        )
    record = PlanRecord(
        format_version=FORMAT_VERSION,
        svcli="0",
        backend=plans.backend,
        backend_version="11.0",
        target=plans.target,
        layout="split",
        num_sequences=1,
        precision=contract.precision,
        max_context=contract.max_context,
        capacity=contract.capacity,
        sources=built_from(manifest),
        plans=files,
    )
    write_record(plans.folder, record)


def metric(name: str) -> float:
    return stand_in.MetricFamily.known[name].value


def until(name: str, value: float) -> None:
    deadline = monotonic() + stand_in.SECONDS
    while metric(name) != value:
        assert monotonic() < deadline, (name, metric(name))
        sleep(0.01)


def test_the_repository_holds_all_that_triton_needs(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["triton", str(bundled_model()), "-o", str(tmp_path), "--name", NAME])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / NAME}\n")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    bundle = {path.name for path in bundled_model().iterdir()} - {"README.md"}
    model = {f"{NAME}/config.pbtxt", f"{NAME}/1/model.py"}
    assert files == model | {f"{NAME}/1/bundle/{name}" for name in bundle}
    load_manifest(tmp_path / NAME / "1" / "bundle")


def test_the_bundled_model_is_written_where_none_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["triton", "-o", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / bundled_model().name}\n")


def test_a_disk_that_is_full_is_the_one_that_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, _place: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))

    def copy(source: Path, place: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(place))

    monkeypatch.setattr("svcli.triton.repository.os.link", link)
    monkeypatch.setattr("svcli.triton.repository.shutil.copyfile", copy)
    with pytest.raises(OSError, match="No space left") as caught:
        write_model(bundled_model(), tmp_path, NAME, Settings())
    assert caught.value.filename == str(tmp_path / NAME)
    assert not list(tmp_path.iterdir())


def test_weights_are_on_the_disk_once(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for path in bundled_model().iterdir():
        (bundle / path.name).write_bytes(path.read_bytes())
    folder = write_model(bundle, tmp_path / "models", NAME, Settings())
    assert (folder / "1" / "bundle" / "weights.safetensors").samefile(bundle / "weights.safetensors")


def test_the_config_says_what_the_model_takes_and_gives() -> None:
    settings = Settings(engine="tensorrt", variant="dense", threads=3, parallel=2, timeout=1.5)
    fields = parsed(answering_config('a"b', settings))
    single = {name: value for name, value in fields if name not in ("input", "output", "parameters")}
    assert single == {
        "name": 'a"b',
        "backend": "python",
        "max_batch_size": 0,
        "model_transaction_policy": [("decoupled", True)],
        "instance_group": [[("count", 1), ("kind", "KIND_GPU"), ("gpus", [0])]],
    }
    for field, tensors in (("input", INPUTS), ("output", OUTPUTS)):
        found = [dict(value) for name, value in fields if name == field]
        optional = {"optional": True} if field == "input" else {}
        assert found == [{"name": t.name, "data_type": t.kind, "dims": list(t.dims)} | optional for t in tensors]
    parameters = [dict(value) for name, value in fields if name == "parameters"]
    assert Settings.of({each["key"]: dict(each["value"])["string_value"] for each in parameters}) == settings


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"engine": "abacus"}, "there is no engine 'abacus'"),
        ({"queue": "many"}, "the parameter queue is no int: 'many'"),
        ({"colour": "red"}, "the parameter 'colour' is not known"),
    ],
)
def test_a_config_that_somebody_broke_is_refused(parameters: dict[str, str], problem: str) -> None:
    with pytest.raises(SettingError, match=re.escape(problem)):
        Settings.of(parameters)
    assert Settings.of({"EXECUTION_ENV_PATH": "/env.tar.gz"}) == Settings()


def test_what_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    folder = write_model(bundled_model(), tmp_path, NAME, Settings())
    with pytest.raises(RepositoryError, match="--overwrite"):
        write_model(bundled_model(), tmp_path, NAME, Settings())
    write_model(bundled_model(), tmp_path, NAME, Settings(queue=7), overwrite=True)
    assert '"7"' in (folder / "config.pbtxt").read_text()
    (folder / "2").mkdir()
    with pytest.raises(RepositoryError, match="no model of svcli's"):
        write_model(bundled_model(), tmp_path, NAME, Settings(), overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.pbtxt").write_text('backend: "python"\n')
    with pytest.raises(RepositoryError, match="no model of svcli's"):
        write_model(bundled_model(), tmp_path, "other", Settings(), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", NAME]  # and nothing half-written


def test_what_cannot_be_served_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("", "../up", "a/b", ".hidden"):
        with pytest.raises(RepositoryError, match="no name"):
            write_model(bundled_model(), tmp_path, name, Settings())
    with pytest.raises(NoVariantError):
        write_model(bundled_model(), tmp_path, NAME, Settings(variant="44/69"))
    with pytest.raises(RepositoryError, match="svcli build-engine"):
        write_model(bundled_model(), tmp_path, NAME, Settings(engine="tensorrt"))
    with pytest.raises(RepositoryError, match="variant"):
        write_model(bundled_model(), tmp_path, NAME, Settings(engine="tensorrt", variant="dense"))
    done = CliRunner().invoke(app, ["triton", str(tmp_path / "none"), "-o", str(tmp_path)])
    assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_plans_of_the_engine_come_along_and_damaged_ones_do_not(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundled_model(), bundle)
    built: list[tuple[Backend, str]] = [("tensorrt", "sm_80"), ("tensorrt", "sm_90"), ("tensorrt-rtx", "sm_90")]
    for backend, target in built:
        write_plans(PlanSet(bundle, backend, target))
    folder = write_model(bundle, tmp_path, NAME, Settings(engine="tensorrt"))
    plans = folder / "1" / "bundle" / "plans"
    assert sorted(path.name for path in plans.iterdir()) == ["tensorrt-sm_80", "tensorrt-sm_90"]
    assert sorted(path.name for path in (plans / "tensorrt-sm_80").iterdir()) == [
        "decode.plan",
        "plan.json",
        "prefill.plan",
        "vision.plan",
    ]
    assert not (write_model(bundle, tmp_path, "cpu", Settings()) / "1" / "bundle" / "plans").exists()
    (bundle / "plans" / "tensorrt-sm_90" / "decode.plan").write_bytes(b"PLAN")
    with pytest.raises(PlanError, match=r"decode\.plan was altered .*svcli build-engine"):
        write_model(bundle, tmp_path, "altered", Settings(engine="tensorrt"))
    assert not (tmp_path / "altered").exists()


def test_an_answer_is_the_engines(opened: Opener) -> None:
    (response,) = ask(opened(), text_input=QUESTION.encode(), image=[PICTURE]).all()
    assert response.error is None
    assert set(response.outputs) == {each.name for each in OUTPUTS}
    assert response.outputs["text_output"].decode() == said()
    assert response.outputs["finish_reason"] == b"stop"
    counts = {name: int(response.outputs[name]) for name in COUNTS}
    assert counts["visual_tokens"] == 256
    assert 0 < counts["visual_tokens_kept"] < counts["prompt_tokens"] < 256
    assert counts["cached_tokens"] == 0
    assert counts["completion_tokens"] > 0
    assert metric("svcli_rows_skipped_total") == 256 - counts["visual_tokens_kept"]
    for tensor, promised in zip(response.output_tensors, OUTPUTS, strict=True):
        assert (tensor.name(), tensor.as_numpy().dtype) == (promised.name, np.dtype(NUMPY[promised.kind]))


def test_a_stream_has_the_same_text_in_pieces_and_counts_last(opened: Opener) -> None:
    *pieces, last = ask(opened(), text_input=QUESTION.encode(), image=[PICTURE], stream=True).all()
    assert len(pieces) > 2
    assert all(set(each.outputs) == {"text_output"} for each in pieces)
    assert b"".join(each.outputs["text_output"] for each in pieces).decode() == said()
    assert last.outputs["text_output"] == b""
    assert last.outputs["finish_reason"] == b"stop"


def test_pictures_come_as_data_urls_too(opened: Opener) -> None:
    url = b"data:image/png;base64," + b64encode(PICTURE)
    (response,) = ask(opened(), text_input=QUESTION.encode(), image=[url]).all()
    assert response.outputs["text_output"].decode() == said()


def test_a_conversation_goes_on_in_the_cache(opened: Opener) -> None:
    model = opened()
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    (response,) = ask(model, messages=json.dumps([first]).encode(), image=[PICTURE]).all()
    text = response.outputs["text_output"].decode()
    assert text == said()
    turns = [first, {"role": "assistant", "content": text}, {"role": "user", "content": "Where?"}]
    (second,) = ask(model, messages=json.dumps(turns).encode(), image=[PICTURE]).all()
    assert second.outputs["cached_tokens"] > second.outputs["visual_tokens_kept"] > 0


def test_several_are_answered_side_by_side_as_one_alone(opened: Opener) -> None:
    model = opened()
    requests = [Request(inputs(text_input=QUESTION.encode(), image=[PICTURE])) for _ in range(6)]
    model.execute(requests)
    texts = {request.sender.all()[-1].outputs["text_output"] for request in requests}
    assert texts == {said().encode()}
    until("svcli_running", 0)


def test_max_tokens_and_stop_and_seed_are_obeyed(opened: Opener) -> None:
    model = opened()
    (short,) = ask(model, text_input=b"what is this?", max_tokens=2, min_tokens=2).all()
    assert (short.outputs["completion_tokens"], short.outputs["finish_reason"]) == (2, b"length")
    (whole,) = ask(model, text_input=QUESTION.encode(), image=[PICTURE]).all()
    (cut,) = ask(model, text_input=QUESTION.encode(), image=[PICTURE], stop=[b"hamb", b"zzz"]).all()
    assert cut.outputs["text_output"] == whole.outputs["text_output"].partition(b"hamb")[0]
    drawn = {
        ask(model, text_input=b"what is this?", temperature=1.5, seed=3, top_p=0.9).all()[0].outputs["text_output"]
        for _ in range(3)
    }
    assert len(drawn) == 1


def test_what_is_no_question_is_told_in_one_sentence(opened: Opener) -> None:
    model = opened()
    for values, problem in NO_QUESTIONS:
        (response,) = ask(model, **values).all()
        assert response.refusal.code == stand_in.TritonError.INVALID_ARG, values
        assert problem in response.refusal.message
        assert "\n" not in response.refusal.message
    (after,) = ask(model, text_input=b"what is this?").all()
    assert after.error is None


def test_a_picture_is_refused_by_its_size_before_it_is_decoded(opened: Opener) -> None:
    (response,) = ask(opened(max_pixels=0.01), text_input=b"a", image=[PICTURE]).all()
    assert "more than 0.01 megapixels" in response.refusal.message


def test_more_than_may_wait_are_refused_and_the_rest_answered(opened: Opener) -> None:
    model = opened(parallel=1, queue=2)
    requests = [Request(inputs(text_input=b"what?", min_tokens=50, max_tokens=50)) for _ in range(12)]
    model.execute(requests)
    last = [request.sender.all()[-1] for request in requests]
    refused = [each for each in last if each.error is not None]
    assert refused
    assert {each.refusal.code for each in refused} == {stand_in.TritonError.UNAVAILABLE}
    answered = [each for each in last if each.error is None]
    assert len(answered) >= 3
    assert all(each.outputs["completion_tokens"] == 50 for each in answered)


def test_what_was_cancelled_is_not_computed(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(parallel=1)
    monkeypatch.setattr("svcli.triton.model._LOOK_SECONDS", 0.001)
    request = Request(inputs(text_input=b"what?", min_tokens=600, max_tokens=600, stream=True))
    request.sender.cancelled = True
    model.execute([request])
    last = request.sender.all()[-1]
    assert last.refusal.code == stand_in.TritonError.CANCELLED
    until("svcli_running", 0)
    (after,) = ask(model, text_input=b"what is this?").all()
    assert metric("svcli_completion_tokens_total") == after.outputs["completion_tokens"]


def test_a_caller_who_goes_away_is_noticed_in_the_middle(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    model, num_steps, step = opened(parallel=1), 0, OnnxPool.step

    def slow(pool: OnnxPool, new_ids: Mapping[int, int]) -> Any:
        nonlocal num_steps
        num_steps += 1
        sleep(0.01)
        return step(pool, new_ids)

    monkeypatch.setattr(OnnxPool, "step", slow)
    sender = ask(model, text_input=b"what?", min_tokens=600, max_tokens=600, stream=True)
    deadline = monotonic() + stand_in.SECONDS
    while not sender.responses:
        assert monotonic() < deadline
        sleep(0.001)
    sender.cancelled = True
    assert sender.all()[-1].refusal.code == stand_in.TritonError.CANCELLED
    until("svcli_running", 0)
    assert 0 < num_steps < 500


def test_what_is_late_is_told(opened: Opener) -> None:
    model = opened()
    request = Request(inputs(text_input=b"what?"), timeout=1)
    model.execute([request])
    (response,) = request.sender.all()
    assert response.refusal.code == stand_in.TritonError.UNAVAILABLE
    assert "not there in time" in response.refusal.message


def test_unloading_ends_what_was_taken(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    requests = [Request(inputs(text_input=b"what?", min_tokens=20, max_tokens=20)) for _ in range(4)]
    model.execute(requests)
    model.finalize()
    assert all(request.sender.all()[-1].outputs["completion_tokens"] == 20 for request in requests)
    monkeypatch.setattr(model, "finalize", lambda: None)


def test_a_defect_is_told_without_its_details(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    monkeypatch.setattr("svcli_engines.onnx_engine.OnnxSlot.append", lambda *_: 1 / 0)
    (response,) = ask(model, text_input=b"what?").all()
    assert response.refusal.code == stand_in.TritonError.INTERNAL
    assert "ZeroDivision" not in response.refusal.message
    assert any("ZeroDivision" in line for line in stand_in.Logger.errors)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_the_scheduler_has_died_it_is_said(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    assert metric("svcli_alive") == 1
    monkeypatch.setattr("svcli_engines.schedule.Scheduler._step", lambda _: 1 / 0)
    first = ask(model, text_input=b"what?").all()[-1]
    assert first.refusal.code == stand_in.TritonError.INTERNAL
    until("svcli_alive", 0)
    assert ask(model, text_input=b"what?").all()[-1].refusal.code == stand_in.TritonError.UNAVAILABLE


def test_a_bundle_that_was_damaged_is_not_loaded(opened: Opener, tmp_path: Path) -> None:
    model = opened()
    folder = tmp_path / NAME
    (folder / "1" / "bundle" / "tokenizer.json").unlink()
    args = {"model_config": "{}", "model_repository": str(folder), "model_version": "1", "model_name": NAME}
    with pytest.raises(stand_in.TritonModelException, match=r"tokenizer\.json is missing"):
        type(model)().initialize(args)
