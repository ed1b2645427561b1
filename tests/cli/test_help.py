"""Help appears at once, and says what there is."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import skipvision
from svcli.app import app
from svcli.examples import USAGES

ROOT = Path(__file__).parents[2]
HEAVY = {
    "PIL",
    "fastapi",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "prometheus_client",
    "prompt_toolkit",
    "safetensors",
    "starlette",
    "tokenizers",
    "torch",
    "uvicorn",
}
COMMANDS = (
    "chat",
    "ask",
    "serve",
    "inspect",
    "cost",
    "profile",
    "bench",
    "verify",
    "doctor",
    "export",
    "build-engine",
    "triton",
    "train",
    "new",
    "eval",
    "sweep",
    "data",
)


UNUSED_BY_ONE_QUESTION = {
    "asyncio",
    "fastapi",
    "http.client",
    "markdown_it",
    "multiprocessing",
    "numpy.random",
    "onnx",
    "prompt_toolkit",
    "rich.markdown",
    "rich.progress",
    "rich.table",
    "skipvision.training",
    "sqlite3",
    "ssl",
    "starlette",
    "svcli.chat.commands",
    "svcli.chat.compare",
    "svcli_engines.overlay",
    "svcli_engines.picture_fetching",
    "torch",
    "urllib.request",
    "uvicorn",
}


# typer itself loads pydantic for everything but the main help.
@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], HEAVY | {"pydantic", "rich", "skipvision.training"}),
        (["--version"], HEAVY | {"pydantic"}),
        (["chat", "--help"], HEAVY | {"rich"}),
        (["serve", "--help"], HEAVY | {"rich"}),
        (["eval", "--help"], HEAVY | {"rich"}),
        (["train", "--help"], HEAVY | {"rich", "skipvision.training"}),
        ([], HEAVY),
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str], heavy: set[str]) -> None:
    _assert_loads_none(arguments, heavy)


def test_one_question_about_a_file_loads_nothing_that_it_does_not_use() -> None:
    picture = ROOT / "examples" / "hamburgers.png"
    _assert_loads_none(["chat", str(picture), "How many?", "--max-new-tokens", "8", "--quiet"], UNUSED_BY_ONE_QUESTION)


def _assert_loads_none(arguments: list[str], heavy: set[str]) -> None:
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'export'), str(ROOT / 'engines')]!r}\n"
        f"sys.argv = ['svcli', *{arguments!r}]\n"
        "from svcli.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('loaded', *sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout
    assert done.stderr.split() == ["loaded"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_explains_itself(command: str) -> None:
    listed = CliRunner().invoke(app, ["--help"])
    assert f"  {command} " in listed.stdout
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    options = [line for line in shown.stdout.splitlines() if line.startswith("  -")]
    assert options
    assert all(re.search(r"\S  +\S", line) for line in options), shown.stdout


def test_alone_it_says_what_to_try_first() -> None:
    shown = CliRunner().invoke(app, [])
    assert shown.exit_code == 0
    first, last = shown.stdout.splitlines()[2:-2], shown.stdout.splitlines()[-1]
    assert [line.split()[:2] for line in first] == [["svcli", "chat"], ["svcli", "chat"], ["svcli", "doctor"]]
    assert "--compare" in first[1]
    assert last.startswith("svcli --help ")


def test_version_says_what_it_runs_on_without_importing_it() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    first, python, *others = shown.stdout.splitlines()
    assert first == f"svcli {skipvision.__version__}"
    assert python.startswith(f"Python {platform.python_version()} ")
    assert f"torch {metadata.version('torch')}" in others
    assert f"onnxruntime {metadata.version('onnxruntime')}" in others
    assert {line.rpartition(" ")[0].split(" not")[0] for line in others} >= {
        "tensorrt",
        "tensorrt-rtx",
        "NVIDIA driver",
    }


def test_version_says_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.stdout.splitlines()[2:-1] == [
        f"{name} not installed" for name in ("onnxruntime", "torch", "tensorrt", "tensorrt-rtx")
    ]


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command, those of groups too, by the words that call it."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found[name] = command
        found |= {f"{name} {inner}": each for inner, each in getattr(command, "commands", {}).items()}
    return found


@pytest.mark.parametrize("words", commands())
def test_help_ends_with_examples_that_the_command_takes(words: str) -> None:
    shown = CliRunner().invoke(app, [*words.split(), "--help"], terminal_width=80)
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    examples = shown.stdout.partition("\n  Examples:\n")[2]
    assert all(line.startswith("    ") for line in examples.splitlines())
    lines = [line for line in examples.replace("\\\n", "").splitlines() if not line.startswith("    # ")]
    assert lines
    for line in lines:
        program, *rest = shlex.split(line)
        assert program == "svcli"
        name = next(name for name in sorted(commands(), reverse=True) if rest[: len(name.split())] == name.split())
        assert name.startswith(words)
        # Raises for what the command would refuse.
        commands()[name].make_context(name, rest[len(name.split()) :])


@pytest.mark.parametrize("words", ["train", "cost", "inspect"])
def test_examples_of_what_takes_nothing_of_the_readers_do_what_they_say(words: str) -> None:
    own = ("my-", "--set", "-o ")
    lines = [line for _why, line in USAGES[words].examples if not any(word in line for word in own)]
    assert lines
    for line in lines:
        given = [str(ROOT / word) if word.startswith("recipes/") else word for word in shlex.split(line)[1:]]
        shown = CliRunner().invoke(app, given)
        assert shown.exit_code == 0, shown.output


def test_the_list_of_commands_cuts_none_short() -> None:
    for group in ([], ["data"]):
        listed = CliRunner().invoke(app, [*group, "--help"], terminal_width=80).stdout
        assert "..." not in listed.partition("Commands:")[2].partition("Examples:")[0]


@pytest.mark.parametrize("arguments", [["nonsense"], ["chat", "--nonsense"], ["chat"]])
def test_wrong_usage_is_exit_code_2_and_nothing_on_stdout(arguments: list[str]) -> None:
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert "Error:" in shown.stderr
