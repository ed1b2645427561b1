"""A checkpoint: a folder with config.json and model.safetensors, and beside them tokenizer.json, chat_template.jinja
and whatever else whoever speaks to the model needs.

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
_WEIGHTS = "model.safetensors"


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
    model: SkipVisionModel, directory: Path, files: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """Writes the model in `dtype`, and `files`, texts by their names, beside it; atomically."""
    save_weights(model.config, model.state_dict(), directory, files, dtype)


def save_weights(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    directory: Path,
    files: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """The same of a model's state dict; a tied output head is stored once."""
    tied = {_TIED} if config.text.tie_embeddings else set()
    tensors = {name: tensor.to(dtype) for name, tensor in weights.items() if name not in tied}

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        save_tensors(tensors, folder / _WEIGHTS)

    write_directory(directory, write)


def load_checkpoint(directory: Path, dtype: torch.dtype = torch.float32) -> SkipVisionModel:
    """The model in `dtype`, in eval mode, on the CPU; its weights are mapped from the file where they have that dtype.

    Raises CheckpointError with what is wrong.
    """
    config, weights_file = read_config(directory), directory / _WEIGHTS
    try:
        tensors = load_file(weights_file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights_file}: unreadable ({error})") from None
    if config.text.tie_embeddings and "decoder.embed.weight" in tensors:
        tensors[_TIED] = tensors["decoder.embed.weight"]
    with torch.device("meta"):
        model = SkipVisionModel(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{directory}: the weights do not fit config.json: {first_misfit(error)}") from None
    if config.text.tie_embeddings:
        model.decoder.head.weight = model.decoder.embed.weight
    return model.to(dtype).eval()


def read_config(directory: Path) -> ModelConfig:
    """What a checkpoint is, without its weights, which are there. Raises CheckpointError."""
    if not directory.is_dir():
        raise NoCheckpointError(f"{directory}: no such checkpoint folder")
    file = directory / "config.json"
    missing = [name for name in (file.name, _WEIGHTS) if not (directory / name).exists()]
    if len(missing) == 2:
        raise NoCheckpointError(
            f"{directory}: {missing[0]} is missing{_instead(directory) or ', so it is no checkpoint'}"
        )
    if missing:
        raise CheckpointError(f"{directory}: {missing[0]} is missing{_instead(directory)}")
    try:
        return ModelConfig.from_json(file.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: unreadable ({error})") from None


def _instead(directory: Path) -> str:
    """What was meant, perhaps, by a folder that training wrote."""
    if (directory / "log.jsonl").exists():
        return f", since this is the folder of a run; name {directory / 'checkpoint'}, which a run writes at its end"
    if (directory / "adapter_config.json").exists():
        return ", since these are adapters alone; name the checkpoint into which they were merged"
    return ""


def first_misfit(error: RuntimeError) -> str:
    """What `load_state_dict` names first of the weights that do not fit."""
    _, *misfits = str(error).splitlines()
    return misfits[0].strip() if misfits else str(error)
