"""MMMU: questions of college exams in thirty subjects, with up to seven pictures each."""

from __future__ import annotations

import ast
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged, TaskError
from svcli.evaluation.tasks.figures import accuracy, group_accuracies, percent
from svcli.evaluation.tasks.local_files import absent
from svcli.evaluation.tasks.mmmu_answers import is_right, letter_of
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.records import Record
from svcli.evaluation.tasks.wording import LETTER, SHORT

_IMAGE = re.compile(r"<image (\d+)>")
_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_COLUMNS = ("id", "question", "options", "answer", "question_type", *_IMAGES)
_CHOICE = "multiple-choice"
_DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DOMAIN = {subject: domain for domain, subjects in _DOMAINS.items() for subject in subjects}


class Mmmu:
    """Asked as the authors ask LLaVA-1.5 (mmmu/configs/llava1.5.yaml), judged as their eval_utils.py does.

    Their script shows LLaVA the first picture alone, and guesses where options are pictures; here all pictures that a
    question names are shown, in the order of their numbers. It draws answers, with five beams; here they are greedy.
    Where no letter can be read, the script guesses at random, and so does this, by the question's id, so that every run
    guesses alike; `guessed %` tells how often.
    """

    name = "mmmu"
    title = "MMMU (2023)"
    source = "huggingface.co/datasets/MMMU/MMMU or lmms-lab/MMMU (Apache-2.0)"
    layout = "Accounting/validation-*.parquet and so on for 30 subjects; or data/validation-*.parquet"
    splits: tuple[str, ...] = ("validation", "dev", "test")
    metric = "accuracy %"
    max_new_tokens = 128
    unscored: tuple[str, ...] = ("test",)
    export = "answers as a .json file, which the test server of MMMU and main_eval_only.py read"

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        if split not in self.splits:
            raise absent(self, folder, split)
        shards = parquet_files(folder, (f"data/{split}-*.parquet", f"{split}-*.parquet"))
        if not shards:
            of = {subject: parquet_files(folder / subject, (f"{split}-*.parquet",)) for subject in sorted(_DOMAIN)}
            if not any(of.values()):
                raise absent(self, folder, split)
            missing = [subject for subject, found in of.items() if not found]
            if missing:
                raise TaskError(f"{folder}: the subject {missing[0]} is missing, without which the accuracy is another")
            shards = [path for found in of.values() for path in found]
        for record in rows(shards, _COLUMNS):
            yield self._item(record, split)

    def read(self, item: Item, said: str) -> str:
        """A letter, or for open questions all that was said."""
        options: list[str] = item.truth["options"]
        if not options:
            return said.strip()
        guess = zlib.crc32(item.id.encode()) % len(options)
        return letter_of(said, options) or chr(ord("A") + guess)

    def score(self, item: Item, answer: str) -> float:
        truth: list[str] = item.truth["answer"]
        if item.truth["options"]:
            return float(answer in truth)
        return float(bool(truth) and is_right(answer, truth))

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        scored = [each for each in judged if each.item.truth["answer"]]
        if not scored:
            return {}
        chosen = [each for each in scored if each.item.truth["options"]]
        domains = group_accuracies(scored, lambda each: _DOMAIN.get(each.item.group, ""))
        return {
            "accuracy %": accuracy(scored),
            "guessed %": percent(not letter_of(each.said, each.item.truth["options"]) for each in chosen),
            **domains,
            **group_accuracies(scored),
        }

    def exported(self, judged: Sequence[Judged]) -> str:
        answers = {each.item.id: each.answer for each in judged}
        return json.dumps(answers, ensure_ascii=False, indent=4)

    def _item(self, record: Record, split: str) -> Item:
        name = record.text("id")
        parts = name.split("_")
        if len(parts) < 3:
            raise record.broken(f"the id {name} tells no subject")
        options = _listed(record, "options") if record.text("question_type") == _CHOICE else []
        answer = "" if split in self.unscored else record.text("answer")
        if options and answer and answer not in [chr(ord("A") + number) for number in range(len(options))]:
            raise record.broken(f"the answer is {answer}, which is no option")
        # Answers of open questions are a text, or the text of a list of them.
        truth = _listed(record, "answer") if answer.startswith("[") and not options else [answer] if answer else []
        lines = [f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]
        question = "\n".join([record.text("question"), *lines])
        named = sorted({int(number) for number in _IMAGE.findall(question)}) or [1]
        if named[-1] > len(_IMAGES) or named[0] < 1:
            raise record.broken(f"it names picture {named[-1]}, and there are {len(_IMAGES)} at most")
        pictures = tuple(record.picture(f"image_{number}") for number in named)
        asked = f"{question}\n{LETTER}" if options else question + SHORT
        return Item(name, asked, pictures, {"answer": truth, "options": options}, "_".join(parts[1:-1]))


def _listed(record: Record, name: str) -> list[str]:
    """The files hold lists as the text that Python prints of them."""
    try:
        found = ast.literal_eval(record.text(name))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise record.broken(f"{name} is no list of texts")
    return found
