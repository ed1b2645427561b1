"""SummaryPool as two nodes is SummaryPool, and what goes between them is what goes between the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from onnx import NodeProto, TensorProto, helper

from svcli_engines.summary_nodes import split_pools
from svcli_export.contract import CUSTOM_DOMAIN, OPSET
from svcli_export.functions import FUNCTIONS
from tests.plugins.cpu_device import CpuDevice
from tests.plugins.test_kernels import run_partial

Arrays = dict[str, npt.NDArray[Any]]
NAMES = ("tokens", "norm_weight", "norm_bias", "score_weight", "score_bias")


def pool(epsilon: float = 1e-5) -> NodeProto:
    return helper.make_node(
        "SummaryPool",
        NAMES,
        ["summary"],
        name="summary",
        domain=CUSTOM_DOMAIN,
        plugin_namespace="svcli",
        epsilon=epsilon,
    )


def values_of(rows: int, dtype: type[np.floating] = np.float32) -> Arrays:
    random = np.random.default_rng(rows)
    shapes = ((2, rows, 24), (24,), (24,), (1, 24), (1,))
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in zip(NAMES, shapes, strict=True)}


def run(node: NodeProto, values: Arrays, wanted: str = "summary", *, split: bool = False) -> npt.NDArray[Any]:
    """What one pool gives, as it is exported or as TensorRT gets it."""
    types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in values.items()}
    inputs = [helper.make_tensor_value_info(name, types[name], value.shape) for name, value in values.items()]
    graph = helper.make_graph([node], "pool", inputs, [helper.make_tensor_value_info("summary", types["tokens"], None)])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CUSTOM_DOMAIN, 1)]
    model = helper.make_model(graph, functions=[FUNCTIONS["SummaryPool"]()], opset_imports=opsets, ir_version=11)
    if split:
        split_pools(model)
        assert [each.op_type for each in model.graph.node] == ["SummaryPartial", "SummaryMerge"]
        model.graph.output.append(helper.make_tensor_value_info("summary.partial", TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([wanted], values)[0])


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 40])
def test_both_nodes_together_are_the_one(rows: int) -> None:
    values = values_of(rows)
    np.testing.assert_allclose(run(pool(), values, split=True), run(pool(), values), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_halves_are_rounded_once(rows: int) -> None:
    """Where the body of the one rounds after every step."""
    values = values_of(rows, np.float16)
    expected = run(pool(), {name: value.astype(np.float32) for name, value in values.items()})
    found = run(pool(), values, split=True)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-5)


def test_no_rows_are_zeros_and_what_is_no_number_stays_none() -> None:
    np.testing.assert_array_equal(run(pool(), values_of(0), split=True), np.zeros((2, 1, 24), np.float32))
    values = values_of(20)
    values["tokens"][0, 13, 5] = np.nan
    found = run(pool(), values, split=True)
    assert np.isnan(found[0]).all()
    assert not np.isnan(found[1]).any()


def test_epsilon_goes_into_the_first() -> None:
    values = values_of(9)
    expected = run(pool(epsilon=10.0), values)
    np.testing.assert_allclose(run(pool(epsilon=10.0), values, split=True), expected, rtol=0, atol=2e-6)
    assert not np.allclose(expected, run(pool(), values), atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1, 9, 40])
def test_the_states_are_those_of_the_kernel(cpu: CpuDevice, rows: int) -> None:
    values = values_of(rows)
    expected = run_partial(cpu, [torch.from_numpy(each) for each in values.values()], "fp32").numpy()
    found = run(pool(), values, "summary.partial", split=True)
    # 1 part in 10**5: scores are sums whose terms cancel, in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_graph_without_pools_stays_as_it_is() -> None:
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "none", [], [])
    model = helper.make_model(graph, functions=[FUNCTIONS["TokenGather"]()])
    before = model.SerializeToString(deterministic=True)
    split_pools(model)
    assert model.SerializeToString(deterministic=True) == before
