"""What works where, and the command that mends what does not."""

from __future__ import annotations

import pytest

from svcli_engines.abilities import abilities, runs_anything, warnings
from svcli_engines.environment import Cuda, Environment, Model, OnnxRuntime, TensorRT, Torch
from tests.engines.machines import CPU_ONLY, EVERYTHING, H200, LIGHT, laptop, server

GPU = "needs an NVIDIA GPU and its driver (libcuda.so.1 is not there)"
NAMES = [
    "chat-cpu",
    "chat-cuda",
    "chat-torch-cuda",
    "chat-tensorrt",
    "chat-tensorrt-rtx",
    "build-engine-tensorrt",
    "build-engine-tensorrt-rtx",
    "verify",
    "export",
    "train",
    "data",
]
TORCH = 'pip install "svcli[torch]"'


def remedies(found: Environment) -> dict[str, str | None]:
    return {ability.name: ability.remedy for ability in abilities(found)}


def test_everything_works_where_everything_is() -> None:
    found = remedies(server())
    assert list(found) == NAMES
    assert set(found.values()) == {None}
    assert warnings(server()) == ()


def test_a_light_install_chats_on_the_cpu_and_says_what_the_rest_needs() -> None:
    assert remedies(laptop()) == {
        "chat-cpu": None,
        "chat-cuda": GPU,
        "chat-torch-cuda": GPU,
        "chat-tensorrt": GPU,
        "chat-tensorrt-rtx": GPU,
        "build-engine-tensorrt": GPU,
        "build-engine-tensorrt-rtx": "pip install tensorrt-rtx-cu13 polygraphy onnx",
        "verify": TORCH,
        "export": TORCH,
        "train": TORCH,
        "data": 'pip install "svcli[data]"',
    }


def test_rtx_plans_can_be_built_without_a_gpu() -> None:
    found = remedies(laptop(LIGHT | {"tensorrt-rtx", "polygraphy", "onnx"}))
    assert (found["build-engine-tensorrt-rtx"], found["chat-tensorrt-rtx"]) == (None, GPU)


@pytest.mark.parametrize(
    ("found", "name", "remedy"),
    [
        (laptop(LIGHT - {"onnxruntime"}), "chat-cpu", 'pip install "svcli[cpu]"'),
        (laptop(LIGHT - {"tokenizers"}), "chat-cpu", 'pip install "svcli[cpu]"'),
        (
            laptop(onnxruntime=OnnxRuntime(problem="ImportError: bad")),
            "chat-cpu",
            "pip install --force-reinstall --no-deps onnxruntime",
        ),
        (
            laptop(LIGHT | {"onnxruntime-gpu"}, onnxruntime=OnnxRuntime(problem="ImportError: bad")),
            "chat-cpu",
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "svcli[cpu]"',
        ),
        (laptop(onnxruntime=OnnxRuntime(problem="ImportError: bad")), "export", TORCH),
        (
            laptop(model=Model("/src/models/skipvision-tiny", problem="was altered")),
            "chat-cpu",
            "git checkout -- /src/models/skipvision-tiny",
        ),
        (
            laptop(model=Model("/venv/lib/svcli/models/skipvision-tiny", problem="is missing")),
            "chat-cpu",
            "pip install --force-reinstall --no-deps svcli",
        ),
        (
            server(LIGHT, onnxruntime=CPU_ONLY),
            "chat-cuda",
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "svcli[gpu]"',
        ),
        (
            server(LIGHT - {"onnxruntime"}, onnxruntime=OnnxRuntime(problem="not installed")),
            "chat-cuda",
            'pip install "svcli[gpu]"',
        ),
        (
            server(EVERYTHING, onnxruntime=OnnxRuntime(problem="ImportError: libcudnn.so.9")),
            "chat-cuda",
            "pip install --force-reinstall --no-deps onnxruntime-gpu",
        ),
        (server(EVERYTHING - {"torch"}), "chat-torch-cuda", TORCH),
        (
            server(torch=Torch()),
            "chat-torch-cuda",
            "pip install --force-reinstall torch  # from an index with builds for CUDA; this one is for the CPU alone",
        ),
        (server(EVERYTHING - {"cuda-bindings"}), "chat-tensorrt", "pip install cuda-bindings"),
        (
            server(EVERYTHING - {"tensorrt", "polygraphy"}),
            "build-engine-tensorrt",
            "pip install tensorrt polygraphy",
        ),
        (
            server(tensorrt=(TensorRT("tensorrt", problem="libnvinfer"), TensorRT("tensorrt-rtx", "1.7"))),
            "chat-tensorrt",
            "pip install --force-reinstall tensorrt",
        ),
        (
            server(EVERYTHING - {"nvrtc"}),
            "build-engine-tensorrt",
            'pip install "nvidia-cuda-nvrtc>=13.0,<13.1"',
        ),
        (
            server(EVERYTHING - {"nvrtc"}, cuda=Cuda("550.54", "12.4", (H200,), "nvidia-smi")),
            "build-engine-tensorrt",
            'pip install "nvidia-cuda-nvrtc-cu12"',
        ),
        (server(EVERYTHING - {"safetensors"}), "train", TORCH),
        (server(EVERYTHING - {"onnx"}), "export", TORCH),
        (server(EVERYTHING - {"resvg-py"}), "data", 'pip install "svcli[data]"'),
    ],
)
def test_each_no_comes_with_what_mends_it(found: Environment, name: str, remedy: str) -> None:
    assert remedies(found)[name] == remedy


def test_what_is_broken_elsewhere_does_not_spoil_what_works() -> None:
    broken = server(tensorrt=(TensorRT("tensorrt", problem="broken"), TensorRT("tensorrt-rtx", "1.7")))
    assert {name for name, remedy in remedies(broken).items() if remedy} == {"chat-tensorrt", "build-engine-tensorrt"}


def test_an_engine_is_one_that_chats() -> None:
    assert runs_anything(abilities(laptop()))
    only_builds = laptop({"tensorrt-rtx", "polygraphy", "onnx", "torch", "safetensors", "resvg-py"})
    assert not runs_anything(abilities(only_builds))


def test_two_onnxruntimes_are_warned_about_even_while_they_work() -> None:
    (remark,) = warnings(server(EVERYTHING | {"onnxruntime"}))
    assert "overwrite each other" in remark
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in remark


def test_a_gpu_that_programs_cannot_use_is_warned_about() -> None:
    found = server(cuda=Cuda("580.65.06", None, (H200,), "nvidia-smi", "libcuda.so.1 is not there"))
    assert warnings(found) == ("there is a GPU, and programs cannot use it (libcuda.so.1 is not there)",)
    assert remedies(found)["chat-cuda"] == GPU
