"""The three ways of `svcli chat`: one question, a conversation, a script of questions."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from svcli import ui
from svcli.__main__ import INTERRUPTED
from svcli.chat import facts
from svcli.chat.arguments import Arguments
from svcli.chat.keys import silent_keys
from svcli.chat.model import Model
from svcli.chat.pictures import open_pictures
from svcli.chat.record import Events, Objects, Sink, open_log
from svcli.chat.session import Session
from svcli.chat.turn import Teller, Turn
from svcli.chat.view import ChatView
from svcli.engines import EngineName
from svcli.errors import UsageError
from svcli.remarks import remarks
from svcli.settings import state_folder

if TYPE_CHECKING:
    from svcli.chat.commands import Desk
    from svcli.chat.opening import Opening
    from svcli.chat.reader import Reader
    from svcli_engines.sampling import Sampling

_HISTORY = "chat_history"


@dataclass(frozen=True)
class Options:
    """How `svcli chat` was called, beside its pictures and its question."""

    bundle: Path
    engine: EngineName
    threads: int | None
    variant: str | None
    system: str | None
    sampling: Sampling
    as_json: bool
    as_jsonl: bool
    is_quiet: bool
    is_verbose: bool
    is_plain: bool
    compares: bool
    overlay: Path | None
    log: Path | None
    allow_private: bool


def start(given: Arguments, options: Options) -> int:
    """Runs it to its end; returns the exit code. Raises what goes wrong."""
    if options.compares and options.overlay:
        raise UsageError("--save-overlay goes with one answer, and not with --compare")
    if given.question is None and (options.compares or options.overlay):
        name = "--compare" if options.compares else "--save-overlay"
        raise UsageError(f'{name} goes with a question: svcli chat IMAGE "QUESTION" {name}')
    if options.overlay and options.overlay.suffix.lower() != ".png":
        raise UsageError(f"{options.overlay}: what was retained is written as PNG; choose a name that ends with .png")
    is_told = options.as_json or options.as_jsonl
    sinks: list[Sink] = [Objects()] if options.as_json else [Events()] if options.as_jsonl else []
    sinks += [open_log(options.log)] if options.log else []
    with ChatView(options.is_quiet or is_told, options.is_plain, tells_answers=not is_told) as view:
        teller = Teller(view, sinks, options.is_verbose)
        if given.question is not None:
            return _once(given, given.question, options, view, teller)
        return _converse(given, options, view, teller)


def open_session(given: Arguments, options: Options) -> Session:
    """Everything that answers need, opened. Raises BundleError, ImageError, and what opening the engine does."""
    from svcli_export.manifest import load_manifest

    manifest = load_manifest(options.bundle, quick=True)
    pictures = open_pictures(given.pictures, manifest.image.transparency, allow_private=options.allow_private)
    session = Session(Model(options.bundle, manifest, options.engine, options.threads), options.sampling, pictures)
    try:
        session.switch(options.variant or session.variant)
        if options.system is not None:
            session.set_system(options.system)
    except BaseException:
        session.model.close()
        raise
    return session


def _notes(session: Session) -> list[str]:
    """What the user should know before anything is asked."""
    manifest = session.runner.manifest
    return [*(note for picture in session.waiting for note in picture.notes), *remarks(manifest.config)]


def _once(given: Arguments, question: str, options: Options, view: ChatView, teller: Teller) -> int:
    view.wait("looking...")
    session = open_session(given, options)
    try:
        notes = _notes(session)
        view.note(*notes)
        if options.compares:
            from svcli.chat.compare import compare
            from svcli.chat.side_by_side import show_comparison

            with silent_keys():
                found = compare(session, question, view.wait)
            if options.as_json or options.as_jsonl:
                ui.show(json.dumps(found.told()))
            else:
                show_comparison(found, view)
            return 0
        names = [picture.name for picture in session.waiting]
        turn = teller.tell(session, Turn(question, names, notes=notes), lambda: session.ask(question))
        if options.overlay:
            from svcli.chat.overlay import save_overlay

            save_overlay(session, options.overlay)
        return INTERRUPTED if turn.stop_reason == facts.INTERRUPTED else 0
    finally:
        session.model.close()


def _converse(given: Arguments, options: Options, view: ChatView, teller: Teller) -> int:
    from svcli.chat.commands import Desk
    from svcli.chat.conversation import converse
    from svcli.chat.opening import Opening

    opening = Opening(lambda: open_session(given, options))

    def make_desk(session: Session) -> Desk:
        view.note(*_notes(session))
        return Desk(session, view, teller, options.allow_private)

    try:
        names = [os.path.basename(name) or name for name in given.pictures]
        with _reader(opening, options, view) as reader:
            return converse(opening, reader, view, make_desk, names)
    finally:
        opening.close()


@contextmanager
def _reader(opening: Opening, options: Options, view: ChatView) -> Iterator[Reader]:
    from svcli.chat.reader import PlainReader, ScriptReader

    if not sys.stdin.isatty():
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield ScriptReader(sys.stdin)
        return
    greeting = f"{options.bundle.resolve().name}: ask; /help shows what else there is, Ctrl-D leaves"
    if view.is_plain or not (sys.stderr.isatty() or sys.stdout.isatty()):
        opening.result()
        if not options.is_quiet:
            view.tell(greeting)
        yield PlainReader()
        return
    opening.begin()
    from svcli.chat.editor.prompt import LineEditor

    if not options.is_quiet:
        view.tell(greeting, dim=True)
    with silent_keys(as_pressed=True):
        yield LineEditor(opening, state_folder() / _HISTORY)
