"""Every code block of the documents runs: in order, each document in a folder of its own, offline and on the CPU.

What cannot run here says why in a comment above its fence, `<!-- not run here: ... -->`, and is counted below. Of that,
too, every svcli command and option exists.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from PIL import Image

from svcli.app import app
from tests.optional import missing
from tests.packaging.code_blocks import ROOT, SHOWN, Block, blocks, commands, documents

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_RUN = {
    "README.md": 4,
    "benchmarks/README.md": 1,
    "docs/chat.md": 1,
    "docs/docker.md": 3,
    "docs/eval.md": 3,
    "docs/models.md": 2,
    "docs/plugins.md": 5,
    "docs/releasing.md": 1,
    "docs/serve.md": 3,
    "docs/tensorrt.md": 1,
    "docs/training.md": 6,
    "docs/triton.md": 4,
    "docs/tutorial.md": 2,
    "export/README.md": 1,
}
"""How many blocks of each document are not run. By hand, so that it does not grow unseen."""
BLOCKS = {document: blocks(document) for document in documents()}
SERVER = "127.0.0.1:8000"
SECONDS = 600
"""Far longer than any block takes on a machine that has nothing else to do."""
NEEDS: dict[str, tuple[str, Callable[[], bool]]] = {
    "svcli build-engine": ("tensorrt-rtx", lambda: find_spec("tensorrt_rtx") is not None),
    "curl ": ("curl", lambda: shutil.which("curl") is not None),
}
"""What a block may find missing, by the words that want it: its name in tests/optional.py, and whether it is there."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exports are kept from one document to the next."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def programs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `svcli` and `python`. An export of the bundled model that was made before is copied."""
    folder = tmp_path_factory.mktemp("bin")
    call = f'exec {shlex.quote(sys.executable)} -m svcli "$@"'
    kept = f"{shlex.quote(str(cache))}/$(echo \"$*\" | sed 's/ -o [^ ]*//' | cksum | cut -d ' ' -f 1)"
    (folder / "svcli").write_text(
        "#!/bin/sh\n"
        f'case "$*" in "export models/skipvision-tiny -o "*) ;; *) {call} ;; esac\n'
        f"kept={kept}\n"
        f'test -d "$kept" || ({call}) || exit\n'
        'test -d "$kept" && cp -r "$kept" "$4" || cp -r "$4" "$kept"\n'
    )
    (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    return folder


@pytest.fixture
def environment(programs: Path) -> dict[str, str]:
    """Nothing beyond this machine can be reached."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "export", "engines"))
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return {
        **os.environ,
        **nowhere,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        # Threads that wait by spinning take the cores from tests beside.
        "OMP_NUM_THREADS": "1",
        "no_proxy": "127.0.0.1",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a reader has: a checkout, and pictures and questions of their own."""
    for name in ("examples", "models", "recipes", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bundle").symlink_to(ROOT / "models" / "skipvision-tiny")
    picture = Image.open(ROOT / "examples" / "hamburgers.png").convert("RGB")
    for name in ("photo.jpg", "cat.jpg", "picture.png"):
        picture.save(tmp_path / name)
    (tmp_path / "questions.jsonl").write_text('{"image": "photo.jpg", "question": "What is this?"}\n')
    return tmp_path


@contextmanager
def served(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Host and port of a server on the bundled model."""
    told = folder / "server.txt"
    with told.open("w") as stream:
        command = ["svcli", "serve", "--port", "0"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=stream, start_new_session=True)
    try:
        until = time.monotonic() + SECONDS
        while (found := re.search(r"http://(127\.0\.0\.1:\d+)", told.read_text())) is None:
            assert process.poll() is None, told.read_text()
            assert time.monotonic() < until, told.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(SECONDS)


def run(block: Block, text: str, folder: Path, environment: dict[str, str]) -> str:
    """Its output. Fails with what it said where it does not end well."""
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{block.place} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def check_console(block: Block, folder: Path, environment: dict[str, str]) -> None:
    """Each command of a session prints what stands below it."""
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE):
        assert run(block, command, folder, environment) == expected, block.place


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in BLOCKS if any(block.is_run for block in BLOCKS[name])])
def test_every_code_block_runs(document: str, folder: Path, environment: dict[str, str]) -> None:
    skipped = set()
    for block in [block for block in BLOCKS[document] if block.is_run]:
        absent = {name for words, (name, is_there) in NEEDS.items() if words in block.text and not is_there()}
        skipped |= absent
        if absent:
            continue
        if block.language == "console":
            check_console(block, folder, environment)
        elif SERVER in block.text:
            with served(folder, environment) as server:
                assert run(block, block.text.replace(SERVER, server), folder, environment), block.place
        else:
            run(block, block.text, folder, environment)
    for name in sorted(skipped):
        missing(name)


def test_blocks_that_are_not_run_are_counted() -> None:
    counted = {name: sum(block.reason is not None for block in found) for name, found in BLOCKS.items()}
    assert {name: count for name, count in counted.items() if count} == NOT_RUN


def test_every_block_is_run_shown_or_says_why_not() -> None:
    for block in (block for found in BLOCKS.values() for block in found):
        assert block.is_run or block.reason is not None or block.language in SHOWN, f"{block.place}: {block.language!r}"
        if block.language == "toml":
            tomllib.loads(block.text)


@pytest.mark.parametrize(
    "line", sorted({line for found in BLOCKS.values() for block in found for line in commands(block.text)})
)
def test_commands_exist_and_take_what_is_given_to_them(line: str) -> None:
    _, *words = shlex.split(line.partition(" | ")[0].partition(" < ")[0], comments=True)
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        # A group that runs something by itself takes what is no command of it.
        command = command.commands[words.pop(0) if words[0] in command.commands else "run"]
    if "--help" not in words and "--version" not in words:
        # Raises for an option or a choice that there is not.
        command.make_context(line, words)
