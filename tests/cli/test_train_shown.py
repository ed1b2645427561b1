"""What a person, and a program, sees of a training run: panel, plain lines, JSON lines, summary, loss curve."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from skipvision.training.events import Event, StageEvent, StepEvent
from skipvision.training.run_log import row
from svcli.app import app
from svcli.training.facts import RunFacts, read_history
from svcli.training.panel import Watch, clock, sparkline
from tests.cli.fake_training import RECIPE, FakeTraining, install, step_event
from tests.cli.test_terminal import ESCAPE, finish, spawn
from tests.cli.test_ui import Terminal

ROOT = Path(__file__).parents[2]
KINDS = ["step", "validation", "saved", "broken", "done"]


def program(pause: float, last: int | None = None) -> list[str]:
    """svcli with a run that computes nothing, as a process of its own; behind step `last` it waits to be stopped."""
    paths = [str(ROOT), str(ROOT / "export"), str(ROOT / "engines")]
    code = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "import pytest\n"
        "from tests.cli.fake_training import FakeTraining, install\n"
        f"install(pytest.MonkeyPatch(), FakeTraining({pause}, last={last}))\n"
        "from svcli.__main__ import main\n"
        "main()"
    )
    return [sys.executable, "-c", code]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_in_a_pipe_each_event_is_one_object(monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path) -> None:
    install(monkeypatch, FakeTraining())
    done = CliRunner().invoke(app, ["train", str(recipe), "-o", str(tmp_path / "run")])
    assert (done.exit_code, done.stderr) == (0, "")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["step"] for each in told if each["event"] == "step"] == list(range(1, 41))
    assert [each["step"] for each in told if each["event"] == "saved"] == [10, 20, 30, 40]
    assert {each["event"] for each in told} == set(KINDS)
    assert told[-1]["event"] == "done"
    assert told[-1]["checkpoint"] == str(tmp_path / "run" / "checkpoint")
    first = next(each for each in told if each["event"] == "step")
    assert first["seconds"] == {"data": 0.1, "forward": 0.3, "backward": 0.5, "optimiser": 0.1, "other": 0.0}
    assert (first["visual_kept"], first["visual_plain"]) == (392, 1024)


def test_what_is_not_finite_is_null() -> None:
    told = row(step_event(1, loss=math.nan))
    assert told["loss"] is None
    json.loads(json.dumps(told, allow_nan=False))


@pytest.mark.parametrize("width", [120, 60, 40])
def test_a_terminal_shows_a_panel_that_fits_and_then_a_summary(recipe: Path, tmp_path: Path, width: int) -> None:
    run = tmp_path / "run"
    child = spawn(program(0.03), "train", recipe, "-o", run, width=width)
    screen = finish(child)
    assert child.exitstatus == 0
    plain = ESCAPE.sub("", screen)
    words = re.sub(r"\s+", " ", plain)
    for told in ("of 40", "left", "tokens/s", "rows/s", "392 of 1,024 kept, 38%", "3 GiB", "forward 30%", "1 left out"):
        assert told in words, told
    assert "step 10: validation loss 1.5500, the best" in words
    assert "step 10: saved" in words
    summary = words[words.rindex("Trained") :]
    assert "steps 40 samples 160" in summary
    assert "backward 20.0 s, 50%" in summary
    assert "1,344 tokens/s, 1,000 rows/s" in summary
    assert "15,680 of 40,960 kept, 38%" in summary
    assert "best 0.6200 at step 40" in summary
    assert "svcli export" in summary
    # Folded lines are the terminal's affair where it is narrower than a path.
    assert "".join(plain.split()).endswith(f"{run / 'checkpoint'}".replace(" ", ""))
    drawn = [line for part in re.split(r"\x1b\[2K", screen) for line in ESCAPE.sub("", part).splitlines()]
    assert max(len(line.strip("\r")) for line in drawn if "━" in line) <= width


@pytest.mark.parametrize("width", [24, 40, 120])
def test_no_line_of_the_panel_is_so_long_that_an_echo_would_fold_it(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "60")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    facts = RunFacts()
    with Watch(facts) as watch:
        for event in (StageEvent("looking at samples", 1, 2), step_event(7), StageEvent("validating", 1, 3)):
            facts(event)
            watch(event)
    lines = re.split(r"[\r\n]+", ESCAPE.sub("", screen.getvalue()))
    assert any("1,024" in line for line in lines)
    assert max(map(len, lines)) <= width - len("^C")


def test_a_terminal_gets_no_control_characters_of_a_sample_s_name(recipe: Path, tmp_path: Path) -> None:
    screen = finish(spawn(program(0), "train", recipe, "-o", tmp_path / "run"))
    assert "left out: one.json" in screen
    assert "\x1b[31mevil" not in screen


@pytest.mark.parametrize("changes", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_plain_terminal_gets_no_colours(recipe: Path, tmp_path: Path, changes: dict[str, str]) -> None:
    child = spawn(program(0.01), "train", recipe, "-o", tmp_path / "run", changes=changes)
    screen = finish(child)
    assert child.exitstatus == 0
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])[;m]", screen)
    if "TERM" in changes:
        assert "\x1b" not in screen
        assert "step 10: saved\r\n" in screen
        # The second line of steps would come half a minute later.
        assert screen.count(" of 40 · ") == 1


def test_an_encoding_without_blocks_does_no_harm(recipe: Path, tmp_path: Path) -> None:
    child = spawn(
        program(0.03), "train", recipe, "-o", tmp_path / "run", changes={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    )
    screen = finish(child)
    assert child.exitstatus == 0
    assert "tokens/s | " in screen
    assert "?" not in ESCAPE.sub("", screen).replace("(?[31mevil)", "")


def test_ctrl_c_says_where_the_same_command_goes_on_and_it_does(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = spawn(program(0, last=10), "train", recipe, "-o", run)
    child.expect("step 10: saved")
    child.sendintr()
    screen = ESCAPE.sub("", finish(child)).replace("\r\n", "\n")
    assert child.exitstatus == 130
    assert "Traceback" not in screen
    assert screen.endswith("Note: stopped; the same command, without --fresh, goes on from step 10\n")
    done = subprocess.run([*program(0), "train", str(recipe), "-o", str(run)], capture_output=True, check=True)
    steps = [each["step"] for line in done.stdout.splitlines() if (each := json.loads(line))["event"] == "step"]
    assert steps == list(range(11, 41))
    assert read_history(run / "log.jsonl").steps == list(range(1, 41))


def test_a_stop_by_another_process_is_told_too(recipe: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*program(0, last=0), "train", str(recipe), "-o", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "broken"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "Note: stopped before anything was saved; the same command begins anew\n"


def test_a_reader_that_goes_does_not_end_the_run(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*program(0.02), "train", str(recipe), "-o", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert errors.splitlines() == [
        "Note: nobody reads these lines any more; training goes on, and log.jsonl in its folder has them"
    ]
    assert read_history(run / "log.jsonl").steps[-1] == 40
    assert (run / "loss.png").exists()


def test_a_disk_that_is_full_for_lines_or_the_curve_does_not_end_the_run(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "loss.png").mkdir(parents=True)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*program(0), "train", str(recipe), "-o", str(run)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
    lines, curve = done.stderr.splitlines()
    assert lines.startswith("Note: these lines cannot be written (No space left on device); training goes on")
    assert curve == f"Note: {run / 'loss.png'}: could not be written (Is a directory)"
    assert read_history(run / "log.jsonl").steps[-1] == 40


def test_only_the_first_of_several_processes_speaks(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path
) -> None:
    install(monkeypatch, FakeTraining())
    monkeypatch.setenv("RANK", "1")
    done = CliRunner().invoke(app, ["train", str(recipe), "-o", str(tmp_path / "run")])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "run" / "loss.png").exists()


def test_the_loss_curve_is_a_picture_of_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path
) -> None:
    install(monkeypatch, FakeTraining())
    arguments = ["train", str(recipe), "-o", str(tmp_path / "run")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    with Image.open(tmp_path / "run" / "loss.png") as image:
        assert image.size == (1200, 570)
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_without_matplotlib_there_is_a_note_and_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path
) -> None:
    install(monkeypatch, FakeTraining())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = CliRunner().invoke(app, ["train", str(recipe), "-o", str(tmp_path / "run")])
    assert done.exit_code == 0
    assert done.stderr == 'Note: matplotlib is not installed, so there is no loss.png: pip install "svcli[plots]"\n'


def test_an_error_in_the_midst_of_a_run_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 3:
            raise OSError(30, "Read-only file system", str(tmp_path / "run"))

    install(monkeypatch, FakeTraining(stop=stop))
    done = CliRunner().invoke(app, ["train", str(recipe), "-o", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert done.stderr == f"Error: {tmp_path / 'run'}: Read-only file system\n"


def test_facts_know_speed_by_rows_and_by_what_the_plain_model_would_have_read() -> None:
    facts = RunFacts()
    for step in range(1, 31):
        facts(step_event(step))
    assert facts.rows_per_second == pytest.approx(1000)
    assert facts.tokens_per_second == pytest.approx(1000 - 680 + 1024)
    assert facts.resumable_step == 0
    resumed = RunFacts()
    resumed(step_event(11))
    assert resumed.resumable_step == 10


def test_a_step_without_a_loss_leaves_the_smoothed_one_as_it_was() -> None:
    facts = RunFacts()
    for loss in (3.0, math.nan, 2.0):
        facts(step_event(1, loss=loss))
    assert facts.losses == pytest.approx([3.0, 3.0, 0.95 * 3.0 + 0.05 * 2.0])


def test_a_log_that_a_kill_has_cut_is_read_up_to_there(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(row(step_event(1, loss=2.5))) + '\n{"event": "st')
    history = read_history(log)
    assert (history.steps, history.losses) == ([1], [2.5])


def test_sparklines_fall_as_the_loss_does() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([2.0, math.nan, 1.0], 10) == "█▁"
    assert sparkline([1.0], 10) == ""
    assert len(sparkline([float(value) for value in range(1000)], 24)) == 24


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (125, "2:05"), (3723, "1:02:03"), (math.inf, "-:--")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
