"""Answers to many questions, and the share of right ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skipvision.data.questions import Question
from skipvision.model import SkipVisionModel
from skipvision.tokenizer import train_tokenizer
from skipvision.training.evaluate import Outcome, accuracy, answer_all
from skipvision.training.feature_cache import FeatureCache
from skipvision.training.scratch import initialise
from skipvision.training.scratch_recipe import ScratchRecipe


def outcome(task: str, right: bool) -> Outcome:
    return Outcome(0, Question(task, "", "", ""), "", right)


def test_accuracy_is_the_mean_over_tasks_not_over_questions() -> None:
    outcomes = [outcome("count", True), outcome("count", False), *[outcome("what", True)] * 6]
    assert accuracy(outcomes) == {"count": 0.5, "what": 1.0, "all": 0.75}
    assert accuracy([]) == {}


@pytest.mark.parametrize("blind", [False, True])
def test_answers_come_in_order_whatever_the_batch(recipe: ScratchRecipe, features: FeatureCache, blind: bool) -> None:
    tokenizer = train_tokenizer([q.question for draws in features.questions for draw in draws for q in draw], 300)
    torch.manual_seed(0)
    text = replace(recipe.model.text, vocab_size=tokenizer.get_vocab_size(), tie_embeddings=False)
    model = SkipVisionModel(replace(recipe.model, text=text))
    initialise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.dim() > 1 else 1)  # clear answers, so that rounding cannot turn them
    asked = [(index, question) for index, draws in enumerate(features.questions) for question in draws[0]]
    together = answer_all(model.double(), tokenizer, features, asked, blind=blind, batch_size=64)
    alone = answer_all(model, tokenizer, features, asked, blind=blind, batch_size=1)
    assert [(each.picture, each.question) for each in together] == asked
    assert [each.answer for each in together] == [each.answer for each in alone]
    assert len({each.answer for each in together}) > 1
    again = answer_all(model, tokenizer, features, [(0, asked[-1][1]), asked[-1]], blind=blind)
    assert (again[0].answer == again[1].answer) == blind


def test_nothing_asked_is_nothing_answered(recipe: ScratchRecipe, features: FeatureCache) -> None:
    tokenizer = train_tokenizer(["What?"], 300)
    assert answer_all(SkipVisionModel(recipe.model), tokenizer, features, []) == []
