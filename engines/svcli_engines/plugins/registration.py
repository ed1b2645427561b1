"""The plugins as TensorRT sees them: quickly deployable plugins whose kernels are compiled ahead of time.

`svcli::TokenGather` and `svcli::SummaryPool` match nodes of that type with `plugin_namespace="svcli"`. There is no
`impl`, only `aot_impl`: the builder gets PTX and symbolic launch dimensions, and a plan needs no Python to run.

Only for TensorRT itself: in TensorRT-RTX a node that matches a registered plugin ends the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Tuple, Union  # noqa: UP035  TensorRT 10 knows the annotations of a plugin in no other spelling

import numpy as np

from svcli_engines.plugins.compile import compiled
from svcli_engines.plugins.launch import KERNELS, OPS, Arithmetic, Element, Launch, Op, pool_blocks
from svcli_engines.plugins.launch import summary_pool as summary_pool_launch
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
    for op, functions in {"TokenGather": _token_gather(trt, trtp), "SummaryPool": _summary_pool(trt, trtp)}.items():
        plugin = f"{NAMESPACE}::{op}"
        describe, tune, compile_ahead = functions
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


def _summary_pool(trt: Any, trtp: Any) -> tuple[Callable[..., Any], ...]:
    def describe(
        tokens: Desc,
        norm_weight: Desc,  # noqa: ARG001
        norm_bias: Desc,  # noqa: ARG001
        score_weight: Desc,  # noqa: ARG001
        score_bias: Desc,  # noqa: ARG001
        epsilon: Any,  # noqa: ARG001
    ) -> Desc:
        summary = tokens.like()
        summary.shape_expr[1] = 1
        return summary

    def tune(
        tokens: Desc,  # noqa: ARG001
        norm_weight: Desc,  # noqa: ARG001
        norm_bias: Desc,  # noqa: ARG001
        score_weight: Desc,  # noqa: ARG001
        score_bias: Desc,  # noqa: ARG001
        outputs: tuple[Desc],  # noqa: ARG001
    ) -> list[Any]:
        return [trtp.AutoTuneCombination(", ".join(["FP32|FP16|BF16"] * 6), "LINEAR")]

    def compile_ahead(
        tokens: Desc,
        norm_weight: Desc,  # noqa: ARG001
        norm_bias: Desc,  # noqa: ARG001
        score_weight: Desc,  # noqa: ARG001
        score_bias: Desc,  # noqa: ARG001
        epsilon: Any,
        outputs: tuple[Desc],  # noqa: ARG001
        tactic: int,  # noqa: ARG001
    ) -> Compiled:
        element = _element(trt, tokens)
        images, rows, width = tokens.shape_expr
        # Weights fix the width, so that one which is too wide for the kernel is refused here, not on the GPU.
        launch = summary_pool_launch(
            (images, rows, _known(width)), element, float(epsilon[0]), pool_blocks(_build.target), _symbolic(trtp)
        )
        return _finished(trtp, "SummaryPool", element, launch)

    return _annotated(trtp, "SummaryPool", {"epsilon": Float32Array}, describe, tune, compile_ahead)


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


def _known(size: Any) -> Any:
    """An int where the builder knows the size, for checks; or else the expression."""
    return size.constant_value() if not size.is_fake and size.is_constant else size


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
