"""POPE: does a model see things that are not there? Yes-or-no questions about objects in COCO's pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged, TaskError
from svcli.evaluation.tasks.figures import accuracy, grouped, percent
from svcli.evaluation.tasks.local_files import absent, first, json_lines, pictures_folder
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.records import Record
from svcli.evaluation.tasks.wording import SHORT

_CATEGORIES = ("adversarial", "popular", "random")
_SHARDS = ("data/test-*.parquet", "test-*.parquet")


class Pope:
    """Questions as LLaVA-1.5 asks them; answers and figures as the authors' evaluate.py has them.

    The main figure is the mean of the three categories' F1, which is what LLaVA-1.5's paper prints as POPE.
    """

    name = "pope"
    title = "POPE (2023)"
    source = (
        "github.com/AoiDragon/POPE, output/coco (MIT), with COCO's val2014 from cocodataset.org (its own terms), or"
        " huggingface.co/datasets/lmms-lab/POPE"
    )
    layout = (
        "coco_pope_adversarial.json, coco_pope_popular.json and coco_pope_random.json, there or in coco/ or"
        " output/coco/, and val2014/; or data/test-*.parquet or Full/*.parquet"
    )
    splits: tuple[str, ...] = ("test", *_CATEGORIES)
    metric = "F1 %"
    max_new_tokens = 128

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        if split not in self.splits:
            raise absent(self, folder, split)
        wanted = _CATEGORIES if split == "test" else (split,)
        files = [first(folder, _names(category)) for category in wanted]
        present = [path for path in files if path is not None]
        if present:
            if len(present) < len(files):
                raise absent(self, folder, split)
            images = pictures_folder(folder, ("val2014", "images/val2014", "images"), self)
            for category, path in zip(wanted, present, strict=True):
                for record in json_lines(path):
                    picture = record.file(images, record.text("image"))
                    yield _item(record, category, record.text("text"), picture, record.text("label"))
            return
        shards = parquet_files(folder, _SHARDS)
        if not shards:
            full = [parquet_files(folder, (f"Full/{category}-*.parquet",)) for category in wanted]
            if not all(full):
                raise absent(self, folder, split)
            shards = [path for paths in full for path in paths]
        absent_ones = set(wanted)
        for record in rows(shards, ("question_id", "question", "answer", "category", "image")):
            category = record.text("category")
            if category not in _CATEGORIES:
                raise record.broken(f"no category {category}")
            if category in wanted:
                absent_ones.discard(category)
                yield _item(record, category, record.text("question"), record.picture("image"), record.text("answer"))
        if absent_ones:
            raise TaskError(f"{folder}: holds no questions of the category {min(absent_ones)}")

    def read(self, item: Item, said: str) -> str:
        """evaluate.py: of the first sentence, without commas, a word No, no or not is a no, and all else a yes.

        What was said is stripped before, as in LLaVA's model_vqa_loader.py.
        """
        del item
        words = said.strip().split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"} & set(words) else "yes"

    def score(self, item: Item, answer: str) -> float:
        return float(answer == item.truth)

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        categories = {name: _figures(found) for name, found in grouped(judged).items()}
        names = ("F1 %", "accuracy %", "precision %", "recall %", "yes %")
        means = {name: percent(each[name] / 100 for each in categories.values()) for name in names}
        groups = {f"group: {name}": each["F1 %"] for name, each in categories.items()}
        others = {f"{group}: {name}": each[name] for group, each in categories.items() for name in names[1:]}
        return means | groups | others


def _names(category: str) -> tuple[str, ...]:
    name = f"coco_pope_{category}.json"
    return (name, f"coco/{name}", f"output/coco/{name}")


def _item(record: Record, category: str, question: str, picture: Path | bytes, label: str) -> Item:
    truth = label.strip().lower()
    if truth not in ("yes", "no"):
        raise record.broken(f"the answer is {label}, not yes or no")
    return Item(f"{category}/{record.text('question_id')}", question.strip() + SHORT, (picture,), truth, category)


def _figures(judged: Sequence[Judged]) -> dict[str, float]:
    """In percent; a ratio of nothing is 0."""
    said_yes = [each for each in judged if each.answer == "yes"]
    is_yes = [each for each in judged if each.item.truth == "yes"]
    precision, recall = accuracy(said_yes), accuracy(is_yes)
    both = precision + recall
    return {
        "F1 %": 2 * precision * recall / both if both else 0.0,
        "accuracy %": accuracy(judged),
        "precision %": precision,
        "recall %": recall,
        "yes %": percent(each.answer == "yes" for each in judged),
    }
