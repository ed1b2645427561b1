"""MMStar: 1500 questions of multiple choice that cannot be answered without the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged
from svcli.evaluation.tasks.figures import accuracy, group_accuracies
from svcli.evaluation.tasks.local_files import Table, absent, first
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.records import Record
from svcli.evaluation.tasks.wording import LETTER

_COLUMNS = ("index", "question", "answer", "category", "l2_category", "image")
_LETTERS = "ABCD"
_BEFORE = ("", "(", "option ", "the answer is ")
"""What may stand in front of the letter."""


class MMStar:
    """Asked and judged as the authors' eval/vlmeval does, in vlm/llava_next.py and evaluate/mmstar.py.

    The main figure is of all questions. With all of them there it is the mean of the six categories, of 250 each.
    """

    name = "mmstar"
    title = "MMStar (2024)"
    source = "huggingface.co/datasets/Lin-Chen/MMStar (no licence named; pictures of six other benchmarks)"
    layout = "mmstar.parquet, val-*.parquet or MMStar.tsv"
    splits: tuple[str, ...] = ("val",)
    metric = "accuracy %"
    max_new_tokens = 512

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        if split not in self.splits:
            raise absent(self, folder, split)
        shards = parquet_files(folder, ("mmstar.parquet", "val-*.parquet", "data/val-*.parquet", "val/*.parquet"))
        path = first(folder, ("MMStar.tsv",))
        if shards:
            records = rows(shards, _COLUMNS)
        elif path is not None:
            records = (record for _, record in Table(path, _COLUMNS).records())
        else:
            raise absent(self, folder, split)
        for record in records:
            answer = record.text("answer").strip().upper()
            if answer not in _LETTERS:
                raise record.broken(f"the answer is {answer}, not one of A to D")
            picture, truth = (record.picture("image"),), {"answer": answer, "kind": record.text("l2_category")}
            yield Item(record.text("index"), _question(record), picture, truth, record.text("category"))

    def read(self, item: Item, said: str) -> str:
        """evaluate/mmstar.py: the letter that begins the answer, maybe behind a few words, in either case."""
        del item
        text = said.lower().strip().replace("\n", " ")
        for before in _BEFORE:
            letter = text[len(before) : len(before) + 1]
            if text.startswith(before) and letter and letter in "abcd":
                return letter.upper()
        return ""

    def score(self, item: Item, answer: str) -> float:
        return float(answer == item.truth["answer"])

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        kinds = group_accuracies(judged, lambda each: f"{each.item.group} / {each.item.truth['kind']}")
        return {"accuracy %": accuracy(judged), **group_accuracies(judged), **kinds}


def _question(record: Record) -> str:
    """The table of tabs has the options apart, where the Parquet file has them in the question."""
    options = [(letter, record.optional(letter)) for letter in _LETTERS]
    lines = [f"\n{letter}. {option}" for letter, option in options if option]
    return record.text("question") + "".join(lines) + LETTER
