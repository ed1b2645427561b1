"""`svcli eval`: every item has its line, a killed run goes on, shards add up, and nothing is passed over silently."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from skipvision.data.packages import EASY_VQA
from skipvision.data.questions import Question, is_right
from svcli import errors
from svcli.app import app
from svcli.evaluation.collect import collect
from svcli.evaluation.results import numbers, ranges
from svcli.evaluation.run import Shard, Work
from svcli.evaluation.task import Task
from svcli.evaluation.tasks.registry import TASKS
from svcli.settings import bundled_model
from tests.evaluation.task_files import held, put, put_json, put_parquet

ROOT = Path(__file__).parents[2]
SHAPES = ("bundled", "--split", "shapes")
OWN = ("--only", "skipped")


def evaluate(*arguments: str | Path | int, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(path: Path) -> list[tuple[str, str, float]]:
    """What does not change from run to run."""
    return [(each["id"], each["answer"], each["score"]) for each in lines(path)[1:]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of eighteen items."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(*SHAPES, *OWN, "--limit", 18, "--out", out)
    return out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an easy-VQA of three pictures, the second of which is broken."""
    folder = tmp_path_factory.mktemp("assets")
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    pictures = {0: (folder / "red.png").read_bytes(), 1: b"no picture", 2: (folder / "red.png").read_bytes()}
    questions = [
        ["what color is the shape?", "red", 0],
        ["is there a <b>blue</b> shape?", "no", 0],
        ["what color is the shape?", "red", 1],
        ["is there a red shape? " * 200, "yes", 2],
    ]
    with zipfile.ZipFile(folder / f"easy_vqa-{EASY_VQA.version}-py3-none-any.whl", "w") as archive:
        archive.writestr("easy_vqa/data/test/questions.json", json.dumps(questions))
        for number, data in pictures.items():
            archive.writestr(f"easy_vqa/data/test/images/{number}.png", data)
    return folder


def test_every_task_says_what_it_needs() -> None:
    shown = evaluate("--list").stdout
    listed = json.loads(evaluate("--list", "--json").stdout)
    assert [each["name"] for each in listed] == list(TASKS)
    for each in listed:
        assert each["name"] in shown
        assert all(each.values()), each


def test_answers_are_those_of_chat_and_are_judged_by_the_suites_own_rules(whole: Path, tmp_path: Path) -> None:
    header, *found = lines(whole / "skipped.jsonl")
    assert (header["task"], header["split"], header["asker"], header["num_items"]) == (
        "bundled",
        "shapes",
        "skipped",
        18,
    )
    items = [item for item, _ in Work(TASKS["bundled"], tmp_path, "shapes", 18).items()]
    assert [each["id"] for each in found] == [item.id for item in items]
    for item, each in list(zip(items, found, strict=True))[:4]:
        assert isinstance(item.pictures[0], bytes)
        (tmp_path / "picture.png").write_bytes(item.pictures[0])
        chat = CliRunner().invoke(app, ["chat", str(tmp_path / "picture.png"), item.question, "--json"])
        said = json.loads(chat.stdout)
        assert each["text"] == said["answer"]
        assert each["visual_tokens"] == said["tokens"]["visual_in"]
        assert each["cached_rows"] == said["tokens"]["prompt_rows"]
    for item, each in zip(items, found, strict=True):
        question = Question(item.group, item.question, item.truth["answer"], item.truth["judged by"])
        assert each["score"] == is_right(question, each["text"])
        assert len(numbers(each["retained"][0])) == 96
    assert {each["score"] for each in found} == {0.0, 1.0}, "items that cannot tell right from wrong"


def test_the_bundle_as_it_is_goes_first_and_all_are_held_against_it(whole: Path, tmp_path: Path) -> None:
    header, *rest = (whole / "skipped.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    names = ("blind", "24-40", "random:4", "skipped", "pool:4", "dense")
    for number, name in enumerate(names):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join([json.dumps(json.loads(header) | {"asker": name}) + "\n", *rest]), encoding="utf-8")
    report = collect(tmp_path)
    assert [each.name for each in report.answers] == ["skipped", "dense", "24-40", "random:4", "pool:4", "blind"]
    assert list(report.to_own) == ["dense", "24-40", "random:4", "pool:4", "blind"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on(number: int, tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "engines")))}
    arguments = [*SHAPES, *OWN, "--limit", "60", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "svcli", "eval", *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not path.exists() or path.read_bytes().count(b"\n") < 6:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.001)
        process.send_signal(number)
        process.wait(120)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    before = path.read_bytes()
    kept = before[: before.rindex(b"\n") + 1]
    assert 6 <= kept.count(b"\n") < 61
    done = evaluate(*arguments)
    assert path.read_bytes().startswith(kept)
    assert [each["id"] for each in lines(path)[1:]] == [
        item.id for item, _ in Work(TASKS["bundled"], tmp_path, "shapes", 60).items()
    ]
    assert f"{kept.count(bytes([10])) - 1} of 60 items are answered already" in done.stderr


def test_a_torn_line_is_asked_again(whole: Path, tmp_path: Path) -> None:
    path, full = tmp_path / "skipped.jsonl", (whole / "skipped.jsonl").read_bytes()
    for cut in (full.index(b"\n", 3000) + 40, 30, 0):
        path.write_bytes(full[:cut])
        evaluate(*SHAPES, *OWN, "--limit", 18, "--out", tmp_path)
        assert told(path) == told(whole / "skipped.jsonl")


def test_shards_are_disjoint_and_add_up(whole: Path, tmp_path: Path) -> None:
    for number in (1, 0):
        done = evaluate(*SHAPES, *OWN, "--limit", 18, "--shard", f"{number}/2", "--out", tmp_path)
        assert ("items are answered so far" in done.stdout) == (number == 1)
    parts = [told(tmp_path / f"skipped.{number}-of-2.jsonl") for number in (0, 1)]
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == sorted(told(whole / "skipped.jsonl"))
    merged, alone = (json.loads(evaluate("--merge", folder, "--json").stdout) for folder in (tmp_path, whole))
    for report in (merged, alone):
        del report["askers"]["skipped"]["first_token_seconds"], report["results"]
    assert merged == alone


def test_what_one_shard_could_not_ask_another_may_have(whole: Path, tmp_path: Path) -> None:
    header, first, *rest = (whole / "skipped.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "skipped.jsonl").write_text("".join([header, first, *rest]), encoding="utf-8")
    kept = {name: json.loads(first)[name] for name in ("id", "group", "question", "truth", "pictures")}
    failed = kept | {"answer": "", "score": 0.0, "error": "the disk was away"}
    shard = json.loads(header) | {"shard": "0/3", "num_items": 1}
    for name in ("skipped.0-of-3.jsonl", "skipped.z.jsonl"):  # before and behind it
        (tmp_path / name).write_text(f"{json.dumps(shard)}\n{json.dumps(failed)}\n", encoding="utf-8")
        report = json.loads(evaluate("--merge", tmp_path, "--json").stdout)
        assert (report["askers"]["skipped"]["answered"], report["askers"]["skipped"]["not asked"]) == (18, 0)


def test_a_shard_has_an_item_whatever_the_order(tmp_path: Path) -> None:
    items = [item for item, _ in Work(TASKS["bundled"], tmp_path, "shapes", 40).items()]
    for item in items:
        assert sum(Shard(number, 3).has(item) for number in range(3)) == 1
    assert all(any(Shard(number, 3).has(item) for item in items) for number in range(3))


def test_answers_of_another_run_are_kept(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    path.write_bytes((whole / "skipped.jsonl").read_bytes())
    before = path.read_bytes()
    assert "limit: 18, now 11" in evaluate(*SHAPES, *OWN, "--limit", 11, "--out", tmp_path, code=2).stderr
    assert "limit" in evaluate(*SHAPES, "--only", "dense", "--limit", 11, "--out", tmp_path, code=2).stderr
    header, *rest = before.splitlines(keepends=True)
    for name, told_of in {"bundle": "another bundle", "files": "other files"}.items():
        changed = json.dumps({**json.loads(header), name: "0"}).encode() + b"\n"
        path.write_bytes(changed + b"".join(rest))
        assert told_of in evaluate(*SHAPES, *OWN, "--limit", 18, "--out", tmp_path, code=2).stderr
    changed = json.dumps({**json.loads(header), "versions": {"svcli": "0.0.1"}}).encode() + b"\n"
    path.write_bytes(changed + b"".join(rest))
    assert "versions: svcli 0.0.1" in evaluate(*SHAPES, *OWN, "--limit", 18, "--out", tmp_path, code=2).stderr
    path.write_bytes(b"something else\n")
    assert "no file of svcli eval" in evaluate(*SHAPES, *OWN, "--limit", 18, "--out", tmp_path, code=2).stderr
    path.write_bytes(before.replace(b'"score": 1.0', b'"score": none', 1))
    assert "is broken" in evaluate(*SHAPES, *OWN, "--limit", 18, "--out", tmp_path, code=2).stderr
    evaluate(*SHAPES, *OWN, "--limit", 2, "--out", tmp_path, "--overwrite")
    assert len(told(path)) == 2


def test_what_cannot_be_asked_is_wrong_and_said(wheel: Path, tmp_path: Path) -> None:
    done = evaluate("easy-vqa", "--data", wheel, "--baselines", "dense", "--out", tmp_path)
    for name in ("skipped", "dense"):
        assert f"{name}: 2 of 4 could not be asked, and count as wrong." in done.stdout
        _, first, second, broken, long = lines(tmp_path / f"{name}.jsonl")
        assert (first["looked"], second["looked"]) == (True, False)
        assert "not a picture" in broken["error"]
        assert "context" in long["error"]
        assert broken["score"] == long["score"] == 0
    report = json.loads(evaluate("--merge", tmp_path, "--json").stdout)
    found = report["askers"]["skipped"]
    first, second = lines(tmp_path / "skipped.jsonl")[1:3]
    assert found["figure"] == pytest.approx(25 * (first["score"] + second["score"]))
    assert found["not asked"] == 2
    assert found["visual_tokens"] == 162
    assert report["askers"]["dense"]["visual_tokens"] == 256
    before = (tmp_path / "skipped.jsonl").read_bytes()
    again = evaluate("easy-vqa", "--data", wheel, *OWN, "--out", tmp_path)
    assert "skipped: 2 of 4 items are answered already" in again.stderr
    assert "skipped: 2 of 4 could not be asked" in again.stdout
    assert (tmp_path / "skipped.jsonl").read_bytes() == before  # for the same reasons


def test_who_does_not_look_is_asked_about_a_broken_picture_too(wheel: Path, tmp_path: Path) -> None:
    done = evaluate("easy-vqa", "--data", wheel, "--only", "blind", "--out", tmp_path)
    assert "blind: 1 of 4 could not be asked" in done.stdout  # the question that is too long
    _, first, second, broken, long = lines(tmp_path / "blind.jsonl")
    assert broken["text"] == first["text"]
    assert [each["looked"] for each in (first, second, broken)] == [True, False, True]
    assert "context" in long["error"]


def test_what_could_not_be_asked_is_asked_again(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    header, first, *rest = (whole / "skipped.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = {name: json.loads(first)[name] for name in ("id", "group", "question", "truth", "pictures")}
    failed = json.dumps(kept | {"answer": "", "score": 0.0, "error": "the disk was away"}) + "\n"
    path.write_text("".join([header, failed, *rest]), encoding="utf-8")
    done = evaluate(*SHAPES, *OWN, "--limit", 18, "--out", tmp_path)
    assert "17 of 18 items are answered already" in done.stderr
    assert "could not be asked" not in done.stdout
    assert len(lines(path)) == 20  # what was is not written over
    report, alone = (json.loads(evaluate("--merge", folder, "--json").stdout) for folder in (tmp_path, whole))
    assert report["askers"]["skipped"]["figures"] == alone["askers"]["skipped"]["figures"]
    assert (report["askers"]["skipped"]["answered"], report["askers"]["skipped"]["not asked"]) == (18, 0)


def test_what_others_score_is_written_for_them(tmp_path: Path) -> None:
    rows = {
        f"v1_{n}": {"imagename": "a.png", "question": "what?", "answer": "it", "capability": ["ocr"]} for n in (0, 1)
    }
    put_json(tmp_path / "mm-vet.json", rows)
    put(tmp_path / "images" / "a.png")
    asked: list[str | Path] = ["mmvet", *OWN, "--data", tmp_path, "--out", tmp_path / "out"]
    done = evaluate(*asked, "--export", tmp_path / "answers.json")
    assert "Figures of test are given elsewhere; --export writes answers as a .json file" in done.stdout
    assert "Intervals" not in done.stdout
    written = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert written == {each["id"]: each["text"] for each in lines(tmp_path / "out" / "skipped.jsonl")[1:]}
    os.link(tmp_path / "answers.json", tmp_path / "held.json")
    merged: list[str | Path] = ["--merge", tmp_path / "out", "--export", tmp_path / "answers.json", "--json"]
    assert json.loads(evaluate(*merged).stdout)["askers"]["skipped"]["figure"] is None
    # In one move: the file that was there stays whole until then.
    assert not (tmp_path / "answers.json").samefile(tmp_path / "held.json")
    assert json.loads((tmp_path / "answers.json").read_text(encoding="utf-8")) == written
    assert "only its judge can tell" in evaluate(*asked, "--html", tmp_path / "page.html", code=2).stderr
    assert "scored here" in evaluate(*SHAPES, *OWN, "--export", tmp_path / "x", code=2).stderr


def test_public_tasks_go_all_the_way(tmp_path: Path) -> None:
    """MME, whose figure is no mean: 100 for the questions and 100 for the pictures of each subtask."""
    rows = [
        {"question_id": f"{name}/{n}.png", "image": held(colour), "question": f"Is it {said}?", "answer": truth}
        | {"category": name}
        for name in ("existence", "color")
        for n, colour in enumerate(("red", "blue"))
        for said, truth in ((colour, "Yes"), ("green", "No"))
    ]
    put_parquet(tmp_path / "data" / "test-0.parquet", rows)
    done = evaluate("mme", "--baselines", "dense", "--data", tmp_path, "--out", tmp_path / "out", "--json")
    report = json.loads(done.stdout)
    own = report["askers"]["skipped"]
    assert own["items"] == own["answered"] == len(rows)
    scores = {each["id"]: each["score"] for each in lines(tmp_path / "out" / "skipped.jsonl")[1:]}
    wanted = 0.0
    for name in ("existence", "color"):
        pairs = [[scores[f"{name}/{n}.png#{number}"] for number in (1, 2)] for n in (0, 1)]
        wanted += 100 * sum(map(sum, pairs)) / 4 + 100 * sum(map(min, pairs)) / 2
    assert own["figure"] == pytest.approx(wanted)


def test_nothing_that_could_be_asked_is_a_failure(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / f"easy_vqa-{EASY_VQA.version}-py3-none-any.whl", "w") as archive:
        archive.writestr("easy_vqa/data/test/questions.json", json.dumps([["what?", "red", 0]]))
        archive.writestr("easy_vqa/data/test/images/0.png", b"")
    done = evaluate("easy-vqa", *OWN, "--data", tmp_path, "--out", tmp_path / "out", code=1)
    assert "nothing could be asked" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-task"], "choose among bundled"),
        ([], "name a task"),
        (["a", "b", "c"], "name a task"),
        (["bundled", "--split", "moon"], "bundled has test"),
        (["bundled", "--data", "nowhere"], "svcli data fetch"),
        (["easy-vqa", "--data", "nowhere"], "pip download"),
        (["nowhere", *SHAPES], "no such bundle"),
        ([*SHAPES, "--shard", "4/4"], "0 to N - 1"),
        ([*SHAPES, "--only", "sparse"], "choose among"),
        ([*SHAPES, "--only", "skipped", "--baselines", "dense"], "one of them"),
        ([*SHAPES, "--only", "none"], "at least one"),
        ([*SHAPES, *OWN, "--limit", "1", "--shard", "0/1000"], "none of the items"),
        (["bundled", "--merge", "x"], "asks nothing"),
        (["--merge", "x", "--limit", "3"], "asks nothing"),
        (["--merge", "x", "--split", "shapes"], "asks nothing"),
        (["--merge", "x", "--overwrite"], "asks nothing"),
        (["--merge", "x", "--engine", "torch"], "asks nothing"),
        (["--merge", "nowhere"], "holds no results"),
        ([*SHAPES, *OWN, "--out", "/dev/null"], "/dev/null is a file; name a folder"),
        ([*SHAPES, *OWN, "--html", "."], "is a folder; name a file"),
        ([*SHAPES, *OWN, "--html", "/dev/null/page.html"], "/dev/null is a file; name a folder"),
    ],
)
def test_slips_are_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = evaluate(*arguments, code=2)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_files_are_there_for_a_reader_that_leaves_early(whole: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "wrong.html"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "engines")))}
    command = [sys.executable, "-m", "svcli", "eval", "--merge", str(whole), "--html", str(page)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert page.read_text().rstrip().endswith("</html>")


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    # Of the runner, which has no file behind stdout.
    monkeypatch.setattr(errors, "silence_stdout", lambda: None)
    done = evaluate(*SHAPES, *OWN, "--limit", 1, "--out", tmp_path, code=3)
    assert done.stderr.endswith(f"Error: {tmp_path / 'skipped.jsonl'}: No space left on device\n")


def test_two_runs_do_not_write_one_file(whole: Path) -> None:
    import fcntl

    with (whole / "skipped.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another svcli eval" in evaluate(*SHAPES, *OWN, "--limit", 18, "--out", whole, code=2).stderr


def test_what_one_file_refuses_leaves_the_others_as_they_were(whole: Path, tmp_path: Path) -> None:
    import fcntl

    path, other = tmp_path / "skipped.jsonl", tmp_path / "blind.jsonl"
    path.write_bytes((whole / "skipped.jsonl").read_bytes())
    with other.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        arguments: list[str | Path | int] = [*SHAPES, "--baselines", "blind", "--limit", 18, "--out", tmp_path]
        done = evaluate(*arguments, code=2)
        assert done.stderr.count("\n") == 1 + done.stderr.count("Note:")
        assert f"Error: {other}: another svcli eval is writing it" in done.stderr
        assert len(lines(path)) == 19
    evaluate(*arguments)  # the lock went with the one who had it
    assert len(lines(other)) == 19


def test_it_needs_no_torch(tmp_path: Path) -> None:
    paths = [str(ROOT), str(ROOT / "export"), str(ROOT / "engines")]
    program = (
        f"import sys; sys.path[:0] = {paths!r}; sys.modules['torch'] = None\n"
        f"sys.argv = ['svcli', 'eval', *{[*SHAPES, *OWN, '--limit', '1', '--out', str(tmp_path)]!r}]\n"
        "from svcli.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nobody looks at progress where no terminal is"


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_tasks_are_whole(task: Task) -> None:
    assert task.splits
    assert task.max_new_tokens > 0
    assert task.name == next(name for name, each in TASKS.items() if each is task)


@pytest.mark.parametrize("values", [(), (5,), (0, 1, 2), (3, 1, 9, 2)])
def test_numbers_in_ranges_are_the_same_back(values: tuple[int, ...]) -> None:
    assert numbers(ranges(values)) == tuple(sorted(values))
    assert bundled_model().is_dir()
