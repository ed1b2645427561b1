"""Which words of the command line are pictures, and which is the question."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from svcli.chat.pictures import STDIN, is_picture
from svcli.errors import UsageError


@dataclass(frozen=True)
class Arguments:
    """What was given to `svcli chat`."""

    pictures: tuple[str, ...]
    question: str | None
    """None: a conversation."""


def as_text(argument: str) -> str:
    """What was typed, which is UTF-8 whatever the locale says; what is not, is shown as such."""
    return os.fsencode(argument).decode(errors="replace")


def read_arguments(words: Sequence[str]) -> Arguments:
    """All words are pictures but the last, which is the question unless it is a picture, too.

    Raises UsageError for an empty question, one in the wrong place, or one without a picture.
    """
    if not words:
        return Arguments((), None)
    *others, last = words
    if not last.strip():
        raise UsageError("the question is empty")
    if is_picture(last):
        if any(not is_picture(word) for word in others):
            raise UsageError('the question comes last: svcli chat IMAGE "QUESTION"')
        others, question = list(words), None
    elif not others:
        raise UsageError(f'no such picture: {last}; a question comes behind one: svcli chat IMAGE "QUESTION"')
    else:
        question = as_text(last)
    if others.count(STDIN) > 1:
        raise UsageError("stdin (-) is one picture; it stands there once")
    if STDIN in others and question is None:
        raise UsageError('with a picture on stdin (-) the question is an argument: svcli chat - "QUESTION"')
    return Arguments(tuple(others), question)
