"""How far apart two runs are, and where that is too far."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from skipvision.layout import ImageSpan
from svcli_export.agreement import (
    TOLERANCES,
    Difference,
    RowAgreement,
    agreeing_rows,
    agreement_of_all,
    difference,
    drawn_cards,
    excess,
    loosest,
    match_rows,
    row_difference,
    tolerance,
    worst,
)

RANDOM = np.random.default_rng(0)
FARTHEST = Difference(inf, -1.0, inf)
ALL_ROWS = RowAgreement(1.0, 162)


def test_figures_are_those_of_the_definition() -> None:
    reference = np.array([3.0, 4.0])
    assert difference(reference, reference) == Difference(0.0, 1.0, 1.0)
    found = difference(np.array([3.0, 0.0]), reference)
    assert found.max_error == 4 / 4
    assert found.cosine == pytest.approx(3 / 5)
    assert found.norm_ratio == pytest.approx(3 / 5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_infinitely_far(value: float) -> None:
    reference = np.ones((3, 4))
    got = reference.copy()
    got[1, 2] = value
    assert row_difference(got, reference) == (FARTHEST, 1)
    assert row_difference(reference, got) == (FARTHEST, 1)
    assert len(excess(FARTHEST, TOLERANCES["int8"], ALL_ROWS)) == 3
    assert agreeing_rows(got, reference, TOLERANCES["int8"]).share == pytest.approx(2 / 3)
    assert worst([Difference(), FARTHEST, Difference()]) == FARTHEST


def test_other_shapes_are_infinitely_far_apart() -> None:
    assert row_difference(np.ones((3, 4)), np.ones((4, 4))) == (FARTHEST, 3)
    assert difference(np.ones(3), np.ones(4)) == FARTHEST


def test_zeros_equal_zeros_and_nothing_else() -> None:
    zeros, ones = np.zeros((1, 4)), np.ones((1, 4))
    assert difference(zeros, zeros) == Difference(0.0, 1.0, 1.0)
    assert difference(zeros, ones) == Difference(1.0, 0.0, 0.0)
    assert difference(ones, zeros) == Difference(inf, 0.0, inf)


def test_one_wrong_row_among_hundreds_shows() -> None:
    reference = RANDOM.standard_normal((500, 16))
    got = reference.copy()
    got[321] = got[320]
    assert difference(got, reference).cosine > 0.98
    found, row = row_difference(got, reference)
    assert found.cosine < 0.9
    assert row == 321
    assert excess(found, TOLERANCES["int8"])


def test_a_row_close_to_zero_is_judged_by_its_error_alone() -> None:
    reference = RANDOM.standard_normal((5, 16))
    reference[2] *= 1e-3
    got = reference.copy()
    got[2] = -reference[2]
    found, _ = row_difference(got, reference)
    assert (found.cosine, found.norm_ratio) == pytest.approx((1.0, 1.0))
    assert 0 < found.max_error < 0.01
    got[2] = reference[3]  # no longer close to zero
    assert row_difference(got, reference)[0].cosine < 0.9


def test_the_worst_of_each_figure_is_kept() -> None:
    each = [Difference(0.1, 0.9, 1.01), Difference(0.2, 0.99, 0.98), Difference(0.0, 1.0, 1.0)]
    assert worst(each) == Difference(0.2, 0.9, 0.98)


def test_visual_rows_below_fp32_are_judged_by_direction_only() -> None:
    chosen_otherwise = Difference(max_error=0.9, cosine=0.97, norm_ratio=1.0)
    assert excess(chosen_otherwise, TOLERANCES["int8"], ALL_ROWS) == []
    assert excess(chosen_otherwise, TOLERANCES["int8"]) == ["error 0.9 above 0.25", "cosine 0.970000 below 0.98"]
    assert len(excess(chosen_otherwise, TOLERANCES["fp32"], ALL_ROWS)) == 2
    assert excess(Difference(0.0, 1.0, 1.2), TOLERANCES["int8"]) == ["norm ratio 1.200 further than 0.05 from 1"]


def test_rows_that_are_others_are_counted() -> None:
    reference = RANDOM.standard_normal((100, 16))
    got = reference * 1.01
    got[:7] = -reference[:7]
    for precision, most in (("fp16", 6), ("bf16", 10), ("int8", 6)):
        limit = TOLERANCES[precision]
        assert agreeing_rows(got, reference, limit) == RowAgreement(0.93, 100)
        for others in (most, most + 1):
            found = excess(Difference(), limit, RowAgreement(1 - others / 100, 100))
            assert found == (
                [] if others == most else [f"only {100 - others:.1f}% of rows agree, {100 - most}% wanted"]
            )
    assert excess(Difference(), TOLERANCES["fp32"], RowAgreement(0.99, 100)) == [
        "only 99.0% of rows agree, 100% wanted"
    ]
    # Two of ten say nothing below fp32, three do.
    assert excess(Difference(), TOLERANCES["int8"], RowAgreement(0.8, 10)) == []
    assert excess(Difference(), TOLERANCES["int8"], RowAgreement(0.7, 10)) == ["only 70.0% of rows agree, 80% wanted"]
    assert agreement_of_all([RowAgreement(0.5, 10), RowAgreement(1.0, 10)]) == RowAgreement(0.75, 10)


def test_the_looser_of_two_tolerances_holds_for_both() -> None:
    fp32, int8 = TOLERANCES["fp32"], TOLERANCES["int8"]
    assert loosest(fp32, int8) == loosest(int8, fp32) == int8


def test_rows_are_matched_within_their_group_only() -> None:
    span = ImageSpan(num_retained=2, num_skipped=2, num_summary=2)
    reference = np.arange(6, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    order = [1, 0, 2, 4, 3, 5]  # retained 0 and 1, summary 2, skipped 3 and 4, summary 5
    np.testing.assert_array_equal(match_rows(reference[order], reference, span), reference)
    across = reference[[3, 1, 2, 0, 4, 5]]
    assert difference(match_rows(across, reference, span), reference).max_error > 0.1


def test_test_cards_are_always_the_same() -> None:
    first, second = drawn_cards(), drawn_cards()
    assert [card.tobytes() for card in first] == [card.tobytes() for card in second]
    assert len({card.tobytes() for card in first}) == len(first) == 3


def test_rounding_itself_is_judged_against_weights_before_it() -> None:
    assert tolerance("int4", same_weights=True) == TOLERANCES["int4"]
    assert tolerance("int4", same_weights=False) != TOLERANCES["int4"]
    for precision in ("fp32", "fp16", "int8"):
        assert tolerance(precision, same_weights=False) == TOLERANCES[precision]


def test_a_token_that_was_retained_otherwise_counts_as_a_row() -> None:
    rows, wanted = np.ones((8, 3)), np.array([[0, 2, 5], [1, 2, 3]])
    for told, share in (
        ([[0, 2, 5], [1, 2, 3]], 1.0),
        ([[0, 2, 6], [1, 2, 3]], 7 / 8),
        ([[0, 2, 6], [0, 2, 4]], 5 / 8),
        ([[0, 5, 2], [1, 2, 3]], 2 / 8),  # out of order
        ([[0, 2], [1, 2]], 2 / 8),
    ):
        assert agreeing_rows(rows, rows, TOLERANCES["int8"], (np.array(told), wanted)).share == share
    turned = np.concatenate([-rows[:4], rows[4:]])
    assert agreeing_rows(turned, rows, TOLERANCES["int8"], (np.array([[0, 2, 6], [1, 2, 3]]), wanted)).share == 4 / 8
