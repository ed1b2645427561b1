"""Help appears at once, and says what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import skipvision
from svcli.app import app

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
    assert [line.split()[:2] for line in shown.stdout.splitlines()[2:]] == [
        ["svcli", "chat"],
        ["svcli", "inspect"],
        ["svcli", "--help"],
    ]


def test_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.stdout == f"svcli {skipvision.__version__}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["chat", "--nonsense"], ["chat"]])
def test_wrong_usage_is_exit_code_2_and_nothing_on_stdout(arguments: list[str]) -> None:
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert "Error:" in shown.stderr
