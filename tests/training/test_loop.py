"""What the loop promises of one run in one process, on a toy task."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skipvision.training.conversation import Broken
from skipvision.training.distributed import Processes
from skipvision.training.errors import NoMemoryError, TrainError
from skipvision.training.events import BrokenEvent, DoneEvent, Event, SavedEvent, StepEvent, ValidationEvent
from skipvision.training.loop import LoopSettings, run
from skipvision.training.update import Clock, Updater
from tests.training.processes import losses, rows, weights
from tests.training.toy import Toy, ToyTask, toy_settings, toy_task


class Killed(Exception):
    """What ends a run from outside."""


def run_toy(
    output: Path, task: ToyTask | None = None, *, kill_at: int = 0, fresh: bool = False, **settings: object
) -> list[Event]:
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepEvent) and event.step == kill_at:
            raise Killed

    run(task or toy_task("toy"), toy_settings(**settings), output, report, fresh=fresh)
    return events


def states(output: Path) -> list[int]:
    return sorted(int(each.name.removeprefix("step-")) for each in (output / "states").iterdir())


def test_a_run_tells_of_every_step_and_of_its_end(tmp_path: Path) -> None:
    events = run_toy(tmp_path)
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events if isinstance(event, SavedEvent)] == [2, 4, 6]
    for event in steps:
        assert (event.total, event.samples, event.rows) == (6, 8, 40)
        assert event.parts.keys() == {"seldom"}
        assert min(event.seconds.data, event.seconds.forward, event.seconds.backward, event.seconds.optimiser) > 0
        assert event.memory > 10_000_000
        assert event.grad_norm > 0
    assert steps[-1].seconds_left == 0 < steps[0].seconds_left
    done = events[-1]
    assert isinstance(done, DoneEvent)
    assert (done.checkpoint, done.steps, done.rows, done.broken) == (tmp_path / "checkpoint", 6, 240, 0)
    assert done.loss == pytest.approx(sum(event.loss for event in steps) / 6)
    assert done.seconds.total >= sum(event.seconds.total for event in steps)
    assert done.chosen == "the checkpoint is of the last step, 6"


def test_the_loss_is_that_of_all_tokens_together(tmp_path: Path) -> None:
    """Without dropout, worked out apart: cross entropy over the step's tokens, however it is cut into micro-batches."""
    task = toy_task("toy", accumulate=4, num_steps=1)
    task.module.get_submodule("dropout").p = 0.0  # type: ignore[assignment]
    (micros,) = task.batches(0, 0, 1)
    with torch.no_grad():
        objectives = [task.module(micro) for micro in micros]
    expected = sum(float(each.answer_loss) for each in objectives) / 32
    (step,) = [event for event in run_toy(tmp_path, task) if isinstance(event, StepEvent)]
    assert step.loss == pytest.approx(expected, rel=1e-6)


def test_an_update_is_adamw_on_the_clipped_mean_gradient(tmp_path: Path) -> None:
    """Against torch's own clipping and AdamW, on the gradient of the whole batch."""
    plain, task = toy_task("tiny", num_steps=1), toy_task("tiny", num_steps=1, accumulate=4)
    (micro,) = next(plain.batches(0, 0, 1))
    objective = plain.module(micro)
    (objective.total / objective.weight).backward()
    learning = [each for each in plain.module.parameters() if each.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(learning, 0.5)
    torch.optim.AdamW(plain.parameter_groups(), betas=(0.9, 0.95)).step()
    (step,) = [e for e in run_toy(tmp_path, task, max_grad_norm=0.5, betas=(0.9, 0.95)) if isinstance(e, StepEvent)]
    assert step.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for name, parameter in plain.module.named_parameters():
        if name not in ("model.summary.score.bias", "model.summary.norm.bias"):  # whose gradient is rounding alone
            torch.testing.assert_close(task.module.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_the_log_is_what_was_told(tmp_path: Path) -> None:
    task = toy_task("toy", validation=[3.0, 2.0, 2.5], broken_at={1: ["a", "b"], 4: ["a"]})
    events = run_toy(tmp_path, task, max_broken=2)
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    names = [row["event"] for row in found]
    assert names == [
        "step",
        "broken",
        "broken",
        "step",
        "validation",
        "step",
        "step",
        "validation",
        *["step"] * 2,
        "validation",
        "done",
    ]
    assert [(row["step"], row["broken"]["name"], row["count"]) for row in rows(tmp_path, "broken")] == [
        (2, "a", 1),
        (2, "b", 2),
    ]
    assert [event.count for event in events if isinstance(event, BrokenEvent)] == [1, 2]
    assert [row["best"] for row in rows(tmp_path, "validation")] == [True, True, False]
    assert rows(tmp_path, "done")[0]["broken"] == 2


def test_samples_that_break_in_validation_count_and_are_named_once(tmp_path: Path) -> None:
    broken = {"validation": [3.0, 2.0, 1.0, 1.0, 1.0], "broken_in_validation": [Broken("v", "cut")]}
    with pytest.raises(TrainError, match=r"^1 sample is broken, .* the last: v: cut;"):
        run_toy(tmp_path, toy_task("toy", **broken))
    assert max(losses(tmp_path)) == 2
    with pytest.raises(Killed):
        run_toy(tmp_path, toy_task("toy", **broken), max_broken=1, kill_at=3)
    run_toy(tmp_path, toy_task("toy", **broken), max_broken=1)
    assert [(row["step"], row["count"]) for row in rows(tmp_path, "broken")] == [(2, 1)]
    assert rows(tmp_path, "done")[0]["broken"] == 1


def test_rows_of_steps_that_are_done_again_are_there_once(tmp_path: Path) -> None:
    task = {"validation": [3.0, 2.0, 1.0], "broken_at": {2: ["a"]}}
    run_toy(tmp_path / "whole", toy_task("toy", **task), max_broken=1)
    for at in (1, 3, 5):
        with pytest.raises(Killed):
            run_toy(tmp_path / "killed", toy_task("toy", **task), kill_at=at, max_broken=1)
    log = tmp_path / "killed" / "log.jsonl"
    with log.open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "st')
    run_toy(tmp_path / "killed", toy_task("toy", **task), max_broken=1)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    seen = [(row["event"], row["step"]) for row in map(json.loads, log.read_text().splitlines())]
    assert len(seen) == len(set(seen)) == 6 + 3 + 1 + 1


def test_a_finished_run_writes_its_checkpoint_again_and_takes_no_step(tmp_path: Path) -> None:
    run_toy(tmp_path)
    before = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    events = run_toy(tmp_path)
    assert [type(event) for event in events] == [DoneEvent]
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == before
    assert len(rows(tmp_path, "done")) == 1


def test_fresh_starts_anew(tmp_path: Path) -> None:
    run_toy(tmp_path)
    first = losses(tmp_path)
    events = run_toy(tmp_path, fresh=True)
    assert [event.step for event in events if isinstance(event, StepEvent)] == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path) == first
    run_toy(tmp_path, fresh=True, identity={"recipe": "another"}, seed=4)
    assert losses(tmp_path) != first


def test_what_comes_before_the_first_step_is_done_once(tmp_path: Path) -> None:
    begun: list[int] = []

    def go(kill_at: int = 0) -> None:
        task = toy_task("toy")

        def begin() -> None:
            begun.append(1)
            with torch.no_grad():
                task.module.get_parameter("embed.weight").mul_(0.5)

        def report(event: Event) -> None:
            if isinstance(event, StepEvent) and event.step == kill_at:
                raise Killed

        run(task, toy_settings(), tmp_path, report, begin=begin, facts={"encode_seconds": 2.5})

    with pytest.raises(Killed):
        go(1)
    assert states(tmp_path) == [0]
    go()
    assert begun == [1]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0]) == {"encode_seconds": 2.5}
    assert max(losses(tmp_path)) == 6


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_states_are_kept_and_the_best(tmp_path: Path, keep: int) -> None:
    task = toy_task("toy", num_steps=10, validation=[3.0, 1.0, 2.0, 2.5, math.nan])
    events = run_toy(tmp_path, task, keep=keep)
    assert states(tmp_path) == sorted({4} | set(range(10, 10 - 2 * keep, -2)))
    assert [event.step for event in events if isinstance(event, ValidationEvent) and event.best] == [2, 4]


def test_the_checkpoint_is_of_the_best_by_validation(tmp_path: Path) -> None:
    scores = [3.0, 1.0, 2.0]
    best, last, short = (tmp_path / name for name in ("best", "last", "short"))
    chosen = run_toy(best, toy_task("toy", validation=scores))[-1]
    assert isinstance(chosen, DoneEvent)
    assert (chosen.best_step, chosen.chosen) == (4, "the checkpoint is of step 4, the best by validation (loss 1.0000)")
    run_toy(last, toy_task("toy", validation=scores), final="last")
    with pytest.raises(Killed):
        run_toy(short, toy_task("toy", num_steps=6), kill_at=4, save_every=4)
    assert any(not torch.equal(weights(best)[name], weights(last)[name]) for name in weights(best))
    learned = toy_task("toy")
    with pytest.raises(Killed):
        run_toy(tmp_path / "four", learned, kill_at=4, save_every=10)
    for name, tensor in weights(best).items():
        assert torch.equal(tensor, learned.module.state_dict()[name]), name


def test_the_best_gets_a_state_even_between_saves(tmp_path: Path) -> None:
    task = toy_task("toy", num_steps=8, validation=[3.0, 2.0, 1.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    run_toy(tmp_path, task, save_every=4, validate_every=1, keep=1)
    assert states(tmp_path) == [3, 8]


def test_no_validation_is_no_event(tmp_path: Path) -> None:
    events = run_toy(tmp_path)
    assert not [event for event in events if isinstance(event, ValidationEvent)]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    task = toy_task("toy", accumulate=4, nan_at=3)
    with pytest.raises(
        TrainError,
        match=r"^step 4: the loss is not a finite number in a batch of sample 3\.0, sample 3\.1.*"
        r"checkpoint is of step 2, the last that was saved$",
    ):
        run_toy(tmp_path, task)
    assert max(losses(tmp_path)) == 3
    state = load_file(tmp_path / "states" / "step-000002" / "shard-00001-of-00001.safetensors")
    written = load_file(tmp_path / "checkpoint" / "model.safetensors")
    learned = {name.removeprefix("weight."): each for name, each in state.items() if name.startswith("weight.")}
    assert learned
    assert all(torch.equal(written[name], each) for name, each in learned.items())
    run_toy(tmp_path, toy_task("toy", accumulate=4))
    run_toy(tmp_path / "whole", toy_task("toy", accumulate=4))
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    task = toy_task("toy", num_steps=2)
    task.module.get_parameter("layers.0.bias").register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]
    before = {name: each.clone() for name, each in task.module.state_dict().items()}
    with pytest.raises(
        TrainError, match=r"^step 1: the gradient is not finite in a batch of sample 0\.0, .*; no state"
    ):
        run_toy(tmp_path, task)
    assert all(torch.equal(each, before[name]) for name, each in task.module.state_dict().items())


def test_too_many_broken_samples_stop_the_run_and_are_named(tmp_path: Path) -> None:
    broken = {0: ["a"], 2: ["a", "b"], 3: ["c"]}
    with pytest.raises(
        TrainError, match=r"^3 samples are broken, and data\.max_broken allows 2; the last: c: cut; `svcli data"
    ):
        run_toy(tmp_path, toy_task("toy", broken_at=broken), max_broken=2)
    assert max(losses(tmp_path)) == 3
    with pytest.raises(TrainError, match="3 samples are broken"):
        run_toy(tmp_path, toy_task("toy", broken_at=broken), max_broken=2)
    run_toy(tmp_path, toy_task("toy", broken_at=broken), max_broken=3)
    assert max(losses(tmp_path)) == 6


def test_a_step_without_a_whole_sample_changes_nothing(tmp_path: Path) -> None:
    task = toy_task("toy", empty_at=[0], num_steps=1, broken_at={0: ["a"]})
    before = {name: each.clone() for name, each in task.module.state_dict().items()}
    (step,) = [event for event in run_toy(tmp_path, task, max_broken=1) if isinstance(event, StepEvent)]
    assert (step.samples, step.grad_norm) == (0, 0.0)
    assert math.isnan(step.loss)
    assert rows(tmp_path, "step")[0]["loss"] is None
    assert all(torch.equal(each, before[name]) for name, each in task.module.state_dict().items())


def test_nothing_to_train_on_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nothing to train on"):
        run_toy(tmp_path, toy_task("toy", num_steps=0))


def test_what_is_frozen_stays(tmp_path: Path) -> None:
    task = toy_task("toy")
    before = task.module.get_parameter("frozen.weight").clone()
    run_toy(tmp_path, task)
    assert torch.equal(task.module.get_parameter("frozen.weight"), before)
    assert torch.equal(weights(tmp_path)["frozen.weight"], before)


@pytest.mark.parametrize("warm_up", [{"warmup_steps": 10}, {"warmup_share": 0.1}], ids=str)
def test_rates_warm_up_and_fall_to_the_minimum(warm_up: dict[str, float]) -> None:
    task = toy_task("toy", num_steps=100, learning_rate=0.01)
    settings = LoopSettings(seed=0, identity={}, min_learning_rate=1e-4, **warm_up)  # type: ignore[arg-type]
    updater = Updater(task, settings, Processes())
    assert updater.peaks == [0.01, 0.005]
    rates = [updater.learning_rate(step, 0.01) for step in range(100)]
    assert rates[0] == pytest.approx(0.001)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(0.01)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4, rel=0.05)
    assert min(rates[10:]) > 1e-4
    assert updater.learning_rate(50, 1e-5) == pytest.approx(1e-5)  # no group rises to a minimum above its peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_of_what_is_computed_and_never_of_weights(precision: str) -> None:
    task = toy_task("toy")
    updater = Updater(task, toy_settings(precision=precision), Processes())
    seen: list[torch.dtype] = []
    task.module.get_submodule("layers.0").register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.dtype)
    )
    (micros, *_) = task.batches(0, 0, 1)
    updater.gather(0, micros, Clock(torch.device("cpu")))
    assert set(seen) == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert {each.dtype for each in task.module.parameters()} == {torch.float32}


def test_deterministic_kernels_are_asked_for_and_given_back(tmp_path: Path) -> None:
    asked: list[bool] = []
    task = toy_task("toy", num_steps=1)
    task.module.register_forward_hook(lambda *_: asked.append(torch.are_deterministic_algorithms_enabled()))
    run_toy(tmp_path, task, deterministic=True)
    run_toy(tmp_path, task, fresh=True)
    assert asked == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: you tried to")],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_ends_is_told_with_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Toy, "forward", fail)
    with pytest.raises(NoMemoryError, match=r"^step 1: memory does not hold the 20 rows of sample 0\.0, .*0\.3; lower"):
        run_toy(tmp_path, toy_task("toy", accumulate=2))
