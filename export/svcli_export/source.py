"""What an export starts from: a checkpoint, or a bundle, whose weights are turned back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open

from skipvision.checkpoint import load_checkpoint, read_config
from skipvision.config import ModelConfig, SkipConfig, VisionConfig
from skipvision.model import SkipVisionModel
from skipvision.published import load_published, read_known
from skipvision.tiles import most_tokens
from skipvision.tokenizer import END, IMAGE
from svcli_export.chat import ChatTokenizer
from svcli_export.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    ChatFormat,
    ImageProcessing,
    Manifest,
    load_manifest,
)
from svcli_export.processing import check_chat, read_processing
from svcli_export.processing_file import PROCESSING_FILE, TEMPLATE_FILE, read_processing_file
from svcli_export.published_files import is_published
from svcli_export.quantize import num_blocks_read
from svcli_export.restore import restore_model

_CONTEXT = 1024
"""Rows beside those of large pictures."""


class SourceError(ValueError):
    """A source with a file that cannot be read, or without something that is asked of it."""


@dataclass(frozen=True)
class Outline:
    """A model without its weights, and how it is spoken to."""

    config: ModelConfig
    """With its own skip setting."""
    tokenizer: str
    chat: ChatFormat
    image: ImageProcessing
    manifest: Manifest | None = None
    """Of a bundle."""


@dataclass(frozen=True)
class Source:
    """A model, and how it is spoken to."""

    model: SkipVisionModel
    """In eval mode, on the CPU; in fp32, or mapped from its files as a published one or a bundle is stored."""
    tokenizer: str
    chat: ChatFormat
    image: ImageProcessing
    manifest: Manifest | None = None
    """Of a bundle."""
    skipping: SkipVisionModel | None = None
    """The model on the same weights as a variant of the bundle has it, where the bundle itself skips nothing: with the
    summary layer that `model` lacks."""

    def max_context(self, max_images: int) -> int:
        """Rows of one conversation where nothing else is asked for."""
        if self.manifest is not None and max_images == self.max_images:
            return self.manifest.contract.max_context
        rows = max_images * most_tokens(self.model.config)
        return _CONTEXT if rows <= _CONTEXT // 2 else rows + _CONTEXT

    @property
    def max_images(self) -> int:
        """Pictures of one conversation, likewise."""
        if self.manifest is not None:
            return self.manifest.contract.max_images
        return 2 if self.model.config.tiles is None else 1

    def check(self, config: ModelConfig) -> None:
        """Raises SourceError where this is a bundle that lacks layers of the encoder which `config` reads."""
        if self.manifest is None:
            return
        own = (self.manifest, *map(self.manifest.variant, self.manifest.variants))
        if num_blocks_read(config) > max(num_blocks_read(each.config) for each in own):
            raise SourceError(
                "this bundle holds only those layers of the encoder that its own skip settings read; export from its"
                " checkpoint instead"
            )


def read_source(
    folder: Path,
    skip: Callable[[ModelConfig], SkipConfig | Literal["off"] | None] = lambda _config: None,
    progress: Callable[[str, float], None] = lambda _what, _share: None,
    *,
    tower: Path | None = None,
    processor: Path | None = None,
) -> Source:
    """What there is in `folder`. `skip` is asked how a published model is to skip, since the authors' own does not say.

    Published models of LLaVA's own code need what it kept elsewhere: `tower`, the folder of their vision tower, and
    `processor`, that of a model whose tokenizer, chat template and picture processing are theirs, where what is told
    from their tokenizer and config will not do. Raises SourceError,
    or CheckpointError, BundleError, ConfigError or ProcessingError for what cannot be read.
    """
    outline = read_outline(folder, tower=tower, processor=processor)
    skipping = None
    if outline.manifest is not None:
        model = restore_model(folder, outline.manifest, mapped=True)
        others = map(outline.manifest.variant, outline.manifest.variants if model.config.skip is None else ())
        if (other := next((each for each in others if each.config.skip is not None), None)) is not None:
            skipping = restore_model(folder, other, mapped=True)
    elif is_published(folder):
        model = load_published(folder, stored_dtype(folder), progress, tower=tower, skip=skip(outline.config))
    else:
        model = load_checkpoint(folder)
    return Source(model, outline.tokenizer, outline.chat, outline.image, outline.manifest, skipping)


def read_outline(
    folder: Path, *, tower: Path | None = None, processor: Path | None = None, check_files: bool = True
) -> Outline:
    """What there is in `folder`, its weights aside, which of a bundle are hashed unless `check_files` is False. Raises
    what `read_source` does."""
    if (folder / MANIFEST_FILE).is_file():
        manifest = load_manifest(folder, check_files=check_files)
        return Outline(manifest.config, _read(folder / TOKENIZER_FILE), manifest.chat, manifest.image, manifest)
    if is_published(folder):
        known = read_known(folder, tower).config
        read = read_processing(processor or folder, known)
        if read.config.tiles != known.tiles:
            raise SourceError(f"{folder}: its processor cuts pictures into other tiles than its config.json says")
        return Outline(known, read.tokenizer, read.chat, read.image)
    config = read_config(folder)
    tokenizer, template = _read(folder / TOKENIZER_FILE), _read(folder / TEMPLATE_FILE)
    kept = read_processing_file(folder)
    if kept is None:
        return Outline(config, tokenizer, own_chat(folder, tokenizer, template), own_image(config.vision))
    chat, image = kept
    check_chat(folder, tokenizer, chat)
    if image.image_size != config.vision.image_size:
        raise SourceError(f"{folder}: {PROCESSING_FILE} makes pictures of another size than its config.json says")
    return Outline(config, tokenizer, chat, image)


def own_image(vision: VisionConfig) -> ImageProcessing:
    """How models that are trained here see."""
    return ImageProcessing(image_size=vision.image_size, mean=vision.image_mean, std=vision.image_std)


def own_chat(folder: Path, tokenizer_json: str, template: str) -> ChatFormat:
    """How models that are trained here are spoken to. Raises SourceError."""
    try:
        tokenizer = ChatTokenizer(tokenizer_json, template).tokenizer
    except (TemplateError, RecursionError) as error:
        raise SourceError(f"{folder}: its chat template is broken ({error})") from None
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SourceError(f"{folder}: its tokenizer is broken ({error})") from None
    image_id, end_id = tokenizer.token_to_id(IMAGE), tokenizer.token_to_id(END)
    if image_id is None or end_id is None:
        raise SourceError(f"the tokenizer has no {IMAGE if image_id is None else END} token, which chat needs")
    return ChatFormat(template=template, image_id=image_id, stop_ids=(end_id,))


def stored_dtype(folder: Path) -> torch.dtype:
    """Of the first matrix; fp32 where there is none to be found, which loading then says better."""
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                tensor = file.get_tensor(name)
                if tensor.dim() > 1 and tensor.is_floating_point():
                    dtype: torch.dtype = tensor.dtype
                    return dtype
    return torch.float32


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
