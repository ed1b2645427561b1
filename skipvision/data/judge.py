"""Whether an answer is right: lenient in form, strict in content."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from skipvision.data.names import COLOURS, PLURALS


@dataclass(frozen=True)
class Question:
    """A question with a model answer.

    `truth` is what an answer is judged by: a phrase ("red circle") or quoted text for "what",
    a colour, a count, "subject|relation|reference" for "where", yes or no, the letters for
    "read", counted phrases joined by ";" for "describe", the official word for "easy_vqa".
    """

    task: str
    question: str
    answer: str
    truth: str


_NUMBERS = {
    **{str(i): i for i in range(21)},
    **{"no": 0, "zero": 0, "none": 0, "a": 1, "an": 1, "one": 1, "two": 2, "three": 3},
    **{"four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
}
_SINGULARS = {form: name for name, plural in PLURALS.items() for form in (name, plural)}
_NAME = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _SINGULARS), key=len, reverse=True)) + r")\b")
_COLOUR = re.compile(r"\b(" + "|".join(COLOURS) + r")\b")
_RELATION = re.compile(r"\b(left|right|above|over|top|below|under|beneath|bottom)\b")
_RELATIONS = {
    **{"left": "left", "right": "right", "above": "above", "over": "above", "top": "above"},
    **{"below": "below", "under": "below", "beneath": "below", "bottom": "below"},
}
_OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}
_TEXT = re.compile(r"(?:the |a )?(?:word|number|text) \"?([a-z0-9]+)\"?")


def is_right(question: Question, answer: str) -> bool:
    """Return whether the answer states the question's truth and nothing that contradicts it."""
    said = _normal(answer)
    judge = {
        "what": _what,
        "colour": _colour,
        "count": _count,
        "where": _where,
        "presence": _presence,
        "read": _read,
        "describe": _describe,
        "easy_vqa": _easy_vqa,
    }[question.task]
    return judge(question.truth, said)


def _normal(answer: str) -> str:
    said = answer.strip().lower().replace("grey", "gray")
    said = re.sub(r"(?<=\w)['\u2019](?=\w)", "", said)
    said = re.sub(r"[\u201c\u201d\u2018\u2019']", '"', said)
    return re.sub(r"\s+", " ", re.sub(r"[.!?:]+", " ", said)).strip()


def _names(said: str) -> list[str]:
    return [_SINGULARS[match] for match in _NAME.findall(said)]


def _what(truth: str, said: str) -> bool:
    if truth.startswith('"'):
        return bool(said) and _read(truth.strip('"'), said)
    *colour, name = truth.split(" ") if truth not in PLURALS else (truth,)
    if _names(said) != [name] or '"' in said or re.search(r"\b(no|not)\b", said):
        return False
    # A colour need not be said, but a wrong one is wrong.
    return not colour or set(_COLOUR.findall(said)) <= set(colour)


def _colour(truth: str, said: str) -> bool:
    return set(_COLOUR.findall(said)) == {truth} and not re.search(r"\b(no|not)\b", said)


def _count(truth: str, said: str) -> bool:
    words = [word for word in re.findall(r"\w+", said) if word in _NUMBERS]
    # "a" is one only where no plainer number is given.
    plain = [word for word in words if word not in ("a", "an")] or words
    return {_NUMBERS[word] for word in plain} == {int(truth)}


def _where(truth: str, said: str) -> bool:
    name, relation, reference = truth.split("|")
    found = {_RELATIONS[word] for word in _RELATION.findall(said)}
    if len(found) != 1 or re.search(r"\bnot\b", said):
        return False
    allowed = f"{name} {reference}"
    if not set(_names(said)) <= set(_names(allowed)):
        return False
    if not set(_COLOUR.findall(said)) <= set(_COLOUR.findall(allowed)):
        return False
    first, second = _position(name, said), _position(reference, said)
    swapped = 0 <= second < first
    return found == {_OPPOSITES[relation] if swapped else relation}


def _position(phrase: str, said: str) -> int:
    """Return where the phrase, or at least its noun, begins; -1 where it does not occur."""
    for wanted in (phrase, phrase.rpartition(" ")[2]):
        match = re.search(rf"\b{re.escape(wanted)}\b", said)
        if match:
            return match.start()
    return -1


def _presence(truth: str, said: str) -> bool:
    return re.match(r"(yes|no)\b", said) is not None and said.startswith(truth)


def _read(truth: str, said: str) -> bool:
    quoted = re.findall(r'"([^"]*)"', said)
    if quoted:
        letters = quoted[0]
    else:
        letters = re.sub(r"^(it|the (text|word|number|writing)) (says|reads|is) ", "", said)
        letters = re.sub(r"^(this is )?the (word|number|text) ", "", letters)
    return re.sub(r"[^a-z0-9]", "", letters) == truth.lower()


def _describe(truth: str, said: str) -> bool:
    return _parse(said) == Counter(
        {part.partition(" ")[2].lower(): int(part.partition(" ")[0]) for part in truth.split(";")}
    )


def _parse(said: str) -> Counter[str] | None:
    """Return what a description counts, or None where a part of it makes no sense."""
    found: Counter[str] = Counter()
    for text in _TEXT.findall(said):
        found[f'"{text}"'] += 1
    rest = _TEXT.sub("", said)
    rest = re.sub(r"\b(there (is|are)|this is|i (can )?see|and|in the (picture|image))\b", ",", rest)
    for part in filter(None, (part.strip() for part in rest.split(","))):
        number, _, thing = part.partition(" ")
        if number not in _NUMBERS:
            number, thing = "1", part.removeprefix("the ")
        colours = _COLOUR.findall(thing)
        names = _names(thing)
        words = _NAME.sub("", _COLOUR.sub("", thing)).strip()
        if len(names) != 1 or len(colours) > 1 or words:
            return None
        if number == "1" and not re.search(rf"\b{names[0]}\b", thing):
            return None
        found[" ".join([*colours, names[0]])] += _NUMBERS[number]
    return found


def _easy_vqa(truth: str, said: str) -> bool:
    options = set(COLOURS) | {"yes", "no", "teal", "circle", "rectangle", "triangle"}
    return {word for word in re.findall(r"\w+", said) if word in options} == {truth}
