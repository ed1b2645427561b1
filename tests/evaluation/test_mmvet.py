"""MM-Vet's files, and the answers that go to its judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svcli.evaluation.task import Exports, TaskError
from svcli.evaluation.tasks.mmvet import MMVet
from tests.evaluation.task_files import asked, held, judged, put, put_json, put_parquet

TASK = MMVet()
ENTRY = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}


def test_the_release_and_its_copy_ask_the_same(tmp_path: Path) -> None:
    put(tmp_path / "images" / "v1_0.png")
    put_json(tmp_path / "mm-vet.json", {"v1_0": ENTRY})
    row = {"question_id": "v1_0", "question": "What is x?", "answer": "-1<AND>-5", "capability": "ocr,math"}
    put_parquet(tmp_path / "copy" / "data" / "test-00000-of-00001.parquet", [row | {"image": held()}])
    (here,), (there,) = asked(TASK, tmp_path).values(), asked(TASK, tmp_path / "copy").values()
    assert here.pictures == (tmp_path / "images" / "v1_0.png",)
    for item in (here, there):
        assert (item.id, item.question, item.truth, item.group) == ("v1_0", "What is x?", "-1<AND>-5", "ocr_math")


def test_there_is_no_score_but_a_file_for_the_judge(tmp_path: Path) -> None:
    put(tmp_path / "images" / "v1_0.png")
    put_json(tmp_path / "mm-vet.json", {"v1_0": ENTRY, "v1_1": ENTRY})
    done = judged(TASK, asked(TASK, tmp_path), {"v1_0": "x = -1 or x = -5\n", "v1_1": "é"})
    assert [each.score for each in done] == [0, 0]
    assert TASK.summary(done) == {}
    assert isinstance(TASK, Exports)
    assert TASK.unscored == TASK.splits
    # What mm-vet_evaluator.py looks its answers up in.
    assert json.loads(TASK.exported(done)) == {"v1_0": "x = -1 or x = -5", "v1_1": "é"}


def test_broken_entries_are_refused_with_their_key(tmp_path: Path) -> None:
    put(tmp_path / "images" / "v1_0.png")
    put_json(tmp_path / "mm-vet.json", {"v1_0": ENTRY, "v1_7": ENTRY | {"capability": "ocr"}})
    with pytest.raises(TaskError, match=r"mm-vet\.json, entry v1_7: capability is no list of texts"):
        asked(TASK, tmp_path)
    put_json(tmp_path / "mm-vet.json", {"v1_7": "x"})
    with pytest.raises(TaskError, match=r"mm-vet\.json, entry v1_7: no record"):
        asked(TASK, tmp_path)
