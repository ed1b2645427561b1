"""Which samples are shown when: each as often as it is due, the same for any number of processes."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision.training.plan import Plan, PlanError, Samples, packed

MAX_LENGTH = 40


def samples_of(rows: list[int], weights: list[float] | None = None) -> Samples:
    lengths = np.array(rows, dtype=np.int64)
    return Samples(lengths, lengths % 3 == 0, np.array(weights or [1.0] * len(rows), dtype=np.float64))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rows = draw(st.lists(st.integers(0, MAX_LENGTH), min_size=1, max_size=60).filter(any))
    weights = draw(st.lists(st.sampled_from([1.0, 2.0, 0.5, 0.3]), min_size=len(rows), max_size=len(rows)))
    usable = sum(row > 0 for row in rows)
    micro = draw(st.integers(1, 4))
    return Plan(
        samples_of(rows, weights),
        batch_size=micro * draw(st.integers(1, 4)),
        micro_batch_size=micro,
        max_length=MAX_LENGTH,
        pack=draw(st.booleans()),
        group_by_length=draw(st.booleans()),
        held_out=draw(st.integers(0, usable - 1)),
        seed=draw(st.integers(0, 3)),
    )


def shown(plan: Plan, epoch: int) -> Counter[int]:
    return Counter(sample for sequence in plan.epoch(epoch).sequences for sample in sequence)


@settings(deadline=None)
@given(plans())
def test_each_sample_is_shown_as_often_as_it_is_due(plan: Plan) -> None:
    total: Counter[int] = Counter()
    for epoch in range(10):
        total += shown(plan, epoch)
        for sample in plan.trained_on.tolist():
            due = (epoch + 1) * Fraction(str(plan.samples.weights[sample]))
            assert int(due) <= total[sample] <= -(-due // 1)
    assert set(total) == set(plan.trained_on.tolist())
    held_out = set(plan.held_out.tolist())
    assert not held_out & set(total)
    assert held_out | set(total) == set(np.flatnonzero(plan.samples.rows).tolist())


@settings(deadline=None)
@given(plans())
def test_a_weight_of_a_half_shows_all_samples_in_two_epochs(plan: Plan) -> None:
    both = shown(plan, 0) + shown(plan, 1)
    halves = [sample for sample in plan.trained_on.tolist() if plan.samples.weights[sample] == 0.5]
    assert all(both[sample] == 1 for sample in halves)
    assert abs(sum(shown(plan, 0)[sample] for sample in halves) - len(halves) / 2) <= 0.5


@settings(deadline=None)
@given(plans())
def test_no_sequence_is_too_long(plan: Plan) -> None:
    for epoch in range(2):
        order = plan.epoch(epoch)
        lengths = [sum(int(plan.samples.rows[sample]) for sample in sequence) for sequence in order.sequences]
        assert lengths == order.lengths.tolist()
        assert max(lengths, default=0) <= MAX_LENGTH
        assert plan.pack or all(len(sequence) == 1 for sequence in order.sequences)


@settings(deadline=None)
@given(plans(), st.integers(1, 5))
def test_processes_share_the_micro_batches_of_a_step(plan: Plan, world: int) -> None:
    for step in range(5):
        alone = list(plan.share(step))
        shares = [plan.share(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        in_turn = [micro for each in zip(*shares, strict=True) for micro in each]
        assert in_turn[: len(alone)] == alone
        assert not any(in_turn[len(alone) :])


@settings(deadline=None)
@given(plans())
def test_steps_are_as_large_as_asked_but_for_the_last_of_an_epoch(plan: Plan) -> None:
    step = 0
    for epoch in range(3):
        sequences = list(plan.epoch(epoch).sequences)
        for number in range(plan.steps_of(epoch)):
            micros = plan.share(step + number)
            size = sum(map(len, micros))
            assert all(0 < len(micro) <= plan.micro_batch_size for micro in micros)
            assert size == (plan.batch_size if number < plan.steps_of(epoch) - 1 else len(sequences))
            taken = [sequence for micro in micros for sequence in micro]
            assert Counter(taken) == Counter(sequences[:size])
            sequences = sequences[size:]
        assert not sequences
        step += plan.steps_of(epoch)


@settings(deadline=None)
@given(plans(), st.integers(0, 12))
def test_any_step_can_be_worked_out_alone(plan: Plan, step: int) -> None:
    again = Plan(
        plan.samples,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        max_length=plan.max_length,
        pack=plan.pack,
        group_by_length=plan.group_by_length,
        held_out=len(plan.held_out),
        seed=plan.seed,
    )
    before = [plan.share(each) for each in range(step + 1)]
    assert again.share(step) == before[-1]


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
        plan = Plan(samples_of([5] * 50), batch_size=4, micro_batch_size=2, max_length=9, held_out=5, seed=seed)
        return plan.epoch(epoch).sequences

    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3


def test_length_grouping_saves_padding_and_keeps_pictures_apart() -> None:
    rng = np.random.default_rng(0)
    samples = samples_of(rng.integers(50, 2000, 3000).tolist())
    shuffled, grouped = (
        Plan(samples, batch_size=128, micro_batch_size=8, max_length=2048, group_by_length=group).epoch(0)
        for group in (False, True)
    )
    # Uniform lengths: of 8 at random the longest is 8/9 of the way up. Each of 16 spans 122 rows: 61 too many of 1,086.
    assert shuffled.padding > 0.4
    assert grouped.padding < 0.06
    starts = range(0, len(grouped.sequences), 8)
    kinds = [{bool(samples.has_pictures[each[0]]) for each in grouped.sequences[s : s + 8]} for s in starts]
    assert sum(len(kind) == 2 for kind in kinds) <= 2  # what both leave over


def test_a_step_is_of_short_and_long_samples() -> None:
    samples = samples_of(np.random.default_rng(0).integers(50, 2000, 4096).tolist())
    plan = Plan(samples, batch_size=128, micro_batch_size=8, max_length=2048)
    means = [plan.epoch(0).lengths[start : start + 128].mean() for start in range(0, 4096 - 128, 128)]
    # The mean of 16 groups' uniform lengths: 563 / sqrt(16) rows around 1,025.
    assert np.std(means) < 250


def test_packing_leaves_little_room() -> None:
    samples = samples_of(np.random.default_rng(0).integers(50, 1000, 5000).tolist())
    plan = Plan(samples, batch_size=16, micro_batch_size=4, max_length=2048, pack=True)
    order = plan.epoch(0)
    assert order.lengths.sum() / (len(order.sequences) * 2048) > 0.97


def test_packing_takes_the_tightest_place() -> None:
    rows = np.array([6, 5, 4, 3, 2], dtype=np.int64)
    assert packed(np.arange(5), rows, 10) == [(0, 2), (1, 3, 4)]


def test_num_steps_of_part_of_an_epoch() -> None:
    plan = Plan(samples_of([5] * 40), batch_size=4, micro_batch_size=2, max_length=9)
    assert [plan.num_steps(epochs) for epochs in (0.01, 0.5, 1, 2.3)] == [1, 5, 10, 23]


def test_one_sample_is_a_step() -> None:
    plan = Plan(samples_of([5]), batch_size=128, micro_batch_size=8, max_length=9)
    assert plan.share(7) == [((0,),)]
    assert plan.share(7, 1, 2) == [()]


def test_a_tiny_weight_ends() -> None:
    plan = Plan(samples_of([5], [1e-9]), batch_size=1, micro_batch_size=1, max_length=9)
    assert plan.share(0) == [((0,),)]


@pytest.mark.parametrize(
    ("rows", "held_out", "words"),
    [([], 0, "no sample"), ([0, 0], 0, "no sample"), ([3, 3], 2, "validation_samples takes 2 of 2")],
)
def test_nothing_to_train_on_is_one_sentence(rows: list[int], held_out: int, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Plan(samples_of(rows), batch_size=1, micro_batch_size=1, max_length=9, held_out=held_out)
