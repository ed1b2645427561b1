"""Records of every layout that is known, as conversations. Imports no torch.

A record is a mapping. Its pictures are in `images` or `image`, one or a list; its turns are in

| key | turns |
|---|---|
| `conversations` or `messages` | `{from, value}` (LLaVA) or `{role, content}`; content is text, or parts `{type: text, text}` and `{type: image}` |
| `texts` | `{user, assistant}` each (the Cauldron) |
| `question`, `answer` | one of each |

`<image>` in a question stands for the next picture. Marks are taken out, since templates put pictures in front of their
turn. Where there is no mark at all, all pictures go to the first question: LLaVA's own code would read such a picture
and never show it. Any other difference between marks and pictures is an error here; LLaVA's code lets it pass.
"""  # noqa: E501  the lines of a table

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from skipvision.training.conversation import BrokenSampleError, Conversation, Picture, Role, Turn

LAYOUTS = ("conversations", "messages", "texts", "question")
COLUMNS = ("id", "image", "images", *LAYOUTS, "answer")
"""All that is read of a record."""

_MARK = re.compile(" ?<image>")
_LONGEST_ID = 80
_ROLES: Mapping[object, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_record(name: str, record: object, picture: Callable[[object], Picture]) -> Conversation:
    """`picture` is asked for what a record says of one. Raises BrokenSampleError."""
    if not isinstance(record, Mapping):
        raise BrokenSampleError("is no table of keys and values", "unreadable")
    number = record.get("id")
    if isinstance(number, str | int) and str(number):
        name = f"{name} (id {str(number)[:_LONGEST_ID]})"
    turns: list[Turn] = []
    shown = listed_pictures(record)
    for role, content in _said(record):
        turn, own = _turn(role, content)
        turns.append(turn)
        shown += own
    turns = _placed(turns, len(shown))
    _check(turns)
    return Conversation(name, tuple(turns), tuple(picture(each) for each in shown))


def captioned(name: str, caption: str, pictures: tuple[Picture, ...]) -> Conversation:
    """Pictures, and what is to be said of them without being asked. Raises BrokenSampleError."""
    if not pictures:
        raise BrokenSampleError("has a caption and no picture", "missing picture")
    turns = [Turn("user", "", len(pictures)), Turn("assistant", caption.strip())]
    _check(turns)
    return Conversation(name, tuple(turns), pictures)


def listed_pictures(record: Mapping[str, Any]) -> list[object]:
    """What a record says of its pictures, one by one."""
    return _listed(record.get("images")) or _listed(record.get("image"))


def _listed(value: object) -> list[object]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if each not in (None, "")]


def _said(record: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    """Names of roles and contents."""
    key = next((each for each in LAYOUTS if record.get(each) is not None), None)
    if key is None:
        raise BrokenSampleError(f"has none of {', '.join(LAYOUTS)}", "unreadable")
    if key == "question":
        yield "user", record["question"]
        yield "assistant", record.get("answer")
        return
    rows = record[key]
    if not isinstance(rows, list | tuple) or not rows:
        raise BrokenSampleError(f"its {key} are no list of turns, or an empty one", "unreadable")
    for row in rows:
        if not isinstance(row, Mapping):
            raise BrokenSampleError(f"a turn of its {key} is no table of keys and values", "unreadable")
        if key == "texts":
            yield "user", row.get("user")
            yield "assistant", row.get("assistant")
        else:
            yield _either(row, "from", "role"), _either(row, "value", "content")


def _either(row: Mapping[str, Any], first: str, second: str) -> object:
    return row.get(second) if row.get(first) is None else row[first]


def _turn(name: object, content: object) -> tuple[Turn, list[object]]:
    """A turn with as many pictures as it has marks, and pictures that its parts name themselves."""
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BrokenSampleError(f"unknown role {name!r}", "unknown role")
    own: list[object] = []
    if isinstance(content, str):
        text, count = _MARK.subn("", content)
    elif isinstance(content, list | tuple):
        text, own, count = _joined(role, content)
    elif isinstance(content, int | float):  # as answers are in tables
        text, count = str(content), 0
    else:
        raise BrokenSampleError(f"a turn of the {role} has no text", "unreadable")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BrokenSampleError(f"a turn of the {role} holds halves of characters", "unreadable") from None
    if count and role != "user":
        raise BrokenSampleError(f"<image> in a turn of the {role}", "marks differ")
    return Turn(role, text.strip() if count else text, count), own


def _joined(role: Role, parts: Sequence[object]) -> tuple[str, list[object], int]:
    """Text, pictures that are named, and how many there are; a mark in a text is a word like any other."""
    texts: list[str] = []
    own: list[object] = []
    count = 0
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, Mapping) and kind == "image":
            count += 1
            own += _listed(part.get("image"))
        else:
            raise BrokenSampleError(f"a turn of the {role} has a part that is neither text nor image", "unreadable")
    return "".join(texts), own, count


def _placed(turns: list[Turn], num_pictures: int) -> list[Turn]:
    """Where no turn has a mark, the first question gets all pictures. Raises BrokenSampleError for other misfits."""
    marks = sum(turn.images for turn in turns)
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if marks == num_pictures:
        return turns
    if marks or first is None:
        raise BrokenSampleError(f"{marks} <image> for {num_pictures} pictures", "marks differ")
    return [*turns[:first], replace(turns[first], images=num_pictures), *turns[first + 1 :]]


def _check(turns: list[Turn]) -> None:
    """Raises BrokenSampleError unless there is an answer, and something in each turn."""
    if all(turn.role != "assistant" for turn in turns):
        raise BrokenSampleError("has no answer to learn from", "no answer")
    for turn in turns:
        if not turn.content.strip() and not turn.images:
            empty = turn.role == "assistant"
            raise BrokenSampleError(f"an empty turn of the {turn.role}", "no answer" if empty else "unreadable")
