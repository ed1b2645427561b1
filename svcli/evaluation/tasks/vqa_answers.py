"""How answers to questions about pictures are made alike before they are compared: EvalAI's VQA evaluation."""

from __future__ import annotations

import re

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
"""m4c_evaluator.py takes out that many: it hands re.UNICODE, which is 32, to re.sub as its count."""
# Each with one apostrophe missing is what people write. Capitals and 's are gone before these are looked up.
_SHORT_FORMS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def processed(answer: str) -> str:
    """An answer as EvalAI's VQA evaluation compares it: marks, articles, numbers in words, and missing apostrophes."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    given = text
    for mark in _MARKS:
        text = text.replace(mark, "" if f"{mark} " in given or f" {mark}" in given else " ")
    text = _FULL_STOP.sub("", text, count=_MOST_FULL_STOPS)
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_LONG_FORMS.get(word, word) for word in words if word not in _ARTICLES)


def _written() -> dict[str, str]:
    forms = {
        form[:place] + form[place + 1 :]: form
        for form in _SHORT_FORMS.split()
        for place, letter in enumerate(form)
        if letter == "'"
    }
    # The other way round in the evaluation's own list.
    return forms | {"somebody'd": "somebodyd"}


_LONG_FORMS = _written()
