"""States are whole or not there, and tell what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from skipvision.training import state as state_module
from skipvision.training.distributed import Processes
from skipvision.training.errors import NoRoomError, StateError
from skipvision.training.events import Event, StepEvent, ValidationEvent
from skipvision.training.index import scan
from skipvision.training.loop import run
from skipvision.training.run_log import RunLog
from skipvision.training.state import Progress, States
from tests.training.fake_speaker import PLAIN, WordSpeaker
from tests.training.processes import ROOT, losses
from tests.training.toy import ToyTask, toy_settings, toy_task

SHARD = "shard-00001-of-00001.safetensors"


class Killed(BaseException):
    """What ends a write from outside, so that nothing can tidy up."""


def run_toy(output: Path, kill_at: int = 0, **settings: object) -> list[Event]:
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepEvent) and event.step == kill_at:
            raise Killed

    run(toy_task("toy"), toy_settings(**settings), output, report)
    return events


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run with states behind steps 2 and 4, killed in step 5."""
    with pytest.raises(Killed):
        run_toy(tmp_path, kill_at=5)
    return tmp_path


def first_step(events: list[Event]) -> int:
    return next(event.step for event in events if isinstance(event, StepEvent))


def names(output: Path) -> list[str]:
    return sorted(each.name for each in (output / "states").iterdir())


def test_weights_and_moments_come_back_to_the_bit(tmp_path: Path) -> None:
    one, other = toy_task("toy"), toy_task("toy")
    optimisers = [torch.optim.AdamW(task.parameter_groups(), fused=True) for task in (one, other)]
    for micros in one.batches(0, 0, 1):
        one.module(micros[0]).total.backward()
        optimisers[0].step()
    states = States(tmp_path / "states", {"recipe": "toy"}, 0, 1, Processes())
    states.save(Progress(5, 2, 0.1 + 0.2, ("a", "b")), one.module, optimisers[0])
    assert states.load(5, other.module, optimisers[1]) == Progress(5, 2, 0.1 + 0.2, ("a", "b"))
    pairs = list(zip(one.module.named_parameters(), other.module.parameters(), strict=True))
    for (name, parameter), copy in pairs:
        assert torch.equal(parameter, copy), name
        assert optimisers[0].state[parameter].keys() == optimisers[1].state[copy].keys()
        for key, tensor in optimisers[0].state[parameter].items():
            assert torch.equal(tensor, optimisers[1].state[copy][key]), (name, key)
    assert set(names(tmp_path)) == {"step-000005"}


def test_a_state_has_nothing_that_does_not_learn(stopped: Path) -> None:
    from safetensors import safe_open

    with safe_open(stopped / "states" / "step-000004" / SHARD, framework="pt") as file:
        found = set(file.keys())
    assert "weight.layers.0.weight" in found
    assert not [name for name in found if "frozen" in name or "head" in name]


@pytest.mark.parametrize("change", [lambda data: data[:-40], lambda data: data[:-1] + bytes([data[-1] ^ 1]), None])
def test_a_shard_that_is_cut_altered_or_missing_is_named(
    stopped: Path, change: Callable[[bytes], bytes] | None
) -> None:
    shard = stopped / "states" / "step-000004" / SHARD
    if change is None:
        shard.unlink()
    else:
        shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(StateError) as error:
        run_toy(stopped)
    folder = shard.parent
    assert str(error.value) == (
        f"{shard}: missing, cut or altered; remove {folder} to go on from step 2, or start anew with --fresh"
    )
    shutil.rmtree(folder)
    assert first_step(run_toy(stopped)) == 3


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"format": 1}', '{"format": 1, "identity": "toy", "more": 2}'])
def test_a_state_that_does_not_say_what_it_is_is_refused(stopped: Path, text: str | None) -> None:
    info = stopped / "states" / "step-000004" / "state.json"
    if text is None:
        info.unlink()
    else:
        info.write_text(text)
    with pytest.raises(StateError, match=r"state\.json: missing or unreadable; remove .* or start anew with --fresh$"):
        run_toy(stopped)


def test_a_state_of_another_format_is_refused(stopped: Path) -> None:
    info = stopped / "states" / "step-000004" / "state.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"format": 2, "new": 1}))
    with pytest.raises(StateError, match=r"a state of format 2, and this version reads 1; .* start anew with --fresh$"):
        run_toy(stopped)


def test_a_state_of_something_else_is_refused(stopped: Path) -> None:
    before = (stopped / "states" / "step-000004" / SHARD).read_bytes()
    with pytest.raises(StateError, match=r"belongs to another recipe; use another folder, or .* --fresh$"):
        run_toy(stopped, identity={"recipe": "another"})
    assert (stopped / "states" / "step-000004" / SHARD).read_bytes() == before


@pytest.mark.parametrize("metadata", [None, {"rows": "{"}], ids=str)
def test_a_shard_that_is_none_of_ours_is_refused(stopped: Path, metadata: dict[str, str] | None) -> None:
    folder = stopped / "states" / "step-000004"
    save_file({"a": torch.zeros(1)}, folder / SHARD, metadata)
    info = json.loads((folder / "state.json").read_text())
    info["files"][SHARD] = state_module._hash(folder / SHARD)
    (folder / "state.json").write_text(json.dumps(info))
    with pytest.raises(StateError, match=r"not a shard of a state; start anew with --fresh$"):
        run_toy(stopped)


def test_a_state_of_another_shape_is_refused(stopped: Path) -> None:
    task = toy_task("toy")
    task.module.layers = torch.nn.ModuleList([torch.nn.Linear(6, 7), torch.nn.Linear(6, 6)])
    with pytest.raises(StateError, match=r"step-000004 does not fit this model at weight\.layers\.0\.weight; remove"):
        run(task, toy_settings(), stopped, lambda _event: None)


@pytest.mark.parametrize("function", ["_write", "_hash", "_folder_to_disk"])
def test_a_kill_in_the_midst_of_a_write_leaves_the_last_state(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Before the shard is written, behind it, and behind state.json: what was begun is tidied up by the next start."""

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(state_module, function, die)
    if function == "_hash":
        shutil.rmtree(stopped / "states" / "step-000004")
        monkeypatch.setattr(States, "_checked", lambda *_: pytest.fail("must not be read"))
        monkeypatch.setattr(States, "load", lambda *_: Progress())
    with pytest.raises(Killed):
        run_toy(stopped)
    assert ".step-" in "".join(names(stopped))
    monkeypatch.undo()
    events = run_toy(stopped)
    assert first_step(events) == (3 if function == "_hash" else 5)
    assert names(stopped) == ["step-000004", "step-000006"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_the_midst_of_a_write_leaves_nothing_half_written(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    def stop(_folder: Path) -> None:
        raise end

    monkeypatch.setattr(state_module, "_folder_to_disk", stop)
    with pytest.raises(end):
        run_toy(stopped)
    assert names(stopped) == ["step-000002", "step-000004"]


def test_a_kill_while_old_states_go_leaves_whole_ones(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = shutil.rmtree

    def die(path: Path, **_: object) -> None:
        if path.name.endswith(".old"):
            (path / "state.json").unlink()
            raise Killed
        remove(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(Killed):
        run_toy(stopped)
    assert names(stopped) == [".step-000002.old", "step-000004", "step-000006"]
    monkeypatch.undo()
    run_toy(stopped)
    assert names(stopped) == ["step-000004", "step-000006"]


def test_a_full_disk_leaves_the_last_state(tmp_path: Path) -> None:
    """A limit on the size of files, which the system enforces as it does a full disk, in a process of its own."""
    with pytest.raises(Killed):
        run_toy(tmp_path, kill_at=3)
    program = (
        "import resource, sys; from pathlib import Path; from skipvision.training.errors import NoRoomError;"
        "from skipvision.training.loop import run; from tests.training.toy import ToyTask, toy_settings, toy_task;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: run(toy_task('toy'), toy_settings(), Path(sys.argv[1]), lambda event: None)\n"
        "except NoRoomError as error: sys.stderr.write(str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "step-000004 could not be written (File too large); the run goes on from step 2" in done.stderr
    assert names(tmp_path) == ["step-000002"]
    assert first_step(run_toy(tmp_path)) == 3


def test_no_room_is_told_from_other_failures(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, kind in (
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), NoRoomError),
        (OSError(28, "No space left on device"), NoRoomError),
        (OSError(13, "Permission denied"), StateError),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(state_module, "save_file", fail)
        with pytest.raises(StateError) as raised:
            run_toy(stopped)
        assert type(raised.value) is kind
        assert names(stopped) == ["step-000002", "step-000004"]
    monkeypatch.undo()
    whole = stopped / "whole"
    run_toy(whole)
    run_toy(stopped)
    assert losses(stopped) == losses(whole)


def test_a_full_disk_is_told_whatever_is_written(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log as it begins and as it grows, the index, and the checkpoint; then the same run goes on."""
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def fail(*_: object) -> None:
        raise error

    log = stopped / "log.jsonl"
    partial = log.with_suffix(".partial")
    partial.symlink_to("/dev/full")
    with pytest.raises(NoRoomError, match=r"log\.jsonl: could not be written \(No space left .* command goes on"):
        run_toy(stopped)
    assert not partial.is_symlink()
    with pytest.raises(NoRoomError, match="/dev/full: could not be written"):
        RunLog(Path("/dev/full")).write(ValidationEvent(1, {}, best=False), 1)
    monkeypatch.setattr("skipvision.training.index.save_file", fail)
    index = scan([], WordSpeaker(), PLAIN, 64, decode=False)
    with pytest.raises(NoRoomError, match=r"index: could not be written \(No space left on device\); the same"):
        index.save(tmp_path / "index", "key")
    monkeypatch.setattr(ToyTask, "write_checkpoint", fail)
    with pytest.raises(NoRoomError, match=r"checkpoint: could not be written \(No space.* writes it once"):
        run_toy(stopped)
    monkeypatch.undo()
    run_toy(stopped)
    run_toy(stopped / "whole")
    assert losses(stopped) == losses(stopped / "whole")
