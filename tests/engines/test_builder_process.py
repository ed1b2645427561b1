"""The process that builds a plan: what it is told arrives, and whatever becomes of it is one sentence.

polygraphy and TensorRT are those of fake_builder.py. Only what TensorRT itself would do is not seen here.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from svcli_engines import builder_process, plan_builder
from svcli_engines.base import MachineError
from svcli_engines.builder_process import Answer, BuildError, Built, Job, Task, Tools, build, find_tools
from svcli_engines.plan_builder import Channel, Phases
from svcli_engines.plans import Backend, ShapeRange
from tests.engines import fake_builder

PROFILE = {"input_ids": ShapeRange(min=(1, 1), opt=(1, 1), max=(1, 64))}
CACHES = {f"past_key_values.0.{part}": f"present.0.{part}" for part in ("key", "value")}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the fake packages, in front of everything that is installed."""
    folder = tmp_path / "packages"
    for name, content in fake_builder.FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def task(folder: Path, backend: Backend = "tensorrt-rtx", driver: int | None = None, **changes: Any) -> Task:
    """A decoder of one layer for sm_89."""
    (folder / "weights.safetensors").touch()
    graph = folder / "decode.onnx"
    graph.write_bytes(b"TensorScatter, " * len(CACHES))
    job = Job(
        graph=graph, plan=folder / "decode.plan", target="sm_89", profiles=(PROFILE,), caches=CACHES, num_plugins=0
    )
    return Task(backend=backend, driver=driver, job=job.model_copy(update=changes))


def failing(task: Task, log: Path, error: type[Exception]) -> str:
    with pytest.raises(error) as failure:
        build(task, log, lambda _: None)
    sentence = str(failure.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.usefixtures("packages")
def test_what_there_is_to_build_with_is_asked_of_the_module_itself() -> None:
    assert find_tools("tensorrt-rtx") == Tools(version=fake_builder.VERSION, targets=("sm_80", "sm_89", "sm_120"))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "tensorrt_rtx.py",
            "raise ModuleNotFoundError(\"No module named 'tensorrt_rtx'\", name='tensorrt_rtx')",
            "tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13",
        ),
        (
            "tensorrt_rtx.py",
            "raise OSError('libtensorrt_rtx.so.1: cannot open shared object file')",
            "tensorrt_rtx cannot be loaded (libtensorrt_rtx.so.1: cannot open",
        ),
        (
            "polygraphy/__init__.py",
            "raise ModuleNotFoundError(\"No module named 'polygraphy'\", name='polygraphy')",
            "pip install polygraphy",
        ),
    ],
    ids=["no TensorRT", "no library", "no polygraphy"],
)
def test_a_missing_package_is_something_that_the_machine_lacks(
    packages: Path, file: str, content: str, words: str
) -> None:
    (packages / file).write_text(f"{content}\n")
    with pytest.raises(MachineError) as lack:
        find_tools("tensorrt-rtx")
    assert words in str(lack.value)
    assert "\n" not in str(lack.value)


def test_a_crash_while_importing_is_one_sentence(packages: Path) -> None:
    (packages / "tensorrt_rtx.py").write_text("import os\nos.write(1, b'the last words\\n')\nos.abort()\n")
    with pytest.raises(BuildError, match=r"a plan of tensorrt-rtx could not be built: .*SIGABRT \(the last words\)$"):
        find_tools("tensorrt-rtx")


@pytest.mark.usefixtures("packages")
def test_what_is_asked_for_reaches_polygraphy(tmp_path: Path) -> None:
    shares: list[float] = []
    log = tmp_path / "build.log"
    log.write_text("before\n")
    built = build(task(tmp_path, workspace=5 << 20), log, shares.append)
    assert (built.version, built.num_layers, built.scratch_bytes) == (fake_builder.VERSION, 3, None)
    assert built.seconds > 0
    assert json.loads((tmp_path / "decode.plan").read_bytes()) == {
        "graph": "decode.onnx",
        "config": "CreateConfigRTX",
        "rtx": "1",
        "limits": {"WORKSPACE": 5 << 20},
        "timing_cache": None,
        "flags": ["REQUIRE_USER_ALLOCATION"],
        "decomposable": True,
        "compute_capabilities": [[8, 9]],
        "profiles": [{"input_ids": [[1, 1], [1, 1], [1, 64]]}],
    }
    assert shares
    assert shares == sorted(shares)
    assert all(0 < share <= 1 for share in shares)
    assert log.read_text() == "before\n[V] parsing decode.onnx\n"


@pytest.mark.usefixtures("packages")
def test_where_the_gpu_is_here_the_plan_is_read_again(tmp_path: Path) -> None:
    built = build(task(tmp_path, runs_here=True), tmp_path / "log", lambda _: None)
    assert built.scratch_bytes == fake_builder.SCRATCH


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("refuse", BuildError, "Please ensure the engine was built correctly (Error Code 10: could not find any"),
        ("scatter", BuildError, "of 2 cache updates 0 are layers that write in place"),
        ("abort", BuildError, "ended by SIGABRT"),
        ("exit", BuildError, "ended with exit code 0"),
        ("killed", MachineError, "was killed, most likely because memory ran out"),
        ("memory", MachineError, "too little memory for building decode.plan for sm_89"),
        ("disk", MachineError, "the disk is full: decode.plan for sm_89"),
        ("driver", MachineError, "update the NVIDIA driver"),
    ],
)
@pytest.mark.usefixtures("packages")
def test_a_build_that_fails_says_why_and_where_its_log_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[Exception], words: str
) -> None:
    monkeypatch.setenv("SVCLI_FAULT", fault)
    log = tmp_path / "build.log"
    sentence = failing(task(tmp_path), log, error)
    assert words in sentence
    if error is BuildError:
        assert sentence.endswith(f"; the whole log is {log}")
        assert "decode.plan for sm_89 could not be built" in sentence
    assert log.read_text().startswith("[V] parsing decode.onnx\n")
    assert not (tmp_path / "decode.plan").exists()


@pytest.mark.usefixtures("packages")
def test_a_workspace_that_is_too_small_is_no_lack_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVCLI_FAULT", "memory")
    sentence = failing(task(tmp_path, workspace=1 << 20), tmp_path / "log", BuildError)
    assert "could not be built with --workspace 1; give it more MiB" in sentence


def test_scratch_memory_is_what_the_log_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(built=Built(version="1", num_layers=1, seconds=1.0)).model_dump_json(exclude_none=True)
    said = "os.write(1, b'[V] Total Activation Memory: 1 bytes\\n[V] Total Activation Memory: 4096 bytes\\n');"
    monkeypatch.setattr(builder_process, "command", program(f"{said} os.write(CHANNEL, {answer.encode()!r} + b'\\n')"))
    (tmp_path / "log").write_text("[V] Total Activation Memory: 99 bytes\n")  # of the plan before
    assert build(task(tmp_path), tmp_path / "log", lambda _: None).scratch_bytes == 4096


def test_chatter_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "os.write(1, b'[V] Detected 1 inputs\\n[I] Building\\n'); os.kill(os.getpid(), 11)"
    monkeypatch.setattr(builder_process, "command", program(text))
    assert "ended by SIGSEGV (it gave no reason)" in failing(task(tmp_path), tmp_path / "log", BuildError)


@pytest.mark.usefixtures("packages")
def test_last_words_past_every_logger_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVCLI_FAULT", "abort")
    sentence = failing(task(tmp_path), tmp_path / "log", BuildError)
    assert "printed past every logger | terminate called after an assertion" in sentence


@pytest.mark.usefixtures("packages")
def test_a_plan_that_would_copy_its_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVCLI_FAULT", "copy")
    sentence = failing(task(tmp_path, runs_here=True), tmp_path / "log", BuildError)
    assert "the plan does not write past_key_values.0.key in place" in sentence
    build(task(tmp_path), tmp_path / "log", lambda _: None)  # without a GPU there is no plan to look into


def program(text: str) -> Callable[[int], list[str]]:
    """Stands for the builder; `CHANNEL` is where it answers."""
    return lambda channel: [sys.executable, "-c", f"CHANNEL = {channel}\nimport os, sys, time\n{text}"]


@pytest.mark.parametrize("answer", [b'{"progress": 0.', b"nonsense\n", b"", b'{"built": {"version": 1}}\n'])
def test_an_answer_that_is_none_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr(builder_process, "command", program(f"os.write(CHANNEL, {answer!r}); sys.exit(3)"))
    assert "ended with exit code 3" in failing(task(tmp_path), tmp_path / "log", BuildError)


def test_a_builder_that_does_not_end_after_its_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(tools=Tools(version="1", targets=())).model_dump_json(exclude_none=True)
    monkeypatch.setattr(builder_process, "_SECONDS_TO_END", 0.1)
    monkeypatch.setattr(
        builder_process, "command", program(f"os.write(CHANNEL, {answer.encode()!r} + b'\\n'); time.sleep(60)")
    )
    start = time.monotonic()
    assert find_tools("tensorrt-rtx").version == "1"
    assert time.monotonic() - start < 30


def test_ctrl_c_leaves_no_builder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "os.write(1, str(os.getpid()).encode()); os.write(CHANNEL, b'{\"progress\": 0.5}\\n'); time.sleep(60)"
    monkeypatch.setattr(builder_process, "command", program(text))

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(task(tmp_path), tmp_path / "log", interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log").read_text()), 0)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The builder's program in this process, on the fakes; the targets that plugins were registered for."""
    registered: list[str] = []
    monkeypatch.setattr(plan_builder, "import_module", lambda _name: fake_builder)
    monkeypatch.setattr(
        plan_builder, "import_backend", lambda _backend: SimpleNamespace(**vars(fake_builder), __version__="11.4")
    )
    monkeypatch.setattr(plan_builder, "register_plugins", registered.append)
    monkeypatch.setattr(plan_builder, "find_compiler", lambda: SimpleNamespace(name="nvrtc", version="13.0"))
    yield registered
    fake_builder.plugin_layers = 0


def done(task: Task) -> Answer:
    return plan_builder._done(task, Channel(io.StringIO()))


def test_tensorrt_takes_our_plugins(inside: list[str], tmp_path: Path) -> None:
    fake_builder.plugin_layers = 2
    answer = done(task(tmp_path, "tensorrt", 13000, num_plugins=2, runs_here=True))
    assert answer.built is not None, answer
    assert (answer.built.version, answer.built.num_layers) == ("11.4", 5)
    assert inside == ["sm_89"]
    asked = json.loads((tmp_path / "decode.plan").read_bytes())
    assert (asked["config"], asked["load_timing_cache"], asked["flags"]) == ("CreateConfig", None, [])


def test_plugins_of_an_unlisted_gpu_are_those_of_the_nearest_older_one(inside: list[str], tmp_path: Path) -> None:
    fake_builder.plugin_layers = 1
    assert done(task(tmp_path, "tensorrt", target="sm_87", num_plugins=1)).built is not None
    assert inside == ["sm_86"]


def test_rtx_never_sees_a_plugin(inside: list[str], tmp_path: Path) -> None:
    assert done(task(tmp_path)).built is not None
    assert done(Task(backend="tensorrt-rtx")).tools is not None
    assert inside == []


def test_a_plugin_that_was_not_taken_is_noticed(inside: list[str], tmp_path: Path) -> None:
    del inside
    fake_builder.plugin_layers = 2
    failure = done(task(tmp_path, "tensorrt", num_plugins=3)).failure
    assert failure is not None
    assert "of 3 plugin nodes 2 took the plugin" in failure.message
    assert not failure.is_lack


def test_a_driver_that_is_too_old_for_the_plugins_is_something_lacking(inside: list[str], tmp_path: Path) -> None:
    for asked in (Task(backend="tensorrt", driver=12040), task(tmp_path, "tensorrt", 12040, num_plugins=1)):
        failure = done(asked).failure
        assert failure is not None
        assert failure.is_lack
        assert "the driver is of CUDA 12.4" in failure.message
    assert inside == []


def test_measurements_are_kept_for_the_next_build(inside: list[str], tmp_path: Path) -> None:
    del inside
    cache = tmp_path / "timings"
    for known in (None, str(cache)):
        assert done(task(tmp_path, "tensorrt", timing_cache=cache)).built is not None
        asked = json.loads((tmp_path / "decode.plan").read_bytes())
        assert (asked["load_timing_cache"], asked["timing_cache"]) == (known, str(cache))


def test_progress_goes_forward_through_phases_that_nest() -> None:
    phases = Phases()
    shares = [phases.share]

    def note() -> None:
        shares.append(phases.share)

    phases.start("build", None, 2)
    phases.start("tactics", "build", 4)
    for step in range(4):
        phases.step("tactics", step)
        note()
    phases.finish("tactics")
    phases.step("build", 0)
    note()
    phases.start("tactics", "build", 10)  # a phase of the same name, later
    phases.step("tactics", 4)
    note()
    phases.finish("tactics")
    phases.step("build", 1)
    phases.finish("build")
    note()
    phases.start("another root", None, 5)
    phases.step("never started", 3)
    note()
    assert shares == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.75, 0.75, 0.75]


def test_a_builder_whose_listener_has_gone_gives_up() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    assert Channel(stream).tell(0.5) is False
    with pytest.raises(BrokenPipeError):  # it still holds what it could not write
        stream.close()
