"""easy-VQA: shapes, colours, and whether there is one, in small pictures that somebody else made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from skipvision.data import easy_vqa
from skipvision.data.errors import DataError
from skipvision.data.judge import Question, is_right
from skipvision.data.packages import EASY_VQA
from svcli.evaluation.task import Item, Judged, TaskError

_GROUPS = {"yes": "yes or no", "no": "yes or no"} | dict.fromkeys(("circle", "rectangle", "triangle"), "shape")


class EasyVqa:
    """The official test questions. A group is a kind of answer."""

    name = "easy-vqa"
    title = "easy-VQA (2020)"
    source = (
        f"the Python package easy-vqa {EASY_VQA.version} by Victor Zhou (MIT), which `svcli data fetch` brings, too"
    )
    layout = f"the wheel: `pip download --no-deps {EASY_VQA.name}=={EASY_VQA.version} -d FOLDER`"
    splits: tuple[str, ...] = ("test",)
    metric = "accuracy %"
    max_new_tokens = 48

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        del split  # there is one
        try:
            for number, data, questions in easy_vqa.files(folder, "test"):
                pictures = (data,)
                for place, each in enumerate(questions):
                    group = _GROUPS.get(each.truth, "colour")
                    yield Item(f"{number}-{place}", each.question, pictures, each.truth, group)
        except DataError:
            raise TaskError(f"{folder} holds no easy-VQA; what it needs is {self.layout}") from None

    def read(self, item: Item, said: str) -> str:
        del item
        return said.strip()

    def score(self, item: Item, answer: str) -> float:
        return float(is_right(Question("easy_vqa", item.question, item.truth, item.truth), answer))

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for each in judged:
            found.setdefault(each.item.group, []).append(each.score)
        return {
            self.metric: 100 * sum(each.score for each in judged) / len(judged),
            **{f"group: {name}": 100 * sum(scores) / len(scores) for name, scores in sorted(found.items())},
        }
