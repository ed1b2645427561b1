"""The part of `tensorrt` and `tensorrt.plugin` that plugins meet, recorded: it takes and refuses what the real does.

Sizes have values, so that a launch that registration describes symbolically can be read as numbers.
test_registration.py holds it against the real bindings where those are at hand.
"""

from __future__ import annotations

import copy
import inspect
import operator
import types
import typing
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np

_ATTRIBUTES = (int, float, bytes, bool, str)
_ARRAYS_OF = (np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_)
_RESERVED = ("", "trt", "tensorrt", "std")


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    BF16 = 7
    INT64 = 8
    INT32 = 3


class SymIntExpr:
    """An integer that the builder may not know yet: `dynamic` sizes have a value here, and refuse to tell it."""

    def __init__(self, value: Any = None, dynamic: bool = False) -> None:
        self.value: Any = value.value if isinstance(value, SymIntExpr) else value
        self.dynamic: bool = value.dynamic if isinstance(value, SymIntExpr) else dynamic

    def _op(self, function: Callable[[int, int], int], other: Any) -> SymIntExpr:
        operand = SymIntExpr(other)
        if self.value is None:
            return type(self)()
        result = SymIntExpr(function(self.value, operand.value), self.dynamic or operand.dynamic)
        # Only shapes stay what they are under arithmetic.
        return ShapeExpr(result) if isinstance(self, ShapeExpr) else result

    def __add__(self, other: Any) -> SymIntExpr:
        return self._op(operator.add, other)

    def __sub__(self, other: Any) -> SymIntExpr:
        return self._op(operator.sub, other)

    def __mul__(self, other: Any) -> SymIntExpr:
        return self._op(operator.mul, other)

    def __floordiv__(self, other: Any) -> SymIntExpr:
        return self._op(operator.floordiv, other)

    @property
    def is_constant(self) -> bool:
        return not self.dynamic

    def constant_value(self) -> int:
        if self.dynamic:
            raise RuntimeError("Not accessible for non-constant integer expressions.")
        return int(self.value)


class SymInt32(SymIntExpr):
    pass


class ShapeExpr(SymInt32):
    @property
    def is_fake(self) -> bool:
        return self.value is None


def cdiv(first: Any, second: Any) -> Any:
    return _either(first, second, lambda dividend, divisor: -(-dividend // divisor))


def maximum(first: Any, second: Any) -> Any:
    return _either(first, second, max)


def _either(first: Any, second: Any, function: Callable[[int, int], int]) -> Any:
    if isinstance(first, int) and isinstance(second, int):
        raise ValueError("Both arguments cannot be 'int's")
    return (ShapeExpr(first) if isinstance(first, int) else first)._op(function, second)


class SymExprs:
    item: type[SymIntExpr] = SymInt32

    def __init__(self, length: int) -> None:
        self._exprs: list[Any] = [None] * length

    def __len__(self) -> int:
        return len(self._exprs)

    def __getitem__(self, place: int) -> Any:
        return self._exprs[place]

    def __setitem__(self, place: int, value: Any) -> None:
        if place >= len(self):
            raise IndexError("Index out of range")
        if not isinstance(value, (int, self.item)):
            raise ValueError(f"Value should be int or {self.item.__name__}. Got '{type(value)}'")
        self._exprs[place] = self.item(value) if isinstance(value, int) else value


class SymIntExprs(SymExprs):
    item = SymIntExpr


class ShapeExprs(SymExprs):
    item = ShapeExpr

    @classmethod
    def from_tuple(cls, sizes: tuple[Any, ...]) -> ShapeExprs:
        made = cls(len(sizes))
        for place, size in enumerate(sizes):
            made[place] = size
        return made


class TensorDesc:
    def __init__(self, shape_expr: ShapeExprs | None = None, dtype: Any = None) -> None:
        self.shape_expr = shape_expr if shape_expr is not None else ShapeExprs(0)
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        return len(self.shape_expr)

    def like(self) -> TensorDesc:
        return TensorDesc(copy.deepcopy(self.shape_expr), self.dtype)


class KernelLaunchParams:
    def __init__(self) -> None:
        for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z"):
            setattr(self, name, 1)
        self.shared_mem = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem"):
            raise AttributeError(f"KernelLaunchParams object has no attribute '{name}'")
        self.__dict__[name] = SymInt32(value)


class AutoTuneCombination:
    def __init__(self, io_types: str, layouts: str = "LINEAR") -> None:
        self.io_types = [each.strip() for each in io_types.split(",")]
        self.layouts = [each.strip() for each in layouts.split(",")]


class PluginDef:
    """What was registered under one name."""

    def __init__(self, describe: Callable[..., Any], tensors: list[str], attributes: dict[str, Any]) -> None:
        self.register_func = describe
        self.input_tensor_names = tensors
        self.input_attrs = attributes
        self.autotune_func: Callable[..., Any] | None = None
        self.aot_impl_func: Callable[..., Any] | None = None
        self.impl_func: Callable[..., Any] | None = None


class Registry:
    """`register`, `autotune` and `aot_impl`, and what they have seen."""

    def __init__(self) -> None:
        self.plugins: dict[str, PluginDef] = {}
        self.op = types.SimpleNamespace()

    def register(self, plugin: str) -> Callable[[Callable[..., Any]], Any]:
        def decorate(function: Callable[..., Any]) -> Any:
            namespace, name = plugin.split("::")
            if "." in plugin or namespace in _RESERVED or plugin in self.plugins:
                raise ValueError(f"{plugin} is reserved, taken or no name")
            tensors, attributes = _register_inputs(function)
            _demand(_is(inspect.signature(function).return_annotation, TensorDesc), "return type")
            self.plugins[plugin] = PluginDef(function, tensors, attributes)
            if not hasattr(self.op, namespace):
                setattr(self.op, namespace, types.SimpleNamespace())
            setattr(getattr(self.op, namespace), name, self.plugins[plugin])
            return function

        return decorate

    def autotune(self, plugin: str) -> Callable[[Callable[..., Any]], Any]:
        def decorate(function: Callable[..., Any]) -> Any:
            known = self._known(plugin)
            _check_arguments(function, known, ["outputs"])
            answer = inspect.signature(function).return_annotation
            several = typing.get_origin(answer) is list
            each = typing.get_args(answer)[0] if several else answer
            _demand(answer is inspect.Parameter.empty or _is(each, AutoTuneCombination), "return type")
            known.autotune_func = function
            return function

        return decorate

    def aot_impl(self, plugin: str) -> Callable[[Callable[..., Any]], Any]:
        def decorate(function: Callable[..., Any]) -> Any:
            known = self._known(plugin)
            _check_arguments(function, known, ["outputs", "tactic"])
            _check_answer(inspect.signature(function).return_annotation)
            known.aot_impl_func = function
            return function

        return decorate

    def _known(self, plugin: str) -> PluginDef:
        _demand(plugin in self.plugins, f"{plugin} is not registered")
        return self.plugins[plugin]


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _is(annotation: Any, wanted: type) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, wanted)


def _can_be_kept(annotation: Any) -> bool:
    if getattr(annotation, "__origin__", None) is not np.ndarray:
        return annotation in _ATTRIBUTES
    return typing.get_args(annotation.__args__[1])[0] in _ARRAYS_OF


def _register_inputs(function: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    tensors: list[str] = []
    attributes: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        _demand(parameter.annotation is not inspect.Parameter.empty, f"{name} has no annotation")
        _demand(parameter.default is inspect.Parameter.empty, f"{name} has a default value")
        if _is(parameter.annotation, TensorDesc):
            _demand(not attributes, "tensors after attributes")
            tensors.append(name)
        else:
            _demand(bool(tensors), "tensors come first")
            _demand(name not in ("outputs", "stream", "tactic"), f"{name} is no name for an attribute")
            _demand(_can_be_kept(parameter.annotation), f"{name} is of no type that can be serialized")
            attributes[name] = parameter.annotation
    return tensors, attributes


def _check_arguments(function: Callable[..., Any], plugin: PluginDef, last: list[str]) -> None:
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        annotation = parameter.annotation
        if annotation is inspect.Parameter.empty:
            continue
        if name == "outputs":
            _demand(typing.get_origin(annotation) is tuple, "outputs are a tuple")
            _demand(all(_is(each, TensorDesc) for each in typing.get_args(annotation)), "outputs are TensorDesc")
        elif name == "tactic":
            _demand(_is(annotation, int), "tactic is an int")
        elif _is(annotation, TensorDesc):
            _demand(name in plugin.input_tensor_names, f"unexpected tensor {name}")
        else:
            _demand(plugin.input_attrs.get(name) == annotation, f"unexpected attribute {name}")
    attributes = [name for name in plugin.input_attrs if name in parameters]
    _demand(list(parameters) == [*plugin.input_tensor_names, *attributes, *last], "order of the arguments")


def _check_answer(answer: Any) -> None:
    _demand(typing.get_origin(answer) is tuple, "return type is a tuple")
    parts = typing.get_args(answer)
    _demand(len(parts) == 4, "return type has four parts")
    for part in parts[:2]:
        united = typing.get_origin(part) in (typing.Union, types.UnionType)
        _demand(set(typing.get_args(part) if united else [part]) <= {str, bytes}, "name and code are str or bytes")
    _demand(_is(parts[2], KernelLaunchParams), "third part is KernelLaunchParams")
    _demand(_is(parts[3], SymExprs), "fourth part is SymExprs")


def modules(version: str = "11.4.0") -> tuple[ModuleType, ModuleType]:
    """`tensorrt` and `tensorrt.plugin`, with nothing registered."""
    trt, trtp, registry = ModuleType("tensorrt"), ModuleType("tensorrt.plugin"), Registry()
    dtypes = {"float32": DataType.FLOAT, "float16": DataType.HALF, "bfloat16": DataType.BF16, "int32": DataType.INT32}
    trt.__dict__.update(dtypes, __version__=version, DataType=DataType, int64=DataType.INT64)
    public = (TensorDesc, ShapeExpr, ShapeExprs, SymExprs, SymInt32, SymIntExprs, KernelLaunchParams)
    trtp.__dict__.update({each.__name__: each for each in (*public, AutoTuneCombination)})
    trtp.__dict__.update(cdiv=cdiv, max=maximum, op=registry.op, registry=registry)
    trtp.__dict__.update(register=registry.register, autotune=registry.autotune, aot_impl=registry.aot_impl)
    return trt, trtp
