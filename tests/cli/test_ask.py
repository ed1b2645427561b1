"""`svcli ask`: every row has its line, in order, whatever becomes of it, and a killed run goes on."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from svcli import errors
from svcli.app import app
from svcli_engines.batch import Row
from tests.cli.conftest import ROOT

SHORT = ("--max-new-tokens", "4")


def ask(data: Path, output: Path, *arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["ask", str(data), "-o", str(output), *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Names of files beside the data."""
    names = [f"{colour}.png" for colour in ("red", "green", "blue")]
    for name in names:
        Image.new("RGB", (60, 40), name.removesuffix(".png")).save(tmp_path / name)
    return names


def test_answers_are_those_of_chat_in_the_order_of_the_rows(bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    questions = ["what is this?", "a red ball?", "how many?"]
    rows = [{"id": f"q{n}", "image": pictures[n % 3], "question": questions[n % 2], "answer": "?"} for n in range(12)]
    data, output = write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    ask(data, output, "--model", bundle, *SHORT)
    found = lines(output)
    assert [each["row"] for each in found] == list(range(1, 13))
    assert [each["input"] for each in found] == rows
    for row, each in zip(rows[:6], found[:6], strict=True):
        arguments = ["chat", str(tmp_path / row["image"]), row["question"], "--model", str(bundle), *SHORT, "--json"]
        said = json.loads(CliRunner().invoke(app, arguments).stdout)
        assert (each["answer"], each["stop_reason"]) == (said["answer"], said["stop_reason"])
        assert each["tokens"] == {"answer": 4, "visual_full": 16, "visual_kept": 6}


def test_any_number_side_by_side_gives_the_same(bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    rows = [{"images": pictures[: n % 3], "question": "what is this?" + "?" * n} for n in range(7)]
    data = write(tmp_path / "data.jsonl", rows)
    for parallel in (1, 3):
        ask(data, tmp_path / f"{parallel}.jsonl", "--model", bundle, *SHORT, "--parallel", str(parallel))
    assert lines(tmp_path / "1.jsonl") == lines(tmp_path / "3.jsonl")


def test_a_row_that_fails_is_told_and_passed_over(bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [
        {"image": pictures[0], "question": "what?"},
        {"image": "missing.png", "question": "what?"},
        {"image": "broken.png", "question": "what?"},
        {"image": pictures[0], "question": " "},
        {"images": pictures, "question": "what?"},
        ["no", "object"],
        {"image": "http://127.0.0.1:9/x.png", "question": "what?"},
        {"image": pictures[1], "prompt": "what?"},
        {"image": pictures[1], "question": "what?", "system": "Be brief."},
    ]
    data, output = write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    with data.open("ab") as file:
        file.write(b'{"question": NaN}\n\n\xff\xfe\n')
    done = ask(data, output, "--model", bundle, *SHORT, code=1)
    assert "9 of 11 rows failed" in done.stderr
    found = lines(output)
    assert [each["row"] for each in found if "answer" in each] == [1, 8]
    errors = {each["row"]: each["error"] for each in found if "error" in each}
    for row, words in {
        2: "no such file",
        3: "not a picture",
        4: "no question",
        5: "3 pictures are more than the 2",
        6: "not a JSON object",
        7: "private address, and nothing is fetched from those; --allow-private-urls allows it",
        9: "no place for a system",
        10: "not JSON",
        11: "not UTF-8",
    }.items():
        assert words in errors[row], errors[row]


def test_what_was_cut_off_goes_on_behind_the_last_whole_line(bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    rows = [{"image": pictures[n % 3], "question": "what" + "?" * n} for n in range(6)]
    data, whole, cut = write(tmp_path / "data.jsonl", rows), tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    ask(data, whole, "--model", bundle, *SHORT)
    cut.write_bytes(whole.read_bytes()[: whole.read_bytes().index(b'"row": 4') + 20])
    done = ask(data, cut, "--model", bundle, *SHORT)
    assert "3 of 6 rows are answered already" in done.stderr
    assert cut.read_bytes() == whole.read_bytes()
    ask(data, cut, "--model", bundle, *SHORT)  # nothing is left
    assert cut.read_bytes() == whole.read_bytes()


def test_lines_of_another_run_are_kept(bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    data, output = write(tmp_path / "data.jsonl", [{"image": pictures[0], "question": "what?"}]), tmp_path / "out.jsonl"
    ask(data, output, "--model", bundle, *SHORT)
    before = output.read_bytes()
    done = ask(data, output, "--model", bundle, "--max-new-tokens", "3", code=2)
    assert "--overwrite" in done.stderr
    write(data, [{"image": pictures[1], "question": "what?"}])
    ask(data, output, "--model", bundle, *SHORT, code=2)
    assert output.read_bytes() == before
    ask(data, output, "--model", bundle, *SHORT, "--overwrite")
    assert lines(output)[0]["input"]["image"] == pictures[1]


def test_pictures_in_the_data_are_named_and_not_repeated(bundle: Path, tmp_path: Path) -> None:
    Image.effect_noise((40, 40), 50).save(tmp_path / "noise.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "noise.png").read_bytes()).decode()
    data, output = write(tmp_path / "data.jsonl", [{"image": url, "question": "what?"}]), tmp_path / "out.jsonl"
    ask(data, output, "--model", bundle, *SHORT)
    (found,) = lines(output)
    assert len(found["answer"]) > 0
    assert found["input"]["image"].startswith("data:image/png;base64,sha256:")
    assert ask(data, output, "--model", bundle, *SHORT).exit_code == 0  # known again


def test_nothing_to_ask_is_an_error(bundle: Path, tmp_path: Path) -> None:
    empty, output = tmp_path / "empty.jsonl", tmp_path / "out.jsonl"
    empty.write_text("\n\n", encoding="utf-8")
    assert "holds no questions" in ask(empty, output, "--model", bundle, code=2).stderr
    assert "no such file" in ask(tmp_path / "none.jsonl", output, "--model", bundle, code=2).stderr
    assert "not a file of lines" in ask(tmp_path, output, "--model", bundle, code=2).stderr
    assert not output.exists()


def test_questions_are_never_overwritten_by_their_answers(bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"image": pictures[0], "question": "what?"}])
    before = data.read_bytes()
    linked = tmp_path / "linked.jsonl"
    linked.symlink_to(data)
    for output in (data, linked):
        done = ask(data, output, "--model", bundle, *SHORT, "--overwrite", code=2)
        assert "is DATA itself" in done.stderr
    assert data.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on(number: int, long_bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    rows = [{"image": pictures[n % 3], "question": "what" + "?" * (n % 5)} for n in range(400)]
    data, output = write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ["ask", str(data), "-o", str(output), "--model", str(long_bundle), "--max-new-tokens", "20"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "engines")))}
    command = [sys.executable, "-m", "svcli", *arguments, "--parallel", "2"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while not output.exists() or output.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.001)
        process.send_signal(number)
        process.wait(120)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    done = output.read_bytes().count(b"\n")
    assert 5 <= done < 400
    short = write(tmp_path / "short.jsonl", rows[: done + 3])
    ask(short, output, "--model", long_bundle, "--max-new-tokens", "20")
    assert [each["row"] for each in lines(output)] == list(range(1, done + 4))


def test_one_run_at_a_time_writes_a_file(long_bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    rows = [{"image": pictures[n % 3], "question": "what" + "?" * (n % 5)} for n in range(400)]
    data, output = write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ["ask", str(data), "-o", str(output), "--model", str(long_bundle), "--max-new-tokens", "20"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "engines")))}
    with subprocess.Popen([sys.executable, "-m", "svcli", *arguments], env=environment) as first:
        while not output.exists() or output.read_bytes().count(b"\n") < 2:
            assert first.poll() is None
        first.send_signal(signal.SIGSTOP)
        before = output.read_bytes()
        refused = [CliRunner().invoke(app, [*arguments, *overwrite]) for overwrite in ([], ["--overwrite"])]
        after = output.read_bytes()
        first.kill()
    sentence = "another svcli ask is writing it; wait until it ends, or choose another"
    for each in refused:
        assert (each.exit_code, each.stderr) == (2, f"Error: {output}: {sentence}\n")
    assert after == before
    short = write(tmp_path / "short.jsonl", rows[: before.count(b"\n") + 1])
    ask(short, output, "--model", long_bundle, "--max-new-tokens", "20")  # who was killed holds nothing
    assert [each["row"] for each in lines(output)] == list(range(1, before.count(b"\n") + 2))


def test_answers_may_go_where_they_cannot_be_read_again(bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"image": pictures[0], "question": "what?"}])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "engines")))}
    arguments = ["ask", str(data), "-o", "/dev/stdout", "--model", str(bundle), *SHORT]
    command = [sys.executable, "-m", "svcli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout)["row"] == 1
    ask(data, tmp_path / "out.jsonl", "--model", bundle, *SHORT)
    assert done.stdout == (tmp_path / "out.jsonl").read_bytes()


@settings(max_examples=200, deadline=None)
@given(
    line=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["image", "images", "question", "prompt", "system", "x"]), inner, max_size=4
            )
        ),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_line_is_a_question_or_an_error(line: bytes) -> None:
    row = Row.of(1, line)
    assert (row.error is None) == bool(row.question.strip())
    json.dumps(row.record)


def test_another_engine_answers_the_same(bundle: Path, pictures: list[str], tmp_path: Path) -> None:
    rows = [{"image": name, "question": "what is this?"} for name in pictures]
    data, expected = write(tmp_path / "data.jsonl", rows), tmp_path / "ort.jsonl"
    ask(data, expected, "--model", bundle, *SHORT)
    for number in ("1", "2"):
        output = tmp_path / f"torch-{number}.jsonl"
        ask(data, output, "--model", bundle, *SHORT, "--engine", "torch", "--parallel", number)
        assert lines(output) == lines(expected)


def test_half_a_character_is_a_row_that_failed_and_is_known_again(bundle: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"question": "a \ud800 b"}, {"question": "what is this?"}])
    output = tmp_path / "out.jsonl"
    ask(data, output, "--model", bundle, *SHORT, code=1)
    first, second = lines(output)
    assert "half of a character" in first["error"]
    assert second["answer"]
    again = ask(data, output, "--model", bundle, *SHORT, code=1)
    assert "2 of 2 rows are answered already" in again.stderr
    assert lines(output) == [first, second]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_told_with_the_file(
    bundle: Path, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the runner, which has no file behind stdout.
    monkeypatch.setattr(errors, "silence_stdout", lambda: None)
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps({"image": pictures[0], "question": "what?"}))
    done = ask(data, Path("/dev/full"), "--overwrite", "--model", bundle, code=3)
    assert done.stderr.endswith("Error: /dev/full: No space left on device\n")
