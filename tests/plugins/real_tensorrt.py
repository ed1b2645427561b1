"""The real bindings of TensorRT, asked what plugin_rules.py asks; prints JSON. Runs in a process of its own:

    python real_tensorrt.py WHEELS FOLDER

WHEELS holds tensorrt_bindings and tensorrt_lean_libs, unpacked; FOLDER takes what is compiled. The bindings want the
whole library, which cannot be had without its own package index. The lean one has the plugin registry; what else the
module looks up when it is imported is supplied empty. Nothing that is built here is shipped.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from svcli_engines.plugins import registration
from tests.plugins.plugin_rules import answers, verdicts

TARGET = "sm_90"
_REST_OF_THE_LIBRARY = """
extern void *getPluginRegistry(void);
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(int capability) { (void)capability; return getPluginRegistry(); }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void *logger, char const *names) { (void)logger; (void)names; return 1; }
"""


class Size:
    """A size with a value, for expressions that the builder would make."""

    def __init__(self, value: int, constant: bool) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.value


class ExprBuilder:
    """Computes at once what TensorRT computes at run time."""

    def constant(self, value: int) -> Size:
        return Size(value, True)

    def operation(self, operation: Any, first: Size, second: Size) -> Size:
        a, b = first.value, second.value
        results = {
            "SUM": lambda: a + b,
            "SUB": lambda: a - b,
            "PROD": lambda: a * b,
            "MAX": lambda: max(a, b),
            "FLOOR_DIV": lambda: a // b,
            "CEIL_DIV": lambda: -(-a // b),
        }
        return Size(results[operation.name](), first.constant and second.constant)


def load(wheels: Path, folder: Path) -> Any:
    """The module `tensorrt`."""
    (lean,) = (wheels / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*")
    ctypes.CDLL(str(lean), mode=ctypes.RTLD_GLOBAL)
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "no C compiler"
    source = folder / "rest.c"
    source.write_text(_REST_OF_THE_LIBRARY, encoding="utf-8")
    for name in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        library = folder / f"{name}{lean.name.removeprefix('libnvinfer_lean')}"
        options = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
        subprocess.run([compiler, *options, str(source)], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(wheels))
    # Under this name the bindings look for themselves; the package that would say so is only a download.
    sys.modules["tensorrt"] = import_module("tensorrt_bindings")
    return sys.modules["tensorrt"]


def creation(trt: Any) -> dict[str, Any]:
    """What the registry makes of our plugins where it is asked as the ONNX parser asks."""
    found: dict[str, Any] = {}
    epsilon = [("epsilon", np.array([1e-3], np.float32))]
    half, single = trt.float16, trt.float32
    asked: dict[str, tuple[list[Any], list[Any], list[int]]] = {
        "TokenGather": ([], [half, trt.int64], [3, 2]),
        "SummaryPartial": (epsilon, [half] * 5, [3, 1, 1, 2, 1]),
        "SummaryMerge": ([], [single, half], [3, 1]),
    }
    for op, (fields, types, ranks) in asked.items():
        creator = trt.get_plugin_registry().get_creator(op, "1", registration.NAMESPACE)
        given = trt.PluginFieldCollection(
            [trt.PluginField(name, value, trt.PluginFieldType.FLOAT32) for name, value in fields]
        )
        request = trt.QuickPluginCreationRequest
        plugin = creator.create_plugin(op, registration.NAMESPACE, given, trt.TensorRTPhase.BUILD, request.STRICT_AOT)
        try:
            creator.create_plugin(op, registration.NAMESPACE, given, trt.TensorRTPhase.BUILD, request.STRICT_JIT)
            python_at_run_time = True
        except ValueError:
            python_at_run_time = False
        found[op] = {
            "fields": [field.name for field in creator.field_names],
            "kind": type(plugin).__name__,
            "attributes": {name: float(value[0]) for name, value in plugin.attrs.items()},
            "python_at_run_time": python_at_run_time,
            "output_types": [each.name for each in plugin.get_output_data_types(types, ranks)],
            "tuned": [
                [each.name for each in combination.types]
                for tuned in plugin.autotune_function(*[None] * len(types), (None,))
                for combination in tuned._get_combinations()
            ],
        }
    return found


def main() -> None:
    trt = load(Path(sys.argv[1]), Path(sys.argv[2]))
    trtp: Any = import_module("tensorrt.plugin")
    vars(registration)["compiled"] = lambda *_: b"code"  # compilers have tests of their own
    registration.register_plugins(TARGET)
    registration.register_plugins(TARGET)  # a second time is nothing
    library = import_module("tensorrt.plugin._lib")
    result = {"version": trt.__version__, "verdicts": verdicts(trtp), "creation": creation(trt)}
    trt.IDimensionExpr = Size
    import_module("tensorrt.plugin._tensor").SymIntExpr._exprBuilder = ExprBuilder()

    def desc(shape: tuple[int, ...], dtype: str) -> Any:
        sizes = (Size(size, constant=place > 1 or len(shape) == 1) for place, size in enumerate(shape))
        shape_expr = trtp.ShapeExprs.from_tuple(tuple(map(trtp.ShapeExpr, sizes)))
        return trtp.TensorDesc(shape_expr, getattr(trt, dtype))

    result["answers"] = answers(library.QDP_REGISTRY, desc, lambda size: int(size._expr.value))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
