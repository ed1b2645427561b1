"""The models of a server, and questions made ready for them: pictures decode and prompts tokenise in threads."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from PIL import Image

from skipvision.pictures import ImageError, decode_picture, picture_size
from svcli.server.limits import Limits
from svcli.server.problems import Problem
from svcli_engines.picture_fetching import fetch_picture
from svcli_engines.picture_sources import PictureSource, sent_picture
from svcli_engines.picture_urls import FetchLimits
from svcli_engines.pictures import VisualCache
from svcli_engines.processor import Processor
from svcli_engines.question import Question
from svcli_engines.schedule import Scheduler
from svcli_export.chat import Message

Result = TypeVar("Result")
_NOTHING = Image.new("RGB", (1, 1))


@dataclass(frozen=True)
class Served:
    """A model, or a variant of one, and who answers for it."""

    name: str
    """`NAME`, or `NAME:VARIANT`."""
    processor: Processor
    scheduler: Scheduler
    visuals: VisualCache
    created: int = 0
    """Seconds since 1970."""


def pick(models: Mapping[str, Served], name: str, variant: str | None = None) -> Served:
    """The model that a request asks for. Raises Problem where there is none."""
    if variant is not None:
        if f"{name}:{variant}" not in models and name in models:
            message = f"svcli.variant: {name} has no variant of this name"
            raise Problem(400, message, "variant_not_found", "svcli.variant")
        name = f"{name}:{variant}"
    if name not in models:
        raise Problem(404, f"no such model; there is {', '.join(models)}", "model_not_found", "model")
    return models[name]


class Readers:
    """Threads that fetch and read pictures."""

    def __init__(self, limits: Limits, num_threads: int = 2, num_fetches: int = 8) -> None:
        self._limits = limits
        self._readers = ThreadPoolExecutor(num_threads, "svcli-reader")
        self._fetchers = ThreadPoolExecutor(num_fetches, "svcli-fetcher")

    async def question(self, model: Served, messages: Sequence[Message], urls: Sequence[str]) -> Question:
        """Makes a conversation ready. Raises ImageError, PromptError, or Problem for a URL that may not be asked."""
        sources = [await self._source(url) for url in urls]
        return await self._in_thread(partial(self._question, model, messages, sources))

    def close(self) -> None:
        """Takes no more."""
        for pool in (self._readers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _source(self, url: str) -> PictureSource:
        """The bytes of a picture, fetched where that is allowed."""
        source = await self._in_thread(partial(sent_picture, url))
        if not isinstance(source.where, str):
            return source
        if not self._limits.allow_urls:
            message = "this server fetches no pictures: send them as data:image/...;base64 URLs"
            raise Problem(400, message, "urls_not_allowed", "messages")
        limits = FetchLimits(seconds=self._limits.fetch_seconds, num_bytes=self._limits.max_body)
        fetch = partial(fetch_picture, source.where, limits)
        data = await asyncio.get_running_loop().run_in_executor(self._fetchers, fetch)
        return PictureSource(source.name, data)

    def _question(self, model: Served, messages: Sequence[Message], sources: Sequence[PictureSource]) -> Question:
        question = model.scheduler.question(messages, [self._decode(each, model) for each in sources])
        # Views are what is encoded; decoded pictures of all who wait would be a hundred times that.
        question.pictures = tuple(replace(each, image=_NOTHING) for each in question.pictures)
        return question

    def _decode(self, source: PictureSource, model: Served) -> Image.Image:
        assert isinstance(source.where, bytes)
        height, width = picture_size(source.name, io.BytesIO(source.where))
        if height * width > self._limits.max_pixels:
            raise ImageError(f"{source.name}: more than {self._limits.max_pixels / 1e6:.3g} megapixels")
        return decode_picture(source.name, source.where, model.processor.manifest.image.transparency).image

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)
