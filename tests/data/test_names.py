"""The table of kinds is sound and names are said properly."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from skipvision.data.kinds import KINDS
from skipvision.data.names import COLOURS, LABELS, PLURALS, SHAPES, counted, with_article


def test_names_are_unambiguous() -> None:
    assert len(set(LABELS)) == len(LABELS)
    forms = [form for name, plural in PLURALS.items() for form in {name, plural}]
    assert max(Counter(forms).values()) == 1
    assert not set(PLURALS) & set(COLOURS)
    for name in PLURALS:
        inside = [other for other in PLURALS if other != name and re.search(rf"\b{other}\b", name)]
        assert not inside


def test_every_kind_comes_in_two_styles_or_more() -> None:
    for kind in KINDS:
        assert kind.emoji
        assert all(re.fullmatch(r"[0-9a-f]{4,5}(-fe0f)?", code) for code in kind.emoji)
        assert len(set(kind.photo)) == len(kind.photo)
        assert len(set(kind.clipart)) == len(kind.clipart)


def test_labels_are_background_kinds_shapes_glyphs() -> None:
    assert LABELS[0] == ""
    assert LABELS[1] == KINDS[0].name
    assert LABELS[len(KINDS) + 1 : len(KINDS) + 1 + len(SHAPES)] == SHAPES
    assert "".join(LABELS[-36:]) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@pytest.mark.parametrize(
    ("number", "phrase", "said"),
    [
        (1, "owl", "an owl"),
        (1, "red circle", "a red circle"),
        (1, "orange star", "an orange star"),
        (2, "mouse", "2 mice"),
        (3, "ice cream", "3 ice creams"),
        (4, "blue cross", "4 blue crosses"),
        (2, "traffic light", "2 traffic lights"),
    ],
)
def test_counting_aloud(number: int, phrase: str, said: str) -> None:
    assert counted(number, phrase) == said


def test_articles() -> None:
    assert with_article("umbrella") == "an umbrella"
    assert with_article("dog") == "a dog"
