"""The same over more sequences side by side, and over longer prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import TypeVar

from svcli.bench.contestants import Contestant, Graphs, full_rows
from svcli.bench.figures import compared
from svcli.bench.report import Point, Roof
from svcli.bench.rounds import Rounds
from svcli.bench.work import Weights, Work, decode_work, prompt_work
from svcli.engines import EngineName, open_pool
from svcli.errors import UsageError
from svcli_engines.base import Pool
from svcli_engines.processor import Prompt

Measured = TypeVar("Measured")

TOKENS = 16
"""Steps that are timed at each point."""


def check_context(sides: Mapping[str, Contestant], context: Sequence[int]) -> None:
    """Raises UsageError for prompts that are shorter than the question, or that leave no room for the steps."""
    for side in sides.values():
        layout = side.prompt.layout
        # What is put in are rows of text, all of which are kept.
        room = full_rows(layout) + side.engine.capacity - layout.num_kept - TOKENS
        for num_rows in context:
            if num_rows > room:
                raise UsageError(f"--context {num_rows}: the KV cache of the {side.name} graphs has room for {room}")
            side.longer(num_rows)


def check_room(sides: Mapping[str, Contestant], batch: Sequence[int]) -> None:
    """Raises UsageError where steps side by side do not fit behind the prompt."""
    for name, side in sides.items():
        if batch and side.prompt.layout.num_kept + TOKENS > side.engine.capacity:
            raise UsageError(f"--batch: the {name} KV cache has no room for {TOKENS} steps behind the prompt")


def check_batch(graphs: Graphs, batch: Sequence[int]) -> None:
    """Raises UsageError, before anything is measured, for an engine that runs one sequence."""
    if max(batch, default=1) > 1 and graphs.engine not in (EngineName.ONNXRUNTIME, EngineName.ONNXRUNTIME_CUDA):
        _pool(graphs, max(batch)).close()


class Sweeps:
    """Of sides that are open. Points are added when they are whole, so that those of a run that is broken off count."""

    def __init__(
        self,
        sides: Mapping[str, Contestant],
        weights: Mapping[str, Weights],
        roof: Roof | None,
        *,
        rounds: int,
        warm_up: int,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.batch: list[Point] = []
        self.context: list[Point] = []
        self._sides, self._weights, self._roof = sides, weights, roof
        self._rounds, self._warm_up, self._progress = rounds, warm_up, progress

    def over_context(self, context: Sequence[int]) -> None:
        """Prefill of prompts of so many rows, as the plain model counts them, and a token behind them."""
        for num_rows in context:
            prompts = {}
            for name, side in self._sides.items():
                ids, layout = side.longer(num_rows)
                prompts[name] = Prompt(ids, layout, side.prompt.cuts)
            turns = {name: partial(_prefilled, self._sides[name], prompts[name]) for name in prompts}
            taken = self._taken(f"{num_rows} rows", turns)
            work = {name: self._context_work(name, prompts[name]) for name in prompts}
            stages = {
                stage: compared(
                    {name: [each[stage] for each in taken[name]] for name in taken},
                    {name: (work[name][stage],) for name in work},
                    self._roof,
                )
                for stage in ("prefill", "decode")
            }
            rows = {name: prompt.layout.num_kept for name, prompt in prompts.items()}
            self.context.append(Point(at=num_rows, rows=rows, stages=stages))

    def over_batch(self, graphs: Sequence[Graphs], batch: Sequence[int]) -> None:
        """A step of so many sequences, each behind the prompt of the question.

        Raises UsageError for an engine that runs one at a time.
        """
        if not batch:
            return
        pools: dict[str, Pool] = {}
        try:
            for each in graphs:
                pools[each.name] = self._filled(each, max(batch))
            for count in batch:
                turns = {name: partial(_stepped, pool, self._sides[name], count) for name, pool in pools.items()}
                taken = self._taken(f"batch {count}", turns)
                work = {name: (self._step_work(name, count),) for name in pools}
                rows = {name: self._sides[name].prompt.layout.num_kept for name in pools}
                self.batch.append(Point(at=count, rows=rows, stages={"decode": compared(taken, work, self._roof)}))
        finally:
            for pool in pools.values():
                pool.close()

    def _filled(self, graphs: Graphs, count: int) -> Pool:
        side = self._sides[graphs.name]
        prompt = side.prompt
        pool = _pool(graphs, count)
        for slot in pool.slots:
            slot.prefill(prompt.ids, side.visual, prompt.layout)
        return pool

    def _taken(self, what: str, turns: Mapping[str, Callable[[], Measured]]) -> dict[str, list[Measured]]:
        rounds = Rounds(turns, warm_up=self._warm_up)
        rounds.run(self._rounds, progress=partial(self._progress, what))
        return rounds.taken

    def _context_work(self, name: str, prompt: Prompt) -> dict[str, Work]:
        side, weights = self._sides[name], self._weights[name]
        config, per_row = side.manifest.config, side.engine.kv_bytes_per_row
        prefill = prompt_work(config, prompt.layout, weights, per_row, len(side.asked.pictures))["prefill"]
        return {
            "prefill": prefill,
            "decode": decode_work(config, prompt.layout.num_kept + TOKENS // 2, weights, per_row),
        }

    def _step_work(self, name: str, count: int) -> Work:
        side = self._sides[name]
        cached = side.prompt.layout.num_kept + TOKENS // 2
        return decode_work(
            side.manifest.config, cached, self._weights[name], side.engine.kv_bytes_per_row, num_sequences=count
        )


def _pool(graphs: Graphs, count: int) -> Pool:
    try:
        return open_pool(graphs.engine, graphs.bundle, graphs.manifest(), threads=graphs.threads, parallel=count)
    except UsageError:
        raise UsageError(f"--batch {count}: {graphs.engine.value} runs one sequence at a time") from None


def _prefilled(side: Contestant, prompt: Prompt, clock: Callable[[], float] = perf_counter) -> dict[str, float]:
    """Seconds of prefill, and of one token behind it; pictures were looked at before."""
    start = clock()
    logits = side.engine.prefill(prompt.ids, side.visual, prompt.layout)
    filled = clock()
    for _ in range(TOKENS):
        logits = side.engine.extend([int(logits.argmax())])
    return {"prefill": filled - start, "decode": (clock() - filled) / TOKENS}


def _stepped(pool: Pool, side: Contestant, count: int, clock: Callable[[], float] = perf_counter) -> float:
    """Seconds of one step of `count` sequences, which are taken back behind it."""
    layout = side.prompt.layout
    tokens = dict.fromkeys(range(count), side.prompt.ids[-1])
    start = clock()
    for _ in range(TOKENS):
        tokens = {slot: int(logits.argmax()) for slot, logits in pool.step(tokens).items()}
    seconds = (clock() - start) / TOKENS
    for slot in pool.slots[:count]:
        slot.rewind(layout.num_kept, layout.length)
    return seconds
