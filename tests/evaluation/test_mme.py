"""MME's files, answers and figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from svcli.evaluation.task import TaskError
from svcli.evaluation.tasks.mme import Mme
from tests.evaluation.task_files import SHORT, asked, held, judged, png, put, put_parquet, twice

TASK = Mme()
PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
QUESTIONS = "Is it red? Please answer yes or no.\tYes\nIs it blue?  Please answer yes or no.\tNo\n"


def official(folder: Path) -> Path:
    """Two pictures of existence, and one of each other subtask, some of which lie apart from their questions."""
    root = folder / "MME_Benchmark_release_version"
    for name in PERCEPTION + COGNITION:
        apart = name in ("artwork", "celebrity", "landmark", "posters", "scene")
        images, texts = ("images/", "questions_answers_YN/") if apart else ("", "")
        for stem in ("a", "b") if name == "existence" else ("a",):
            put(root / name / f"{images}{stem}.{'png' if name == 'OCR' else 'jpg'}")
            put(root / name / f"{texts}{stem}.txt", QUESTIONS)
    return folder


def test_the_release_is_read_with_both_of_its_layouts(tmp_path: Path) -> None:
    items = asked(TASK, official(tmp_path))
    assert len(items) == 30
    item = items["existence/b.jpg#2"]
    assert item.question == "Is it blue?" + SHORT
    assert (item.truth, item.group) == ("no", "existence")
    root = tmp_path / "MME_Benchmark_release_version"
    assert items["artwork/a.jpg#1"].pictures == (root / "artwork" / "images" / "a.jpg",)
    assert items["OCR/a.png#1"].pictures == (root / "OCR" / "a.png",)


@pytest.mark.parametrize("place", ["", "MME_Benchmark", "MME_Benchmark_release_version/MME_Benchmark"])
def test_the_release_is_read_however_it_was_unpacked(tmp_path: Path, place: str) -> None:
    root = official(tmp_path / "official") / "MME_Benchmark_release_version"
    wanted = asked(TASK, tmp_path / "official")
    (tmp_path / "here" / place).parent.mkdir(parents=True, exist_ok=True)
    root.rename(tmp_path / "here" / place)
    found = asked(TASK, tmp_path / "here")
    assert {key: item.question for key, item in found.items()} == {key: item.question for key, item in wanted.items()}
    assert all(Path(str(picture)).is_file() for item in found.values() for picture in item.pictures)


def test_the_copy_on_hugging_face_asks_the_same(tmp_path: Path) -> None:
    wanted = asked(TASK, official(tmp_path / "official"))
    rows = [
        {
            "question_id": key.partition("#")[0],
            "question": item.question.removesuffix(SHORT) + " Please answer yes or no.",
            "answer": item.truth.title(),
            "category": item.group,
            "image": held(),
        }
        for key, item in wanted.items()
    ]
    put_parquet(tmp_path / "data" / "test-00000-of-00002.parquet", rows[:7])
    put_parquet(tmp_path / "data" / "test-00001-of-00002.parquet", rows[7:])
    found = asked(TASK, tmp_path)
    assert {key: (item.question, item.truth, item.group) for key, item in found.items()} == {
        key: (item.question, item.truth, item.group) for key, item in wanted.items()
    }
    assert {item.pictures for item in found.values()} == {(png(),)}


@pytest.mark.parametrize(
    ("said", "answer"),
    [("Yes", "yes"), ("no.", "no"), ("Yes, it is.", "yes"), ("Not sure", "no"), ("y", "other"), ("It is no", "other")],
)
def test_answers_are_read_as_the_authors_read_them(tmp_path: Path, said: str, answer: str) -> None:
    item = asked(TASK, official(tmp_path))["count/a.jpg#1"]
    assert TASK.read(item, said) == answer


def test_sums_are_those_counted_by_hand(tmp_path: Path) -> None:
    items = asked(TASK, official(tmp_path))
    said = {
        "existence/a.jpg#1": "Yes",
        "existence/a.jpg#2": "No",
        "existence/b.jpg#1": "Yes",
        "existence/b.jpg#2": "Yes",  # wrong
        "count/a.jpg#1": "No",  # wrong
        "count/a.jpg#2": "No",
        "code_reasoning/a.jpg#1": "Yes",
        "code_reasoning/a.jpg#2": "No",
    }
    figures = TASK.summary(judged(TASK, items, said))
    assert figures == TASK.summary(twice(judged(TASK, items, said)))
    # Existence: three of four questions, one of two pictures: 75 + 50. Count: one of two, no picture: 50 + 0.
    assert figures["group: existence"] == pytest.approx(125)
    assert figures["existence: accuracy+ %"] == pytest.approx(50)
    assert figures["group: count"] == pytest.approx(50)
    assert figures[TASK.metric] == figures["perception"] == pytest.approx(175)
    assert figures["cognition"] == pytest.approx(200)
    assert figures["sum"] == pytest.approx(375)


def test_all_right_is_2000_and_800(tmp_path: Path) -> None:
    items = asked(TASK, official(tmp_path))
    figures = TASK.summary(judged(TASK, items, {key: item.truth for key, item in items.items()}))
    assert (figures["perception"], figures["cognition"]) == (2000, 800)


def test_a_missing_subtask_is_told(tmp_path: Path) -> None:
    count = official(tmp_path) / "MME_Benchmark_release_version" / "count"
    for path in count.iterdir():
        path.unlink()
    count.rmdir()
    with pytest.raises(TaskError, match="the subtask count is missing"):
        asked(TASK, tmp_path)


def test_broken_questions_are_refused_with_file_and_line(tmp_path: Path) -> None:
    path = official(tmp_path) / "MME_Benchmark_release_version" / "count" / "a.txt"
    put(path, "Is it red?\tYes\nIs it blue? No\n")
    with pytest.raises(TaskError, match=r"a\.txt, line 2: no tab"):
        asked(TASK, tmp_path)
    put(path, "Is it red?\tYes\nIs it blue?\tNo\nIs it?\tNo\n")
    with pytest.raises(TaskError, match=r"a\.txt, line 3: a third question"):
        asked(TASK, tmp_path)
    put(path, b"\xff\xfe\xff")
    with pytest.raises(TaskError, match=r"a\.txt: no text"):
        asked(TASK, tmp_path)
