"""A conversation with one engine: yields text and, last, what it took. Prints nothing, imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from time import perf_counter

from PIL import Image

from skipvision.layout import Ints
from svcli_engines.answer import KnownCache, Stats, timed
from svcli_engines.base import Engine
from svcli_engines.pictures import Picture, VisualCache
from svcli_engines.processor import Processor
from svcli_engines.question import Question
from svcli_engines.sampling import Sampling
from svcli_engines.turn import Piece
from svcli_export.chat import Message

__all__ = ["GREEDY", "Conversation", "Event", "Piece", "Stats", "generate"]

Event = Piece | Stats
GREEDY = Sampling()


class Conversation:
    """Messages and their pictures. What of them is in the cache is found again, so both may be changed between turns:
    whatever stands in front of the first change is not computed again, and no picture is encoded twice."""

    def __init__(self, engine: Engine, processor: Processor, visuals: VisualCache | None = None) -> None:
        self.messages: list[Message] = []
        self.images: list[Image.Image] = []
        """All pictures of the messages, in order."""
        self._engine, self._processor = engine, processor
        self._visuals = visuals or VisualCache()
        self._cache = KnownCache(engine, processor, self._visuals)
        self._pictures: tuple[Picture, ...] = ()

    def reset(self) -> None:
        """Forgets everything that was said and shown."""
        self.messages, self.images = [], []

    def ask(self, question: str, images: Sequence[Image.Image] = (), sampling: Sampling = GREEDY) -> Iterator[Event]:
        """Yields pieces of the answer, then Stats. An answer that is broken off stays in the conversation as it is.

        Raises PromptError, before anything is computed, for a question that does not fit.
        """
        messages = [*self.messages, Message("user", question, images=len(images))]
        return self.answer(messages, [*self.images, *images], sampling)

    def answer(
        self, messages: Sequence[Message], images: Sequence[Image.Image] = (), sampling: Sampling = GREEDY
    ) -> Iterator[Event]:
        """`ask` for messages given as a whole, with all their pictures."""
        asked_at = perf_counter()
        return self._answer(self._question(messages, images), sampling, asked_at)

    def retained(self, image: Image.Image) -> tuple[Picture, Ints | None]:
        """A picture of the conversation and which of its tokens were retained [I, R], None where nobody can tell."""
        self._pictures = self._question([Message("user", "-", images=len(self.images))], self.images).pictures
        picture = next(each for each in self._pictures if each.image is image)
        return picture, self._visuals.rows(picture, self._engine.encode).retained

    def _question(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> Question:
        return Question(self._processor, messages, images, self._pictures)

    def _answer(self, question: Question, sampling: Sampling, asked_at: float) -> Iterator[Event]:
        answer = self._cache.begin(question, sampling, asked_at)
        self._pictures, self.images = question.pictures, [each.image for each in question.pictures]
        try:
            piece = answer.first
            while True:
                if piece.text or piece.tokens:
                    yield piece
                if (token := answer.next_id) is None:
                    break
                logits, seconds = timed(self._engine, partial(self._engine.extend, [token]))
                piece = answer.take(logits, seconds)
        finally:
            self.messages = answer.messages
        yield answer.stats()


def generate(
    engine: Engine,
    processor: Processor,
    images: Sequence[Image.Image],
    messages: Sequence[Message],
    *,
    sampling: Sampling = GREEDY,
) -> Iterator[Event]:
    """Answers the last of `messages`: pieces of text, then Stats. `images` are those of all messages, in order."""
    return Conversation(engine, processor).answer(messages, images, sampling)
