"""MM-Vet: open questions that need several abilities at once. GPT-4 judges them, elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged
from svcli.evaluation.tasks.local_files import absent, first, json_entries, pictures_folder
from svcli.evaluation.tasks.parquet import parquet_files, rows


class MMVet:
    """Asked as LLaVA-1.5 does, with nothing added. It has no rule to score by.

    mm-vet_evaluator.py, or the authors' page huggingface.co/spaces/whyu/MM-Vet_Evaluator, hands the file of answers to
    GPT-4, which gives each 0 to 1. Nothing here stands in for that.
    """

    name = "mmvet"
    title = "MM-Vet (2023)"
    source = "github.com/yuweihao/MM-Vet/releases, mm-vet.zip (CC BY-NC 4.0), or huggingface.co/datasets/lmms-lab/MMVet"
    layout = "mm-vet.json and images/, there or in mm-vet/; or data/test-*.parquet"
    splits: tuple[str, ...] = ("test",)
    metric = "GPT-4 score %"
    max_new_tokens = 1024
    unscored: tuple[str, ...] = ("test",)
    export = "answers as a .json file, which mm-vet_evaluator.py has GPT-4 judge"

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        if split not in self.splits:
            raise absent(self, folder, split)
        path = first(folder, ("mm-vet.json", "mm-vet/mm-vet.json"))
        if path is not None:
            images = pictures_folder(path.parent, ("images",), self)
            for key, record in json_entries(path):
                group, picture = "_".join(record.texts("capability")), record.file(images, record.text("imagename"))
                yield Item(key, record.text("question"), (picture,), record.text("answer"), group)
            return
        shards = parquet_files(folder, ("data/test-*.parquet", "test-*.parquet"))
        if not shards:
            raise absent(self, folder, split)
        for record in rows(shards, ("question_id", "question", "answer", "capability", "image")):
            group = record.text("capability").replace(",", "_")
            question, pictures = record.text("question"), (record.picture("image"),)
            yield Item(record.text("question_id"), question, pictures, record.text("answer"), group)

    def read(self, item: Item, said: str) -> str:
        del item
        return said.strip()

    def score(self, item: Item, answer: str) -> float:
        """None is given here; what counts is 0."""
        del item, answer
        return 0.0

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        del judged
        return {}

    def exported(self, judged: Sequence[Judged]) -> str:
        answers = {each.item.id: each.answer for each in judged}
        return json.dumps(answers, ensure_ascii=False, indent=2)
