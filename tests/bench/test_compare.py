"""Two runs against each other."""

from __future__ import annotations

import pytest

from svcli.bench.compare import compare_reports
from svcli.bench.report import Peer, Report, UnlikeError
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
    for same in (beside("5.0"), report()):
        assert compare_reports(beside("5.0"), same).differences == ()


def test_what_a_peer_was_asked_is_held_against_the_same_alone() -> None:
    found = compare_reports(beside_a_pruner(), beside_a_pruner())
    titles = [line.title for line in found.lines if line.title.startswith("openvino-genai")]
    places = ["", " on a picture, dense", " on a picture, CDPruner"]
    assert titles == [
        f"openvino-genai{place}, decode per token, {side}" for place in places for side in ("openvino-genai", "ours")
    ]
