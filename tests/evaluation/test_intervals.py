"""Intervals: against values from elsewhere, and against what they promise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from svcli.evaluation.asker import Said
from svcli.evaluation.intervals import Sample
from svcli.evaluation.report import Report
from svcli.evaluation.results import Line
from svcli.evaluation.task import Item, Judged, Task


class Shares:
    """The share of right answers."""

    name = title = source = layout = "shares"
    splits: tuple[str, ...] = ("test",)
    metric = "accuracy"
    max_new_tokens = 1

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        raise NotImplementedError

    def read(self, item: Item, said: str) -> str:
        raise NotImplementedError

    def score(self, item: Item, answer: str) -> float:
        raise NotImplementedError

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        return {self.metric: sum(each.score for each in judged) / len(judged)}


class Pairs(Shares):
    """Pictures with all questions right, as the second half of MME's score is."""

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        pictures: dict[str, list[float]] = {}
        for each in judged:
            pictures.setdefault(each.item.id.rpartition("/")[0], []).append(each.score)
        return {self.metric: sum(min(scores) for scores in pictures.values()) / len(pictures)}


def lines(scores: Sequence[float], per_picture: int = 1) -> list[Line]:
    found = []
    said = Said("", 1, 1, 1, 1.0, ())
    for number, score in enumerate(scores):
        picture, place = divmod(number, per_picture)
        item = Item(f"{picture:04}/{place}", "?", (), None)
        found.append(Line(item, str(picture), said, "", float(score)))
    return found


# Wilson's intervals of 95 %, as R's binom::binom.wilson prints them.
@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (81, 263, 0.2552895, 0.3662185)],
)
def test_a_share_of_independent_answers_has_wilsons_interval(right: int, count: int, low: float, high: float) -> None:
    found = Sample(Shares(), lines([1] * right + [0] * (count - right))).interval()
    assert found is not None
    assert found.method == "Wilson"
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_pictures_are_drawn_and_not_questions() -> None:
    """Four questions that share their fate say as much as one: the interval has twice the width of four that do not."""
    generator = np.random.default_rng(3)
    fates = generator.random(100) < 0.6
    together = Sample(Shares(), lines(np.repeat(fates, 4).tolist(), per_picture=4)).interval()
    apart = Sample(Shares(), lines((generator.random(400) < 0.6).tolist(), per_picture=4)).interval()
    assert together is not None
    assert apart is not None
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("task", [Shares(), Pairs()])
def test_the_truth_is_inside_as_often_as_is_said(task: Task) -> None:
    """95 %: of 60 runs, fewer than 51 once in a thousand times."""
    generator, hits = np.random.default_rng(5), 0
    expected = 0.7 if type(task) is Shares else 0.7**2 * 0.5 + 0.7 * 0.5
    for _ in range(60):
        fates = generator.random((60, 2)) < 0.7
        fates[:30, 1] = fates[:30, 0]  # half of the pairs share their fate
        found = Sample(task, lines(fates.reshape(-1).tolist(), per_picture=2)).interval()
        assert found is not None
        hits += found.low <= expected <= found.high
    assert hits >= 51


def test_a_figure_that_is_no_mean_is_drawn_through_the_task() -> None:
    scores = [1, 1, 1, 0] * 10
    found = Sample(Pairs(), lines(scores, per_picture=2)).interval()
    assert found is not None
    assert found.value == 0.5
    assert found.method == "bootstrap over pictures"
    assert found.low == pytest.approx(0.5 - 1.96 * (0.25 / 20) ** 0.5, abs=0.06)


def test_all_right_is_no_proof_and_one_picture_tells_nothing() -> None:
    found = Sample(Shares(), lines([1] * 20, per_picture=4)).interval()
    assert found is not None
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(5 / (5 + 1.96**2), abs=1e-4)  # Wilson's, of five
    assert Sample(Pairs(), lines([1, 0, 1, 0], per_picture=4)).interval() is None


def test_differences_are_paired_and_told_only_where_the_interval_allows() -> None:
    generator = np.random.default_rng(1)
    dense = (generator.random(200) < 0.8).astype(int)
    better, same = np.maximum(dense, generator.random(200) < 0.3), dense.copy()
    same[:4] = 1 - same[:4]
    by_asker = {"skipped": lines(better.tolist()), "dense": lines(dense.tolist()), "random:4": lines(same.tolist())}
    report = Report.of(Shares(), "test", by_asker, 200)
    first, second = report.sentences()[:2]
    gained = (better - dense).mean()
    assert first.startswith(f"skipped is above dense by {gained:.3g} (")
    assert report.to_dense["random:4"] is not None
    assert not report.to_dense["random:4"].excludes_zero
    assert second.startswith("skipped is above random:4")
    same_again = Report.of(Shares(), "test", {"skipped": by_asker["random:4"], "dense": by_asker["dense"]}, 200)
    assert same_again.sentences()[0].startswith("skipped and dense: no difference is shown in accuracy (")


def test_nothing_right_is_told_in_the_unit_of_the_figure() -> None:
    class Percent(Shares):
        def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
            return {self.metric: 100 * sum(each.score for each in judged) / len(judged)}

    class Points(Shares):
        def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
            return {self.metric: sum(each.score for each in judged)}

    found = Sample(Percent(), lines([0] * 10)).interval()
    assert found is not None
    assert found.high == pytest.approx(27.75328, abs=1e-3)  # Wilson's, of ten
    assert Sample(Points(), lines([0] * 10)).interval() is None


def test_the_same_answers_everywhere_leave_open_what_others_would_be() -> None:
    answers = [1, 0, 1, 1] * 10
    found = Sample(Shares(), lines(answers)).over(Sample(Shares(), lines(answers)))
    assert found is not None
    assert (found.value, found.method) == (0, "Wilson")
    reach = 1.96**2 / (40 + 1.96**2)  # the most that none of 40 allows
    assert (found.low, found.high) == pytest.approx((-reach, reach), abs=1e-4)
    all_of_it = Sample(Shares(), lines([1] * 40)).over(Sample(Shares(), lines([0] * 40)))
    assert all_of_it is not None
    assert (all_of_it.value, all_of_it.high) == (1, 1)
    assert all_of_it.low == pytest.approx(1 - 2 * reach, abs=1e-4)


@pytest.mark.parametrize(("differing", "is_shown"), [(5, False), (6, True)])
def test_a_handful_of_pictures_shows_no_difference(differing: int, is_shown: bool) -> None:
    """Of five coins, all fall to one side once in sixteen times, by chance; of six, once in thirty-two."""
    found = Sample(Shares(), lines([1] * 300)).over(Sample(Shares(), lines([0] * differing + [1] * (300 - differing))))
    assert found is not None
    assert found.excludes_zero is is_shown


def test_too_few_pictures_to_draw_from_are_said() -> None:
    def told(pictures: int) -> list[str]:
        scores = {"skipped": lines([1, 1, 0] * pictures, 3), "dense": lines([1, 0, 0] * pictures, 3)}
        scores["dense"][0] = lines([0])[0]
        return [each for each in Report.of(Shares(), "test", scores, 3 * pictures).sentences() if "too narrow" in each]

    assert told(29) == ["Of 29 pictures alone, drawing them tells too narrow intervals: ask about hundreds."]
    assert not told(30)


def test_what_both_answered_is_compared() -> None:
    by_asker = {"skipped": lines([1] * 10 + [0] * 10), "dense": lines([1] * 10)}
    report = Report.of(Shares(), "test", by_asker, 20)
    assert report.to_dense["skipped"] is not None
    assert report.to_dense["skipped"].value == 0
    assert "dense: 10 of 20 items are answered so far." in report.sentences()
