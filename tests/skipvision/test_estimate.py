"""The paper's settings cost what its arithmetic says, and never less than nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipvision.config import ConfigError, ModelConfig, Selector, SkipConfig
from skipvision.cost import dense, encoder_flops, projector_flops, prompt_cost
from skipvision.estimate import Estimate, estimate
from skipvision.known_models import known_model
from skipvision.layout import ImageSpan, TokenLayout
from skipvision.presets import PRESETS, Setting
from skipvision.roofline import GPUS, Gpu
from tests.skipvision.tiny import tiny_config

MIB = 2**20


def config_of(name: str) -> ModelConfig:
    model = known_model(name)
    assert model is not None
    return model.config


def share(found: Estimate) -> float:
    return round(100 * found.skipped.visual_flops / found.dense.visual_flops, 1)


@pytest.mark.parametrize(
    ("preset", "percent", "mib"),
    [
        ("sv-llava-100", 22.9, (72, 12.75)),
        ("sv-llava-256", 56.4, (72, 32.25)),
        ("sv-cos-272", 24.6, (162, 34.25)),
        ("sv-llava-hd", 23.1, (360, 72.25)),
    ],
)
def test_the_papers_settings_on_llama_3(preset: str, percent: float, mib: tuple[float, float]) -> None:
    found = estimate(config_of("llava-llama-3-8b"), PRESETS[preset], 40)
    assert share(found) == percent
    assert (found.dense.picture_kv_bytes / MIB, found.skipped.picture_kv_bytes / MIB) == mib


def test_text_is_counted_beside_the_picture() -> None:
    found = estimate(config_of("llava-llama-3-8b"), PRESETS["sv-llava-100"], 40)
    without_head = [side.prefill_flops - 2 * 4096 * 128256 for side in (found.skipped, found.dense)]
    assert round(100 * without_head[0] / without_head[1], 1) == 27.8


def test_on_vicuna_64_and_156_take_a_fifth() -> None:
    found = estimate(config_of("llava-1.5-7b-hf"), PRESETS["sv-vicuna-64"], 0)
    assert share(found) == 20.3
    assert (found.dense.kv_rows, found.skipped.kv_rows) == (576, 66)
    assert found.decoder_bytes == 2 * (6_738_939_904 - 32064 * 4096)


def test_a_model_of_ours_costs_what_its_prompt_does() -> None:
    config = tiny_config()
    assert config.skip is not None
    span = ImageSpan.of(config)
    setting = Setting("", config.vision.num_patches, config.skip.num_retained, config.skip.num_skipped)
    found, wanted = estimate(config, setting, 7).skipped, prompt_cost(config, TokenLayout((7, span)))
    assert (found.vision_flops, found.prefill_flops, found.decode_flops, found.kv_bytes) == (
        wanted.vision_flops,
        wanted.prefill_flops,
        wanted.decode_flops,
        wanted.kv_bytes,
    )


@pytest.mark.parametrize("name", ["SmolVLM-256M-Instruct", "llava-onevision-qwen2-0.5b-ov-hf", "llava-1.5-7b-hf"])
def test_one_view_of_a_published_model_costs_what_its_prompt_does(name: str) -> None:
    """Without CLS all rows' attention ranks, and of squares of patches one token comes."""
    plain = config_of(name)
    selector: Selector = "cls_attention" if plain.vision.has_cls else "received_attention"
    config = replace(plain, tiles=None, skip=SkipConfig(20, 10, selector))
    found = estimate(config, Setting("", config.num_tokens, 20, 10), 7)
    for side, (its_config, layout) in (
        (found.skipped, (config, TokenLayout((7, ImageSpan.of(config))))),
        (found.dense, dense(config, TokenLayout((7, ImageSpan.of(config))))),
    ):
        wanted = prompt_cost(its_config, layout)
        assert (side.vision_flops, side.prefill_flops, side.decode_flops, side.kv_bytes) == (
            wanted.vision_flops,
            wanted.prefill_flops,
            wanted.decode_flops,
            wanted.kv_bytes,
        )


def test_smolvlm_sees_16_patches_in_one_token() -> None:
    """93 million weights at a row of 1,024, and attention among them; by hand."""
    config = config_of("SmolVLM-256M-Instruct")
    block = 8 * 768**2 * 1024 + 4 * 768 * 1024**2 + 4 * 768 * 3072 * 1024
    assert encoder_flops(config.vision) == 2 * 3 * 16**2 * 768 * 1024 + 12 * block
    assert projector_flops(config) == 2 * 64 * 768 * 16 * 576


def test_five_views_are_encoded_five_times() -> None:
    config = config_of("llava-llama-3-8b")
    one, five = (estimate(config, PRESETS[name], 0).dense.vision_flops for name in ("sv-llava-100", "sv-llava-hd"))
    assert one is not None
    assert five == 5 * one
    assert estimate(config, PRESETS["sv-cos-272"], 0).dense.vision_flops is None
    # Nor is that of a tower known which sees another number of patches.
    assert estimate(tiny_config(), PRESETS["sv-llava-100"], 0).dense.vision_flops is None


@given(tokens=st.integers(1, 600), data=st.data(), text=st.integers(0, 50))
def test_skipping_more_never_costs_more(tokens: int, data: st.DataObject, text: int) -> None:
    retained = data.draw(st.integers(1, tokens))
    skipped = data.draw(st.integers(0, tokens - retained))
    found = estimate(tiny_config(), Setting("", tokens, retained, skipped), text)
    summaries = 2 if skipped else 1
    assert found.skipped.kv_rows == retained + summaries
    if retained + skipped + summaries <= tokens:
        assert found.skipped.prefill_flops <= found.dense.prefill_flops
        assert found.skipped.decode_flops <= found.dense.decode_flops
        assert found.skipped.kv_bytes <= found.dense.kv_bytes


@pytest.mark.parametrize(("retained", "skipped"), [(0, 0), (577, 0), (100, 477), (100, -1)])
def test_a_split_that_cannot_be_is_refused(retained: int, skipped: int) -> None:
    with pytest.raises(ConfigError, match=r"of 576 visual tokens|at most 476"):
        Setting("", 576, retained, skipped)


def test_the_roofline_is_the_longer_of_two() -> None:
    gpu = Gpu("", flops_per_second=100, bytes_per_second=10, memory_bytes=1)
    assert (gpu.seconds(1000, 10), gpu.seconds(10, 1000)) == (10, 100)
    found = estimate(config_of("llava-1.5-7b-hf"), PRESETS["sv-llava-100"], 40)
    prefill, decode = found.dense.seconds(GPUS["h200"], found.decoder_bytes)
    assert prefill == pytest.approx(found.dense.prefill_flops / 989e12)
    # A token reads all weights and the cache, and multiplies little.
    assert decode == pytest.approx((found.decoder_bytes + found.dense.kv_bytes) / 4.8e12)
