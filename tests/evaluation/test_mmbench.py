"""MMBench's files, answers and figures."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from zipfile import ZipFile

import pytest

from svcli.evaluation.task import TaskError
from svcli.evaluation.tasks.mmbench import MMBench, choice
from tests.evaluation.task_files import LETTER, asked, base64_png, held, judged, png, put_parquet, put_table, twice

TASK = MMBench()
OPTIONS = {"A": "a cat", "B": "a dog", "C": "a bird"}


def row(index: int, answer: str, options: dict[str, str], hint: str = "", image: str | None = None) -> dict[str, Any]:
    letters = {letter: options.get(letter, "") for letter in "ABCD"}
    about = {"category": f"leaf {index % 2}", "l2-category": "perception", "source": "x", "split": "dev"}
    image = base64_png("red") if image is None else image
    return {
        "index": index,
        "question": "What is it?",
        "hint": hint,
        **letters,
        "answer": answer,
        "image": image,
        **about,
    }


def rolled(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The same question with its options moved on, showing the picture of the first."""
    texts = [row[letter] for letter in "ABCD" if row[letter]]
    place = "ABCD".index(row["answer"])
    moved = dict(zip("ABCD", texts[number:] + texts[:number], strict=False))
    answer = "ABCD"[(place - number) % len(texts)]
    index = row["index"] + number * 1_000_000
    return row | {"index": index, "answer": answer, "image": str(row["index"])} | moved


FIRST = row(241, "A", OPTIONS, hint="A picture of\nan animal.")
SECOND = row(252, "B", {"A": "red", "B": "blue"}, hint="nan")
ROWS = [FIRST, SECOND, rolled(FIRST, 1), rolled(FIRST, 2), rolled(SECOND, 1)]


def test_the_official_table_is_read_with_pictures_that_rows_name(tmp_path: Path) -> None:
    put_table(tmp_path / "MMBench_DEV_EN.tsv", [ROWS[0] | {"image": base64_png("green")}, *ROWS[1:]])
    items = asked(TASK, tmp_path)
    assert list(items) == ["241#0", "252#0", "241#1", "241#2", "252#1"]
    lines = "A picture of\nan animal.\nWhat is it?\nA. a cat\nB. a dog\nC. a bird"
    assert items["241#0"].question == lines + LETTER
    assert items["241#1"].question.endswith("A. a dog\nB. a bird\nC. a cat" + LETTER)
    assert items["252#0"].question == "What is it?\nA. red\nB. blue" + LETTER
    assert [items[key].truth["answer"] for key in items] == ["A", "B", "C", "B", "A"]
    assert [items[key].pictures for key in ("241#0", "252#0", "241#2")] == [(png("green"),), (png(),), (png("green"),)]
    assert items["241#0"].group == "leaf 1"


def test_the_copy_on_hugging_face_and_the_chinese_one_are_read(tmp_path: Path) -> None:
    rows = [each | {"image": held(), "L2-category": each["l2-category"]} for each in ROWS]
    for each in rows:
        each.pop("l2-category")
    put_parquet(tmp_path / "en" / "dev-00000-of-00001.parquet", rows)
    put_table(tmp_path / "official" / "mmbench_dev_20230712.tsv", ROWS)
    here, there = asked(TASK, tmp_path), asked(TASK, tmp_path / "official")
    assert [(item.id, item.question, item.truth) for item in here.values()] == [
        (item.id, item.question, item.truth) for item in there.values()
    ]
    put_parquet(tmp_path / "cn" / "dev-00000-of-00001.parquet", rows)
    assert asked(TASK, tmp_path, "dev-cn")["252#0"].question.endswith("B. blue\n请直接回答选项字母。")


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("(B) a dog", "B"),
        ("The correct answer is B.", "B"),
        ("It is a dog", "B"),  # by its text
        ("a dog or a cat", ""),  # two are named
        ("A or B", ""),
        ("B is one of the options that there are", ""),  # too far in front
        ("the answer is **c**", "C"),
        ("D", ""),  # no option
        ("A bird in a tree", "C"),
        ("A bird", "A"),  # taken for the letter
        ("It must be a dog, since it barks and runs behind the postman", ""),  # longer than twice all options
        ("a dog" + "," * 26 + "İ", ""),  # longer than that in small letters alone
        ("Z", ""),
        ("I can't process this file. B", ""),
        ("", ""),
    ],
)
def test_answers_are_read_by_the_rules_alone(said: str, letter: str) -> None:
    assert choice(said, OPTIONS) == letter


def test_a_question_counts_where_all_its_rounds_are_right(tmp_path: Path) -> None:
    put_table(tmp_path / "MMBench_DEV_EN.tsv", ROWS)
    items = asked(TASK, tmp_path)
    said = {"241#0": "A", "241#1": "C.", "241#2": "B", "252#0": "B", "252#1": "B"}  # the last is wrong
    figures = TASK.summary(judged(TASK, items, said))
    assert figures == TASK.summary(twice(judged(TASK, items, said)))
    assert figures[TASK.metric] == pytest.approx(50)
    assert figures["single round %"] == pytest.approx(100)
    assert figures["rounds per question"] == pytest.approx(2.5)
    assert figures["group: leaf 1"] == pytest.approx(100)
    assert figures["group: leaf 0"] == pytest.approx(0)
    assert figures["group: perception"] == pytest.approx(50)


def test_answers_of_the_test_split_go_to_the_server_as_a_sheet(tmp_path: Path) -> None:
    rows = [{name: value for name, value in each.items() if name != "answer"} for each in ROWS[:2]]
    put_table(tmp_path / "MMBench_TEST_EN.tsv", rows)
    done = judged(TASK, asked(TASK, tmp_path, "test"), {"241#0": "A <cat> & \x07more", "252#0": "B"})
    assert TASK.summary(done) == {}
    with ZipFile(BytesIO(TASK.exported(done))) as archive:
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    cells = [["".join(cell.itertext()) for cell in row] for row in sheet[0]]
    assert cells == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer"],
        ["241", "What is it?", "a cat", "a dog", "a bird", "", "A <cat> & more", ""],
        ["252", "What is it?", "red", "blue", "", "", "B", ""],
    ]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"image": "999"}, r"line 3: it shows the picture of row 999"),
        ({"image": "?" * 100}, r"line 3: image is no base64"),
        ({"answer": "E"}, r"line 3: the answer is E"),
        ({"index": "x"}, r"line 3: index is no whole number"),
        ({"question": ""}, r"line 3: no question"),
    ],
)
def test_a_broken_row_is_refused_with_its_line(tmp_path: Path, change: dict[str, str], what: str) -> None:
    put_table(tmp_path / "MMBench_DEV_EN.tsv", [SECOND, row(260, "A", OPTIONS) | change])
    with pytest.raises(TaskError, match=rf"MMBench_DEV_EN\.tsv, {what}"):
        asked(TASK, tmp_path)
