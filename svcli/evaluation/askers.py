"""A bundle that answers as it is, or as a baseline with as few visual rows.

Baselines run on the bundle's graphs without skipping, with the same weights: what is left out of a picture is left out
between encoder and decoder, so that nothing is exported anew. The weights were not trained for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipvision.config import ModelConfig
from skipvision.cost import decode_flops, prompt_cost
from skipvision.layout import ImageSpan, Ints, TokenLayout
from svcli.engines import EngineName, open_engine
from svcli.errors import UsageError
from svcli.evaluation.asker import Said
from svcli_engines.answer import timed
from svcli_engines.base import EngineError, Logits, Visual, together
from svcli_engines.pictures import Picture, VisualCache
from svcli_engines.processor import Processor
from svcli_engines.question import Question
from svcli_engines.sampling import Sampling
from svcli_engines.turn import Turn
from svcli_export.chat import Message
from svcli_export.manifest import DENSE, Manifest

OWN, BLIND = "skipped", "blind"
_REDUCED = re.compile(r"(random|pool):([1-9]\d{0,5})")


@dataclass(frozen=True)
class _Shown:
    """What the decoder reads of a prompt's pictures."""

    visual: Visual | None
    layout: TokenLayout
    retained: tuple[tuple[int, ...], ...] = ()


class BundleAsker:
    """One sequence of one engine."""

    def __init__(
        self,
        name: str,
        bundle: Path,
        manifest: Manifest,
        engine: EngineName = EngineName.ONNXRUNTIME,
        threads: int | None = None,
    ) -> None:
        """`name`: one of `names`, a variant of the bundle, `random:N` or `pool:N` with N visual rows of a picture left.

        Raises UsageError for an unknown name, NoVariantError for a variant that is not there, or what engines raise.
        """
        self.name = name
        self._kind, self._count = _parsed(name, manifest)
        chosen = manifest
        if self._kind in ("random", "pool", DENSE) and manifest.config.skip is not None:
            chosen = manifest.variant(DENSE)
        elif self._kind == "variant":
            chosen = manifest.variant(name)
        self.processor = Processor(bundle, chosen)
        """Of the graphs that answer."""
        self._config: ModelConfig = chosen.config
        if self._count and (self._config.tiles is not None and self._config.tiles.is_joined):
            raise UsageError(f"{name} is for models that see a picture's views apart, not joined as one run of tokens")
        if self._count > self._config.num_tokens:
            raise UsageError(f"{name}: a picture has {self._config.num_tokens} visual tokens")
        self._engine = open_engine(engine, bundle, chosen, threads=threads)
        self._visuals = VisualCache(64 << 20)

    def answer(self, question: str, images: Sequence[Image.Image], max_new_tokens: int) -> Said:
        """As Asker says."""
        return self.ask(question, images, Sampling(max_new_tokens=max_new_tokens))

    def ask(self, question: str, images: Sequence[Image.Image], sampling: Sampling) -> Said:
        """An answer that is drawn as `sampling` says. Raises PromptError, EngineError."""
        shown, logits, seconds = self._prefill(question, images)
        engine = self._engine
        rows = engine.length
        turn = Turn(self.processor, sampling)
        text = turn.take(logits, is_full=rows == engine.capacity).text
        while turn.stop_reason is None:
            logits = engine.extend([turn.ids[-1]])
            text += turn.take(logits, is_full=engine.length == engine.capacity).text
        cost = prompt_cost(self._config, shown.layout)
        decoding = sum(decode_flops(self._config.text, rows + number) for number in range(engine.length - rows))
        return Said(
            text=text,
            visual_tokens=shown.layout.num_visual,
            cached_rows=rows,
            flops=cost.vision_flops + cost.prefill_flops + decoding,
            first_token=seconds,
            retained=shown.retained,
        )

    def close(self) -> None:
        self._engine.close()

    def _prefill(self, question: str, images: Sequence[Image.Image]) -> tuple[_Shown, Logits, float]:
        """What is shown, the logits [vocab] behind the question, and the seconds from pixels to them."""
        shown = () if self._kind == BLIND else images
        asked = Question(self.processor, [Message("user", question, images=len(shown))], shown)
        engine = self._engine
        encoded, vision_seconds = timed(
            engine, lambda: [self._visuals.rows(each, engine.encode) for each in asked.pictures]
        )
        left = self._left(asked, encoded)
        logits, seconds = timed(engine, lambda: engine.prefill(asked.prompt.ids, left.visual, left.layout))
        return left, logits, vision_seconds + seconds

    def _left(self, asked: Question, encoded: Sequence[Visual]) -> _Shown:
        layout, visual = asked.prompt.layout, together(encoded)
        if visual is None or not self._count:
            kept = [() if each.retained is None else tuple(each.retained.ravel().tolist()) for each in encoded]
            return _Shown(visual, layout, tuple(kept))
        views, tokens, _ = visual.rows.shape
        spans = iter(
            ImageSpan(self._count, num_tokens=each.num_tokens, num_views=each.num_views) for each in layout.images
        )
        segments = tuple(each if isinstance(each, int) else next(spans) for each in layout.segments)
        places: Ints = np.tile(np.arange(self._count), (views, 1))
        retained: tuple[tuple[int, ...], ...] = ()
        if self._kind == "random":
            drawn = [
                _drawn(picture, len(seen.rows), tokens, self._count)
                for picture, seen in zip(asked.pictures, encoded, strict=True)
            ]
            places, retained = np.concatenate(drawn), tuple(tuple(each.ravel().tolist()) for each in drawn)
        else:
            # What graphs take has as many rows as ever; those behind the means are never read.
            pooled = np.zeros_like(visual.rows)
            pooled[:, : self._count] = _pooled(visual.rows, self._count)
            visual = Visual(pooled)
        picked = (np.arange(views)[:, None] * tokens + places).ravel().tolist()
        return _Shown(visual, TokenLayout(segments, layout.visibility, tuple(picked)), retained)


def names(manifest: Manifest) -> tuple[str, ...]:
    """The bundle as it is, and the baselines that it can run, with as many rows of a view as the bundle keeps."""
    config = manifest.config
    if config.skip is None:
        return DENSE, BLIND
    if DENSE not in manifest.variants:
        return OWN, BLIND
    reduced = []
    if config.tiles is None or not config.tiles.is_joined:
        kept = ImageSpan.of(config).num_kept
        reduced.append(f"random:{kept}")
        if math.isqrt(config.num_tokens) ** 2 == config.num_tokens:
            reduced.append(f"pool:{math.isqrt(kept) ** 2}")
    return OWN, DENSE, *reduced, BLIND


def _parsed(name: str, manifest: Manifest) -> tuple[str, int]:
    """Kind, and rows that are left of a view; 0 for all."""
    if name == OWN and manifest.config.skip is None:
        raise UsageError("this bundle skips nothing; its own graphs are called `dense`")
    if name in (OWN, BLIND, DENSE):
        return name, 0
    if found := _REDUCED.fullmatch(name):
        count = int(found[2])
        if found[1] == "pool" and math.isqrt(count) ** 2 != count:
            raise UsageError(f"{name}: pooling leaves a square number of rows, such as {math.isqrt(count) ** 2 or 1}")
        return found[1], count
    if re.match(r"(random|pool)\b", name):
        raise UsageError(f"{name}: write {name.partition(':')[0]}:N, N visual rows of a picture left")
    return "variant", 0


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
