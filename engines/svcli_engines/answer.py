"""What is in an engine's KV cache, and answers that begin with it: a question computes only what is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from svcli_engines.base import Engine, Logits, together
from svcli_engines.pictures import VisualCache
from svcli_engines.processor import Processor
from svcli_engines.question import Question, Unit
from svcli_engines.sampling import Sampling
from svcli_engines.turn import Piece, StopReason, Turn
from svcli_export.chat import Message

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stats:
    """What one answer took. Counts of rows are those in use when the answer ended."""

    engine: str
    precision: str
    stop_reason: StopReason
    """`end`: the model ended it; `stop`: a stop text did; `length`: max_new_tokens; `context`: the KV cache is full."""
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
    num_shared_rows: int
    """Of the prompt, in the cache before this turn."""
    num_prompt_rows: int
    """Of the prompt, brought into the cache by this turn."""
    load_seconds: float
    """Spent on opening graphs, during this answer or before."""
    vision_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    """From the question to the first token, opening of graphs included."""
    decode_tokens_per_second: float
    """Of the tokens after the first; 0 where there are none."""

    @property
    def num_rows_of_prompt(self) -> int:
        """All of them, wherever they came from."""
        return self.num_shared_rows + self.num_prompt_rows


class KnownCache:
    """An engine, and the units that its KV cache holds."""

    def __init__(self, engine: Engine, processor: Processor, visuals: VisualCache) -> None:
        self.engine, self.processor = engine, processor
        self._visuals = visuals
        self._units: list[Unit] = []
        """The engine may have more rows, of a step that was broken off."""
        engine.reset()

    @property
    def num_units(self) -> int:
        """Ids that the cache holds."""
        return len(self._units)

    def num_shared(self, question: Question) -> int:
        """Ids of the question's prompt that need not be computed again."""
        skip, shared = self.processor.config.skip, question.num_shared(self._units)
        if sum(unit.num_rows for unit in self._units) > self.engine.length:
            return 0  # somebody else has reset the engine
        # Rows that saw skipped ones would be computed anew without them, and a repeated question answered otherwise.
        if skip is not None and skip.visibility == "all" and shared < len(self._units):
            return 0
        return shared if self.engine.can_append or not question.rest(shared).pictures else 0

    def begin(self, question: Question, sampling: Sampling, asked_at: float) -> Answer:
        """Computes the prompt, as far as it is not in the cache, and the first token.

        `asked_at`: by `perf_counter`. Broken off at any point, what is known of the cache is true.
        """
        engine, known = self.engine, self.num_shared(question)
        shared, rest = question.units[:known], question.rest(known)
        self._units = list(shared)
        engine.rewind(sum(unit.num_rows for unit in shared), sum(unit.num_positions for unit in shared))
        num_shared_rows = engine.length
        num_encoded = self._visuals.num_misses
        seen, vision_seconds = timed(
            engine, lambda: [self._visuals.rows(each, engine.encode) for each in rest.pictures]
        )
        if rest.pictures or not known:
            visual = together(seen)
            logits, prefill_seconds = timed(engine, lambda: engine.append(rest.ids, visual, rest.layout))
        else:
            logits, prefill_seconds = timed(engine, lambda: engine.extend(rest.ids))
        self._units = list(question.units)
        return Answer(
            self,
            question,
            Turn(self.processor, sampling),
            logits,
            asked_at=asked_at,
            num_shared_rows=num_shared_rows,
            vision_seconds=vision_seconds if self._visuals.num_misses > num_encoded else 0.0,
            prefill_seconds=prefill_seconds,
        )

    def note(self, token: int) -> None:
        """The engine has computed one id more."""
        self._units.append(Unit(token))


class Answer:
    """An answer that goes on as long as there is a `next_id`, which somebody computes and hands back by `take`."""

    def __init__(
        self,
        cache: KnownCache,
        question: Question,
        turn: Turn,
        logits: Logits,
        *,
        asked_at: float,
        num_shared_rows: int,
        vision_seconds: float,
        prefill_seconds: float,
    ) -> None:
        self.question = question
        self._cache, self._turn = cache, turn
        self._num_shared_rows, self._num_prompt_rows = num_shared_rows, cache.engine.length - num_shared_rows
        self._vision_seconds, self._prefill_seconds = vision_seconds, prefill_seconds
        self._decode_seconds, self._num_decoded = 0.0, 0
        self.first = self._next(logits)
        """The first piece."""
        self._first_token_seconds = perf_counter() - asked_at

    @property
    def next_id(self) -> int | None:
        """The id to compute; None where the answer is over."""
        return None if self._turn.stop_reason else self._turn.ids[-1]

    @property
    def text(self) -> str:
        return self._turn.text

    @property
    def messages(self) -> list[Message]:
        """The conversation with what was said so far."""
        return [*self.question.messages, self._turn.message()]

    def take(self, logits: Logits, seconds: float) -> Piece:
        """The piece that follows, of the logits [vocab] behind `next_id`, which took so long."""
        assert self.next_id is not None
        self._cache.note(self.next_id)
        self._decode_seconds, self._num_decoded = self._decode_seconds + seconds, self._num_decoded + 1
        return self._next(logits)

    def stats(self) -> Stats:
        """Of an answer that is over."""
        assert self._turn.stop_reason is not None
        engine, spans = self._cache.engine, self.question.prompt.layout.images
        num_full, num_kept = sum(span.num_tokens for span in spans), sum(span.num_kept for span in spans)
        rows_full = engine.length + num_full - num_kept
        return Stats(
            engine=engine.name,
            precision=engine.precision,
            stop_reason=self._turn.stop_reason,
            num_tokens=len(self._turn.ids),
            num_images=len(self.question.pictures),
            visual_tokens_full=num_full,
            visual_tokens_in=sum(span.length for span in spans),
            visual_tokens_kept=num_kept,
            kv_rows_full=rows_full,
            kv_rows=engine.length,
            kv_bytes_full=rows_full * engine.kv_bytes_per_row,
            kv_bytes=engine.length * engine.kv_bytes_per_row,
            num_shared_rows=self._num_shared_rows,
            num_prompt_rows=self._num_prompt_rows,
            load_seconds=engine.load_seconds,
            vision_seconds=self._vision_seconds,
            prefill_seconds=self._prefill_seconds,
            first_token_seconds=self._first_token_seconds,
            decode_tokens_per_second=self._num_decoded / self._decode_seconds if self._num_decoded else 0.0,
        )

    def _next(self, logits: Logits) -> Piece:
        engine = self._cache.engine
        return self._turn.take(logits, is_full=engine.length == engine.capacity)


def timed(engine: Engine, call: Callable[[], Result]) -> tuple[Result, float]:
    """What `call` returns and the seconds it took, opening of graphs left out."""
    start, opening = perf_counter(), engine.load_seconds
    result = call()
    return result, perf_counter() - start - (engine.load_seconds - opening)
