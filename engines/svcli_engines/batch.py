"""Questions from a file, answered side by side and handed back in order; a row that fails is an outcome like others."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Queue
from typing import Any

from PIL import Image

from svcli_engines.answer import Stats
from svcli_engines.sampling import Sampling
from svcli_engines.schedule import Request, Scheduler
from svcli_engines.turn import Piece
from svcli_export.chat import Message

MAX_LINE = 96 << 20
"""Bytes of one line, which may hold pictures as `data:` URLs."""
_LONGEST_SHOWN = 200
_TO_READERS = ValueError, OSError, RuntimeError, MemoryError


class RowError(ValueError):
    """A row that asks nothing; what is wrong with it."""


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    number: int
    """From 1."""
    question: str = ""
    images: tuple[str, ...] = ()
    """Where its pictures are."""
    system: str | None = None
    record: Any = None
    """The whole line, but that a picture in it is named and not repeated."""
    error: str | None = None
    """Why it cannot be asked."""

    @staticmethod
    def of(number: int, line: bytes) -> Row:
        """A line of JSON: `question` or `prompt`, `image` or `images`, perhaps `system`; the rest is carried along."""
        if len(line) > MAX_LINE:
            return Row(number, error=f"larger than {MAX_LINE >> 20} MiB")
        try:
            record = json.loads(line.decode(), parse_constant=_refuse)
        except UnicodeDecodeError:
            return Row(number, error="not UTF-8")
        except (ValueError, RecursionError) as error:
            return Row(number, error=f"not JSON ({error})")
        kept = _without_pictures(record)
        try:
            return replace(_read(number, record), record=kept)
        except RowError as error:
            return Row(number, record=kept, error=str(error))


@dataclass(frozen=True)
class Outcome:
    """What became of a row: an answer and what it took, or why there is none."""

    row: Row
    answer: str = ""
    stats: Stats | None = None
    error: str | None = None


@dataclass(eq=False)
class _Asked:
    row: Row
    made: Future[Request] | None = None
    heard: Queue[Piece | Stats | Exception] = field(default_factory=Queue)


def answer_rows(
    scheduler: Scheduler,
    rows: Iterable[Row],
    open_picture: Callable[[str], Image.Image],
    sampling: Sampling,
    *,
    at_once: int,
) -> Generator[Outcome]:
    """An outcome for each row, in order. Pictures are opened ahead, by threads of their own, for `at_once` rows.

    Given up, it breaks off what is being answered.
    """
    waiting: deque[_Asked] = deque()
    with ThreadPoolExecutor(max_workers=min(at_once, 8)) as makers:

        def ask(asked: _Asked) -> Request:
            row = asked.row
            images = [open_picture(each) for each in row.images]
            messages = [] if row.system is None else [Message("system", row.system)]
            messages.append(Message("user", row.question, images=len(images)))
            return scheduler.submit(scheduler.question(messages, images), sampling, asked.heard.put)

        try:
            for row in rows:
                asked = _Asked(row)
                if row.error is None:
                    asked.made = makers.submit(ask, asked)
                waiting.append(asked)
                if len(waiting) >= at_once:
                    yield _outcome(waiting.popleft())
            while waiting:
                yield _outcome(waiting.popleft())
        finally:
            for asked in waiting:
                if asked.made is not None and not asked.made.cancel():
                    asked.made.add_done_callback(partial(_give_up, scheduler))


def _give_up(scheduler: Scheduler, made: Future[Request]) -> None:
    if made.exception() is None:
        scheduler.cancel(made.result())


def _outcome(asked: _Asked) -> Outcome:
    if asked.made is None:
        return Outcome(asked.row, error=asked.row.error)
    try:
        asked.made.result()
    except _TO_READERS as error:
        return Outcome(asked.row, error=str(error) or type(error).__name__)
    answer = ""
    while isinstance(event := asked.heard.get(), Piece):
        answer += event.text
    if isinstance(event, Stats):
        return Outcome(asked.row, answer, event)
    return Outcome(asked.row, error=str(event) or type(event).__name__)


def _read(number: int, record: object) -> Row:
    if not isinstance(record, dict):
        raise RowError("not a JSON object")
    if "question" in record and "prompt" in record:
        raise RowError("has a question and a prompt; one of them says what to ask")
    if "image" in record and "images" in record:
        raise RowError("has image and images; one of them lists the pictures")
    question, system = record.get("question", record.get("prompt")), record.get("system")
    if not isinstance(question, str) or not question.strip():
        raise RowError("has no question")
    if not (system is None or isinstance(system, str)):
        raise RowError("its system message is no text")
    images = record.get("images", record.get("image", []))
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(each, str) and each for each in images):
        raise RowError("its pictures are no paths")
    return Row(number, question, tuple(images), system)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _without_pictures(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_pictures(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_pictures(each) for each in value]
    if isinstance(value, str) and value.startswith("data:") and len(value) > _LONGEST_SHOWN:
        digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
        return f"{value.partition(',')[0][:_LONGEST_SHOWN]},sha256:{digest}"
    return value
