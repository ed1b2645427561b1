"""GQA: questions of several steps about Visual Genome's pictures, made from scene graphs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged
from svcli.evaluation.tasks.figures import accuracy, group_accuracies, grouped
from svcli.evaluation.tasks.local_files import absent, first, json_entries, pictures_folder
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.records import Record
from svcli.evaluation.tasks.wording import SHORT

_FOLDERS = ("", "questions1.2/", "questions/", "data/", "data/questions1.2/")


class Gqa:
    """Asked as LLaVA-1.5 asks, answers as its convert_gqa_for_eval.py reads them, figures as the authors' eval.py.

    Consistency, validity, plausibility and grounding are left out: their files are not released for testdev.
    """

    name = "gqa"
    title = "GQA (2019)"
    source = (
        "cs.stanford.edu/people/dorarad/gqa/download.html (terms on that page, pictures of Visual Genome), or"
        " huggingface.co/datasets/lmms-lab/GQA"
    )
    layout = (
        "testdev_balanced_questions.json, there or in questions1.2/, and images/; or"
        " testdev_balanced_instructions/*.parquet and testdev_balanced_images/*.parquet; val alike"
    )
    splits: tuple[str, ...] = ("testdev", "val", "test")
    metric = "accuracy %"
    max_new_tokens = 128
    unscored: tuple[str, ...] = ("test",)
    export = "predictions as a .json file, which eval.py and the test server of GQA's challenge read"

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        """From Parquet files, picture by picture, so that none is read twice and few are in memory."""
        if split not in self.splits:
            raise absent(self, folder, split)
        path = first(folder, [f"{each}{split}_balanced_questions.json" for each in _FOLDERS])
        if path is not None:
            images = pictures_folder(folder, ("images", "data/images"), self)
            for key, record in json_entries(path):
                picture = record.file(images, f"{record.text('imageId')}.jpg")
                yield self._item(key, record, (picture,), split)
            return
        questions = parquet_files(folder, (f"{split}_balanced_instructions/{split}-*.parquet",))
        images_of = parquet_files(folder, (f"{split}_balanced_images/{split}-*.parquet",))
        if not questions or not images_of:
            raise absent(self, folder, split)
        asked: dict[str, list[Record]] = {}
        columns = ("id", "imageId", "question", *(() if split in self.unscored else ("answer",)))
        for record in rows(questions, columns, ("types", "groups")):
            asked.setdefault(record.text("imageId"), []).append(record)
        for row in rows(images_of, ("id", "image")):
            picture_of = (row.picture("image"),)
            for record in asked.pop(row.text("id"), []):
                yield self._item(record.text("id"), record, picture_of, split)
        if asked:
            record = next(iter(asked.values()))[0]
            raise record.broken(f"there is no picture {record.text('imageId')} in {images_of[0].parent}")

    def read(self, item: Item, said: str) -> str:
        del item
        return said.strip().rstrip(".").lower()

    def score(self, item: Item, answer: str) -> float:
        return float(bool(item.truth["answer"]) and answer == item.truth["answer"])

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        """`distribution` is eval.py's chi-square between answers and truths within their groups: lower is better."""
        scored = [each for each in judged if each.item.truth["answer"]]
        if not scored:
            return {}
        open_ones = [each for each in scored if each.item.group == "query"]
        binary = [each for each in scored if each.item.group != "query"]
        return {
            "accuracy %": accuracy(scored),
            "binary %": accuracy(binary),
            "open %": accuracy(open_ones),
            "distribution": _distribution(scored),
            **group_accuracies(scored),
            **group_accuracies(scored, lambda each: str(each.item.truth["semantic"])),
        }

    def exported(self, judged: Sequence[Judged]) -> str:
        answers = [{"questionId": each.item.id, "prediction": each.answer} for each in judged]
        return json.dumps(answers, ensure_ascii=False)

    def _item(self, key: str, record: Record, pictures: tuple[Path | bytes, ...], split: str) -> Item:
        truth = {
            "answer": "" if split in self.unscored else record.text("answer"),
            "semantic": _part(record, "types", "semantic"),
            "words": _part(record, "groups", "global"),
        }
        return Item(key, record.text("question") + SHORT, pictures, truth, _part(record, "types", "structural"))


def _part(record: Record, name: str, part: str) -> str:
    return record.within(name).optional(part) if record.fields.get(name) is not None else ""


def _distribution(judged: Sequence[Judged]) -> float:
    """Weighted by the questions of each group of words, and a hundredth, as eval.py prints it."""
    total, weight = 0.0, 0
    for found in grouped(judged, lambda each: str(each.item.truth["words"])).values():
        truths = Counter(each.item.truth["answer"] for each in found)
        said = Counter(each.answer for each in found)
        total += len(found) * sum((said[word] - count) ** 2 / count for word, count in truths.items())
        weight += len(found)
    return total / weight / 100 if weight else 0.0
