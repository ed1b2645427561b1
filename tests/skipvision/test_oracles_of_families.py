"""Skip-Vision on the weights of every family, against plain loops: what is seen, what is chosen, what comes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from skipvision.config import ConfigError, ModelConfig, Selector, SkipConfig, Visibility
from skipvision.decoder import Attention, DecoderLayer
from skipvision.layout import SKIPPED, TokenLayout, picture_spans
from skipvision.model import SkipVisionModel
from skipvision.tiles import Cut, token_counts
from tests.skipvision import reference, zoo
from tests.skipvision.tiny import TOLERANCE

KINDS = {kind.name: kind for kind in zoo.KINDS}
FAMILIES = {kind.family: kind for kind in reversed(zoo.KINDS)}
"""One model of each."""
ONE: zoo.Prompt = [3, (20, 90), 20, 30, 40]
SEVERAL: zoo.Prompt = [(20, 90), 20, (90, 21), 30, 9]
TEXT: zoo.Prompt = [9, 10]
ATOL = TOLERANCE[torch.float64]


def has_cls(kind: zoo.Kind) -> bool:
    return zoo.config_of(kind).vision.has_cls


def is_joined(kind: zoo.Kind) -> bool:
    tiles = zoo.config_of(kind).tiles
    return tiles is not None and tiles.is_joined


def skips(kind: zoo.Kind) -> dict[str, SkipConfig]:
    """Every way to choose, with a rest that is merged, that is skipped as it is, and that is dropped."""
    tokens = zoo.config_of(kind).num_tokens
    selectors: list[Selector] = ["received_attention", "random", "uniform"]
    if has_cls(kind):
        selectors.append("cls_attention")
    if is_joined(kind):
        selectors.append("first")
    found = {}
    for selector in selectors:
        retained = tokens if selector == "first" else 5
        whole_rest = 1000 if is_joined(kind) else tokens - retained
        for name, skipped in (("merged", 3), ("unmerged", whole_rest), ("dropped", 0)):
            found[f"{selector} {name}"] = SkipConfig(retained, skipped, selector)
    return found


ALL = [(name, which) for name, kind in KINDS.items() for which in skips(kind)]
OF_FAMILIES = [(name, which) for name, kind in FAMILIES.items() for which in skips(kind)]


def skipping(kind: zoo.Kind, skip: SkipConfig | None) -> SkipVisionModel:
    """With a summary layer that is no mean."""
    model = zoo.ours(kind).with_skip(skip)
    if model.summary is not None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.summary.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


@lru_cache
def seen(kind: zoo.Kind, cut: Cut, ranked_by: str) -> list[tuple[reference.Array, reference.Array]]:
    """Tokens of each view of a picture, and what is paid to each of them, by the reference."""
    weights, config = reference.weights_of(zoo.ours(kind)), zoo.ours(kind).config
    found = []
    for view in zoo.views(cut).double().numpy():
        features, paid = reference.encode(weights, config.vision, view, ranked_by)
        squares = reference.squares(config.vision.grid, config.pixel_shuffle)
        paid = np.array([sum(paid[patch] for patch in square) for square in squares])
        found.append((reference.project(weights, config, features), paid))
    return found


def runs(
    kind: zoo.Kind, model: SkipVisionModel, cut: Cut, drawn: Iterable[Tensor] = ()
) -> list[tuple[reference.Array, reference.Array]]:
    """Tokens of each run of rows of one picture, and the scores that rank them."""
    weights, config = reference.weights_of(model), model.config
    selector = "cls_attention" if config.skip is None else config.skip.selector
    views = seen(kind, cut, "cls_attention" if selector == "cls_attention" else "received_attention")
    if is_joined(kind):
        views = [reference.join(weights, config, cut, *zip(*views, strict=True))]
    draws = iter(drawn)
    return [
        (
            tokens,
            reference.ranking(
                selector,
                paid,
                config.num_retained,
                config.num_tokens,
                next(draws).double().numpy() if selector == "random" else None,
            ),
        )
        for tokens, paid in views
    ]


def draw(config: ModelConfig, cuts: Iterable[Cut]) -> list[list[Tensor]]:
    """What the random selector is about to draw for each picture; the generator is set back."""
    torch.manual_seed(5)
    drawn = []
    for cut in cuts:
        counts = token_counts(config, cut)
        drawn.append(list(torch.empty(len(counts), counts[0]).uniform_()))
    torch.manual_seed(5)
    return drawn


def rows_of(kind: zoo.Kind, model: SkipVisionModel, prompts: list[zoo.Prompt]) -> list[list[reference.Row]]:
    """Each prompt by the reference."""
    weights, config = reference.weights_of(model), model.config
    cuts = [zoo.cuts_of(config, prompt) for prompt in prompts]
    drawn = iter(draw(config, [cut for each in cuts for cut in each]))
    found = []
    for prompt, each in zip(prompts, cuts, strict=True):
        pictures = [run for cut in each for run in runs(kind, model, cut, next(drawn))]
        found.append(reference.prompt_rows(weights, config, zoo.our_ids(config, prompt), zoo.IMAGE, pictures))
    return found


def layouts_of(config: ModelConfig, prompts: list[zoo.Prompt]) -> list[TokenLayout]:
    found = []
    for prompt in prompts:
        spans = [span for cut in zoo.cuts_of(config, prompt) for span in picture_spans(config, cut)]
        found.append(TokenLayout.of(zoo.our_ids(config, prompt), zoo.IMAGE, config, spans))
    return found


def visibility_of(config: ModelConfig) -> Visibility:
    return "image" if config.skip is None else config.skip.visibility


@pytest.mark.parametrize(("name", "which"), ALL)
def test_visual_rows_are_those_of_plain_loops(name: str, which: str) -> None:
    kind = KINDS[name]
    model = skipping(kind, skips(kind)[which])
    weights = reference.weights_of(model)
    for cut in (zoo.cuts_of(model.config, ONE)[0], zoo.cuts_of(model.config, SEVERAL)[1]):
        (drawn,) = draw(model.config, [cut])
        with torch.no_grad():
            ours = model.encode_picture(zoo.views(cut).double(), cut).numpy()
        pieces = runs(kind, model, cut, drawn)
        assert len(ours) == len(pieces)
        for rows, piece, span in zip(ours, pieces, picture_spans(model.config, cut), strict=True):
            expected = reference.picture_rows(weights, model.config, *piece, 0)
            assert len(rows) == len(expected) == span.length
            np.testing.assert_allclose(rows, [row.vector for row in expected], rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_patches_are_attended_to_as_plain_loops_say(kind: zoo.Kind) -> None:
    """Both sums, patch by patch: a rank can agree by chance."""
    model, cut = zoo.ours(kind), Cut(20, 90)
    weights, config = reference.weights_of(model), model.config.vision
    pixels = zoo.views(cut).double()
    with torch.no_grad():
        for selector in ("received_attention", "cls_attention"):
            output = model.vision(pixels, selector)
            features, paid = reference.encode(weights, config, pixels[0].numpy(), selector)
            np.testing.assert_allclose(output.features[0].numpy(), features, rtol=0, atol=1e-10)
            np.testing.assert_allclose(output.attention[0].numpy(), paid, rtol=0, atol=1e-6)
            assert bool(paid.any()) == (selector == "received_attention" or config.has_cls)
        received = model.vision(pixels, "received_attention").attention.sum()
        assert not model.vision(pixels, None).attention.any()
    # Each row pays 1 in each head, some of it to CLS.
    total = config.num_heads
    assert (received < total) if config.has_cls else (abs(received - total) < 1e-5)


@pytest.mark.parametrize(("name", "which"), OF_FAMILIES)
def test_logits_are_those_of_plain_loops(name: str, which: str) -> None:
    """One picture, several, none, in one batch."""
    kind = FAMILIES[name]
    model = skipping(kind, skips(kind)[which])
    prompts = [ONE, SEVERAL, TEXT]
    rows = rows_of(kind, model, prompts)
    padded, table, batch = zoo.our_batch(model, prompts)
    with torch.no_grad():
        logits = model(padded, table, batch).numpy()
    weights = reference.weights_of(model)
    for ours, layout, each in zip(logits, layouts_of(model.config, prompts), rows, strict=True):
        expected = reference.forward(weights, model.config.text, each, visibility_of(model.config)).logits
        places = layout.positions[: layout.num_kept].tolist()
        assert sorted(places) == sorted(expected)
        wanted = np.array([expected[place] for place in places])
        np.testing.assert_allclose(ours[: layout.num_kept], wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES.values() if is_joined(kind)], ids=lambda kind: kind.family)
def test_the_thumbnail_is_retained_whole_and_only_tiles_are_merged(kind: zoo.Kind) -> None:
    """As SV-LLaVA-HD."""
    plain, tokens = zoo.ours(kind), zoo.config_of(kind).num_tokens
    model = skipping(kind, SkipConfig(tokens, 4, "first"))
    (cut,) = zoo.cuts_of(model.config, ONE)
    views = zoo.views(cut).double()
    with torch.no_grad():
        rows, dense = model.encode_picture(views, cut)[0], plain.encode_picture(views, cut)[0]
        alone = plain.projector(plain.vision(views[:1]).features)[0]
    # The encoder sees one view or all of them, whose sums it may add in another order.
    torch.testing.assert_close(rows[:tokens], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(rows[:tokens], dense[:tokens], rtol=0, atol=0)
    merged = reference.merge(dense[tokens:].numpy(), 4)
    np.testing.assert_allclose(rows[tokens + 1 : -1].numpy(), merged, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES.keys())
def test_selectors_that_a_family_cannot_have_are_refused(kind: zoo.Kind) -> None:
    model, tokens = zoo.ours(kind), zoo.config_of(kind).num_tokens
    if not has_cls(kind):
        with pytest.raises(ConfigError, match="cls_attention needs an encoder with a CLS token"):
            model.with_skip(SkipConfig(5, 3, "cls_attention"))
    if is_joined(kind):
        with pytest.raises(ConfigError, match=f"first retains {tokens} tokens, not 5"):
            model.with_skip(SkipConfig(5, 3, "first"))
    else:
        with pytest.raises(ConfigError, match="first needs tiles that are joined"):
            model.with_skip(SkipConfig(tokens, 0, "first"))
        with pytest.raises(ConfigError, match=f"num_skipped must be at most {tokens - 5}"):
            model.with_skip(SkipConfig(5, tokens - 4, "uniform"))
    with pytest.raises(ConfigError, match=f"num_retained must be at most {tokens}"):
        model.with_skip(SkipConfig(tokens + 1, 0, "uniform"))


def merged_in(kind: zoo.Kind, visibility: Visibility = "image") -> SkipVisionModel:
    return skipping(kind, SkipConfig(5, 3, "received_attention", visibility))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_without_skipping_it_is_a_plain_llama(kind: zoo.Kind) -> None:
    model = zoo.ours(kind)
    rows = rows_of(kind, model, [SEVERAL])[0]
    padded, table, batch = zoo.our_batch(model, [SEVERAL])
    with torch.no_grad():
        logits = model(padded, table, batch)[0]
    embeddings = np.array([row.vector for row in rows])
    expected = reference.plain_llama(reference.weights_of(model), model.config.text, embeddings)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES.keys())
def test_memory_order_and_attention_order_are_one_sequence(kind: zoo.Kind) -> None:
    model = merged_in(kind)
    for prompt in (ONE, SEVERAL):
        (rows,), (layout,) = rows_of(kind, model, [prompt]), layouts_of(model.config, [prompt])
        padded, table, batch = zoo.our_batch(model, [prompt])
        positions = torch.from_numpy(layout.positions)
        assert sorted(positions.tolist()) == list(range(len(rows)))
        with torch.no_grad():
            in_memory = model.embed(padded, table, torch.from_numpy(batch.source))[0]
        in_attention = in_memory[positions.argsort()].numpy()
        np.testing.assert_allclose(in_attention, [row.vector for row in rows], rtol=0, atol=ATOL)


@pytest.mark.parametrize("visibility", ["image", "all"])
@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_skipped_row_is_its_start_plus_attention_outputs_and_never_an_ffn(
    kind: zoo.Kind, visibility: Visibility, monkeypatch: pytest.MonkeyPatch
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
    model = merged_in(kind, visibility)
    (rows,) = rows_of(kind, model, [ONE])
    padded, table, batch = zoo.our_batch(model, [ONE])
    with torch.no_grad():
        model(padded, table, batch)
        start = model.embed(padded, table, torch.from_numpy(batch.source))
    trace = reference.forward(reference.weights_of(model), model.config.text, rows, visibility)
    assert len(trace.skipped[0]) == 3 * len(picture_spans(model.config, zoo.cuts_of(model.config, ONE)[0]))
    for layer in range(model.config.text.num_layers):
        skipped = residuals[layer][:, batch.num_kept :]
        expected = (start + torch.stack(attended[: layer + 1]).sum(0))[:, batch.num_kept :]
        torch.testing.assert_close(skipped, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(skipped[0].numpy(), trace.skipped[layer + 1], rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES.keys())
def test_text_before_the_picture_is_untouched_by_any_setting(kind: zoo.Kind) -> None:
    prompt: zoo.Prompt = [3, 4, 5, *ONE]
    logits = []
    for skip in (None, *skips(kind).values()):
        model = skipping(kind, skip)
        padded, table, batch = zoo.our_batch(model, [prompt])
        with torch.no_grad():
            logits.append(model(padded, table, batch)[0, :4])
    for each in logits[1:]:
        torch.testing.assert_close(each, logits[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES.keys())
def test_eviction_is_exact_with_visibility_image_and_never_seen_in_the_first_token(kind: zoo.Kind) -> None:
    forced = [33, 34, 35]
    for visibility in ("image", "all"):
        model = merged_in(kind, visibility)
        (rows,) = rows_of(kind, model, [ONE])
        padded, table, batch = zoo.our_batch(model, [ONE])
        first, cache = model.prefill(padded, table, batch, batch.num_kept + len(forced))
        ours = torch.cat([first, model.decode(torch.tensor([forced]), cache)[0]]).numpy()
        weights, text = reference.weights_of(model), model.config.text
        evicting, keeping = (
            reference.continuation(weights, text, rows, forced, visibility, evict=evict) for evict in (True, False)
        )
        np.testing.assert_allclose(ours, evicting, rtol=0, atol=ATOL)
        np.testing.assert_allclose(ours[0], keeping[0], rtol=0, atol=ATOL)
        if visibility == "image":
            np.testing.assert_allclose(ours, keeping, rtol=0, atol=ATOL)
        else:
            assert np.abs(ours[1:] - keeping[1:]).max() > 100 * ATOL


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_whole_answer_is_that_of_a_decode_that_keeps_every_row(kind: zoo.Kind) -> None:
    model = merged_in(kind)
    (rows,) = rows_of(kind, model, [ONE])
    padded, table, batch = zoo.our_batch(model, [ONE])
    (answer,) = model.generate(padded.tolist(), table, batch, max_new_tokens=5, stop_id=-1)
    wanted = reference.generate(reference.weights_of(model), model.config.text, rows, 5, "image", evict=False)
    assert answer == wanted


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_plain_model_that_is_made_to_skip_takes_means(kind: zoo.Kind) -> None:
    skip = SkipConfig(5, 3, "received_attention")
    model = zoo.ours(kind).with_skip(skip)
    (cut,) = zoo.cuts_of(model.config, ONE)
    with torch.no_grad():
        rows = model.encode_picture(zoo.views(cut).double(), cut)
    # The softmax is taken in fp32.
    torch.testing.assert_close(rows[:, 5], rows[:, :5].mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows[:, -1], rows[:, 6:-1].mean(1), rtol=0, atol=1e-6)
    own = zoo.ours(kind).state_dict()
    found = model.state_dict()
    assert found.keys() - own.keys() == {f"summary.{part}" for part in _SUMMARY}
    assert all(found[each].data_ptr() == own[each].data_ptr() for each in own)


_SUMMARY = ("norm.weight", "norm.bias", "score.weight", "score.bias")


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_cache_holds_text_retained_and_summaries_in_every_layer(kind: zoo.Kind) -> None:
    model = merged_in(kind)
    (rows,), (layout,) = rows_of(kind, model, [SEVERAL]), layouts_of(model.config, [SEVERAL])
    spans = [span for cut in zoo.cuts_of(model.config, SEVERAL) for span in picture_spans(model.config, cut)]
    kept = 3 + (5 + 2) * len(spans)
    padded, table, batch = zoo.our_batch(model, [SEVERAL])
    _, cache = model.prefill(padded, table, batch, kept + 2)
    assert cache.lengths.tolist() == [kept]
    assert cache.next_positions.tolist() == [kept + 3 * len(spans)]
    trace = reference.forward(reference.weights_of(model), model.config.text, rows, "image")
    for layer, keys in enumerate(cache.keys):
        expected = [key for key, what in zip(trace.keys[layer], layout.kinds, strict=True) if what != SKIPPED]
        np.testing.assert_allclose(keys[0, :, :kept].transpose(0, 1).numpy(), expected, rtol=0, atol=ATOL)
        assert not keys[0, :, kept:].any()
    model.decode(torch.tensor([[9]]), cache)
    assert cache.lengths.tolist() == [kept + 1]
    assert cache.next_positions.tolist() == [kept + 3 * len(spans) + 1]


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES.keys())
def test_views_of_several_pictures_do_not_mix(kind: zoo.Kind) -> None:
    """A picture's rows are the same alone and beside others, but for a family that sees others as thumbnails alone."""
    model = merged_in(kind)
    cuts = zoo.cuts_of(model.config, SEVERAL)
    alone = [zoo.cuts_of(model.config, [size])[0] for size in zoo.pictures_of(SEVERAL)]
    assert (cuts == alone) == (kind.family != "llava_onevision")
    _, table, _ = zoo.our_batch(model, [SEVERAL])
    with torch.no_grad():
        pieces = [model.encode_picture(zoo.views(cut).double(), cut).flatten(0, 1) for cut in cuts]
    assert torch.equal(table[0], torch.cat(pieces))


def test_the_families_are_all_there() -> None:
    assert set(FAMILIES) == {"llava", "llava_next", "llava_onevision", "smolvlm", "idefics3"}
    shrunk = replace(zoo.config_of(FAMILIES["llava_onevision"]), skip=None)
    (cut,) = zoo.cuts_of(shrunk, ONE)
    assert (cut.rows, cut.columns) == (1, 3)
    assert sum(token_counts(shrunk, cut)) < 9 + 3 * 10  # which the reference shrinks as well
