"""config.pbtxt, which tells Triton what a model takes and gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from svcli.triton.settings import Settings

TritonType = Literal["TYPE_STRING", "TYPE_BOOL", "TYPE_INT32", "TYPE_INT64", "TYPE_FP32", "TYPE_FP16"]
ANY = -1
"""A dimension that is free."""


@dataclass(frozen=True)
class Tensor:
    """One input or output, without a batch dimension."""

    name: str
    kind: TritonType
    dims: tuple[int, ...] = (1,)


# The names that the vLLM and TensorRT-LLM backends use, where they have one, so that clients of theirs ask here too.
INPUTS = (
    Tensor("text_input", "TYPE_STRING"),
    Tensor("messages", "TYPE_STRING"),
    Tensor("image", "TYPE_STRING", (ANY,)),
    Tensor("stream", "TYPE_BOOL"),
    Tensor("max_tokens", "TYPE_INT32"),
    Tensor("min_tokens", "TYPE_INT32"),
    Tensor("temperature", "TYPE_FP32"),
    Tensor("top_p", "TYPE_FP32"),
    Tensor("top_k", "TYPE_INT32"),
    Tensor("seed", "TYPE_INT64"),
    Tensor("stop", "TYPE_STRING", (ANY,)),
)
"""All optional: see asking.py for which go together."""
COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens", "visual_tokens", "visual_tokens_kept")
"""As the usage of `svcli serve` has them."""
OUTPUTS = (
    Tensor("text_output", "TYPE_STRING"),
    Tensor("finish_reason", "TYPE_STRING"),
    *(Tensor(name, "TYPE_INT32") for name in COUNTS),
)
"""The last response has all; those before it have `text_output` alone."""


def answering_config(name: str, settings: Settings) -> str:
    """Of the model that answers questions."""
    # An engine takes the first GPU: one process of its own, which runs the questions of all callers side by side.
    place = "kind: KIND_GPU gpus: [ 0 ]" if settings.on_gpu else "kind: KIND_CPU"
    lines = [
        f"name: {_text(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        *_tensors("input", INPUTS, " optional: true"),
        *_tensors("output", OUTPUTS),
        f"instance_group [ {{ count: 1 {place} }} ]",
        *_parameters(settings.parameters()),
    ]
    return "\n".join(lines) + "\n"


def _tensors(field: str, tensors: Sequence[Tensor], more: str = "") -> list[str]:
    return [
        f"{field} {{ name: {_text(each.name)} data_type: {each.kind} dims: {list(each.dims)}{more} }}"
        for each in tensors
    ]


def _parameters(values: Mapping[str, str]) -> list[str]:
    return [
        f"parameters {{ key: {_text(name)} value {{ string_value: {_text(value)} }} }}"
        for name, value in values.items()
    ]


def _text(value: str) -> str:
    return json.dumps(value)
