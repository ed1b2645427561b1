"""Two runs against each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from svcli.bench.compare import compare_reports
from svcli.bench.figures import figure
from svcli.bench.report import STAGES, Peer, Point, Report, Stage, UnlikeError
from svcli.errors import UsageError
from tests.bench.reports import STEADY, beside_a_pruner, report


def test_what_became_faster_is_said_and_what_did_not_is_not() -> None:
    found = compare_reports(report({"prefill": 0.5}), report({"prefill": 0.4}))
    verdicts = {line.title: line.verdict for line in found.lines}
    assert verdicts.pop("prefill, skipped") == "faster"
    assert verdicts.pop("300 rows, prefill, skipped") == "faster"
    assert set(verdicts.values()) == {"open"}
    assert found.conclusions == ("B is faster in prefill, skipped, 300 rows, prefill, skipped.",)


def test_slower_is_the_other_way_round() -> None:
    found = compare_reports(report(), report(scale=2))
    assert {line.verdict for line in found.lines} == {"slower"}
    assert found.lines[0].medians == pytest.approx((1.002, 2.004))


def test_a_run_against_itself_shows_nothing() -> None:
    found = compare_reports(report(), report())
    assert found.conclusions == ("No difference between A and B is shown.",)


def test_a_change_that_is_smaller_than_the_drift_inside_of_a_run_is_open() -> None:
    drifting = [1.0] * 10 + [1.3] * 10
    found = compare_reports(report(values=drifting), report(values=[1.4] * 20))
    assert found.lines[0].verdict == "open: times drifted by 30% inside of a run"


def test_runs_that_others_disturbed_give_no_verdict() -> None:
    for one, other in ((0.6, None), (None, 0.6)):
        found = compare_reports(report(others=one), report(scale=2, others=other))
        assert {line.verdict for line in found.lines} == {"open: the machine was busy with others"}


def test_few_rounds_give_no_verdict() -> None:
    found = compare_reports(report(), report(scale=2, values=STEADY[:5]))
    assert {line.verdict for line in found.lines} == {"open: fewer than 10 rounds"}


def test_runs_that_were_not_measured_alike_are_refused_unless_asked() -> None:
    other = report(threads=3)
    other = other.model_copy(update={"versions": {"svcli": "2", "numpy": "2"}})
    with pytest.raises(
        UnlikeError, match=r"versions: svcli 1 -> 2; settings: threads none -> 3.*--across versions --across settings"
    ):
        compare_reports(report(), other)
    with pytest.raises(UnlikeError, match="settings"):
        compare_reports(report(), other, ("versions",))
    found = compare_reports(report(), other, ("versions", "settings"))
    assert found.differences == ("versions differs: svcli 1 -> 2", "settings differs: threads none -> 3")
    with pytest.raises(UsageError, match="choose among"):
        compare_reports(report(), other, ("weather",))


def test_other_pictures_are_named_in_short() -> None:
    first, second = (
        found.model_copy(update={"settings": found.settings.model_copy(update={"pictures": (digit * 64, "5" * 64)})})
        for found, digit in ((report(), "1"), (report(), "2"))
    )
    (said,) = compare_reports(first, second, ("settings",)).differences
    shown = [" ".join(f"{digit * 37}..." for digit in (number, "5")) for number in "12"]
    assert said == f"settings differs: pictures {shown[0]} -> {shown[1]}"


def test_names_and_loads_may_differ() -> None:
    assert compare_reports(report(), report(name="moved", load=0.9)).differences == ()


def test_parts_that_one_run_lacks_are_left_out() -> None:
    found = compare_reports(report(), report().model_copy(update={"batch": ()}))
    assert not any("batch" in line.title for line in found.lines)
    assert any("300 rows" in line.title for line in found.lines)


def test_another_version_of_a_peer_is_a_difference() -> None:
    def beside(version: str) -> Report:
        found = report()
        peer = Peer(
            name="transformers", version=version, weights="fp32", rows=9, stages={"decode": found.stages["decode"]}
        )
        return found.model_copy(update={"peers": (peer,)})

    with pytest.raises(UnlikeError, match=r"versions: transformers 5\.0 -> 5\.1"):
        compare_reports(beside("5.0"), beside("5.1"))
    assert compare_reports(beside("5.0"), beside("5.0")).differences == ()
    (said,) = compare_reports(beside("5.0"), report()).differences
    assert said.startswith("in A alone, and not compared: transformers, decode per token")


def test_what_a_peer_was_asked_is_held_against_the_same_alone() -> None:
    found = compare_reports(beside_a_pruner(), beside_a_pruner())
    titles = [line.title for line in found.lines if line.title.startswith("openvino-genai")]
    places = ["", " on a picture, dense", " on a picture, CDPruner"]
    assert titles == [
        f"openvino-genai{place}, decode per token, {side}" for place in places for side in ("openvino-genai", "ours")
    ]


def times(source: np.random.Generator, count: int) -> list[float]:
    """Of rounds as a busy machine gives them: 5 % of noise, and one round in eight takes far longer."""
    return (np.exp(0.05 * source.standard_normal(count)) * np.where(source.random(count) < 0.12, 1.5, 1.0)).tolist()  # type: ignore[no-any-return]


def timed(like: Report, source: np.random.Generator, scale: float = 1.0) -> Report:
    """20 figures of 15 rounds each."""

    def stage() -> Stage:
        rounds = {side: [scale * each for each in times(source, 15)] for side in ("dense", "skipped")}
        return Stage(sides={side: figure(values) for side, values in rounds.items()})

    points = [Point(at=at, rows={}, stages={"decode": stage()}) for at in (1, 2, 4, 8)]
    stages = {name: stage() for name in STAGES}
    return like.model_copy(update={"stages": stages, "batch": tuple(points), "context": ()})


def test_equal_runs_seldom_show_any_difference_and_unequal_ones_do() -> None:
    like, source = report(), np.random.default_rng(0)
    wrong = found = 0
    for _ in range(50):
        before = timed(like, source)
        equal = compare_reports(before, timed(like, source))
        assert len(equal.lines) == 20
        wrong += any(not line.verdict.startswith("open") for line in equal.lines)
        lines = compare_reports(before, timed(like, source, 1.2)).lines
        assert not any(line.verdict == "faster" for line in lines)
        found += sum(line.verdict == "slower" for line in lines)
    # 2.5 are to be expected at most; without widening it is 18 of these 50.
    assert wrong <= 5
    assert found >= 0.6 * 50 * 20


def test_what_was_done_about_many_figures_is_said() -> None:
    found = compare_reports(report(), report())
    assert len(found.lines) == 18
    assert found.how_sure.startswith("18 figures are compared, each interval at 99.72 % (Bonferroni), so that")
    (line,) = replace(found, lines=found.lines[:1]).lines
    assert replace(found, lines=(line,)).how_sure == "The interval is at 95 %."


def test_figures_that_one_run_lacks_are_named() -> None:
    less = report().model_copy(update={"batch": ()})
    said = "in {} alone, and not compared: batch 4, decode per token, dense; batch 4, decode per token, skipped"
    assert compare_reports(report(), less).differences == (said.format("A"),)
    assert compare_reports(less, report()).differences == (said.format("B"),)
    picture = report().stages["picture"]
    one, other = (less.model_copy(update={"context": (), "stages": {name: picture}}) for name in ("picture", "vision"))
    with pytest.raises(UnlikeError, match="no figure in common"):
        compare_reports(one, other)
