"""The plugins as TensorRT sees them: quickly deployable plugins whose kernels are compiled ahead of time.

`svcli::TokenGather`, `svcli::SummaryPartial` and `svcli::SummaryMerge` match nodes of that type with
`plugin_namespace="svcli"`; plan_graphs.py makes the latter two of SummaryPool. There is no `impl`, only `aot_impl`: the
builder gets PTX and symbolic launch dimensions, and a plan needs no Python to run.

Only for TensorRT itself: in TensorRT-RTX a node that matches a registered plugin ends the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Tuple, Union  # noqa: UP035  TensorRT 10 knows the annotations of a plugin in no other spelling

import numpy as np

from svcli_engines.plugins.compile import compiled
from svcli_engines.plugins.launch import KERNELS, OPS, STATE_EXTRAS, Arithmetic, Element, Launch, Op, num_parts
from svcli_engines.plugins.launch import summary_merge as summary_merge_launch
from svcli_engines.plugins.launch import summary_partial as summary_partial_launch
from svcli_engines.plugins.launch import token_gather as token_gather_launch

NAMESPACE = "svcli"
OLDEST = (10, 15)
"""The first TensorRT that prefers a plugin to the function of the same name in the model."""

Desc = Any
"""tensorrt.plugin.TensorDesc."""
Compiled = tuple[str, str, Any, Any]
"""Name of the kernel, PTX, tensorrt.plugin.KernelLaunchParams, tensorrt.plugin.SymIntExprs."""


class PluginError(ValueError):
    """TensorRT is missing, too old, or asks the plugins for what they cannot do; the message says which."""


class Float32Array:
    """Annotation of an attribute that is a float in the ONNX file: NumPy's NDArray[float32], but as a class.

    Before 11.2, TensorRT asks `issubclass` of every annotation, which Python 3.13 refuses for what is no class, and
    does not know NDArray as NumPy 2.5 spells it. A plain `float` would not do: the parser hands over an array of one,
    of which NumPy 2.4 makes no number.
    """

    __origin__ = np.ndarray
    __args__ = (Any, np.dtype[np.float32])


@dataclass
class _Build:
    """What the plan that is being built is for. TensorRT registers plugins once per process, for all its plans."""

    target: str


_build = _Build("")


def register_plugins(target: str) -> None:
    """Makes the plugins known to TensorRT; plans that are built from now on are for `target`, such as `sm_89`.

    Raises PluginError where TensorRT is missing or older than 10.15. Which targets and compilers there are shows when a
    plan is built: CompilerMissing, TargetError, CompileError.
    """
    trt, trtp = _tensorrt()
    _build.target = target
    if all(hasattr(getattr(trtp.op, NAMESPACE, None), op) for op in OPS):
        return
    made = {"TokenGather": _token_gather, "SummaryPartial": _summary_partial, "SummaryMerge": _summary_merge}
    for op, functions in made.items():
        plugin = f"{NAMESPACE}::{op}"
        describe, tune, compile_ahead = functions(trt, trtp)
        trtp.register(plugin)(describe)
        trtp.autotune(plugin)(tune)
        trtp.aot_impl(plugin)(compile_ahead)


def _tensorrt() -> tuple[Any, Any]:
    try:
        trt = import_module("tensorrt")
    except ModuleNotFoundError:
        raise PluginError("the plugins need TensorRT 10.15 or newer, and it is not installed") from None
    if tuple(int(part) for part in trt.__version__.split(".")[:2]) < OLDEST:
        raise PluginError(f"the plugins need TensorRT {'.'.join(map(str, OLDEST))} or newer, not {trt.__version__}")
    return trt, import_module("tensorrt.plugin")


def _token_gather(trt: Any, trtp: Any) -> tuple[Callable[..., Any], ...]:
    def describe(data: Desc, index: Desc) -> Desc:
        rows = data.like()
        rows.shape_expr[data.ndim - 2] = index.shape_expr[1]
        return rows

    def tune(data: Desc, index: Desc, outputs: tuple[Desc]) -> list[Any]:  # noqa: ARG001
        return [trtp.AutoTuneCombination("FP32|FP16|BF16, INT64, FP32|FP16|BF16", "LINEAR")]

    def compile_ahead(data: Desc, index: Desc, outputs: tuple[Desc], tactic: int) -> Compiled:  # noqa: ARG001
        element = _element(trt, data)
        launch = token_gather_launch(tuple(data.shape_expr), tuple(index.shape_expr), element, _symbolic(trtp))
        return _finished(trtp, "TokenGather", element, launch)

    return _annotated(trtp, "TokenGather", {}, describe, tune, compile_ahead)


def _summary_partial(trt: Any, trtp: Any) -> tuple[Callable[..., Any], ...]:
    def describe(
        tokens: Desc,
        norm_weight: Desc,  # noqa: ARG001
        norm_bias: Desc,  # noqa: ARG001
        score_weight: Desc,  # noqa: ARG001
        score_bias: Desc,  # noqa: ARG001
        epsilon: Any,  # noqa: ARG001
    ) -> Desc:
        partial = tokens.like()
        partial.dtype = trt.float32
        partial.shape_expr[1] = num_parts(tokens.shape_expr[1], _symbolic(trtp))
        partial.shape_expr[2] = tokens.shape_expr[2] + STATE_EXTRAS
        return partial

    def tune(
        tokens: Desc,  # noqa: ARG001
        norm_weight: Desc,  # noqa: ARG001
        norm_bias: Desc,  # noqa: ARG001
        score_weight: Desc,  # noqa: ARG001
        score_bias: Desc,  # noqa: ARG001
        outputs: tuple[Desc],  # noqa: ARG001
    ) -> list[Any]:
        return [trtp.AutoTuneCombination(", ".join([*["FP32|FP16|BF16"] * 5, "FP32"]), "LINEAR")]

    def compile_ahead(
        tokens: Desc,
        norm_weight: Desc,
        norm_bias: Desc,  # noqa: ARG001
        score_weight: Desc,  # noqa: ARG001
        score_bias: Desc,  # noqa: ARG001
        epsilon: Any,
        outputs: tuple[Desc],  # noqa: ARG001
        tactic: int,  # noqa: ARG001
    ) -> Compiled:
        element = _element(trt, tokens)
        shape = (tokens.shape_expr[0], tokens.shape_expr[1], _width(norm_weight))
        launch = summary_partial_launch(shape, element, float(epsilon[0]), _symbolic(trtp))
        return _finished(trtp, "SummaryPartial", element, launch)

    return _annotated(trtp, "SummaryPartial", {"epsilon": Float32Array}, describe, tune, compile_ahead)


def _summary_merge(trt: Any, trtp: Any) -> tuple[Callable[..., Any], ...]:
    # The states are fp32 whatever the rows are: norm_weight says what type the summary has.
    def describe(partial: Desc, norm_weight: Desc) -> Desc:
        summary = partial.like()
        summary.dtype = norm_weight.dtype
        summary.shape_expr[1] = 1
        summary.shape_expr[2] = norm_weight.shape_expr[0]
        return summary

    def tune(partial: Desc, norm_weight: Desc, outputs: tuple[Desc]) -> list[Any]:  # noqa: ARG001
        return [trtp.AutoTuneCombination("FP32, FP32|FP16|BF16, FP32|FP16|BF16", "LINEAR")]

    def compile_ahead(partial: Desc, norm_weight: Desc, outputs: tuple[Desc], tactic: int) -> Compiled:  # noqa: ARG001
        element = _element(trt, norm_weight)
        launch = summary_merge_launch(tuple(partial.shape_expr), (_width(norm_weight),), element, _symbolic(trtp))
        return _finished(trtp, "SummaryMerge", element, launch)

    return _annotated(trtp, "SummaryMerge", {}, describe, tune, compile_ahead)


def _annotated(
    trtp: Any,
    op: Op,
    attributes: dict[str, Any],
    describe: Callable[..., Any],
    tune: Callable[..., Any],
    compile_ahead: Callable[..., Any],
) -> tuple[Callable[..., Any], ...]:
    """The functions with the annotations that TensorRT demands: objects of its own, not their names."""
    inputs = dict.fromkeys(KERNELS[op].inputs, trtp.TensorDesc)
    outputs = {"outputs": Tuple[trtp.TensorDesc]}  # noqa: UP006
    text = Union[str, bytes]  # noqa: UP007
    answer = Tuple[text, text, trtp.KernelLaunchParams, trtp.SymExprs]  # noqa: UP006
    describe.__annotations__ = {**inputs, **attributes, "return": trtp.TensorDesc}
    tune.__annotations__ = {**inputs, **outputs, "return": list[trtp.AutoTuneCombination]}
    compile_ahead.__annotations__ = {**inputs, **attributes, **outputs, "tactic": int, "return": answer}
    return describe, tune, compile_ahead


def _element(trt: Any, rows: Desc) -> Element:
    elements: dict[Any, Element] = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}
    if rows.dtype not in elements:
        raise PluginError(f"the plugins take fp32, fp16 and bf16, not {rows.dtype}")
    return elements[rows.dtype]


def _width(norm_weight: Desc) -> int:
    """D, of a weight [D]: a row that is too wide for the kernels is refused while the plan is built, not on the GPU."""
    size = norm_weight.shape_expr[0]
    if size.is_fake or not size.is_constant:
        raise PluginError("SummaryPool takes rows whose width is known when the plan is built")
    return int(size.constant_value())


def _symbolic(trtp: Any) -> Arithmetic:
    return Arithmetic(trtp.cdiv, trtp.max)


def _finished(trtp: Any, op: Op, element: Element, launch: Launch) -> Compiled:
    dimensions = trtp.KernelLaunchParams()
    dimensions.grid_x = launch.grid
    dimensions.block_x = launch.block
    extras = trtp.SymIntExprs(len(launch.extras))
    for place, extra in enumerate(launch.extras):
        # Only of this class does TensorRT know how many bytes the kernel expects.
        extras[place] = trtp.SymInt32(extra)
    ptx = compiled(op, element, _build.target).decode("ascii")
    return launch.entry, ptx, dimensions, extras
