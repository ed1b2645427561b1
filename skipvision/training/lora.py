"""Low-rank adapters on the decoder (LoRA, arXiv 2106.09685), through peft, which is imported where they are asked for.

An adapted layer computes W x + alpha / rank * B A x. Only A [rank, in] and B [out, rank] learn; B starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skipvision.checkpoint import save_tensors
from skipvision.decoder import Decoder
from skipvision.training.tune_recipe import LoraRecipe

if TYPE_CHECKING:
    from peft import LoraConfig

_ATTENTION = ("q", "k", "v", "o")
_NAME = "default"
"""peft's name of the only adapter."""
_A, _B = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"
_BASE = ".base_layer."
_PEFT = "base_model.model."
"""What peft puts in front of names in its files."""


def add_adapters(decoder: Decoder, recipe: LoraRecipe, seed: int = 0) -> None:
    """Adapts `decoder` in place: its own weights are frozen, those of the adapters learn, in the same dtype.

    A comes from `seed` alone, so that it is the same in all processes.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(recipe, ""), decoder)
    decoder.train(decoder.training)  # what came in draws dropout, whatever the decoder does


def merged_state(state: Mapping[str, Tensor], recipe: LoraRecipe) -> dict[str, Tensor]:
    """The state dict of an adapted model, or of a module that holds one, as that of the plain model."""
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        plain = name.replace(_BASE, ".")
        if plain == name or not name.endswith(".weight"):
            merged[plain] = tensor
            continue
        layer = plain.removesuffix(".weight")
        change = state[layer + _B].float() @ state[layer + _A].float()
        merged[plain] = (tensor.float() + recipe.alpha / recipe.rank * change).to(tensor.dtype)
    return merged


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters alone, out of the state dict of an adapted SkipVisionModel, by the names that peft's files have."""
    return {_PEFT + name.replace(f".{_NAME}.", "."): each for name, each in state.items() if name.endswith((_A, _B))}


def write_adapter(folder: Path, state: Mapping[str, Tensor], recipe: LoraRecipe, identity: str) -> None:
    """Writes the adapters of an adapted SkipVisionModel as peft reads them; `identity` is that of their base."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(adapter_state(state), folder / "adapter_model.safetensors", {"format": "pt", "base": identity})
    _peft_config(recipe, r"decoder\.").save_pretrained(str(folder))


def _peft_config(recipe: LoraRecipe, prefix: str) -> LoraConfig:
    from peft import LoraConfig

    layers = (f"attention\\.{name}" if name in _ATTENTION else f"ffn\\.{name}" for name in recipe.targets)
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=rf"{prefix}layers\.\d+\.({'|'.join(layers)})",
    )
