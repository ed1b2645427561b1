"""Attention pooling of a group into one token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from skipvision.summary import SummaryPool
from tests.skipvision import reference


class Holder(nn.Module):
    """Gives the pool the name that it has in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.summary = SummaryPool(12)


def holder_and_tokens() -> tuple[Holder, Tensor]:
    torch.manual_seed(0)
    holder = Holder().double()
    for parameter in holder.parameters():
        nn.init.normal_(parameter)
    return holder, torch.randn(3, 7, 12, dtype=torch.float64)


def test_pooling_agrees_with_plain_loops() -> None:
    holder, tokens = holder_and_tokens()
    weights = reference.weights_of(holder)
    for ours, image in zip(holder.summary(tokens).detach().numpy(), tokens.numpy(), strict=True):
        # The softmax is taken in fp32.
        np.testing.assert_allclose(ours[0], reference.summarise(weights, image), rtol=0, atol=1e-5)


def test_the_order_of_the_group_does_not_matter() -> None:
    holder, tokens = holder_and_tokens()
    turned = holder.summary(tokens[:, torch.randperm(7)])
    torch.testing.assert_close(turned, holder.summary(tokens), rtol=0, atol=1e-6)


def test_one_token_is_its_own_summary() -> None:
    holder, tokens = holder_and_tokens()
    assert torch.equal(holder.summary(tokens[:, :1]), tokens[:, :1])


def test_it_learns_which_tokens_matter() -> None:
    """Gradients reach the score, the norm in front of it, and every token."""
    holder, tokens = holder_and_tokens()
    tokens.requires_grad_()
    holder.summary(tokens).square().sum().backward()
    for name, parameter in holder.named_parameters():
        assert parameter.grad is not None
        # Either bias adds the same to every score: no change of the softmax.
        assert name.endswith("bias") or parameter.grad.abs().max() > 1e-6
    assert tokens.grad is not None
    assert (tokens.grad.abs().amax(-1) > 0).all()
