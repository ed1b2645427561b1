"""Sizes of the models that people have: against their published counts, and against transformers where that is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from skipvision.config import ConfigError, ModelConfig, TilesConfig
from skipvision.families import FAMILIES, KnownModel, parse_model, picture_settings, read_model
from skipvision.known_models import KNOWN_MODELS, known_model
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
            json.dumps({"model_type": "llava", "vision_config": {**VISION, "patch_size": 225}, "text_config": TEXT}),
            "vision.patch_size must be at most vision.image_size",
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


CLIP = {"model_type": "clip_vision_model", "image_size": 336}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 384}
TOWERS: Mapping[str, Mapping[str, Any]] = {
    "llava": CLIP,
    "llava_next": CLIP,
    "llava_onevision": SIGLIP,
    "smolvlm": {"model_type": "smolvlm_vision", "image_size": 256},
    "idefics3": {"model_type": "idefics3_vision", "image_size": 256},
}
"""Of each family, as large as its tiles are by default."""


def bare(kind: str, text: Mapping[str, Any] = TEXT, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, "vision_config": TOWERS[kind], "text_config": dict(text), **more}


def library_config(transformers: Any, kind: str, text: Any, vision: Mapping[str, Any], **more: Any) -> Any:
    """Theirs of a family; what nothing says is their default."""
    towers = {
        "clip_vision_model": transformers.CLIPVisionConfig,
        "siglip_vision_model": transformers.SiglipVisionConfig,
        "smolvlm_vision": transformers.models.smolvlm.SmolVLMVisionConfig,
        "idefics3_vision": transformers.models.idefics3.Idefics3VisionConfig,
    }
    given = {name: value for name, value in vision.items() if name != "model_type"}
    tower = towers[vision["model_type"]](**given)
    names = {
        "llava": "Llava",
        "llava_next": "LlavaNext",
        "llava_onevision": "LlavaOnevision",
        "smolvlm": "SmolVLM",
        "idefics3": "Idefics3",
    }
    return getattr(transformers, f"{names[kind]}Config")(vision_config=tower, text_config=text, **more)


def counted(transformers: Any, config: Any) -> int:
    """Weights of theirs, of which none is made; SigLIP's pooling head counts for nothing, since no LLaVA has one."""
    cls = getattr(transformers, type(config).__name__.replace("Config", "ForConditionalGeneration"))
    with torch.device("meta"):
        model = cls(config)
    return sum(each.numel() for name, each in model.named_parameters() if ".vision_tower.head." not in name)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("text", ["LlamaConfig", "MistralConfig", "Qwen2Config"])
def test_defaults_of_every_family_are_those_of_transformers(transformers: Any, kind: str, text: str) -> None:
    theirs = getattr(transformers, text)()
    config = library_config(transformers, kind, theirs, TOWERS[kind])
    full, short = parse_model(config.to_dict()), parse_model(bare(kind, {"model_type": theirs.model_type}))
    assert full == short
    if kind != "smolvlm":
        assert full.family is FAMILIES[kind]
    assert short.num_parameters == counted(transformers, config)
    # The decoder rotates by what theirs is set to.
    assert full.config.text.rope_theta == theirs.rope_parameters["rope_theta"]


def test_every_family_is_tested() -> None:
    assert set(TOWERS) | {"llava_llama"} == set(FAMILIES)  # the last one's tests stand by themselves


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("whole", [True, False, None])
@pytest.mark.parametrize("own", [True, False, None])
def test_heads_are_tied_where_theirs_are(transformers: Any, kind: str, whole: bool | None, own: bool | None) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 50, **({} if own is None else {"tie_word_embeddings": own})}
    more = {} if whole is None else {"tie_word_embeddings": whole}
    vision = {**TOWERS[kind], **sizes}
    config = library_config(transformers, kind, transformers.LlamaConfig(**text), vision, **more)
    ours = parse_model(
        {"model_type": kind, "vision_config": vision, "text_config": {"model_type": "llama", **text}, **more}
    )
    assert ours.num_parameters == counted(transformers, config)


def parameters_of(transformers: Any, known_one: KnownModel) -> tuple[Any, str]:
    """Their config of a model that we know by its sizes, and its `model_type`."""
    vision, text, tiles = known_one.config.vision, known_one.config.text, known_one.config.tiles
    kind = next(name for name, family in FAMILIES.items() if family is known_one.family)
    kind = "idefics3" if kind == "smolvlm" else kind  # as it was published
    decoder = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "tie_word_embeddings": text.tie_embeddings,
        "pad_token_id": 0,
    }
    tower = {
        **TOWERS[kind],
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    cls = transformers.Qwen2Config if text.qkv_bias else transformers.LlamaConfig
    more: dict[str, Any] = {"tie_word_embeddings": text.tie_embeddings}
    if known_one.config.pixel_shuffle > 1:
        more |= {"scale_factor": known_one.config.pixel_shuffle, "pad_token_id": 0}
    if tiles is not None and tiles.is_joined:
        more["image_grid_pinpoints"] = [list(size) for size in tiles.sizes]
    return library_config(transformers, kind, cls(**decoder), tower, **more), kind


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models_have_as_many_weights_as_transformers_makes(transformers: Any, name: str) -> None:
    config, kind = parameters_of(transformers, KNOWN_MODELS[name])
    assert counted(transformers, config) == KNOWN_MODELS[name].num_parameters
    # The same sizes, read as a config.json has them.
    again = parse_model(config.to_dict()).config
    assert again.text.num_kv_heads == KNOWN_MODELS[name].config.text.num_kv_heads
    assert (again.vision, again.tiles) == (KNOWN_MODELS[name].config.vision, KNOWN_MODELS[name].config.tiles), kind


@pytest.mark.parametrize(
    ("name", "vision", "tokens"),
    [
        ("llava-1.5-7b-hf", (576, True, True, False, "quick_gelu", (23,)), 576),
        ("llava-onevision-qwen2-7b-ov-hf", (729, False, False, False, "gelu_tanh", (26,)), 729),
        ("SmolVLM-256M-Instruct", (1024, False, False, True, "gelu_tanh", (12,)), 64),
    ],
)
def test_towers_are_what_their_families_have(name: str, vision: tuple[Any, ...], tokens: int) -> None:
    config = known(name).config
    found = config.vision
    read = found.num_patches, found.has_cls, found.embedding_norm, found.output_norm, found.activation
    assert (*read, found.feature_layers) == vision
    assert not found.feature_norm
    assert config.num_tokens == tokens
    assert found.image_mean == ((0.48145466, 0.4578275, 0.40821073) if found.has_cls else (0.5, 0.5, 0.5))


def test_llava_onevision_takes_the_last_layer_as_theirs_and_its_tiles_by_its_config() -> None:
    """A negative layer counts from the hidden states' end: -1 is what the last layer gives."""
    model = parse_model(bare("llava_onevision", vision_aspect_ratio="anyres_max_4", image_grid_pinpoints=[[384, 768]]))
    assert model.config.vision.feature_layers == (12,)
    assert model.config.tiles == TilesConfig(((384, 768),), max_tiles=4, among_others=False)
    by_default = known("llava-onevision-qwen2-0.5b-ov-hf").config.tiles
    assert by_default is not None
    assert (len(by_default.sizes), by_default.max_tiles) == (36, 9)
    assert parse_model(bare("llava", vision_feature_layer=3)).config.vision.feature_layers == (3,)


def test_the_default_mosaics_are_those_of_transformers(transformers: Any) -> None:
    for name, kind in (
        ("llava-v1.6-vicuna-7b-hf", "llava_next"),
        ("llava-onevision-qwen2-0.5b-ov-hf", "llava_onevision"),
    ):
        theirs = library_config(transformers, kind, transformers.LlamaConfig(), TOWERS[kind]).image_grid_pinpoints
        tiles = known(name).config.tiles
        assert tiles is not None
        assert sorted(tiles.sizes) == sorted(map(tuple, theirs))


@pytest.mark.parametrize("nested", [True, False])
def test_smolvlms_tiles_are_those_of_its_preprocessor(nested: bool) -> None:
    plain = {"size": {"longest_edge": 1120}, "max_image_size": {"longest_edge": 256}, "do_image_splitting": True}
    data = bare("smolvlm", scale_factor=8)

    def read(**more: Any) -> ModelConfig:
        given = {"image_processor": plain | more} if nested else plain | more
        return read_model(json.dumps(data), json.dumps(given)).config

    assert read().tiles == TilesConfig(longest_edge=1120)
    assert read(do_image_splitting=False).tiles is None
    assert (read().pixel_shuffle, read().num_tokens, read().projector) == (8, 1, "linear")
    for longest in (0, -3, 4097, "big", None, 2.5):
        with pytest.raises(ConfigError, match=r"size\.longest_edge: expected 1 to 4096 pixels"):
            read(size={"longest_edge": longest})
    with pytest.raises(ConfigError, match=r"max_image_size\.longest_edge: 364 is not computed here, only 256"):
        read(max_image_size={"longest_edge": 364})


def test_smolvlms_tiles_without_a_preprocessor_are_four_along_the_longest_edge() -> None:
    assert parse_model(bare("smolvlm")).config.tiles == TilesConfig(longest_edge=4 * 256)
    assert known("SmolVLM-256M-Instruct").config.tiles == TilesConfig(longest_edge=2048)


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ({"model_type": "llama"}, 2048),
        ({"model_type": "llama", "sliding_window": 100}, 2048),
        ({"model_type": "llama", "max_position_embeddings": 9}, 9),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, 131072),
        ({"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768}, 32768),
        ({"model_type": "mistral", "sliding_window": 8192, "max_position_embeddings": 500}, 500),
        ({"model_type": "qwen2"}, 32768),
        ({"model_type": "qwen2", "sliding_window": 100}, 32768),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100}, 100),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None}, 32768),
    ],
)
def test_rows_that_a_model_was_made_for_and_its_window_bound_the_context(text: dict[str, Any], positions: int) -> None:
    assert parse_model(bare("llava", text)).config.text.max_positions == positions


def test_llava_next_on_mistral_has_no_window() -> None:
    assert known("llava-v1.6-mistral-7b-hf").config.text.max_positions == 32768


def test_as_many_key_heads_as_heads_where_null_stands() -> None:
    text = {"model_type": "mistral", "num_attention_heads": 16, "num_key_value_heads": None}
    assert parse_model(bare("llava", text)).config.text.num_kv_heads == 16
    assert parse_model(bare("llava", {"model_type": "mistral"})).config.text.num_kv_heads == 8
    assert parse_model(bare("llava", {"model_type": "qwen2"})).config.text.qkv_bias
    assert not parse_model(bare("llava", {"model_type": "mistral"})).config.text.qkv_bias


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bare("llava") | {"vision_config": SIGLIP}, "vision_config.model_type: unknown 'siglip_vision_model'"),
        (bare("llava_onevision") | {"vision_config": CLIP}, "vision_config.model_type: unknown 'clip_vision_model'"),
        (bare("smolvlm") | {"vision_config": {}}, "vision_config.model_type: unknown None"),
        (bare("llava", {"model_type": "gemma"}), "text_config.model_type: unknown 'gemma'; known: llama, mistral"),
        (bare("llava", projector_hidden_act="relu"), "projector_hidden_act: 'relu' is not computed here, only 'gelu'"),
        (bare("llava", multimodal_projector_bias=False), "multimodal_projector_bias: False is not computed here"),
        (bare("llava", vision_feature_select_strategy="full"), "'full' is not computed here, only 'default'"),
        (
            bare("llava_onevision", vision_feature_select_strategy="default"),
            "'default' is not computed here, only 'full'",
        ),
        (bare("llava_onevision", vision_aspect_ratio="square"), "vision_aspect_ratio: 'square' is not computed here"),
        (
            bare("llava_next", image_grid_pinpoints=5),
            "image_grid_pinpoints: expected up to 256 pairs .*, got 5",
        ),
        (bare("llava_next", image_grid_pinpoints=[[1, 2, 3]]), "image_grid_pinpoints: expected up to 256 pairs"),
        (bare("llava_next", image_grid_pinpoints=[[100, 224]]), "tiles.sizes must be multiples of vision.image_size"),
        (bare("smolvlm", scale_factor=3), "pixel_shuffle must divide 8, got 3"),
        (bare("llava", {**TEXT, "attention_bias": True}), "text_config.attention_bias: True is not computed here"),
        (bare("llava", {**TEXT, "mlp_bias": True}), "text_config.mlp_bias: True is not computed here"),
        (bare("llava", {**TEXT, "hidden_act": "gelu"}), "text_config.hidden_act: 'gelu' is not computed here"),
        (
            bare("llava", {**TEXT, "rope_scaling": {"type": "linear", "factor": 2}}),
            "text_config.rope_parameters.rope_type: 'linear' is not computed here, only 'default'",
        ),
        (
            bare("smolvlm") | {"vision_config": {"model_type": "smolvlm_vision", "hidden_act": "gelu"}},
            "vision_config.hidden_act: 'gelu' is not computed here, only 'gelu_pytorch_tanh'",
        ),
    ],
)
def test_what_a_family_does_not_compute_is_one_sentence(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        read_model(json.dumps(data))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("vision_config", "num_hidden_layers", "x"),
        ("vision_config", "num_hidden_layers", 10**9),
        ("vision_config", "hidden_size", 1.5),
        ("vision_config", "hidden_size", 10**9),
        ("vision_config", "patch_size", False),
        ("vision_config", "num_attention_heads", []),
        ("vision_config", "model_type", []),
        ("vision_config", "layer_norm_eps", "x"),
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "num_key_value_heads", "x"),
        ("text_config", "head_dim", "x"),
        ("text_config", "vocab_size", True),
        ("text_config", "max_position_embeddings", "x"),
        ("text_config", "rope_theta", 10**400),
        ("text_config", "rope_parameters", 1),
        ("text_config", "rms_norm_eps", -1),
        ("text_config", "model_type", "y" * 5000),
        ("", "image_grid_pinpoints", "28"),
        ("", "image_grid_pinpoints", [[336, 336.5]]),
        ("", "image_grid_pinpoints", [[336, 10**8]]),
        ("", "image_grid_pinpoints", [[336, 336]] * 300),
    ],
)
def test_values_of_a_stranger_are_bounded_and_refused_in_a_short_sentence(part: str, name: str, value: Any) -> None:
    data: dict[str, Any] = {"model_type": "llava_next", "vision_config": dict(VISION), "text_config": dict(TEXT)}
    (data[part] if part else data)[name] = value
    with pytest.raises(ConfigError, match=f"{name}: ") as refusal:
        parse_model(data)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model_type": ' + "1" * 5000 + "}"])
def test_json_that_is_too_deep_or_too_long_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        read_model(text)


def test_settings_of_pictures_are_read_where_they_are(tmp_path: Path) -> None:
    """SmolVLM's first folders have both files, and the pictures' settings in the older one."""
    assert picture_settings(tmp_path) is None
    (tmp_path / "processor_config.json").write_text('{"image_seq_len": 64}')
    assert picture_settings(tmp_path) == '{"image_seq_len": 64}'
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"longest_edge": 1536}}')
    assert picture_settings(tmp_path) == '{"size": {"longest_edge": 1536}}'
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"size": {}}}')
    assert picture_settings(tmp_path) == '{"image_processor": {"size": {}}}'
