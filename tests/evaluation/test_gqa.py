"""GQA's files, answers and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from svcli.evaluation.task import TaskError
from svcli.evaluation.tasks.gqa import Gqa
from tests.evaluation.task_files import SHORT, asked, held, judged, png, put, put_json, put_parquet

TASK = Gqa()


def question(image: str, answer: str, structural: str, words: str | None) -> dict[str, Any]:
    return {
        "question": f"What is in {image}?",
        "imageId": image,
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": "attr", "detailed": "x"},
        "groups": {"global": words, "local": "y"},
    }


QUESTIONS = {
    "1": question("n1", "red", "query", "color"),
    "2": question("n2", "yes", "verify", None),
    "3": question("n1", "blue", "query", "color"),
    "4": question("n1", "red", "query", "color"),
}


def test_the_release_is_read(tmp_path: Path) -> None:
    for name in ("n1", "n2"):
        put(tmp_path / "images" / f"{name}.jpg")
    put_json(tmp_path / "questions1.2" / "testdev_balanced_questions.json", QUESTIONS)
    items = asked(TASK, tmp_path)
    assert list(items) == ["1", "2", "3", "4"]
    assert items["2"].question == "What is in n2?" + SHORT
    assert items["2"].pictures == (tmp_path / "images" / "n2.jpg",)
    assert items["2"].truth["answer"] == "yes"
    assert items["2"].group == "verify"


def test_the_copy_on_hugging_face_is_asked_picture_by_picture(tmp_path: Path) -> None:
    rows = [{"id": key, **each} for key, each in QUESTIONS.items()]
    put_parquet(tmp_path / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    images = [{"id": "n0", "image": held("green")}, {"id": "n2", "image": held("blue")}, {"id": "n1", "image": held()}]
    put_parquet(tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)
    items = asked(TASK, tmp_path)
    assert list(items) == ["2", "1", "3", "4"]
    assert items["2"].pictures == (png("blue"),)
    assert items["1"].pictures == (png("red"),)
    assert items["1"].pictures is items["3"].pictures is items["4"].pictures
    assert items["1"].truth == {"answer": "red", "semantic": "attr", "words": "color"}

    put_parquet(tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images[:2])
    with pytest.raises(TaskError, match=r"row 1: there is no picture n1 in .*testdev_balanced_images"):
        asked(TASK, tmp_path)


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    for name in ("n1", "n2"):
        put(tmp_path / "images" / f"{name}.jpg")
    put_json(tmp_path / "testdev_balanced_questions.json", QUESTIONS)
    items = asked(TASK, tmp_path)
    said = {"1": "Red.", "2": "Yes", "3": "red", "4": "dark red"}
    figures = TASK.summary(judged(TASK, items, said))
    assert figures[TASK.metric] == pytest.approx(50)  # 1 and 2
    assert figures["open %"] == pytest.approx(100 / 3)
    assert figures["binary %"] == pytest.approx(100)
    assert figures["group: query"] == pytest.approx(100 / 3)
    assert figures["group: attr"] == pytest.approx(50)
    # Of colours, red is true twice and said twice, blue once and never: (0/2 + 1/1) x 3 / 3 / 100.
    assert figures["distribution"] == pytest.approx(0.01)


def test_answers_of_the_test_split_go_to_the_server(tmp_path: Path) -> None:
    put(tmp_path / "images" / "n1.jpg")
    put_json(
        tmp_path / "test_balanced_questions.json", {"7": {"question": "What?", "imageId": "n1", "isBalanced": True}}
    )
    items = asked(TASK, tmp_path, "test")
    done = judged(TASK, items, {"7": "A dog."})
    assert [each.score for each in done] == [0]
    assert TASK.summary(done) == {}
    assert TASK.unscored == ("test",)
    assert json.loads(TASK.exported(done)) == [{"questionId": "7", "prediction": "a dog"}]
    copy = tmp_path / "copy"
    put_parquet(
        copy / "test_balanced_instructions" / "test-00000-of-00001.parquet",
        [{"id": "7", "imageId": "n1", "question": "What?", "isBalanced": True}],
    )
    put_parquet(copy / "test_balanced_images" / "test-00000-of-00001.parquet", [{"id": "n1", "image": held()}])
    assert [(each.id, each.question, each.truth) for each in asked(TASK, copy, "test").values()] == [
        (each.id, each.question, each.truth) for each in items.values()
    ]


def test_an_id_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "secret.jpg")
    (tmp_path / "images").mkdir()
    put_json(tmp_path / "testdev_balanced_questions.json", {"1": question("../secret", "red", "query", None)})
    with pytest.raises(TaskError, match=r"entry 1: the picture '\.\./secret\.jpg' is not in"):
        asked(TASK, tmp_path)
