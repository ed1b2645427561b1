"""What an export starts from: a checkpoint, or a bundle, whose weights are turned back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from skipvision.checkpoint import load_checkpoint
from skipvision.config import ModelConfig
from skipvision.model import SkipVisionModel
from skipvision.published import load_published
from svcli_export.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, load_manifest
from svcli_export.quantize import num_blocks_read
from svcli_export.restore import restore_model


class SourceError(ValueError):
    """A source with a file that cannot be read, or without something that is asked of it."""


@dataclass(frozen=True)
class Source:
    """A model, and how it is spoken to."""

    model: SkipVisionModel
    """In eval mode, on the CPU; in fp32, or mapped from its files as a published one or a bundle is stored."""
    tokenizer: str
    template: str
    manifest: Manifest | None
    """Of a bundle."""

    @property
    def max_context(self) -> int:
        """Rows of one conversation where nothing else is asked for."""
        return 1024 if self.manifest is None else self.manifest.contract.max_context

    @property
    def max_images(self) -> int:
        """Pictures of one conversation, likewise."""
        return 2 if self.manifest is None else self.manifest.contract.max_images

    def check(self, config: ModelConfig) -> None:
        """Raises SourceError where this is a bundle that lacks layers of the encoder which `config` reads."""
        if self.manifest is not None and num_blocks_read(config) > num_blocks_read(self.manifest.config):
            raise SourceError(
                "this bundle holds only those layers of the encoder that its own skip setting reads; export from its"
                " checkpoint instead"
            )


def read_source(folder: Path) -> Source:
    """Raises SourceError, or CheckpointError or BundleError for what is no checkpoint and no bundle."""
    if not (folder / MANIFEST_FILE).is_file():
        _refuse_published(folder / "config.json")
        model = load_checkpoint(folder)
        return Source(model, _read(folder / TOKENIZER_FILE), _read(folder / "chat_template.jinja"), None)
    manifest = load_manifest(folder)
    return Source(
        restore_model(folder, manifest, mapped=True), _read(folder / TOKENIZER_FILE), manifest.chat.template, manifest
    )


def read_published(folder: Path, tokenizer: str, template: str) -> Source:
    """A model that was published for transformers, in the dtype that it is stored in and mapped from its files.

    `tokenizer` and `template` as chat reads them. Raises CheckpointError or ConfigError.
    """
    return Source(load_published(folder, _stored_dtype(folder)), tokenizer, template, None)


def _stored_dtype(folder: Path) -> torch.dtype:
    """Of the first matrix; fp32 where there is none to be found, which loading then says better."""
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                tensor = file.get_tensor(name)
                if tensor.dim() > 1 and tensor.is_floating_point():
                    dtype: torch.dtype = tensor.dtype
                    return dtype
    return torch.float32


def _refuse_published(config: Path) -> None:
    """Raises SourceError for a model that was published for transformers."""
    with suppress(OSError, UnicodeDecodeError):
        if '"model_type"' in config.read_text(encoding="utf-8"):
            raise SourceError(
                f"{config.parent} is a model published for transformers, which cannot be exported yet; `svcli cost`"
                " shows what skipping would save on it"
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
