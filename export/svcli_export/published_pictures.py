"""What a published model says of pictures: its preprocessor_config.json as ImageProcessing. Imports no torch.

Every setting that the family's own class reads is read here, or refused where it asks for something that is not
computed here. What their class does not read, nothing reads here either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from PIL import Image

from skipvision.config import ModelConfig, TilesConfig
from skipvision.families import CLIP_MEAN, CLIP_STD
from svcli_export.manifest import Fit, ImageProcessing, Resample
from svcli_export.published_files import ProcessingError

_HALF = (0.5, 0.5, 0.5)
_LARGEST_EDGE = 4096
"""Above it, their classes scale pictures once more."""


@dataclass(frozen=True)
class _Class:
    """One of their image processors, with what it takes where a file is silent."""

    cuts: Literal["never", "joined", "scaled"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: Mapping[str, int]
    crop: bool = False
    """Whether it keeps the middle of a picture."""
    pads: bool = False
    """Whether its `do_pad` makes a picture square; that of the others fills up a batch."""
    resample: Image.Resampling = Image.Resampling.BICUBIC


_SHORT, _SQUARE = {"shortest_edge": 224}, {"height": 224, "width": 224}
_SCALED = _Class("scaled", _HALF, _HALF, {"longest_edge": 4 * 364}, resample=Image.Resampling.LANCZOS)
_CLASSES: Mapping[str, _Class] = {
    "CLIPImageProcessor": _Class("never", CLIP_MEAN, CLIP_STD, _SHORT, crop=True),
    "LlavaImageProcessor": _Class("never", CLIP_MEAN, CLIP_STD, _SHORT, crop=True, pads=True),
    "SiglipImageProcessor": _Class("never", _HALF, _HALF, _SQUARE),
    "LlavaNextImageProcessor": _Class("joined", CLIP_MEAN, CLIP_STD, _SHORT, crop=True),
    "LlavaOnevisionImageProcessor": _Class("joined", CLIP_MEAN, CLIP_STD, {"height": 384, "width": 384}),
    "SmolVLMImageProcessor": _SCALED,
    "Idefics3ImageProcessor": _SCALED,
}


@dataclass(frozen=True)
class PublishedPictures:
    """How a published model's pictures are made."""

    config: ModelConfig
    """The model's, with mean, deviation and tiles as its processor has them."""
    processing: ImageProcessing
    tags: bool
    """Whether the tiles of a picture are tagged in the text."""


def read_pictures(data: Mapping[str, Any], config: ModelConfig) -> PublishedPictures:
    """Of a preprocessor_config.json, for a model whose encoder and tiles are `config`'s.

    Raises ProcessingError for an unknown class, what is not computed here, or what does not fit the model.
    """
    name = str(data.get("image_processor_type") or data.get("feature_extractor_type"))
    known = _CLASSES.get(name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil"))
    if known is None:
        raise ProcessingError(f"unknown image processor {name}; known: {', '.join(_CLASSES)}")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        _same(step, _value(data, step, True), True)
    factor = _value(data, "rescale_factor", 1 / 255)
    _same("rescale_factor", isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-6), True)
    mean, std = _colours(data, "image_mean", known.mean), _colours(data, "image_std", known.std)
    tiles = _tiles(data, known, config)
    processing = ImageProcessing(
        image_size=config.vision.image_size,
        mean=mean,
        std=std,
        fit=_fit(data, known, tiles, config.vision.image_size),
        resample=_resample(data, known),
        transparency="dropped",
    )
    vision = replace(config.vision, image_mean=mean, image_std=std)
    return PublishedPictures(replace(config, vision=vision, tiles=tiles), processing, known.cuts == "scaled")


def _fit(data: Mapping[str, Any], known: _Class, tiles: TilesConfig | None, side: int) -> Fit:
    """Also checks that a view is as large as the encoder's input."""
    if known.cuts == "scaled":
        return "stretch"
    size = _size("size", _value(data, "size", known.size), "shortest_edge")
    square, shortest = {"height": side, "width": side}, {"shortest_edge": side}
    crops = bool(_value(data, "do_center_crop", known.crop))
    if size not in (square, shortest):
        raise ProcessingError(f"size: {size} is not the encoder's {side}")
    if crops:
        crop = _size("crop_size", _value(data, "crop_size", {"height": 224, "width": 224}), "height")
        if crop != square:
            raise ProcessingError(f"crop_size: {crop} is not the encoder's {side}")
    if tiles is not None:
        # Among others, a picture that is not cut is padded.
        return "stretch" if tiles.among_others else "pad_first"
    if known.pads and _value(data, "do_pad", False):
        return "pad_first"
    if size == square:
        return "stretch"
    if not crops:
        raise ProcessingError("do_center_crop: without it pictures are not square, which is not computed here")
    return "crop"


def _tiles(data: Mapping[str, Any], known: _Class, config: ModelConfig) -> TilesConfig | None:
    if known.cuts == "never":
        if config.tiles is not None:
            raise ProcessingError("its image processor cuts no tiles, and its model wants some")
        return None
    if known.cuts == "joined":
        given = data.get("image_grid_pinpoints")
        sizes = () if config.tiles is None else config.tiles.sizes
        if given is not None and given != [list(size) for size in sizes]:
            raise ProcessingError(f"image_grid_pinpoints: {given} are not those of config.json")
        if not sizes:
            raise ProcessingError("its image processor cuts tiles, and config.json names no image_grid_pinpoints")
        return config.tiles
    _same("do_image_splitting", _value(data, "do_image_splitting", True), True)
    side = config.vision.image_size
    if (largest := _value(data, "max_image_size", {"longest_edge": 364})) != {"longest_edge": side}:
        raise ProcessingError(f"max_image_size: {largest} is not the encoder's {side}")
    size = _value(data, "size", known.size)
    edge = size.get("longest_edge") if isinstance(size, Mapping) else None
    if type(edge) is not int or not 1 <= edge <= _LARGEST_EDGE:
        raise ProcessingError(f"size: {size} is not computed here, only a longest_edge of at most {_LARGEST_EDGE}")
    return replace(config.tiles, longest_edge=edge) if config.tiles else TilesConfig(longest_edge=edge)


def _value(data: Mapping[str, Any], name: str, default: Any) -> Any:
    value = data.get(name)
    return default if value is None else value


def _same(name: str, value: Any, computed: Any) -> None:
    if value != computed:
        raise ProcessingError(f"{name}: {value!r} is not computed here, only {computed!r}")


def _size(name: str, value: Any, single: str) -> dict[str, Any]:
    """As a table, which older files do not have."""
    if type(value) is int:
        return {single: value} if single == "shortest_edge" else {"height": value, "width": value}
    if not isinstance(value, Mapping):
        raise ProcessingError(f"{name}: expected sides, got {value!r}")
    return {side: length for side, length in value.items() if length is not None}


def _colours(data: Mapping[str, Any], name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = _value(data, name, default)
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(each) in (int, float) for each in value):
        raise ProcessingError(f"{name}: expected three numbers, got {value!r}")
    red, green, blue = map(float, value)
    return red, green, blue


def _resample(data: Mapping[str, Any], known: _Class) -> Resample:
    value = _value(data, "resample", known.resample)
    for name in get_args(Resample):
        if value == Image.Resampling[name.upper()]:
            found: Resample = name
            return found
    raise ProcessingError(f"resample: {value!r} is none of Pillow's filters")
