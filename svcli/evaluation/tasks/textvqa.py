"""TextVQA: questions that are answered by reading what is written in a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged, TaskError
from svcli.evaluation.tasks.figures import accuracy
from svcli.evaluation.tasks.local_files import absent, first, json_entries, pictures_folder
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.records import Record
from svcli.evaluation.tasks.vqa_answers import processed
from svcli.evaluation.tasks.wording import SHORT

_NUM_ANSWERS = 10
_ENOUGH = 3
"""People who must say the same for a full score."""


class TextVqa:
    """Asked and judged as LLaVA-1.5 does: its llava_textvqa_val_v051_ocr.jsonl and m4c_evaluator.py, from MMF.

    LLaVA-1.5's own figures are of the split val-ocr, whose questions tell what an OCR system has read. That measures
    less of what a model sees, so that the split without it is the default, as in lmms-eval.
    """

    name = "textvqa"
    title = "TextVQA 0.5.1 (2019)"
    source = (
        "textvqa.org/dataset (CC BY 4.0; pictures of Open Images, CC BY 2.0), or"
        " huggingface.co/datasets/lmms-lab/textvqa"
    )
    layout = (
        "TextVQA_0.5.1_val.json and train_images/ (test: test_images/), for val-ocr with"
        " TextVQA_Rosetta_OCR_v0.2_val.json; or data/validation-*.parquet, data/test-*.parquet"
    )
    splits: tuple[str, ...] = ("val", "val-ocr", "test")
    metric = "accuracy %"
    max_new_tokens = 128
    unscored: tuple[str, ...] = ("test",)
    export = "answers as a .json file, which the test server of the TextVQA challenge reads"

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        if split not in self.splits:
            raise absent(self, folder, split)
        part, reads = split.removesuffix("-ocr"), split.endswith("-ocr")
        path = first(folder, (f"TextVQA_0.5.1_{part}.json",))
        if path is not None:
            inner = "test_images" if part == "test" else "train_images"
            images = pictures_folder(folder, (inner, f"train_val_images/{inner}", "images"), self)
            words = _words(folder / f"TextVQA_Rosetta_OCR_v0.2_{part}.json") if reads else {}
            for _, record in json_entries(path, "data"):
                name = record.text("image_id")
                if reads and name not in words:
                    raise record.broken(f"TextVQA_Rosetta_OCR_v0.2_{part}.json has no words of {name}")
                yield self._item(record, (record.file(images, f"{name}.jpg"),), words.get(name), split)
            return
        long = {"val": "validation"}.get(part, part)
        shards = parquet_files(folder, (f"data/{long}-*.parquet", f"{long}-*.parquet"))
        if not shards:
            raise absent(self, folder, split)
        columns = ("question_id", "question", "image", *(("ocr_tokens",) if reads else ()))
        for record in rows(shards, columns, ("answers",)):
            tokens = record.texts("ocr_tokens") if reads else None
            yield self._item(record, (record.picture("image"),), tokens, split)

    def read(self, item: Item, said: str) -> str:
        del item
        return processed(said)

    def score(self, item: Item, answer: str) -> float:
        """The mean over the ten of what it scores against the other nine, where three who agree suffice."""
        if not item.truth:
            return 0.0
        same = [processed(each) == answer for each in item.truth]
        return sum(min(1.0, (sum(same) - one) / _ENOUGH) for one in same) / len(same)

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        scored = [each for each in judged if each.item.truth]
        return {"accuracy %": accuracy(scored)} if scored else {}

    def exported(self, judged: Sequence[Judged]) -> str:
        answers = [{"question_id": _number(each.item.id), "answer": each.answer} for each in judged]
        return json.dumps(answers, ensure_ascii=False)

    def _item(self, record: Record, pictures: tuple[Path | bytes, ...], words: list[str] | None, split: str) -> Item:
        truth = [] if split in self.unscored else record.texts("answers")
        if split not in self.unscored and len(truth) != _NUM_ANSWERS:
            raise record.broken(f"{len(truth)} answers, not {_NUM_ANSWERS}")
        seen = "" if words is None else f"\nReference OCR token: {', '.join(words)}"
        # The files have questions in small letters; LLaVA's question file and lmms-eval ask them like this.
        question = record.text("question").capitalize()
        return Item(record.text("question_id"), question + seen + SHORT, pictures, truth)


def _words(path: Path) -> dict[str, list[str]]:
    """What an OCR system has read, by picture."""
    if not path.is_file():
        raise TaskError(f"{path}: no such file, which the split val-ocr needs; it comes from textvqa.org/dataset")
    return {record.text("image_id"): record.texts("ocr_tokens") for _, record in json_entries(path, "data")}


def _number(name: str) -> int | str:
    return int(name) if name.isdecimal() else name
