"""PyTorch computes in fp32 from fp16 weights, with one module's fp32 weights in memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from svcli_export.reference import computing_in_fp32, own_weights
from tests.export.tiny import IMAGE_SIZE, SKIP, tiny_model

PROMPT = [2, 5, 1, 6, 7, 3]


def outcome(model: SkipVisionModel) -> tuple[Tensor, Tensor]:
    """Visual rows and logits."""
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    batch = BatchLayout.of([TokenLayout.of(PROMPT, 1, model.config)], len(PROMPT))
    with torch.no_grad():
        visual = model.encode_images(pixels)
        return visual, model(torch.tensor([PROMPT]), visual, batch)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_computes_what_its_fp32_copy_does(dtype: torch.dtype, tied: bool) -> None:
    half, whole = tiny_model(SKIP, tied=tied).to(dtype), tiny_model(SKIP, tied=tied).to(dtype).float()
    stored = dict(half.named_parameters())
    with computing_in_fp32(half, own_weights(half)):
        found = outcome(half)
    for got, wanted in zip(found, outcome(whole), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert {name: id(each) for name, each in half.named_parameters()} == {
        name: id(each) for name, each in stored.items()
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in half.modules())


def test_one_matrix_is_in_fp32_at_a_time() -> None:
    half = tiny_model().half()
    own, most = own_weights(half), 0
    alive: list[weakref.ref[Tensor]] = []
    read: set[str] = set()

    def weights(name: str) -> Tensor:
        nonlocal most
        values = own(name)
        if values.dim() > 1:
            most = max(most, sum(each() is not None for each in alive))
            alive.append(weakref.ref(values))
        read.add(name)
        return values

    with computing_in_fp32(half, weights):
        outcome(half)
    unread = {name for name, _ in half.named_parameters() if name.startswith("vision.blocks.2.")}
    assert read == {name for name, _ in half.named_parameters(remove_duplicate=False)} - unread
    # Beside the matrix of a layer, what the encoder and the projector have of their own: positions, rows and columns.
    assert most <= 2


def test_what_was_swapped_in_goes_when_a_module_fails() -> None:
    class Failing(nn.Linear):
        def forward(self, _: Tensor) -> Tensor:
            assert self.weight.dtype == torch.float32
            raise ValueError("no")

    model = Failing(2, 2).half()
    with pytest.raises(ValueError, match="no"), computing_in_fp32(model, own_weights(model)):
        model(torch.ones(1, 2))
    assert model.weight.dtype == torch.float16
    assert not model._forward_hooks
