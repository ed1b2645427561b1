"""POPE's files, answers and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svcli.evaluation.task import TaskError
from svcli.evaluation.tasks.pope import Pope
from tests.evaluation.task_files import SHORT, asked, held, judged, png, put, put_lines, put_parquet

TASK = Pope()
LABELS = {"adversarial": ["yes", "no", "no", "yes"], "popular": ["yes", "no"], "random": ["no"]}


def official(folder: Path) -> Path:
    put(folder / "val2014" / "dog.png")
    for category, labels in LABELS.items():
        lines = [
            {
                "question_id": number,
                "image": "dog.png",
                "text": f"Is there a dog {number} in the image?",
                "label": label,
            }
            for number, label in enumerate(labels, start=1)
        ]
        put_lines(folder / "coco" / f"coco_pope_{category}.json", lines)
    return folder


def row(category: str, number: int, answer: str) -> dict[str, Any]:
    return {
        "id": str(number),
        "question_id": str(number),
        "question": f"Is there a dog {number} in the image?",
        "answer": answer,
        "image_source": "COCO_val2014_000000310196",
        "image": held(),
        "category": category,
    }


def test_the_authors_files_are_read(tmp_path: Path) -> None:
    items = asked(TASK, official(tmp_path))
    assert list(items) == [f"{name}/{number}" for name in LABELS for number in range(1, len(LABELS[name]) + 1)]
    item = items["adversarial/2"]
    assert item.question == "Is there a dog 2 in the image?" + SHORT
    assert item.pictures == (tmp_path / "val2014" / "dog.png",)
    assert (item.truth, item.group) == ("no", "adversarial")
    assert list(asked(TASK, tmp_path, "random")) == ["random/1"]


@pytest.mark.parametrize("layout", ["data", "Full"])
def test_the_copy_on_hugging_face_holds_the_same(tmp_path: Path, layout: str) -> None:
    rows = {name: [row(name, n, each) for n, each in enumerate(labels, start=1)] for name, labels in LABELS.items()}
    if layout == "data":
        put_parquet(
            tmp_path / "data" / "test-00000-of-00001-0a1b.parquet", [each for found in rows.values() for each in found]
        )
    else:
        for name, each in rows.items():
            put_parquet(tmp_path / "Full" / f"{name}-00000-of-00001.parquet", each)
    here, there = asked(TASK, tmp_path), asked(TASK, official(tmp_path / "official"))
    assert [(item.id, item.question, item.truth, item.group) for item in here.values()] == [
        (item.id, item.question, item.truth, item.group) for item in there.values()
    ]
    assert {item.pictures for item in here.values()} == {(png(),)}
    assert list(asked(TASK, tmp_path, "popular")) == ["popular/1", "popular/2"]


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("No, there is none.", "no"),
        ("There is not a dog", "no"),
        ("Yes. There is no cat.", "yes"),  # the first sentence alone
        ("NO", "yes"),  # the script knows No, no and not
        ("no\n", "no"),  # LLaVA strips what was said before the script reads it
        ("no\nnone", "yes"),  # it splits words at spaces alone
        ("nobody", "yes"),
        ("", "yes"),
    ],
)
def test_answers_are_read_as_the_authors_read_them(tmp_path: Path, said: str, answer: str) -> None:
    item = asked(TASK, official(tmp_path))["random/1"]
    assert TASK.read(item, said) == answer


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    items = asked(TASK, official(tmp_path))
    said = {
        "adversarial/1": "Yes",  # right: TP
        "adversarial/2": "Yes",  # wrong: FP
        "adversarial/3": "No",  # right: TN
        "adversarial/4": "Yes",  # right: TP
        "popular/1": "No",  # wrong: FN
        "popular/2": "Yes",  # wrong: FP
    }
    figures = TASK.summary(judged(TASK, items, said))
    # Adversarial: precision 2/3, recall 2/2, F1 0.8, accuracy 3/4, three of four yes. Popular: all wrong, half yes.
    assert figures["group: adversarial"] == pytest.approx(80)
    assert figures["adversarial: precision %"] == pytest.approx(200 / 3)
    assert figures["adversarial: recall %"] == pytest.approx(100)
    assert figures["adversarial: accuracy %"] == pytest.approx(75)
    assert figures["adversarial: yes %"] == pytest.approx(75)
    assert figures["group: popular"] == 0
    assert figures[TASK.metric] == pytest.approx(40)
    assert figures["accuracy %"] == pytest.approx(37.5)
    assert figures["yes %"] == pytest.approx(62.5)
    assert "group: random" not in figures


def test_a_missing_category_is_told(tmp_path: Path) -> None:
    (official(tmp_path) / "coco" / "coco_pope_random.json").unlink()
    with pytest.raises(TaskError, match=r"coco_pope_random\.json.*github\.com/AoiDragon/POPE"):
        asked(TASK, tmp_path)
    put(tmp_path / "coco" / "coco_pope_random.json", "\n")
    with pytest.raises(TaskError, match=r"coco_pope_random\.json: holds no records"):
        asked(TASK, tmp_path)
    rows = [row(name, n, each) for name in ("adversarial", "random") for n, each in enumerate(LABELS[name], start=1)]
    put_parquet(tmp_path / "copy" / "data" / "test-00000-of-00001.parquet", rows)
    with pytest.raises(TaskError, match="no questions of the category popular"):
        asked(TASK, tmp_path / "copy")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "C:\\secret.png", "cat.png", "x\n"]
)
def test_a_picture_elsewhere_or_nowhere_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    put(tmp_path / "secret.png")
    put(tmp_path / "val2014" / "dog.png")
    lines = [{"question_id": n, "image": each, "text": "?", "label": "no"} for n, each in enumerate(("dog.png", name))]
    put_lines(tmp_path / "coco_pope_random.json", lines)
    with pytest.raises(TaskError, match=r"coco_pope_random\.json, line 2: .*picture"):
        asked(TASK, tmp_path, "random")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "no JSON"),
        ("[1]", "no record"),
        ('{"question_id": 1, "image": "dog.png", "text": "?", "label": "maybe"}', "maybe, not yes or no"),
        ('{"question_id": 1, "image": "dog.png", "label": "yes"}', "no text"),
        ('{"question_id": 1, "image": ["dog.png"], "text": "?", "label": "yes"}', "image is no text"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_broken_line_is_refused_with_its_number(tmp_path: Path, line: str, what: str) -> None:
    put(tmp_path / "val2014" / "dog.png")
    put(tmp_path / "coco_pope_random.json", f"\n{line}\n")
    with pytest.raises(TaskError, match=f"coco_pope_random\\.json, line 2: .*{what}"):
        asked(TASK, tmp_path, "random")
