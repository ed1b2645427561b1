"""Who answers, by name: a bundle as it is, a variant of it, or a baseline with as few visual rows.

Baselines run on the bundle's graphs without skipping, with the same weights: what is left out of a picture is left out
between encoder and decoder, so that nothing is exported anew. The weights were not trained for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipvision.cost import decode_flops, prompt_cost
from skipvision.layout import ImageSpan, Ints, TokenLayout
from svcli.chat.model import DENSE, SKIPPED
from svcli.engines import EngineName, open_engine
from svcli.evaluation.asker import Asker, Said
from svcli_engines.answer import timed
from svcli_engines.base import EngineError, Logits, Visual, together
from svcli_engines.pictures import Picture, VisualCache
from svcli_engines.processor import Processor
from svcli_engines.question import Question
from svcli_engines.sampling import Sampling
from svcli_engines.turn import Turn
from svcli_export.chat import Message
from svcli_export.manifest import Manifest, variant_name

BLIND = "blind"
BASELINES = (DENSE, "random", "pool", BLIND)
"""What keeps a score honest, in the order of the table."""
_REDUCED = re.compile(r"(random|pool)(?::(\d{1,6}))?")
_Kind = Literal["all", "random", "pool", "blind"]


class AskerError(ValueError):
    """A way to answer that this bundle or this engine does not allow; one sentence that says why."""


def own_name(manifest: Manifest) -> str:
    """The bundle as it is."""
    return DENSE if manifest.config.skip is None else SKIPPED


def full_name(name: str, manifest: Manifest) -> str:
    """`name` with what it leaves to the bundle: `random` and `pool` leave as many rows of a picture as it keeps.

    Raises AskerError for one that does not exist, or that this bundle does not allow.
    """
    if name in (own_name(manifest), BLIND):
        return name
    reduced = _REDUCED.fullmatch(name)
    if (name == DENSE or reduced) and own_name(manifest) != DENSE and DENSE not in manifest.variants:
        raise AskerError(f"{name}: the bundle has no graphs without skipping; `svcli export --variant dense` adds them")
    if reduced is None:
        if name != DENSE and variant_name(name) in manifest.variants:
            return variant_name(name)
        if name == DENSE:
            return name
        beside = [each for each in manifest.variants if each != DENSE]
        raise AskerError(f"{name}: choose among {', '.join([own_name(manifest), *BASELINES, *beside])}")
    kind, config = reduced[1], manifest.config
    if config.tiles is not None and config.tiles.is_joined:
        raise AskerError(f"{name}: the model sees the tiles of a picture as one run of tokens, and not view by view")
    if reduced[2] is None and config.skip is None:
        raise AskerError(f"{name}: the bundle skips nothing, so say how many rows are left: {name}:N")
    count = ImageSpan.of(config).num_kept if reduced[2] is None else int(reduced[2])
    if not 1 <= count <= config.num_tokens:
        raise AskerError(f"{name}: a picture has {config.num_tokens} visual tokens")
    if kind == "pool":
        if math.isqrt(config.num_tokens) ** 2 != config.num_tokens:
            raise AskerError(f"{name}: {config.num_tokens} visual tokens are no square grid")
        square = math.isqrt(count) ** 2
        if reduced[2] is not None and square != count:
            raise AskerError(f"{name}: pooling leaves a square number of rows, such as {square}")
        count = square
    return f"{kind}:{count}"


def open_asker(name: str, bundle: Path, manifest: Manifest, engine: EngineName, threads: int | None = None) -> Asker:
    """Raises AskerError, or what opening the engine does."""
    return BundleAsker(name, bundle, manifest, engine, threads)


@dataclass(frozen=True)
class _Shown:
    """What the decoder reads of a prompt's pictures."""

    visual: Visual | None
    layout: TokenLayout
    retained: tuple[tuple[int, ...], ...]


class BundleAsker:
    """Graphs of the bundle, as chat runs them. Each question begins with an empty KV cache."""

    def __init__(
        self,
        name: str,
        bundle: Path,
        manifest: Manifest,
        engine: EngineName = EngineName.ONNXRUNTIME,
        threads: int | None = None,
        *,
        keeps_pictures: bool = True,
    ) -> None:
        """`name` as for `full_name`; `keeps_pictures`: one that comes again is not encoded again.

        Raises AskerError, NoVariantError, or what opening the engine does.
        """
        self.name = full_name(name, manifest)
        kind, _, count = self.name.partition(":")
        self._kind: _Kind = kind if kind in ("random", "pool", "blind") else "all"  # type: ignore[assignment]
        self._count = int(count or 0)
        """Rows that are left of each view; 0: all."""
        self.looks = self._kind != "blind"
        graphs = manifest
        if self._count or self.name == DENSE:
            graphs = manifest if manifest.config.skip is None else manifest.variant(DENSE)
        elif self._kind == "all" and self.name != own_name(manifest):
            graphs = manifest.variant(self.name)
        self.processor = Processor(bundle, graphs)
        """Of the graphs that answer."""
        self._config = graphs.config
        self._engine = open_engine(engine, bundle, graphs, threads=threads)
        self._visuals = VisualCache() if keeps_pictures else VisualCache(0)
        self._pictures: tuple[Picture, ...] = ()

    def answer(self, question: str, images: Sequence[Image.Image], max_new_tokens: int) -> Said:
        return self.ask(question, images, Sampling(max_new_tokens=max_new_tokens))

    def ask(self, question: str, images: Sequence[Image.Image], sampling: Sampling) -> Said:
        """An answer that is drawn as `sampling` says. Raises PromptError, EngineError."""
        shown, logits, seconds = self._prefill(question, images)
        engine = self._engine
        rows = engine.length
        cost = prompt_cost(self._config, shown.layout)
        flops = cost.vision_flops + cost.prefill_flops
        turn = Turn(self.processor, sampling)
        turn.take(logits, is_full=rows == engine.capacity)
        while turn.stop_reason is None:
            flops += decode_flops(self._config.text, engine.length)
            logits = engine.extend([turn.ids[-1]])
            turn.take(logits, is_full=engine.length == engine.capacity)
        return Said(
            text=turn.text,
            visual_tokens=shown.layout.num_visual,
            cached_rows=rows,
            flops=flops,
            first_token=seconds,
            retained=shown.retained,
        )

    def close(self) -> None:
        self._engine.close()

    def _prefill(self, question: str, images: Sequence[Image.Image]) -> tuple[_Shown, Logits, float]:
        """What is shown, the logits [vocab] behind the question, and the seconds from pixels to them."""
        seen = images if self.looks else ()
        asked = Question(self.processor, [Message("user", question, len(seen))], seen, self._pictures)
        self._pictures = asked.pictures
        engine, num_encoded = self._engine, self._visuals.num_misses
        encoded, vision_seconds = timed(
            engine, lambda: [self._visuals.rows(each, engine.encode) for each in asked.pictures]
        )
        shown = self._left(asked, encoded)
        logits, seconds = timed(engine, lambda: engine.prefill(asked.prompt.ids, shown.visual, shown.layout))
        return shown, logits, seconds + (vision_seconds if self._visuals.num_misses > num_encoded else 0.0)

    def _left(self, asked: Question, encoded: Sequence[Visual]) -> _Shown:
        layout, visual = asked.prompt.layout, together(encoded)
        if visual is None or not self._count:
            return _Shown(visual, layout, tuple(map(self._retained, asked.pictures, encoded)))
        views, tokens, _ = visual.rows.shape
        places: Ints = np.tile(np.arange(self._count), (views, 1))
        retained: tuple[tuple[int, ...], ...] = tuple(() for _ in encoded)
        if self._kind == "random":
            drawn = [
                _drawn(picture, len(seen.rows), tokens, self._count)
                for picture, seen in zip(asked.pictures, encoded, strict=True)
            ]
            places, retained = np.concatenate(drawn), tuple(map(self._numbered, drawn))
        else:
            # What graphs take has as many rows as ever; those behind the means are never read.
            pooled = np.zeros_like(visual.rows)
            pooled[:, : self._count] = _pooled(visual.rows, self._count)
            visual = Visual(pooled)
        picked = (np.arange(views)[:, None] * tokens + places).ravel().tolist()
        spans = iter(
            ImageSpan(self._count, num_tokens=each.num_tokens, num_views=each.num_views) for each in layout.images
        )
        segments = tuple(each if isinstance(each, int) else next(spans) for each in layout.segments)
        return _Shown(visual, TokenLayout(segments, layout.visibility, tuple(picked)), retained)

    def _retained(self, picture: Picture, visual: Visual) -> tuple[int, ...]:
        if visual.retained is None and self._config.skip is not None:
            return ()  # this engine does not say
        if visual.retained is None:
            return tuple(range(sum(span.num_tokens for span in self.processor.spans(picture.cut))))
        return self._numbered(visual.retained)

    def _numbered(self, tokens: Ints) -> tuple[int, ...]:
        """[I, R] tokens of views, numbered behind those of the views before."""
        return tuple((tokens + self._config.num_tokens * np.arange(len(tokens))[:, None]).ravel().tolist())


def _drawn(picture: Picture, num_views: int, num_tokens: int, count: int) -> Ints:
    """[I, count] tokens of each view in raster order, drawn without replacement; the same for the same picture."""
    generator = np.random.default_rng(int(picture.key, 16))
    drawn = [np.sort(generator.choice(num_tokens, count, replace=False)) for _ in range(num_views)]
    return np.stack(drawn).astype(np.int64)


def _pooled(rows: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """[I, count, D] of [I, V, D]: means over the cells of a coarser grid. Raises EngineError where V is no square."""
    side, cells = math.isqrt(rows.shape[1]), math.isqrt(count)
    if side * side != rows.shape[1]:
        raise EngineError(f"pooling needs a square grid of visual tokens, not {rows.shape[1]}")
    grid = rows.reshape(len(rows), side, side, -1).astype(np.float32)
    edges = [(cell * side // cells, -(-(cell + 1) * side // cells)) for cell in range(cells)]
    means = [grid[:, top:bottom, left:right].mean(axis=(1, 2)) for top, bottom in edges for left, right in edges]
    return np.stack(means, axis=1).astype(rows.dtype)
