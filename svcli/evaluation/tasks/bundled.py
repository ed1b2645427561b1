"""What the bundled model was trained for: pictures composed of art, shapes and words that training never showed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from skipvision.data import assets
from skipvision.data.errors import DataError
from skipvision.data.questions import TASKS, Question, ask, is_right
from skipvision.data.scenes import Scene, render, render_shapes
from skipvision.data.split import Split
from svcli.evaluation.task import Item, Judged, TaskError

PICTURES = 400
"""Of each split."""
QUESTIONS = 6
"""Of each picture, at most."""
SHAPES = "shapes"
DRAWN: tuple[Split, ...] = ("test", "test_style", "test_font", "test_photo")
_ANY_TEXT = "Yes, there is some text."


def scene_questions(
    root: assets.Assets | None, split: str, num_pictures: int
) -> Iterator[tuple[Scene, list[Question]]]:
    """Composed pictures with their questions, half of them in wordings that training never showed.

    Every picture of test_font has text, so that whether there is any is no question there: those are left out.
    """
    for seed in range(num_pictures):
        scene = render_shapes(seed) if root is None else render(root, seed, _drawn(split))
        questions = ask(scene, np.random.default_rng((seed, 0)), wordings="test", per_picture=QUESTIONS)
        yield scene, [each for each in questions if split != "test_font" or each.answer != _ANY_TEXT]


class Bundled:
    """The bundled suite. A group is a kind of question."""

    name = "bundled"
    title = "The suite of the bundled model"
    source = "drawn here; the art, by `svcli data fetch`, each under the licence of its package; `shapes` needs none"
    layout = "the folder that `svcli data fetch` filled: cutouts.npz, cutouts.json, fonts.json, words.json, fonts/"
    splits: tuple[str, ...] = (*DRAWN, SHAPES)
    metric = "accuracy %"
    max_new_tokens = 48

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        try:
            art = None if split == SHAPES else assets.load(folder)
        except DataError:
            raise TaskError(
                f"{folder} holds no art: `svcli data fetch` brings it there, or --split {SHAPES} needs none"
            ) from None
        for number, (scene, questions) in enumerate(scene_questions(art, split, PICTURES)):
            file = io.BytesIO()
            scene.image.save(file, "PNG", compress_level=1)
            pictures = (file.getvalue(),)
            for place, each in enumerate(questions):
                truth = {"judged by": each.truth, "answer": each.answer}
                yield Item(f"{split}-{number}-{place}", each.question, pictures, truth, each.task)

    def read(self, item: Item, said: str) -> str:
        del item
        return said.strip()

    def score(self, item: Item, answer: str) -> float:
        return float(
            is_right(Question(item.group, item.question, item.truth["answer"], item.truth["judged by"]), answer)
        )

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        found = {}
        for task in TASKS:
            scores = [each.score for each in judged if each.item.group == task]
            if scores:
                found[task] = 100 * sum(scores) / len(scores)
        return {
            self.metric: 100 * sum(each.score for each in judged) / len(judged),
            "mean over kinds %": sum(found.values()) / len(found),
            **{f"group: {task}": share for task, share in found.items()},
        }


def _drawn(split: str) -> Split:
    return next(each for each in DRAWN if each == split)
