"""The same question to a model that keeps everything and to one that skips: what they say, and what it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import randrange
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from svcli import ui
from svcli.chat.facts import measured
from svcli.chat.model import DENSE
from svcli.chat.session import Session
from svcli.errors import UsageError
from svcli.remarks import dense_remarks

if TYPE_CHECKING:
    from svcli_engines.answer import Stats
    from svcli_engines.sampling import Sampling
    from svcli_export.chat import Message

NUM_RUNS = 5
"""Timed runs of each, at most."""
MAX_SECONDS = 20.0
"""After which no further pair of runs begins."""
_MEASURES = ("vision_seconds", "prefill_seconds", "first_token_seconds", "decode_tokens_per_second")


@dataclass(frozen=True)
class Side:
    """One variant's answer and what each of its runs took."""

    variant: str
    answer: str
    ids: tuple[int, ...]
    runs: tuple[Stats, ...]

    def median(self, measure: str) -> float:
        return float(median(getattr(run, measure) for run in self.runs))

    def told(self) -> dict[str, Any]:
        """For programs."""
        return {
            "variant": self.variant,
            "answer": self.answer,
            "median": {measure: self.median(measure) for measure in _MEASURES},
            "runs": [measured(run) for run in self.runs],
        }


@dataclass(frozen=True)
class Comparison:
    """Both sides of one question."""

    question: str
    images: tuple[str, ...]
    dense: Side
    skipped: Side
    notes: tuple[str, ...]

    @property
    def num_runs(self) -> int:
        return len(self.dense.runs)

    @property
    def common_tokens(self) -> int:
        """Tokens before the answers part."""
        return _common(self.dense.ids, self.skipped.ids)

    @property
    def common_words(self) -> int:
        """Words before the answers part."""
        return _common(self.dense.answer.split(), self.skipped.answer.split())

    @property
    def is_same(self) -> bool:
        return self.dense.ids == self.skipped.ids

    def rows(self) -> list[tuple[str, str, str, str]]:
        """What is compared: dense, skipped, and their ratio, of times with the range over pairs of runs."""
        dense, skipped = self.dense.runs[0], self.skipped.runs[0]
        counted: tuple[tuple[str, float, float, Callable[[Any], str]], ...] = (
            ("visual tokens", dense.visual_tokens_kept, skipped.visual_tokens_kept, str),
            ("KV cache of the prompt", _prompt_bytes(dense), _prompt_bytes(skipped), ui.size),
            ("KV cache at the end", dense.kv_bytes, skipped.kv_bytes, ui.size),
        )
        timed: tuple[tuple[str, str, Callable[[float], str]], ...] = (
            ("vision", "vision_seconds", _precisely),
            ("prefill", "prefill_seconds", _precisely),
            ("first token", "first_token_seconds", _precisely),
            ("tokens per second", "decode_tokens_per_second", lambda rate: f"{rate:.0f}" if rate else "-"),
        )
        rows = [(name, say(one), say(other), _said(_ratio(one, other))) for name, one, other, say in counted]
        for name, measure, say in timed:
            one, other = self.dense.median(measure), self.skipped.median(measure)
            rows.append((name, say(one), say(other), _said(_ratio(one, other), self.ratios(measure))))
        return rows

    def ratios(self, measure: str) -> list[float]:
        """Skipped over dense, of each pair of runs that says anything."""
        pairs = zip(self.dense.runs, self.skipped.runs, strict=True)
        found = (_ratio(getattr(dense, measure), getattr(skipped, measure)) for dense, skipped in pairs)
        return [ratio for ratio in found if ratio is not None]

    def told(self) -> dict[str, Any]:
        """For programs."""
        return {
            "question": self.question,
            "images": list(self.images),
            "runs": self.num_runs,
            "same": self.is_same,
            "common_tokens": self.common_tokens,
            "common_words": self.common_words,
            "dense": self.dense.told(),
            "skipped": self.skipped.told(),
            "ratio": {
                measure: {
                    "of_medians": _ratio(self.dense.median(measure), self.skipped.median(measure)),
                    "of_pairs": self.ratios(measure),
                }
                for measure in _MEASURES
            },
            "notes": list(self.notes),
        }


def compare(
    session: Session,
    question: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
    num_runs: int = NUM_RUNS,
) -> Comparison:
    """`question` behind what was said, or the last one again, to both variants in turns, each time from nothing.

    The conversation stays as it is. Raises UsageError where there is nothing to ask or to compare, PromptError where
    the question does not fit.
    """
    messages, images = _asked(session, question)
    skipped = session.variant if session.variant != DENSE else session.model.own_variant
    if skipped == DENSE:
        raise UsageError("the graphs of this bundle skip nothing, so there is nothing to compare")
    sampling = session.sampling
    if sampling.temperature and sampling.seed is None:
        sampling = replace(sampling, seed=randrange(2**31))
    variants = (DENSE, skipped)
    for variant in variants:
        session.model.runner(variant)
    # The first run of each opens graphs and warms caches; it says the answer and is not timed.
    answers, runs = {}, dict[str, list["Stats"]]({variant: [] for variant in variants})
    try:
        for variant in variants:
            progress(f"{variant}: answering...")
            answers[variant], _ = _run(session, variant, messages, images, sampling)
        start = perf_counter()
        for number in range(num_runs):
            if number and perf_counter() - start > MAX_SECONDS:
                break
            # Whoever is second in one pair is first in the next.
            for variant in variants if number % 2 == 0 else variants[::-1]:
                progress(f"{variant}: timing, {number + 1} of {num_runs}...")
                runs[variant].append(_run(session, variant, messages, images, sampling)[1])
    finally:
        # What is in the caches now is not what the conversation left there.
        for variant in variants:
            session.model.runner(variant).engine.reset()
    dense, other = (Side(each, answers[each].content, answers[each].ids or (), tuple(runs[each])) for each in variants)
    names = tuple(picture.name for picture in session.pictures[: len(images)])
    return Comparison(messages[-1].content, names, dense, other, tuple(dense_remarks(session.model.manifest)))


def parted(answer: str, num_common: int) -> tuple[str, str, str]:
    """An answer in front of the word where it parts from another, that word, and what is behind."""
    words = list(re.finditer(r"\S+", answer))
    if num_common >= len(words):
        return answer, "", ""
    start, end = words[num_common].span()
    return answer[:start], answer[start:end], answer[end:]


def _asked(session: Session, question: str | None) -> tuple[list[Message], list[Any]]:
    from svcli_export.chat import Message

    if question is not None:
        messages = [*session.messages, Message("user", question, images=len(session.waiting))]
        return messages, [each.image for each in session.pictures]
    places = [at for at, message in enumerate(session.messages) if message.role == "user"]
    if not places:
        raise UsageError("nothing has been asked yet: /compare QUESTION")
    return session.messages[: places[-1] + 1], [each.image for each in session.shown]


def _run(
    session: Session, variant: str, messages: Sequence[Message], images: Sequence[Any], sampling: Sampling
) -> tuple[Message, Stats]:
    """A whole answer on a cache that is empty, pictures encoded anew."""
    from svcli_engines.answer import Stats
    from svcli_engines.generate import Conversation

    runner = session.model.runner(variant)
    conversation = Conversation(runner.engine, runner.processor)
    stats: Stats | None = None
    for event in conversation.answer(messages, images, sampling):
        if isinstance(event, Stats):
            stats = event
    assert stats is not None
    return conversation.messages[-1], stats


def _common(first: Sequence[object], second: Sequence[object]) -> int:
    count = 0
    for mine, theirs in zip(first, second, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def _prompt_bytes(stats: Stats) -> float:
    return stats.num_prompt_rows * stats.kv_bytes / stats.kv_rows


def _ratio(dense: float, skipped: float) -> float | None:
    """Skipped over dense; None where that says nothing."""
    return skipped / dense if dense and skipped else None


def _said(ratio: float | None, pairs: Sequence[float] = ()) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" + (f", {min(pairs):.2f} to {max(pairs):.2f}" if len(pairs) > 1 else "")


def _precisely(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
