"""The process that builds a plan: what it is asked, what it answers, and what its end means.

A process of its own, because TensorRT prints past its logger and may abort, and because TensorRT-RTX ends every process
in which a plugin of ours is registered. What it does is in plan_builder.py. Imports neither onnx nor TensorRT.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, ValidationError

from svcli_engines.base import MachineError
from svcli_engines.plans import Backend, ShapeRange
from svcli_engines.tensorrt_runtime import TOO_LITTLE_MEMORY

Progress = Callable[[float], None]
"""Called with the share of a build that is done."""

_SECONDS_TO_END = 30
"""For a process that has answered: the teardown of a driver may hang."""
_LAST_LINES = 3
_LONGEST = 300
"""Letters of a log that are quoted."""
_SERIOUS = ("[E]", "[!]")
"""How errors begin in polygraphy's log."""
_CHATTER = ("[V]", "[I]", "[W]")
"""And everything that is none."""
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_FULL_DISK = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_BAD_DRIVER = re.compile(r"CUDA initialization failure|driver version is insufficient|driver too old", re.IGNORECASE)


class BuildError(ValueError):
    """A build that failed; one sentence with the builder's reason and where its log is."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Job(_Strict):
    """One plan to be built."""

    graph: Path
    """An ONNX file beside its weights."""
    plan: Path
    """Where the plan is written."""
    target: str
    profiles: tuple[dict[str, ShapeRange], ...]
    caches: dict[str, str]
    """Inputs that must be updated in place, each with the output that shares its memory."""
    num_plugins: int
    workspace: int | None = None
    """Most bytes of scratch memory that kernels may ask for; None: TensorRT's own limit."""
    timing_cache: Path | None = None
    runs_here: bool = False
    """Whether there is a GPU of the target here, so that the plan can be read again."""


class Task(_Strict):
    """What the process is asked: to build a plan, or only what could be built, where there is no `job`."""

    backend: Backend
    driver: int | None = None
    """Newest CUDA that the driver here runs, such as 13000."""
    job: Job | None = None


class Tools(_Strict):
    """What plans can be built with."""

    version: str
    """Of the backend."""
    targets: tuple[str, ...]
    """GPUs that it builds for; none: the GPU that it runs on."""


class Built(_Strict):
    """A plan that was built."""

    version: str
    num_layers: int
    """Of the network, before layers are fused."""
    scratch_bytes: int | None = None
    seconds: float


class Failure(_Strict):
    """Why there is no plan."""

    message: str
    is_lack: bool
    """Whether the machine lacks something; the message then says what mends it."""


class Answer(_Strict):
    """One line from the process; the last one is no progress."""

    progress: float | None = None
    tools: Tools | None = None
    built: Built | None = None
    failure: Failure | None = None


def find_tools(backend: Backend, driver: int | None = None) -> Tools:
    """What can be built with here. Raises MachineError where something is missing, BuildError where it crashes."""
    answer, _ = _run(Task(backend=backend, driver=driver), None, lambda _: None)
    assert answer.tools is not None
    return answer.tools


def build(task: Task, log: Path, progress: Progress) -> Built:
    """Builds the plan of a task. All that the process prints goes behind what is in `log`.

    Raises MachineError for want of memory, disk, driver or packages, BuildError for all else.
    """
    answer, words = _run(task, log, progress)
    assert answer.built is not None
    scratch = _ACTIVATIONS.findall(words)
    if answer.built.scratch_bytes is None and scratch:
        return answer.built.model_copy(update={"scratch_bytes": int(scratch[-1])})
    return answer.built


def command(channel: int) -> list[str]:
    """What starts the process; it answers on the file descriptor `channel`."""
    # The same packages as here, and none from the working folder: a file there may be named like one of them.
    path = [folder for folder in sys.path if folder]
    code = f"import sys; sys.path[:] = {path!r}; from svcli_engines.plan_builder import main; main({channel})"
    # Unbuffered, or else the last words before a crash would be lost.
    return [sys.executable, "-I", "-u", "-X", "utf8", "-W", "ignore", "-c", code]


def _run(task: Task, log: Path | None, progress: Progress) -> tuple[Answer, str]:
    """The answer, which is no failure, and all that the process printed."""
    with tempfile.TemporaryFile() if log is None else log.open("a+b") as output:
        before = output.seek(0, os.SEEK_END)
        answer, code = _ask(task, output, progress)
        output.seek(before)
        words = output.read().decode(errors="replace")
    if answer is None:
        raise _death(task, code, words, log)
    if answer.failure is not None:
        if answer.failure.is_lack:
            raise MachineError(answer.failure.message)
        raise _error(task, answer.failure.message, words, log)
    return answer, words


def _ask(task: Task, output: IO[bytes], progress: Progress) -> tuple[Answer | None, int]:
    """The last answer, None where there is none, and the exit code of the process, which prints to `output`."""
    answers, channel = os.pipe()
    with os.fdopen(answers, encoding="utf-8") as lines:
        try:
            process = subprocess.Popen(
                command(channel),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[channel],
                # Read when polygraphy is imported. What is missing is said, never installed.
                env={
                    **os.environ,
                    "POLYGRAPHY_USE_TENSORRT_RTX": "1" if task.backend == "tensorrt-rtx" else "0",
                    "POLYGRAPHY_AUTOINSTALL_DEPS": "0",
                },
            )
        finally:
            os.close(channel)
        try:
            answer = _converse(process, task, lines, progress)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)
        finally:
            process.kill()
            code = process.wait()
    return answer, code


def _converse(process: subprocess.Popen[bytes], task: Task, lines: IO[str], progress: Progress) -> Answer | None:
    """Hands over the task and follows the answers; the last one, None where the process ends without it."""
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(task.model_dump_json().encode())
    for line in lines:
        try:
            answer = Answer.model_validate_json(line)
        except ValidationError:  # cut off in the middle
            return None
        if answer.progress is None:
            return answer
        progress(answer.progress)
    return None


def _death(task: Task, code: int, words: str, log: Path | None) -> ValueError:
    """The error for a process that ended without an answer."""
    if code == -signal.SIGKILL:
        return MachineError(
            f"the builder of {_what(task)} was killed, most likely because memory ran out; end what else uses memory,"
            " or export with a smaller --max-context"
        )
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return _error(task, f"the builder {how}", words, log)


def _error(task: Task, message: str, words: str, log: Path | None) -> ValueError:
    """The error for a process that failed with `message`, in the light of all that it printed."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    serious = [line for line in lines if line.startswith(_SERIOUS)]
    told = "\n".join([message, *(serious or lines[-_LAST_LINES:])])
    place = "" if log is None else f"; the whole log is {log}"
    if _FULL_DISK.search(told):
        return MachineError(f"the disk is full: {_what(task)} could not be written; free some room and build again")
    if TOO_LITTLE_MEMORY.search(told):
        limit = None if task.job is None else task.job.workspace
        if limit is not None:
            return BuildError(
                f"{_what(task)} could not be built with --workspace {limit >> 20}; give it more MiB, or, if memory runs"
                f" short, less{place}"
            )
        return MachineError(
            f"there was too little memory for building {_what(task)}; end what else uses it, set a limit by"
            f" --workspace, or export with a smaller --max-context{place}"
        )
    if _BAD_DRIVER.search(told):
        return MachineError(
            f"CUDA could not be started for building {_what(task)}; update the NVIDIA driver, and see what"
            f" `svcli doctor` says of it{place}"
        )
    # What comes first tends to be the cause. Where nothing is marked as an error, the end is all there is.
    plain = [line for line in lines if not line.startswith(_CHATTER)]
    quoted = serious[0].removeprefix(_SERIOUS[0]) if serious else " | ".join(plain[-_LAST_LINES:])
    reason = " ".join(quoted.split())[:_LONGEST] or "it gave no reason"
    return BuildError(f"{_what(task)} could not be built: {message} ({reason}){place}")


def _what(task: Task) -> str:
    return f"a plan of {task.backend}" if task.job is None else f"{task.job.plan.name} for {task.job.target}"
