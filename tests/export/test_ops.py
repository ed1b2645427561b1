"""Custom ops: eager reference, fake shapes and ONNX function agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from svcli_export import ops
from svcli_export.contract import OPSET
from svcli_export.functions import FUNCTIONS


def run_node(op_type: str, feeds: dict[str, np.ndarray[Any, Any]], **attributes: Any) -> np.ndarray[Any, Any]:
    """One custom node through ONNX Runtime."""
    node = helper.make_node(op_type, list(feeds), ["out"], domain="svcli", plugin_namespace="svcli", **attributes)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    output_type = helper.np_dtype_to_tensor_dtype(next(iter(feeds.values())).dtype)
    assert output_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64)
    graph = helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("out", output_type, None)])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("svcli", 1)]
    model = helper.make_model(graph, functions=[FUNCTIONS[op_type]()], opset_imports=opsets, ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), rows=st.integers(1, 7), taken=st.integers(0, 9), width=st.integers(1, 5))
def test_token_gather_function_equals_its_reference(batch: int, rows: int, taken: int, width: int) -> None:
    random = np.random.default_rng(batch * rows + taken)
    data = random.standard_normal((batch, rows, width)).astype(np.float32)
    index = random.integers(0, rows, (batch, taken))
    expected = ops.token_gather(torch.from_numpy(data), torch.from_numpy(index)).numpy()
    np.testing.assert_array_equal(run_node("TokenGather", {"data": data, "index": index}), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float16, 3e-3)])
def test_summary_pool_function_equals_its_reference(dtype: type[np.floating], tolerance: float) -> None:
    random = np.random.default_rng(0)
    shapes = {
        "tokens": (2, 9, 16),
        "norm_weight": (16,),
        "norm_bias": (16,),
        "score_weight": (1, 16),
        "score_bias": (1,),
    }
    feeds = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    expected = ops.summary_pool(*(torch.from_numpy(value) for value in feeds.values()), epsilon=1e-5).numpy()
    np.testing.assert_allclose(run_node("SummaryPool", feeds, epsilon=1e-5), expected, atol=tolerance)


def test_summary_pool_reads_its_epsilon() -> None:
    feeds = {
        "tokens": np.array([[[0.0, 1e-3], [0.0, 0.0]]], np.float32),
        "norm_weight": np.ones(2, np.float32),
        "norm_bias": np.zeros(2, np.float32),
        "score_weight": np.array([[0.0, 3.0]], np.float32),
        "score_bias": np.zeros(1, np.float32),
    }
    results = [run_node("SummaryPool", feeds, epsilon=epsilon) for epsilon in (1e-9, 1e3)]
    assert not np.allclose(results[0], results[1], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    firsts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    count=st.integers(0, 3),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_cache_write_function_equals_its_reference(firsts: list[int], count: int, dtype: type[np.floating]) -> None:
    random = np.random.default_rng(count)
    past, rows = (random.standard_normal((len(firsts), 2, length, 3)).astype(dtype) for length in (7, count))
    slots = np.array(firsts)[:, None] + np.arange(count)
    expected = ops.cache_write(*(torch.from_numpy(value) for value in (past, rows, slots))).numpy()
    for number, first in enumerate(firsts):
        untouched = [row for row in range(7) if not first <= row < first + count]
        np.testing.assert_array_equal(expected[number, :, first : first + count], rows[number])
        np.testing.assert_array_equal(expected[number, :, untouched], past[number, :, untouched])
    np.testing.assert_array_equal(run_node("CacheWrite", {"past": past, "rows": rows, "slots": slots}), expected)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 7), dtype=st.sampled_from([np.float32, np.float16, np.int64]))
def test_cache_read_function_equals_its_reference(length: int, dtype: type[np.generic]) -> None:
    buffer = np.random.default_rng(length).integers(-9, 9, (2, 2, 7, 3)).astype(dtype)
    count = np.array([length])
    expected = ops.cache_read(torch.from_numpy(buffer), torch.from_numpy(count)).numpy()
    np.testing.assert_array_equal(expected, buffer[:, :, :length])
    np.testing.assert_array_equal(run_node("CacheRead", {"buffer": buffer, "length": count}), expected)


def test_fake_shapes_are_the_real_ones() -> None:
    data, index = torch.randn(2, 5, 4), torch.tensor([[0, 4, 1], [2, 2, 2]])
    torch.library.opcheck(ops.token_gather, (data, index))
    vectors = torch.ones(4), torch.zeros(4), torch.ones(1, 4), torch.zeros(1)
    torch.library.opcheck(ops.summary_pool, (data, *vectors, 1e-5))
    torch.library.opcheck(
        ops.cache_write, (torch.randn(2, 2, 7, 4), torch.randn(2, 2, 2, 4), torch.tensor([[3, 4], [0, 1]]))
    )
    torch.library.opcheck(ops.cache_read, (torch.randn(1, 2, 7, 4), torch.tensor([3])))
