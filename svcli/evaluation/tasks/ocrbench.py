"""OCRBench: a thousand questions about text in pictures, from single words to formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged
from svcli.evaluation.tasks.figures import accuracy, grouped
from svcli.evaluation.tasks.local_files import absent, first, json_entries, pictures_folder
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.records import Record
from svcli.evaluation.tasks.wording import SHORT

_FORMULAS = "HME100k"
_RECOGNITION = " Text Recognition", "Handwriting Recognition", "Digit String Recognition"
_COLUMNS = ("dataset", "question", "question_type", "answer", "image")


class OcrBench:
    """Asked and judged as the authors' scripts/LLaVA1_5.py does: a point for each answer that holds the truth."""

    name = "ocrbench"
    title = "OCRBench (2023)"
    source = (
        "github.com/Yuliang-Liu/MultimodalOCR, OCRBench/ (MIT; pictures of 29 other sets, by their terms), or"
        " huggingface.co/datasets/echo840/OCRBench"
    )
    layout = "OCRBench.json, there or in OCRBench/, and OCRBench_Images/; or data/test-*.parquet"
    splits: tuple[str, ...] = ("test",)
    metric = "points"
    max_new_tokens = 128

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        if split not in self.splits:
            raise absent(self, folder, split)
        path = first(folder, ("OCRBench.json", "OCRBench/OCRBench.json"))
        if path is not None:
            images = pictures_folder(folder, ("OCRBench_Images", "images"), self)
            for key, record in json_entries(path):
                picture = record.file(images, record.text("image_path"))
                kind, truths = record.text("type"), _answers(record, "answers")
                yield _item(key, record, record.text("dataset_name"), kind, truths, picture)
            return
        shards = parquet_files(folder, ("data/test-*.parquet", "test-*.parquet"))
        if not shards:
            raise absent(self, folder, split)
        for number, record in enumerate(rows(shards, _COLUMNS), start=1):
            kind, truths = record.text("question_type"), _answers(record, "answer")
            yield _item(str(number), record, record.text("dataset"), kind, truths, record.picture("image"))

    def read(self, item: Item, said: str) -> str:
        """As it is compared: formulas without spaces, and all else in lower case and on one line."""
        return _compared(said, item.truth["dataset"])

    def score(self, item: Item, answer: str) -> float:
        return float(any(_compared(each, item.truth["dataset"]) in answer for each in item.truth["answers"]))

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        points = {name: sum(each.score for each in found) for name, found in grouped(judged).items()}
        recognition = sum(score for name, score in points.items() if name.endswith(_RECOGNITION))
        groups = {f"group: {name}": score for name, score in points.items()}
        return {
            "points": sum(points.values()),
            "accuracy %": accuracy(judged),
            "text recognition": recognition,
            **groups,
        }


def _answers(record: Record, name: str) -> list[str]:
    found = record.fields.get(name)
    truths = [found] if isinstance(found, str) else record.texts(name)
    if not all(each.strip() for each in truths) or not truths:
        raise record.broken("an empty answer, which every text holds")
    return truths


def _item(key: str, record: Record, dataset: str, kind: str, truths: list[str], picture: Path | bytes) -> Item:
    return Item(key, record.text("question") + SHORT, (picture,), {"answers": truths, "dataset": dataset}, kind)


def _compared(text: str, dataset: str) -> str:
    if dataset == _FORMULAS:
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.lower().strip().replace("\n", " ")
