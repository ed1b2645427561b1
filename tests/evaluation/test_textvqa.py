"""TextVQA's files, answers and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svcli.evaluation.task import Item, TaskError
from svcli.evaluation.tasks.textvqa import TextVqa
from svcli.evaluation.tasks.vqa_answers import processed
from tests.evaluation.task_files import SHORT, asked, held, judged, png, put, put_json, put_parquet

TASK = TextVqa()
ANSWERS = ["Nokia", "nokia", "nokia.", "the nokia", "samsung", "samsung", "sony", "lg", "lg", "lg"]


def entry(number: int, answers: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"question_id": number, "image_id": "ab12", "image_classes": ["Phone"]}
    found["question"] = "what brand is it, Nokia?"
    return found if answers is None else found | {"answers": answers}


def official(folder: Path) -> Path:
    put(folder / "train_images" / "ab12.jpg")
    put_json(folder / "TextVQA_0.5.1_val.json", {"data": [entry(34602, ANSWERS)], "dataset_type": "val"})
    words = [{"image_id": "ab12", "ocr_tokens": ["NOKIA", "5"], "ocr_info": []}]
    put_json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": words})
    return folder


def test_the_release_is_read_with_and_without_what_an_ocr_system_saw(tmp_path: Path) -> None:
    (item,) = asked(TASK, official(tmp_path)).values()
    assert (item.id, item.question) == ("34602", "What brand is it, nokia?" + SHORT)
    assert item.pictures == (tmp_path / "train_images" / "ab12.jpg",)
    assert item.truth == ANSWERS
    (item,) = asked(TASK, tmp_path, "val-ocr").values()
    assert item.question == "What brand is it, nokia?\nReference OCR token: NOKIA, 5" + SHORT
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(TaskError, match=r"Rosetta.*no such file"):
        asked(TASK, tmp_path, "val-ocr")


def test_the_copy_on_hugging_face_asks_the_same(tmp_path: Path) -> None:
    row = entry(34602, ANSWERS) | {"image": held(), "ocr_tokens": ["NOKIA", "5"]}
    put_parquet(tmp_path / "data" / "validation-00000-of-00001-x.parquet", [row])
    for split in ("val", "val-ocr"):
        (here,), (there,) = asked(TASK, tmp_path, split).values(), asked(TASK, official(tmp_path / "o"), split).values()
        assert (here.id, here.question, here.truth) == (there.id, there.question, there.truth)
        assert here.pictures == (png(),)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("The  Dogs", "dogs"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("st. john", "st john"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("dog's", "dog 's"),
        ("and/or", "and or"),  # a mark between words becomes a space
        ("and /or", "and or"),  # one beside a space goes
        ("yes!", "yes"),
        ("no - never", "no never"),
        ("a\nb", "b"),
        ("ymca", "ymca"),
    ],
)
def test_answers_are_made_alike_as_evalai_does(said: str, answer: str) -> None:
    assert processed(said) == answer


@given(st.lists(st.sampled_from(["Nokia", "a nokia", "samsung", "lg", "LG!"]), min_size=10, max_size=10))
def test_a_score_is_the_mean_over_the_ten_people_of_what_the_other_nine_said(answers: list[str]) -> None:
    item = Item("1", "?", (), answers)
    for said in ("nokia", "lg", "sony"):
        scores = [
            min(1, sum(processed(other) == said for other in answers[:place] + answers[place + 1 :]) / 3)
            for place in range(10)
        ]
        assert TASK.score(item, TASK.read(item, said)) == pytest.approx(sum(scores) / 10)


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    items = asked(TASK, official(tmp_path))
    # Four said nokia: three of the other nine are enough for each of the ten, which is 1.
    (nokia,) = judged(TASK, items, {"34602": "Nokia"})
    assert (nokia.answer, nokia.score) == ("nokia", 1)
    # Two said samsung: of one, one other did: 1/3, twice; of eight, two did: 2/3.
    (samsung,) = judged(TASK, items, {"34602": "a Samsung."})
    assert samsung.score == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    # Three said lg: 2/3 of themselves, 1 of the seven.
    (lg,) = judged(TASK, items, {"34602": "LG"})
    assert lg.score == pytest.approx((3 * 2 / 3 + 7) / 10)
    (other,) = judged(TASK, items, {"34602": "Apple"})
    assert other.score == 0
    assert TASK.summary([nokia, lg, other])[TASK.metric] == pytest.approx(100 * (1 + 0.9 + 0) / 3)


def test_answers_of_the_test_split_go_to_the_server(tmp_path: Path) -> None:
    put(tmp_path / "test_images" / "ab12.jpg")
    put_json(tmp_path / "TextVQA_0.5.1_test.json", {"data": [entry(5, None)]})
    done = judged(TASK, asked(TASK, tmp_path, "test"), {"5": "The Nokia"})
    assert TASK.summary(done) == {}
    assert json.loads(TASK.exported(done)) == [{"question_id": 5, "answer": "nokia"}]


def test_nine_answers_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "train_images" / "ab12.jpg")
    put_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": [entry(1, ANSWERS), entry(2, ANSWERS[:9])]})
    with pytest.raises(TaskError, match=r"val\.json, entry 2: 9 answers, not 10"):
        asked(TASK, tmp_path)
    put_json(tmp_path / "TextVQA_0.5.1_val.json", [])
    with pytest.raises(TaskError, match="holds no records in data"):
        asked(TASK, tmp_path)
