"""How MMMU's eval_utils.py reads answers: a letter among options, or numbers and words of an open answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ENDS = ",.!?;:'"
_LONG_ANSWER = 5
"""Words; of answers with more an option may be named by its text."""
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""Behind these the answer stands."""
_TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def letter_of(said: str, options: Sequence[str]) -> str:
    """The letter that is meant, or "" where none can be read: parse_multi_choice_response, but for its guess.

    Letters in brackets go first, then those that stand alone, then in longer answers the options' texts; of several
    the one that comes last.
    """
    for mark in _ENDS:
        said = said.strip(mark)
    text = f" {said} "
    letters = [chr(ord("A") + number) for number in range(len(options))]
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in letters}
        if max(places.values(), default=-1) >= 0:
            return max(letters, key=places.__getitem__)
    if len(text.split()) > _LONG_ANSWER:
        places = {letter: text.lower().rfind(each.lower()) for letter, each in zip(letters, options, strict=True)}
        if max(places.values(), default=-1) >= 0:
            return max(letters, key=places.__getitem__)
    return ""


def is_right(said: str, truths: Sequence[str]) -> bool:
    """eval_open: a number of the answer is one of the truths, or a text of it holds one."""
    wanted = [value for truth in truths for value in _normal(truth)]
    for value in _values(said):
        if isinstance(value, float):
            if value in wanted:
                return True
        elif any(isinstance(each, str) and each in value for each in wanted):
            return True
    return False


def _values(said: str) -> list[str | float]:
    """parse_open_response: the ends of lines that give the answer, or all of it, and the numbers in them."""
    whole = said.strip().strip(".").lower()
    # The script splits sentences at capital letters, too, of which there are none any more.
    lines = whole.split("\n")
    ends: list[str] = []
    for number, line in enumerate(lines, start=1):
        keys = (*_KEYS, "=") if number == len(lines) else _KEYS
        found = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = ""
        for end in found:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in _TRIVIAL:
            ends.append(shortest)
    texts = ends or [whole]
    numbers = [number for text in texts for form in _NUMBERS for number in form.findall(text)]
    return [value for text in [*texts, *numbers] for value in _normal(text)]


def _normal(text: str) -> list[str | float]:
    """A number, to two places, or words in lower case; a single letter as the end or the beginning of a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
