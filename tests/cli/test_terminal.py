"""svcli on a terminal, as a person sees it, and in a pipe, as a script does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pexpect
import pytest

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
QUESTION = "what is this?"
CLOSING = ("16→6 visual tokens", "KV", "vision", "prefill", "first token", "tok/s", "onnxruntime-cpu fp32")


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **changes}


def spawn(
    command: list[str], *arguments: str | Path, width: int = 100, changes: dict[str, str] | None = None
) -> pexpect.spawn[str]:
    return pexpect.spawn(
        command[0],
        [*command[1:], *map(str, arguments)],
        env=environment(**changes or {}),
        dimensions=(30, width),
        encoding="utf-8",
        timeout=300,
    )


def finish(child: pexpect.spawn[str]) -> str:
    """All that is left on the screen to read; the process must end."""
    child.expect(pexpect.EOF)
    child.close()
    return child.before or ""


def test_a_terminal_shows_answer_and_closing_line(command: list[str], bundle: Path, picture: Path) -> None:
    child = spawn(command, "chat", picture, QUESTION, "--model", bundle, "--max-new-tokens", "5")
    screen = finish(child)
    assert child.exitstatus == 0
    assert "looking...\x1b[0m\r\x1b[2K" in screen
    plain = ESCAPE.sub("", screen.split("\x1b[2K")[-1])
    answer, note, *closing = plain.replace("\r\n", "\n").splitlines()
    assert answer.isalpha()
    assert note == "Note: the answer was cut off at --max-new-tokens"
    assert all(part in " · ".join(closing) for part in CLOSING)


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_gets_whole_parts_on_each_line(
    command: list[str], bundle: Path, picture: Path, width: int
) -> None:
    child = spawn(command, "chat", picture, QUESTION, "--model", bundle, "--max-new-tokens", "5", width=width)
    lines = ESCAPE.sub("", finish(child).split("\x1b[2K")[-1]).replace("\r\n", "\n").splitlines()[2:]
    assert len(lines) > 1
    assert all(len(line) <= width for line in lines)
    assert all(not line.startswith("·") and not line.endswith("·") for line in lines)


@pytest.mark.parametrize("changes", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_plain_terminal_gets_no_colours(
    command: list[str], bundle: Path, picture: Path, changes: dict[str, str]
) -> None:
    child = spawn(command, "chat", picture, QUESTION, "--model", bundle, "--max-new-tokens", "5", changes=changes)
    screen = finish(child)
    assert child.exitstatus == 0
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])[;m]", screen)
    assert "16→6 visual tokens" in screen
    if "TERM" in changes:
        assert "\x1b" not in screen


def test_ctrl_c_keeps_what_was_said_and_ends_with_130(command: list[str], long_bundle: Path, picture: Path) -> None:
    child = spawn(command, "chat", picture, QUESTION, "--model", long_bundle, "--max-new-tokens", "19000")
    child.expect(r"\x1b\[2K(\x1b\[\?7l)?[A-Za-z]+")
    child.sendintr()
    screen = finish(child)
    assert child.exitstatus == 130
    assert "Traceback" not in screen
    assert screen.endswith("\r\n")


def test_the_answer_streams_into_a_pipe_and_ctrl_c_ends_it(
    command: list[str], long_bundle: Path, picture: Path
) -> None:
    process = subprocess.Popen(
        [*command, "chat", picture, QUESTION, "--model", long_bundle, "--max-new-tokens", "19000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 100)  # comes long before the end, or the answer is held back
    assert first.isalpha()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith(b"\n")
    assert errors == b""


def test_a_pipe_gets_no_decoration(command: list[str], bundle: Path, picture: Path) -> None:
    done = subprocess.run(
        [*command, "chat", picture, QUESTION, "--model", bundle, "--max-new-tokens", "5"],
        capture_output=True,
        env=environment(),
        check=True,
    )
    assert done.stdout.strip().isalpha()
    assert done.stderr == b"Note: the answer was cut off at --max-new-tokens\n"


def test_a_reader_that_leaves_early_is_no_error(command: list[str], long_bundle: Path, picture: Path) -> None:
    process = subprocess.Popen(
        [*command, "chat", picture, QUESTION, "--model", long_bundle, "--max-new-tokens", "19000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_sentence(command: list[str], bundle: Path, picture: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*command, "chat", picture, QUESTION, "--model", bundle],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
        )
    assert done.returncode == 3
    assert done.stderr == b"Error: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["--version"], []])
def test_a_full_disk_is_one_sentence_for_texts_too(command: list[str], arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*command, *arguments], stdout=full, stderr=subprocess.PIPE, env=environment(), check=False
        )
    assert (done.returncode, done.stderr) == (3, b"Error: No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_is_not_utf_8_does_no_harm(
    command: list[str], bundle: Path, picture: Path, encoding: str
) -> None:
    arguments = ("chat", picture, QUESTION, "--model", bundle, "--max-new-tokens", "5")
    child = spawn(command, *arguments, changes={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    screen = finish(child)
    assert child.exitstatus == 0
    assert "16->6 visual tokens" in screen


def test_names_that_are_not_utf_8_or_steer_the_terminal_are_shown_harmlessly(
    command: list[str], bundle: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*command, "chat", b"\xff\x1b[31m.png", QUESTION, "--model", str(bundle)],
        capture_output=True,
        env=environment(),
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"no file" in done.stderr
    assert b"\x1b" not in done.stderr
    done.stderr.decode()


def test_a_bundle_where_onnx_runtime_cannot_open_it_is_one_sentence(
    command: list[str], bundle: Path, picture: Path, tmp_path: Path
) -> None:
    place = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.symlink(bundle, place)
    done = subprocess.run(
        [*command, "chat", picture, QUESTION, "--model", place], capture_output=True, env=environment(), check=False
    )
    assert (done.returncode, done.stdout) == (3, b"")
    assert b"not UTF-8; rename the folder" in done.stderr
    assert done.stderr.count(b"\n") == 1
