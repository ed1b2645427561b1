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
from svcli_engines.plugins.compile import TARGETS
from svcli_engines.plugins.launch import (
    ELEMENTS,
    KERNELS,
    MAX_POOL_WIDTH,
    OPS,
    Element,
    LaunchError,
    Op,
    pool_blocks,
    summary_pool,
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
        sizes = tuple(trtp.ShapeExpr(size, dynamic=place < 2) for place, size in enumerate(shape))
        return trtp.TensorDesc(trtp.ShapeExprs.from_tuple(sizes), getattr(trt, dtype))

    return desc


def expected_answers() -> dict[str, Any]:
    """What launch.py says, in ints."""
    expected: dict[str, Any] = {}
    for question, shapes in SHAPES.items():
        for element in ELEMENTS:
            if question.startswith("TokenGather"):
                launch = token_gather(shapes[0], shapes[1], element)
                output = [*shapes[0][:-2], shapes[1][1], shapes[0][-1]]
            else:
                launch = summary_pool(shapes[0], element, 1e-5, pool_blocks(TARGET))
                output = [shapes[0][0], 1, shapes[0][2]]
            expected[f"{question}, {element}"] = {
                "output": output,
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


def test_both_plugins_have_the_names_that_the_nodes_ask_for(fake: tuple[Any, Any]) -> None:
    register_plugins(TARGET)
    assert set(fake[1].registry.plugins) == {f"{PLUGIN_NAMESPACE}::{op}" for op in OPS}


def test_plans_need_no_python(fake: tuple[Any, Any]) -> None:
    register_plugins(TARGET)
    for plugin in fake[1].registry.plugins.values():
        assert plugin.aot_impl_func is not None
        assert plugin.impl_func is None


def test_all_rows_share_a_type_and_indices_are_int64(fake: tuple[Any, Any]) -> None:
    register_plugins(TARGET)
    for op in OPS:
        plugin = fake[1].registry.plugins[f"svcli::{op}"]
        num_inputs = len(KERNELS[op].inputs)
        (combination,) = plugin.autotune_func(*[None] * num_inputs, (None,))
        types = dict(zip([*KERNELS[op].inputs, KERNELS[op].output], combination.io_types, strict=True))
        assert types.pop("index", "INT64") == "INT64"
        assert set(types.values()) == {"FP32|FP16|BF16"}
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


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_has_the_blocks_that_its_kernel_is_compiled_for(fake: tuple[Any, Any], target: str) -> None:
    trt, trtp = fake
    register_plugins(target)
    found = answers(trtp.registry.plugins, fake_desc(trt, trtp), lambda size: size.value)
    assert found["SummaryPool, fp16"]["grid"] == [3 * pool_blocks(target), 1, 1]


def test_rows_too_wide_are_refused_while_the_plan_is_built(fake: tuple[Any, Any]) -> None:
    trt, trtp = fake
    register_plugins(TARGET)
    plugin = trtp.registry.plugins["svcli::SummaryPool"]
    desc = fake_desc(trt, trtp)((1, 9, MAX_POOL_WIDTH + 8), "float16")
    with pytest.raises(LaunchError, match=f"up to {MAX_POOL_WIDTH} elements, not {MAX_POOL_WIDTH + 8}"):
        plugin.aot_impl_func(desc, *[None] * 4, [1e-5], (None,), 0)


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
    assert {op: plugin["fields"] for op, plugin in made.items()} == {"TokenGather": [], "SummaryPool": ["epsilon"]}
    assert made["SummaryPool"]["attributes"] == {"epsilon": pytest.approx(1e-3)}
    assert all(plugin["output_types"] == ["HALF"] for plugin in made.values())
    rows = [["FLOAT", "INT64", "FLOAT"], ["HALF", "INT64", "HALF"], ["BF16", "INT64", "BF16"]]
    assert made["TokenGather"]["tuned"] == rows
    assert made["SummaryPool"]["tuned"] == [[name] * 6 for name in ("FLOAT", "HALF", "BF16")]
