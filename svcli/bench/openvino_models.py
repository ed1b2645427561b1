"""A decoder as OpenVINO GenAI reads it, in a process of its own: python -m svcli.bench.openvino_models FOLDER OUTPUT
PRECISION

FOLDER is one as transformers reads it, PRECISION fp32, fp16, int8 or int4. The model of transformers is traced; its KV
cache becomes the graph's state, as OpenVINO's own exporter has it; NNCF rounds the weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL = "openvino_model.xml"
_ANY = 3
"""Rows in the cache while tracing: another number than any other there."""


def without_telemetry() -> None:
    """Before openvino is imported: its import alone writes an identifier to the home directory, and reports."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


def running(folder: Path, threads: int, rows: int) -> tuple[Any, dict[str, Any]]:
    """Scheduler and options of a pipeline, alike for text and pictures: a prompt of up to `rows` at once, and none kept
    from one question to the next; in fp32 where the folder's name says that the weights are, or else in what OpenVINO
    picks."""
    import openvino_genai as og

    plan = og.SchedulerConfig()
    plan.enable_prefix_caching, plan.max_num_batched_tokens = False, rows
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if folder.name.startswith("fp") else {}
    return plan, {"INFERENCE_NUM_THREADS": threads} | exact


def build(folder: Path, output: Path, precision: str) -> None:
    """OpenVINO's files of a decoder."""
    without_telemetry()
    import openvino as ov
    import torch
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    output.mkdir(parents=True, exist_ok=True)
    graph = compressed(decoder_graph(network.eval()), precision)
    ov.save_model(graph, output / MODEL, compress_to_fp16=precision == "fp16")
    shutil.copyfile(folder / "config.json", output / "config.json")
    (output / "generation_config.json").write_text(json.dumps({"eos_token_id": network.config.eos_token_id}))


def decoder_graph(network: Any, *, of_embeddings: bool = False) -> Any:
    """A stateful graph: `input_ids` and `position_ids` [B, T], `attention_mask` [B, cached + T] and `beam_idx` [B] to
    `logits` [B, T, vocab]. Or of `inputs_embeds` [B, T, D] and `position_ids` [3, B, T]."""
    import openvino as ov
    import torch
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = network.config
    heads, width = config.num_key_value_heads, config.head_dim
    states = [f"{part}.{layer}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    first = "inputs_embeds" if of_embeddings else "input_ids"
    shapes = {first: [-1, -1], "attention_mask": [-1, -1], "position_ids": [-1, -1]}
    if of_embeddings:
        shapes |= {first: [-1, -1, config.hidden_size], "position_ids": [3, -1, -1]}
    inputs = [*shapes, *(f"past.{state}" for state in states)]
    outputs = ["logits", *(f"present.{state}" for state in states)]
    ids, mask = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4 + _ANY, dtype=torch.int64)
    given = (torch.zeros(2, 4, config.hidden_size), mask, ids.expand(3, 2, 4)) if of_embeddings else (ids, mask, ids)
    past = [torch.zeros(2, heads, _ANY, width) for _ in states]
    with torch.no_grad():
        graph = ov.convert_model(_traced(network, first), example_input=(*given, *past))
    for port, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        port.get_tensor().set_names({name})
    for port in graph.inputs:
        # By this name its transformation to paged attention knows it.
        port.node.set_friendly_name(port.any_name)
        port.node.set_partial_shape(ov.PartialShape(shapes.get(port.any_name, [-1, heads, -1, width])))
        is_float = port.any_name == "inputs_embeds" or port.any_name not in shapes
        port.node.set_element_type(ov.Type.f32 if is_float else ov.Type.i64)
    # Which sequence goes on from which: OpenVINO GenAI wants to be able to say it.
    order = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    order.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([order])
    first_axis = ops.constant(0, ov.Type.i64)
    for port in graph.inputs:
        if port.any_name.startswith("past."):
            readers = list(port.get_target_inputs())
            chosen = ops.gather(port.node, order, first_axis)
            for reader in readers:
                reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(inputs[3:], outputs[1:], strict=True)))
    # A state is empty at first, of as many sequences as are asked.
    sequences = ops.gather(ops.shape_of(graph.input(first)), ops.constant([0], ov.Type.i64), first_axis)
    shape = ops.concat([sequences, ops.constant([heads, 0, width], ov.Type.i64)], 0)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([ops.broadcast(ops.constant(0.0, ov.Type.f32), shape)])
    graph.validate_nodes_and_infer_types()
    return graph


def compressed(graph: Any, precision: str) -> Any:
    """The graph with its weights rounded: int8 by channel, int4 in blocks of 32 with embedding and head in int8."""
    if precision not in ("int8", "int4"):
        return graph
    import nncf

    modes = nncf.CompressWeightsMode
    if precision == "int8":
        return nncf.compress_weights(graph, mode=modes.INT8_SYM)
    return nncf.compress_weights(graph, mode=modes.INT4_SYM, group_size=32)


def _traced(network: Any, first: str) -> Any:
    import torch

    class Traced(torch.nn.Module):
        """Its cache comes in and goes out as tensors, and its mask is written out: transformers would trace neither."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, new: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
            key, query = torch.arange(attention_mask.shape[1]), torch.arange(new.shape[1])
            causal = key[None] <= query[:, None] + (attention_mask.shape[1] - new.shape[1])
            cache = _Cache(past)
            found = self.network(
                **{first: new},
                attention_mask=causal[None, None] & attention_mask[:, None, None].bool(),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            return found.logits, *cache.tensors

    return Traced()


class _Cache:
    """What transformers asks of a cache; keys and values [B, heads, rows, width] in turns."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        self.tensors = list(tensors)

    def get_seq_length(self, _layer: int = 0) -> Any:
        return self.tensors[0].shape[2]

    def update(self, key: Any, value: Any, layer: int, *_rest: Any, **_more: Any) -> tuple[Any, Any]:
        import torch

        places = 2 * layer, 2 * layer + 1
        for place, new in zip(places, (key, value), strict=True):
            self.tensors[place] = torch.cat([self.tensors[place], new], 2)
        return self.tensors[places[0]], self.tensors[places[1]]


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit("usage: python -m svcli.bench.openvino_models FOLDER OUTPUT PRECISION")
    build(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])


if __name__ == "__main__":
    main()
