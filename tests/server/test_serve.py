"""`svcli serve` as a process, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import openai
import pytest
from typer.testing import CliRunner

from svcli.app import app
from tests.server.conftest import NAME, ROOT, SECONDS, Process, serving, slowly

MODEL = "skipvision-tiny"
PICTURE = ROOT / "examples" / "hamburgers.png"


def asked(text: str = "How many hamburgers are there?", picture: Path | None = PICTURE) -> list[dict[str, object]]:
    url = "" if picture is None else "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    shown = [] if picture is None else [{"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def client_of(process: Process, key: str = "none") -> Any:
    # Any, since what is sent here is typed as what it becomes: JSON.
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)


@pytest.fixture
def client(server: Process) -> Iterator[Any]:
    with client_of(server) as client:
        yield client


def metric(process: Process, name: str) -> float:
    with urlopen(f"{process.url}/metrics") as answer:
        text = answer.read().decode()
    return float(re.search(rf'^svcli_{name}{{model=".*"}} (\S+)$', text, re.MULTILINE)[1])  # type: ignore[index]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_for(process: Process, name: str, value: float) -> None:
    """Until a metric has this value."""
    deadline = time.monotonic() + SECONDS
    while (seen := metric(process, name)) != value:
        assert time.monotonic() < deadline, f"{name} is {seen}, and not {value}"
        time.sleep(0.01)


def said_by_chat() -> str:
    command = [sys.executable, "-c", "import sys; from svcli.__main__ import main; main()"]
    words = ["chat", str(PICTURE), "How many hamburgers are there?", "--threads", "1"]
    paths = ":".join(str(ROOT / folder) for folder in ("", "export", "engines"))
    environ = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([*command, *words], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_official_client_hears_what_chat_says(client: Any) -> None:
    expected = said_by_chat()
    answer = client.chat.completions.create(model=MODEL, messages=asked())
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details.model_extra == {"visual_tokens": 256, "visual_tokens_kept": 98}

    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=asked(), stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 98


def test_the_official_client_lists_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_the_official_client_reads_logprobs_and_stops(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=asked(), logprobs=True, top_logprobs=2, stop=["."])
    choice = answer.choices[0]
    assert "." not in choice.message.content
    assert choice.finish_reason == "stop"
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)


def test_variants_answer_beside_the_model() -> None:
    with serving("--variant", "dense", "--parallel", "1") as process, client_of(process) as client:
        assert [model.id for model in client.models.list()] == [MODEL, f"{MODEL}:dense"]
        for options in ({"model": f"{MODEL}:dense"}, {"model": MODEL, "extra_body": {"svcli": {"variant": "dense"}}}):
            dense = client.chat.completions.create(messages=asked(), **options)
            assert dense.model == f"{MODEL}:dense"
            assert dense.usage.prompt_tokens_details.visual_tokens_kept == 256
        boxes = client.post("/svcli/look", body=look(MODEL), cast_to=object)["boxes"]
        assert len(boxes) == 96
        assert all(0 <= left < right <= 1 and 0 <= top < bottom <= 1 for left, top, right, bottom in boxes)
        assert client.post("/svcli/look", body=look(f"{MODEL}:dense"), cast_to=object)["boxes"] is None


def look(model: str) -> dict[str, object]:
    content: Any = asked()[0]["content"]
    return {"model": model, "image_url": content[0]["image_url"]}


def test_errors_are_those_that_the_official_client_knows(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=asked(), n=2)
    assert (refused.value.code, refused.value.param, refused.value.type) == (
        "invalid_value",
        "n",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=asked())
    assert missing.value.code == "model_not_found"
    url = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
    with pytest.raises(openai.BadRequestError) as fetched:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [url]}])
    assert fetched.value.code == "urls_not_allowed"


def test_a_client_that_hangs_up_frees_its_slot(endless: Path) -> None:
    with serving(endless, "--parallel", "1", first=slowly(0.05)) as process, client_of(process) as client:
        for _ in range(3):
            stream = client.chat.completions.create(model=NAME, messages=asked(picture=None), stream=True)
            next(iter(stream))
            assert metric(process, "running") == 1
            stream.close()
            wait_for(process, "running", 0)
        answer = client.chat.completions.create(model=NAME, messages=asked(), max_tokens=2)
        assert answer.usage.completion_tokens == 2
        assert metric(process, "completion_tokens_total") == 2  # no other answer came to its end


def test_a_reader_who_does_not_read_holds_nobody_up(endless: Path) -> None:
    with serving(endless, "--parallel", "2", first=slowly(0.005)) as process, client_of(process) as client:
        address = urlsplit(process.url)
        with socket.create_connection((address.hostname, address.port)) as sleeping:  # type: ignore[arg-type]
            asks = {"model": NAME, "messages": asked(), "stream": True, "logprobs": True, "top_logprobs": 20}
            body = json.dumps(asks).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            sleeping.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            wait_for(process, "running", 1)
            for _ in range(3):
                assert client.chat.completions.create(model=NAME, messages=asked(), max_tokens=5).choices
            wait_for(process, "running", 0)


def test_many_ask_at_once_and_each_hears_its_own(client: Any) -> None:
    alone = {
        text: client.chat.completions.create(model=MODEL, messages=asked(text)).choices[0].message.content
        for text in ("What is this?", "How many hamburgers are there?")
    }
    heard: list[tuple[str, str | None]] = []

    def ask(text: str) -> None:
        answer = client.chat.completions.create(model=MODEL, messages=asked(text))
        heard.append((text, answer.choices[0].message.content))

    threads = [threading.Thread(target=ask, args=(text,)) for text in [*alone] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(heard) == sorted([*alone.items()] * 3)


def test_the_address_alone_is_told_and_each_request_has_a_line() -> None:
    with serving("--name", "mine") as process, client_of(process) as client:
        assert [model.id for model in client.models.list()] == ["mine"]
        assert client.chat.completions.create(model="mine", messages=asked(), max_tokens=2).usage
        assert process.end() == 0
    assert re.fullmatch(
        r"http://127\.0\.0\.1:\d+/v1 serves mine: 8 slots, \S+ MiB of KV cache reserved\n", process.lines[0]
    )
    assert re.search(r"\d+ POST /v1/chat/completions 200 \d+\+2 tokens \d+\.\d+ s\n$", process.lines[-1])


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sesame\n")
    with serving("--api-key-file", str(file)) as process:
        with client_of(process, "guess") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(process, "sesame") as client:
            assert client.models.list().data


def test_a_large_body_is_refused_and_its_sender_hears_why() -> None:
    with serving("--max-body", "0.01") as process:
        address = urlsplit(process.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", b"x" * 20_000_000, headers)
        response = connection.getresponse()
        assert (response.status, json.load(response)["error"]["code"]) == (413, "body_too_large")
        connection.close()


def begun(process: Process, heard: list[str], **options: int) -> threading.Thread:
    """An answer that takes its time; what came of it is in `heard` when the thread ends."""

    def ask() -> None:
        with client_of(process) as client:
            try:
                stream = client.chat.completions.create(
                    model=NAME, messages=asked(picture=None), stream=True, **options
                )
                reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
                heard.extend(reason for reason in reasons if reason)
            except openai.APIError as error:
                heard.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(process, "running", 1)
    return thread


def test_a_full_queue_is_told_at_once(endless: Path) -> None:
    options = ("--parallel", "1", "--queue", "1", "--drain", "0")
    with serving(endless, *options, first=slowly(0.05)) as process:
        heard: list[str] = []
        first = begun(process, heard)
        second = begun(process, heard)
        wait_for(process, "queue_length", 1)
        with client_of(process) as client, pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model=NAME, messages=asked(picture=None))
        assert (refused.value.code, refused.value.response.headers["retry-after"]) == ("queue_full", "1")
        process.end()
        for thread in (first, second):
            thread.join()
    # Who was waiting had no status yet.
    assert sorted(heard) == ["Error code: 503 - the server is shutting down", "the server is shutting down"]


def is_listening(process: Process) -> bool:
    address = urlsplit(process.url)
    try:
        socket.create_connection((address.hostname, address.port)).close()  # type: ignore[arg-type]
    except ConnectionRefusedError:
        return False
    return True


def test_what_was_taken_is_ended_before_the_end(endless: Path) -> None:
    with serving(endless, "--drain", "100", first=slowly(0.05)) as process:
        heard: list[str] = []
        thread = begun(process, heard, max_tokens=80)
        assert process.end(signal.SIGTERM) == 0
        thread.join()
    assert heard == ["length"]


def test_what_takes_too_long_is_broken_off_and_told(endless: Path) -> None:
    with serving(endless, "--drain", "0", first=slowly(0.05)) as process:
        heard: list[str] = []
        thread = begun(process, heard)
        assert process.end(signal.SIGTERM) == 1
        thread.join()
    assert heard == ["the server is shutting down"]
    assert process.lines[-1] == "Error: answers were broken off: they took longer than --drain\n"


def test_a_second_signal_ends_at_once(endless: Path) -> None:
    with serving(endless, "--drain", "1000", first=slowly(0.05)) as process:
        heard: list[str] = []
        thread = begun(process, heard)
        process.process.send_signal(signal.SIGINT)
        wait_until(lambda: not is_listening(process))
        assert process.end(signal.SIGINT) == 130
        thread.join()


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--host", "0.0.0.0"], {}, "--host 0.0.0.0: others can reach it; set a key in SVCLI_API_KEY, or say --no-key"),
        (["--host", "example.org"], {}, "--host example.org: others can reach it"),
        (["--api-key-env", "NOT_THERE"], {}, "NOT_THERE: there is no key"),
        (
            ["--api-key-env", "KEY", "--api-key-file", "x"],
            {"KEY": "a"},
            "--api-key-env and --api-key-file: one of them",
        ),
        ([], {"SVCLI_API_KEY": "\u00e9"}, "SVCLI_API_KEY: a key is of ASCII letters"),
        (["--engine", "torch", "--threads", "2"], {}, "--threads is for onnxruntime, not for torch"),
    ],
)
def test_what_is_not_safe_or_not_there_is_refused(
    options: list[str], environment: dict[str, str], message: str
) -> None:
    done = CliRunner().invoke(app, ["serve", "--port", "0", *options], env=environment)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_key_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\x89PNG\xff")
    done = CliRunner().invoke(app, ["serve", "--port", "0", "--api-key-file", str(tmp_path / "key")])
    assert (done.exit_code, done.stderr) == (
        2,
        f"Error: {tmp_path / 'key'}: a key is of ASCII letters, digits and signs\n",
    )


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = CliRunner().invoke(app, ["serve", "--port", port])
    assert done.exit_code == 2
    assert done.stderr == f"Error: --host 127.0.0.1 --port {port}: Address already in use\n"


def test_serving_on_onnxruntime_loads_no_torch() -> None:
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'export'), str(ROOT / 'engines')]!r}\n"
        "import svcli.commands.serve, svcli.server.app, svcli.server.run, svcli_engines.onnx_engine\n"
        "print(*{'torch', 'onnx', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
