"""The check that ends an export: the graphs in ONNX Runtime against the PyTorch model, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnxruntime import InferenceSession

from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from svcli_export.agreement import (
    NUM_TOKENS,
    TOLERANCES,
    Difference,
    RowAgreement,
    agreeing_rows,
    agreement_of_all,
    difference,
    excess,
    match_rows,
    worst,
)
from svcli_export.contract import CACHE_PARTS, Contract, Precision, past_name, present_name
from svcli_export.manifest import ExportCheck, RowCheck, StageCheck
from svcli_export.runtime import open_session

Floats = npt.NDArray[Any]


@dataclass
class _Stage:
    name: str
    max_error: float = 0.0
    cosine: float = 1.0
    norm_ratio: float = 1.0
    agreeing: list[RowAgreement] = field(default_factory=list)
    """Of visual rows, by picture."""

    def compare(self, got: Floats, reference: Floats) -> None:
        so_far = Difference(self.max_error, self.cosine, self.norm_ratio)
        found = worst((so_far, difference(got, reference)))
        self.max_error, self.cosine, self.norm_ratio = found.max_error, found.cosine, found.norm_ratio

    def outcome(self) -> StageCheck:
        return StageCheck(
            name=self.name,
            max_error=self.max_error,
            cosine=self.cosine,
            norm_ratio=self.norm_ratio,
            rows=_rows(self.agreeing),
        )


def _rows(agreeing: Sequence[RowAgreement]) -> RowCheck | None:
    if not agreeing:
        return None
    overall = agreement_of_all(agreeing)
    return RowCheck(num_rows=overall.num_rows, agreement=overall.share)


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
        matched = match_rows(session.run(None, {"pixels": picture})[0][0], rows[0], layout.images[0])
        vision.compare(matched, rows[0])
        vision.agreeing.append(agreeing_rows(matched, rows[0], TOLERANCES[contract.precision]))
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


def violations(check: ExportCheck, precision: Precision) -> list[str]:
    """What is out of tolerance, one clause each."""
    limit = TOLERANCES[precision]
    found = []
    for stage in check.stages:
        figures = Difference(stage.max_error, stage.cosine, stage.norm_ratio)
        rows = None if stage.rows is None else RowAgreement(stage.rows.agreement, stage.rows.num_rows)
        found += [f"{stage.name}: {clause}" for clause in excess(figures, limit, rows)]
    if check.agreement < limit.agreement:
        found.append(f"only {check.agreement:.0%} of greedy tokens agree, {limit.agreement:.0%} wanted")
    return found
