"""Models that people have, by their config.json: sizes alone, no weights. No torch.

A config.json of the hub leaves out what its family has by default, so the defaults stand here, per `model_type`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skipvision.config import ConfigError, ModelConfig, TextConfig, TilesConfig, VisionConfig, require
from skipvision.tiles import cut_picture, token_counts

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

_SMOLVLM_VISION: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
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
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "smolvlm_vision": _SMOLVLM_VISION,
    "idefics3_vision": _SMOLVLM_VISION,
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
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
    },
}
_POSITIONS: Mapping[str, int] = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768}
"""max_position_embeddings by default."""

_ORIGINAL_VALUES: Mapping[str, Any] = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
}
"""Of LLaVA's own config.json; the only ones that are computed here."""

_NEXT_SIZES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Of LLaVA-NeXT, where a config.json names none."""
_ONEVISION_SIZES = tuple((384 * lines, 384 * columns) for lines in range(1, 7) for columns in range(1, 7))
_ONEVISION_ASPECT = re.compile(r"anyres_max_(\d+)")
_SMOLVLM_VIEWS = 4
"""Tiles along the longest edge, where no preprocessor_config.json says otherwise."""
_SMOLVLM_LONGEST = 4096
"""Above, transformers cuts what it has scaled once more."""
_NULL_COUNTS = ("num_key_value_heads", "sliding_window")
"""Where null is no gap for the default: as many heads as there are, no window."""


@dataclass(frozen=True)
class Family:
    """One line of models."""

    name: str
    tower: tuple[str, ...]
    """`model_type` of its vision towers."""
    sees: str
    """How a picture comes in, for people."""


_SMOLVLM = Family("SmolVLM", ("smolvlm_vision", "idefics3_vision"), "in tiles and as a whole, runs of their own")
FAMILIES: Mapping[str, Family] = {
    "llava": Family("LLaVA-1.5", ("clip_vision_model",), "once"),
    "llava_next": Family("LLaVA-NeXT", ("clip_vision_model",), "as a whole and in tiles, one run"),
    "llava_onevision": Family("LLaVA-OneVision", ("siglip_vision_model",), "as a whole and in tiles, one run"),
    "smolvlm": _SMOLVLM,
    "idefics3": _SMOLVLM,
    "llava_llama": Family("LLaVA-1.5, as its authors' code saves it", ("clip_vision_model",), "once"),
}
"""By `model_type`. The first SmolVLMs were published as idefics3."""
_COUNTS: Mapping[str, int] = {
    "vocab_size": 2**21,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 4096,
    "image_size": 2**14,
    "patch_size": 1024,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
}
"""Whole numbers of a config.json, and more than any model has: a stranger's file must not ask for a year's work."""
_REALS = ("layer_norm_eps", "rms_norm_eps")
_LARGEST_REAL = 1e30
_MOST_SIZES = 256
_LONGEST_QUOTE = 80
NAME_TOWER = "name the folder of that vision tower (--vision-tower)"
_ORIGINAL = "llava_llama"
"""What LLaVA's own code saves. Its first versions called that `llava`, as transformers does its own models."""
_WHOLE_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Pairs of a vision and a text model, and the first of them."""
_NEW_FEATURE_LAYER = -2
"""Which hidden state of a tower alone is read: LLaVA's choice."""


@dataclass(frozen=True)
class KnownModel:
    """A model of a family."""

    family: Family
    config: ModelConfig
    """Without skipping."""
    tower: str | None = None
    """What its authors call the vision tower, which the checkpoint may leave out."""

    @property
    def num_parameters(self) -> int:
        """As the checkpoint has them, with the encoder's last layers that nothing reads."""
        tiles = self.config.tiles
        newline = self.config.text.hidden_size if tiles is not None and tiles.is_joined else 0
        towers = tower_parameters(self.config.vision) + text_parameters(self.config.text)
        return towers + projector_parameters(self.config) + newline

    def visual_tokens(self, height: int, width: int) -> int:
        """Rows that a picture of this size takes in the plain model, newline embeddings included."""
        return sum(token_counts(self.config, cut_picture(self.config, height, width)))


def read_model(text: str, preprocessor: str | None = None, tower: str | None = None) -> KnownModel:
    """The model of a config.json, and of the preprocessor_config.json beside it; `tower` is the config.json of a
    vision tower that the model leaves out.

    Raises ConfigError for what is none, an unknown family, tower or decoder.
    """
    data, processing = (_object(each) if each is not None else {} for each in (text, preprocessor))
    return parse_model(data, processing, None if tower is None else _object(tower))


def picture_settings(folder: Path) -> str | None:
    """What says how a folder's pictures are made: processor_config.json where that is nested in it, or else
    preprocessor_config.json. Raises OSError or UnicodeDecodeError for a file that cannot be read."""
    names = ("processor_config.json", "preprocessor_config.json")
    texts = [(folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()]
    return next((text for text in texts if '"image_processor"' in text), texts[-1] if texts else None)


def read_tower(text: str, preprocessor: str | None = None) -> VisionConfig:
    """The vision tower of a config.json: of one alone, of one with its text half, or of a known model.

    A tower alone is read as LLaVA reads it. Raises ConfigError for what is none.
    """
    data, processing = (_object(each) if each is not None else {} for each in (text, preprocessor))
    vision = _tower(data, processing)
    processing = processing.get("image_processor", processing)
    mean, std = _colour(processing, "image_mean"), _colour(processing, "image_std")
    return replace(vision, image_mean=mean or vision.image_mean, image_std=std or vision.image_std)


def _colour(processing: Mapping[str, Any], name: str) -> tuple[float, float, float] | None:
    given = processing.get(name)
    if given is None:
        return None
    try:
        red, green, blue = map(float, given)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: expected three numbers, got {given!r}") from None
    return red, green, blue


def _tower(data: Mapping[str, Any], processing: Mapping[str, Any]) -> VisionConfig:
    kind = str(data.get("model_type"))
    if kind in FAMILIES:
        return parse_model(data, processing).config.vision
    alone = _alone(data)
    known = ", ".join((*_WHOLE_TOWERS, *_WHOLE_TOWERS.values(), *FAMILIES))
    require(alone is not None, f"no vision tower: model_type={data.get('model_type')!r}; known: {known}")
    return _vision(_completed({"vision_config": alone}, "vision_config", _VISION_DEFAULTS), _NEW_FEATURE_LAYER)


def _alone(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the config.json of a vision model, or of a pair with one, says of it; None for anything else."""
    kind = str(data.get("model_type"))
    given = data.get("vision_config") if kind in _WHOLE_TOWERS else data
    kind = _WHOLE_TOWERS.get(kind, kind)
    return {**given, "model_type": kind} if isinstance(given, Mapping) and kind in _WHOLE_TOWERS.values() else None


def read_decoder(text: str) -> TextConfig:
    """The decoder of a config.json: of a causal language model, or of a known model. Raises ConfigError for what is
    none."""
    data = _object(text)
    kind = str(data.get("model_type"))
    if is_original(data):
        return _original_text(data)
    if kind in FAMILIES:
        return parse_model(data).config.text
    known = ", ".join((*_TEXT_DEFAULTS, *FAMILIES))
    require(kind in _TEXT_DEFAULTS, f"no text decoder: model_type={data.get('model_type')!r}; known: {known}")
    return _text(_completed({"text_config": data}, "text_config", _TEXT_DEFAULTS))


def _object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None
    require(isinstance(data, dict), "not a JSON object")
    return dict(data)


def parse_model(
    data: Mapping[str, Any], processing: Mapping[str, Any] | None = None, tower: Mapping[str, Any] | None = None
) -> KnownModel:
    """`read_model` of JSON that was read already. Raises ConfigError."""
    if is_original(data):
        return _original(data, tower)
    require(tower is None, "this model has a vision tower of its own, and takes no other")
    kind = str(data.get("model_type"))
    family = FAMILIES.get(kind)
    if family is None:
        known = ", ".join(f"{name} ({each.name})" for name, each in FAMILIES.items())
        raise ConfigError(f"unknown family model_type={_short(data.get('model_type'))}; known: {known}")
    vision_data = _completed(data, "vision_config", {name: _VISION_DEFAULTS[name] for name in family.tower})
    text_data = _completed(data, "text_config", _TEXT_DEFAULTS)
    # As transformers does: the whole model's word counts, and of two families the decoder's as well.
    own = bool(text_data.get("tie_word_embeddings")) and kind in ("llava", "llava_onevision")
    text_data["tie_word_embeddings"] = own or bool(data.get("tie_word_embeddings"))
    text = _text(text_data)
    if family is _SMOLVLM:
        config = _smolvlm(data, vision_data, text, processing or {})
    else:
        config = _llava(kind, data, vision_data, text)
    return KnownModel(family, config)


def _llava(kind: str, data: Mapping[str, Any], vision_data: Mapping[str, Any], text: TextConfig) -> ModelConfig:
    is_onevision = kind == "llava_onevision"
    _same("projector_hidden_act", data.get("projector_hidden_act"), "gelu")
    _same("multimodal_projector_bias", data.get("multimodal_projector_bias"), True)
    strategy = "full" if is_onevision else "default"
    _same("vision_feature_select_strategy", data.get("vision_feature_select_strategy"), strategy)
    tiles = None
    if kind == "llava_next":
        tiles = TilesConfig(_sizes(data, _NEXT_SIZES))
    elif is_onevision:
        aspect = str(data.get("vision_aspect_ratio", "anyres_max_9"))
        most = _ONEVISION_ASPECT.fullmatch(aspect)
        require(most is not None, f"vision_aspect_ratio: {aspect!r} is not computed here, only anyres_max_N")
        assert most is not None
        tiles = TilesConfig(_sizes(data, _ONEVISION_SIZES), max_tiles=int(most[1]), among_others=False)
    return ModelConfig(
        vision=_vision(vision_data, data.get("vision_feature_layer", -1 if is_onevision else -2)),
        text=text,
        tiles=tiles,
        projector_size=text.hidden_size,
        projector_norm=False,
        projector_position=False,
    )


def is_original(data: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model which LLaVA's own code saved."""
    kind = data.get("model_type")
    return kind == _ORIGINAL or (kind == "llava" and "mm_vision_tower" in data and "text_config" not in data)


def _original(data: Mapping[str, Any], tower: Mapping[str, Any] | None) -> KnownModel:
    """What the code of LLaVA's authors saves, and what was built on it: a decoder's config.json with `mm_` in it."""
    for field, value in _ORIGINAL_VALUES.items():
        _same(field, data.get(field), value)
    aspect = data.get("image_aspect_ratio")
    require(aspect in (None, "square", "pad"), f"image_aspect_ratio: {aspect!r} is not computed here, only 'pad'")
    name = data.get("mm_vision_tower")
    require(isinstance(name, str), "mm_vision_tower is missing")
    assert isinstance(name, str)
    sizes = _TOWER_SIZES.get(name.rstrip("/").rpartition("/")[2]) if tower is None else _alone(tower)
    require(tower is None or sizes is not None, "the vision tower is no CLIP model")
    require(sizes is not None, f"the sizes of mm_vision_tower {name} are not known; {NAME_TOWER}")
    known = {kind: _VISION_DEFAULTS[kind] for kind in FAMILIES[_ORIGINAL].tower}
    vision_data = _completed({"vision_config": sizes}, "vision_config", known)
    width = data.get("mm_hidden_size", vision_data["hidden_size"])
    require(
        width == vision_data["hidden_size"],
        f"mm_hidden_size {width} is not the width of the vision tower, {vision_data['hidden_size']}",
    )
    layer = {"vision_feature_layer": data.get("mm_vision_select_layer", -2)}
    return KnownModel(FAMILIES[_ORIGINAL], _llava("llava", layer, vision_data, _original_text(data)), name)


def _original_text(data: Mapping[str, Any]) -> TextConfig:
    part = {**data, "model_type": "llama"}
    return _text(_completed({"text_config": part}, "text_config", _TEXT_DEFAULTS))


def _sizes(data: Mapping[str, Any], default: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    given = data.get("image_grid_pinpoints")
    if given is None:
        return default
    pairs = given if isinstance(given, list | tuple) and len(given) <= _MOST_SIZES else []
    sizes = [tuple(pair) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
    good = all(type(side) is int and 1 <= side <= _COUNTS["image_size"] for size in sizes for side in size)
    require(
        bool(sizes) and good and len(sizes) == len(given),
        f"image_grid_pinpoints: expected up to {_MOST_SIZES} pairs of height and width, got {_short(given)}",
    )
    return tuple((height, width) for height, width in sizes)


def _smolvlm(
    data: Mapping[str, Any], vision_data: Mapping[str, Any], text: TextConfig, processing: Mapping[str, Any]
) -> ModelConfig:
    vision = _vision(vision_data, -1)
    processing = _table(processing, "image_processor") or processing  # as processor_config.json nests it
    tile = _table(processing, "max_image_size").get("longest_edge", vision.image_size)
    _same("max_image_size.longest_edge", tile, vision.image_size)
    longest = _table(processing, "size").get("longest_edge", _SMOLVLM_VIEWS * vision.image_size)
    good = type(longest) is int and 0 < longest <= _SMOLVLM_LONGEST
    require(good, f"size.longest_edge: expected 1 to {_SMOLVLM_LONGEST} pixels, got {longest!r}")
    is_cut = processing.get("do_image_splitting", True)
    return ModelConfig(
        vision=vision,
        text=text,
        tiles=TilesConfig(longest_edge=longest) if is_cut else None,
        projector="linear",
        pixel_shuffle=_scale_factor(data),
        projector_norm=False,
        projector_position=False,
    )


def _scale_factor(data: Mapping[str, Any]) -> int:
    value = data.get("scale_factor", 2)
    require(type(value) is int and 1 <= value <= 64, f"scale_factor: expected a whole number, got {_short(value)}")
    return int(value)


def _same(where: str, value: Any, known: Any) -> None:
    """Raises ConfigError for a value other than the one that is computed here; None is that one."""
    require(value is None or value == known, f"{where}: {_short(value)} is not computed here, only {known!r}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


def _completed(data: Mapping[str, Any], part: str, defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    given = data.get(part)
    require(isinstance(given, dict), f"{part} is missing")
    assert isinstance(given, dict)
    kind = given.get("model_type")
    known = isinstance(kind, str) and kind in defaults
    require(known, f"{part}.model_type: unknown {_short(kind)}; known: {', '.join(defaults)}")
    stated = {name: value for name, value in given.items() if value is not None or name in _NULL_COUNTS}
    for name, value in stated.items():
        most = _COUNTS.get(name)
        is_count = value is None or most is None or (type(value) is int and 1 <= value <= most)
        require(is_count, f"{part}.{name}: expected a whole number from 1 to {most}, got {_short(value)}")
        is_real = name not in _REALS or (type(value) in (int, float) and 0 < value < _LARGEST_REAL)
        require(is_real, f"{part}.{name}: expected a positive number, got {_short(value)}")
    return {**defaults[str(kind)], **stated}


def _table(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The table of that name, which may be left out. Raises ConfigError for anything else there."""
    value = data.get(name)
    require(value is None or isinstance(value, dict), f"{name}: expected a table, got {_short(value)}")
    return value or {}


def _vision(data: Mapping[str, Any], feature_layer: Any) -> VisionConfig:
    layers = data["num_hidden_layers"]
    is_clip = data["model_type"] == "clip_vision_model"
    _same("vision_config.hidden_act", data["hidden_act"], "quick_gelu" if is_clip else "gelu_pytorch_tanh")
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
        image_mean=CLIP_MEAN if is_clip else SIGLIP_MEAN,
        image_std=CLIP_STD if is_clip else SIGLIP_STD,
        activation="quick_gelu" if is_clip else "gelu_tanh",
        has_cls=is_clip,
        embedding_norm=is_clip,
        output_norm=data["model_type"] in _SMOLVLM.tower,
        feature_norm=False,
    )


def _text(data: Mapping[str, Any]) -> TextConfig:
    heads = data["num_attention_heads"]
    rope = _table(data, "rope_parameters") or _table(data, "rope_scaling")
    theta = data.get("rope_theta") or rope.get("rope_theta") or 10000.0
    is_real = type(theta) in (int, float) and 0 < theta < _LARGEST_REAL
    require(is_real, f"text_config.rope_theta: expected a positive number, got {_short(theta)}")
    _same("text_config.hidden_act", data.get("hidden_act"), "silu")
    _same("text_config.rope_parameters.rope_type", rope.get("rope_type", rope.get("type")), "default")
    for bias in ("attention_bias", "mlp_bias"):
        _same(f"text_config.{bias}", data.get(bias), False)
    kind = data["model_type"]
    windowed = kind == "mistral" or bool(data.get("use_sliding_window"))
    limits = [data.get("max_position_embeddings", _POSITIONS[kind]), data.get("sliding_window") if windowed else None]
    return TextConfig(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_size=data["intermediate_size"],
        num_layers=data["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or data["hidden_size"] // heads,
        rope_theta=float(theta),
        rms_norm_eps=data["rms_norm_eps"],
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2",
        max_positions=min(limit for limit in limits if limit is not None),
    )


def tower_parameters(vision: VisionConfig) -> int:
    """Of the encoder: patch embedding, with CLS (CLIP) or a bias (SigLIP), positions, layers, and the norm behind them,
    which is there even where nothing reads it."""
    width, wide = vision.hidden_size, vision.intermediate_size
    attention, ffn, norms = 4 * (width + 1) * width, (width + 1) * wide + (wide + 1) * width, 4 * width
    embedding = 3 * vision.patch_size**2 * width + width + vision.num_rows * width
    outer_norms = (2 if vision.embedding_norm else 1) * 2 * width
    return embedding + outer_norms + vision.num_layers * (attention + ffn + norms)


def projector_parameters(config: ModelConfig) -> int:
    """Of LLaVA's two linear layers, or SmolVLM's matrix."""
    if config.projector == "linear":
        return config.projector_input * config.text.hidden_size
    width = config.projector_size
    return (config.projector_input + 1) * width + (width + 1) * config.text.hidden_size


def text_parameters(text: TextConfig) -> int:
    """Of a Llama-type decoder, with its embedding and its head."""
    width, query, key = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer = 2 * width * (query + key) + 3 * width * text.intermediate_size + 2 * width
    layer += query + 2 * key if text.qkv_bias else 0
    return text.num_layers * layer + width + text.vocab_size * width * (1 if text.tie_embeddings else 2)


CLIP_L_336: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_TOWER_SIZES: Mapping[str, Mapping[str, Any]] = {
    "clip-vit-large-patch14-336": CLIP_L_336,
    "clip-vit-large-patch14": {**CLIP_L_336, "image_size": 224},
}
"""By name, for a checkpoint that does not say them."""
