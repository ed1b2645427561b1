"""What TensorRT accepts and refuses of a plugin, and what it reads out of ours: asked of the real one and the recorded.

Imports neither, nor torch, so that it also runs beside the real bindings in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Tuple, Union  # noqa: UP035  as in registration.py

import numpy as np

from svcli_engines.plugins import registration

Annotations = dict[str, Any]

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "TokenGather, rows": ((2, 37, 4096), (2, 53)),
    "TokenGather, caches": ((2, 8, 37, 64), (2, 53)),
    "TokenGather, nothing": ((1, 37, 64), (1, 0)),
    "SummaryPartial": ((3, 97, 4096), (4096,), (4096,), (1, 4096), (1,)),
    "SummaryPartial, no images": ((0, 97, 64), (64,), (64,), (1, 64), (1,)),
    "SummaryPartial, no rows": ((2, 0, 64), (64,), (64,), (1, 64), (1,)),
    "SummaryMerge": ((3, 13, 4098), (4096,)),
    "SummaryMerge, no images": ((0, 13, 66), (64,)),
}
"""Shapes of the inputs for each question about our plugins."""


def verdicts(trtp: Any) -> dict[str, bool]:
    """For each way to declare a plugin: whether it is accepted."""
    return {name: _accepted(declare, f"rules::{name}") for name, declare in _ways(trtp).items()}


def _accepted(declare: Callable[[str], None], plugin: str) -> bool:
    try:
        declare(plugin)
    except (ValueError, TypeError):  # TypeError: some versions ask issubclass about what is no class
        return False
    return True


def _ways(trtp: Any) -> dict[str, Callable[[str], None]]:
    desc, outputs = trtp.TensorDesc, Tuple[trtp.TensorDesc]  # noqa: UP006
    text = Union[str, bytes]  # noqa: UP007
    vector = registration.Float32Array
    answer = Tuple[text, text, trtp.KernelLaunchParams, trtp.SymExprs]  # noqa: UP006
    described: Annotations = {"x": desc, "epsilon": vector, "return": desc}
    tuned: Annotations = {"x": desc, "outputs": outputs, "return": list[trtp.AutoTuneCombination]}
    ahead: Annotations = {"x": desc, "epsilon": vector, "outputs": outputs, "tactic": int, "return": answer}

    def way(
        register: Annotations | None = None, tune: Annotations | None = None, aot: Annotations | None = None
    ) -> Callable[[str], None]:
        def declare(plugin: str) -> None:
            trtp.register(plugin)(_function(register or described))
            if tune is not None:
                trtp.autotune(plugin)(_function(tune))
            if aot is not None:
                trtp.aot_impl(plugin)(_function(aot))

        return declare

    def without(annotations: Annotations, name: str) -> Annotations:
        return {key: value for key, value in annotations.items() if key != name}

    def elsewhere(plugin: str) -> Callable[[str], None]:
        return lambda _: trtp.register(plugin)(_function(described))

    def unknown(decorator: Any, annotations: Annotations) -> Callable[[str], None]:
        return lambda name: decorator(f"{name}_unknown")(_function(annotations))

    def twice(plugin: str) -> None:
        for _ in range(2):
            trtp.register(plugin)(_function(described))

    def with_default(plugin: str) -> None:
        def describe(x: Any, epsilon: Any = None) -> Any:
            raise NotImplementedError(x, epsilon)

        describe.__annotations__ = described
        trtp.register(plugin)(describe)

    native = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    return {
        "as_ours": way(described, tuned, ahead),
        "attribute_of_float": way({**described, "epsilon": float}),
        "attribute_of_list": way({**described, "epsilon": list}),
        "attribute_called_tactic": way({"x": desc, "tactic": int, "return": desc}),
        "attribute_before_tensor": way({"epsilon": vector, "x": desc, "return": desc}),
        "annotations_as_text": way({"x": "TensorDesc", "return": "TensorDesc"}),
        "argument_without_annotation": way({"x": None, "return": desc}),
        "description_without_return": way(without(described, "return")),
        "default_value": with_default,
        "registered_twice": twice,
        "reserved_namespace": elsewhere("trt::Rules"),
        "dot_in_namespace": elsewhere("ru.les::Rules"),
        "tuning_the_unknown": unknown(trtp.autotune, tuned),
        "tuning_with_other_tensor": way(tune={"y": desc, "outputs": outputs}),
        "tuning_without_outputs": way(tune=without(tuned, "outputs")),
        "tuning_of_one_output": way(tune={**tuned, "outputs": desc}),
        "tuning_without_return": way(tune=without(tuned, "return")),
        "tuning_with_other_return": way(tune={**tuned, "return": int}),
        "tuning_with_attribute": way(tune={"x": desc, "epsilon": vector, "outputs": outputs}),
        "code_for_the_unknown": unknown(trtp.aot_impl, ahead),
        "code_without_return": way(aot=without(ahead, "return")),
        "code_without_tactic": way(aot=without(ahead, "tactic")),
        "code_without_attribute": way(aot=without(ahead, "epsilon")),
        "code_with_other_attribute": way(aot={**ahead, "epsilon": int}),
        "code_with_outputs_first": way(aot={"x": desc, "outputs": outputs, "epsilon": vector, "tactic": int}),
        "code_of_three_parts": way(aot={**ahead, "return": Tuple[str, str, trtp.KernelLaunchParams]}),  # noqa: UP006
        "code_as_int": way(aot={**ahead, "return": tuple[text, int, trtp.KernelLaunchParams, trtp.SymExprs]}),
        "code_with_native_union": way(aot={**ahead, "return": native}),
        "code_with_parts_swapped": way(
            aot={**ahead, "return": tuple[str, str, trtp.SymExprs, trtp.KernelLaunchParams]}
        ),
        "code_annotated_as_text": way(aot={**ahead, "return": "tuple"}),
    }


def _function(annotations: Annotations) -> Callable[..., Any]:
    """A function with these arguments, in this order. None is an argument without annotation."""
    names = [name for name in annotations if name != "return"]
    # inspect reads a signature off the code, so that the code has to have the names.
    scope: dict[str, Any] = {}
    exec(f"def function({', '.join(names)}): raise NotImplementedError", scope)
    function: Callable[..., Any] = scope["function"]
    function.__annotations__ = {name: value for name, value in annotations.items() if value is not None}
    return function


def answers(
    plugins: dict[str, Any], descs: Callable[[tuple[int, ...], str], Any], number: Callable[[Any], int]
) -> dict[str, Any]:
    """What TensorRT reads out of our plugins, registered and found in `plugins`, for each of SHAPES and element type.

    `descs` makes a TensorDesc of a shape and a dtype by name; `number` evaluates a size.
    """
    found: dict[str, Any] = {}
    for question, shapes in SHAPES.items():
        op = question.split(",")[0]
        plugin = plugins[f"{registration.NAMESPACE}::{op}"]
        attributes = [np.array([1e-5], np.float32)] if op == "SummaryPartial" else []
        for element, dtype in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")):
            types = {"TokenGather": [dtype, "int64"], "SummaryMerge": ["float32", dtype]}.get(op, [dtype] * len(shapes))
            inputs = [descs(*each) for each in zip(shapes, types, strict=True)]
            output = plugin.register_func(*inputs, *attributes)
            entry, code, params, extras = plugin.aot_impl_func(*inputs, *attributes, (output,), 0)
            found[f"{question}, {element}"] = {
                "output": [number(size) for size in output.shape_expr],
                "dtype": output.dtype.name,
                "entry": entry,
                "code": code,
                "grid": [number(params.grid_x), number(params.grid_y), number(params.grid_z)],
                "block": [number(params.block_x), number(params.block_y), number(params.block_z)],
                "shared": number(params.shared_mem),
                "extras": [number(extra) for extra in extras],
                "classes": sorted({type(extra).__name__ for extra in extras}),
            }
    return found
