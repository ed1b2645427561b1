"""Models that people have, by their config.json: sizes alone, no weights. No torch.

A config.json of the hub leaves out what its family has by default, so the defaults stand here, per `model_type`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skipvision.config import ConfigError, ModelConfig, TextConfig, VisionConfig, require

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_VISION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
}
_TEXT_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
    },
}

_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Of LLaVA-NeXT, where a config.json names none."""


@dataclass(frozen=True)
class Family:
    """One line of models."""

    name: str
    has_tiles: bool
    """Whether a picture is also seen in tiles, each row of which ends with a learned embedding."""
    is_computed: bool
    """Whether published.py loads its models; or else only their sizes are known."""


FAMILIES: Mapping[str, Family] = {
    "llava": Family("LLaVA-1.5", has_tiles=False, is_computed=True),
    "llava_next": Family("LLaVA-NeXT", has_tiles=True, is_computed=False),
}
"""By `model_type`."""


@dataclass(frozen=True)
class KnownModel:
    """A model of a family."""

    family: Family
    config: ModelConfig
    """Without skipping."""
    tile_sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of the mosaics of tiles that a picture is fitted into; none where there are no tiles."""

    @property
    def num_parameters(self) -> int:
        """As the checkpoint has them, with the encoder's last layers that nothing reads."""
        newline = self.config.text.hidden_size if self.family.has_tiles else 0
        towers = clip_parameters(self.config.vision) + text_parameters(self.config.text)
        return towers + projector_parameters(self.config) + newline

    def visual_tokens(self, height: int, width: int) -> int:
        """Rows that a picture of this size takes in the plain model, newline embeddings included."""
        vision = self.config.vision
        if not self.tile_sizes:
            return vision.num_patches
        return vision.num_patches + _tile_tokens(self.tile_sizes, vision, height, width)


def read_model(text: str) -> KnownModel:
    """The model of a config.json. Raises ConfigError for what is none, an unknown family, tower or decoder."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from None
    require(isinstance(data, dict), "not a JSON object")
    return parse_model(data)


def parse_model(data: Mapping[str, Any]) -> KnownModel:
    """The same, of what was read."""
    kind = data.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        known = ", ".join(f"{name} ({each.name})" for name, each in FAMILIES.items())
        raise ConfigError(f"unknown family model_type={kind!r}; known: {known}")
    vision_data = _completed(data, "vision_config", _VISION_DEFAULTS)
    text_data = _completed(data, "text_config", _TEXT_DEFAULTS)
    _same("projector_hidden_act", data.get("projector_hidden_act"), "gelu")
    _same("multimodal_projector_bias", data.get("multimodal_projector_bias"), True)
    _same("vision_feature_select_strategy", data.get("vision_feature_select_strategy"), "default")
    text = _text(text_data)
    config = ModelConfig(
        vision=_vision(vision_data, data.get("vision_feature_layer", -2)),
        text=text,
        projector_size=text.hidden_size,
        projector_norm=False,
        projector_position=False,
    )
    pinpoints = data.get("image_grid_pinpoints", _PINPOINTS) if family.has_tiles else ()
    return KnownModel(family, config, tuple((int(height), int(width)) for height, width in pinpoints))


def _same(where: str, value: Any, known: Any) -> None:
    """Raises ConfigError for a value other than the one that is computed here; None is that one."""
    require(value is None or value == known, f"{where}: {value!r} is not computed here, only {known!r}")


def _completed(data: Mapping[str, Any], part: str, defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    given = data.get(part)
    require(isinstance(given, dict), f"{part} is missing")
    assert isinstance(given, dict)
    kind = given.get("model_type")
    require(kind in defaults, f"{part}.model_type: unknown {kind!r}; known: {', '.join(defaults)}")
    return {**defaults[str(kind)], **{name: value for name, value in given.items() if value is not None}}


def _vision(data: Mapping[str, Any], feature_layer: Any) -> VisionConfig:
    layers = data["num_hidden_layers"]
    _same("vision_config.hidden_act", data["hidden_act"], "quick_gelu")
    require(type(feature_layer) is int, f"vision_feature_layer: expected one layer, got {feature_layer!r}")
    # Negative ones count the embedding among the hidden states.
    layer = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    return VisionConfig(
        image_size=data["image_size"],
        patch_size=data["patch_size"],
        hidden_size=data["hidden_size"],
        intermediate_size=data["intermediate_size"],
        num_layers=layers,
        num_heads=data["num_attention_heads"],
        layer_norm_eps=data["layer_norm_eps"],
        feature_layers=(layer,),
        select_layer=layer,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        activation="quick_gelu",
        embedding_norm=True,
        feature_norm=False,
    )


def _text(data: Mapping[str, Any]) -> TextConfig:
    heads = data["num_attention_heads"]
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    _same("text_config.hidden_act", data.get("hidden_act"), "silu")
    _same("text_config.rope_parameters.rope_type", rope.get("rope_type", rope.get("type")), "default")
    for bias in ("attention_bias", "mlp_bias"):
        _same(f"text_config.{bias}", data.get(bias), False)
    return TextConfig(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_size=data["intermediate_size"],
        num_layers=data["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads", heads),
        head_dim=data.get("head_dim") or data["hidden_size"] // heads,
        rope_theta=float(data.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rms_norm_eps=data["rms_norm_eps"],
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
    )


def clip_parameters(vision: VisionConfig) -> int:
    """Of a CLIP tower: patch embedding, CLS, positions, a norm before and behind, and its layers."""
    width, wide = vision.hidden_size, vision.intermediate_size
    attention, ffn, norms = 4 * (width + 1) * width, (width + 1) * wide + (wide + 1) * width, 4 * width
    embedding = 3 * vision.patch_size**2 * width + width + (vision.num_patches + 1) * width
    return embedding + 4 * width + vision.num_layers * (attention + ffn + norms)


def projector_parameters(config: ModelConfig) -> int:
    """Of LLaVA's two linear layers."""
    width = config.projector_size
    return (config.vision.feature_size + 1) * width + (width + 1) * config.text.hidden_size


def text_parameters(text: TextConfig) -> int:
    """Of a Llama-type decoder, with its embedding and its head."""
    width, query, key = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer = 2 * width * (query + key) + 3 * width * text.intermediate_size + 2 * width
    return text.num_layers * layer + width + text.vocab_size * width * (1 if text.tie_embeddings else 2)


def _tile_tokens(sizes: tuple[tuple[int, int], ...], vision: VisionConfig, height: int, width: int) -> int:
    """Rows of the mosaic that fits a picture best, without those that show padding; one more for each line's end."""
    best = max(sizes, key=lambda size: _fit(size, height, width))
    lines, columns = (side // vision.image_size * vision.grid for side in best)
    if width / height > columns / lines:
        lines -= (lines - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (lines / height), 7))) // 2 * 2
    return lines * columns + lines


def _fit(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """How much of a picture is left in a mosaic, and, the less the better, how much of that is padding."""
    scale = min(size[1] / width, size[0] / height)
    shown = min(int(width * scale) * int(height * scale), width * height)
    return shown, shown - size[0] * size[1]


_CLIP_L_336: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_VICUNA_13B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "rms_norm_eps": 1e-5,
}
_LLAMA_3_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
_VICUNA_7B: Mapping[str, Any] = {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}


def _model(kind: str, text: Mapping[str, Any]) -> KnownModel:
    return parse_model({"model_type": kind, "vision_config": dict(_CLIP_L_336), "text_config": dict(text)})


KNOWN_MODELS: Mapping[str, KnownModel] = {
    "llava-llama-3-8b": _model("llava", _LLAMA_3_8B),
    "llava-hf/llava-1.5-7b-hf": _model("llava", _VICUNA_7B),
    "llava-hf/llava-1.5-13b-hf": _model("llava", _VICUNA_13B),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _model("llava_next", _VICUNA_7B),
    "llava-hf/llava-v1.6-vicuna-13b-hf": _model("llava_next", _VICUNA_13B),
    "llava-hf/llava-v1.6-mistral-7b-hf": _model(
        "llava_next", {"model_type": "mistral", "vocab_size": 32064, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    ),
    "llava-hf/llama3-llava-next-8b-hf": _model("llava_next", {**_LLAMA_3_8B, "vocab_size": 128320}),
}
"""Sizes that need no file. The first is the model of the paper, which has published none."""


def known_model(name: str) -> KnownModel | None:
    """By its full name, or the part behind the owner's."""
    return next((model for full, model in KNOWN_MODELS.items() if name in (full, full.rpartition("/")[2])), None)
