"""Engines held against PyTorch, stage by stage, on the same pictures and the same tokens. Imports no torch itself.

Every engine gets the reference's visual rows and the reference's greedy tokens, so that each stage answers for itself
and an early slip does not count again in all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipvision.layout import ImageSpan
from svcli_engines.base import Engine, Logits, Pixels, Visual
from svcli_engines.processor import Processor, Prompt
from svcli_export.agreement import (
    CHECK_QUESTION,
    NUM_TOKENS,
    TOLERANCES,
    Difference,
    RowAgreement,
    Tolerance,
    agreeing_rows,
    agreement_of_all,
    difference,
    excess,
    loosest,
    match_runs,
    row_difference,
    tolerance,
    worst,
)
from svcli_export.chat import Message
from svcli_export.contract import CACHE_PARTS, CachePart

Cache = Mapping[tuple[int, CachePart], npt.NDArray[np.float32]]
"""K and V [n, G*d] of the n rows in use, by layer and part."""
Opener = Callable[[], Engine]
"""Raises ImportError or ValueError where an engine cannot be had here."""
Progress = Callable[[str, int, int], None]
"""Called with an engine's name, the pictures that are done, and all of them."""


def _silent(_name: str, _done: int, _all: int) -> None:
    """Progress that nobody watches."""


class CompareError(ValueError):
    """A comparison that cannot be made."""


class MismatchError(ValueError):
    """An engine that does not do what the reference does; the message names the first stage that is off."""


@runtime_checkable
class CacheReader(Protocol):
    """An engine that lets its KV cache be read."""

    def cache_rows(self, layer: int, part: CachePart) -> npt.NDArray[np.float32]:
        """A copy [G, length, d] of the rows in use of one layer's K or V."""


@dataclass(frozen=True)
class Sample:
    """One picture with the question about it."""

    name: str
    pixels: Pixels
    """[I, 3, H, W], its views."""
    prompt: Prompt


@dataclass(frozen=True)
class Trace:
    """What one engine made of one sample."""

    visual: Visual
    logits: tuple[Logits, ...]
    """[vocab] after prefill and after each decode step."""
    tokens: tuple[int, ...]
    """The likeliest of each."""
    prompt_cache: Cache | None
    """After prefill; None where the engine does not let it be read."""
    final_cache: Cache | None
    """After the last decode step."""


@dataclass(frozen=True)
class Layer:
    """K or V of one layer; worst over all pictures."""

    layer: int
    part: CachePart
    difference: Difference
    """Of the worst row."""
    picture: str
    row: int
    """In the cache, of the row that points furthest away."""
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """`vision`, `prefill`, `decode 1` and on, `cache`; worst over all pictures."""

    name: str
    difference: Difference
    picture: str
    """The one with the lowest cosine."""
    agreement: float | None
    """Share of greedy tokens, or of visual rows, that are the reference's; None where the stage has neither."""
    problems: tuple[str, ...]
    layers: tuple[Layer, ...] = ()
    """The KV cache after this stage, where it is looked at and the engine lets it be read."""


@dataclass(frozen=True)
class Comparison:
    """One engine against the reference."""

    engine: str
    precision: str
    stages: tuple[Stage, ...]
    """In the order in which they run."""
    num_tokens: int
    agreement: float
    reads_cache: bool
    decode_mode: str | None
    """How the engine decoded in the end, such as `graph`; None where there is one way only."""
    problems: tuple[str, ...]
    """One clause for each stage that is off, the first one first."""


@dataclass(frozen=True)
class Verification:
    """Engines of one bundle against one reference."""

    reference: str
    pictures: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    left_out: Mapping[str, Exception]
    """Engines that cannot be had here, and why."""

    @property
    def mismatches(self) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if comparison.problems]


def verify_engines(
    processor: Processor,
    reference: Opener,
    candidates: Mapping[str, Opener],
    pictures: Mapping[str, Image.Image],
    *,
    required: bool,
    same_weights: bool = True,
    progress: Progress = _silent,
) -> Verification:
    """Holds each of `candidates` against the reference, on pictures by their names.

    `same_weights`: the reference has the bundle's own, not those before rounding.

    Engines are open one at a time, as each may fill the memory. Where `required`, one that cannot be opened raises its
    own error before anything is computed; else it is left out. Raises CompareError where none is left.
    """
    if required:
        for opener in candidates.values():
            opener().close()
    num_layers, precision = processor.contract.num_layers, processor.contract.precision
    cases = samples(processor, pictures)
    with closing(reference()) as engine:
        name, wanted = engine.name, []
        for number, case in enumerate(cases):
            progress(name, number, len(cases))
            wanted.append(trace(engine, case, num_layers))
    comparisons, left_out = [], {}
    for candidate, opener in candidates.items():
        opened = _opened(opener)
        if isinstance(opened, Exception):
            left_out[candidate] = opened
            continue
        with closing(opened):
            # An engine may compute more precisely than the bundle stores; what was stored roughly stays rough.
            stored = tolerance(precision, same_weights=same_weights)
            limit = loosest(stored, TOLERANCES[opened.precision])
            comparisons.append(compare(opened, wanted, cases, limit, num_layers, progress))
    if not comparisons:
        raise CompareError("; ".join(f"{name} cannot be had ({error})" for name, error in left_out.items()))
    return Verification(name, tuple(pictures), tuple(comparisons), left_out)


def _opened(opener: Opener) -> Engine | Exception:
    """The engine, or why it cannot be had, without the frames that hold on to what it had loaded by then."""
    try:
        return opener()
    except (ImportError, ValueError) as error:
        error.__context__ = None
        return error.with_traceback(None)


def samples(processor: Processor, pictures: Mapping[str, Image.Image]) -> list[Sample]:
    """Each picture, by its name, with the question that the export's check asks.

    Raises CompareError where the bundle has no room for the tokens that are compared.
    """
    made = []
    for name, picture in pictures.items():
        cuts = processor.cuts([picture])
        prompt = processor.prompt([Message("user", CHECK_QUESTION, images=1)], cuts)
        room = processor.contract.capacity - prompt.layout.num_kept
        if room < NUM_TOKENS:
            raise CompareError(f"the bundle has room for {room} tokens behind a question and {NUM_TOKENS} are compared")
        made.append(Sample(name, processor.views(picture), prompt))
    return made


def trace(engine: Engine, sample: Sample, num_layers: int, forced: Trace | None = None) -> Trace:
    """Runs one sample. `forced` gives the visual rows and tokens to go on with; without it, the engine's own."""
    visual = engine.encode(sample.pixels, sample.prompt.cuts[0])
    shown = visual if forced is None else Visual(forced.visual.rows.astype(visual.rows.dtype))
    logits = [engine.prefill(sample.prompt.ids, shown, sample.prompt.layout)]
    prompt_cache = _read_cache(engine, num_layers)
    for step in range(NUM_TOKENS - 1):
        token = int(logits[-1].argmax()) if forced is None else forced.tokens[step]
        logits.append(engine.extend([token]))
    tokens = tuple(int(each.argmax()) for each in logits)
    return Trace(visual, tuple(logits), tokens, prompt_cache, _read_cache(engine, num_layers))


def compare(
    engine: Engine,
    references: Sequence[Trace],
    samples: Sequence[Sample],
    limit: Tolerance,
    num_layers: int,
    progress: Progress = _silent,
) -> Comparison:
    """Holds `engine` against the reference's traces of the same samples."""
    pairs: list[_Pair] = []
    for number, (sample, reference) in enumerate(zip(samples, references, strict=True)):
        progress(engine.name, number, len(samples))
        spans = sample.prompt.layout.images
        pairs.append(_Pair(sample.name, trace(engine, sample, num_layers, reference), reference, spans))
    stages = [_vision(pairs, limit)]
    stages += [_step(pairs, step, limit) for step in range(NUM_TOKENS)]
    if final := _layers(pairs, "final_cache", limit):
        stages.append(_stage("cache", [], final, limit))
    same = [got == wanted for pair in pairs for got, wanted in zip(pair.got.tokens, pair.wanted.tokens, strict=True)]
    agreement = sum(same) / len(same)
    problems = [f"{stage.name}: {stage.problems[0]}" for stage in stages if stage.problems]
    if agreement < limit.agreement:
        problems.append(f"only {agreement:.0%} of greedy tokens agree, {limit.agreement:.0%} wanted")
    return Comparison(
        engine=engine.name,
        precision=engine.precision,
        stages=tuple(stages),
        num_tokens=len(same),
        agreement=agreement,
        reads_cache=bool(final),
        decode_mode=getattr(engine, "decode_mode", None),
        problems=tuple(problems),
    )


@dataclass(frozen=True)
class _Pair:
    """What an engine and the reference made of one picture."""

    picture: str
    got: Trace
    wanted: Trace
    spans: tuple[ImageSpan, ...]


def _vision(pairs: Sequence[_Pair], limit: Tolerance) -> Stage:
    found, agreeing = [], []
    for pair in pairs:
        got, wanted = match_runs(pair.got.visual.rows, pair.wanted.visual.rows, pair.spans)
        found.append((pair.picture, difference(got, wanted)))
        both = pair.got.visual.retained, pair.wanted.visual.retained
        retained = None if both[0] is None or both[1] is None else (both[0], both[1])
        agreeing.append(agreeing_rows(got, wanted, limit, retained))
    rows = agreement_of_all(agreeing)
    return _stage("vision", found, (), limit, rows.share, rows)


def _step(pairs: Sequence[_Pair], step: int, limit: Tolerance) -> Stage:
    """`prefill` for step 0, with the cache that it leaves, else `decode N`."""
    found = [(pair.picture, difference(pair.got.logits[step], pair.wanted.logits[step])) for pair in pairs]
    agreement = sum(pair.got.tokens[step] == pair.wanted.tokens[step] for pair in pairs) / len(pairs)
    if step == 0:
        return _stage("prefill", found, _layers(pairs, "prompt_cache", limit), limit, agreement)
    return _stage(f"decode {step}", found, (), limit, agreement)


def _stage(
    name: str,
    found: Sequence[tuple[str, Difference]],
    layers: tuple[Layer, ...],
    limit: Tolerance,
    agreement: float | None = None,
    rows: RowAgreement | None = None,
) -> Stage:
    """`found`: what the stage hands on, by picture; `rows` where that is visual rows."""
    problems = [f"layer {layer.layer} {layer.part}: {clause}" for layer in layers for clause in layer.problems]
    each = [*((layer.picture, layer.difference) for layer in layers), *found]
    if found:
        problems += excess(worst(item for _, item in found), limit, rows)
    picture = min(each, key=lambda item: item[1].cosine)[0]
    return Stage(name, worst(item for _, item in each), picture, agreement, tuple(problems), layers)


def _layers(
    pairs: Sequence[_Pair], when: Literal["prompt_cache", "final_cache"], limit: Tolerance
) -> tuple[Layer, ...]:
    """Empty where an engine does not let its cache be read."""
    caches = [(pair.picture, getattr(pair.got, when), getattr(pair.wanted, when)) for pair in pairs]
    if any(cache is None for _, *both in caches for cache in both):
        return ()
    layers = []
    for layer, part in caches[0][1]:
        found = [(*row_difference(got[layer, part], wanted[layer, part]), name) for name, got, wanted in caches]
        overall = worst(item for item, _, _ in found)
        _, row, picture = min(found, key=lambda item: item[0].cosine)
        clauses = [f"{clause} ({picture}, row {row})" for clause in excess(overall, limit)]
        layers.append(Layer(layer, part, overall, picture, row, tuple(clauses)))
    return tuple(layers)


def _read_cache(engine: Engine, num_layers: int) -> Cache | None:
    if not isinstance(engine, CacheReader):
        return None
    cache = {}
    for layer in range(num_layers):
        for part in CACHE_PARTS:
            rows = engine.cache_rows(layer, part)  # [G, n, d]
            cache[layer, part] = rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)
    return cache
