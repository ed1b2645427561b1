"""OCRBench's files, answers and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svcli.evaluation.task import TaskError
from svcli.evaluation.tasks.ocrbench import OcrBench
from tests.evaluation.task_files import SHORT, asked, held, judged, png, put, put_json, put_parquet

TASK = OcrBench()


def entry(dataset: str, kind: str, answers: str | list[str]) -> dict[str, Any]:
    about = {"dataset_name": dataset, "id": 7, "image_path": f"{dataset}/a.png", "type": kind}
    return about | {"question": f"What does {dataset} say?", "answers": answers}


ENTRIES = [
    entry("IIIT5K", "Regular Text Recognition", "CENTRE"),
    entry("IAM", "Handwriting Recognition", "the end"),
    entry("docVQA", "Doc-oriented VQA", ["12 May", "May 12"]),
    entry("HME100k", "Handwritten Mathematical Expression Recognition", "\\frac { 9 } { 2 } = x\n"),
]


def official(folder: Path) -> Path:
    for each in ENTRIES:
        put(folder / "OCRBench_Images" / each["image_path"])
    put_json(folder / "OCRBench" / "OCRBench.json", ENTRIES)
    return folder


def test_the_release_and_its_copy_ask_the_same(tmp_path: Path) -> None:
    here = asked(TASK, official(tmp_path))
    assert here["3"].question == "What does docVQA say?" + SHORT
    assert here["3"].pictures == (tmp_path / "OCRBench_Images" / "docVQA" / "a.png",)
    rows = [
        {
            "dataset": each["dataset_name"],
            "question": each["question"],
            "question_type": each["type"],
            "answer": each["answers"] if isinstance(each["answers"], list) else [each["answers"]],
            "image": held(),
        }
        for each in ENTRIES
    ]
    put_parquet(tmp_path / "copy" / "data" / "test-00000-of-00001.parquet", rows)
    there = asked(TASK, tmp_path / "copy")
    assert [(key, item.question, item.truth, item.group) for key, item in here.items()] == [
        (key, item.question, item.truth, item.group) for key, item in there.items()
    ]
    assert {item.pictures for item in there.values()} == {(png(),)}


@pytest.mark.parametrize(
    ("key", "said", "score"),
    [
        ("1", "It says 'Centre'.", 1),
        ("1", "cent re", 0),
        ("2", "The\nend", 1),
        ("3", "on MAY 12, 2020", 1),
        ("3", "12. May", 0),
        ("4", "\\frac{9}{2}=x", 1),  # formulas without spaces, on one line
        ("4", "\\FRAC{9}{2}=x", 0),  # and in their case
    ],
)
def test_an_answer_counts_that_holds_a_truth(tmp_path: Path, key: str, said: str, score: float) -> None:
    (done,) = judged(TASK, asked(TASK, official(tmp_path)), {key: said})
    assert done.score == score


def test_points_are_those_counted_by_hand(tmp_path: Path) -> None:
    items = asked(TASK, official(tmp_path))
    said = {"1": "centre", "2": "the end", "3": "May 13", "4": "\\frac{9}{2}=x"}
    assert TASK.summary(judged(TASK, items, said)) == {
        "points": 3,
        "accuracy %": 75,
        "text recognition": 2,
        "group: Regular Text Recognition": 1,
        "group: Handwriting Recognition": 1,
        "group: Doc-oriented VQA": 0,
        "group: Handwritten Mathematical Expression Recognition": 1,
    }


@pytest.mark.parametrize("answers", ["", [], ["May", " "], [3]])
def test_an_answer_that_every_text_holds_is_refused(tmp_path: Path, answers: Any) -> None:
    put(tmp_path / "images" / "docVQA" / "a.png")
    put_json(tmp_path / "OCRBench.json", [entry("docVQA", "Doc-oriented VQA", answers)])
    with pytest.raises(TaskError, match=r"OCRBench\.json, entry 1: "):
        asked(TASK, tmp_path)
