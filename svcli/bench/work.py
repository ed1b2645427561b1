"""What each stage has to do at least: FLOPs, and bytes that are moved. From sizes, and from what the bundle stores."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from skipvision.config import ModelConfig
from skipvision.cost import decode_flops, prompt_cost
from skipvision.layout import TokenLayout
from svcli.bench.report import Roof
from svcli_export.manifest import BundleError

_DECODER, _ROTARY, _EMBEDDING = "decoder.", "decoder.rope.", "decoder.embed."
_ROUNDING = (".scale", ".zero")
"""What is gone once weights are floats again."""
_PER_BYTE = {"F32": 0.25, "F16": 0.5, "BF16": 0.5, "I8": 1, "U8": 2}
"""Weights in a byte of the file; U8 holds two of 4 bits."""


@dataclass(frozen=True)
class Weights:
    """Bytes that are read of the weights, each time a graph runs."""

    vision: int
    """Encoder, projector and summaries."""
    decoder: int
    """All layers and the head; of an embedding that is no head, single rows are read, which is as good as nothing."""


@dataclass(frozen=True)
class Work:
    """Of one stage."""

    flops: int
    num_bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


def stored_weights(file: Path, config: ModelConfig, bytes_per_weight: int | None = None) -> Weights:
    """Of weights.safetensors, as they are stored, or with so many bytes for each where the engine turns them to floats.

    Raises BundleError for an unreadable file.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        sizes = {name: _size(entry, bytes_per_weight) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise BundleError(f"{file}: unreadable ({error}); re-export it with `svcli export`") from None
    decoder = vision = 0
    for name, size in sizes.items():
        is_gone = bytes_per_weight is not None and name.endswith(_ROUNDING)
        if is_gone or name.startswith(_ROTARY) or (name.startswith(_EMBEDDING) and not config.text.tie_embeddings):
            continue
        if name.startswith(_DECODER):
            decoder += size
        else:
            vision += size
    return Weights(vision, decoder)


def prompt_work(
    config: ModelConfig, layout: TokenLayout, weights: Weights, kv_bytes_per_row: int, num_pictures: int
) -> dict[str, Work]:
    """Of `vision` and `prefill`. Each picture is a run of the encoder; prefill writes K and V of the rows it keeps."""
    cost = prompt_cost(config, layout)
    return {
        "vision": Work(cost.vision_flops, num_pictures * weights.vision),
        "prefill": Work(cost.prefill_flops, weights.decoder + layout.num_kept * kv_bytes_per_row),
    }


def decode_work(
    config: ModelConfig, cached_rows: int, weights: Weights, kv_bytes_per_row: int, num_sequences: int = 1
) -> Work:
    """One token of each of so many sequences: weights are read once for all, the KV cache of each is its own."""
    flops = num_sequences * decode_flops(config.text, cached_rows)
    return Work(flops, weights.decoder + num_sequences * (cached_rows + 1) * kv_bytes_per_row)


def stage_work(
    config: ModelConfig,
    layout: TokenLayout,
    weights: Weights,
    kv_bytes_per_row: int,
    num_pictures: int,
    num_tokens: int,
) -> dict[str, tuple[Work, ...]]:
    """Of every stage that is counted, the pieces that run one behind the other.

    Decoding is that of a token in the middle of the answer. Reading the picture is left out.
    """
    prompt = prompt_work(config, layout, weights, kv_bytes_per_row, num_pictures)
    token = decode_work(config, layout.num_kept + (num_tokens - 1) // 2, weights, kv_bytes_per_row)
    first = prompt["vision"], prompt["prefill"]
    return {
        "vision": (prompt["vision"],),
        "prefill": (prompt["prefill"],),
        "first_token": first,
        "decode": (token,),
        "end_to_end": (*first, *[token] * (num_tokens - 1)),
    }


def roof_seconds(pieces: tuple[Work, ...], roof: Roof | None) -> float | None:
    """No machine under this roof is faster; None where it is not known."""
    return None if roof is None else math.fsum(roof.seconds(piece.flops, piece.num_bytes) for piece in pieces)


def _size(entry: Mapping[str, object], bytes_per_weight: int | None) -> int:
    start, end = entry["data_offsets"]  # type: ignore[misc]
    if bytes_per_weight is None:
        return int(end - start)  # type: ignore[has-type]
    return int((end - start) * _PER_BYTE[str(entry["dtype"])] * bytes_per_weight)  # type: ignore[has-type]
