"""MME: perception and cognition, in pairs of yes-or-no questions about each picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from svcli.evaluation.task import Item, Judged, TaskError
from svcli.evaluation.tasks.figures import accuracy, grouped, percent
from svcli.evaluation.tasks.local_files import absent, first
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.records import Record
from svcli.evaluation.tasks.wording import SHORT

_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_COLUMNS = ("question_id", "question", "answer", "category", "image")
_SUFFIX = "Please answer yes or no."
_ROOTS = ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version", "MME_Benchmark")
_ENDINGS = (".jpg", ".png", ".jpeg")


class Mme:
    """Questions as LLaVA-1.5 asks them; answers and figures as the authors' eval_tool/calculation.py has them.

    A subtask scores its accuracy and its accuracy+, both in percent: of questions, and of pictures whose two questions
    are answered right. The main figure is the sum of the ten perception subtasks, of 2000; cognition is of 800.
    """

    name = "mme"
    title = "MME (2023)"
    source = (
        "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation (research only, on request), or"
        " huggingface.co/datasets/lmms-lab/MME"
    )
    layout = (
        "MME_Benchmark_release_version/, with or without MME_Benchmark/ in it, or a folder for each of the 14 subtasks;"
        " or data/test-*.parquet"
    )
    splits: tuple[str, ...] = ("test",)
    metric = "perception"
    max_new_tokens = 128

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        if split not in self.splits:
            raise absent(self, folder, split)
        root = first(folder, _ROOTS) or folder
        there = [name for name in (*_PERCEPTION, *_COGNITION) if (root / name).is_dir()]
        if there:
            for name in (*_PERCEPTION, *_COGNITION):
                if name not in there:
                    raise TaskError(f"{root}: the subtask {name} is missing, without which the sums are others")
                yield from _subtask(root / name)
            return
        shards = parquet_files(folder, ("data/test-*.parquet", "test-*.parquet"))
        if not shards:
            raise absent(self, folder, split)
        asked: Counter[str] = Counter()
        for record in rows(shards, _COLUMNS):
            picture, category = record.text("question_id"), record.text("category")
            if category not in _PERCEPTION + _COGNITION:
                raise record.broken(f"no category {category}")
            asked[picture] += 1
            number = asked[picture]
            question = record.text("question")
            yield _item(record, category, picture, number, question, record.text("answer"), (record.picture("image"),))

    def read(self, item: Item, said: str) -> str:
        """calculation.py: yes or no where it stands in the first four letters, in lower case; yes goes first."""
        del item
        begin = said.strip().lower()[:4]
        return "yes" if "yes" in begin else "no" if "no" in begin else "other"

    def score(self, item: Item, answer: str) -> float:
        return float(answer == item.truth)

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        subtasks = {name: accuracy(found) + _plus(found) for name, found in grouped(judged).items()}
        perception = sum(score for name, score in subtasks.items() if name in _PERCEPTION)
        cognition = sum(score for name, score in subtasks.items() if name in _COGNITION)
        return {
            "perception": perception,
            "cognition": cognition,
            "sum": perception + cognition,
            **{f"group: {name}": score for name, score in subtasks.items()},
            **{f"{name}: accuracy %": accuracy(found) for name, found in grouped(judged).items()},
            **{f"{name}: accuracy+ %": _plus(found) for name, found in grouped(judged).items()},
        }


def _plus(judged: Sequence[Judged]) -> float:
    """Of pictures both of whose questions have been answered."""
    pictures = grouped(judged, lambda each: each.item.id.rpartition("#")[0]).values()
    return percent(all(each.score for each in pair) for pair in pictures if len(pair) == 2)


def _subtask(folder: Path) -> Iterator[Item]:
    """A subtask's pictures lie beside their questions, or apart from them, in images and questions_answers_YN."""
    apart = (folder / "images").is_dir()
    images, questions = (folder / "images", folder / "questions_answers_YN") if apart else (folder, folder)
    files = sorted(questions.glob("*.txt"))
    if not files:
        raise TaskError(f"{questions}: no files of questions")
    for path in files:
        found = [images / f"{path.stem}{ending}" for ending in _ENDINGS]
        picture = next((each for each in found if each.is_file()), None)
        if picture is None:
            raise TaskError(f"{path}: there is no picture {found[0]}")
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise TaskError(f"{path}: no text") from None
        for number, line in enumerate(lines, start=1):
            question, tab, answer = line.strip().partition("\t")
            record = Record({}, f"{path}, line {number}")
            if not tab:
                raise record.broken("no tab between question and answer")
            yield _item(record, folder.name, f"{folder.name}/{picture.name}", number, question, answer, (picture,))


def _item(
    record: Record,
    category: str,
    picture: str,
    number: int,
    question: str,
    answer: str,
    pictures: tuple[Path | bytes, ...],
) -> Item:
    truth = answer.strip().lower()
    if truth not in ("yes", "no"):
        raise record.broken(f"the answer is {answer}, not yes or no")
    if number > 2:
        raise record.broken(f"a third question about {picture}")
    asked = question.replace(_SUFFIX, "").strip() + SHORT
    return Item(f"{picture}#{number}", asked, pictures, truth, category)
