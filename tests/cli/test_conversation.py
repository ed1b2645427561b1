"""A conversation as a person has it, in a terminal."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import stat
import termios
from pathlib import Path

import pytest

from tests.cli.screens import Conversation

ROOT = Path(__file__).parents[2]
HAMBURGERS = ROOT / "examples" / "hamburgers.png"
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])[;m]")
CTRL_C, CTRL_D, CTRL_R, TAB, UP, ALT_ENTER = "\x03", "\x04", "\x12", "\t", "\x1b[A", "\x1b\r"


@pytest.fixture
def state() -> Path:
    return Path(os.environ["XDG_STATE_HOME"]) / "svcli" / "chat_history"


def test_the_bundled_model_answers_question_after_question(command: list[str], state: Path) -> None:
    talk = Conversation(command, HAMBURGERS)
    talk.until("skipvision-tiny", "/help", "hamburgers.png >")
    talk.ask("How many hamburgers are there?", "There are 6 hamburgers.", "256→98 visual tokens", "vision")
    seen = talk.ask("What is in the picture?", "prefill", "onnxruntime-cpu int8")
    # The picture was looked at once.
    assert talk.text.count("vision ") == 1, seen
    talk.ask("/stats", "taken over from the turn before", "of 708")
    talk.ask("/stat", "did you mean /stats?")
    assert talk.leave(CTRL_D) == 0
    assert "Traceback" not in talk.text
    assert stat.S_IMODE(state.stat().st_mode) == 0o600

    again = Conversation(command)
    again.until("\n>")
    again.type(UP + UP)
    again.until("> /stats")
    again.type(CTRL_C)
    again.type(CTRL_R + "How many")
    again.until("How many hamburgers are there?")
    again.type("\r")  # found
    again.type("\r")
    again.until("> How many hamburgers are there?", "tok/s")
    assert again.leave("/exit\r") == 0


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(command: list[str], long_bundle: Path, picture: Path) -> None:
    talk = Conversation(command, picture, "--model", long_bundle, "--max-new-tokens", "19000")
    talk.until("red.png >")
    talk.type("what is this?\r")
    talk.grow(5)
    talk.type(CTRL_C)
    talk.until("stopped; Ctrl-C once more leaves\n>")
    talk.type("half a question")
    talk.until("> half a question")
    talk.type(CTRL_C)  # clears the line, and the rest of what is counted
    talk.ask("/set max_new_tokens 3", "leaves\n> /set max_new_tokens 3\ntemperature")
    talk.ask("and?", "KV")
    talk.ask("/stats", "taken over")
    taken = re.search(r"(\d+) taken over", talk.text)
    assert taken is not None
    assert int(taken[1]) > 50  # what was said before Ctrl-C is part of the conversation
    talk.type(CTRL_C)
    talk.until("Ctrl-C once more leaves", count=2)
    assert talk.leave(CTRL_C) == 130
    assert "Traceback" not in talk.text


def test_the_second_ctrl_c_leaves(command: list[str], long_bundle: Path, picture: Path) -> None:
    talk = Conversation(command, picture, "--model", long_bundle, "--max-new-tokens", "19000")
    talk.until("red.png >")
    talk.type("what is this?\r")
    talk.grow(5)
    talk.type(CTRL_C)
    talk.until("stopped", "\n>")
    assert talk.leave(CTRL_C) == 130


def test_several_lines_are_one_question(command: list[str], bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    talk = Conversation(command, "--model", bundle, "--max-new-tokens", "3", "--log", log)
    talk.until("\n>")
    talk.type("one" + ALT_ENTER + "two\r")
    talk.until("one", "two", "tok/s")
    talk.type('"""three\r\rfour"""\r')
    talk.until("four", count=1)
    talk.until("tok/s", count=2)
    talk.type("\x1b[200~five\nsix\x1b[201~\r")
    talk.until("tok/s", count=3)
    assert talk.leave(CTRL_D) == 0
    asked = re.findall(r'"question": "(.*?)"', log.read_text())
    assert asked == [r"one\ntwo", r"three\n\nfour", r"five\nsix"]


def test_tab_completes_commands_values_and_paths(
    command: list[str], bundle: Path, picture: Path, tmp_path: Path
) -> None:
    shutil.copy(picture, tmp_path / "my picture.png")
    talk = Conversation(command, "--model", bundle, "--max-new-tokens", "3")
    talk.until("\n>")
    talk.type("/im" + TAB)
    talk.until("> /image")
    talk.type("a" + TAB)
    talk.until("/image add")
    talk.type(f" {tmp_path}/my" + TAB)
    talk.until("my\\ picture.png")
    talk.type("\r")
    talk.until("my picture.png: goes with the next question", "my picture.png >")
    talk.type("/set max" + TAB + " 2\r")
    talk.until("max_new_tokens 2\nmy picture.png >")
    assert talk.leave(CTRL_D) == 0


def test_a_picture_that_is_dropped_on_the_line_goes_with_the_question(
    command: list[str], bundle: Path, picture: Path, tmp_path: Path
) -> None:
    shutil.copy(picture, tmp_path / "my picture.png")
    talk = Conversation(command, "--model", bundle, "--max-new-tokens", "3", width=160)
    talk.until("\n>")
    talk.ask(f"'{tmp_path}/my picture.png' ", "goes with the next question", "my picture.png >")
    talk.ask("what is this?", "16→6 visual tokens")
    talk.ask("/copy", "sent to the clipboard")
    encoded = re.search(r"\x1b]52;c;([A-Za-z0-9+/=]+)\a", talk.raw)
    assert encoded is not None
    assert base64.b64decode(encoded[1]).decode() in talk.text
    assert talk.leave(CTRL_D) == 0


@pytest.mark.parametrize("width", [40, 70])
def test_no_line_is_broken_on_a_narrow_terminal(command: list[str], bundle: Path, picture: Path, width: int) -> None:
    talk = Conversation(command, picture, "--model", bundle, "--max-new-tokens", "30", width=width, height=200)
    talk.until("red.png >")
    talk.ask("日本語 🍔?", "visual tokens", "fp32")
    talk.ask("/compare", "visual tokens", "Times are medians")
    talk.ask("/help", "/exit")
    assert talk.leave(CTRL_D) == 0
    assert "🍔" in talk.text
    assert all(not line.startswith("·") and not line.endswith("·") for line in talk.lines)


@pytest.mark.parametrize(("arguments", "changes"), [([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"}), (["--plain"], {})])
def test_what_should_be_plain_is(
    command: list[str], bundle: Path, picture: Path, arguments: list[str], changes: dict[str, str]
) -> None:
    talk = Conversation(command, picture, "--model", bundle, "--max-new-tokens", "3", *arguments, changes=changes)
    talk.until("red.png")
    talk.ask("what is this?", "visual tokens")
    talk.ask("/help", "/exit")
    talk.ask("/nothing", "there is no /nothing")
    assert talk.leave(CTRL_D) == 0
    assert not COLOUR.search(talk.raw)
    if "NO_COLOR" not in changes:
        assert "\x1b" not in talk.raw
    if arguments:
        assert "You, with red.png: " in talk.raw
        assert "6 of 16 visual tokens kept" in talk.raw
        assert "→" not in talk.raw


def test_a_missing_bundle_and_a_missing_picture_are_told_at_once(
    command: list[str], bundle: Path, tmp_path: Path
) -> None:
    talk = Conversation(command, "--model", tmp_path / "nowhere")
    talk.until("Error:", "nowhere")
    assert talk.leave() == 2
    talk = Conversation(command, tmp_path / "nowhere.png", "--model", bundle)
    talk.until("Error:", "no such file")
    assert talk.leave() == 2


def test_an_error_is_told_and_the_conversation_goes_on(command: list[str], bundle: Path, picture: Path) -> None:
    talk = Conversation(command, picture, "--model", bundle, "--max-new-tokens", "3", width=200)
    talk.until("red.png >")
    talk.ask("what is this?", "tok/s")
    talk.type("\x1b[200~" + "how many? " * 60 + "\x1b[201~\r")
    talk.until("Error:", "rows of context", "/undo, /clear, /image rm or a shorter question make room")
    talk.ask("/image show", "16", "red.png")
    assert talk.leave("/exit\r") == 0


def test_a_history_that_cannot_be_kept_is_no_failure(command: list[str], bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    changes = {"XDG_STATE_HOME": str(tmp_path / "state")}
    talk = Conversation(command, "--model", bundle, "--max-new-tokens", "3", changes=changes)
    talk.until("\n>")
    talk.ask("what?", "tok/s")
    assert talk.leave(CTRL_D) == 0
    assert "Error" not in talk.text


def test_a_terminal_is_left_as_it_was(command: list[str], bundle: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        talk = Conversation(command, "--model", bundle)
        talk.until("\n>")
        talk.ask("what?", "tok/s")
        talk.child.kill(number)
        end = talk.leave()
        assert end == 128 + number


@pytest.mark.parametrize("options", [(), ("--plain",)])
def test_what_is_typed_meanwhile_reaches_the_next_prompt(
    command: list[str], long_bundle: Path, picture: Path, options: tuple[str, ...]
) -> None:
    talk = Conversation(command, picture, "--model", long_bundle, "--max-new-tokens", "2000", *options)
    talk.until("red.png")
    talk.type("what is this?\r")
    talk.grow(5)
    assert "KV" not in talk.text  # the answer is not over
    talk.type("/set temperaturr\x7fe 7\r" + CTRL_D)
    talk.until("temperature 7")
    assert talk.leave() == 0
    assert talk.text.count("/set") == 1 - len(options)  # nothing in the midst of the answer


def test_keys_are_echoed_again_after_an_answer(command: list[str], bundle: Path, picture: Path) -> None:
    talk = Conversation(command, picture, "--model", bundle, "--max-new-tokens", "3", "--plain")
    talk.until("You")
    talk.ask("what is this?", "visual tokens")
    talk.until("You:")
    assert termios.tcgetattr(talk.child.child_fd)[3] & termios.ECHO
    assert talk.leave(CTRL_D) == 0
