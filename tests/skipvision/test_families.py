"""Sizes of the models that people have: against their published counts, and against transformers where that is."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from skipvision.config import ConfigError
from skipvision.families import KNOWN_MODELS, KnownModel, known_model, parse_model, read_model
from tests.optional import missing

VISION = {"model_type": "clip_vision_model"}
TEXT = {"model_type": "llama"}


@pytest.fixture(scope="module")
def transformers() -> Any:
    if find_spec("transformers") is None:
        missing("transformers")
    return import_module("transformers")


def known(name: str) -> KnownModel:
    model = known_model(name)
    assert model is not None
    return model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llava-hf/llava-1.5-7b-hf", 7_063_427_072),
        ("llava-hf/llava-1.5-13b-hf", 13_351_494_656),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", 7_063_431_168),
        ("llava-hf/llava-v1.6-mistral-7b-hf", 7_566_747_648),
        ("llava-hf/llama3-llava-next-8b-hf", 8_355_276_800),
    ],
)
def test_known_models_have_as_many_weights_as_published(name: str, parameters: int) -> None:
    assert known(name).num_parameters == parameters
    assert known_model(name.rpartition("/")[2]) is KNOWN_MODELS[name]


def test_llava_is_read_as_its_authors_read_it() -> None:
    config = known("llava-1.5-7b-hf").config
    assert config.vision.feature_layers == (23,)  # the last but one of 24, and the embedding counts
    assert (config.vision.num_patches, config.vision.num_layers_run) == (576, 23)
    assert (config.text.num_layers, config.text.num_kv_heads, config.text.head_dim) == (32, 32, 128)
    assert config.skip is None


def test_what_a_config_leaves_out_is_its_familys_default() -> None:
    model = read_model(json.dumps({"model_type": "llava", "vision_config": VISION, "text_config": TEXT}))
    assert (model.config.text.hidden_size, model.config.text.vocab_size) == (4096, 32000)
    assert (model.config.vision.patch_size, model.config.vision.num_layers) == (32, 12)
    named = {**TEXT, "num_key_value_heads": 4, "head_dim": 64, "rope_parameters": {"rope_theta": 5e5}}
    text = parse_model({"model_type": "llava", "vision_config": VISION, "text_config": named}).config.text
    assert (text.num_kv_heads, text.head_dim, text.rope_theta) == (4, 64, 5e5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", r"model_type=None; known: llava \(LLaVA-1.5\), llava_next"),
        ('{"model_type": "qwen2_vl"}', "model_type='qwen2_vl'"),
        ('{"model_type": "llava"}', "vision_config is missing"),
        ('{"model_type": "llava", "vision_config": {"model_type": "x"}}', "vision_config.model_type: unknown 'x'"),
        (json.dumps({"model_type": "llava", "vision_config": VISION, "text_config": {}}), "text_config.model_type"),
        (
            json.dumps(
                {"model_type": "llava", "vision_config": VISION, "text_config": TEXT, "vision_feature_layer": [3, 6]}
            ),
            "vision_feature_layer: expected one layer",
        ),
        (
            json.dumps({"model_type": "llava", "vision_config": {**VISION, "patch_size": 5}, "text_config": TEXT}),
            "patch_size must divide",
        ),
    ],
)
def test_what_is_no_known_model_is_one_sentence(data: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        read_model(data)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [
        (672, 672, 576 + 48 * 48 + 48),
        (480, 640, 2340),
        (1000, 300, 2232),
    ],
)
def test_a_picture_in_tiles_takes_as_many_rows_as_transformers_makes(height: int, width: int, tokens: int) -> None:
    assert known("llava-v1.6-vicuna-7b-hf").visual_tokens(height, width) == tokens
    assert known("llava-1.5-7b-hf").visual_tokens(height, width) == 576


def test_rows_of_tiles_are_those_of_transformers(transformers: Any) -> None:
    processor = transformers.LlavaNextProcessor.__new__(transformers.LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14, 1
    processor.vision_feature_select_strategy = "default"
    model = known("llava-v1.6-vicuna-7b-hf")
    pinpoints = [list(size) for size in model.tile_sizes]
    processor.image_processor = type("Images", (), {"image_grid_pinpoints": pinpoints})()
    sizes = torch.randint(1, 3000, (500, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for height, width in [*sizes, (336, 336), (1, 1000), (1000, 1)]:
        # transformers counts the row of CLS here, and drops it later.
        theirs = processor._get_number_of_features(height, width, 336, 336) - 1
        assert model.visual_tokens(height, width) == theirs, (height, width)


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig"])
def test_defaults_are_those_of_transformers(transformers: Any, name: str) -> None:
    text = getattr(transformers, name)().to_dict()
    vision = transformers.CLIPVisionConfig().to_dict()
    full = parse_model({"model_type": "llava", "vision_config": vision, "text_config": text})
    bare = parse_model(
        {"model_type": "llava", "vision_config": VISION, "text_config": {"model_type": text["model_type"]}}
    )
    assert full == bare


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_weights_are_counted_as_transformers_makes_them(transformers: Any, kind: str) -> None:
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {"llava": "Llava", "llava_next": "LlavaNext"}
    config = getattr(transformers, f"{names[kind]}Config")(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**text, num_key_value_heads=2, vocab_size=50),
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{names[kind]}ForConditionalGeneration")(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert parse_model(config.to_dict()).num_parameters == counted
