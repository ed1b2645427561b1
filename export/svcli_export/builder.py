"""Writing an ONNX graph by hand: readable names, weights by reference, nothing that a tracer would leave behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from svcli_export.contract import CUSTOM_DOMAIN, OPSET, Contract, GraphName
from svcli_export.functions import FUNCTIONS, PLUGIN_NAMESPACE
from svcli_export.quantize import BLOCK, SCALE, TRANSPOSED, ZERO
from svcli_export.weights import WeightFile

IR_VERSION = 11
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
_END = np.iinfo(np.int64).max
"""`end` of a slice that goes to the last row."""


class GraphBuilder:
    """Values are strings: their names in the graph. A node is named as its first output."""

    def __init__(self, name: GraphName, contract: Contract, weights: WeightFile) -> None:
        self.spec = contract.graph(name)
        self.contract = contract
        self.dtype = np.dtype(contract.compute_dtype)
        """Of activations."""
        self._weights = weights
        self._scope = ""
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._names: set[str] = set(self.spec.input_names)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of what is made inside, as modules do in a checkpoint."""
        outer, self._scope = self._scope, f"{self._scope}{name}."
        try:
            yield
        finally:
            self._scope = outer

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """One node with one output. An empty input is an optional one left out."""
        return self.multi(op_type, *inputs, names=[name or op_type.lower()], **attributes)[0]

    def multi(self, op_type: str, *inputs: str, names: Sequence[str], **attributes: Any) -> list[str]:
        """One node with several outputs."""
        outputs = [self._fresh(name) for name in names]
        domain = ""
        if op_type in FUNCTIONS:
            domain, attributes["plugin_namespace"] = CUSTOM_DOMAIN, PLUGIN_NAMESPACE
        self._nodes.append(
            helper.make_node(op_type, list(inputs), outputs, name=outputs[0], domain=domain, **attributes)
        )
        return outputs

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(np.array(values, np.int64), "ints_" + "_".join(map(str, values)))

    def constant(self, value: np.ndarray[Any, Any], name: str) -> str:
        """A small constant inside the graph file; `name` stands for its value."""
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def floats(self, value: float, name: str) -> str:
        """A constant scalar in the dtype of activations."""
        return self.constant(np.array(value, self.dtype), name)

    def has_weight(self, name: str) -> bool:
        """Whether the weight file has a tensor of that name."""
        return name in self._weights

    def weight(self, name: str, stored: str = "") -> str:
        """A tensor of the weight file, there by the name `stored` if that is another."""
        if name not in self._initializers:
            self._initializers[name] = self._weights.initializer(stored or name, name)
        return name

    def matrix(self, name: str, stored: str = "") -> str:
        """The weight [in, out] of the checkpoint's matrix `name` [out, in], ready for MatMul."""
        here, there = name + TRANSPOSED, (stored or name) + TRANSPOSED
        if not self.has_weight(there + SCALE):
            return self.weight(here, there)
        scale = self.weight(here + SCALE, there + SCALE)
        label = f"{name.removeprefix(self._scope)}.dequantized"
        if not self.has_weight(there + ZERO):
            return self.op("DequantizeLinear", self.weight(here, there), scale, name=label, axis=1)
        zero = self.weight(here + ZERO, there + ZERO)
        return self.op("DequantizeLinear", self.weight(here, there), scale, zero, name=label, axis=0, block_size=BLOCK)

    def linear(self, hidden: str, module: str, bias: bool = True) -> str:
        """torch's nn.Linear `module` on [..., in]."""
        name = module.removeprefix(self._scope)
        if not bias:
            return self.op("MatMul", hidden, self.matrix(f"{module}.weight"), name=name)
        product = self.op("MatMul", hidden, self.matrix(f"{module}.weight"), name=f"{name}.product")
        return self.op("Add", product, self.weight(f"{module}.bias"), name=name)

    def layer_norm(self, hidden: str, module: str, epsilon: float) -> str:
        """torch's nn.LayerNorm `module` on [..., n]."""
        scale, bias = self.weight(f"{module}.weight"), self.weight(f"{module}.bias")
        name = module.rpartition(".")[2]
        return self.op("LayerNormalization", hidden, scale, bias, name=name, axis=-1, epsilon=epsilon)

    def rows(self, value: str, start: str | int, end: str | int = _END, *, axis: int = 1, name: str = "slice") -> str:
        """`value[start:end]` along `axis`; the bounds are integers or int64 vectors [1]."""
        bounds = [self.ints(bound) if isinstance(bound, int) else bound for bound in (start, end)]
        return self.op("Slice", value, *bounds, self.ints(axis), name=name)

    def finish(self, outputs: dict[str, str]) -> onnx.ModelProto:
        """The model; `outputs` maps each output of the contract to the value that it is."""
        for output, value in outputs.items():
            self._rename(value, output)
        inputs, results = (
            [helper.make_tensor_value_info(tensor.name, _TYPES[tensor.dtype], tensor.shape) for tensor in tensors]
            for tensors in (self.spec.inputs, self.spec.outputs)
        )
        initializers = list(self._initializers.values())
        graph = helper.make_graph(self._nodes, self.spec.name, inputs, results, initializers)
        used = {node.op_type for node in self._nodes} & FUNCTIONS.keys()
        opsets = [helper.make_opsetid("", OPSET)] + ([helper.make_opsetid(CUSTOM_DOMAIN, 1)] if used else [])
        functions = [FUNCTIONS[name]() for name in sorted(used)]
        return helper.make_model(
            graph, functions=functions, opset_imports=opsets, ir_version=IR_VERSION, producer_name="svcli"
        )

    def _fresh(self, name: str) -> str:
        full, number = self._scope + name, 1
        while full in self._names:
            number += 1
            full = f"{self._scope}{name}_{number}"
        self._names.add(full)
        return full

    def _rename(self, value: str, output: str) -> None:
        """Gives an inner value the name of a graph output, where it is made and where it is read."""
        for node in self._nodes:
            node.input[:] = [output if name == value else name for name in node.input]
            node.output[:] = [output if name == value else name for name in node.output]
