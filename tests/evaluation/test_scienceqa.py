"""ScienceQA's files, answers and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svcli.evaluation.task import TaskError
from svcli.evaluation.tasks.scienceqa import ScienceQA
from tests.evaluation.task_files import LETTER, asked, held, judged, png, put, put_json, put_parquet

TASK = ScienceQA()


def problem(answer: int, hint: str, image: str | None, subject: str, grade: int) -> dict[str, Any]:
    return {
        "question": "Which  is it?",
        "choices": ["West", "South", "East"],
        "answer": answer,
        "hint": hint,
        "image": image,
        "subject": subject,
        "grade": f"grade{grade}",
    }


PROBLEMS = {
    "1": problem(0, "See the map.", "image.png", "social science", 2),
    "4": problem(1, "", "image.png", "natural science", 8),
    "5": problem(2, "Read this.", None, "language science", 8),
    "6": problem(0, "", None, "language science", 2),
    "9": problem(0, "", None, "language science", 2),
}


def official(folder: Path) -> Path:
    put_json(folder / "problems.json", PROBLEMS)
    put_json(folder / "pid_splits.json", {"test": ["4", "1", "5", "6"], "val": ["9"]})
    for key in ("1", "4"):
        put(folder / "images" / "test" / key / "image.png")
    return folder


def test_the_release_is_read_with_and_without_pictures(tmp_path: Path) -> None:
    items = asked(TASK, official(tmp_path))
    assert list(items) == ["4", "1"]
    assert items["1"].question == "Context: See the map.\nWhich is it?\nA. West\nB. South\nC. East" + LETTER
    assert items["4"].question == "Which is it?\nA. West\nB. South\nC. East" + LETTER
    assert items["4"].pictures == (tmp_path / "images" / "test" / "4" / "image.png",)
    everything = asked(TASK, tmp_path, "test")
    assert list(everything) == ["4", "1", "5", "6"]
    assert everything["5"].pictures == ()
    assert list(asked(TASK, tmp_path, "val")) == ["9"]


def test_the_copy_on_hugging_face_asks_the_same(tmp_path: Path) -> None:
    there = asked(TASK, official(tmp_path), "test")
    rows = [PROBLEMS[key] | {"image": held() if PROBLEMS[key]["image"] else None} for key in there]
    put_parquet(tmp_path / "copy" / "data" / "test-00000-of-00001-x.parquet", rows)
    here = asked(TASK, tmp_path / "copy", "test")
    assert [(item.question, item.truth) for item in here.values()] == [
        (item.question, item.truth) for item in there.values()
    ]
    assert list(asked(TASK, tmp_path / "copy")) == ["0", "1"]
    assert here["0"].pictures == (png(),)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A", "A"),
        ("B. South", "B"),
        ("The answer is C.", "C"),
        ("I know. The answer is B, so the answer is B", "B"),
        ("The answer is A. The answer is B.", ""),  # two
        ("D", ""),  # no choice
        ("AB", ""),
        ("a", ""),
        ("(A)", ""),
        ("", ""),
    ],
)
def test_answers_are_read_as_llava_reads_them(tmp_path: Path, said: str, letter: str) -> None:
    assert TASK.read(asked(TASK, official(tmp_path))["1"], said) == letter


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    items = asked(TASK, official(tmp_path), "test")
    said = {"1": "A", "4": "A", "5": "C", "6": "x"}  # the first and the third are right
    assert TASK.summary(judged(TASK, items, said)) == {
        "accuracy %": 50,
        "group: SOC": 100,
        "group: NAT": 0,
        "group: LAN": 50,
        "group: TXT": 100,
        "group: IMG": 50,
        "group: NO": 0,
        "group: G1-6": 50,
        "group: G7-12": 50,
    }


def test_broken_problems_are_refused_with_their_key(tmp_path: Path) -> None:
    official(tmp_path)
    put_json(tmp_path / "problems.json", PROBLEMS | {"4": PROBLEMS["4"] | {"answer": 3}})
    with pytest.raises(TaskError, match=r"problems\.json, entry 4: the answer is number 3 of 3 choices"):
        asked(TASK, tmp_path)
    put_json(tmp_path / "problems.json", PROBLEMS | {"4": PROBLEMS["4"] | {"image": "../../../pid_splits.json"}})
    with pytest.raises(TaskError, match=r"problems\.json, entry 4: the picture .* is not in"):
        asked(TASK, tmp_path)
    put_json(tmp_path / "pid_splits.json", {"test": ["77"]})
    with pytest.raises(TaskError, match=r"pid_splits\.json: the question 77 is not in"):
        asked(TASK, tmp_path)
    put_json(tmp_path / "pid_splits.json", ["4"])
    with pytest.raises(TaskError, match=r"pid_splits\.json: no record"):
        asked(TASK, tmp_path)
