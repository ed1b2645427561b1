"""ScienceQA: multiple choice from school lessons, half of it with a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged, TaskError
from svcli.evaluation.tasks.figures import accuracy
from svcli.evaluation.tasks.local_files import absent, json_entries, json_record, pictures_folder
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.records import Record
from svcli.evaluation.tasks.wording import LETTER

_LETTERS = "ABCDE"
_COLUMNS = ("question", "choices", "answer", "hint", "subject", "grade", "image")
_SAID = re.compile(r"The answer is ([A-Z]).")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_LOW_GRADES = tuple(f"grade{number}" for number in range(1, 7))


class ScienceQA:
    """Asked as the llava_test_CQM-A.json of LLaVA-1.5's eval.zip does, judged as its eval_science_qa.py does.

    That file is not what convert_sqa_to_llava.py writes, whose questions are of the first LLaVA.

    The default split has the test questions with a picture: LLaVA-1.5's paper prints it as SQA-I. Groups are those of
    the authors' tools/evaluate_acc.py: subjects, what beside the question there is, and school years.
    """

    name = "scienceqa"
    title = "ScienceQA (2022)"
    source = (
        "github.com/lupantech/ScienceQA (CC BY-NC-SA 4.0), pictures by its tools/download.sh, or"
        " huggingface.co/datasets/derek-thomas/ScienceQA"
    )
    layout = "problems.json, pid_splits.json and images/test/; or data/test-*.parquet"
    splits: tuple[str, ...] = ("test-img", "test", "val-img", "val")
    metric = "accuracy %"
    max_new_tokens = 1024

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        if split not in self.splits:
            raise absent(self, folder, split)
        part, only_seen = split.removesuffix("-img"), split.endswith("-img")
        for key, record, picture in self._questions(folder, split, part):
            if picture is not None or not only_seen:
                yield _item(key, record, picture)

    def read(self, item: Item, said: str) -> str:
        """The letter alone, or before a full stop, or behind "The answer is"; "" where that is no option."""
        said = said.strip()
        if len(said) == 1 and said in _LETTERS:
            letter = said
        elif len(said) >= 3 and said[0] in _LETTERS and said[1:3] == ". ":
            letter = said[0]
        else:
            found = _SAID.findall(said)
            letter = found[0] if len(found) == 1 else ""
        return letter if letter in _LETTERS[: item.truth["num_choices"]] else ""

    def score(self, item: Item, answer: str) -> float:
        return float(answer == item.truth["answer"])

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        groups: dict[str, list[Judged]] = {}
        for each in judged:
            for name in each.item.truth["groups"]:
                groups.setdefault(name, []).append(each)
        return {
            "accuracy %": accuracy(judged),
            **{f"group: {name}": accuracy(found) for name, found in sorted(groups.items())},
        }

    def _questions(
        self, folder: Path, split: str, part: str
    ) -> Iterator[tuple[str, Record, tuple[Path | bytes, ...] | None]]:
        """With an id and a picture each, where there is one."""
        problems, splits = folder / "problems.json", folder / "pid_splits.json"
        if problems.is_file() and splits.is_file():
            entries = dict(json_entries(problems))
            for key in json_record(splits).texts(part):
                if key not in entries:
                    raise TaskError(f"{splits}: the question {key} is not in {problems}")
                name = entries[key].optional("image")
                if not name:
                    yield key, entries[key], None
                    continue
                images = pictures_folder(folder, (f"images/{part}", part), self)
                yield key, entries[key], (entries[key].file(images, f"{key}/{name}"),)
            return
        long = {"val": "validation"}.get(part, part)
        patterns = [f"data/{long}-*.parquet", f"{long}-*.parquet"]
        if split.endswith("-img"):
            patterns.append(f"ScienceQA-IMG/{long}-*.parquet")
        patterns.append(f"ScienceQA-FULL/{long}-*.parquet")
        shards = parquet_files(folder, patterns)
        if not shards:
            raise absent(self, folder, split)
        for number, record in enumerate(rows(shards, _COLUMNS)):
            seen = record.fields["image"] is not None
            yield str(number), record, (record.picture("image"),) if seen else None


def _item(key: str, record: Record, pictures: tuple[Path | bytes, ...] | None) -> Item:
    choices, answer = record.texts("choices"), record.number("answer")
    if not 0 <= answer < len(choices) <= len(_LETTERS):
        raise record.broken(f"the answer is number {answer} of {len(choices)} choices")
    hint, subject = record.optional("hint"), record.text("subject")
    lines = [f"Context: {hint.strip()}"] if hint.strip() else []
    lines += [record.text("question"), *(f"{letter}. {each}" for letter, each in zip(_LETTERS, choices, strict=False))]
    context = [*(["TXT"] if hint else []), *(["IMG"] if pictures else [])] or ["NO"]
    groups = [
        _SUBJECTS.get(subject, subject),
        *context,
        "G1-6" if record.text("grade") in _LOW_GRADES else "G7-12",
    ]
    truth = {"answer": _LETTERS[answer], "num_choices": len(choices), "groups": groups}
    return Item(key, "\n".join(lines).replace("  ", " ").strip() + LETTER, pictures or (), truth, groups[0])
