"""The loop of a conversation: lines in, commands run, questions asked, until somebody leaves."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from svcli.__main__ import INTERRUPTED
from svcli.chat import facts
from svcli.chat.commands import Desk, Leave, add_pictures, ask, command_of, question_of, run_command, waiting_line
from svcli.chat.opening import Opening
from svcli.chat.reader import Reader, label
from svcli.chat.session import Session
from svcli.chat.view import ChatView
from svcli.errors import UsageError, explain
from svcli.settings import debugging

_MAKE_ROOM = "/undo, /clear, /image rm or a shorter question make room"


def converse(
    opening: Opening, reader: Reader, view: ChatView, make_desk: Callable[[Session], Desk], waiting: list[str]
) -> int:
    """Until somebody leaves; returns the exit code. `waiting` are names of pictures that are being opened.

    Where nobody is there to try again, raises what went wrong.
    """
    desk: Desk | None = None
    warned = False
    num_asked = 0
    while True:
        names = waiting if desk is None else [picture.short_name for picture in desk.session.waiting]
        try:
            line = reader.read(label(names, is_spoken=view.is_spoken))
        except EOFError:
            if not num_asked and not reader.is_interactive:
                raise UsageError(
                    'no question, neither as an argument nor on stdin: svcli chat IMAGE "QUESTION"'
                ) from None
            return 0
        except KeyboardInterrupt:
            if warned or not reader.is_interactive:
                return INTERRUPTED
            warned = True
            view.tell("Ctrl-C once more leaves", dim=True)
            continue
        if not line.strip():
            continue
        warned, num_asked = False, num_asked + 1
        if desk is None:
            desk = _opened(opening, view, make_desk)
        try:
            warned = _answer(desk, line)
        except Leave:
            return 0
        except KeyboardInterrupt:
            warned = True
        except BrokenPipeError:
            raise
        except Exception as error:
            if not reader.is_interactive:
                raise
            if debugging():
                traceback.print_exc()
            view.error(_sentence(error, desk.session))
        view.end_line()
        if warned:
            if not reader.is_interactive:
                return INTERRUPTED
            view.tell("stopped; Ctrl-C once more leaves", dim=True)


def _opened(opening: Opening, view: ChatView, make_desk: Callable[[Session], Desk]) -> Desk:
    if not opening.is_done:
        view.wait("opening the model...")
    desk = make_desk(opening.result())
    view.end_line()
    return desk


def _answer(desk: Desk, line: str) -> bool:
    """Whether it was broken off by Ctrl-C."""
    command = command_of(line)
    if command is not None:
        before = desk.last
        run_command(desk, *command)
        return desk.last is not before and desk.last is not None and desk.last.stop_reason == facts.INTERRUPTED
    text = line if line.startswith("//") else _without_pictures(desk, line)
    if not text.strip():
        return False
    turn = ask(desk, question_of(text))
    if turn.stop_reason == "context":
        desk.view.note(_MAKE_ROOM)
    return turn.stop_reason == facts.INTERRUPTED


def _without_pictures(desk: Desk, line: str) -> str:
    """What a line says beside the pictures that are named in it by path, which go with the question."""
    from svcli_engines.dropped_paths import dropped_paths

    paths, rest = dropped_paths(line)
    if not paths:
        return line
    add_pictures(desk, [str(path) for path in paths])
    if not rest.strip():
        desk.view.tell(waiting_line([path.name for path in paths]))
    return rest


def _sentence(error: Exception, session: Session) -> str:
    from svcli_engines.processor import LongPromptError

    message, _ = explain(error)
    if isinstance(error, LongPromptError) and session.messages:
        return f"{message}; {_MAKE_ROOM}"
    return message
