"""The one-shot merge of what will be skipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipvision.merge import merge_tokens
from tests.skipvision import reference


def random_tokens(images: int, count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(images, count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), count=st.integers(1, 14), seed=st.integers(0, 99))
def test_merge_agrees_with_plain_loops(data: st.DataObject, count: int, seed: int) -> None:
    num_merged = data.draw(st.integers(1, count))
    tokens = random_tokens(2, count, 6, seed)
    for ours, image in zip(merge_tokens(tokens, num_merged).numpy(), tokens.numpy(), strict=True):
        np.testing.assert_allclose(ours, reference.merge(image, num_merged), rtol=0, atol=1e-12)


def test_all_tokens_are_in_the_merged_ones_once() -> None:
    """And so the means, weighted by how many are in each, add up to what went in."""
    tokens = random_tokens(3, 12, 6)
    merged = merge_tokens(tokens, 4)
    one_hot = torch.eye(12, dtype=torch.float64).expand(3, -1, -1)
    # Members show in channels that weigh next to nothing in the similarity.
    marked = merge_tokens(torch.cat([tokens, one_hot * 1e-6], -1), 4)
    torch.testing.assert_close(marked[..., :6], merged, rtol=0, atol=1e-12)
    members = marked[..., 6:] > 0
    assert (members.sum(1) == 1).all()
    counts = members.sum(2, keepdim=True)
    torch.testing.assert_close((merged * counts).sum(1), tokens.sum(1), rtol=0, atol=1e-12)


def test_merging_keeps_the_least_redundant_tokens_apart() -> None:
    """Copies of one token and two loners, merged to three: the loners stay as they are."""
    copies, loners = torch.tensor([[1.0, 0, 0]] * 5), torch.tensor([[0, 1.0, 0], [0, 0, 1.0]])
    merged = merge_tokens(torch.cat([loners[:1], copies, loners[1:]])[None], 3)[0]
    assert merged.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_merging_to_nothing_leaves_nothing() -> None:
    assert merge_tokens(random_tokens(2, 5, 3), 0).shape == (2, 0, 3)


def test_as_many_as_there_are_come_back_in_their_place() -> None:
    tokens = random_tokens(2, 5, 3)
    assert torch.equal(merge_tokens(tokens, 5), tokens)


@pytest.mark.parametrize("zeros", [1, 5, 8])
def test_zero_tokens_are_no_division_by_zero(zeros: int) -> None:
    tokens = random_tokens(1, 8, 4)
    tokens[:, :zeros] = 0
    tokens.requires_grad_()
    merged = merge_tokens(tokens, 3)
    merged.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(merged).all()
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()


@pytest.mark.parametrize("place", range(8))
def test_a_zero_token_does_not_disturb_the_matching_of_the_others(place: int) -> None:
    """Five copies, two loners and nothing, merged to four: the copies become one."""
    tokens = [[1.0, 0, 0]] * 5 + [[0, 1.0, 0], [0, 0, 1.0]]
    tokens.insert(place, [0.0, 0, 0])
    merged = merge_tokens(torch.tensor([tokens]), 4)[0]
    assert sorted(merged.tolist()) == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_gradients_reach_every_token_by_its_share_in_a_mean() -> None:
    """A token in a mean of n takes 1/n of the gradient of that row, and each row hands out all of its own."""
    tokens = random_tokens(2, 10, 4).requires_grad_()
    merged = merge_tokens(tokens, 3)
    merged[..., 0].sum().backward()  # type: ignore[no-untyped-call]
    assert tokens.grad is not None
    shares = tokens.grad[..., 0]
    assert (shares > 0).all()
    torch.testing.assert_close(shares.sum(1), torch.full((2,), 3.0, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not tokens.grad[..., 1:].any()


def test_training_in_mixed_precision_merges_the_same_tokens() -> None:
    tokens = random_tokens(4, 40, 32).float()
    expected = merge_tokens(tokens, 8)
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge_tokens(tokens, 8)
    # bf16 rounds the means by up to 2^-8 of values below 3; another partner would be off by about 1.
    torch.testing.assert_close(merged.float(), expected, rtol=0, atol=0.05)


def test_a_mean_of_many_is_divided_by_all_of_them() -> None:
    """In bf16 too, where 259 would be 260."""
    tokens = torch.zeros(1, 259, 2, dtype=torch.bfloat16)
    tokens[..., 0], tokens[0, 0, 1] = 1, 1
    merged = merge_tokens(tokens, 1)
    assert torch.equal(merged[0, 0, 1], torch.tensor(1 / 259).bfloat16())
