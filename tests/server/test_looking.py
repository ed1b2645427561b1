"""What a model retains of a picture is told as boxes on it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from svcli.server.limits import Limits
from svcli_engines.base import EngineError, Visual
from svcli_engines.processor import Processor
from tests.server.conftest import NAME, SECONDS, Inside, Opener, Speaker
from tests.server.test_completions import picture


class Sighted(Speaker):
    """Retains the first patches of the second line."""

    def encode(self, pixels: Any, _cut: Any = None) -> Visual:
        self.calls.append(("encode", len(pixels)))
        return Visual(np.zeros((1, 162, 256), np.float32), np.array([[16, 17, 18]]))


def ask(server: Inside, **changes: Any) -> Any:
    body = {"model": NAME, "image_url": {"url": picture(80, 40)}} | changes
    return asyncio.run(server.send("POST", "/v1/svcli/look", json=body))


def test_boxes_lie_on_the_picture(inside: Opener, processor: Processor) -> None:
    engine = Sighted(processor)
    server = inside([engine])
    seen = ask(server).json()
    assert (seen["object"], seen["model"], seen["width"], seen["height"]) == ("svcli.look", NAME, 80, 40)
    assert (seen["visual_tokens"], seen["visual_tokens_kept"]) == (256, 98)
    # The picture is twice as wide as it is high, and padded: the second line of patches is above it.
    assert seen["boxes"] == []
    square = ask(server, image_url={"url": picture(40, 40)}).json()
    assert square["boxes"] == [pytest.approx([column / 16, 1 / 16, (column + 1) / 16, 2 / 16]) for column in range(3)]


def test_a_picture_that_was_looked_at_is_not_encoded_again(inside: Opener, processor: Processor) -> None:
    engine = Sighted(processor)
    server = inside([engine])
    ask(server)
    content = [{"type": "image_url", "image_url": {"url": picture(80, 40)}}, {"type": "text", "text": "what?"}]
    assert server.post({"model": NAME, "messages": [{"role": "user", "content": content}]}).status_code == 200
    assert [name for name, _ in engine.calls].count("encode") == 1


def test_who_cannot_tell_says_so(inside: Opener, processor: Processor) -> None:
    class Vague(Sighted):
        def encode(self, pixels: Any, cut: Any = None) -> Visual:
            return Visual(super().encode(pixels, cut).rows)

    assert ask(inside([Vague(processor)])).json()["boxes"] is None


def test_what_cannot_be_looked_at_is_told(inside: Opener, processor: Processor) -> None:
    class Failing(Sighted):
        def encode(self, _pixels: Any, _cut: Any = None) -> Visual:
            raise EngineError("no memory")

    server = inside([Failing(processor)])
    assert ask(server).status_code == 500
    assert ask(server, image_url={"url": "/etc/passwd"}).json()["error"]["code"] == "invalid_image"
    assert ask(server, model="other").status_code == 404
    assert ask(server, svcli={"variant": "dense"}).json()["error"]["code"] == "variant_not_found"
    server.served.scheduler.close()
    assert ask(server).status_code == 503


def test_a_look_that_takes_too_long_ends(inside: Opener, processor: Processor) -> None:
    over = threading.Event()

    class Slow(Sighted):
        def encode(self, pixels: Any, cut: Any = None) -> Visual:
            assert over.wait(SECONDS)
            return super().encode(pixels, cut)

    response = ask(inside([Slow(processor)], Limits(seconds=0.05)))
    over.set()
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
