"""Which patches are retained."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision.config import SELECTORS as SELECTORS_KNOWN
from skipvision.config import Selector
from skipvision.select import split_tokens, token_scores
from tests.skipvision import reference

SELECTORS: tuple[Selector, ...] = ("cls_attention", "received_attention", "first", "random", "uniform")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20, unique=True))
def test_the_best_scored_are_retained_and_both_groups_stay_in_raster_order(
    data: st.DataObject, scores: list[float]
) -> None:
    count = data.draw(st.integers(1, len(scores)))
    retained, rest = split_tokens(torch.tensor([scores, scores[::-1]]), count)
    for row, given_scores in enumerate((scores, scores[::-1])):
        assert (retained[row].tolist(), rest[row].tolist()) == reference.select(given_scores, count)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("count", [1, 5, 15, 16])
def test_every_patch_goes_one_way_even_where_scores_tie(selector: Selector, count: int) -> None:
    scores = token_scores(selector, torch.full((3, 16), 0.5), count)
    retained, rest = split_tokens(scores, count)
    assert retained.shape == (3, count)
    for row in range(3):
        assert sorted(retained[row].tolist() + rest[row].tolist()) == list(range(16))


@pytest.mark.parametrize("count", range(1, 17))
def test_uniform_spreads_the_retained_evenly_whatever_the_picture(count: int) -> None:
    retained, _ = split_tokens(token_scores("uniform", torch.rand(2, 16), count), count)
    assert torch.equal(retained[0], retained[1])
    ends = [*retained[0].tolist(), 16]
    gaps = {after - before for before, after in itertools.pairwise(ends)}
    assert ends[0] == 0
    assert max(gaps) - min(gaps) <= 1


def test_random_draws_anew_for_every_picture_and_call() -> None:
    attention = torch.zeros(2, 256)
    torch.manual_seed(0)
    first, second = (split_tokens(token_scores("random", attention, 96), 96)[0] for _ in range(2))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(split_tokens(token_scores("random", attention, 96), 96)[0], first)


@pytest.mark.parametrize("selector", ["cls_attention", "received_attention"])
def test_what_is_paid_attention_to_ranks(selector: Selector) -> None:
    attention = torch.rand(2, 16)
    assert torch.equal(token_scores(selector, attention, 5), attention)


@pytest.mark.parametrize("count", [1, 5, 16])
def test_first_takes_the_first_whatever_is_paid_to_the_others(count: int) -> None:
    scores = token_scores("first", torch.arange(32.0).view(2, 16), count)
    assert split_tokens(scores, count)[0].tolist() == [list(range(count))] * 2


def test_random_draws_from_the_generator_that_is_given() -> None:
    first, second = (token_scores("random", torch.zeros(2, 9), 3, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)


def test_selectors_are_tested_one_and_all() -> None:
    assert set(SELECTORS) == set(SELECTORS_KNOWN)
