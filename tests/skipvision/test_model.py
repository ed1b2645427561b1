"""The model against the naive reference, and against itself: batches, caches, orders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision.config import ModelConfig, SkipConfig
from skipvision.layout import FOREVER, BatchLayout, TokenLayout
from skipvision.model import BatchTensors, SkipVisionModel, attention_mask
from tests.skipvision import reference
from tests.skipvision.tiny import (
    IMAGE,
    PROMPTS,
    SKIPS,
    TOLERANCE,
    VOCAB,
    Batch,
    batch_of,
    picture_tokens,
    random_pictures,
    tiny_config,
    tiny_model,
)

TOKENS = st.integers(2, VOCAB - 1) | st.just(IMAGE)
SPLITS = [[5], [1, 4], [4, 1], [2, 3], [1, 1, 1, 1, 1]]


def logits_by_place(model: SkipVisionModel, given_batch: Batch) -> list[dict[int, np.ndarray[tuple[int], np.dtype]]]:
    """Our logits of each sequence's kept rows, by place in attention order."""
    with torch.no_grad():
        logits = model(given_batch.input_ids, given_batch.visual, given_batch.batch).double().numpy()
    return [
        {int(layout.positions[row]): logits[number, row] for row in range(layout.num_kept)}
        for number, layout in enumerate(given_batch.layouts)
    ]


def assert_agrees_with_reference(model: SkipVisionModel, made: Batch) -> None:
    weights, config = reference.weights_of(model), model.config
    visibility = "image" if config.skip is None else config.skip.visibility
    for ours, rows in zip(logits_by_place(model, made), made.rows, strict=True):
        expected = reference.forward(weights, config.text, rows, visibility).logits
        assert ours.keys() == expected.keys()
        for place, logits in expected.items():
            np.testing.assert_allclose(ours[place], logits, rtol=0, atol=TOLERANCE[model.decoder.embed.weight.dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ids", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_logits_agree_with_the_naive_reference(skip: SkipConfig | None, ids: list[int], dtype: torch.dtype) -> None:
    model = tiny_model(tiny_config(skip), dtype=dtype)
    assert_agrees_with_reference(model, batch_of(model, [ids]))


@pytest.mark.parametrize(
    "config",
    [tiny_config(tied=True), tiny_config(position=False), tiny_config(convs=0)],
    ids=["tied", "unplaced", "unmixed"],
)
def test_logits_agree_whatever_the_head_and_the_projector(config: ModelConfig) -> None:
    model = tiny_model(config)
    assert_agrees_with_reference(model, batch_of(model, [PROMPTS["two-images-apart"]]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=3),
    skip=st.sampled_from(list(SKIPS.values())),
)
def test_logits_of_any_batch_agree_with_the_naive_reference(prompts: list[list[int]], skip: SkipConfig | None) -> None:
    model = tiny_model(tiny_config(skip))
    assert_agrees_with_reference(model, batch_of(model, prompts))


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_visual_rows_agree_with_the_naive_reference(skip: SkipConfig | None) -> None:
    model = tiny_model(tiny_config(skip))
    pixels, weights = random_pictures(3), reference.weights_of(model)
    with torch.no_grad():
        visual = model.encode_images(pixels).numpy()
    for ours, picture in zip(visual, pixels, strict=True):
        tokens, scores = picture_tokens(weights, model.config, picture)
        expected = [row.vector for row in reference.picture_rows(weights, model.config, tokens, scores, 0)]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_rows_of_a_batch_are_as_if_alone(skip: SkipConfig | None) -> None:
    model = tiny_model(tiny_config(skip))
    prompts = list(PROMPTS.values())
    together = batch_of(model, prompts)
    logits, cache = model.prefill(together.input_ids, together.visual, together.batch, capacity=80)
    next_ids = torch.arange(3 * len(prompts)).view(-1, 3)
    behind = model.decode(next_ids, cache)
    image = 0
    for row, ids in enumerate(prompts):
        layout, count = together.layouts[row], ids.count(IMAGE)
        alone, small = model.prefill(
            torch.tensor([ids]), together.visual[image : image + count], BatchLayout.of([layout], len(ids)), capacity=80
        )
        image += count
        # fp64; padded keys change the order of the sums, nothing else.
        torch.testing.assert_close(logits[row], alone[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(behind[row], model.decode(next_ids[row : row + 1], small)[0], rtol=0, atol=1e-10)
        assert cache.lengths[row] == small.lengths[0]
        assert cache.next_positions[row] == small.next_positions[0]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_decoding_in_any_pieces_is_the_same(split: list[int]) -> None:
    """Also with rows of unequal length, where every row writes elsewhere."""
    model = tiny_model()
    made = batch_of(model, [PROMPTS["two-images-apart"], PROMPTS["text-only"], PROMPTS["image-first"]])
    ids = torch.arange(15).view(3, 5) + 30
    _, whole = model.prefill(made.input_ids, made.visual, made.batch, capacity=60)
    expected = model.decode(ids, whole)
    _, cache = model.prefill(made.input_ids, made.visual, made.batch, capacity=60)
    pieces = torch.cat([model.decode(piece, cache) for piece in torch.split(ids, split, dim=1)], 1)
    torch.testing.assert_close(pieces, expected, rtol=0, atol=1e-10)
    assert torch.equal(cache.lengths, whole.lengths)
    assert torch.equal(cache.next_positions, whole.next_positions)


@pytest.mark.parametrize("cut", range(1, 7))
def test_text_in_the_prompt_or_decoded_behind_it_is_the_same(cut: int) -> None:
    """With visibility `image`: which rows came by prefill makes no difference."""
    model = tiny_model()
    ids = [3, IMAGE, 4, 5, 6, 7, 8, 9]
    made = batch_of(model, [ids])
    expected, _ = model.prefill(made.input_ids, made.visual, made.batch, capacity=40)
    layout = TokenLayout.of(ids[:-cut], IMAGE, model.config)
    batch = BatchLayout.of([layout], len(ids) - cut)
    _, cache = model.prefill(made.input_ids[:, :-cut], made.visual, batch, capacity=40)
    logits = model.decode(made.input_ids[:, -cut:], cache)
    torch.testing.assert_close(logits[:, -1], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_prompt_in_two_parts_leaves_what_the_whole_leaves(cut: int) -> None:
    """With visibility `image`, in a batch whose rows differ in length and in where they are cut."""
    model = tiny_model()
    prompts = [[3, IMAGE, 4, 5, 6, IMAGE, 7, 8], [4, 5, IMAGE, 9, 10, 11, 12, 13]]
    made = batch_of(model, prompts)
    expected, whole = model.prefill(made.input_ids, made.visual, made.batch, capacity=60)
    cache = model.new_cache(2, 60)
    num_seen = 0
    for start, end in ((0, cut), (cut, 8)):
        layouts = [TokenLayout.of(ids[start:end], IMAGE, model.config) for ids in prompts]
        # Pictures stand behind one another in the order of the prompts.
        visual = torch.cat(
            [
                made.visual[first + ids[:start].count(IMAGE) : first + ids[:end].count(IMAGE)]
                for first, ids in zip((0, 2), prompts, strict=True)
            ]
        )
        batch = BatchTensors.of(BatchLayout.of(layouts, end - start), torch.device("cpu"))
        logits = model.append(made.input_ids[:, start:end], visual, batch, cache, int(cache.lengths.max()))
        num_seen += len(visual)
    assert num_seen == 3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert torch.equal(cache.lengths, whole.lengths)
    assert torch.equal(cache.next_positions, whole.next_positions)
    for found, wanted in ((cache.keys, whole.keys), (cache.values, whole.values)):
        for layer in range(len(found)):
            for row, length in enumerate(cache.lengths.tolist()):
                torch.testing.assert_close(
                    found[layer][row, :, :length], wanted[layer][row, :, :length], rtol=0, atol=1e-10
                )


def test_the_size_of_the_cache_changes_nothing() -> None:
    model = tiny_model()
    made = batch_of(model, [PROMPTS["image-between"], PROMPTS["image-last"]])
    outputs = []
    for capacity in (made.batch.num_kept + 2, 100):
        _, cache = model.prefill(made.input_ids, made.visual, made.batch, capacity)
        outputs.append(model.decode(torch.tensor([[8, 9], [10, 11]]), cache))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-10)


def test_what_does_not_fit_the_cache_is_refused_and_leaves_it_whole() -> None:
    model = tiny_model()
    made = batch_of(model, [PROMPTS["image-first"]])
    kept = made.batch.num_kept
    with pytest.raises(ValueError, match=f"{kept} rows do not fit a KV cache of {kept - 1}"):
        model.prefill(made.input_ids, made.visual, made.batch, kept - 1)
    _, cache = model.prefill(made.input_ids, made.visual, made.batch, kept + 1)
    with pytest.raises(ValueError, match=f"KV cache of {kept + 1} rows is full"):
        model.decode(torch.tensor([[5, 6]]), cache)
    assert cache.lengths.tolist() == [kept]
    model.decode(torch.tensor([[5]]), cache)


def test_generation_stops_at_the_stop_id_and_at_the_limit_for_each_row_alone() -> None:
    model = tiny_model()
    prompts = [PROMPTS["image-first"], PROMPTS["text-only"]]
    made = batch_of(model, prompts)
    free = model.generate(prompts, made.visual, made.batch, max_new_tokens=6, stop_id=-1)
    assert [len(answer) for answer in free] == [6, 6]
    stop_id = next(token for token in free[0][1:] if token not in free[0][:1])
    stopped = model.generate(prompts, made.visual, made.batch, max_new_tokens=6, stop_id=stop_id)
    cut = [answer[: answer.index(stop_id)] if stop_id in answer else answer for answer in free]
    assert stopped == cut
    assert model.generate(prompts, made.visual, made.batch, max_new_tokens=0, stop_id=-1) == [[], []]


def test_pictures_reach_the_prompt_in_their_order() -> None:
    model = tiny_model()
    ids = PROMPTS["two-images-apart"]
    made = batch_of(model, [ids])
    turned, _ = model.prefill(made.input_ids, made.visual.flip(0), made.batch, capacity=40)
    straight, _ = model.prefill(made.input_ids, made.visual, made.batch, capacity=40)
    assert (turned - straight).abs().max() > 1e-2


def test_prefill_asks_the_head_for_the_last_rows_alone() -> None:
    model = tiny_model()
    made = batch_of(model, [PROMPTS["image-between"], PROMPTS["text-only"]])
    shapes: list[torch.Size] = []
    model.decoder.head.register_forward_pre_hook(lambda _, arguments: shapes.append(arguments[0].shape))
    model.prefill(made.input_ids, made.visual, made.batch, capacity=40)
    assert shapes == [(2, 32)]


def test_without_a_mask_a_plain_decoder_looks_at_all_that_stands_before() -> None:
    decoder = tiny_model(tiny_config(None), dtype=torch.float64).decoder
    rows = torch.randn(
        2, 9, decoder.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    positions = torch.arange(9).expand(2, -1)
    mask = attention_mask(positions, torch.full((2, 9), FOREVER))
    with torch.no_grad():
        causal, masked = decoder(rows, positions, None, 9), decoder(rows, positions, mask, 9)
    np.testing.assert_allclose(causal.numpy(), masked.numpy(), rtol=0, atol=1e-12)


def test_a_new_cache_shares_no_memory() -> None:
    cache = tiny_model().new_cache(2, 5)
    cache.lengths += 1
    assert cache.next_positions.tolist() == [0, 0]


@pytest.mark.parametrize("tied", [True, False])
def test_another_skip_setting_is_the_same_weights_in_the_same_memory(tied: bool) -> None:
    model = tiny_model(tiny_config(tied=tied))
    for skip in (SkipConfig(3, 2), None):
        other, own = model.with_skip(skip), model.state_dict()
        assert other.config.skip == skip
        assert not other.training
        found = other.state_dict()
        assert found.keys() == SkipVisionModel(other.config).state_dict().keys()
        assert all(found[name].data_ptr() == own[name].data_ptr() for name in found)
        assert len(list(other.decoder.parameters())) == len(list(model.decoder.parameters()))
        assert_agrees_with_reference(other, batch_of(other, [PROMPTS["image-between"]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_plain_model_that_is_made_to_skip_takes_means_until_it_is_trained(dtype: torch.dtype) -> None:
    plain = tiny_model(tiny_config(None), dtype=dtype)
    model = plain.with_skip(SkipConfig(3, 2))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    own, found = plain.state_dict(), model.state_dict()
    assert all(found[name].data_ptr() == own[name].data_ptr() for name in own)
    with torch.no_grad():
        rows = model.encode_images(random_pictures(2).to(dtype))
    # Retained, their mean, skipped, theirs; the softmax is taken in fp32.
    torch.testing.assert_close(rows[:, 3], rows[:, :3].mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows[:, 6], rows[:, 4:6].mean(1), rtol=0, atol=1e-6)
    assert_agrees_with_reference(model, batch_of(model, [PROMPTS["two-images-apart"]]))
    assert plain.with_skip(None).summary is None
    assert model.get_parameter("summary.score.weight").requires_grad  # it can learn


def test_a_trained_summary_is_kept_when_the_setting_changes() -> None:
    model = tiny_model()
    other = model.with_skip(SkipConfig(3, 2))
    score = other.get_parameter("summary.score.weight")
    assert score.any()
    assert torch.equal(score, model.get_parameter("summary.score.weight"))
