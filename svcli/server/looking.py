"""What a model retains of a picture, without a question."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from svcli.server.replies import Look
from svcli.server.served import Served
from svcli_engines.base import Visual
from svcli_engines.overlay import OverlayError, retained_boxes
from svcli_engines.question import Question
from svcli_engines.schedule import LateError


async def looked_at(model: Served, question: Question, seconds: float) -> Look:
    """Of the one picture of a question. Raises BusyError, LateError, or what the engine raises."""
    loop, (picture,) = asyncio.get_running_loop(), question.pictures
    seen: asyncio.Future[Visual] = loop.create_future()

    def settle(result: Visual | Exception) -> None:
        if seen.done():
            return
        if isinstance(result, Exception):
            seen.set_exception(result)
        else:
            seen.set_result(result)

    def report(result: Visual | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody listens
            loop.call_soon_threadsafe(settle, result)

    model.scheduler.look(picture, report)
    try:
        visual = await asyncio.wait_for(seen, seconds)
    except asyncio.TimeoutError:
        raise LateError("the picture was not looked at in time") from None
    manifest, spans = model.processor.manifest, question.prompt.layout.images
    boxes = None
    with suppress(OverlayError):
        found = retained_boxes(visual.retained, manifest.config, manifest.image, picture.cut)
        boxes = [(box.left, box.top, box.right, box.bottom) for box in found]
    return Look(
        model=model.name,
        width=picture.cut.width,
        height=picture.cut.height,
        visual_tokens=sum(span.num_tokens for span in spans),
        visual_tokens_kept=sum(span.num_kept for span in spans),
        boxes=boxes,
    )
