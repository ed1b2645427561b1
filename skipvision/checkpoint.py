"""A checkpoint: a folder with config.json, model.safetensors, tokenizer.json and chat_template.jinja.

Safetensors only: nothing here unpickles.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skipvision.config import ConfigError, ModelConfig
from skipvision.folders import write_directory
from skipvision.model import SkipVisionModel

_TIED = "decoder.head.weight"


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut or of another shape than its config says."""


class NoCheckpointError(CheckpointError):
    """What is no checkpoint at all."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors atomically."""
    fresh = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, fresh, metadata)
    fresh.chmod(0o644)  # safetensors writes for the owner alone
    os.replace(fresh, path)


def save_checkpoint(
    model: SkipVisionModel, directory: Path, tokenizer_json: str, chat_template: str, dtype: torch.dtype = torch.float32
) -> None:
    """Writes the model in `dtype`, atomically; a tied output head is stored once."""
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if model.config.text.tie_embeddings:
        del tensors[_TIED]

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(model.config.to_json(), encoding="utf-8")
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        save_tensors(tensors, folder / "model.safetensors")

    write_directory(directory, write)


def load_checkpoint(directory: Path, dtype: torch.dtype = torch.float32) -> SkipVisionModel:
    """The model in `dtype`, in eval mode, on the CPU. Raises CheckpointError with what is wrong."""
    if not directory.is_dir():
        raise NoCheckpointError(f"{directory}: no such checkpoint folder")
    config_file, weights_file = directory / "config.json", directory / "model.safetensors"
    for file in (config_file, weights_file):
        if not file.exists():
            raise CheckpointError(f"{directory}: {file.name} is missing")
    try:
        config = ModelConfig.from_json(config_file.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise CheckpointError(f"{config_file}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{config_file}: unreadable ({error})") from None
    try:
        tensors = load_file(weights_file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights_file}: unreadable ({error})") from None
    if config.text.tie_embeddings and "decoder.embed.weight" in tensors:
        tensors[_TIED] = tensors["decoder.embed.weight"]
    model = SkipVisionModel(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{directory}: the weights do not fit config.json: {first_misfit(error)}") from None
    return model.to(dtype).eval()


def first_misfit(error: RuntimeError) -> str:
    """What `load_state_dict` names first of the weights that do not fit."""
    _, *misfits = str(error).splitlines()
    return misfits[0].strip() if misfits else str(error)
