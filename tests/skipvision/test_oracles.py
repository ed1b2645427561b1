"""What holds for Skip-Vision by its construction, whatever the weights: one test for each promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from skipvision.config import SkipConfig, Visibility
from skipvision.cost import decoder_flops
from skipvision.decoder import Attention, DecoderLayer
from skipvision.layout import SKIPPED, ImageSpan, TokenLayout
from skipvision.merge import merge_tokens
from skipvision.summary import SummaryPool
from tests.skipvision import reference
from tests.skipvision.test_cost import LLAMA3_8B
from tests.skipvision.tiny import (
    IMAGE,
    MERGED,
    PROMPTS,
    SKIPS,
    TOLERANCE,
    batch_of,
    tiny_config,
    tiny_model,
)

VISIBILITIES: tuple[Visibility, ...] = ("image", "all")
WITH_IMAGES = {name: ids for name, ids in PROMPTS.items() if IMAGE in ids}


@pytest.mark.parametrize("ids", PROMPTS.values(), ids=PROMPTS.keys())
def test_without_skipping_it_is_a_plain_llama(ids: list[int]) -> None:
    model = tiny_model(tiny_config(None))
    made = batch_of(model, [ids])
    with torch.no_grad():
        logits = model(made.input_ids, made.visual, made.batch)[0]
    embeddings = np.array([row.vector for row in made.rows[0]])
    expected = reference.plain_llama(reference.weights_of(model), model.config.text, embeddings)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_memory_order_and_attention_order_are_one_sequence(skip: SkipConfig | None) -> None:
    """Positions are 0 to L - 1, each once, and every row carries the vector that belongs at its position."""
    model = tiny_model(tiny_config(skip))
    for ids in PROMPTS.values():
        made = batch_of(model, [ids])
        positions = torch.from_numpy(made.layouts[0].positions)
        assert sorted(positions.tolist()) == list(range(len(made.rows[0])))
        with torch.no_grad():
            in_memory = model.embed(made.input_ids, made.visual, torch.from_numpy(made.batch.source))[0]
        in_attention = in_memory[positions.argsort()]
        expected = np.array([row.vector for row in made.rows[0]])
        np.testing.assert_allclose(in_attention.numpy(), expected, rtol=0, atol=TOLERANCE[torch.float64])
        assert torch.equal(in_attention[positions], in_memory)


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_a_skipped_row_is_its_start_plus_attention_outputs_and_never_an_ffn(
    visibility: Visibility, monkeypatch: pytest.MonkeyPatch
) -> None:
    attended: list[Tensor] = []
    residuals: list[Tensor] = []
    attend, feed_forward = Attention.attend, DecoderLayer.feed_forward

    def spy_attend(self: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        attended.append(attend(self, query, key, value, mask))
        return attended[-1]

    def spy_feed_forward(self: DecoderLayer, hidden: Tensor, num_kept: int) -> Tensor:
        residuals.append(feed_forward(self, hidden, num_kept))
        return residuals[-1]

    monkeypatch.setattr(Attention, "attend", spy_attend)
    monkeypatch.setattr(DecoderLayer, "feed_forward", spy_feed_forward)
    model = tiny_model(tiny_config(replace(MERGED, visibility=visibility)))
    made = batch_of(model, [PROMPTS["two-images-apart"]])
    with torch.no_grad():
        model(made.input_ids, made.visual, made.batch)
        start = model.embed(made.input_ids, made.visual, torch.from_numpy(made.batch.source))
    kept = made.batch.num_kept
    trace = reference.forward(reference.weights_of(model), model.config.text, made.rows[0], visibility)
    for layer in range(model.config.text.num_layers):
        expected = start + torch.stack(attended[: layer + 1]).sum(0)
        torch.testing.assert_close(residuals[layer][:, kept:], expected[:, kept:], rtol=0, atol=1e-12)
        ours = residuals[layer][0, kept:].numpy()
        np.testing.assert_allclose(ours, trace.skipped[layer + 1], rtol=0, atol=TOLERANCE[torch.float64])


def test_text_before_the_image_is_untouched_by_any_setting() -> None:
    ids = PROMPTS["image-between"]
    before = ids.index(IMAGE)
    logits = []
    for skip in SKIPS.values():
        model = tiny_model(tiny_config(None))
        skipping = tiny_model(tiny_config(skip))
        skipping.load_state_dict(model.state_dict(), strict=False)
        made = batch_of(skipping, [ids])
        with torch.no_grad():
            logits.append(skipping(made.input_ids, made.visual, made.batch)[0, :before])
    for one, other in itertools.pairwise(logits):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("ids", WITH_IMAGES.values(), ids=WITH_IMAGES.keys())
def test_the_first_generated_token_does_not_depend_on_eviction(ids: list[int], visibility: Visibility) -> None:
    model = tiny_model(tiny_config(replace(MERGED, visibility=visibility)))
    made = batch_of(model, [ids])
    logits, _ = model.prefill(made.input_ids, made.visual, made.batch, capacity=40)
    weights = reference.weights_of(model)
    for evict in (False, True):
        expected = reference.continuation(weights, model.config.text, made.rows[0], [], visibility, evict=evict)
        np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("ids", WITH_IMAGES.values(), ids=WITH_IMAGES.keys())
def test_eviction_is_exact_where_only_the_image_sees_its_skipped_rows(ids: list[int]) -> None:
    """A whole answer, and its logits, against a decode that keeps every row."""
    model = tiny_model()
    made = batch_of(model, [ids])
    weights, text = reference.weights_of(model), model.config.text
    answer = model.generate([ids], made.visual, made.batch, max_new_tokens=6, stop_id=-1)[0]
    assert answer == reference.generate(weights, text, made.rows[0], 6, "image", evict=False)
    first, cache = model.prefill(made.input_ids, made.visual, made.batch, capacity=40)
    ours = torch.cat([first, model.decode(torch.tensor([answer]), cache)[0]])
    keeping = reference.continuation(weights, text, made.rows[0], answer, "image", evict=False)
    np.testing.assert_allclose(ours.numpy(), keeping, rtol=0, atol=TOLERANCE[torch.float64])


def test_eviction_is_an_approximation_where_all_see_skipped_rows() -> None:
    """Ours is the paper's decode without skipped rows; a decode that keeps them says something else."""
    model = tiny_model(tiny_config(replace(MERGED, visibility="all")))
    ids = PROMPTS["two-images-apart"]
    made = batch_of(model, [ids])
    weights, text = reference.weights_of(model), model.config.text
    forced = [33, 34, 35]
    first, cache = model.prefill(made.input_ids, made.visual, made.batch, capacity=40)
    ours = torch.cat([first, model.decode(torch.tensor([forced]), cache)[0]]).numpy()
    evicting, keeping = (
        reference.continuation(weights, text, made.rows[0], forced, "all", evict=evict) for evict in (True, False)
    )
    np.testing.assert_allclose(ours, evicting, rtol=0, atol=TOLERANCE[torch.float64])
    assert np.abs(ours[1:] - keeping[1:]).max() > 100 * TOLERANCE[torch.float64]


def test_a_summary_without_weights_is_the_mean() -> None:
    pool = SummaryPool(32).double()
    torch.nn.init.zeros_(pool.score.weight)
    tokens = torch.randn(3, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # The softmax is taken in fp32: each weight is 1/7 to 6e-8.
    torch.testing.assert_close(pool(tokens), tokens.mean(1, keepdim=True), rtol=0, atol=1e-6)


def test_merging_to_as_many_is_nothing_and_disjoint_clusters_become_their_means() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 6, 8, dtype=torch.float64, generator=generator)
    assert merge_tokens(tokens, 6) is tokens
    # Three directions at right angles, each with two tokens on it and one that leans away, along an axis of its own.
    # The leaning one is the least redundant of its cluster, so it is what the other two are merged into.
    axes, leaning = torch.eye(6, dtype=torch.float64), torch.tensor([0.0, 0.0, 0.3], dtype=torch.float64)
    lengths = torch.rand(3, 3, 1, dtype=torch.float64, generator=generator) + 0.5
    clusters = lengths * (axes[:3, None] + leaning[None, :, None] * axes[3:, None])
    shuffled = clusters.flatten(0, 1)[torch.randperm(9, generator=generator)]
    merged = merge_tokens(shuffled[None], 3)[0]
    means = clusters.mean(1)
    torch.testing.assert_close(merged[merged[:, :3].argmax(1).argsort()], means, rtol=0, atol=1e-12)


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_the_cache_holds_text_retained_and_summaries_and_positions_go_on_from_the_full_length(
    visibility: Visibility,
) -> None:
    model = tiny_model(tiny_config(replace(MERGED, visibility=visibility)))
    made = batch_of(model, [PROMPTS["two-images-apart"]])
    num_text, num_images = 5, 2
    kept = num_text + num_images * (MERGED.num_retained + 2)
    length = kept + num_images * MERGED.num_skipped
    _, cache = model.prefill(made.input_ids, made.visual, made.batch, capacity=kept + 3)
    assert cache.lengths.tolist() == [kept]
    assert cache.next_positions.tolist() == [length]
    trace = reference.forward(reference.weights_of(model), model.config.text, made.rows[0], visibility)
    kinds = made.layouts[0].kinds
    for layer, keys in enumerate(cache.keys):
        assert keys.shape == (1, 2, kept + 3, 10)
        expected = np.array([key for key, kind in zip(trace.keys[layer], kinds, strict=True) if kind != SKIPPED])
        ours = keys[0, :, :kept].transpose(0, 1).numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE[torch.float64])
        assert not keys[0, :, kept:].any()
    for step in range(1, 4):
        model.decode(torch.tensor([[9]]), cache)
        assert cache.lengths.tolist() == [kept + step]
        assert cache.next_positions.tolist() == [length + step]


@pytest.mark.parametrize(
    ("patches", "retained", "skipped", "percent"),
    [
        (576, 100, 156, 22.9),
        (576, 256, 320, 56.4),
        (1296, 272, 256, 24.6),
        (2880, 576, 576, 23.1),
        (576, 64, 156, 16.6),
    ],
)
def test_visual_tokens_cost_this_share_of_the_plain_decoder(
    patches: int, retained: int, skipped: int, percent: float
) -> None:
    plain = decoder_flops(LLAMA3_8B, TokenLayout((ImageSpan(patches),)))
    ours = decoder_flops(LLAMA3_8B, TokenLayout((ImageSpan(retained, skipped, 2),)))
    assert round(100 * ours / plain, 1) == percent
