"""MMMU's files, answers and figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from svcli.evaluation.task import TaskError
from svcli.evaluation.tasks.mmmu import Mmmu
from svcli.evaluation.tasks.mmmu_answers import is_right, letter_of
from tests.evaluation.task_files import LETTER, SHORT, asked, held, judged, png, put_parquet

TASK = Mmmu()
SUBJECTS = re.findall(
    r"\w+",
    """
    Accounting Agriculture Architecture_and_Engineering Art Art_Theory Basic_Medical_Science Biology Chemistry
    Clinical_Medicine Computer_Science Design Diagnostics_and_Laboratory_Medicine Economics Electronics Energy_and_Power
    Finance Geography History Literature Manage Marketing Materials Math Mechanical_Engineering Music Pharmacy Physics
    Psychology Public_Health Sociology
    """,
)
OPTIONS = ["$6", "$7", "a red car"]


def row(name: str, question: str, answer: str, options: list[str] | None = None, **images: Any) -> dict[str, Any]:
    kind = "open" if options is None else "multiple-choice"
    pictures = {f"image_{number}": images.get(f"image_{number}") for number in range(1, 8)}
    found = {"id": name, "question": question, "options": repr(options or []), "answer": answer, "question_type": kind}
    # A column of nothing but nulls has no type of its own in a file made of few rows.
    return found | {key: value or {"bytes": None, "path": None} for key, value in pictures.items()}


ROWS = [
    row("validation_Accounting_1", "<image 1> What is due?", "B", OPTIONS, image_1=held()),
    row(
        "validation_Art_Theory_2",
        "Which?",
        "A",
        ["<image 3>", "<image 2>"],
        image_2=held("blue"),
        image_3=held("green"),
    ),
    row("validation_Math_15", "<image 1> Slope?", "['24/7', '3.429']", image_1=held()),
    row("validation_Math_16", "<image 1> Height?", "1,200", image_1=held()),
]


def test_questions_name_their_pictures(tmp_path: Path) -> None:
    put_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ROWS)
    items = asked(TASK, tmp_path)
    first, second, third, _ = items.values()
    assert first.question == "<image 1> What is due?\n(A) $6\n(B) $7\n(C) a red car\n" + LETTER
    assert first.pictures == (png(),)
    assert first.group == "Accounting"
    assert second.pictures == (png("blue"), png("green"))
    assert second.group == "Art_Theory"
    assert third.question == "<image 1> Slope?" + SHORT
    assert third.truth == {"answer": ["24/7", "3.429"], "options": []}


def test_a_folder_for_each_subject_holds_the_same(tmp_path: Path) -> None:
    given = {"Accounting": ROWS[:1], "Art_Theory": ROWS[1:2], "Math": ROWS[2:]}
    subjects = {
        name: [row(f"validation_{name}_1", "Which?", "A", OPTIONS, image_1=held())] for name in SUBJECTS
    } | given
    put_parquet(
        tmp_path / "data" / "validation-00000-of-00001.parquet", [each for rows in subjects.values() for each in rows]
    )
    for subject, rows in subjects.items():
        put_parquet(tmp_path / "apart" / subject / "validation-00000-of-00001.parquet", rows)
        put_parquet(tmp_path / "apart" / subject / "dev-00000-of-00001.parquet", rows)
    assert asked(TASK, tmp_path / "apart") == asked(TASK, tmp_path)
    (tmp_path / "apart" / "Pharmacy" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(TaskError, match="the subject Pharmacy is missing"):
        asked(TASK, tmp_path / "apart")


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) or rather (B)", "B"),  # the last in brackets
        ("A or B", "B"),  # the last that stands alone
        ("(C) and A", "C"),  # brackets go first
        ("I would say it is a red car", "C"),  # by its text, in more than five words
        ("a red car", ""),
        ("cannot tell", ""),
        ("", ""),
    ],
)
def test_letters_are_read_as_the_authors_read_them(said: str, letter: str) -> None:
    assert letter_of(said, OPTIONS) == letter


@pytest.mark.parametrize(
    ("said", "truths", "right"),
    [
        ("1200", ["1,200"], True),
        ("The height is 1,200 m.", ["1,200"], True),
        ("It is 12", ["1,200"], False),
        ("x = 3.4286", ["24/7", "3.429"], True),  # to two places
        ("so the slope is 24/7", ["24/7", "3.429"], True),
        ("about 24", ["24/7"], False),
        ("Tampa, Florida", ["Tampa", "Florida"], True),
        ("first 5\nthen the result is 6", ["5"], False),  # only what follows a key counts, once there is one
        ("five", ["5"], False),
        ("item a", ["a"], True),  # a letter at the end of a word or its beginning
        ("", ["5"], False),
    ],
)
def test_open_answers_are_judged_as_the_authors_judge_them(said: str, truths: list[str], right: bool) -> None:
    assert is_right(said, truths) == right


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    put_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ROWS)
    items = asked(TASK, tmp_path)
    said = {
        "validation_Accounting_1": "B",
        "validation_Art_Theory_2": "B",
        "validation_Math_15": "3.43",
        "validation_Math_16": "12",
    }
    figures = TASK.summary(judged(TASK, items, said))
    assert figures == pytest.approx(
        {
            "accuracy %": 50,
            "guessed %": 0,
            "group: Art and Design": 0,
            "group: Business": 100,
            "group: Science": 50,
            "group: Accounting": 100,
            "group: Art_Theory": 0,
            "group: Math": 50,
        }
    )


def test_what_cannot_be_read_is_guessed_alike_in_every_run_and_told(tmp_path: Path) -> None:
    rows = [row(f"validation_Math_{number}", "<image 1>?", "A", OPTIONS, image_1=held()) for number in range(300)]
    put_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows)
    items = asked(TASK, tmp_path)
    done = judged(TASK, items, dict.fromkeys(items, "no idea"))
    assert done == judged(TASK, items, dict.fromkeys(items, "no idea"))
    figures = TASK.summary(done)
    assert figures["guessed %"] == 100
    assert 25 < figures["accuracy %"] < 42  # a third, within three standard deviations


def test_answers_of_the_test_split_go_to_the_server(tmp_path: Path) -> None:
    rows = [each | {"id": each["id"].replace("validation", "test"), "answer": "?"} for each in (ROWS[0], ROWS[3])]
    put_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    done = judged(TASK, asked(TASK, tmp_path, "test"), {"test_Accounting_1": "(C)", "test_Math_16": " 12 m "})
    assert TASK.summary(done) == {}
    assert json.loads(TASK.exported(done)) == {"test_Accounting_1": "C", "test_Math_16": "12 m"}


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({"options": "['a', 2]"}, "options is no list of texts"),
        ({"options": "__import__('os').system('true')"}, "options is no list of texts"),
        ({"answer": "D"}, "the answer is D, which is no option"),
        ({"question": "<image 2> What?"}, "image_2 is no picture"),
        ({"question": "<image 9> What?"}, "it names picture 9"),
        ({"id": "x"}, "the id x tells no subject"),
    ],
)
def test_a_broken_row_is_refused_with_its_number(tmp_path: Path, broken: dict[str, str], what: str) -> None:
    put_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [ROWS[0], ROWS[0] | broken])
    with pytest.raises(TaskError, match=rf"row 2: {what}"):
        asked(TASK, tmp_path)
