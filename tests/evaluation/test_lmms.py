"""A bundle as a model of lmms-eval: in the real package where it is installed, else in a stand-in of its interface."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from svcli_engines.base import MachineError
from tests.optional import missing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "models" / "skipvision-tiny"
PICTURE = ROOT / "examples" / "hamburgers.png"
ASKED = "How many hamburgers are there?"
TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: DATA
task: counted
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.shown
doc_to_text: !function pictures.asked
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
process_results: !function pictures.judged
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
CODE = """
from PIL import Image

def shown(doc):
    return [Image.open(doc["image"])]

def asked(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def judged(doc, results):
    return {"right": float(doc["answer"] in results[0])}
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`svcli.evaluation.lmms` with the parts of lmms-eval 0.7.3 that it uses, as they are there."""

    class Base:
        def __init__(self) -> None:
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
            self.task_dict: dict[str, Any] = {}

    model = ModuleType("lmms_eval.api.model")
    model.lmms = Base  # type: ignore[attr-defined]
    for name, module in {
        "lmms_eval": ModuleType("lmms_eval"),
        "lmms_eval.api": ModuleType("lmms_eval.api"),
        "lmms_eval.api.model": model,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "svcli.evaluation.lmms", raising=False)
    yield importlib.import_module("svcli.evaluation.lmms")
    sys.modules.pop("svcli.evaluation.lmms", None)


def request(context: str, settings: dict[str, Any], number: int = 0) -> SimpleNamespace:
    """As tasks that generate text make them."""
    return SimpleNamespace(args=(context, settings, lambda record: [record["image"]], number, "counted", "test"))


def test_questions_are_answered(stand_in: Any) -> None:
    model = stand_in.Svcli(bundle=str(BUNDLE), threads=1, batch_size=1, device="cpu", max_batch_size=None)
    with Image.open(PICTURE) as picture:
        model.task_dict = {"counted": {"test": [{"image": picture.convert("RGBA")}, {"image": "film.mp4"}]}}
        right, short = model.generate_until(
            [request(f"<image>\n{ASKED}", {"until": ["\n\n"]}), request(ASKED, {"max_new_tokens": 2, "until": "zzz"})]
        )
        assert right == "There are 6 hamburgers."
        assert right.startswith(short)
        assert 0 < len(short) < len(right)
        (cut,) = model.generate_until([request(ASKED, {"until": [" 6"], "temperature": 0, "do_sample": False})])
        assert cut == "There are"
        with pytest.raises(ValueError, match="the task has a str"):
            model.generate_until([request(ASKED, {}, number=1)])


def test_a_question_that_cannot_be_asked_is_said(stand_in: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = stand_in.Svcli(threads=1)
    with Image.open(PICTURE) as picture:
        model.task_dict = {"counted": {"test": [{"image": picture.copy()}]}}
    with caplog.at_level(logging.WARNING):
        assert model.generate_until([request("word " * 2000, {})]) == [""]
    assert "counted, test 0: not asked: the conversation needs" in caplog.text


def test_a_machine_that_fails_is_no_wrong_answer(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stand_in.Svcli(asker="blind", threads=1)
    model.task_dict = {"counted": {"test": [{"image": None}]}}

    def fail(*_: object) -> None:
        raise MachineError("no memory left on the GPU")

    monkeypatch.setattr(model.asker, "ask", fail)
    with pytest.raises(MachineError, match="no memory"):
        model.generate_until([SimpleNamespace(args=(ASKED, {}, lambda _: [], 0, "counted", "test"))])


def test_what_is_not_there_is_refused(stand_in: Any) -> None:
    model = stand_in.Svcli(asker="blind", threads=1)
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="svcli answers tasks"):
            ask([])
    with pytest.raises(ValueError, match="no beam search"):
        stand_in.sampling_of({"num_beams": 4})


def test_it_is_found_by_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    place = project["entry-points"]["lmms_eval.models"]["svcli"]
    module, _, name = place.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_real_lmms_eval_runs_a_task(tmp_path: Path) -> None:
    if importlib.util.find_spec("lmms_eval") is None:
        missing("lmms-eval")
    record = {"image": str(PICTURE), "question": ASKED, "answer": "6"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "counted.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    (tmp_path / "pictures.py").write_text(CODE)
    places = os.pathsep.join(str(ROOT / folder) for folder in ("", "export", "engines"))
    words = ["--model", "svcli", "--model_args", f"bundle={BUNDLE},threads=1", "--include_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words, "--tasks", "counted", "--output_path", str(tmp_path / "out")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["counted"]["right,none"] == 1.0
