"""The easy-VQA benchmark: small synthetic pictures that somebody else made."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from zipfile import ZipFile

from PIL import Image

from skipvision.data.judge import Question
from skipvision.data.names import with_article
from skipvision.data.packages import EASY_VQA

_SHAPES = ("circle", "rectangle", "triangle")


def load(root: Path, split: Literal["train", "test"]) -> Iterator[tuple[Image.Image, list[Question]]]:
    """Yield each 64x64 picture of the fetched wheel with the questions about it."""
    for _, data, asked in files(root, split):
        yield Image.open(io.BytesIO(data)).convert("RGB"), asked


def files(root: Path, split: Literal["train", "test"]) -> Iterator[tuple[int, bytes, list[Question]]]:
    """Yield the number of each picture, its PNG file, and the questions about it.

    Questions such as "is there not a red shape?" are answered as they are worded. Raises DataError without the wheel.
    """
    with ZipFile(EASY_VQA.archive(root)) as wheel:
        folder = f"easy_vqa/data/{split}"
        rows = json.loads(wheel.read(f"{folder}/questions.json"))
        asked: dict[int, list[Question]] = {}
        for text, answer, picture in rows:
            question = Question("easy_vqa", text, sentence(answer), answer)
            asked.setdefault(picture, []).append(question)
        for picture in sorted(asked):
            yield picture, wheel.read(f"{folder}/images/{picture}.png"), asked[picture]


def sentence(answer: str) -> str:
    """Return one of the thirteen official answers as a short sentence."""
    if answer in ("yes", "no"):
        return f"{answer.capitalize()}."
    return f"It is {with_article(answer)}." if answer in _SHAPES else f"It is {answer}."
