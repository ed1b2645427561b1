"""FLOPs and KV bytes: known shapes by hand, and tiny ones against what torch really multiplies."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skipvision.config import Selector, SkipConfig, TextConfig
from skipvision.cost import (
    decode_flops,
    decoder_flops,
    dense,
    encoder_flops,
    head_flops,
    kv_bytes,
    projector_flops,
    prompt_cost,
    split_flops,
    vision_flops,
)
from skipvision.layout import ImageSpan, TokenLayout, largest_spans, picture_spans
from skipvision.tiles import cut_picture, most_views
from tests.skipvision import zoo
from tests.skipvision.tiny import MERGED, PROMPTS, SKIPS, batch_of, random_pictures, tiny_config, tiny_model

LLAMA3_8B = TextConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    tie_embeddings=False,
)
VICUNA_7B = replace(LLAMA3_8B, vocab_size=32000, intermediate_size=11008, num_kv_heads=32)
MIB = 2**20


def counted(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products that torch runs; the other attention kernels of the CPU are not counted by it."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def test_llama3_reads_576_visual_tokens_in_8_teraflops() -> None:
    assert decoder_flops(LLAMA3_8B, TokenLayout((ImageSpan(576),))) / 1e12 == pytest.approx(8.21, abs=0.005)


def test_text_beside_the_picture_makes_the_saving_smaller() -> None:
    plain = decoder_flops(LLAMA3_8B, TokenLayout((40, ImageSpan(576))))
    ours = decoder_flops(LLAMA3_8B, TokenLayout((40, ImageSpan(100, 156, 2))))
    assert round(100 * ours / plain, 1) == 27.8


@pytest.mark.parametrize(
    ("patches", "span", "percent"),
    [
        (576, ImageSpan(100, 156, 2), 26.5),
        (576, ImageSpan(256, 320, 2), 64.1),
        (576, ImageSpan(64, 156, 2), 20.3),
        (2880, ImageSpan(576, 576, 2), 25.6),
        (1296, ImageSpan(272, 256, 2), 27.1),
    ],
)
def test_without_grouped_queries_the_ffn_weighs_less(patches: int, span: ImageSpan, percent: float) -> None:
    plain = decoder_flops(VICUNA_7B, TokenLayout((ImageSpan(patches),)))
    assert round(100 * decoder_flops(VICUNA_7B, TokenLayout((span,))) / plain, 1) == percent


@pytest.mark.parametrize(
    ("patches", "kept", "mib_before", "mib_after"),
    [(576, 102, 72, 12.75), (576, 258, 72, 32.25), (2880, 578, 360, 72.25), (1296, 274, 162, 34.25)],
)
def test_the_kv_cache_shrinks_to_what_is_kept(patches: int, kept: int, mib_before: float, mib_after: float) -> None:
    assert kv_bytes(LLAMA3_8B, patches) == mib_before * MIB
    assert kv_bytes(LLAMA3_8B, kept) == mib_after * MIB


def test_kv_bytes_follow_the_element_size() -> None:
    assert kv_bytes(LLAMA3_8B, 1) == 128 * 1024
    assert kv_bytes(VICUNA_7B, 1) == 512 * 1024
    assert kv_bytes(LLAMA3_8B, 7, 4) == 2 * kv_bytes(LLAMA3_8B, 7) == 4 * kv_bytes(LLAMA3_8B, 7, 1)


@pytest.mark.parametrize("name", ["image-between", "two-images-apart", "text-only"])
@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_decoder_flops_are_those_that_torch_runs(skip: SkipConfig | None, name: str) -> None:
    model = tiny_model(tiny_config(skip))
    made = batch_of(model, [PROMPTS[name]])
    text, layout = model.config.text, made.layouts[0]
    heads = layout.num_kept * head_flops(text)
    assert counted(lambda: model(made.input_ids, made.visual, made.batch)) == decoder_flops(text, layout) + heads


@pytest.mark.parametrize("new_rows", [1, 3])
def test_decode_flops_are_those_that_torch_runs(new_rows: int) -> None:
    model = tiny_model()
    made = batch_of(model, [PROMPTS["image-between"]])
    text, kept = model.config.text, made.batch.num_kept
    # The cache has room for just these rows: torch multiplies its empty rows as well, and masks them.
    _, cache = model.prefill(made.input_ids, made.visual, made.batch, kept + new_rows)
    ids = torch.full((1, new_rows), 9)
    extra_heads = (new_rows - 1) * head_flops(text)
    assert counted(lambda: model.decode(ids, cache)) == decode_flops(text, kept, new_rows) + extra_heads


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_vision_flops_are_those_that_torch_runs(skip: SkipConfig | None) -> None:
    model = tiny_model(tiny_config(skip))
    vision, pixels = model.config.vision, random_pictures(1)
    with torch.no_grad():
        features, cls_attention = model.vision(pixels)
        tokens = model.projector(features)
    hidden = torch.zeros(1, 1 + vision.num_patches, vision.hidden_size, dtype=torch.float64)
    blocks = sum(counted(lambda block=block: block(hidden, *block.heads(hidden))) for block in model.vision.blocks)  # type: ignore[misc]
    assert encoder_flops(vision) == counted(lambda: model.vision.patch_embed(pixels)) + blocks
    assert projector_flops(model.config) == counted(lambda: model.projector(features))
    by_attention = skip is not None and skip.selector == "cls_attention"
    ranking = 2 * vision.hidden_size * (1 + vision.num_patches) if by_attention else 0
    assert split_flops(model.config) == counted(lambda: model.split(tokens, cls_attention)) + ranking


FAMILIES = {kind.family: kind for kind in zoo.KINDS}
SELECTED: tuple[Selector | None, ...] = (None, "received_attention", "cls_attention", "first")
OF_FAMILIES = [
    (kind, selector)
    for kind, selector in itertools.product(FAMILIES, SELECTED)
    if not (selector == "cls_attention" and kind not in ("llava", "llava_next"))
    if not (selector == "first" and kind not in ("llava_next", "llava_onevision"))
]


@pytest.mark.parametrize(("kind", "selector"), OF_FAMILIES)
def test_a_picture_of_every_family_takes_the_flops_that_torch_runs(kind: str, selector: Selector | None) -> None:
    """With and without CLS, squares of patches, several views, mosaics: all of it, from pixels to rows."""
    model = zoo.ours(FAMILIES[kind])
    retained = model.config.num_tokens if selector == "first" else 5
    model = model.with_skip(None if selector is None else SkipConfig(retained, 3, selector))
    for size in ((20, 90), (33, 60)):
        cut = cut_picture(model.config, *size)
        spans = picture_spans(model.config, cut)
        assert sum(span.num_views for span in spans) == cut.num_views
        pixels = zoo.views(cut).double()
        wanted = sum(vision_flops(model.config, span) for span in spans)
        assert counted(lambda model=model, pixels=pixels, cut=cut: model.encode_picture(pixels, cut)) == wanted  # type: ignore[misc]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_decoder_of_every_family_takes_the_flops_that_torch_runs(kind: str) -> None:
    model = zoo.ours(FAMILIES[kind]).with_skip(SkipConfig(5, 3, "uniform"))
    padded, table, batch = zoo.our_batch(model, [[1, (20, 90), 30]])
    spans = picture_spans(model.config, cut_picture(model.config, 20, 90))
    layout = TokenLayout((1, *spans, 1))
    heads = layout.num_kept * head_flops(model.config.text)
    wanted = decoder_flops(model.config.text, layout) + heads
    assert counted(lambda: model(padded, table, batch)) == wanted
    cost = prompt_cost(model.config, layout)
    assert cost.vision_flops == sum(vision_flops(model.config, span) for span in spans)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_dense_twin_sees_as_many_views(kind: str) -> None:
    config = zoo.ours(FAMILIES[kind]).with_skip(SkipConfig(5, 3, "uniform")).config
    plain = zoo.ours(FAMILIES[kind]).config
    for picture in (cut_picture(config, 20, 90), cut_picture(config, 64, 64)):
        layout = TokenLayout((1, *picture_spans(config, picture)))
        twin_config, twin = dense(config, layout)
        assert twin_config == replace(plain, skip_trained=config.skip_trained)
        assert twin == TokenLayout((1, *picture_spans(plain, picture)))
        assert [span.num_views for span in twin.images] == [span.num_views for span in layout.images]
        encoding = picture.num_views * (encoder_flops(plain.vision) + projector_flops(plain))
        assert prompt_cost(twin_config, twin).vision_flops == encoding


def test_largest_pictures_count_all_their_views() -> None:
    for kind in FAMILIES.values():
        config = zoo.ours(kind).config
        assert sum(span.num_views for span in largest_spans(config)) == most_views(config)


def test_a_prompt_costs_the_sum_of_its_parts() -> None:
    config = tiny_config()
    layout = TokenLayout((3, ImageSpan.of(config), 4, ImageSpan.of(config), 5))
    cost = prompt_cost(config, layout, bytes_per_element=4)
    kept = 12 + 2 * (MERGED.num_retained + 2)
    assert cost.vision_flops == 2 * vision_flops(config, ImageSpan.of(config))
    assert cost.prefill_flops == decoder_flops(config.text, layout) + head_flops(config.text)
    assert cost.decode_flops == decode_flops(config.text, kept)
    assert cost.kv_bytes == kv_bytes(config.text, kept, 4)


def test_the_dense_twin_keeps_every_patch_and_all_text() -> None:
    config = tiny_config()
    layout = TokenLayout((3, ImageSpan.of(config), 4))
    plain_config, plain_layout = dense(config, layout)
    assert plain_config.skip is None
    assert plain_layout.segments == (3, ImageSpan(16), 4)
    assert (plain_layout.num_skipped, plain_layout.num_ids) == (0, layout.num_ids)
    plain, ours = prompt_cost(plain_config, plain_layout), prompt_cost(config, layout)
    assert plain.prefill_flops > ours.prefill_flops
    assert plain.decode_flops > ours.decode_flops
    assert plain.kv_bytes > ours.kv_bytes
    assert ours.vision_flops - plain.vision_flops == split_flops(config)
    assert dense(plain_config, plain_layout) == (plain_config, plain_layout)


def test_text_costs_the_same_with_and_without_skipping() -> None:
    config, layout = tiny_config(), TokenLayout((9,))
    assert prompt_cost(config, layout) == prompt_cost(*dense(config, layout))
    assert prompt_cost(config, layout).vision_flops == 0


@pytest.mark.parametrize("module", ["config", "layout", "cost"])
def test_costs_are_known_where_there_is_no_torch(module: str) -> None:
    """Chat and inspect ask for them without it."""
    check = f"import skipvision.{module}, sys; sys.exit('torch' in sys.modules)"
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", check], check=False, env=os.environ | paths).returncode == 0
