"""NVIDIA's Triton itself, with a repository that `svcli triton` wrote: the build without GPU backends that PyTriton
ships, which has the Python backend. It is asked as its own clients ask it."""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import venv
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import numpy as np
import pytest

from svcli.settings import bundled_model
from svcli.triton.config import COUNTS, INPUTS, OUTPUTS
from svcli.triton.repository import write_model
from svcli.triton.settings import Settings
from tests.optional import missing
from tests.server.test_triton import NAME, NUMPY, PICTURE, QUESTION, ROOT, said

SECONDS = 60.0
SLOTS = 2
LONG = {"min_tokens": 600, "max_tokens": 600}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@dataclass
class Triton:
    """A server that has loaded the model."""

    http: str
    grpc: str
    metrics: str
    log: Path
    folder: Path

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return httpx.post(self.http + path, content=json.dumps(body or {}), timeout=SECONDS)

    def generate(self, **inputs: Any) -> httpx.Response:
        return self.post(f"/v2/models/{NAME}/generate", inputs)

    def metric(self, name: str) -> float:
        lines = httpx.get(self.metrics, timeout=SECONDS).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="{NAME}"'))

    def until(self, name: str, value: float) -> None:
        deadline = monotonic() + SECONDS
        while self.metric(name) != value:
            assert monotonic() < deadline, (name, self.metric(name))
            sleep(0.05)

    def stubs(self) -> list[int]:
        """Processes of the model."""
        found = []
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = place.read_bytes()
            except OSError:  # it has ended
                continue
            if b"triton_python_backend_stub" in command and str(self.folder).encode() in command:
                found.append(int(place.parent.name))
        return found

    def until_gone(self) -> None:
        deadline = monotonic() + SECONDS
        while self.stubs():
            assert monotonic() < deadline, self.log.read_text()[-2000:]
            sleep(0.05)


@pytest.fixture(scope="module")
def tools() -> Path:
    """Where Triton lies."""
    folder = Path(os.environ.get("SVCLI_TRITON", ""))
    if not (folder / "pytriton" / "tritonserver").is_dir():
        missing("triton")
    return folder


@pytest.fixture(scope="module")
def triton(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    folder = tmp_path_factory.mktemp("triton")
    model = write_model(bundled_model(), folder / "models", NAME, Settings(threads=1, parallel=SLOTS, queue=4))
    shipped = tools / "pytriton" / "tritonserver"
    shutil.copytree(shipped / "backends" / "python", folder / "backends" / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = shipped / "python_backend_stubs" / version / "triton_python_backend_stub"
    program = shipped / "bin" / "tritonserver"
    if not stub.is_file():
        pytest.skip(f"this Triton has no stub for Python {version}")
    for each in (shutil.copy(stub, folder / "backends" / "python"), shutil.copy(program, folder)):
        Path(each).chmod(0o755)
    # The stub takes the packages of the environment whose python3 is first on the path, and reads no PYTHONPATH. This
    # build of it reads arrays of NumPy 1 alone, which is why that is in the folder.
    venv.create(folder / "environment")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "environment")}))
    places = [tools, *(ROOT / name for name in ("", "export", "engines")), sysconfig.get_path("purelib")]
    (packages / "svcli.pth").write_text("".join(f"{place}\n" for place in places))
    libraries = [sysconfig.get_config_var("LIBDIR"), str(tools / "nvidia_pytriton.libs")]
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    words: list[str | Path] = [
        folder / "tritonserver",
        *("--model-repository", folder / "models", "--backend-directory", folder / "backends"),
        *("--model-control-mode", "explicit", "--load-model", NAME, "--exit-timeout-secs", "20"),
    ]
    for name, port in ports.items():
        words += [f"--{name}-address", "127.0.0.1", f"--{name}-port", str(port)]
    environ = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
        "PATH": f"{folder / 'environment' / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        "OMP_NUM_THREADS": "1",
    }
    log = folder / "log"
    url = "http://127.0.0.1:{}".format
    found = Triton(url(ports["http"]), f"127.0.0.1:{ports['grpc']}", url(ports["metrics"]) + "/metrics", log, model)
    with log.open("w") as out:
        process = subprocess.Popen([str(word) for word in words], env=environ, stdout=out, stderr=out)
        try:
            _wait(found, process)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(SECONDS)
            finally:
                process.kill()
            found.until_gone()


def _wait(server: Triton, process: subprocess.Popen[bytes]) -> None:
    deadline = monotonic() + SECONDS
    while True:
        assert process.poll() is None, server.log.read_text()[-3000:]
        assert monotonic() < deadline, server.log.read_text()[-3000:]
        try:
            if httpx.get(f"{server.http}/v2/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        sleep(0.1)


class Client:
    """NVIDIA's client for gRPC, with one stream."""

    def __init__(self, server: Triton, tools: Path) -> None:
        if str(tools) not in sys.path:
            sys.path.append(str(tools))  # last: what else is there must not replace what is installed
        import tritonclient.grpc as grpc

        self._grpc = grpc
        self.client = grpc.InferenceServerClient(server.grpc)
        self.events: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.events.put((result, error)))

    def ask(self, **values: Any) -> None:
        kinds = {each.name: each.kind for each in INPUTS}
        inputs = []
        for name, value in values.items():
            array = np.array(value if isinstance(value, list) else [value], NUMPY[kinds[name]])
            kind = kinds[name].removeprefix("TYPE_").replace("STRING", "BYTES")
            inputs.append(self._grpc.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        self.client.async_stream_infer(NAME, inputs, enable_empty_final_response=True)

    def all(self) -> list[dict[str, Any]]:
        """The outputs of each response of one answer."""
        found = []
        while True:
            result, error = self.events.get(timeout=SECONDS)
            assert error is None, error
            response = result.get_response()
            found.append({each.name: result.as_numpy(each.name).tolist() for each in response.outputs})
            if response.parameters["triton_final_response"].bool_param:
                return found

    def close(self, **options: Any) -> None:
        self.client.stop_stream(**options)
        self.client.close()


@pytest.fixture
def client(triton: Triton, tools: Path) -> Iterator[Client]:
    opened = Client(triton, tools)
    yield opened
    opened.close()


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_an_answer_over_json_is_the_engines(triton: Triton) -> None:
    url = f"data:image/png;base64,{b64encode(PICTURE).decode()}"
    body = triton.generate(text_input=QUESTION, image=[url]).json()
    assert body["text_output"] == said()
    assert body["finish_reason"] == "stop"
    assert body["visual_tokens"] == 256
    assert 0 < body["visual_tokens_kept"] < body["prompt_tokens"] < 256
    assert set(COUNTS) < set(body)
    again = triton.generate(text_input=QUESTION, image=[url]).json()
    assert again["cached_tokens"] == body["prompt_tokens"] - 1
    assert triton.metric("svcli_rows_skipped_total") > 0


def test_the_example_of_the_guide(triton: Triton, tools: Path) -> None:
    text = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
    program = text.partition("```python\n")[2].partition("```")[0]
    assert "127.0.0.1:8001" in program
    assert '"skipvision-tiny"' in program
    program = program.replace("127.0.0.1:8001", triton.grpc).replace('"skipvision-tiny"', f'"{NAME}"')
    environ = {**os.environ, "PYTHONPATH": str(tools)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said())
    assert "of 256 visual tokens" in done.stdout


def test_a_stream_over_json(triton: Triton) -> None:
    body = {"text_input": QUESTION, "stream": True, "min_tokens": 5, "max_tokens": 5}
    text = triton.post(f"/v2/models/{NAME}/generate_stream", body).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    assert len(events) > 2
    assert events[-1]["completion_tokens"] == 5
    assert all("finish_reason" not in event for event in events[:-1])


def test_a_picture_as_bytes_over_grpc_in_pieces(client: Client) -> None:
    client.ask(text_input=QUESTION.encode(), image=[PICTURE], stream=True)
    *pieces, last = client.all()
    assert len(pieces) > 2
    assert b"".join(piece["text_output"][0] for piece in pieces).decode() == said()
    assert set(last) == {each.name for each in OUTPUTS}


def test_several_at_once(triton: Triton, client: Client) -> None:
    for _ in range(SLOTS + 4):
        client.ask(text_input=QUESTION.encode(), image=[PICTURE])
    texts = [client.all()[-1]["text_output"][0].decode() for _ in range(SLOTS + 4)]
    assert set(texts) == {said()}
    triton.until("svcli_running", 0)


def test_what_is_no_question_is_an_error_of_tritons(triton: Triton, client: Client) -> None:
    answer = triton.generate(text_input="what?", image=["bad"])
    assert answer.status_code == 400
    assert "not a picture" in answer.json()["error"]
    client.ask(text_input=b"what?", image=[b"bad"])
    _, error = client.events.get(timeout=SECONDS)
    assert "not a picture" in str(error)
    assert triton.generate(text_input="what is this?").status_code == 200


def test_a_client_that_cancels_or_hangs_up_frees_its_slot(triton: Triton, tools: Path) -> None:
    before = triton.metric("svcli_completion_tokens_total")
    for _ in range(3):
        client = Client(triton, tools)
        client.ask(text_input=b"what?", stream=True, **LONG)
        client.events.get(timeout=SECONDS)
        client.close(cancel_requests=True)
    with httpx.stream(
        "POST",
        f"{triton.http}/v2/models/{NAME}/generate_stream",
        content=json.dumps({"text_input": "what?", "stream": True, **LONG}),
        timeout=SECONDS,
    ) as stream:
        next(stream.iter_lines())
    triton.until("svcli_running", 0)
    # None of the four was made to its end, which would have been counted.
    assert triton.metric("svcli_completion_tokens_total") == before


def test_unloading_ends_what_was_taken_and_leaves_nothing(triton: Triton) -> None:
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(triton.generate(text_input="what?", **LONG))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    deadline = monotonic() + SECONDS
    while triton.metric("svcli_running") == 0 and monotonic() < deadline:
        sleep(0.01)
    assert triton.post(f"/v2/repository/models/{NAME}/unload").status_code == 200
    for thread in threads:
        thread.join(SECONDS)
    assert [answer.json()["completion_tokens"] for answer in answers] == [600] * 3
    triton.until_gone()
    assert triton.post(f"/v2/repository/models/{NAME}/load").status_code == 200
    assert triton.generate(text_input="what is this?").status_code == 200


def test_a_damaged_bundle_is_not_loaded_and_the_log_says_why(triton: Triton) -> None:
    broken = triton.folder.with_name("broken")
    write_model(bundled_model(), broken.parent, broken.name, Settings())
    (broken / "1" / "bundle" / "tokenizer.json").unlink()
    refused = triton.post("/v2/repository/models/broken/load")
    assert refused.status_code == 400
    assert "tokenizer.json is missing; re-export it" in triton.log.read_text()
