"""Checkpoints as transformers, or LLaVA's own code, saves them: config.json of a known family, safetensors, sharded or
not.

Weights are mapped from the file and used as they are: where the dtype is the one asked for, none of the decoder is
copied. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skipvision.checkpoint import CheckpointError, NoCheckpointError, first_misfit
from skipvision.config import ConfigError, SkipConfig, TextConfig, VisionConfig
from skipvision.families import NAME_TOWER, KnownModel, picture_settings, read_decoder, read_model, read_tower
from skipvision.model import SkipVisionModel

_EMBEDDING, _HEAD_WEIGHT = "decoder.embed.weight", "decoder.head.weight"
_CONFIG = "config.json"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_TOWER = r"(?:(?:model\.)?(?:(?:vision_tower\.){1,2}(?:vision_model\.)?|vision_model\.))?"
_PROJECTOR = r"(?:model\.)?multi_modal_projector\."
_ORIGINAL_PROJECTOR = r"model\.mm_projector\."
_TEXT = r"(?:language_model\.model|model\.language_model|model\.text_model|model)\."
_ADA = r"(?:language_model\.|model\.){0,2}ada\."
_HEAD = r"(?:language_model\.)?lm_head\."
_LAYER = r"layers\.(\d+)\."
_NAMES: tuple[tuple[str, str], ...] = (
    (_TOWER + r"embeddings\.class_embedding", "vision.cls_token"),
    (_TOWER + r"embeddings\.patch_embedding\.(weight|bias)", r"vision.patch_embed.\1"),
    (_TOWER + r"embeddings\.position_embedding\.weight", "vision.position"),
    (_TOWER + r"pre_layrnorm\.(weight|bias)", r"vision.norm.\1"),
    (_TOWER + rf"encoder\.{_LAYER}self_attn\.([qkv])_proj\.(weight|bias)", r"vision.blocks.\1.qkv.\3/\2"),
    (_TOWER + rf"encoder\.{_LAYER}self_attn\.out_proj\.(weight|bias)", r"vision.blocks.\1.out.\2"),
    (_TOWER + rf"encoder\.{_LAYER}layer_norm([12])\.(weight|bias)", r"vision.blocks.\1.norm\2.\3"),
    (_TOWER + rf"encoder\.{_LAYER}mlp\.(fc[12])\.(weight|bias)", r"vision.blocks.\1.\2.\3"),
    (_TOWER + r"post_layernorm\.(weight|bias)", r"vision.output_norm.\1"),
    (_PROJECTOR + r"linear_([12])\.(weight|bias)", r"projector.fc\1.\2"),
    (_ORIGINAL_PROJECTOR + r"0\.(weight|bias)", r"projector.fc1.\1"),
    (_ORIGINAL_PROJECTOR + r"2\.(weight|bias)", r"projector.fc2.\1"),
    (_ADA + r"0\.(weight|bias)", r"summary.norm.\1"),
    (_ADA + r"1\.(weight|bias)", r"summary.score.\1"),
    (r"model\.connector\.modality_projection\.proj\.weight", "projector.matrix.weight"),
    (r"(?:model\.)?image_newline", "newline"),
    (_TEXT + r"embed_tokens\.weight", "decoder.embed.weight"),
    (_TEXT + r"norm\.weight", "decoder.norm.weight"),
    (_TEXT + _LAYER + r"input_layernorm\.weight", r"decoder.layers.\1.norm1.weight"),
    (_TEXT + _LAYER + r"post_attention_layernorm\.weight", r"decoder.layers.\1.norm2.weight"),
    (_TEXT + _LAYER + r"self_attn\.([qkvo])_proj\.(weight|bias)", r"decoder.layers.\1.attention.\2.\3"),
    (_TEXT + _LAYER + r"mlp\.(gate|up|down)_proj\.weight", r"decoder.layers.\1.ffn.\2.weight"),
    (_HEAD + "weight", "decoder.head.weight"),
)
"""Theirs, in the spellings of several versions of transformers, to ours. `/q` is a part of one of ours."""
_UNREAD = re.compile(rf"{_TOWER}(?:head\..+|embeddings\.position_ids)|.*\.rotary_emb\.inv_freq")
_TEXT_HALF = re.compile(r"text_model\..+|(?:visual|text)_projection\.weight|logit_(?:scale|bias)")
"""Of a vision tower that was trained with one for text."""


def load_published(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str, float], None] = lambda _what, _share: None,
    *,
    tower: Path | None = None,
    skip: SkipConfig | Literal["off"] | None = None,
) -> SkipVisionModel:
    """The model in `dtype`, in eval mode, on the CPU. `progress` is told what share of the weights was read.

    `tower` is the folder of a CLIP model, for checkpoints without their vision tower or its sizes; weights that are in
    the checkpoint come first. The plain model comes where `skip` is None or `off`. One that has a summary layer of the
    authors' training does not say how much it skipped, so None is refused there.

    Raises CheckpointError for a folder without safetensors, a shard that is missing or cut, weights that do not fit
    config.json; ConfigError for a family that is not computed here.
    """
    known = read_known(directory, tower)
    tensors = _ours(directory, dtype, progress=progress)
    if known.tower is not None and not any(name.startswith("vision.") for name in tensors):
        if tower is None:
            raise CheckpointError(f"{directory}: the weights of {known.tower} are not in it; {NAME_TOWER}")
        tensors |= _ours(tower, dtype, "vision.")
    is_trained = any(name.startswith("summary.") for name in tensors)
    if is_trained and skip is None:
        raise CheckpointError(
            f"{directory}: it was trained to skip (it has model.ada) and does not say how much; name the setting, such"
            " as --preset sv-llava-100 or --skip 100/156"
        )
    asked = None if skip == "off" else skip
    if asked is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("summary.")}
    _complete_tower(tensors, known.config.vision, dtype)
    # Some files leave the head to be tied where config.json does not say so.
    is_tied = _HEAD_WEIGHT not in tensors
    if is_tied and _EMBEDDING in tensors:
        tensors[_HEAD_WEIGHT] = tensors[_EMBEDDING]
    text = replace(known.config.text, tie_embeddings=is_tied)
    with torch.device("meta"):
        model = SkipVisionModel(replace(known.config, text=text, skip=asked if is_trained else None))
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{directory}: the weights do not fit config.json: {first_misfit(error)}") from None
    if is_tied:
        model.decoder.head.weight = model.decoder.embed.weight
    if asked is not None and not is_trained:
        model = model.with_skip(asked)
    return model.eval().requires_grad_(False)


def load_tower(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[VisionConfig, dict[str, Tensor]]:
    """A vision tower alone, or that of a known model, by the names of `VisionEncoder`. Raises what `load_published`
    does."""
    try:
        vision = read_tower(_read(directory, _CONFIG), _picture_settings(directory))
    except ConfigError as error:
        raise ConfigError(f"{directory / _CONFIG}: {error}") from None
    tensors = _ours(directory, dtype, "vision.")
    _complete_tower(tensors, vision, dtype)
    return vision, {name.removeprefix("vision."): tensor for name, tensor in tensors.items()}


def load_decoder(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[TextConfig, dict[str, Tensor]]:
    """A causal language model, or that of a known model, by the names of `Decoder`; a tied head has no weight of its
    own. Raises what `load_published` does."""
    try:
        text = read_decoder(_read(directory, _CONFIG))
    except ConfigError as error:
        raise ConfigError(f"{directory / _CONFIG}: {error}") from None
    tensors = _ours(directory, dtype, "decoder.")
    text = replace(text, tie_embeddings=_HEAD_WEIGHT not in tensors)
    return text, {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}


def read_known(directory: Path, tower: Path | None = None) -> KnownModel:
    """The sizes that config.json states, and that of its `tower`. Raises what `load_published` does."""
    text = _read(directory, _CONFIG)
    beside = None if tower is None else _read(tower, _CONFIG)
    try:
        return read_model(text, _picture_settings(directory), beside)
    except ConfigError as error:
        raise ConfigError(f"{directory / _CONFIG}: {error}") from None


def _picture_settings(directory: Path) -> str | None:
    try:
        return picture_settings(directory)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory}: how its pictures are made is unreadable ({error})") from None


def _read(directory: Path, name: str) -> str:
    if not directory.is_dir():
        raise NoCheckpointError(f"{directory}: no such checkpoint folder")
    try:
        return (directory / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NoCheckpointError(f"{directory}: {name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory / name}: unreadable ({error})") from None


def _complete_tower(tensors: dict[str, Tensor], vision: VisionConfig, dtype: torch.dtype) -> None:
    """What the file has and nothing reads goes, and what ours has and theirs does not comes."""
    if not vision.output_norm:  # CLIP and SigLIP have one, which nothing of LLaVA reads
        for name in ("weight", "bias"):
            tensors.pop(f"vision.output_norm.{name}", None)
    if vision.has_cls:  # CLIP's patches have no bias
        tensors["vision.patch_embed.bias"] = torch.zeros(vision.hidden_size, dtype=dtype)


def _ours(
    directory: Path,
    dtype: torch.dtype,
    part: Literal["", "vision.", "decoder."] = "",
    progress: Callable[[str, float], None] = lambda _what, _share: None,
) -> dict[str, Tensor]:
    """Every tensor of the `part` under our name. Query, key and value of the tower become one."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for theirs, tensor, share in _stored(directory):
        progress("reading weights", share)
        if part == "vision." and _TEXT_HALF.fullmatch(theirs):
            continue
        name = _renamed(theirs)
        if name is None:
            raise CheckpointError(f"{directory}: unknown weight {theirs}")
        whole, _, third = name.partition("/")
        if not whole.startswith(part):
            continue
        if third:
            parts.setdefault(whole, {})[third] = tensor.to(dtype)
        elif whole:
            found[whole] = tensor.to(dtype)
    for whole, given in parts.items():
        if given.keys() == {"q", "k", "v"}:
            try:
                found[whole] = torch.cat([given["q"], given["k"], given["v"]])
            except RuntimeError:
                raise CheckpointError(f"{directory}: query, key and value of {whole} do not fit together") from None
    return found


def _renamed(theirs: str) -> str | None:
    """Our name, "" for what nothing reads, None for what is unknown."""
    if _UNREAD.fullmatch(theirs):
        return ""
    for pattern, ours in _NAMES:
        if match := re.fullmatch(pattern, theirs):
            return match.expand(ours)
    return None


def _stored(directory: Path) -> Iterator[tuple[str, Tensor, float]]:
    """Each tensor by its name, and what share of the files lies behind it."""
    files = weight_files(directory)
    for number, file in enumerate(files):
        path = directory / file
        try:
            with safe_open(path, framework="pt") as tensors:
                names = tensors.keys()
                for place, name in enumerate(names, 1):
                    yield name, tensors.get_tensor(name), (number + place / len(names)) / len(files)
        except FileNotFoundError:
            raise CheckpointError(f"{directory}: {file} is missing; download it again") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: unreadable ({error}); download it again") from None


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files, one or the shards of an index. Raises CheckpointError."""
    index = directory / _INDEX
    if not index.is_file():
        if not (directory / _SINGLE).is_file() and any(directory.glob("*.bin")):
            raise CheckpointError(
                f"{directory}: its weights are pickles, which are not read; get the model as safetensors, or save it"
                " again with transformers"
            )
        return [_SINGLE]
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: unreadable ({error!r}); download it again") from None
    if unlike := [file for file in files if not isinstance(file, str) or Path(file).name != file]:
        raise CheckpointError(f"{index}: {unlike[0]!r} is no file beside it")
    return sorted(files)
