"""MMStar's files, answers and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svcli.evaluation.task import TaskError
from svcli.evaluation.tasks.mmstar import MMStar
from tests.evaluation.task_files import LETTER, asked, base64_png, held, judged, png, put_parquet, put_table

TASK = MMStar()


def row(index: int, answer: str, category: str, kind: str) -> dict[str, Any]:
    question = f"What is it {index}?\nOptions: A: x, B: y, C: z, D: w"
    about = {"category": category, "l2_category": kind}
    return {"index": index, "question": question, "answer": answer, "image": held(), **about}


ROWS = [
    row(0, "A", "math", "geometry"),
    row(1, "B", "math", "geometry"),
    row(2, "C", "math", "statistical reasoning"),
    row(3, "D", "logical reasoning", "diagram reasoning"),
]


def test_the_release_is_read(tmp_path: Path) -> None:
    put_parquet(tmp_path / "mmstar.parquet", [each | {"image": each["image"]["bytes"]} for each in ROWS])
    items = asked(TASK, tmp_path)
    assert items["1"].question == "What is it 1?\nOptions: A: x, B: y, C: z, D: w" + LETTER
    assert items["1"].pictures == (png(),)
    put_parquet(tmp_path / "other" / "val-00000-of-00001.parquet", ROWS)
    assert asked(TASK, tmp_path / "other") == items


def test_the_table_of_tabs_has_the_options_apart(tmp_path: Path) -> None:
    options = {"A": "x", "B": "y", "C": "z", "D": "w", "bench": "MMMU"}
    rows = [each | {"image": base64_png(), "question": "What is it?"} | options for each in ROWS]
    put_table(tmp_path / "MMStar.tsv", rows)
    item = asked(TASK, tmp_path)["3"]
    assert item.question == "What is it?\nA. x\nB. y\nC. z\nD. w" + LETTER
    assert item.pictures == (png(),)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C) z", "C"),
        ("Option D", "D"),
        ("The answer is\nA", "A"),
        ("A bird", "A"),
        ("both", "B"),  # the first letter counts, as in the authors' script
        ("I think B", ""),
        ("(", ""),
        ("", ""),
    ],
)
def test_answers_are_read_as_the_authors_read_them(tmp_path: Path, said: str, letter: str) -> None:
    put_parquet(tmp_path / "mmstar.parquet", ROWS)
    assert TASK.read(asked(TASK, tmp_path)["0"], said) == letter


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    put_parquet(tmp_path / "mmstar.parquet", ROWS)
    figures = TASK.summary(judged(TASK, asked(TASK, tmp_path), {"0": "A", "1": "C", "2": "C", "3": "x"}))
    assert figures == pytest.approx(
        {
            "accuracy %": 50,
            "group: math": 200 / 3,
            "group: logical reasoning": 0,
            "group: math / geometry": 50,
            "group: math / statistical reasoning": 100,
            "group: logical reasoning / diagram reasoning": 0,
        }
    )


def test_a_broken_row_is_refused_with_its_number(tmp_path: Path) -> None:
    put_parquet(tmp_path / "mmstar.parquet", [*ROWS, row(9, "E", "math", "geometry")])
    with pytest.raises(TaskError, match=r"mmstar\.parquet, row 5: the answer is E"):
        asked(TASK, tmp_path)
    put_parquet(tmp_path / "mmstar.parquet", [ROWS[0] | {"image": {"bytes": b"", "path": "x"}}])
    with pytest.raises(TaskError, match=r"mmstar\.parquet, row 1: image is no picture"):
        asked(TASK, tmp_path)
