"""Ways to answer by name: the bundle as it is, and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from skipvision.cost import decode_flops, prompt_cost
from svcli.chat.model import DENSE, SKIPPED
from svcli.engines import EngineName, open_engine
from svcli.evaluation.asker import Asker, Said
from svcli_engines.answer import timed
from svcli_engines.base import Visual, together
from svcli_engines.pictures import Picture, VisualCache
from svcli_engines.processor import Processor
from svcli_engines.question import Question
from svcli_engines.sampling import Sampling
from svcli_engines.turn import Turn
from svcli_export.chat import Message

if TYPE_CHECKING:
    from svcli_export.manifest import Manifest

BASELINES = ("dense",)
"""What keeps a score honest, in the order of the table."""


class AskerError(ValueError):
    """A way to answer that this bundle or this engine does not allow; one sentence that says why."""


def own_name(manifest: Manifest) -> str:
    """The bundle as it is."""
    return DENSE if manifest.config.skip is None else SKIPPED


def full_name(name: str, manifest: Manifest) -> str:
    """`name` with what it leaves to the bundle, such as the number of tokens.

    Raises AskerError for one that does not exist, or that this bundle does not allow.
    """
    if name == own_name(manifest):
        return name
    if name == DENSE:
        if DENSE not in manifest.variants:
            raise AskerError(
                "dense: the bundle has no graphs of that variant; `svcli export --variant dense` adds them"
            )
        return name
    raise AskerError(f"{name}: choose among {own_name(manifest)}, {', '.join(BASELINES)}")


def open_asker(name: str, bundle: Path, manifest: Manifest, engine: EngineName, threads: int | None = None) -> Asker:
    """`name` as `full_name` gives it. Raises AskerError, or what opening the engine does."""
    found = manifest if name == own_name(manifest) else manifest.variant(name)
    return BundleAsker(name, bundle, found, engine, threads)


class BundleAsker:
    """Graphs of the bundle, as chat runs them. Each question begins with an empty KV cache."""

    def __init__(self, name: str, bundle: Path, manifest: Manifest, engine: EngineName, threads: int | None) -> None:
        self.name = name
        self._processor = Processor(bundle, manifest)
        self._engine = open_engine(engine, bundle, manifest, threads=threads)
        self._visuals = VisualCache()
        self._pictures: tuple[Picture, ...] = ()

    def answer(self, question: str, images: Sequence[Image.Image], max_new_tokens: int) -> Said:
        engine, config = self._engine, self._processor.config
        asked = Question(self._processor, [Message("user", question, len(images))], images, self._pictures)
        self._pictures = asked.pictures
        num_encoded = self._visuals.num_misses
        seen, vision_seconds = timed(
            engine, lambda: [self._visuals.rows(each, engine.encode) for each in asked.pictures]
        )
        visual, prompt = together(seen), asked.prompt
        logits, prefill_seconds = timed(engine, lambda: engine.prefill(prompt.ids, visual, prompt.layout))
        turn = Turn(self._processor, Sampling(max_new_tokens=max_new_tokens))
        cost = prompt_cost(config, prompt.layout)
        flops, cached_rows = cost.vision_flops + cost.prefill_flops, engine.length
        turn.take(logits, is_full=engine.length == engine.capacity)
        while turn.stop_reason is None:
            flops += decode_flops(config.text, engine.length)
            logits = engine.extend([turn.ids[-1]])
            turn.take(logits, is_full=engine.length == engine.capacity)
        return Said(
            text=turn.text,
            visual_tokens=sum(span.length for span in prompt.layout.images),
            cached_rows=cached_rows,
            flops=flops,
            first_token=prefill_seconds + (vision_seconds if self._visuals.num_misses > num_encoded else 0.0),
            retained=tuple(self._retained(*each) for each in zip(asked.pictures, seen, strict=True)),
        )

    def _retained(self, picture: Picture, visual: Visual) -> tuple[int, ...]:
        config = self._processor.config
        if visual.retained is None and config.skip is not None:
            return ()  # this engine does not say
        if visual.retained is None:
            return tuple(range(sum(span.num_tokens for span in self._processor.spans(picture.cut))))
        # Where each view is a run of its own, its tokens are numbered behind those of the views before.
        return tuple(view * config.num_tokens + int(token) for view, row in enumerate(visual.retained) for token in row)

    def close(self) -> None:
        self._engine.close()
