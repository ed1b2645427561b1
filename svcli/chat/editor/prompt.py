"""Reading lines: history, search, several lines, completion."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from svcli.chat.editor.completion import ChatCompleter
from svcli.chat.editor.history import KeptHistory
from svcli.chat.opening import Opening
from svcli.chat.reader import is_open_block
from svcli.ui import printable

_MOST = 1_000_000
"""Lines of history, at most."""


class LineEditor:
    """Reads from a terminal, and draws on stderr: stdout is for answers."""

    is_interactive = True

    def __init__(self, opening: Opening, history: Path) -> None:
        self._opening = opening
        stream = sys.stderr if sys.stderr.isatty() else sys.stdout
        output = _Output.from_pty(stream, term=os.environ.get("TERM"))
        self._session: PromptSession[str] = PromptSession(
            output=output,
            color_depth=ColorDepth.from_env(),  # NO_COLOR
            history=KeptHistory(history),
            completer=ChatCompleter(lambda: opening.session),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            multiline=True,
            key_bindings=_keys(),
            enable_suspend=True,
            enable_open_in_editor=True,
            prompt_continuation="",
        )

    def read(self, label: str) -> str:
        """Raises what opening the model raised, if it did so meanwhile, EOFError, KeyboardInterrupt."""
        return self._session.prompt(printable(label), pre_run=self._watch)

    def _watch(self) -> None:
        """A model that cannot be opened is told at once, and not behind the first question."""
        app, loop = get_app(), asyncio.get_running_loop()

        def leave(error: BaseException) -> None:
            if app.is_running and not app.is_done:
                app.exit(exception=error)

        def tell(error: BaseException) -> None:
            # The prompt may be over by then, and its loop.
            if not loop.is_closed():
                loop.call_soon_threadsafe(leave, error)

        self._opening.when_failed(tell)


class _Output(Vt100_Output):
    """A terminal that is not asked where its cursor is: those that cannot say it would get a warning."""

    @property
    def responds_to_cpr(self) -> bool:
        return False


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open_block(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text:
            # What was looked up in the history stays as it is there.
            buffer.history_forward(count=_MOST)
            buffer.text = ""
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys
