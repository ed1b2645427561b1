"""Any model that there is, as what training starts from: a checkpoint, a published model, or a bundle of floats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from skipvision.checkpoint import CheckpointError
from skipvision.config import ConfigError, ModelConfig
from skipvision.families import NAME_TOWER
from skipvision.model import SkipVisionModel
from skipvision.presets import PRESETS
from skipvision.published import weight_files
from skipvision.training.base import Base
from skipvision.training.tune_recipe import TuneRecipe
from svcli_export.published_files import is_published, read_object
from svcli_export.samples import Skip, setting_of
from svcli_export.source import Outline, SourceError, read_outline, read_source
from svcli_export.speaking import ChatSpeaker
from svcli_export.weights import WEIGHTS_FILE

_CHUNK = 16 << 20
_TRAINABLE = ("fp32", "fp16")
_EXPORT_FIRST = "export it with --precision fp32 and --vision-tower, and train on that bundle"


def read_speaker(folder: Path, recipe: TuneRecipe) -> tuple[ChatSpeaker, ModelConfig]:
    """How the base in `folder` is spoken to, and what it is with the recipe's skip setting; no weights are read.

    Raises SourceError for one that cannot be trained, or what `read_source` does.
    """
    with _explained():
        outline = read_outline(folder, check_files=False)
    _check(folder, outline)
    setting = setting_of(outline.config, asked_of(recipe))
    return _speaker(outline), outline.config.with_skip(None if setting == "off" else setting)


def read_base(
    folder: Path, recipe: TuneRecipe, progress: Callable[[str, float], None] = lambda _what, _share: None
) -> Base:
    """The base in `folder` with the recipe's skip setting: in fp32, in memory of its own, all of which can learn.

    Its identity is a hash of config.json and of every byte of the weights. That costs about as long as reading them,
    which is little beside training, and nothing less would tell two models apart that differ in one matrix.
    Raises what `read_speaker` does, and ConfigError for a setting that does not fit.
    """
    asked = asked_of(recipe)
    with _explained():
        outline = read_outline(folder, check_files=False)
        _check(folder, outline)
        source = read_source(folder, partial(setting_of, asked=asked), lambda what, share: progress(what, 0.5 * share))
    setting = setting_of(source.model.config, asked)
    override = None if setting == "off" else setting
    model = source.model if override == source.model.config.skip else source.model.with_skip(override)
    source.check(model.config)
    progress("copying weights", 0.5)
    _own(folder, model)
    identity = _identity(folder, outline, lambda share: progress("hashing weights", 0.6 + 0.4 * share))
    return Base(model, _speaker(outline), identity)


def asked_of(recipe: TuneRecipe) -> Skip | None:
    """The skip setting; None where the base's own is to stay. Raises ConfigError for an unknown preset."""
    if not recipe.preset:
        return recipe.skip
    if recipe.preset == "off":
        return "off"
    if recipe.preset not in PRESETS:
        raise ConfigError(f"preset: unknown {recipe.preset!r}; known: off, {', '.join(PRESETS)}")
    return PRESETS[recipe.preset]


def _speaker(outline: Outline) -> ChatSpeaker:
    return ChatSpeaker(outline.tokenizer, outline.chat, outline.image)


def _check(folder: Path, outline: Outline) -> None:
    """Raises SourceError for weights that were rounded to integers."""
    if outline.manifest is not None and outline.manifest.contract.precision not in _TRAINABLE:
        raise SourceError(
            f"{folder}: a bundle of {outline.manifest.contract.precision} weights cannot be trained; name the"
            " checkpoint that it was exported from"
        )
    if is_published(folder) and "quantization_config" in read_object(folder, "config.json"):
        raise SourceError(f"{folder}: its weights are quantised and cannot be trained; name the model in floats")


@contextmanager
def _explained() -> Iterator[None]:
    """Says what there is to do in training where export would name an option."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        if NAME_TOWER not in str(error):
            raise
        raise SourceError(str(error).replace(NAME_TOWER, _EXPORT_FIRST)) from None


def _own(folder: Path, model: SkipVisionModel) -> None:
    """Weights that are views of files become fp32 in memory, one at a time. Raises SourceError for NaN."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise SourceError(f"{folder}: {name} holds what is no finite number, so that nothing can be learned")
        parameter.data = parameter.data.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        parameter.requires_grad_()


def _identity(folder: Path, outline: Outline, progress: Callable[[float], None]) -> str:
    if outline.manifest is not None:
        described, files = json.dumps(outline.manifest.model), [WEIGHTS_FILE]
    else:
        described = (folder / "config.json").read_text(encoding="utf-8")
        files = weight_files(folder)
    digest = hashlib.sha256(described.encode())
    total = sum((folder / file).stat().st_size for file in files)
    done = 0
    for file in files:
        with (folder / file).open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress(done / total)
    return digest.hexdigest()
