"""Accuracy of a model on encoded pictures, by generating answers and judging them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from skipvision.data.questions import Question, is_right
from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.tokenizer import ASSISTANT, END, IMAGE, USER, special_ids
from skipvision.training.feature_cache import FeatureCache

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Outcome:
    """One judged answer."""

    picture: int
    question: Question
    answer: str
    right: bool


@torch.no_grad()
def answer_all(
    model: SkipVisionModel,
    tokenizer: Tokenizer,
    cache: FeatureCache,
    asked: Sequence[tuple[int, Question]],
    *,
    blind: bool = False,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> list[Outcome]:
    """Greedy answers to `asked` (picture index, question), in the order given.

    `generator` is what the random selector draws from.
    """
    special = special_ids(tokenizer)
    image, user, assistant, end = (special[token] for token in (IMAGE, USER, ASSISTANT, END))
    outcomes = []
    for start in range(0, len(asked), batch_size):
        chunk = asked[start : start + batch_size]
        ids = [
            [*([] if blind else [image]), user, *tokenizer.encode(question.question).ids, assistant]
            for _, question in chunk
        ]
        data = cache.gather([picture for picture, _ in chunk])
        features = data["features"].to(model.decoder.embed.weight.dtype)
        visual = model.visual_rows(features, data["cls_attention"], generator)
        layouts = [TokenLayout.of(row, image, model.config) for row in ids]
        batch = BatchLayout.of(layouts, max(map(len, ids)))
        answers = model.generate(ids, visual[:0] if blind else visual, batch, MAX_NEW_TOKENS, end)
        for (picture, question), answer in zip(chunk, answers, strict=True):
            text = tokenizer.decode(answer)
            outcomes.append(Outcome(picture, question, text, is_right(question, text)))
    return outcomes


def accuracy(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of right answers per task, and their mean over tasks as `all`."""
    by_task: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        by_task[outcome.question.task].append(outcome.right)
    shares = {task: sum(rights) / len(rights) for task, rights in sorted(by_task.items())}
    return shares | ({"all": sum(shares.values()) / len(shares)} if shares else {})
