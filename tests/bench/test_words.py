"""Sentences say what intervals allow, and nothing else."""

from __future__ import annotations

import pytest

from svcli.bench.words import conclusions, noise
from tests.bench.reports import STEADY, beside_a_pruner, report


def test_what_became_shorter_longer_and_neither_is_said_apart() -> None:
    shorter, longer, neither, decoding = conclusions(report({"prefill": 0.5, "vision": 1.2, "decode": 1.0}))
    assert shorter == "Skipping shortened prefill to 50.0% (50.0 to 50.0) of the dense time."
    assert longer == "Skipping lengthened vision to 120.0% (120.0 to 120.0) of the dense time."
    assert "decode per token" in neither
    assert "a step of 4 sequences" in neither
    assert "prefill" not in neither
    assert "50.0% are saved" in decoding


def test_nothing_is_claimed_of_few_rounds() -> None:
    assert conclusions(report({"prefill": 0.5}, values=STEADY[:9])) == [
        "9 rounds are too few to say what is faster; 10 at least are needed."
    ]


def test_nothing_is_claimed_where_others_took_the_cores() -> None:
    crowded = report({"prefill": 0.5}, others=0.6)
    assert conclusions(crowded) == [
        "Others took 0.6 of 2 cores meanwhile: nothing is concluded; measure again when the machine is quiet."
    ]
    assert len(conclusions(report({"prefill": 0.5}, others=0.5))) == 3
    assert noise(report(others=0.3)) == ["others took 0.3 of 2 cores while the stages were measured"]
    assert noise(report(others=0.1)) == []


def test_nothing_is_claimed_of_one_side() -> None:
    both = report()
    assert conclusions(both.model_copy(update={"sides": {"skipped": both.sides["skipped"]}})) == []


def test_a_busy_a_jumpy_and_a_drifting_machine_are_told() -> None:
    assert noise(report()) == []
    assert "load average 1.5 on 2 cores" in noise(report(load=1.5))[0]
    jumpy = noise(report(values=[1, 1, 1, 1, 2] * 4))
    assert len(jumpy) == 1
    assert "prefill dense (2.0 x)" in jumpy[0]
    (drifting,) = noise(report(values=[1.0] * 10 + [1.2] * 10))
    assert "vision dense (20%)" in drifting


def test_a_ratio_that_turns_around_in_the_middle_gives_no_verdict() -> None:
    from svcli.bench.figures import compared

    dense, skipped = [1.0] * 20, [0.5] * 12 + [1.01] * 8
    found = compared({"dense": dense, "skipped": skipped})
    assert found.ratio is not None
    assert found.ratio.ratio == 0.5
    assert found.verdict == "open"


@pytest.mark.parametrize("values", [[0.0] * 12, [1.0] * 11 + [0.0]])
def test_a_counter_that_stood_still_has_no_ratio(values: list[float]) -> None:
    from svcli.bench.figures import compared

    assert compared({"dense": [1.0] * 12, "skipped": values}).ratio is None


def test_what_a_peer_was_asked_is_said() -> None:
    said = [sentence for sentence in conclusions(beside_a_pruner()) if "openvino" in sentence]
    told = "decode per token faster, 50.0% (50.0 to 50.0) of its time."
    assert said == [
        f"Our decoder on text, against openvino-genai: {told}",
        f"Our dense side on a picture, against openvino-genai: {told}",
        f"Our skipped side on a picture, against openvino-genai with CDPruner: {told}",
    ]


def test_peers_beside_one_side_alone_are_told_too() -> None:
    both = beside_a_pruner()
    alone = both.model_copy(update={"sides": {"skipped": both.sides["skipped"]}})
    assert conclusions(alone) == [said for said in conclusions(both) if "openvino" in said]
    assert len(conclusions(alone)) == 3
