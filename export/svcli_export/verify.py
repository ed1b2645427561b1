"""The check that ends an export: the graphs in ONNX Runtime against the PyTorch model, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnxruntime import InferenceSession

from skipvision.layout import RETAINED, SKIPPED, BatchLayout, ImageSpan, TokenLayout
from skipvision.model import SkipVisionModel
from svcli_export.contract import CACHE_PARTS, Contract, Precision, past_name, present_name
from svcli_export.manifest import ExportCheck, StageCheck
from svcli_export.runtime import open_session

Floats = npt.NDArray[Any]

NUM_TOKENS = 16
"""Greedy tokens compared for each picture."""


@dataclass(frozen=True)
class Tolerance:
    """Where a difference is no longer rounding."""

    max_error: float
    cosine: float
    vision_cosine: float
    """Lower: selection and merging are choices, and a patch that falls the other way changes its whole row."""
    norm_ratio: float
    """Largest distance of the ratio from 1."""
    agreement: float


# fp32: another order of summation. fp16: 11 bits of mantissa through all layers. int8: half a scale per weight
# (0.4 % of the largest in its column) and 8 bit activations in ONNX Runtime's kernel. A greedy choice may flip where
# two tokens are as good as equal, so below fp32 a few may.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(max_error=1e-3, cosine=0.99999, vision_cosine=0.99999, norm_ratio=1e-3, agreement=1.0),
    "fp16": Tolerance(max_error=0.05, cosine=0.999, vision_cosine=0.95, norm_ratio=0.01, agreement=0.9),
    "int8": Tolerance(max_error=0.25, cosine=0.98, vision_cosine=0.9, norm_ratio=0.05, agreement=0.75),
}


@dataclass
class _Stage:
    name: str
    max_error: float = 0.0
    cosine: float = 1.0
    norm_ratio: float = 1.0

    def compare(self, got: Floats, reference: Floats) -> None:
        got, reference = got.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        if not np.isfinite(got - reference).all():  # no comparison with NaN is true: it would pass below
            self.max_error, self.cosine, self.norm_ratio = math.inf, -1.0, math.inf
            return
        norms = np.linalg.norm(got), np.linalg.norm(reference)
        ratio = float(norms[0] / norms[1])
        self.max_error = max(self.max_error, float(np.abs(got - reference).max() / np.abs(reference).max()))
        self.cosine = min(self.cosine, float(got @ reference / (norms[0] * norms[1])))
        if abs(ratio - 1) > abs(self.norm_ratio - 1):
            self.norm_ratio = ratio

    def outcome(self) -> StageCheck:
        return StageCheck(name=self.name, max_error=self.max_error, cosine=self.cosine, norm_ratio=self.norm_ratio)


@dataclass
class _Decoder:
    """Prefill and decode of one sequence through plain `run`, without shared buffers."""

    folder: Path
    contract: Contract
    caches: dict[str, Floats] = field(default_factory=dict)
    rows: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        self.prefill_session = open_session(self.folder / "prefill.onnx")
        self.decode_session = open_session(self.folder / "decode.onnx")

    def prefill(self, ids: Sequence[int], visual: Floats, layout: TokenLayout) -> Floats:
        spec = self.contract.graph("prefill")
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "visual": visual.astype(self.contract.compute_dtype),
            "source": layout.source[None],
            "position_ids": layout.positions[None],
            "visible_until": layout.visible_until[None],
            "kept_index": np.arange(layout.num_kept)[None],
        }
        zeros = np.zeros(self.contract.cache_shape, self.contract.compute_dtype)
        empty = {name: zeros for name in spec.input_names if name.startswith("past_key_values.")}
        self.rows, self.position = layout.num_kept, layout.length
        return self._run(
            self.prefill_session, {name: feeds[name] for name in feeds if name in spec.input_names} | empty
        )

    def decode(self, token: int) -> Floats:
        feeds = {
            "input_ids": np.array([[token]]),
            "position_ids": np.array([[self.position]]),
            "write_index": np.array([self.rows]),
        }
        self.rows, self.position = self.rows + 1, self.position + 1
        return self._run(self.decode_session, feeds | self.caches)

    def _run(self, session: InferenceSession, feeds: dict[str, Any]) -> Floats:
        parts = [(layer, part) for layer in range(self.contract.num_layers) for part in CACHE_PARTS]
        logits, *buffers = session.run(["logits", *(present_name(*part) for part in parts)], feeds)
        self.caches = {past_name(*part): buffer for part, buffer in zip(parts, buffers, strict=True)}
        return np.asarray(logits)


def verify(
    model: SkipVisionModel, contract: Contract, folder: Path, pixels: Floats, prompt: Sequence[int], image_id: int
) -> ExportCheck:
    """Compares the graphs in `folder` with `model` on `pixels` [N, 3, H, W], each with the ids `prompt` (one picture).

    Prefill and decode get PyTorch's visual rows and PyTorch's greedy tokens, so that each stage answers for itself.
    """
    vision, prefill, decode = _Stage("vision"), _Stage("prefill"), _Stage("decode")
    session, decoder = open_session(folder / "vision.onnx"), _Decoder(folder, contract)
    layout = TokenLayout.of(prompt, image_id, model.config)
    batch = BatchLayout.of([layout], len(prompt))
    same = 0
    for picture in pixels[:, None]:
        with torch.no_grad():
            visual = model.encode_images(torch.from_numpy(picture))
        logits, cache = model.prefill(torch.tensor([prompt]), visual, batch, contract.capacity)
        rows = visual.numpy()
        vision.compare(_match(session.run(None, {"pixels": picture})[0][0], rows[0], layout.images[0]), rows[0])
        got = decoder.prefill(prompt, rows, layout)
        prefill.compare(got, logits.numpy())
        for layer in range(contract.num_layers):
            for part, buffers in zip(CACHE_PARTS, (cache.keys, cache.values), strict=True):
                kept = decoder.caches[past_name(layer, part)][:, :, : layout.num_kept]
                prefill.compare(kept, buffers[layer][:, :, : layout.num_kept].numpy())
        for step in range(NUM_TOKENS):
            token = int(logits.argmax())
            same += int(got.argmax()) == token
            if step < NUM_TOKENS - 1:
                logits, got = model.decode(torch.tensor([[token]]), cache)[:, -1], decoder.decode(token)
                decode.compare(got, logits.numpy())
    total = NUM_TOKENS * len(pixels)
    stages = tuple(stage.outcome() for stage in (vision, prefill, decode))
    return ExportCheck(stages=stages, num_pictures=len(pixels), num_tokens=total, agreement=same / total)


def _match(got: Floats, reference: Floats, span: ImageSpan) -> Floats:
    """Rows of `got` [V, D] in the order of `reference`: by the nearest row, within retained and within skipped.

    Both groups come out of a sort; where two keys are as good as equal, rounding decides their order.
    """
    matched: Floats = got.copy()
    kinds = np.array(span.kinds)
    for kind in (RETAINED, SKIPPED):
        group = np.flatnonzero(kinds == kind)
        if len(group):
            distances = np.linalg.norm(reference[group, None] - got[None, group].astype(np.float32), axis=-1)
            matched[group] = got[group[distances.argmin(axis=1)]]
    return matched


def violations(check: ExportCheck, precision: Precision) -> list[str]:
    """What is out of tolerance, one clause each."""
    limit = TOLERANCES[precision]
    found = []
    for stage in check.stages:
        is_vision = stage.name == "vision"
        if not stage.max_error <= limit.max_error and (not is_vision or precision == "fp32"):
            found.append(f"{stage.name}: error {stage.max_error:.2g} above {limit.max_error:g}")
        cosine = limit.vision_cosine if is_vision else limit.cosine
        if not stage.cosine >= cosine:
            found.append(f"{stage.name}: cosine {stage.cosine:.4f} below {cosine:g}")
        if not abs(stage.norm_ratio - 1) <= limit.norm_ratio:
            found.append(f"{stage.name}: norm ratio {stage.norm_ratio:.3f} further than {limit.norm_ratio:g} from 1")
    if check.agreement < limit.agreement:
        found.append(f"only {check.agreement:.0%} of greedy tokens agree, {limit.agreement:.0%} wanted")
    return found
