"""Runs of one and two processes: the same numbers, states that change hands, and ends that nobody waits for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from skipvision.training.distributed import rows_of
from skipvision.training.loop import run
from tests.training.processes import Job, losses, rows, run_toys, weights
from tests.training.toy import toy_settings, toy_task

TOLERANCE = 2e-5
"""Relative. The same fp32 terms are added in another order: a few times 2^-24 a step, and AdamW divides by the root of
small moments."""


NOISE = ("model.summary.score.bias", "model.summary.norm.bias")
"""What a softmax leaves out: of gradients that are zero but for rounding, AdamW makes steps of any size."""
SLOW = {"learning_rate": 0.002}


def run_here(output: Path, kind: str, **settings: object) -> Path:
    run(toy_task(kind, **SLOW, **settings), toy_settings(), output, lambda _event: None)
    return output


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model in one process, one micro-batch a step."""
    return run_here(tmp_path_factory.mktemp("alone"), "tiny")


def check_same(output: Path, reference: Path) -> None:
    one, other = losses(output), losses(reference)
    assert one.keys() == other.keys() == set(range(1, 7))
    for step, numbers in one.items():
        assert numbers == pytest.approx(other[step], rel=TOLERANCE), step
    ours, theirs = weights(output), weights(reference)
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - set(NOISE):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_batches_are_one_batch(alone: Path, tmp_path: Path, accumulate: int) -> None:
    check_same(run_here(tmp_path, "tiny", accumulate=accumulate), alone)


@pytest.mark.parametrize("shard", [True, False], ids=["sharded", "copied"])
def test_two_processes_are_one_at_the_same_global_batch(alone: Path, tmp_path: Path, shard: bool) -> None:
    """With one, two and four micro-batches in each process. Not every process sees pictures in every step, and of the
    toy, whose dropout goes with the samples, not every process uses all weights."""
    numbers = (2, 4, 8)
    jobs = [
        Job(str(tmp_path / f"{kind}{number}"), kind, SLOW | {"accumulate": number}, {"shard": shard})
        for kind in ("toy", "tiny")
        for number in numbers
    ]
    done = run_toys(*jobs, world=2)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for number in numbers:
        check_same(tmp_path / f"tiny{number}", alone)
        check_same(tmp_path / f"toy{number}", run_here(tmp_path / f"reference{number}", "toy", accumulate=number))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["toy", "tiny"])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path, kind: str, world: int) -> None:
    """SIGKILL in the midst of a step, of one process of them."""
    at = random.Random(f"{kind} {world}").randrange(3, 6)
    killed, whole = (
        Job(str(tmp_path / name), kind, {"accumulate": 4}, {"deterministic": True}) for name in ("killed", "whole")
    )
    options = ("--kill-at", str(at), "--kill-rank", str(world - 1))
    assert run_toys(killed, world=world, options=options).returncode != 0
    assert max(losses(tmp_path / "killed")) == at
    assert not (tmp_path / "killed" / "checkpoint").exists()
    done = run_toys(killed, whole, world=world)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    one, other = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(("before", "behind"), [(2, 1), (1, 2), (3, 2)])
def test_a_state_of_any_number_of_processes_loads_into_any(
    alone: Path, tmp_path: Path, before: int, behind: int
) -> None:
    """Three processes have a third of a micro-batch less each: some hold none, and no rows of small weights."""
    job = Job(str(tmp_path), "tiny", SLOW | {"accumulate": 2 if before < 3 else 8})
    assert run_toys(job, world=before, options=("--kill-at", "4")).returncode != 0
    assert sorted(each.name for each in (tmp_path / "states").iterdir()) == ["step-000002", "step-000004"]
    assert len(list((tmp_path / "states" / "step-000004").glob("shard-*"))) == before
    done = run_toys(Job(str(tmp_path), "tiny", SLOW | {"accumulate": 2}), world=behind)
    assert done.returncode == 0, done.stderr
    check_same(tmp_path, alone)


def test_processes_that_validate_go_on_and_write_the_best(tmp_path: Path) -> None:
    """FSDP leaves weights whole behind a forward pass alone, beside what it keeps of them."""
    task = {"accumulate": 2, "validation": [1.0, 0.5, 2.0]}
    reference = run_here(tmp_path / "reference", "tiny", **task)
    job = Job(str(tmp_path / "run"), "tiny", SLOW | task)
    assert run_toys(job, world=2, options=("--kill-at", "5")).returncode != 0
    done = run_toys(job, world=2)
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "run", reference)
    (told,) = rows(tmp_path / "run", "done")
    assert told["best_step"] == 4


def test_where_one_process_dies_the_other_ends(tmp_path: Path) -> None:
    """Within `processes.SECONDS`; a sum of gradients would wait for an hour."""
    done = run_toys(Job(str(tmp_path), task={"accumulate": 2}), world=2, options=("--kill-at", "1", "--kill-rank", "1"))
    assert done.returncode != 0
    assert "Signal 9" in done.stderr


def test_where_one_process_fails_one_sentence_says_so(tmp_path: Path) -> None:
    done = run_toys(Job(str(tmp_path), task={"accumulate": 2}), world=2, options=("--fail-rank", "1"))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert errors == ["Error: process 1 cannot go on"]
    assert "toy.py" not in "".join(line for line in done.stderr.splitlines() if line.lstrip().startswith("File"))


def test_what_all_processes_find_is_said_once(tmp_path: Path) -> None:
    done = run_toys(Job(str(tmp_path), task={"accumulate": 2, "nan_at": 3}), world=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "step 4: the loss is not a finite number in a batch of sample 3.0" in errors[0]
    assert [row["step"] for row in rows(tmp_path, "step")] == [1, 2, 3]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_rows_are_split_as_torch_chunks_them(world: int) -> None:
    for length in (1, 4, 7):
        parts = list(torch.arange(length).chunk(world))
        for rank in range(world):
            expected = parts[rank].tolist() if rank < len(parts) else []
            assert list(rows_of(length, rank, world)) == expected
