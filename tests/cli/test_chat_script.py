"""A conversation without a terminal: each line of stdin is a question or a command."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from svcli.app import app
from svcli.chat.pictures import Picture
from svcli.chat.reader import is_open_block, label
from svcli.chat.record import LineLog
from svcli_engines.generate import Conversation, Piece
from svcli_export.manifest import load_manifest

QUESTION = "what is this?"


def script(bundle: Path, *arguments: str | Path, lines: str, code: int = 0) -> Result:
    words = ["chat", *map(str, arguments), "--model", str(bundle), "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, words, input=lines)
    assert done.exit_code == code, done.output
    return done


def turns(bundle: Path, *arguments: str | Path, lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in script(bundle, *arguments, "--json", lines=lines).stdout.splitlines()]


def refused(bundle: Path, *arguments: str | Path, lines: str, words: str, code: int = 2) -> Result:
    done = script(bundle, *arguments, lines=lines, code=code)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert words in last
    return done


def test_each_line_is_a_question_and_answers_alone_stand_on_stdout(bundle: Path, picture: Path) -> None:
    done = script(bundle, picture, "--quiet", lines=f"{QUESTION}\n\nhow many?\n")
    first, second = done.stdout.splitlines()
    assert first.isalpha()
    assert second.isalpha()
    assert done.stderr == ""


def test_a_second_question_reads_the_picture_and_the_first_from_the_cache(bundle: Path, picture: Path) -> None:
    first, second = turns(bundle, picture, lines=f"{QUESTION}\nhow many?\n")
    assert first["tokens"]["shared_rows"] == 0
    assert second["tokens"]["shared_rows"] > first["tokens"]["visual_kept"]
    assert second["tokens"]["visual_full"] == 16
    # Pictures are named by the question that they came with.
    assert (first["images"], second["images"]) == ([str(picture)], [])


def test_what_is_between_three_quotes_is_one_question(bundle: Path, picture: Path) -> None:
    (turn,) = turns(bundle, picture, lines='"""what\nis\n\nthis?"""\n')
    assert turn["question"] == "what\nis\n\nthis?"


def test_two_slashes_begin_a_question(bundle: Path, picture: Path) -> None:
    (turn,) = turns(bundle, picture, lines="//help is what?\n")
    assert turn["question"] == "/help is what?"


def test_a_picture_named_in_a_line_goes_with_its_question(bundle: Path, picture: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "my red.png"
    shutil.copy(picture, spaced)
    (turn,) = turns(bundle, lines=f"what is '{spaced}' about?\n")
    assert turn["images"] == [str(spaced)]
    assert str(spaced) not in turn["question"]
    (turn,) = turns(bundle, lines=f"{str(spaced).replace(' ', chr(92) + ' ')}\nwhat?\n")
    assert (turn["question"], turn["images"]) == ("what?", [str(spaced)])


def test_pictures_are_added_listed_and_taken_away(bundle: Path, picture: Path) -> None:
    lines = f"/image add {picture}\n{QUESTION}\n/image add {picture}\n/image list\n/image rm 1 2\n/image\nagain?\n"
    done = script(bundle, "--json", lines=lines)
    assert "1: " in done.stderr
    assert "2: " in done.stderr
    assert "goes with the next question" in done.stderr
    assert "no pictures" in done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["tokens"]["visual_full"], second["tokens"]["visual_full"]) == (16, 0)


def test_undo_gives_the_pictures_back_and_clear_forgets_what_was_said(bundle: Path, picture: Path) -> None:
    first, second, third = turns(bundle, picture, lines=f"{QUESTION}\n/undo\nother?\n/clear\n{QUESTION}\n")
    assert second["images"] == third["images"] == [str(picture)]
    assert third["answer"] == first["answer"]
    assert third["kv_cache"] == first["kv_cache"]
    (_, bare) = turns(bundle, picture, lines=f"{QUESTION}\n/clear all\n{QUESTION}\n")
    assert bare["tokens"]["visual_full"] == 0


def test_one_picture_goes_with_the_next_question_and_several_go(bundle: Path, picture: Path) -> None:
    added = f"/image add {picture} {picture}\n{QUESTION}\n/clear\n/image rm 1\n/clear\n"
    told = script(bundle, lines=added).stderr.splitlines()
    several = f"{picture.name}, {picture.name}: go with the next question"
    assert several in told
    assert f"forgotten; {several}" in told
    assert f"forgotten; {picture.name}: goes with the next question" in told


def test_a_url_that_is_refused_for_its_address_names_the_option(bundle: Path) -> None:
    done = script(bundle, "http://127.0.0.1:9/x.png", lines=f"{QUESTION}\n", code=2)
    assert "--allow-private-urls" in done.stderr


def test_regen_answers_the_same_question_again(bundle: Path, picture: Path) -> None:
    first, second, third = turns(bundle, picture, "--temperature", "5", lines=f"{QUESTION}\n/regen\nand?\n")
    assert second["question"] == QUESTION
    assert second["images"] == [str(picture)]
    assert first["kv_cache"]["rows"] == second["kv_cache"]["rows"] < third["kv_cache"]["rows"]
    told = script(bundle, picture, lines=f"{QUESTION}\n/regen\n").stderr
    assert "the answer stays the same: /set temperature 0.7" in told


def test_settings_hold_from_the_next_question_on(bundle: Path, picture: Path) -> None:
    lines = f"{QUESTION}\n/set max_new_tokens 2\n/set seed=7\n/set top-p 0.5\n{QUESTION}\n/set seed none\n{QUESTION}\n"
    first, second, third = (turn["settings"] for turn in turns(bundle, picture, lines=lines))
    assert first["max_new_tokens"] == 4
    assert (second["max_new_tokens"], second["seed"], second["top_p"]) == (2, 7, 0.5)
    assert third["seed"] is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set heat 1", "temperature, top_k"),
        ("/set temperature hot", "must be a number"),
        ("/set temperature -1", "temperature must be 0 or more"),
        ("/hepl", "did you mean /help?"),
        ("/zzz", "/help shows"),
        ("/image", ""),
        ("/image rm 3", "no picture 3"),
        ("/image rm one", "no number"),
        ("/image show 3", "no picture 3"),
        ("/image turn", "/image add FILE"),
        ("/image add nowhere.png", "no such file"),
        ("/undo", "nothing has been asked"),
        ("/regen", "nothing has been asked"),
        ("/compare", "nothing has been asked"),
        ("/stats", "no answer"),
        ("/copy", "no answer"),
        ("/clear it", "/clear all"),
        ("/save", "/save FILE"),
        ("/load nowhere.json", "nowhere.json"),
        ("/skip 9/9", "svcli export"),
        ("/system Be brief.", "no place for a system text"),
    ],
)
def test_what_a_command_cannot_do_is_one_sentence(
    bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["chat", str(picture), "--model", str(bundle)], input=f"{line}\n")
    assert done.exit_code == (0 if not words else 1 if "nowhere.json" in line else 2), done.output
    assert done.stdout == ""
    if words:
        (error,) = done.stderr.splitlines()
        assert error.startswith("Error: ")
        assert "unexpected" not in error
        assert words in error


@pytest.mark.parametrize(
    ("names", "shown", "spoken"),
    [
        ([], "> ", "You: "),
        (["a.png", "b.png"], "a.png, b.png > ", "You, with a.png, b.png: "),
        ([f"{number}.png" for number in range(9)], "9 pictures > ", "You, with 9 pictures: "),
        (["x" * 50 + ".png"], "..." + "x" * 24 + ".png > ", "You, with ..." + "x" * 24 + ".png: "),
    ],
)
def test_the_prompt_names_the_pictures_that_wait_and_stays_short(names: list[str], shown: str, spoken: str) -> None:
    assert (label(names), label(names, is_spoken=True)) == (shown, spoken)


@pytest.mark.parametrize(
    ("text", "is_open"),
    [('"""', True), ('"""a', True), ('"""a"""', False), ('""""', True), ('"""a\nb"""  ', False), ('a """', False)],
)
def test_a_block_is_open_until_three_quotes_close_it(text: str, is_open: bool) -> None:
    assert is_open_block(text) == is_open


def test_exit_leaves_the_rest_unread(bundle: Path, picture: Path) -> None:
    assert len(turns(bundle, picture, lines=f"{QUESTION}\n/exit\n{QUESTION}\n")) == 1


def test_help_names_every_command(bundle: Path) -> None:
    told = script(bundle, lines="/help\n").stderr
    names = ("image", "clear", "regen", "undo", "save", "load", "set", "stats", "system", "copy", "skip", "compare")
    for name in (*names, "help", "exit"):
        assert f"/{name}" in told


def test_a_saved_conversation_goes_on_in_the_same_words(bundle: Path, picture: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = f"{QUESTION}\n/image add {picture}\n/set max_new_tokens 3\n/save {saved}\n/save {saved}\nhow many?\n"
    whole = turns(bundle, picture, lines=lines)
    assert [each.name for each in tmp_path.iterdir()] == ["talk.json"]
    (later,) = turns(bundle, lines=f"/load {saved}\nhow many?\n")
    assert (later["answer"], later["kv_cache"], later["settings"]) == tuple(
        whole[-1][key] for key in ("answer", "kv_cache", "settings")
    )
    # Each is opened from where it was.
    assert {each for message in json.loads(saved.read_text())["messages"] for each in message["pictures"]} == {
        str(picture)
    }


def test_a_file_that_is_no_conversation_is_neither_read_nor_lost(bundle: Path, picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    nowhere = tmp_path / "none" / "talk.json"
    refused(bundle, picture, lines=f"{QUESTION}\n/save {nowhere}\n", words=f"{nowhere}: No such", code=1)
    refused(bundle, picture, lines=f"{QUESTION}\n/save {other}\n", words="another name")
    refused(bundle, picture, lines=f"/load {other}\n", words="no conversation")
    assert other.read_text() == "{}"


def test_a_damaged_conversation_changes_nothing(bundle: Path, picture: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    script(bundle, picture, lines=f"{QUESTION}\n/save {saved}\n")
    content = json.loads(saved.read_text())
    for damage in (
        {"messages": [{"role": "user"}]},
        {"settings": {"heat": 1}},
        {"messages": 3},
        {"waiting": ["x.png"]},
    ):
        saved.write_text(json.dumps(content | damage))
        words = "no such file" if "waiting" in damage else "damaged"
        refused(bundle, lines=f"/load {saved}\n", words=words)
    picture_id = load_manifest(bundle).chat.image_id
    for ids in ([10**9], ["x"], [picture_id]):
        content["messages"][-1]["ids"] = ids
        saved.write_text(json.dumps(content))
        refused(bundle, lines=f"/load {saved}\n", words="ids that no answer has")
    saved.write_text("[" * 100_000)
    refused(bundle, lines=f"/load {saved}\n", words="no conversation")


def test_a_picture_from_stdin_is_saved_as_it_is() -> None:
    image = Image.new("RGB", (8, 8), "red")
    assert Picture("standard input", None, image).reference.startswith("data:image/png;base64,")


def test_skip_off_asks_the_dense_graphs_and_on_the_others(bundle: Path, picture: Path) -> None:
    lines = f"{QUESTION}\n/skip off\nhow many?\n/skip on\nwhere?\n/skip\n"
    done = script(bundle, picture, "--json", lines=lines)
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert [turn["variant"] for turn in (first, second, third)] == ["skipped", "dense", "skipped"]
    assert [turn["tokens"]["visual_kept"] for turn in (first, second, third)] == [6, 16, 6]
    # What was said goes on there.
    assert second["kv_cache"]["rows"] > first["kv_cache"]["rows"]
    assert "there is also dense" in done.stderr


def test_a_variant_answers_once(bundle: Path, picture: Path) -> None:
    done = CliRunner().invoke(
        app, ["chat", str(picture), QUESTION, "--model", str(bundle), "--variant", "dense", "--json"]
    )
    assert json.loads(done.stdout)["tokens"]["visual_kept"] == 16


def test_compare_leaves_the_conversation_as_it_is(bundle: Path, picture: Path) -> None:
    lines = f"{QUESTION}\n/compare\n/compare how many?\nhow many?\n"
    done = script(bundle, picture, "--jsonl", lines=lines)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"event": "turn"')]
    plain = turns(bundle, picture, lines=f"{QUESTION}\nhow many?\n")
    assert [turn["answer"] for turn in told] == [turn["answer"] for turn in plain]


def test_an_event_for_each_piece_and_one_for_the_turn(bundle: Path, picture: Path) -> None:
    done = script(bundle, picture, QUESTION, "--jsonl", lines="")
    *pieces, turn = map(json.loads, done.stdout.splitlines())
    assert {piece["event"] for piece in pieces} == {"piece"}
    assert len(pieces) > 1
    assert turn["event"] == "turn"
    assert "".join(piece["text"] for piece in pieces) == turn["answer"]


def test_a_log_grows_line_by_line_for_its_owner_alone(bundle: Path, picture: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    told = turns(bundle, picture, "--log", log, lines=f"{QUESTION}\nhow many?\n")
    script(bundle, picture, QUESTION, "--log", log, lines="")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["answer"] for row in rows[:2]] == [turn["answer"] for turn in told]
    assert rows[0]["conversation"] == rows[1]["conversation"] != rows[2]["conversation"]
    assert all(row["time"] for row in rows)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["log.sqlite", "log.db"])
def test_a_log_in_sqlite_has_a_row_for_each_turn(bundle: Path, picture: Path, tmp_path: Path, name: str) -> None:
    log = tmp_path / name
    first, second = turns(bundle, picture, "--log", log, lines=f"{QUESTION}\nhow many?\n")
    database = sqlite3.connect(log)
    rows = database.execute("SELECT question, images, answer, turn FROM turns ORDER BY time").fetchall()
    database.close()
    assert [row[0] for row in rows] == [QUESTION, "how many?"]
    assert json.loads(rows[0][1]) == [str(picture)]
    assert [row[2] for row in rows] == [first["answer"], second["answer"]]
    assert json.loads(rows[1][3])["kv_cache"] == second["kv_cache"]


@pytest.mark.parametrize(("name", "code", "words"), [("log.txt", 2, ".jsonl"), ("no/log.jsonl", 1, "No such file")])
def test_a_log_that_cannot_be_kept_is_refused_before_anything_is_asked(
    bundle: Path, picture: Path, tmp_path: Path, name: str, code: int, words: str
) -> None:
    done = refused(bundle, picture, QUESTION, "--log", tmp_path / name, lines="", words=words, code=code)
    assert done.stdout == ""


def test_a_file_that_is_no_database_is_left_alone(bundle: Path, picture: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.db"
    log.write_text("this is no database at all, and long enough to be seen as none" * 20)
    refused(bundle, picture, QUESTION, "--log", log, lines="", words="no log can be kept there")
    assert log.read_text().startswith("this is no database")


def test_a_full_context_drops_nothing_and_says_what_makes_room(bundle: Path, picture: Path) -> None:
    done = refused(bundle, picture, lines=f"{QUESTION}\n" + "how many? " * 60 + "\n", words="rows of context")
    assert len(done.stdout.splitlines()) == 1


def test_what_stops_a_script_is_its_exit_code(bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[Piece]:
        yield Piece("A red")
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "answer", interrupted)
    assert script(bundle, picture, lines=f"{QUESTION}\n{QUESTION}\n", code=130).stdout == "A red\n"


def test_several_pictures_stand_before_the_question_and_patterns_are_some(
    bundle: Path, picture: Path, tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        shutil.copy(picture, tmp_path / name)
    done = CliRunner().invoke(app, ["chat", f"{tmp_path}/*.png", QUESTION, "--model", str(bundle), "--json"])
    assert json.loads(done.stdout)["tokens"]["visual_full"] == 32
    refused(bundle, "-", lines=QUESTION, words="the question is an argument")
    refused(bundle, tmp_path / "a.png", tmp_path / "missing.png", lines=QUESTION, words="missing.png")


def test_a_picture_comes_through_a_pipe(bundle: Path, picture: Path) -> None:
    done = CliRunner().invoke(
        app, ["chat", "-", QUESTION, "--model", str(bundle), "--json"], input=picture.read_bytes()
    )
    assert json.loads(done.stdout)["tokens"]["visual_full"] == 16
    by_path = turns(bundle, picture, lines=QUESTION)
    assert json.loads(done.stdout)["answer"].startswith(by_path[0]["answer"])


@pytest.mark.parametrize("option", [["--compare"], ["--save-overlay", "out.png"]])
def test_what_goes_with_one_question_says_so(bundle: Path, picture: Path, option: list[str]) -> None:
    refused(bundle, picture, *option, lines=QUESTION, words="goes with a question")
    refused(bundle, picture, QUESTION, "--json", "--jsonl", lines="", words="take one")


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_bytes_that_are_no_text_are_asked_as_such(
    command: list[str], bundle: Path, picture: Path, tmp_path: Path, locale: str
) -> None:
    log = tmp_path / "log.jsonl"
    options = ["--model", str(bundle), "--max-new-tokens", "2", "--log", str(log)]
    # Python takes UTF-8 for the locale C unless it is told not to.
    environment = {**os.environ, "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    asked = "日本 \N{HAMBURGER}?".encode() + b" \xff"
    for line, stdin in (([asked], None), ([], asked)):
        arguments = [os.fsencode(each) for each in (*command, "chat", str(picture), *options)]
        done = subprocess.run([*arguments, *line], input=stdin, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert [json.loads(line)["question"] for line in log.read_text().splitlines()] == ["日本 \N{HAMBURGER}? \ufffd"] * 2


@pytest.mark.parametrize(("option", "name"), [("--log", "log.jsonl"), ("--save-overlay", "out.png")])
def test_a_file_on_a_full_disk_is_named(
    command: list[str], bundle: Path, picture: Path, tmp_path: Path, option: str, name: str
) -> None:
    path = tmp_path / name
    path.symlink_to("/dev/full")
    arguments = ["chat", str(picture), "what is this?", "--quiet", "--model", str(bundle), option, str(path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, f"Error: {path}: No space left on device\n")


def test_a_line_that_a_full_disk_tore_is_told_and_does_not_take_the_next_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, write = tmp_path / "log.jsonl", os.write

    def fills_up(file: int, data: bytes) -> int:
        if os.fstat(file).st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:20])

    kept = LineLog(log)
    with monkeypatch.context() as full:
        full.setattr(os, "write", fills_up)
        with pytest.raises(OSError, match="No space left on device") as caught:
            kept.turn({"question": "first"})
    assert caught.value.filename == str(log)
    kept.turn({"question": "second"})
    torn, whole = log.read_text().splitlines()
    assert len(torn) == 20
    assert json.loads(whole)["question"] == "second"


def test_a_stdin_that_is_closed_has_nothing(command: list[str], bundle: Path, picture: Path) -> None:
    for words, told in (([str(picture)], "no question"), (["-", QUESTION], "nothing came on standard input")):
        arguments = shlex.join([*command, "chat", *words, "--model", str(bundle)])
        done = subprocess.run(["sh", "-c", f"{arguments} <&-"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert told in done.stderr
