"""Shells complete commands, options, the names that options take, and paths."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

PROMPT = "ready> "


def put_bundle(folder: Path, *variants: str) -> None:
    """As much of a bundle as completion looks at."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(
        json.dumps({"model": {"skip": {"num_retained": 24}}, "variants": dict.fromkeys(variants)})
    )
    (folder / "weights.safetensors").touch()


@pytest.fixture(scope="module")
def program(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """svcli as a shell finds it."""
    path = tmp_path_factory.mktemp("bin") / "svcli"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def shell(program: Path, tmp_path: Path) -> Iterator[pexpect.spawn[str]]:
    """A bash that has read the script, in a folder with a picture."""
    bash = shutil.which("bash")
    assert bash is not None
    (tmp_path / "hamburgers.png").touch()
    (tmp_path / "my-bundle").mkdir()
    put_bundle(tmp_path / "models" / "other", "dense", "24-40")
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PS1": PROMPT, "TERM": "dumb"}
    arguments = ["--norc", "--noprofile", "-i"]
    child = pexpect.spawn(
        bash, arguments, cwd=str(tmp_path), env=environment, encoding="utf-8", timeout=60, dimensions=(50, 200)
    )
    child.expect_exact(PROMPT)
    child.sendline("bind 'set bell-style none'; bind 'set enable-bracketed-paste off'")
    child.expect_exact(PROMPT)
    child.sendline('eval "$(svcli --show-completion)"')
    child.expect_exact(PROMPT)
    yield child
    child.close(force=True)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("svcli bui", "svcli build-engine "),
        ("svcli data fe", "svcli data fetch "),
        ("svcli chat --comp", "svcli chat --compare "),
        ("svcli chat --engine tor", "svcli chat --engine torch"),
        ("svcli export x -o y --precision fp3", "svcli export x -o y --precision fp32 "),
        ("svcli export x -o y --preset sv-llava-1", "svcli export x -o y --preset sv-llava-100 "),
        ("svcli cost --gpu h2", "svcli cost --gpu h200 "),
        ("svcli bench --peer ll", "svcli bench --peer llama.cpp "),
        ("svcli bench --peer op", "svcli bench --peer openvino-genai "),
        ("svcli chat ham", "svcli chat hamburgers.png "),
        ("svcli inspect my", "svcli inspect my-bundle/"),
        ("svcli inspect mo", "svcli inspect models/other "),
        ("svcli bench com", "svcli bench compare "),
        ("svcli bench models/other h", "svcli bench models/other hamburgers.png "),
        ("svcli eval bundled --split test_p", "svcli eval bundled --split test_photo "),
    ],
)
def test_bash_completes(shell: pexpect.spawn[str], typed: str, completed: str) -> None:
    shell.send(f"{typed}\t")
    shell.expect_exact(completed)


def test_it_installs_itself_for_the_shell_that_asks(shell: pexpect.spawn[str]) -> None:
    shell.sendline("svcli --install-completion")
    shell.expect_exact("bash completion installed in ")
    shell.expect_exact(PROMPT)
    home = Path(os.environ["HOME"])
    assert "_SVCLI_COMPLETE=complete_bash" in (home / ".bash_completions" / "svcli.sh").read_text()
    assert "svcli.sh" in (home / ".bashrc").read_text()


def asked(program: Path, shell: str, words: str, folder: Path | None = None) -> str:
    """What a shell's script gets to read for these words, the last of which is being typed, in `folder`."""
    environment = {
        **os.environ,
        "_SVCLI_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run([program], env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def test_names_are_the_ones_that_the_command_takes(program: Path) -> None:
    from skipvision.known_models import KNOWN_MODELS
    from skipvision.presets import PRESETS
    from skipvision.training.recipes import PRESETS as RECIPES

    assert asked(program, "bash", "svcli cost ").split() == list(KNOWN_MODELS)
    assert asked(program, "bash", "svcli train ").split() == list(RECIPES)
    assert asked(program, "bash", "svcli export x --variant ").split() == ["dense", *PRESETS]
    # Where nothing is offered, the shell completes paths.
    assert asked(program, "bash", "svcli chat ham").split() == []


def test_bench_and_eval_complete_all_that_they_take(program: Path, tmp_path: Path) -> None:
    from svcli.bench.compare import KINDS
    from svcli.bench.peers import PEERS
    from svcli.evaluation.tasks.registry import TASKS

    put_bundle(tmp_path / "models" / "mine", "dense", "24-40")
    put_bundle(tmp_path / "with a space")

    def offered(words: str) -> list[str]:
        return asked(program, "bash", words, tmp_path).split("\n")[:-1]

    assert offered("svcli bench ") == ["compare", "run", "models/mine"]
    assert {"--peer", "--alone"} <= {*offered("svcli bench --")}
    assert offered("svcli bench --peer ") == list(PEERS)
    assert offered("svcli bench models/mine --variant ") == ["dense", "24-40"]
    assert offered("svcli bench compare --across ") == list(KINDS)
    assert offered("svcli eval ") == [*TASKS, "models/mine"]
    assert offered("svcli eval models/mine ") == list(TASKS)
    assert offered("svcli eval pope --split ") == list(TASKS["pope"].splits)
    assert offered("svcli eval models/mine pope --only dense,") == [
        f"dense,{name}" for name in ("skipped", "random", "pool", "blind", "24-40")
    ]
    assert offered("svcli sweep models/mine bun") == ["bundled"]
    assert offered("svcli chat --model models/mine --variant 2") == ["24-40"]
    # A bundle that is broken, or none at all, is told by the command.
    (tmp_path / "models" / "mine" / "manifest.json").write_text("[")
    assert "24-40" not in offered("svcli bench models/mine --variant ")


def test_zsh_and_fish_get_help_beside_names(program: Path) -> None:
    assert '"doctor":"Show what this machine has' in asked(program, "zsh", "svcli doc")
    assert asked(program, "zsh", "svcli chat ham").strip() == "_files"
    assert asked(program, "fish", "svcli doc").startswith("doctor\tShow what this machine has")


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_the_script_of_any_shell_can_be_had(program: Path, name: str) -> None:
    environment = {**os.environ, "_SVCLI_COMPLETE": f"source_{name}"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
    assert f"_SVCLI_COMPLETE=complete_{name}" in done.stdout


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_how_to_be_rid_of_it_names_all_that_is_written(program: Path, name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    arguments = [str(program), "--install-completion", name]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    written = {f"~/{path.relative_to(tmp_path).as_posix()}" for path in tmp_path.rglob("*") if path.is_file()}
    (script,) = written - {f"~/.{name}rc"}
    assert f"{name} completion installed in {tmp_path}{script[1:]}" in done.stdout
    tutorial = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (row,) = (line for line in tutorial.splitlines() if line.startswith(f"| {name} | "))
    assert all(f"`{path}`" in row for path in written)
    said = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    assert script in said


def test_bash_starts_without_a_word_when_it_is_gone(program: Path, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    subprocess.run([program, "--install-completion", "bash"], env=environment, capture_output=True, check=True)

    def completes() -> tuple[int, str]:
        line = [bash, "--rcfile", str(tmp_path / ".bashrc"), "-ic", "complete -p svcli"]
        done = subprocess.run(
            line, env=environment, capture_output=True, text=True, check=False, start_new_session=True
        )
        return done.returncode, done.stderr

    assert completes()[0] == 0
    (tmp_path / ".bash_completions" / "svcli.sh").unlink()
    assert ".bash_completions/svcli.sh: No such file" in completes()[1]
    read = (tmp_path / ".bashrc").read_text().splitlines()
    (tmp_path / ".bashrc").write_text("\n".join(line for line in read if "svcli.sh" not in line) + "\n")
    code, said = completes()
    assert (code, "svcli.sh" in said) == (1, False)
