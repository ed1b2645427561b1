"""MMBench: multiple choice, asked again with its options moved on by one, and right only if it is so every time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged
from svcli.evaluation.tasks.figures import accuracy, grouped, percent
from svcli.evaluation.tasks.local_files import Table, absent, first
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.records import Record
from svcli.evaluation.tasks.sheet import sheet
from svcli.evaluation.tasks.wording import LETTER, LETTER_CHINESE

_LETTERS = "ABCD"
_COLUMNS = ("index", "question", "A", "B", "image")
_OTHERS = ("C", "D", "hint", "answer", "category", "l2-category", "L2-category")
_LONGEST_REFERENCE = 64
"""Letters of a cell that names the row whose picture it shows; longer ones are pictures."""
_ROUND = 1_000_000
"""What the index of a round grows by."""
_LAST_WORDS = 5
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SAID = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


class MMBench:
    """Asked as LLaVA-1.5's model_vqa_mmbench.py does; judged as VLMEvalKit does without a GPT (`exact_matching`).

    What its rules cannot read is wrong here. With ChatGPT as a judge, or on the test server, such answers may count.
    """

    name = "mmbench"
    title = "MMBench 1.0 (2023)"
    source = (
        "opencompass.openxlab.space/utils/benchmarks/MMBench (Apache-2.0 on GitHub, CC BY 4.0 on Hugging Face), or"
        " huggingface.co/datasets/lmms-lab/MMBench"
    )
    layout = "MMBench_DEV_EN.tsv (or _TEST_EN, _DEV_CN, _TEST_CN; or mmbench_dev_20230712.tsv), or en/dev-*.parquet"
    splits: tuple[str, ...] = ("dev", "test", "dev-cn", "test-cn")
    metric = "accuracy %"
    max_new_tokens = 1024
    unscored: tuple[str, ...] = ("test", "test-cn")
    export = "a .xlsx file, which the test server of MMBench reads"

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        if split not in self.splits:
            raise absent(self, folder, split)
        part, chinese = split.removesuffix("-cn"), split.endswith("-cn")
        path = first(folder, _names(part, chinese))
        if path is not None:
            for record, picture in _with_pictures(Table(path, _COLUMNS)):
                yield self._item(record, picture, split)
            return
        shards = parquet_files(folder, (f"{'cn' if chinese else 'en'}/{part}-*.parquet",))
        if not shards:
            raise absent(self, folder, split)
        for record in rows(shards, _COLUMNS, _OTHERS):
            yield self._item(record, record.picture("image"), split)

    def read(self, item: Item, said: str) -> str:
        return choice(said, item.truth["options"])

    def score(self, item: Item, answer: str) -> float:
        """Of one round alone."""
        return float(bool(answer) and answer == item.truth["answer"])

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        """`single round %` is of the questions as they stand first, the vanilla evaluation of the paper."""
        scored = [each for each in judged if each.item.truth["answer"]]
        if not scored:
            return {}
        hits = {name: all(each.score for each in found) for name, found in grouped(scored, _question).items()}
        abilities: dict[str, dict[str, bool]] = {}
        for each in scored:
            for ability in (each.item.truth["ability"], each.item.group):
                if ability:
                    abilities.setdefault(ability, {})[_question(each)] = hits[_question(each)]
        return {
            "accuracy %": percent(hits.values()),
            "single round %": accuracy([each for each in scored if each.item.id.endswith("#0")]),
            "rounds per question": len(scored) / len(hits),
            **{f"group: {name}": percent(found.values()) for name, found in abilities.items()},
        }

    def exported(self, judged: Sequence[Judged]) -> bytes:
        """Columns as LLaVA-1.5's convert_mmbench_for_submission.py has them; predictions are what was said."""
        lines: list[Sequence[str | int]] = [("index", "question", *_LETTERS, "prediction", "answer")]
        for each in judged:
            truth = each.item.truth
            question, _, number = each.item.id.partition("#")
            index = int(question) + int(number) * _ROUND
            options = [truth["options"].get(letter, "") for letter in _LETTERS]
            lines.append((index, truth["question"], *options, each.said, truth["answer"]))
        return sheet(lines)

    def _item(self, record: Record, picture: bytes, split: str) -> Item:
        options: dict[str, str] = {}
        for letter in _LETTERS:
            option = record.optional(letter)
            if not option or option.lower() == "none":
                break
            options[letter] = option
        answer = "" if split in self.unscored else record.text("answer")
        if answer and answer not in _LETTERS:
            raise record.broken(f"the answer is {answer}, not one of A to D")
        hint, question = record.optional("hint"), record.text("question")
        lines = [hint] if hint and hint.lower() != "none" else []
        lines += [question, *(f"{letter}. {option}" for letter, option in options.items())]
        ending = LETTER_CHINESE if split.endswith("-cn") else LETTER
        ability = record.optional("l2-category") or record.optional("L2-category")
        truth = {"answer": answer, "options": options, "question": question, "ability": ability}
        category = record.optional("category")
        number, index = divmod(record.number("index"), _ROUND)
        return Item(f"{index}#{number}", "\n".join(lines) + ending, (picture,), truth, category)


def choice(said: str, options: dict[str, str]) -> str:
    """The letter of the option that is meant, or "": VLMEvalKit's can_infer.

    A letter that stands alone among the last words and no other does; or one behind "the answer is"; or the one option
    whose text is in an answer that is no longer than twice all options.
    """
    if any(refusal in said for refusal in _REFUSALS):
        return ""
    words = said.translate(_MARKS).split()
    alone = [letter for letter in options if letter in words]
    if len(alone) == 1 and words.index(alone[0]) > len(words) - _LAST_WORDS:
        return alone[0]
    if not alone and "Z" in words:
        return ""
    found = _SAID.search(said)
    if found and found[1].upper() in options:
        return found[1].upper()
    lower = said.lower()  # which may be longer
    if len(lower) > 2 * sum(map(len, options.values())):
        return ""
    named = [letter for letter, option in options.items() if option.lower() in lower]
    return named[0] if len(named) == 1 else ""


def _names(part: str, chinese: bool) -> tuple[str, ...]:
    official = f"MMBench_{part.upper()}_{'CN' if chinese else 'EN'}.tsv"
    if chinese:
        return (official, f"mmbench_{part}_cn_20231003.tsv")
    return (official, f"mmbench_{part}_en_20231003.tsv", f"mmbench_{part}_20230712.tsv")


def _with_pictures(table: Table) -> Iterator[tuple[Record, bytes]]:
    """Where a later round names the row that has its picture, that row is read again: none is kept."""
    begins: dict[str, int] = {}
    for begin, record in table.records():
        cell = record.text("image")
        if len(cell) > _LONGEST_REFERENCE:
            begins[record.text("index")] = begin
            yield record, record.picture("image")
        elif cell in begins:
            yield record, table.at(begins[cell]).picture("image")
        else:
            raise record.broken(f"it shows the picture of row {cell}, which does not stand before it")


def _question(each: Judged) -> str:
    return each.item.id.rpartition("#")[0]
