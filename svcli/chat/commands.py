"""What can be typed in a conversation beside questions."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svcli.chat import compare as comparison
from svcli.chat import saved
from svcli.chat.facts import settings, table
from svcli.chat.keys import silent_keys
from svcli.chat.model import DENSE, SKIPPED
from svcli.chat.pictures import open_pictures
from svcli.chat.session import Session
from svcli.chat.turn import Teller, Turn
from svcli.errors import UsageError

if TYPE_CHECKING:
    from svcli.chat.view import ChatView

IMAGE_WORDS = ("add", "rm", "list", "show")
SETTINGS = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")


class Leave(Exception):
    """The conversation is over."""


@dataclass
class Desk:
    """What commands work on."""

    session: Session
    view: ChatView
    teller: Teller
    allow_private: bool = False
    last: Turn | None = None
    """The turn before."""


@dataclass(frozen=True)
class Command:
    """One of them."""

    name: str
    arguments: str
    purpose: str
    run: Callable[[Desk, str], None]


def command_of(line: str) -> tuple[str, str] | None:
    """Name and arguments where a line is a command, and no question: `//` begins a question with a slash, and so does
    a path."""
    name, _, rest = line.strip().partition(" ")
    if not name.startswith("/") or name.startswith("//") or "/" in name[1:] or os.path.isfile(name):
        return None
    return name[1:].lower(), rest.strip()


def question_of(line: str) -> str:
    """What is asked by a line that is no command."""
    text = line.strip()
    if len(text) >= 6 and text.startswith('"""') and text.endswith('"""'):
        return text[3:-3].strip("\n")
    return text[1:] if text.startswith("//") else text


def run_command(desk: Desk, name: str, rest: str) -> None:
    """Raises UsageError for one that there is not, Leave, or what the command does."""
    found = COMMANDS.get(_OTHER_NAMES.get(name, name))
    if found is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean /{near[0]}?" if near else "; /help shows what there is"
        raise UsageError(f"there is no /{name}{hint}")
    found.run(desk, rest)


def ask(desk: Desk, question: str) -> Turn:
    """Asks it and shows the answer."""
    if not question.strip():
        raise UsageError("the question is empty")
    names = [picture.name for picture in desk.session.waiting]
    desk.last = desk.teller.tell(desk.session, Turn(question, names), lambda: desk.session.ask(question))
    return desk.last


def add_pictures(desk: Desk, words: list[str]) -> None:
    """They go with the next question. Raises ImageError."""
    desk.view.wait("opening...")
    found = open_pictures(words, desk.session.model.manifest.image.transparency, allow_private=desk.allow_private)
    desk.session.waiting += found
    desk.view.note(*(note for picture in found for note in picture.notes))


def waiting_line(names: Sequence[str]) -> str:
    """What pictures wait for."""
    return f"{', '.join(names)}: {'goes' if len(names) == 1 else 'go'} with the next question"


def _image(desk: Desk, rest: str) -> None:
    what, _, argument = rest.partition(" ")
    if what == "add" and argument:
        before = len(desk.session.waiting)
        add_pictures(desk, _words(argument))
        desk.view.tell(waiting_line([picture.short_name for picture in desk.session.waiting[before:]]))
    elif what == "rm" and argument:
        numbers = sorted({_number(word) for word in argument.split()}, reverse=True)
        if numbers[0] > len(desk.session.pictures):
            raise UsageError(f"there is no picture {numbers[0]}; /image list shows all")
        for number in numbers:
            desk.view.tell(f"{desk.session.remove_picture(number).short_name}: taken away")
    elif what in ("", "list"):
        if not desk.session.pictures:
            desk.view.tell("no pictures; /image add FILE")
        for number, picture in enumerate(desk.session.pictures, 1):
            waits = "" if number <= len(desk.session.shown) else ", goes with the next question"
            desk.view.tell(f"{number}: {picture.name}, {picture.image.width} x {picture.image.height}{waits}")
    elif what == "show":
        from svcli.chat.overlay import show_picture

        if not desk.session.pictures:
            raise UsageError("no pictures; /image add FILE")
        show_picture(desk.session, _number(argument or str(len(desk.session.pictures))), desk.view)
    else:
        raise UsageError("/image add FILE, /image rm NUMBER, /image list or /image show [NUMBER]")


def _clear(desk: Desk, rest: str) -> None:
    if rest not in ("", "all"):
        raise UsageError("/clear forgets what was said, /clear all the pictures, too")
    desk.session.clear(pictures=rest == "all")
    kept = [picture.short_name for picture in desk.session.waiting]
    desk.view.tell("forgotten" + (f"; {waiting_line(kept)}" if kept else ""))


def _regen(desk: Desk, _rest: str) -> None:
    session = desk.session
    if session.question is None:
        raise UsageError("nothing has been asked yet")
    if session.sampling.temperature == 0 or session.sampling.seed is not None:
        why = "temperature is 0" if session.sampling.temperature == 0 else "there is a seed"
        desk.view.note(f"{why}, so the answer stays the same: /set temperature 0.7, /set seed none")
    question = session.question
    names = [picture.name for picture in session.shown[len(session.shown) - question.images :]]
    desk.last = desk.teller.tell(session, Turn(question.content, names), session.ask_again)


def _undo(desk: Desk, _rest: str) -> None:
    desk.view.tell(f"taken back: {desk.session.undo()}")


def _save(desk: Desk, rest: str) -> None:
    path = _path(rest, "/save FILE")
    saved.save(desk.session, path)
    desk.view.tell(f"saved in {path}")


def _load(desk: Desk, rest: str) -> None:
    path = _path(rest, "/load FILE")
    saved.load(desk.session, path, allow_private=desk.allow_private)
    asked = sum(message.role == "user" for message in desk.session.messages)
    desk.view.tell(f"{path}: {asked} questions, {len(desk.session.pictures)} pictures")
    if desk.session.question and desk.session.answer is not None:
        desk.view.tell(f"> {desk.session.question.content}", desk.session.answer)


def _set(desk: Desk, rest: str) -> None:
    if rest:
        key, _, text = rest.replace("=", " ", 1).partition(" ")
        key, text = key.replace("-", "_"), text.strip()
        if key not in SETTINGS:
            raise UsageError(f"there is no setting {key!r}: {', '.join(SETTINGS)}")
        changes: dict[str, Any] = {key: _value(key, text)}
        desk.session.sampling = replace(desk.session.sampling, **changes)
    now = settings(desk.session.sampling)
    desk.view.tell(*(f"{key} {'none' if now[key] is None else now[key]}" for key in SETTINGS))


def _stats(desk: Desk, _rest: str) -> None:
    if desk.last is None or desk.last.stats is None:
        raise UsageError("no answer has come to its end yet")
    desk.view.pairs("last answer", table(desk.last.stats, desk.session.runner.engine.capacity))


def _system(desk: Desk, rest: str) -> None:
    if not rest:
        desk.view.tell(desk.session.system or "no system text; /system TEXT")
        return
    desk.session.set_system("" if rest == "none" else rest)
    desk.view.tell("the model is told so in front of everything" if rest != "none" else "taken away")


def _copy(desk: Desk, _rest: str) -> None:
    if desk.session.answer is None:
        raise UsageError("there is no answer yet")
    desk.view.copy(desk.session.answer)
    desk.view.tell("the answer was sent to the clipboard of this terminal, where it takes one")


def _skip(desk: Desk, rest: str) -> None:
    session = desk.session
    if rest:
        desk.view.wait("opening...")
        session.switch({"on": SKIPPED, "off": DENSE}.get(rest, rest))
    others = ", ".join(name for name in session.model.variants if name != session.variant)
    desk.view.tell(f"{session.variant} graphs answer" + (f"; there is also {others}" if others else ""))


def _compare(desk: Desk, rest: str) -> None:
    from svcli.chat.side_by_side import show_comparison

    with silent_keys():
        found = comparison.compare(desk.session, rest or None, desk.view.wait)
    show_comparison(found, desk.view)


def _help(desk: Desk, _rest: str) -> None:
    desk.view.pairs("", [(f"/{each.name} {each.arguments}".strip(), each.purpose) for each in COMMANDS.values()])
    desk.view.tell(
        'Alt+Enter begins a new line, and so does Enter inside of """. The path of a picture may stand in a question.',
        "Ctrl-C stops an answer, twice it leaves. Ctrl-R searches what was typed. // begins a question with a slash.",
    )


def _exit(_desk: Desk, _rest: str) -> None:
    raise Leave


def _words(text: str) -> list[str]:
    """As a shell reads them; where quotes are not closed, all of it is one."""
    if os.path.exists(os.path.expanduser(text)):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        return [text]


def _path(rest: str, usage: str) -> Path:
    words = _words(rest)
    if len(words) != 1:
        raise UsageError(usage)
    return Path(words[0]).expanduser()


def _number(word: str) -> int:
    if not word.isdecimal():
        raise UsageError(f"{word!r} is no number of a picture; /image list shows them")
    return int(word)


def _value(key: str, text: str) -> float | int | None:
    if key == "seed" and text.lower() in ("none", "off"):
        return None
    try:
        return float(text) if key in ("temperature", "top_p") else int(text)
    except ValueError:
        raise UsageError(f"{key} must be a number, not {text!r}") from None


_ALL = (
    Command("image", "add FILE | rm N | list | show [N]", "pictures: path, pattern, URL", _image),
    Command("clear", "[all]", "forget what was said; all: the pictures, too", _clear),
    Command("regen", "", "answer the last question once more", _regen),
    Command("undo", "", "take back the last question", _undo),
    Command("save", "FILE", "the conversation as JSON", _save),
    Command("load", "FILE", "go on with a saved one", _load),
    Command("set", "[KEY VALUE]", "temperature, top_k, top_p, seed, max_new_tokens", _set),
    Command("stats", "", "what the last answer took", _stats),
    Command("system", "[TEXT | none]", "what the model is told first", _system),
    Command("copy", "", "the last answer to the clipboard", _copy),
    Command("skip", "[on | off | NAME]", "which graphs answer", _skip),
    Command("compare", "[QUESTION]", "dense against skipped: answers, tokens, bytes, times", _compare),
    Command("help", "", "this", _help),
    Command("exit", "", "leave", _exit),
)
COMMANDS = {command.name: command for command in _ALL}
_OTHER_NAMES = {"quit": "exit", "bye": "exit", "?": "help", "reset": "clear"}
