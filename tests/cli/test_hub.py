"""Models by their id on the hub, from a server on this machine: whole, or refused in one sentence."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from skipvision.published import load_published
from tests.cli.fake_hub import SECONDS, Hub, Repository, serving
from tests.optional import missing

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "export"), str(ROOT / "engines")]
CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model"},
}
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
SHARD = SHARDS[1]
Environment = Callable[..., dict[str, str]]
DESCRIBES = f"""
import json, sys
sys.path[:0] = {PATHS!r}
from svcli.errors import explain
from svcli.models import model_folder
said = {{}}
for name in sys.argv[1:]:
    try:
        said[name] = [str(model_folder(name)), 0]
    except Exception as error:
        said[name] = explain(error)
print(json.dumps(said))
"""
FETCHES = f"""
import sys
sys.path[:0] = {PATHS!r}
%s
import typer
from svcli.errors import reported
from svcli.models import model_folder
def fetch(name: str) -> None:
    print(model_folder(name))
typer.run(reported(fetch))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-1.5 in shards, as transformers writes it."""
    if find_spec("transformers") is None:
        missing("transformers")
    transformers = import_module("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=120
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=7)
    )
    folder = tmp_path_factory.mktemp("published") / "llava"
    model.save_pretrained(folder, max_shard_size="70KB")
    return folder


def config(**changes: Any) -> dict[str, bytes]:
    return {"config.json": json.dumps(CONFIG | changes).encode()}


def index(*files: str) -> dict[str, bytes]:
    names = {f"weight{number}": file for number, file in enumerate(files)}
    return {"model.safetensors.index.json": json.dumps({"weight_map": names}).encode()}


@pytest.fixture
def whole() -> Repository:
    """What is needed, in three shards of noise, and what is not."""
    weights = {file: random.Random(file).randbytes(70_000) for file in SHARDS}
    beside = {"tokenizer.json": b"{}", "README.md": b"read me", "pytorch_model.bin": b"pickle"}
    others = {"adapter.safetensors": b"", "onnx/model.safetensors": b"", "../evil.json": b"{}"}
    return Repository(config() | index(*SHARDS) | weights | beside | others)


def clean(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Variables of a process that has a cache of its own, and no way out of this machine."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
    }
    return kept | {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | more


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    def of(hub: Hub, **more: str) -> dict[str, str]:
        return clean(hub, tmp_path / "hub", **more)

    return of


def run(program: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)


def fetch(name: str, env: dict[str, str], patch: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    done = run(FETCHES % patch, name, env=env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def snapshot(tmp_path: Path) -> set[str]:
    """Names of what the cache takes for whole."""
    return {path.name for path in tmp_path.glob("hub/hub/models--*/snapshots/*/*") if path.exists()}


def test_a_model_is_fetched_once_and_stays_when_the_hub_is_gone(
    whole: Repository, environment: Environment, tmp_path: Path
) -> None:
    with serving({"owner/llava": whole}) as hub:
        first = fetch("owner/llava", environment(hub))
        assert "downloading owner/llava" in first.stderr
        folder = Path(first.stdout.strip())
        wanted = {"config.json", "model.safetensors.index.json", "tokenizer.json", *SHARDS}
        assert {path.name for path in folder.iterdir()} == wanted
        assert all((folder / file).read_bytes() == whole.files[file] for file in wanted)
        assert not list(tmp_path.rglob("evil.json"))
        hub.requests.clear()
        assert fetch("owner/llava@main", environment(hub)).stderr == ""
        assert not [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    again = fetch("owner/llava", environment(hub))
    assert Path(again.stdout.strip()) == folder
    assert again.stderr == (
        "Note: owner/llava: the hub cannot be reached: check the network and try again; what was downloaded before is"
        " used\n"
    )
    assert fetch("owner/llava", environment(hub, HF_HUB_OFFLINE="1")).stderr == ""
    (folder / SHARD).unlink()
    assert "nor was a model of that name downloaded whole" in fetch("owner/llava", environment(hub), code=1).stderr


def test_what_was_fetched_loads(published: Path, environment: Environment) -> None:
    """The cache holds links, which every reader follows."""
    with serving({"owner/llava": Repository({path.name: path.read_bytes() for path in published.iterdir()})}) as hub:
        folder = Path(fetch("owner/llava", environment(hub)).stdout.strip())
    ours, theirs = load_published(folder).state_dict(), load_published(published).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_connection_that_ends_is_taken_up_where_it_ended(whole: Repository, environment: Environment) -> None:
    whole.cut_at[SHARD] = 5000
    small_pieces = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000"
    with serving({"owner/llava": whole}) as hub:
        folder = Path(fetch("owner/llava", environment(hub), small_pieces).stdout.strip())
        assert [request.rpartition(" ")[2] for request in hub.asked_for(SHARD)] == ["", "bytes=5000-"]
    assert (folder / SHARD).read_bytes() == whole.files[SHARD]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_was_stopped_is_never_taken_for_whole(
    whole: Repository, environment: Environment, tmp_path: Path, number: signal.Signals
) -> None:
    whole.cut_at[SHARD], whole.held = 5000, threading.Event()
    with serving({"owner/llava": whole}) as hub:
        env = environment(hub)
        process = subprocess.Popen([sys.executable, "-c", FETCHES % "", "owner/llava"], env=env, stderr=subprocess.PIPE)
        assert hub.cut.wait(SECONDS)
        process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
        whole.held.set()
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert b"Traceback" not in said
        assert SHARD not in snapshot(tmp_path)
        refused = fetch("owner/llava", env | {"HF_HUB_OFFLINE": "1"}, code=1)
        assert "nor was a model of that name downloaded whole; HF_HUB_OFFLINE forbids" in refused.stderr
        hub.requests.clear()
        fetch("owner/llava", env)
        assert SHARD in snapshot(tmp_path)
        assert not hub.asked_for(SHARDS[0])  # what had come whole stays


def test_a_file_of_another_size_is_fetched_again(whole: Repository, environment: Environment) -> None:
    with serving({"owner/llava": whole}) as hub:
        folder = Path(fetch("owner/llava", environment(hub)).stdout.strip())
        (folder / SHARD).write_bytes(b"cut")
        fetch("owner/llava", environment(hub))
    assert (folder / SHARD).read_bytes() == whole.files[SHARD]


NO_ROOM = """
import shutil
from types import SimpleNamespace
shutil.disk_usage = lambda place: SimpleNamespace(free=50_000)
"""
FULL = """
from huggingface_hub import file_download
get = file_download.http_get
def full(*arguments, expected_size, **options):
    if expected_size > 10_000:
        raise OSError(28, "No space left on device")
    get(*arguments, expected_size=expected_size, **options)
file_download.http_get = full
"""


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        (
            NO_ROOM,
            r"owner/llava needs 0\.2 MB and 0\.1 MB are free in .*; free some room, or set HF_HOME to .* more",
        ),
        (FULL, r"the disk of .* is full; free some room and run the command again"),
    ],
)
def test_a_disk_that_is_too_small_is_said(
    whole: Repository, environment: Environment, tmp_path: Path, patch: str, sentence: str
) -> None:
    with serving({"owner/llava": whole}) as hub:
        done = fetch("owner/llava", environment(hub), patch, code=3)
    assert not any(name.startswith("model-") for name in snapshot(tmp_path))
    assert re.fullmatch(f"Error: {sentence}", done.stderr.splitlines()[-1])


SINGLE = {"model.safetensors": bytes(100)}
REFUSALS: dict[str, tuple[Repository | None, int, str]] = {
    "a/gated": (
        Repository({}, (403, {"X-Error-Code": "GatedRepo"})),
        1,
        "a/gated is gated: accept its terms on the model's page on the hub, and log in with `hf auth login`",
    ),
    "a/stranger": (
        Repository({}, (401, {"X-Error-Code": "GatedRepo"})),
        1,
        "a/stranger is gated: accept its terms",
    ),
    "a/listed": (
        Repository(config() | SINGLE, (401, {"X-Error-Code": "GatedRepo"}), is_listed=True),
        1,
        "a/listed is gated: accept its terms",
    ),
    "a/sealed": (Repository(config() | SINGLE, (403, {}), is_listed=True), 1, "a/sealed: the hub denies access to it"),
    "a/missing": (
        None,
        2,
        "a/missing: no such folder here, and no such model on the hub, or it is private: check the name, or log in",
    ),
    "a/single@v9": (None, 2, "a/single on the hub has no revision v9; check the name behind the @"),
    "a/token": (
        Repository({}, (401, {"X-Error-Message": "Invalid credentials in Authorization header"})),
        1,
        "a/token: the hub does not accept your token; log in again with `hf auth login`",
    ),
    "a/denied": (Repository({}, (403, {})), 1, "a/denied: the hub denies access to it; check what your token may read"),
    "a/hurried": (Repository({}, (429, {})), 1, "downloaded whole; the hub asks to wait, too many requests were made"),
    "a/broken": (Repository({}, (503, {})), 1, "downloaded whole; the hub is out of order (status 503)"),
    "a/pickle": (
        Repository(config() | {"pytorch_model-00001-of-00002.bin": b"pickle"}),
        2,
        "a/pickle on the hub has its weights as pickles only, which are not read: look for a conversion to safetensors",
    ),
    "a/empty": (Repository(config()), 2, "a/empty on the hub has no weights: neither model.safetensors nor"),
    "a/bare": (Repository(SINGLE), 2, "a/bare on the hub has no config.json"),
    "a/foreign": (
        Repository(config(model_type="whisper") | SINGLE),
        2,
        "a/foreign: config.json: unknown family model_type='whisper'; known: llava",
    ),
    "a/large": (
        Repository(config() | SINGLE, stated_sizes={"model.safetensors": 3 * 10**11}),
        2,
        "a/large has 300.0 GB; more than 200.0 GB is not downloaded",
    ),
    "a/long": (
        Repository(config() | SINGLE, stated_sizes={"config.json": 10**9}),
        2,
        "a/long: config.json has 1.0 GB, which is more than any that is known",
    ),
    "a/lost": (
        Repository(config() | index("model-1.safetensors")),
        2,
        "a/lost on the hub lacks model-1.safetensors, which its model.safetensors.index.json names",
    ),
    "a/outside": (
        Repository(config() | index("../x.safetensors") | {"../x.safetensors": b""}),
        1,
        "'../x.safetensors' is no safetensors file beside it",
    ),
    "a/other": (Repository(config() | index("x.bin") | {"x.bin": b""}), 1, "'x.bin' is no safetensors file beside it"),
    "a/resized": (
        Repository(config() | SINGLE, stated_sizes={"model.safetensors": 120}),
        1,
        "a/resized: model.safetensors came with another size than the hub states; try again later",
    ),
    "no such/id": (None, 2, "no such/id: no such folder"),
    "../runs": (None, 2, "../runs: no such folder"),
    __file__: (None, 2, f"{__file__}: is no folder"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Hub, Path, dict[str, tuple[str, int]]]:
    """All of them in one process, whose start takes longest."""
    repositories = {name: repository for name, (repository, _, _) in REFUSALS.items() if repository is not None}
    home = tmp_path_factory.mktemp("refusals")
    with serving(repositories | {"a/single": Repository(config() | SINGLE)}) as hub:
        done = run(DESCRIBES, *REFUSALS, env=clean(hub, home))
    assert done.returncode == 0, done.stderr
    return hub, home, json.loads(done.stdout)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_is_one_sentence(refusals: tuple[Hub, Path, dict[str, tuple[str, int]]], name: str) -> None:
    hub, home, said = refusals
    _, code, words = REFUSALS[name]
    sentence, told = said[name]
    assert words in sentence
    assert "\n" not in sentence
    assert told == code
    # No weight of what is refused was asked for, and what came with a wrong size is gone.
    fetched = [request for request in hub.asked_for("model.safetensors") if f" /{name}/" in request]
    assert len(fetched) == (2 if name == "a/resized" else 0)
    assert not [path for path in home.rglob("*.safetensors") if path.exists()]


def test_cost_takes_config_json_alone(
    whole: Repository, environment: Environment, command: list[str], tmp_path: Path
) -> None:
    arguments = [*command, "cost", "owner/llava", "--skip", "2/4", "--json"]
    with serving({"owner/llava": whole}) as hub:
        done = subprocess.run(arguments, env=environment(hub), capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert (said["model"], said["family"]) == ("owner/llava", "LLaVA-1.5")
    assert snapshot(tmp_path) == {"config.json"}
    # That is enough for cost, and for nothing else, when the hub is gone.
    assert (
        subprocess.run(arguments, env=environment(hub), capture_output=True, check=True).stdout.decode() == done.stdout
    )
    assert "nor was a model of that name downloaded whole" in fetch("owner/llava", environment(hub), code=1).stderr


def test_export_asks_the_hub_before_anything_else(environment: Environment, command: list[str], tmp_path: Path) -> None:
    with serving({"owner/foreign": Repository(config(model_type="whisper") | SINGLE)}) as hub:
        done = subprocess.run(
            [*command, "export", "owner/foreign", "-o", str(tmp_path / "bundle")],
            env=environment(hub),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: owner/foreign: config.json: unknown family model_type='whisper'; known: ")
