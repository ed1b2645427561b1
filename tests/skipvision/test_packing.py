"""Several questions in one training sequence, and what training them reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from skipvision.config import SkipConfig, Visibility
from skipvision.decoder import FeedForward
from skipvision.layout import BatchLayout, ImageSpan, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.training.packing import PackedText, pack, packed_inputs
from skipvision.training.speaker import IGNORE
from tests.skipvision.tiny import IMAGE, MERGED, SKIPS, random_pictures, tiny_config, tiny_model

# Per picture, its questions with answers. One picture has little to say, one fills the width.
ROWS = [
    [([3, 4, 5, 6], [IGNORE, IGNORE, 6, 2]), ([7, 8], [IGNORE, 2])],
    [([9], [2])],
    [([10, 11, 12], [IGNORE, 13, 2]), ([14, 15, 16], [IGNORE, 17, 2]), ([18, 19], [20, 2])],
]
WIDTH = 8


def picture_layout(model: SkipVisionModel) -> TokenLayout:
    skip = model.config.skip
    return TokenLayout((ImageSpan.of(model.config),), "image" if skip is None else skip.visibility)


def packed_logits(model: SkipVisionModel, layout: TokenLayout, text: PackedText, visual: Tensor) -> Tensor:
    """[B, T, vocab] of the text rows."""
    source, positions, mask, num_kept = packed_inputs(layout, text)
    hidden = model.embed(text.input_ids, visual[:, : layout.length], source)
    return model.decoder.logits(model.decoder(hidden, positions, mask, num_kept)[:, layout.num_kept :])


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_packed_questions_are_as_if_asked_alone(skip: SkipConfig | None) -> None:
    model, text = tiny_model(tiny_config(skip)), pack(ROWS, WIDTH)
    layout = picture_layout(model)
    with torch.no_grad():
        visual = model.encode_images(random_pictures(len(ROWS)))
        packed = packed_logits(model, layout, text, visual)
        for row, blocks in enumerate(ROWS):
            start = 0
            for ids, _ in blocks:
                alone = TokenLayout.of([IMAGE, *ids], IMAGE, model.config)
                batch = BatchLayout.of([alone], 1 + len(ids))
                logits = model(torch.tensor([[IMAGE, *ids]]), visual[row : row + 1], batch)
                # fp64; only the order of the sums differs.
                expected = logits[0, layout.num_kept :]
                torch.testing.assert_close(packed[row, start : start + len(ids)], expected, rtol=0, atol=1e-10)
                start += len(ids)


def test_packed_questions_without_a_picture_are_as_if_asked_alone() -> None:
    model, text = tiny_model(), pack(ROWS, WIDTH)
    with torch.no_grad():
        visual = model.encode_images(random_pictures(len(ROWS)))
        packed = packed_logits(model, TokenLayout(()), text, visual)
        ids = ROWS[0][1][0]
        batch = BatchLayout.of([TokenLayout((len(ids),))], len(ids))
        expected = model(torch.tensor([ids]), visual[:0], batch)[0]
    torch.testing.assert_close(packed[0, 4:6], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("with_picture", [True, False])
def test_no_row_is_without_something_to_attend_to(with_picture: bool) -> None:
    """A softmax over nothing is not a number, and a gradient of 0 times that is none either."""
    model = tiny_model()
    layout = picture_layout(model) if with_picture else TokenLayout(())
    _, _, mask, _ = packed_inputs(layout, pack([*ROWS, []], WIDTH))
    assert mask.any(-1).all()


def test_packing_says_which_row_is_what() -> None:
    text = pack(ROWS[:2], WIDTH)
    assert text.input_ids.tolist() == [[3, 4, 5, 6, 7, 8, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0]]
    assert text.labels.tolist()[0] == [IGNORE, IGNORE, 6, 2, IGNORE, 2, IGNORE, IGNORE]
    assert text.offsets.tolist()[0] == [0, 1, 2, 3, 0, 1, 0, 0]
    assert text.blocks.tolist() == [[1, 1, 1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_more_than_the_width_is_refused() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        pack(ROWS, WIDTH - 1)


def train_step(model: SkipVisionModel, text: PackedText) -> Tensor:
    """One step's gradients; returns that of the projected patches [B, P, D]."""
    features, attention = model.vision(random_pictures(len(ROWS)))
    tokens: Tensor = model.projector(features)
    tokens.retain_grad()
    logits = packed_logits(model, picture_layout(model), text, model.split(tokens, attention))
    answers = text.labels != IGNORE
    nn.functional.cross_entropy(logits[answers], text.labels[answers]).backward()  # type: ignore[no-untyped-call]
    assert tokens.grad is not None
    return tokens.grad


def test_skipped_rows_enter_no_ffn_in_training() -> None:
    model, text = tiny_model(), pack(ROWS, WIDTH)
    rows: list[int] = []

    def count(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows.append(arguments[0].shape[0] * arguments[0].shape[1])

    linears = [part for module in model.modules() if isinstance(module, FeedForward) for part in module.children()]
    assert len(linears) == 3 * model.config.text.num_layers
    for linear in linears:
        linear.register_forward_pre_hook(count)
    train_step(model, text)
    assert rows == [len(ROWS) * (MERGED.num_retained + 2 + WIDTH)] * len(linears)


def test_gradients_reach_projector_and_summary() -> None:
    model, text = tiny_model(), pack(ROWS, WIDTH)
    train_step(model, text)
    for part in ("projector", "summary"):
        for name, parameter in model.get_submodule(part).named_parameters():
            assert parameter.grad is not None, f"{part}.{name}"
            # Either bias of the summary adds the same to every score: no change of the softmax.
            without_effect = name in ("score.bias", "norm.bias")
            assert without_effect or parameter.grad.abs().max() > 1e-6, f"{part}.{name}"


@pytest.mark.parametrize("visibility", ["image", "all"])
def test_gradients_reach_every_patch_through_the_merge(visibility: Visibility) -> None:
    """Also where text sees no skipped row: they teach through the second summary token."""
    model, text = tiny_model(tiny_config(replace(MERGED, visibility=visibility))), pack(ROWS, WIDTH)
    assert (train_step(model, text).abs().amax(-1) > 1e-9).all()


def test_skipped_rows_teach_by_attention_even_where_text_cannot_see_them() -> None:
    """Not only as parts of the mean that a summary starts from: the second summary attends to them in every layer."""
    model, text = tiny_model(), pack(ROWS, WIDTH)
    features, attention = model.vision(random_pictures(len(ROWS)))
    visual = model.split(model.projector(features), attention).detach().requires_grad_()
    logits = packed_logits(model, picture_layout(model), text, visual)
    answers = text.labels != IGNORE
    nn.functional.cross_entropy(logits[answers], text.labels[answers]).backward()  # type: ignore[no-untyped-call]
    assert visual.grad is not None
    first = MERGED.num_retained + 1
    assert (visual.grad[:, first : first + MERGED.num_skipped].abs().amax(-1) > 0).all()
