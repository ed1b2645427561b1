"""What the user reads when something goes wrong: one sentence that says what to do, and the fitting exit code.

Our packages raise subclasses of ValueError whose message is that sentence. Anything else is a defect of ours.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

import typer

from svcli import ui
from svcli.__main__ import INTERRUPTED, MACHINE
from svcli.settings import debugging

Params = ParamSpec("Params")

FAILURE = 1
USAGE = 2
BROKEN_PIPE = 141
"""What a shell reports for a process whose reader has gone."""

_LONGEST = 200
"""Letters of a message that was not written for users."""
_PACKAGES = ("skipvision", "svcli_export", "svcli_engines", "svcli")
# By name, because importing the classes would load the engines before help can be shown.
_USERS_INPUT = frozenset(
    {
        "BuildOptionError",
        "AskerError",
        "ChatError",
        "ConfigError",
        "ContractError",
        "DataSetError",
        "ImageError",
        "NoBundleError",
        "NoCheckpointError",
        "NoModelError",
        "NoVariantError",
        "ProfileError",
        "PromptError",
        "ResultsError",
        "SamplingError",
        "TaskError",
        "UsageError",
    }
)
_LACKING = frozenset({"MachineError", "NoMemoryError", "NoRoomError", "ProviderError"})
_BROUGHT_BY = {
    **dict.fromkeys(("PIL", "jinja2", "markdown_it", "numpy", "prompt_toolkit", "pydantic", "tokenizers"), "svcli"),
    "datasets": "svcli[train]",
    "fastapi": "svcli[serve]",
    "huggingface_hub": "svcli[torch]",
    "matplotlib": "svcli[plots]",
    "onnx": "svcli[torch]",
    "onnx_ir": "svcli[torch]",
    "onnxruntime": "svcli[cpu]",
    "onnxscript": "svcli[torch]",
    "peft": "svcli[train]",
    "prometheus_client": "svcli[serve]",
    "pyarrow": "svcli[eval]",
    "resvg_py": "svcli[data]",
    "safetensors": "svcli[torch]",
    "starlette": "svcli[serve]",
    "tensorboard": "svcli[loggers]",
    "tomli": "svcli[torch]",
    "tomli_w": "svcli[train]",
    "torch": "svcli[torch]",
    "uvicorn": "svcli[serve]",
    "wandb": "svcli[loggers]",
}


class UsageError(ValueError):
    """Arguments that do not fit together; the message says what would."""


def reported(command: Callable[Params, None]) -> Callable[Params, None]:
    """Wrap a command so that whatever it raises ends in one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except typer.Exit:
            raise
        except BaseException as error:
            # What is written in Rust panics in a way of its own, on a tokenizer.json that contradicts itself.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
                silence_stdout()
            if isinstance(error, BrokenPipeError):
                raise typer.Exit(BROKEN_PIPE) from None
            if debugging():
                traceback.print_exc()
            message, code = explain(error)
            ui.error(message)
            raise typer.Exit(code) from None

    return run


def explain(error: BaseException) -> tuple[str, int]:
    """The sentence and the exit code for an exception."""
    if type(error).__name__ == "PanicException":
        return "the tokenizer.json of this model contradicts itself; download it again", FAILURE
    if isinstance(error, ValueError) and type(error).__module__.split(".")[0] in _PACKAGES:
        named = {each.__name__ for each in type(error).__mro__}
        if named & _LACKING:
            return str(error), MACHINE
        return str(error), USAGE if named & _USERS_INPUT else FAILURE
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.split(".")[0]
        if module in _BROUGHT_BY:
            return f'{module} is needed for this and not installed: pip install "{_BROUGHT_BY[module]}"', MACHINE
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"{place}{error.strerror}", MACHINE if error.errno == errno.ENOSPC else FAILURE
    first_line = (str(error).strip().splitlines() or [""])[0][:_LONGEST]
    what = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return f"unexpected {what} (set SVCLI_DEBUG=1 to see where)", FAILURE


def silence_stdout() -> None:
    """Point stdout nowhere, so that the interpreter's last flush does not fail a second time."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
