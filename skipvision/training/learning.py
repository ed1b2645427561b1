"""What learns of a base model, how fast, and what is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from skipvision.model import SkipVisionModel
from skipvision.training.lora import add_adapters
from skipvision.training.tune_recipe import TuneOptim, TuneRecipe
from skipvision.vision import VisionBlock

_PROJECTING = ("projector.", "newline", "summary.")
_PLACES = ("vision.position", "projector.rows", "projector.columns")
"""Embeddings of positions, which no weight decay shrinks."""


def set_learning(model: SkipVisionModel, recipe: TuneRecipe) -> None:
    """Freezes all but what `recipe` lets learn; adapters come into the decoder where it asks for them."""
    model.requires_grad_(False)
    if recipe.what == "full":
        model.decoder.requires_grad_(True)
    elif recipe.what == "lora":
        add_adapters(model.decoder, recipe.lora, recipe.seed)
    for name, parameter in model.named_parameters():
        if name.startswith(_PROJECTING):
            parameter.requires_grad_(True)
        elif name.startswith("vision.") and recipe.optim.vision_learning_rate:
            parameter.requires_grad_(_depth(name, model) is not None)


def _depth(name: str, model: SkipVisionModel) -> int | None:
    """Layer that a weight of the vision tower is of, 0 for the embedding; None behind the last layer that is read."""
    top = max(model.config.vision.feature_layers)
    if name.startswith("vision.blocks."):
        depth = int(name.split(".")[2]) + 1
        return depth if depth <= top else None
    return top if name.startswith("vision.output_norm.") else 0


def parameter_groups(model: SkipVisionModel, optim: TuneOptim) -> list[dict[str, object]]:
    """All that learns, by peak learning rate and weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = optim.weight_decay if parameter.dim() > 1 and name not in _PLACES else 0.0
            groups.setdefault((_rate(name, model, optim), decay), []).append(parameter)
    return [{"params": each, "lr": rate, "weight_decay": decay} for (rate, decay), each in groups.items()]


def _rate(name: str, model: SkipVisionModel, optim: TuneOptim) -> float:
    if name.startswith("vision."):
        depth = _depth(name, model)
        assert depth is not None
        return optim.vision_learning_rate * optim.vision_decay ** (max(model.config.vision.feature_layers) - depth)
    return (name.startswith(_PROJECTING) and optim.projector_learning_rate) or optim.learning_rate


def recompute_layers(model: SkipVisionModel) -> None:
    """Keeps what enters a layer alone, and computes the layer again in the backward pass; dropout draws the same."""
    for layer in model.decoder.layers:
        _recompute(layer, "forward")
    for block in cast("Iterable[VisionBlock]", model.vision.blocks):
        if any(parameter.requires_grad for parameter in block.parameters()):
            _recompute(block, "heads")
            _recompute(block, "forward")


def _recompute(module: nn.Module, method: str) -> None:
    """In place, so that weights keep their names."""
    setattr(module, method, partial(checkpoint, getattr(module, method), use_reentrant=False))
