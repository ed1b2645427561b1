"""What was said and shown in a conversation, and which graphs answer. Draws nothing."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from svcli.chat.model import Model, Runner
from svcli.chat.pictures import Picture
from svcli.errors import UsageError

if TYPE_CHECKING:
    from svcli_engines.generate import Event
    from svcli_engines.sampling import Sampling
    from svcli_export.chat import Message


class Session:
    """The truth about the conversation; an engine's cache follows it."""

    def __init__(self, model: Model, sampling: Sampling, pictures: Sequence[Picture] = ()) -> None:
        self.model, self.sampling = model, sampling
        self.variant = model.own_variant
        self.messages: list[Message] = []
        self.shown: list[Picture] = []
        """Pictures of the messages, in order."""
        self.waiting = list(pictures)
        """Pictures that go with the next question."""

    @property
    def runner(self) -> Runner:
        return self.model.runner(self.variant)

    @property
    def pictures(self) -> list[Picture]:
        """All of them, as they are numbered."""
        return [*self.shown, *self.waiting]

    @property
    def question(self) -> Message | None:
        """The last one that was asked."""
        return next((each for each in reversed(self.messages) if each.role == "user"), None)

    @property
    def answer(self) -> str | None:
        """The last one, even where it was broken off."""
        last = self.messages[-1] if self.messages else None
        return last.content if last is not None and last.role == "assistant" else None

    @property
    def system(self) -> str | None:
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None

    def ask(self, question: str) -> Generator[Event]:
        """Yields what Conversation.answer does. Raises PromptError where the question does not fit; nothing has changed
        then, and also not where it is broken off before the first word."""
        from svcli_export.chat import Message

        return self._answer([*self.messages, Message("user", question, images=len(self.waiting))], self.pictures)

    def ask_again(self) -> Generator[Event]:
        """The last question, for another answer. Raises UsageError where there is none."""
        return self._answer(self.messages[: self._last_question() + 1], self.shown)

    def undo(self) -> str:
        """Takes back the last question, which is returned, and its answer; its pictures wait again.

        Raises UsageError where there is none.
        """
        at = self._last_question()
        taken = self.messages[at]
        self.messages = self.messages[:at]
        self._take_back(taken.images)
        return taken.content

    def clear(self, *, pictures: bool = False) -> None:
        """Forgets what was said. Its pictures wait again, unless they are to be forgotten, too."""
        from svcli_export.chat import Message

        system = self.system
        self.messages = [] if system is None else [Message("system", system)]
        self._take_back(len(self.shown))
        if pictures:
            self.waiting = []

    def remove_picture(self, number: int) -> Picture:
        """Number 1 is the first. Raises UsageError for one that is not there."""
        if not 0 < number <= len(self.pictures):
            raise UsageError(f"there is no picture {number}; /image list shows {len(self.pictures)}")
        at = number - 1
        if at >= len(self.shown):
            return self.waiting.pop(at - len(self.shown))
        before = 0
        for place, message in enumerate(self.messages):
            if at < before + message.images:
                self.messages[place] = replace(message, images=message.images - 1)
                break
            before += message.images
        return self.shown.pop(at)

    def set_system(self, text: str) -> None:
        """What the model is told in front of everything; nothing takes it away again.

        Raises UsageError where the chat template has no place for one.
        """
        from svcli_export.chat import Message

        if text and not self.runner.processor.takes_system:
            raise UsageError("the chat template of this model has no place for a system text")
        rest = self.messages if self.system is None else self.messages[1:]
        self.messages = [*([Message("system", text)] if text else []), *rest]

    def switch(self, variant: str) -> None:
        """From the next question on, another variant answers. Raises as `Model.runner` does."""
        self.model.runner(variant)
        self.variant = variant

    def _answer(self, messages: list[Message], pictures: list[Picture]) -> Generator[Event]:
        conversation = self.runner.conversation
        events = conversation.answer(messages, [each.image for each in pictures], self.sampling)
        # A conversation hands out another list where an answer was begun.
        before = conversation.messages
        with closing(events):  # type: ignore[type-var]
            try:
                yield from events
            finally:
                if conversation.messages is not before:
                    self.messages = list(conversation.messages)
                    self.waiting = self.waiting[len(pictures) - len(self.shown) :]
                    self.shown = pictures

    def _last_question(self) -> int:
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at].role == "user":
                return at
        raise UsageError("nothing has been asked yet")

    def _take_back(self, count: int) -> None:
        """The last `count` pictures that were shown wait again."""
        at = len(self.shown) - count
        self.shown, self.waiting = self.shown[:at], [*self.shown[at:], *self.waiting]
