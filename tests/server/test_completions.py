"""What is asked in OpenAI's words is answered in OpenAI's words."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from svcli.server.limits import Limits
from svcli_engines.picture_urls import FetchLimits
from svcli_engines.processor import Processor
from tests.server.conftest import SECONDS, Opener, Speaker, events, question

TEXT = "a red ball."


def picture(width: int = 40, height: int = 30, colour: str = "red") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown(*urls: str, text: str = "what is this?") -> list[dict[str, Any]]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def test_an_answer_as_a_whole(inside: Opener) -> None:
    response = inside().post(question(messages=shown(picture())))
    assert response.status_code == 200
    said = response.json()
    assert said["id"].startswith("chatcmpl-")
    assert (said["object"], said["model"]) == ("chat.completion", "tiny")
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = said["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "visual_tokens": 256, "visual_tokens_kept": 98}


def test_the_same_answer_in_pieces(inside: Opener) -> None:
    server = inside()
    response = server.post(question(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert {(each["object"], each["model"], each["usage"]) for each in chunks} == {
        ("chat.completion.chunk", "tiny", None)
    }
    assert len({each["id"] for each in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks) == TEXT
    assert [each["choices"][0]["finish_reason"] for each in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_usage_comes_last_in_a_stream_where_it_is_asked_for(inside: Opener) -> None:
    chunks = events(inside().post(question(stream=True, stream_options={"include_usage": True})).text)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(each["usage"] is None for each in chunks[:-1])


@pytest.mark.parametrize("stop", ["ball", ["zebra", "ball"]])
def test_stop_texts_end_the_answer_before_them(inside: Opener, stop: object) -> None:
    server = inside()
    (choice,) = server.post(question(stop=stop)).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a red ", "stop")
    chunks = events(server.post(question(stop=stop, stream=True)).text)
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks) == "a red "


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_has_no_more_tokens_than_asked_for(inside: Opener, name: str) -> None:
    said = inside().post(question() | {name: 2}).json()
    assert said["choices"][0]["finish_reason"] == "length"
    assert said["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("asked", [{}, {"max_tokens": 1_000_000}])
def test_no_answer_has_more_than_the_server_makes(inside: Opener, processor: Processor, asked: Any) -> None:
    server = inside([Speaker(processor, None)], Limits(seconds=SECONDS, max_tokens=7))
    said = server.post(question(**asked)).json()
    assert (said["choices"][0]["finish_reason"], said["usage"]["completion_tokens"]) == ("length", 7)


def test_tokens_are_told_with_their_likelihoods(inside: Opener) -> None:
    server = inside()
    asked = question(logprobs=True, top_logprobs=3)
    told = server.post(asked).json()["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in told) == TEXT
    assert bytes(byte for each in told for byte in each["bytes"]) == TEXT.encode()
    assert all(len(each["top_logprobs"]) == 3 for each in told)
    assert all(each["top_logprobs"][0]["token"] == each["token"] for each in told)
    chunks = events(server.post(asked | {"stream": True}).text)
    streamed = [each for chunk in chunks for each in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == told
    assert server.post(question(logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_conversation_goes_on_where_its_rows_are(inside: Opener) -> None:
    server = inside()
    messages = shown(picture())
    first = server.post(question(messages=messages)).json()
    messages += [first["choices"][0]["message"], {"role": "user", "content": "and why?"}]
    second = server.post(question(messages=messages)).json()["usage"]["prompt_tokens_details"]
    assert second["cached_tokens"] > 98
    assert 'svcli_picture_cache_misses_total{model="tiny"} 1.0' in server.metrics.text().decode()


def test_what_changes_nothing_is_taken(inside: Opener) -> None:
    harmless = {
        "n": 1,
        "user": "me",
        "safety_identifier": "me",
        "prompt_cache_key": "mine",
        "metadata": {"a": "b"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tools": [],
        "tool_choice": "auto",
        "store": False,
        "service_tier": "auto",
        "stream": None,
        "stop": None,
        "max_tokens": None,
    }
    assert inside().post(question() | harmless).status_code == 200


def test_seeds_draw_the_same_again(inside: Opener, processor: Processor) -> None:
    server = inside([Speaker(processor, None)], Limits(seconds=SECONDS, max_tokens=20))

    def drawn(seed: int) -> str:
        asked = question(temperature=1.0, seed=seed)
        return str(server.post(asked).json()["choices"][0]["message"]["content"])

    assert drawn(-5) == drawn(-5)
    assert len({drawn(seed) for seed in range(5)}) > 1


def test_answers_of_before_and_parts_make_a_prompt(inside: Opener) -> None:
    messages = [
        *shown(picture(), picture(colour="blue")),
        {"role": "assistant", "content": "two", "refusal": None, "annotations": [], "audio": None, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "which"}, {"type": "text", "text": "is red?"}]},
    ]
    said = inside().post(question(messages=messages)).json()
    assert said["usage"]["prompt_tokens_details"]["visual_tokens"] == 2 * 256


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_model_without_a_place_for_it_refuses_a_system_message(inside: Opener, role: str) -> None:
    messages = [{"role": role, "content": [{"type": "text", "text": "be brief"}]}, *shown(picture())]
    error = inside().post(question(messages=messages)).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_prompt", "messages")
    assert "no place for a system message" in error["message"]


def changed(**parts: Any) -> dict[str, Any]:
    return {key: value for key, value in (question() | parts).items() if value is not ...}


def message(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return changed(messages=[{"role": role, "content": content, **more}])


def part(url: Any, **more: Any) -> dict[str, Any]:
    return message([{"type": "image_url", "image_url": {"url": url, **more}}, {"type": "text", "text": "what?"}])


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (changed(model=...), "missing_parameter", "model"),
        (changed(messages=...), "missing_parameter", "messages"),
        (changed(messages=[]), "invalid_value", "messages"),
        (changed(messages={}), "invalid_value", "messages"),
        (changed(model=7), "invalid_value", "model"),
        (changed(colour="red"), "unknown_parameter", "colour"),
        (changed(n=2), "invalid_value", "n"),
        (changed(tools=[{"type": "function"}]), "invalid_value", "tools"),
        (changed(response_format={"type": "json_object"}), "invalid_value", "response_format.type"),
        (changed(frequency_penalty=0.5), "invalid_value", "frequency_penalty"),
        (changed(temperature=-1), "invalid_value", "temperature"),
        (changed(temperature="0"), "invalid_value", "temperature"),
        (changed(top_p=0), "invalid_value", "top_p"),
        (changed(max_tokens=0), "invalid_value", "max_tokens"),
        (changed(max_tokens=1, max_completion_tokens=1), "invalid_value", "max_tokens"),
        (changed(seed=1 << 63), "invalid_value", "seed"),
        (changed(stop=""), "invalid_value", "stop"),
        (changed(stop=["a"] * 5), "invalid_value", "stop"),
        (changed(top_logprobs=2), "invalid_value", "top_logprobs"),
        (changed(logprobs=True, top_logprobs=21), "invalid_value", "top_logprobs"),
        (changed(stream_options={"include_usage": True}), "invalid_value", "stream_options"),
        (changed(svcli={"variant": "dense"}), "variant_not_found", "svcli.variant"),
        (message("hi", "assistant"), "invalid_value", "messages"),
        (message("hi", "tool"), "invalid_value", "messages[0]"),
        (message("hi", name="me"), "unknown_parameter", "messages[0].name"),
        (message(None), "invalid_value", "messages[0].content"),
        (message([]), "invalid_value", "messages[0].content"),
        (message([{"type": "audio"}]), "invalid_value", "messages[0].content[0]"),
        (message([{"type": "text"}]), "missing_parameter", "messages[0].content[0].text"),
        (message(" "), "invalid_prompt", "messages"),
        (message("ball " * 5000), "context_length_exceeded", "messages"),
        (message("a" * 1_000_001), "context_length_exceeded", "messages"),
        (part("/etc/passwd"), "invalid_image", "messages"),
        (part("file:///etc/passwd"), "invalid_image", "messages"),
        (part("https://example.com/a.png"), "urls_not_allowed", "messages"),
        (part("data:image/png;base64,####"), "invalid_image", "messages"),
        (part("data:image/png;base64,AAAA"), "invalid_image", "messages"),
        (part("data:,"), "invalid_image", "messages"),
        (part(picture()[:-40]), "invalid_image", "messages"),
        (part(picture(3000, 2000)), "invalid_image", "messages"),
        (part(picture(), detail="full"), "invalid_value", "messages[0].content[0].image_url.detail"),
        (part(7), "invalid_value", "messages[0].content[0].image_url.url"),
        (changed(messages=shown(*[picture()] * 3)), "too_many_images", "messages"),
        ([], "invalid_value", None),
        ("hello", "invalid_value", None),
        (None, "invalid_value", None),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(
    inside: Opener, body: Any, code: str, param: str | None
) -> None:
    server = inside(limits=Limits(seconds=SECONDS, max_pixels=1_000_000))
    response = server.post(body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert error["message"]
    assert "\n" not in error["message"]
    assert server.post(question()).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        json.dumps(question(temperature=0.5)).replace("0.5", "NaN").encode(),
        json.dumps(question(seed=5)).replace("5", "9" * 5000).encode(),
    ],
)
def test_what_is_no_json_for_us_is_refused(inside: Opener, content: bytes) -> None:
    response = inside().post(content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_pictures_are_fetched_where_that_is_allowed(inside: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[str, FetchLimits]]()

    def fetch(url: str, limits: FetchLimits) -> bytes:
        asked.append((url, limits))
        return base64.b64decode(picture().partition(",")[2])

    server = inside(limits=Limits(seconds=3, max_body=10_000, allow_urls=True))
    refused = server.post(part("http://127.0.0.1:1/a.png"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_image")
    assert "private address" in refused.json()["error"]["message"]
    monkeypatch.setattr("svcli.server.served.fetch_picture", fetch)
    assert server.post(part("https://example.com/a.png?b=c")).status_code == 200
    assert asked == [("https://example.com/a.png?b=c", FetchLimits(seconds=3, num_bytes=10_000))]
    assert server.post(part("file:///etc/passwd")).status_code == 400
    assert len(asked) == 1


def test_an_unknown_model_is_not_there(inside: Opener) -> None:
    response = inside().post(changed(model="gpt-4o"))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
