"""What Tab offers: commands, their values, and paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from svcli.chat.commands import COMMANDS, IMAGE_WORDS, SETTINGS
from svcli.chat.session import Session

_TO_ESCAPE = " \t\\'\"()&;*?[]$`!<>|#"


class ChatCompleter(Completer):
    """`session` returns None as long as there is none."""

    def __init__(self, session: Callable[[], Session | None]) -> None:
        self._session = session

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        del complete_event
        line = document.text_before_cursor
        if line.startswith("/") and " " not in line and "/" not in line[1:]:
            yield from _among(
                (f"/{each.name} " if each.arguments else f"/{each.name}" for each in COMMANDS.values()), line
            )
            return
        command, _, rest = line.partition(" ")
        word = _last_word(rest if line.startswith("/") else line)
        for values in self._values(command, rest):
            yield from _among(values, word)
        if _takes_path(command, rest) or word.startswith(("./", "../", "~/", "/")):
            yield from _paths(word)

    def _values(self, command: str, rest: str) -> Iterator[Iterable[str]]:
        is_first = " " not in rest
        session = self._session()
        if command == "/image" and is_first:
            yield (f"{word} " if word in ("add", "rm") else word for word in IMAGE_WORDS)
        elif command == "/image" and rest.startswith(("rm ", "show ")) and session is not None:
            yield (str(number) for number in range(1, len(session.pictures) + 1))
        elif command == "/set" and is_first:
            yield (f"{name} " for name in SETTINGS)
        elif command == "/clear" and is_first:
            yield ("all",)
        elif command == "/skip" and is_first:
            yield ("on", "off", *(session.model.variants if session is not None else ()))


def _takes_path(command: str, rest: str) -> bool:
    return command in ("/save", "/load") or (command == "/image" and rest.startswith("add "))


def _among(values: Iterable[str], begun: str) -> Iterator[Completion]:
    for value in values:
        if value.startswith(begun):
            yield Completion(value, start_position=-len(begun))


def _last_word(text: str) -> str:
    """Behind the last blank that is not escaped."""
    start = 0
    for place, letter in enumerate(text):
        if letter.isspace() and text[place - 1 : place] != "\\":
            start = place + 1
    return text[start:]


def _paths(word: str) -> Iterator[Completion]:
    """Files and folders that begin so; blanks and quotes of their names are escaped, as dropped paths are."""
    plain = "".join(letter for place, letter in enumerate(word) if letter != "\\" or word[place - 1 : place] == "\\")
    head, begun = os.path.split(plain)
    try:
        entries = sorted(Path(os.path.expanduser(head) or ".").iterdir())
    except (OSError, ValueError, RuntimeError):
        return
    for entry in entries:
        if entry.name.startswith(begun) and (begun.startswith(".") or not entry.name.startswith(".")):
            text = os.path.join(head, entry.name) + ("/" if entry.is_dir() else "")
            escaped = "".join(f"\\{letter}" if letter in _TO_ESCAPE else letter for letter in text)
            yield Completion(escaped, start_position=-len(word), display=entry.name + ("/" if entry.is_dir() else ""))
