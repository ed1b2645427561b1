"""Registration with TensorRT: against the recorded interface, and the real bindings where they are at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from svcli_engines.plugins import registration
from svcli_engines.plugins.launch import (
    ELEMENTS,
    KERNELS,
    MAX_POOL_WIDTH,
    OPS,
    Element,
    LaunchError,
    Op,
    num_parts,
    summary_merge,
    summary_partial,
    token_gather,
)
from svcli_engines.plugins.registration import PluginError, register_plugins
from svcli_export.functions import PLUGIN_NAMESPACE
from tests.plugins import fake_tensorrt
from tests.plugins.plugin_rules import SHAPES, answers, verdicts

ROOT = Path(__file__).parents[2]
TARGET = "sm_90"
ACCEPTED = {
    "as_ours",
    "attribute_of_float",
    "tuning_without_return",
    "tuning_with_attribute",
    "code_without_attribute",
    "code_with_native_union",
}
"""What TensorRT 10.15, 10.16 and 11.4 accept, of all that plugin_rules.py tries."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """`tensorrt` and `tensorrt.plugin`, recorded; compilers have tests of their own."""
    trt, trtp = fake_tensorrt.modules()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
    monkeypatch.setattr(registration, "compiled", lambda *_: b"code")
    monkeypatch.setattr(registration, "_build", registration._Build(""))
    return trt, trtp


@pytest.fixture(scope="module")
def real(tensorrt_wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real bindings answer."""
    folder = tmp_path_factory.mktemp("tensorrt")
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("real_tensorrt.py")), str(tensorrt_wheels), str(folder)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def fake_desc(trt: Any, trtp: Any) -> Any:
    def desc(shape: tuple[int, ...], dtype: str) -> Any:
        sizes = tuple(trtp.ShapeExpr(size, dynamic=place < 2 and len(shape) > 1) for place, size in enumerate(shape))
        return trtp.TensorDesc(trtp.ShapeExprs.from_tuple(sizes), getattr(trt, dtype))

    return desc


def expected_answers() -> dict[str, Any]:
    """What launch.py says, in ints."""
    expected: dict[str, Any] = {}
    for question, shapes in SHAPES.items():
        for element in ELEMENTS:
            dtype = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}[element]
            if question.startswith("TokenGather"):
                launch = token_gather(shapes[0], shapes[1], element)
                output = [*shapes[0][:-2], shapes[1][1], shapes[0][-1]]
            elif question.startswith("SummaryPartial"):
                launch = summary_partial(shapes[0], element, 1e-5)
                output, dtype = [shapes[0][0], num_parts(shapes[0][1]), shapes[0][2] + 2], "FLOAT"
            else:
                launch = summary_merge(shapes[0], shapes[1], element)
                output = [shapes[0][0], 1, shapes[1][0]]
            expected[f"{question}, {element}"] = {
                "output": output,
                "dtype": dtype,
                "entry": launch.entry,
                "code": "code",
                "grid": [launch.grid, 1, 1],
                "block": [launch.block, 1, 1],
                "shared": 0,
                "extras": list(launch.extras),
            }
    return expected


def without_classes(found: dict[str, Any]) -> dict[str, Any]:
    return {question: {k: v for k, v in answer.items() if k != "classes"} for question, answer in found.items()}


def test_the_recorded_interface_accepts_what_tensorrt_does(fake: tuple[Any, Any]) -> None:
    assert {name for name, accepted in verdicts(fake[1]).items() if accepted} == ACCEPTED


def test_plans_get_the_launches_of_launch_py(fake: tuple[Any, Any]) -> None:
    trt, trtp = fake
    register_plugins(TARGET)
    found = answers(trtp.registry.plugins, fake_desc(trt, trtp), lambda size: size.value)
    assert without_classes(found) == expected_answers()
    # TensorRT refuses extra arguments whose width it does not know.
    assert {name for answer in found.values() for name in answer["classes"]} <= {"SymInt32", "ShapeExpr"}


def test_plugins_have_the_names_that_the_nodes_ask_for(fake: tuple[Any, Any]) -> None:
    register_plugins(TARGET)
    assert set(fake[1].registry.plugins) == {f"{PLUGIN_NAMESPACE}::{op}" for op in OPS}


def test_plans_need_no_python(fake: tuple[Any, Any]) -> None:
    register_plugins(TARGET)
    for plugin in fake[1].registry.plugins.values():
        assert plugin.aot_impl_func is not None
        assert plugin.impl_func is None


def test_rows_share_a_type_indices_are_int64_and_states_fp32(fake: tuple[Any, Any]) -> None:
    register_plugins(TARGET)
    others = {"index": "INT64", "partial": "FP32"}
    for op in OPS:
        plugin = fake[1].registry.plugins[f"svcli::{op}"]
        num_inputs = len(KERNELS[op].inputs)
        (combination,) = plugin.autotune_func(*[None] * num_inputs, (None,))
        names = [*KERNELS[op].inputs, KERNELS[op].output]
        assert combination.io_types == [others.get(name, "FP32|FP16|BF16") for name in names]
        assert combination.layouts == ["LINEAR"]


def test_a_second_registration_changes_the_target_only(fake: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trt, trtp = fake
    asked: list[str] = []

    def compiled(_op: Op, _element: Element, target: str) -> bytes:
        asked.append(target)
        return b"code"

    monkeypatch.setattr(registration, "compiled", compiled)
    for target in ("sm_80", "sm_90"):
        register_plugins(target)
        answers(trtp.registry.plugins, fake_desc(trt, trtp), lambda size: size.value)
    assert sorted(set(asked)) == ["sm_80", "sm_90"]


def plugin_inputs(fake: tuple[Any, Any], op: Op, width: Any) -> list[Any]:
    """Descriptions of the inputs of a pool's plugin, for rows of `width`, an expression."""
    trt, trtp = fake

    def desc(*sizes: Any) -> Any:
        exprs = tuple(size if isinstance(size, trtp.ShapeExpr) else trtp.ShapeExpr(size) for size in sizes)
        return trtp.TensorDesc(trtp.ShapeExprs.from_tuple(exprs), trt.float16)

    if op == "SummaryMerge":
        return [desc(1, 2, width + 2), desc(width)]
    return [desc(1, 9, width), desc(width), desc(width), desc(1, width), desc(1)]


@pytest.mark.parametrize(("op", "attributes"), [("SummaryPartial", [[1e-5]]), ("SummaryMerge", [])])
def test_rows_too_wide_are_refused_while_the_plan_is_built(
    fake: tuple[Any, Any], op: Op, attributes: list[Any]
) -> None:
    register_plugins(TARGET)
    plugin = fake[1].registry.plugins[f"svcli::{op}"]
    inputs = plugin_inputs(fake, op, fake[1].ShapeExpr(MAX_POOL_WIDTH + 8))
    with pytest.raises(LaunchError, match=f"1 to {MAX_POOL_WIDTH} elements, not {MAX_POOL_WIDTH + 8}"):
        plugin.aot_impl_func(*inputs, *attributes, (None,), 0)


@pytest.mark.parametrize(("op", "attributes"), [("SummaryPartial", [[1e-5]]), ("SummaryMerge", [])])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_width_that_is_not_known_is_refused_while_the_plan_is_built(
    fake: tuple[Any, Any], op: Op, attributes: list[Any], dynamic: bool
) -> None:
    register_plugins(TARGET)
    width = fake[1].ShapeExpr(64, dynamic=True) if dynamic else fake[1].ShapeExpr()
    with pytest.raises(PluginError, match="whose width is known when the plan is built"):
        fake[1].registry.plugins[f"svcli::{op}"].aot_impl_func(*plugin_inputs(fake, op, width), *attributes, (None,), 0)


def test_other_types_are_refused(fake: tuple[Any, Any]) -> None:
    trt, trtp = fake
    register_plugins(TARGET)
    desc = fake_desc(trt, trtp)
    with pytest.raises(PluginError, match="fp32, fp16 and bf16"):
        trtp.registry.plugins["svcli::TokenGather"].aot_impl_func(
            desc((1, 3, 4), "int32"), desc((1, 2), "int64"), (None,), 0
        )


def test_without_tensorrt_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(PluginError, match=r"need TensorRT 10\.15 or newer, and it is not installed"):
        register_plugins(TARGET)


@pytest.mark.parametrize("version", ["10.14.1.48", "8.6.1"])
def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    trt: ModuleType = fake_tensorrt.modules(version)[0]
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    with pytest.raises(PluginError, match=f"10.15 or newer, not {version}"):
        register_plugins(TARGET)


@pytest.mark.trt
def test_the_real_bindings_accept_what_the_recorded_interface_does(real: dict[str, Any]) -> None:
    assert {name for name, accepted in real["verdicts"].items() if accepted} == ACCEPTED


@pytest.mark.trt
def test_the_real_bindings_get_the_launches_of_launch_py(real: dict[str, Any]) -> None:
    assert without_classes(real["answers"]) == expected_answers()
    assert {name for answer in real["answers"].values() for name in answer["classes"]} <= {"SymInt32", "ShapeExpr"}


@pytest.mark.trt
def test_the_real_registry_makes_our_plugins_ahead_of_time_only(real: dict[str, Any]) -> None:
    made = real["creation"]
    assert {op: plugin["kind"] for op, plugin in made.items()} == dict.fromkeys(OPS, "_TemplateAOTPlugin")
    assert not any(plugin["python_at_run_time"] for plugin in made.values())
    fields = {op: plugin["fields"] for op, plugin in made.items()}
    assert fields == {"TokenGather": [], "SummaryPartial": ["epsilon"], "SummaryMerge": []}
    assert made["SummaryPartial"]["attributes"] == {"epsilon": pytest.approx(1e-3)}
    types = {op: plugin["output_types"] for op, plugin in made.items()}
    assert types == {"TokenGather": ["HALF"], "SummaryPartial": ["FLOAT"], "SummaryMerge": ["HALF"]}
    elements = ("FLOAT", "HALF", "BF16")
    assert made["TokenGather"]["tuned"] == [[name, "INT64", name] for name in elements]
    assert made["SummaryPartial"]["tuned"] == [[*[name] * 5, "FLOAT"] for name in elements]
    assert made["SummaryMerge"]["tuned"] == [["FLOAT", name, name] for name in elements]
