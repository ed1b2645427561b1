"""One answer, shown as it comes and kept as a record."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from svcli.chat.facts import ENDINGS, INTERRUPTED, closing_line, measured, settings, spoken_line, table
from svcli.chat.keys import silent_keys
from svcli.chat.record import Sink
from svcli.chat.session import Session

if TYPE_CHECKING:
    from svcli.chat.view import ChatView
    from svcli_engines.answer import Stats
    from svcli_engines.generate import Event


@dataclass
class Turn:
    """A question and what came of it."""

    question: str
    images: list[str]
    answer: str = ""
    stop_reason: str = INTERRUPTED
    notes: list[str] = field(default_factory=list)
    stats: Stats | None = None
    """None where it was broken off."""

    def told(self, session: Session) -> dict[str, Any]:
        """For programs."""
        return {
            "question": self.question,
            "images": self.images,
            "answer": self.answer,
            "stop_reason": self.stop_reason,
            "notes": self.notes,
            "model": str(session.model.bundle),
            "variant": session.variant,
            "settings": settings(session.sampling),
            **(measured(self.stats) if self.stats else {}),
        }


class Teller:
    """Where turns go: to the view, and to whatever keeps them."""

    def __init__(self, view: ChatView, sinks: list[Sink], is_verbose: bool = False) -> None:
        self.view, self.is_verbose = view, is_verbose
        self._sinks = sinks

    def tell(self, session: Session, turn: Turn, events: Callable[[], Generator[Event]]) -> Turn:
        """Runs the answer to its end, or to Ctrl-C, which is no error here: the turn says so.

        Raises what `events` does, before anything of the answer is there.
        """
        from svcli_engines.generate import Piece

        view = self.view
        view.wait("looking..." if session.waiting else "thinking...")
        try:
            with silent_keys(), closing(events()) as answer:
                for event in answer:
                    if isinstance(event, Piece):
                        turn.answer += event.text
                        view.say(event.text)
                        for sink in self._sinks:
                            sink.piece(event.text)
                    else:
                        turn.stats, turn.stop_reason = event, event.stop_reason
        except KeyboardInterrupt:  # what was said so far stands
            pass
        view.end_line()
        if turn.stop_reason in ENDINGS:
            turn.notes.append(ENDINGS[turn.stop_reason])
            view.note(turn.notes[-1])
        if turn.stats is not None:
            view.footer(spoken_line(turn.stats) if view.is_spoken else closing_line(turn.stats))
            if self.is_verbose:
                view.pairs("", table(turn.stats, session.runner.engine.capacity))
        for sink in self._sinks:
            sink.turn(turn.told(session))
        return turn
