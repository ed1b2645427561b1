"""Whatever is raised becomes one sentence on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import typer

from skipvision.config import ConfigError
from skipvision.data.errors import DataError
from svcli.errors import BROKEN_PIPE, UsageError, explain, reported

HAMBURGERS = Path(__file__).parents[2] / "examples" / "hamburgers.png"


def test_what_the_user_gave_is_2_and_what_failed_is_1() -> None:
    assert explain(ConfigError("skip.num_retained must be at least 1")) == ("skip.num_retained must be at least 1", 2)
    assert explain(UsageError("say which")) == ("say which", 2)
    assert explain(DataError("fetch the assets first")) == ("fetch the assets first", 1)


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("onnxruntime", "cpu"),
        ("torch.nn", "torch"),
        ("onnx", "torch"),
        ("resvg_py", "data"),
        ("matplotlib.figure", "plots"),
        ("datasets", "train"),
        ("peft", "train"),
        ("tomli_w", "train"),
        ("uvicorn", "serve"),
        ("tensorboard.compat", "loggers"),
        ("wandb", "loggers"),
    ],
)
def test_a_missing_extra_comes_with_its_install_command(module: str, extra: str) -> None:
    sentence, code = explain(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert sentence.endswith(f'pip install "svcli[{extra}]"')
    assert code == 3


@pytest.mark.parametrize("module", ["PIL.Image", "jinja2", "numpy", "prompt_toolkit", "pydantic.main", "tokenizers"])
def test_what_comes_without_an_extra_comes_back_without_one(module: str) -> None:
    sentence, code = explain(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert sentence.endswith('pip install "svcli"')
    assert code == 3


@pytest.mark.parametrize("package", ["PIL", "numpy", "pydantic", "rich", "tokenizers", "typer"])
def test_an_installation_that_lacks_a_package_is_a_sentence(command: list[str], tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError({package!r}, name={package!r})")
    done = subprocess.run(
        [*command, "chat", str(HAMBURGERS), "How many?"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(rf"Error: {package} is needed .*not installed: pip install \S.*\n", done.stderr)


def test_an_os_error_names_the_file() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "secret.png")
    assert explain(error) == ("secret.png: Permission denied", 1)
    assert explain(OSError(errno.ENOSPC, "No space left on device", "log.jsonl"))[1] == 3


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("not\nours"), RuntimeError(), ModuleNotFoundError("x", name="x")]
)
def test_anything_else_is_called_unexpected_in_one_line(error: Exception) -> None:
    sentence, code = explain(error)
    assert code == 1
    assert sentence.startswith(f"unexpected {type(error).__name__}")
    assert "SVCLI_DEBUG=1" in sentence
    assert "\n" not in sentence


def run(error: BaseException) -> int:
    @reported
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as raised:
        command()
    return raised.value.exit_code


def test_traceback_only_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(RuntimeError("boom")) == 1
    assert capsys.readouterr() == ("", "Error: unexpected RuntimeError: boom (set SVCLI_DEBUG=1 to see where)\n")

    monkeypatch.setenv("SVCLI_DEBUG", "1")
    assert run(RuntimeError("boom")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_130_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_left_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(BrokenPipeError(errno.EPIPE, "Broken pipe")) == BROKEN_PIPE
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["doctor"],
        ["--version"],
        ["--help"],
        ["eval", "--help"],
        ["bench", "run", "--help"],
        ["eval", "--list"],
    ],
)
def test_a_reader_that_goes_is_no_failure(command: list[str], arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["--help"], ["--bogus"], ["inspect"], ["inspect", "nowhere"]])
def test_nor_is_one_of_errors_too(command: list[str], arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, *arguments], stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 141


def test_a_stdout_that_was_closed_is_no_defect(command: list[str]) -> None:
    line = f"exec {shlex.join(command)} inspect >&-"
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_leaves_nothing_behind(
    command: list[str], checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "bundle"), "--precision", "fp32"]
    *python, program = command
    # Its graphs are not done before it is stopped.
    endless = "import time; from svcli_export import bundle; bundle._write_graphs = lambda *_: time.sleep(600); "
    program = program.replace("from svcli.__main__", f"{endless}from svcli.__main__")
    with subprocess.Popen([*python, program, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("writing"):
                break
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 128 + number
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_a_panic_of_a_library_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """PyO3's is no Exception, and comes of a tokenizer.json that names what it does not have."""
    PanicException = type("PanicException", (BaseException,), {})

    def panics() -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    with pytest.raises(typer.Exit) as left:
        reported(panics)()
    assert left.value.exit_code == 1
    assert capsys.readouterr().err == "Error: the tokenizer.json of this model contradicts itself; download it again\n"
    with pytest.raises(SystemExit):
        reported(lambda: (_ for _ in ()).throw(SystemExit(3)))()  # others go on
