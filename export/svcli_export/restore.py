"""The PyTorch model of a bundle: its weights under their checkpoint names again, dequantised and turned back.

What is rounded in the bundle stays rounded, so whoever is held against this model answers for its own errors only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from skipvision.checkpoint import first_misfit, load_checkpoint
from skipvision.model import SkipVisionModel
from svcli_export.manifest import BundleError, Manifest
from svcli_export.quantize import ROPE_COS, ROPE_SIN, SCALE, TRANSPOSED, num_blocks_read
from svcli_export.weights import WEIGHTS_FILE

_EMBEDDING, _HEAD = "decoder.embed.weight", "decoder.head.weight"


def restore_model(bundle: Path, manifest: Manifest) -> SkipVisionModel:
    """The model in fp32, in eval mode, on the CPU. Layers of the encoder that nothing reads are not in a bundle: 0.

    Raises BundleError where the weights are unreadable or not those of the manifest's model.
    """
    path, config = bundle / WEIGHTS_FILE, manifest.config
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: unreadable ({error}); re-export it with `svcli export`") from None
    tensors: dict[str, torch.Tensor] = {}
    for name, value in stored.items():
        if name in (ROPE_COS, ROPE_SIN) or name.endswith(SCALE):
            continue
        scale = stored.get(name + SCALE)
        whole = value.astype(np.float32) if scale is None else value.astype(np.float32) * scale  # [in, out] * [out]
        plain = whole.T if name.endswith(TRANSPOSED) else whole
        tensors[name.removesuffix(TRANSPOSED)] = torch.from_numpy(np.ascontiguousarray(plain))
    with torch.device("meta"):
        model = SkipVisionModel(config)
    unread = tuple(f"vision.blocks.{layer}." for layer in range(num_blocks_read(config), config.vision.num_layers))
    for name, parameter in model.state_dict().items():
        if name.startswith(unread):
            tensors[name] = torch.zeros(parameter.shape)
    if config.text.tie_embeddings and _EMBEDDING in tensors:
        tensors[_HEAD] = tensors[_EMBEDDING]
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
    model, config = load_checkpoint(checkpoint), manifest.config
    another = f"{checkpoint}: not the model that the bundle was exported from"
    remedy = "name the checkpoint that was, or leave --checkpoint out"
    if replace(model.config, skip=config.skip) != config:
        raise BundleError(f"{another}; {remedy}")
    if model.config.skip is None and config.skip is not None:
        raise BundleError(f"{another} (it is a plain model, without a summary layer); {remedy}")
    return model.with_skip(config.skip)
