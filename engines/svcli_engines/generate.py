"""The loop: yields text and, last, what it took. Prints nothing, imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, TypeVar

from PIL import Image

from skipvision.tiles import Cut
from svcli_engines.base import Engine, Visual, together
from svcli_engines.processor import Processor, Prompt, TextStream
from svcli_engines.sampling import Sampler, Sampling
from svcli_export.chat import Message

Result = TypeVar("Result")
StopReason = Literal["end", "length", "context"]


@dataclass(frozen=True)
class Piece:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class Stats:
    """What one answer took. Counts of rows are those in use when the answer ended."""

    engine: str
    precision: str
    stop_reason: StopReason
    """`end`: the model ended it; `length`: max_new_tokens; `context`: the KV cache is full."""
    num_tokens: int
    num_images: int
    """In the whole conversation."""
    visual_tokens_full: int
    """As the plain model would take them."""
    visual_tokens_in: int
    """Rows that enter the decoder."""
    visual_tokens_kept: int
    """Rows that pass the FFN and stay in the KV cache."""
    kv_rows_full: int
    kv_rows: int
    kv_bytes_full: int
    kv_bytes: int
    num_prompt_rows: int
    """Rows that this turn's prefill, or extension, worked on."""
    extended: bool
    """The cache of the turn before was used."""
    load_seconds: float
    """Spent on opening graphs, during this answer or before."""
    vision_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    """From the question to the first token, opening of graphs included."""
    decode_tokens_per_second: float
    """Of the tokens after the first; 0 where there are none."""


@dataclass(frozen=True)
class _Seen:
    """A picture of the conversation and its visual rows."""

    image: Image.Image
    cut: Cut
    visual: Visual


Event = Piece | Stats
GREEDY = Sampling()


class Conversation:
    """Messages, and the cache that belongs to them: a second question extends it instead of prefilling again."""

    def __init__(self, engine: Engine, processor: Processor) -> None:
        self.messages: list[Message] = []
        self._engine, self._processor = engine, processor
        self._seen: list[_Seen] = []
        self._cached: list[int] = []
        """Ids whose rows are in the engine's cache."""
        self._rows = 0
        """Rows of theirs. The engine has more where a turn was broken off between a step and its note here."""
        engine.reset()

    def reset(self) -> None:
        """Forgets everything that was said and shown."""
        self.messages, self._seen, self._cached = [], [], []
        self._engine.reset()

    def ask(self, question: str, images: Sequence[Image.Image] = (), sampling: Sampling = GREEDY) -> Iterator[Event]:
        """Yields pieces of the answer, then Stats. An answer that is broken off stays in the conversation as it is.

        Raises PromptError, before anything is computed, for a question that does not fit.
        """
        return self.answer([*self.messages, Message("user", question, images=len(images))], images, sampling)

    def answer(
        self, messages: Sequence[Message], images: Sequence[Image.Image] = (), sampling: Sampling = GREEDY
    ) -> Iterator[Event]:
        """`ask` for messages given as a whole; `images` are those not seen before, in order."""
        cuts = self._processor.cuts([*(seen.image for seen in self._seen), *images])
        return self._answer(list(messages), self._processor.prompt(messages, cuts), images, sampling)

    def _answer(
        self, messages: list[Message], prompt: Prompt, images: Sequence[Image.Image], sampling: Sampling
    ) -> Iterator[Event]:
        engine, start = self._engine, perf_counter()
        seen, vision_seconds = self._timed(lambda: self._see(images, prompt.cuts))
        visual = together([each.visual for each in seen])
        known = len(self._cached)
        whole = engine.length == self._rows and prompt.ids[:known] == self._cached
        extended = not images and 0 < known < len(prompt.ids) and whole
        rows_before = engine.length if extended else 0
        if extended:
            logits, prefill_seconds = self._timed(lambda: engine.extend(prompt.ids[known:]))
        else:
            self._cached = []  # should prefill fail, nothing is known of the cache
            logits, prefill_seconds = self._timed(lambda: engine.prefill(prompt.ids, visual, prompt.layout))
        num_prompt_rows = engine.length - rows_before
        self._cached, self._seen, self.messages = list(prompt.ids), seen, messages
        self._rows = engine.length
        sampler, stream = Sampler(sampling), TextStream(self._processor)
        answer: list[int] = []
        first_token_seconds = decode_seconds = 0.0
        num_decoded = 0
        try:
            while True:
                token = sampler.pick(self._processor.sayable(logits))
                first_token_seconds = first_token_seconds or perf_counter() - start
                if token in self._processor.stop_ids:
                    stop: StopReason = "end"
                    break
                answer.append(token)
                if text := stream.push(token):
                    yield Piece(text)
                if len(answer) == sampling.max_new_tokens or engine.length == engine.capacity:
                    stop = "length" if len(answer) == sampling.max_new_tokens else "context"
                    break
                logits, seconds = self._timed(lambda: engine.extend(answer[-1:]))
                self._cached.append(token)
                self._rows = engine.length
                decode_seconds, num_decoded = decode_seconds + seconds, num_decoded + 1
            if text := stream.flush():
                yield Piece(text)
        finally:
            self.messages.append(Message("assistant", self._processor.decode(answer), ids=tuple(answer)))
        spans = prompt.layout.images
        num_full, num_kept = sum(span.num_tokens for span in spans), sum(span.num_kept for span in spans)
        rows_full = engine.length + num_full - num_kept
        yield Stats(
            engine=engine.name,
            precision=engine.precision,
            stop_reason=stop,
            num_tokens=len(answer),
            num_images=len(prompt.cuts),
            visual_tokens_full=num_full,
            visual_tokens_in=sum(span.length for span in spans),
            visual_tokens_kept=num_kept,
            kv_rows_full=rows_full,
            kv_rows=engine.length,
            kv_bytes_full=rows_full * engine.kv_bytes_per_row,
            kv_bytes=engine.length * engine.kv_bytes_per_row,
            num_prompt_rows=num_prompt_rows,
            extended=extended,
            load_seconds=engine.load_seconds,
            vision_seconds=vision_seconds if images else 0.0,
            prefill_seconds=prefill_seconds,
            first_token_seconds=first_token_seconds,
            decode_tokens_per_second=num_decoded / decode_seconds if num_decoded else 0.0,
        )

    def _see(self, images: Sequence[Image.Image], cuts: Sequence[Cut]) -> list[_Seen]:
        """All pictures so far; each is encoded once, unless others behind it change how it is cut."""
        known = [*self._seen, *(None for _ in images)]
        all_images = [*(seen.image for seen in self._seen), *images]
        found = []
        for image, cut, before in zip(all_images, cuts, known, strict=True):
            if before is not None and before.cut == cut:
                found.append(before)
            else:
                views = self._processor.views(image, is_alone=len(all_images) == 1)
                visual = self._engine.encode(views, cut)
                found.append(_Seen(image, cut, visual))
        return found

    def _timed(self, call: Callable[[], Result]) -> tuple[Result, float]:
        """What `call` returns and the seconds it took, opening of graphs left out."""
        start, opening = perf_counter(), self._engine.load_seconds
        result = call()
        return result, perf_counter() - start - (self._engine.load_seconds - opening)


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
