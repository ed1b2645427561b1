"""The PyTorch model of a bundle: its weights under their checkpoint names again, dequantised and turned back.

What is rounded in the bundle stays rounded, so whoever is held against this model answers for its own errors only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from skipvision.checkpoint import first_misfit, load_checkpoint
from skipvision.model import SkipVisionModel
from skipvision.published import load_published
from svcli_export.manifest import BundleError, Manifest
from svcli_export.published_files import is_published
from svcli_export.quantize import (
    ROPE_COS,
    ROPE_SIN,
    SCALE,
    TRANSPOSED,
    ZERO,
    dequantize_blocks,
    num_blocks_read,
)
from svcli_export.weights import WEIGHTS_FILE

EMBEDDING, HEAD = "decoder.embed.weight", "decoder.head.weight"
_SUMMARY = "summary."


class StoredWeights:
    """A bundle's weights under their checkpoint names, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or SafetensorError."""
        self._file: Any = safe_open(path, framework="pt")  # which has no types
        stored = frozenset(self._file.keys())  # type: ignore[no-untyped-call]
        self._scales, self._zeros = ({name for name in stored if name.endswith(end)} for end in (SCALE, ZERO))
        whole = stored - self._scales - self._zeros - {ROPE_COS, ROPE_SIN}
        self._stored = {name.removesuffix(TRANSPOSED): name for name in whole}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    @property
    def names_in_blocks(self) -> frozenset[str]:
        """Those of 4 bits."""
        return frozenset(name for name, stored in self._stored.items() if stored + ZERO in self._zeros)

    def tensor(self, name: str) -> torch.Tensor:
        """In fp32, in its own shape, what the graphs compute with. Raises KeyError for a name that is not there."""
        return self.mapped(name).float()

    def copied(self, name: str) -> torch.Tensor:
        """The same, in memory of its own."""
        return self.tensor(name).clone(memory_format=torch.contiguous_format)

    def mapped(self, name: str) -> torch.Tensor:
        """In the dtype of the file, and a view of it, where that is a float; in fp32 where it was quantised."""
        stored, get = self._stored[name], self._file.get_tensor
        value: torch.Tensor = get(stored)
        if stored + ZERO in self._zeros:
            value = dequantize_blocks(value, get(stored + SCALE), get(stored + ZERO))
        elif stored + SCALE in self._scales:
            value = value.float() * get(stored + SCALE)  # [in, out] * [out]
        return value.T if stored.endswith(TRANSPOSED) else value


def restore_model(bundle: Path, manifest: Manifest, *, mapped: bool = False) -> SkipVisionModel:
    """The model in fp32, in eval mode, on the CPU. Layers of the encoder that nothing reads are not in a bundle: 0.

    `manifest` is the bundle's, or that of one of its variants. `mapped`: weights of a float bundle stay in the file, in
    the dtype that they have there.

    Raises BundleError where the weights are unreadable or not those of the manifest's model.
    """
    path, config = bundle / WEIGHTS_FILE, manifest.config
    try:
        stored = StoredWeights(path)
        read = stored.mapped if mapped else stored.copied
        # A plain model has no summary layer, though a variant beside it may need one.
        names = (name for name in stored.names if config.skip is not None or not name.startswith(_SUMMARY))
        tensors = {name: read(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: unreadable ({error}); re-export it with `svcli export`") from None
    with torch.device("meta"):
        model = SkipVisionModel(config)
    unread = tuple(f"vision.blocks.{layer}." for layer in range(num_blocks_read(config), config.vision.num_layers))
    for name, parameter in model.state_dict().items():
        if name.startswith(unread) and name not in tensors:
            tensors[name] = torch.zeros(parameter.shape)
    if config.text.tie_embeddings and EMBEDDING in tensors:
        tensors[HEAD] = tensors[EMBEDDING]
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        problem = f"its weights do not fit its manifest ({first_misfit(error)})"
        raise BundleError(f"{bundle}: {problem}; re-export it with `svcli export`") from None
    if config.text.tie_embeddings:
        model.decoder.head.weight = model.decoder.embed.weight
    return model.eval()


def original_model(checkpoint: Path, manifest: Manifest) -> SkipVisionModel:
    """The checkpoint's model with the skip setting of the bundle, in fp32, in eval mode, on the CPU.

    Raises CheckpointError, or BundleError for a checkpoint of another model.
    """
    config = manifest.config
    if is_published(checkpoint):
        model = load_published(checkpoint, skip=config.skip or "off").float()
    else:
        model = load_checkpoint(checkpoint)
    another = f"{checkpoint}: not the model that the bundle was exported from"
    remedy = "name the checkpoint that was, or leave --checkpoint out"
    if replace(model.config, skip=config.skip, skip_trained=config.skip_trained) != config:
        raise BundleError(f"{another}; {remedy}")
    if model.config.skip is None and config.skip is not None:
        raise BundleError(f"{another} (it is a plain model, without a summary layer); {remedy}")
    return model.with_skip(config.skip)
