"""Questions agree with the scene, and cannot be answered without looking at it."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision.data.assets import Assets
from skipvision.data.names import COLOURS, PLURALS, SHAPES, counted
from skipvision.data.questions import TASKS, Question, ask, is_right, vocabulary_text
from skipvision.data.scenes import Scene, render
from skipvision.data.split import SPLITS, Split
from skipvision.data.wordings import TEST, TRAIN, Wordings

FEW = settings(max_examples=80, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def questions(scene: Scene, seed: int, wordings: Wordings = "train") -> list[Question]:
    return ask(scene, np.random.default_rng(seed), wordings=wordings, per_picture=6)


@pytest.fixture(scope="module")
def many(assets: Assets) -> list[tuple[Scene, Question]]:
    pairs = []
    for seed in range(1200):
        scene = render(assets, seed, "train")
        rng = np.random.default_rng(seed)
        pairs += [(scene, q) for q in ask(scene, rng, wordings="train", per_picture=4)]
    return pairs


@FEW
@given(seed=SEEDS, split=st.sampled_from(SPLITS), wordings=st.sampled_from(["train", "test"]))
def test_the_model_answer_is_judged_right(assets: Assets, seed: int, split: Split, wordings: Wordings) -> None:
    for question in questions(render(assets, seed, split), seed, wordings):
        assert is_right(question, question.answer), question
        assert is_right(question, question.answer.upper().rstrip(".")), question
        assert "{" not in question.question


@FEW
@given(seed=SEEDS)
def test_the_same_generator_asks_the_same(assets: Assets, seed: int) -> None:
    scene = render(assets, seed, "train")
    assert questions(scene, seed) == questions(scene, seed)


@FEW
@given(seed=SEEDS)
def test_answers_follow_from_the_items(assets: Assets, seed: int) -> None:
    scene = render(assets, seed, "train")
    for question in questions(scene, seed):
        if question.task == "read":
            assert question.truth in [i.text.upper() for i in scene.items if i.text is not None]
        elif question.task == "presence" and question.answer[-6:] != " text.":
            name = question.answer.rstrip(".").partition(" there is ")[2].split(" ", 1)[1]
            assert (number_of(scene, name) > 0) == (question.truth == "yes")
        elif question.task == "count":
            words = question.answer.rstrip(".").split(" ", 3)
            (name,) = [n for n in countable() if words[3] in (n, counted(2, n)[2:])]
            assert number_of(scene, name) == int(question.truth)


def countable() -> list[str]:
    return [*PLURALS, *(f"{colour} {name}" for colour in COLOURS for name in SHAPES)]


def number_of(scene: Scene, name: str) -> int:
    return sum(name in (item.name, f"{item.colour} {item.name}") for item in scene.items)


@FEW
@given(seed=SEEDS)
def test_directions_are_those_of_the_centres(assets: Assets, seed: int) -> None:
    scene = render(assets, seed, "train")
    for question in questions(scene, seed):
        if question.task != "where":
            continue
        name, relation, reference = question.truth.split("|")
        ((x, y),) = [i.centre for i in scene.items if name in (i.name, f"{i.colour} {i.name}")]
        ((rx, ry),) = [i.centre for i in scene.items if reference in (i.name, f"{i.colour} {i.name}")]
        gap = {"left": rx - x, "right": x - rx, "above": ry - y, "below": y - ry}[relation]
        assert gap >= 28
        assert gap > min(abs(x - rx), abs(y - ry)) or abs(x - rx) == abs(y - ry)


def test_all_tasks_are_asked_about_equally_often(many: list[tuple[Scene, Question]]) -> None:
    shares = Counter(question.task for _, question in many)
    assert set(shares) == set(TASKS)
    assert min(shares.values()) > 0.4 * max(shares.values())


def test_a_name_does_not_give_yes_or_no_away(many: list[tuple[Scene, Question]]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in many:
        if question.task == "presence":
            name = question.answer.rstrip(".").split()[-1]
            answers[name][question.truth] += 1
            answers[""][question.truth] += 1
    for name, counts in answers.items():
        total = sum(counts.values())
        # Four standard deviations of a fair coin, and some room for text, which is only tuned.
        assert abs(counts["yes"] - total / 2) <= 2 * total**0.5 + 0.06 * total, (name, counts)


def test_counts_reach_from_none_to_six(many: list[tuple[Scene, Question]]) -> None:
    counts = Counter(question.truth for _, question in many if question.task == "count")
    assert set(counts) >= set("0123456")
    assert counts["0"] < 0.5 * sum(counts.values())


def test_a_picture_is_not_asked_the_same_twice(many: list[tuple[Scene, Question]]) -> None:
    seen: dict[int, set[tuple[str, str]]] = defaultdict(set)
    for scene, question in many:
        key = (question.task, question.answer)
        assert key not in seen[id(scene)]
        seen[id(scene)].add(key)


def test_training_never_uses_a_test_wording() -> None:
    for task, wordings in TRAIN.items():
        assert len(set(wordings)) == len(wordings) >= 12
        assert len(set(TEST[task]) - set(wordings)) >= 4
    assert TRAIN.keys() == TEST.keys()


def test_the_vocabulary_covers_names_answers_and_given_words() -> None:
    text = "\n".join(vocabulary_text(["garden"]))
    for name, plural in PLURALS.items():
        assert f"no {name}." in text
        assert plural in text
    for word in (*COLOURS, "GARDEN", "to the left of", "colour", "color", "Yes, ", "No, "):
        assert word in text
    assert "{" not in text
