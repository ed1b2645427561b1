"""Questions about a scene, with the answer and the truth it is judged by."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from skipvision.data.canvas import Item
from skipvision.data.facts import (
    PHRASES,
    direction,
    extremes,
    groups,
    phrase,
    said_alone,
    unique_names,
)
from skipvision.data.judge import Question, is_right
from skipvision.data.names import COLOURS, PLURALS, SHAPES, counted, with_article
from skipvision.data.scenes import Scene
from skipvision.data.wordings import PLACES, POLITE_ENDS, POLITE_STARTS, TEST, TRAIN, Wordings

__all__ = ["TASKS", "Question", "ask", "is_right", "vocabulary_text"]

T = TypeVar("T")

TASKS: tuple[str, ...] = ("what", "colour", "count", "where", "presence", "read", "describe")

# Rarer tasks weigh more, so that over many pictures all come about equally often.
_WEIGHTS = {
    "what": 1.5,
    "colour": 2.2,
    "count": 3.5,
    "where": 3.0,
    "presence": 0.9,
    "read": 9.0,
    "describe": 0.9,
}
_REPEAT = 0.25  # the weight of a task that the picture already has a question for


def ask(scene: Scene, rng: np.random.Generator, *, wordings: Wordings, per_picture: int) -> list[Question]:
    """Return up to `per_picture` different questions about the scene."""
    asker = _Asker(scene, rng, wordings)
    makers: dict[str, Callable[[], Question | None]] = {
        "what": asker.what,
        "colour": asker.colour,
        "count": asker.count,
        "where": asker.where,
        "presence": asker.presence,
        "read": asker.read,
        "describe": asker.describe,
    }
    weights = dict(_WEIGHTS)
    if max(asker.counts().values(), default=0) < 2:
        weights["count"] = 0.18  # little to count here
    found: dict[tuple[str, str], Question] = {}
    for _ in range(8 * per_picture):
        if len(found) == per_picture or not weights:
            break
        shares = np.array(list(weights.values()))
        task = list(weights)[int(rng.choice(len(weights), p=shares / shares.sum()))]
        question = makers[task]()
        if question is None:
            del weights[task]
            continue
        weights[task] *= _REPEAT
        found.setdefault((task, question.answer), question)
        if task in ("read", "describe"):
            del weights[task]
    return list(found.values())


class _Asker:
    def __init__(self, scene: Scene, rng: np.random.Generator, wordings: Wordings) -> None:
        self.scene = scene
        self.rng = rng
        self.wordings = wordings
        self.groups = groups(scene)
        self.unique = unique_names(scene)

    def what(self) -> Question | None:
        items = self.scene.items
        if len(items) == 1:
            if items[0].text is not None:
                return None
            return self._what("what", items[0])
        places = extremes(self.scene)
        coloured = self._coloured_alone()
        if coloured and (not places or self.rng.random() < 0.2):
            item = self._pick(coloured)
            return self._what("what_coloured", item, colour=item.colour or "")
        if not places:
            return None
        place = self._pick(sorted(places))
        return self._what("what_place", places[place], place=self._pick(PLACES[place]))

    def colour(self) -> Question | None:
        coloured = [item for item in self.unique.values() if item.colour is not None]
        if not coloured:
            return None
        item = self._pick(coloured)
        name = self._pick(("text", item.name)) if item.text is not None else item.name
        text = self._worded("colour", name=name)
        return Question("colour", text, f"The {name} is {item.colour}.", item.colour or "")

    def count(self) -> Question | None:
        counts = self.counts()
        none = 0.1 if max(counts.values(), default=0) > 1 else 0.4
        if not counts or self.rng.random() < none:
            name, number = self._absent(), 0
        else:
            names = sorted(counts)
            weights = np.array([counts[name] ** 3 for name in names], float)
            name = names[int(self.rng.choice(len(names), p=weights / weights.sum()))]
            number = counts[name]
        plural = _plural(name)
        text = self._worded("count", names=plural)
        if number == 0:
            answer = f"There are no {plural}."
        elif number == 1:
            answer = f"There is 1 {name}."
        else:
            answer = f"There are {number} {plural}."
        return Question("count", text, answer, str(number))

    def where(self) -> Question | None:
        named = self._named()
        clear = [
            (first, second)
            for first in sorted(named)
            for second in sorted(named)
            if first != second and direction(named[first], named[second])
        ]
        if not clear:
            return None
        name, ref = self._pick(clear)
        relation = direction(named[name], named[ref])
        assert relation is not None
        if len(self.scene.items) == 2 and self.rng.random() < 0.3:
            text = self._worded("where_other", name=name)
        else:
            text = self._worded("where_ref", name=name, ref=ref)
        answer = f"The {name} is {PHRASES[relation]} the {ref}."
        return Question("where", text, answer, f"{name}|{relation}|{ref}")

    def presence(self) -> Question | None:
        has_text = any(item.category == "text" for item in self.scene.items)
        # Fewer than half of the pictures have text: asking the others less evens yes and no.
        if self.rng.random() < (0.17 if has_text else 0.08):
            text = self._worded("presence_text")
            answer = "Yes, there is some text." if has_text else "No, there is no text."
            return Question("presence", text, answer, "yes" if has_text else "no")
        things = [group.items[0] for group in self.groups if group.items[0].text is None]
        if not things:
            # Only "no" would be true of any name here, and would tip the balance.
            return None
        item = self._pick(things)
        there = self.rng.random() < 0.5
        if item.category == "object":
            return self._presence(item.name if there else self._absent_kind(), there)
        if self.rng.random() < 0.5:
            return self._presence(item.name if there else self._absent_shape(), there)
        name = phrase(item) if there else self._absent_coloured(item)
        return self._presence(name, there)

    def read(self) -> Question | None:
        texts = [item.text for item in self.scene.items if item.text is not None]
        if not texts:
            return None
        text = texts[0].upper()
        return Question("read", self._worded("read"), f'It says "{text}".', text)

    def describe(self) -> Question | None:
        said = [group.said for group in self.groups]
        listed = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
        verb = "are" if said[0][0].isdigit() else "is"
        truth = ";".join(sorted(group.canonical for group in self.groups))
        text = self._worded("describe")
        return Question("describe", text, f"There {verb} {listed}.", truth)

    def _what(self, wording: str, item: Item, **slots: str) -> Question:
        truth = f'"{item.text.upper()}"' if item.text is not None else phrase(item)
        return Question("what", self._worded(wording, **slots), f"This is {said_alone(item)}.", truth)

    def _presence(self, name: str, there: bool) -> Question:
        text = self._worded("presence", a=with_article(name))
        answer = f"Yes, there is {with_article(name)}." if there else f"No, there is no {name}."
        return Question("presence", text, answer, "yes" if there else "no")

    def _coloured_alone(self) -> list[Item]:
        """Return shapes whose colour no other shape or text has."""
        shown = [item for item in self.scene.items if item.colour is not None]
        colours = [item.colour for item in shown]
        return [i for i in shown if i.category == "shape" and colours.count(i.colour) == 1]

    def counts(self) -> dict[str, int]:
        """Return how many there are of each thing, of a shape also in each colour."""
        counts: dict[str, int] = {}
        for item in self.scene.items:
            if item.category == "text":
                continue
            for name in {item.name, phrase(item)}:
                counts[name] = counts.get(name, 0) + 1
        return counts

    def _named(self) -> dict[str, Item]:
        """Return things by a phrase that singles them out, a shape with its colour or without."""
        named: dict[str, Item] = {}
        for group in self.groups:
            item = group.items[0]
            if len(group.items) > 1:
                continue
            plain = item.name in self.unique
            named[item.name if plain and self.rng.random() < 0.6 else group.phrase] = item
        return named

    def _absent(self) -> str:
        return self._absent_shape() if self.rng.random() < 0.3 else self._absent_kind()

    def _absent_kind(self) -> str:
        present = {item.name for item in self.scene.items}
        return self._pick([kind for kind in self.scene.kinds if kind not in present])

    def _absent_shape(self) -> str:
        present = {item.name for item in self.scene.items}
        return self._pick([shape for shape in SHAPES if shape not in present])

    def _absent_coloured(self, item: Item) -> str:
        """Return a phrase that differs from the item in its colour or, less often, its shape."""
        present = {group.phrase for group in self.groups}
        if self.rng.random() < 0.7:
            options = [f"{colour} {item.name}" for colour in COLOURS]
        else:
            options = [f"{item.colour} {shape}" for shape in SHAPES]
        return self._pick([option for option in options if option not in present])

    def _pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def _worded(self, task: str, **slots: str) -> str:
        unseen = self.wordings == "test" and self.rng.random() < 0.5
        template = self._pick((TEST if unseen else TRAIN)[task])
        return self._roughened(template.format(**slots))

    def _roughened(self, text: str) -> str:
        """Return the question as people type it: without capitals, marks, or with courtesy."""
        rng = self.rng
        if rng.random() < 0.5:
            text = text.replace("colour", "color")
        if rng.random() < 0.07:
            start = self._pick(POLITE_STARTS)
            text = start + (text if start[-2] in "!?" else text[0].lower() + text[1:])
        elif rng.random() < 0.07 and ". " not in text:
            text = text[:-1] + self._pick(POLITE_ENDS) + text[-1]
        if rng.random() < 0.3:
            text = text.rstrip("?.")
        if rng.random() < 0.35:
            text = text.lower()
        return text


def _plural(name: str) -> str:
    return counted(2, name).partition(" ")[2]


def vocabulary_text(words: Sequence[str] = ()) -> Iterator[str]:
    """Yield enough sentences to train a tokenizer on; `words` are those pictures may show."""
    yield from _sentences()
    rng = np.random.default_rng(0)
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    for _ in range(1500):
        yield f'It says "{"".join(rng.choice(letters, int(rng.integers(1, 7))))}".'
    for word in words:
        yield f'It says "{word.upper()}".'


def _sentences() -> Iterator[str]:
    names = list(PLURALS) + [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    wordings = [text for table in (TRAIN, TEST) for texts in table.values() for text in texts]
    places = [place for options in PLACES.values() for place in options]
    rng = np.random.default_rng(0)
    for name in names:
        other = names[int(rng.integers(len(names)))]
        place = places[int(rng.integers(len(places)))]
        colour = COLOURS[int(rng.integers(len(COLOURS)))]
        slots = {"a": with_article(name), "name": name, "names": _plural(name)}
        for wording in rng.choice(wordings, 12):
            text = str(wording).format(**slots, ref=other, place=place, colour=colour)
            yield text
            yield text.lower().replace("colour", "color")
        yield f"This is {with_article(name)}."
        yield f"Yes, there is {with_article(name)}. No, there is no {name}."
        yield f"There are no {_plural(name)}. There is 1 {name}."
        yield f"There are {int(rng.integers(2, 7))} {_plural(name)}."
        yield f"There is {with_article(name)}, {with_article(other)} and 2 {_plural(name)}."
        for relation in PHRASES.values():
            yield f"The {name} is {relation} the {other}."
        yield f"The {name} is {colour}. The word is {colour}. The text is {colour}."
    for wording in wordings:
        yield re.sub(r"[{}]", "", wording)
    for start in POLITE_STARTS:
        yield start + "what is this" + POLITE_ENDS[0] + "?"
    yield 'There is the word "STOP" and the number "42". Yes, there is some text. It is red.'
