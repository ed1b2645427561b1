"""What of svcli works with what a machine has, and the command that mends what does not. Only the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svcli_engines.environment import PACKAGES, Environment, TensorRT

_ON_THE_BUNDLED_MODEL = ("chat-cpu", "chat-cuda", "chat-torch-cuda")
_BASE = ("numpy", "pillow", "tokenizers", "jinja2", "pydantic")


@dataclass(frozen=True)
class Ability:
    """One thing that svcli does."""

    name: str
    """Stays the same from version to version."""
    command: str
    remedy: str | None
    """What mends it; None where it works."""

    @property
    def works(self) -> bool:
        return self.remedy is None


def abilities(found: Environment) -> tuple[Ability, ...]:
    """Everything that depends on what is installed, the usual things first."""
    full, rtx = (next(each for each in found.tensorrt if each.name == name) for name in ("tensorrt", "tensorrt-rtx"))
    picture = 'IMAGE "QUESTION"'
    return (
        Ability("chat-cpu", f"svcli chat {picture}", _base(found) or _runtime(found) or _model(found)),
        Ability(
            "chat-cuda",
            f"svcli chat --engine onnxruntime-cuda {picture}",
            _gpu(found) or _base(found) or _cuda_provider(found) or _model(found),
        ),
        Ability(
            "chat-torch-cuda",
            f"svcli chat --engine torch-cuda {picture}",
            _gpu(found) or _base(found) or _torch_cuda(found) or _model(found),
        ),
        Ability(
            "chat-tensorrt",
            f"svcli chat --model BUNDLE --engine tensorrt {picture}",
            _gpu(found) or _base(found) or _tensorrt(found, full, "cuda-bindings"),
        ),
        Ability(
            "chat-tensorrt-rtx",
            f"svcli chat --model BUNDLE --engine tensorrt-rtx {picture}",
            _gpu(found) or _base(found) or _tensorrt(found, rtx, "cuda-bindings"),
        ),
        Ability(
            "build-engine-tensorrt",
            "svcli build-engine BUNDLE --backend tensorrt",
            _gpu(found) or _base(found) or _tensorrt(found, full, "polygraphy", "onnx") or _kernels(found),
        ),
        Ability(
            "build-engine-tensorrt-rtx",
            "svcli build-engine BUNDLE --backend tensorrt-rtx",
            _base(found) or _tensorrt(found, rtx, "polygraphy", "onnx"),
        ),
        Ability("verify", "svcli verify BUNDLE", _extra(found, "torch", "torch", "safetensors") or _runtime(found)),
        Ability(
            "export",
            "svcli export CHECKPOINT -o BUNDLE",
            _extra(found, "torch", "torch", "safetensors", "onnx") or _runtime(found),
        ),
        Ability("train", "svcli train RECIPE -o FOLDER", _extra(found, "torch", "torch", "safetensors")),
        Ability("data", "svcli data fetch", _extra(found, "data", "resvg-py")),
    )


def runs_anything(each: tuple[Ability, ...]) -> bool:
    """Whether there is an engine to chat with, on the bundled model: it has no plans."""
    return any(ability.works for ability in each if ability.name in _ON_THE_BUNDLED_MODEL)


def warnings(found: Environment) -> tuple[str, ...]:
    """What will surprise, though something may work."""
    remarks = []
    if found.version("onnxruntime") and found.version("onnxruntime-gpu"):
        remarks.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files;"
            f" keep one: {_one_runtime('cpu')}"
        )
    if found.cuda.gpus and found.cuda.problem is not None:
        remarks.append(f"there is a GPU, and programs cannot use it ({found.cuda.problem})")
    return tuple(remarks)


def _base(found: Environment) -> str | None:
    return _pip("svcli[cpu]") if any(found.version(name) is None for name in _BASE) else None


def _extra(found: Environment, extra: str, *packages: str) -> str | None:
    return _pip(f"svcli[{extra}]") if any(found.version(name) is None for name in packages) else None


def _runtime(found: Environment) -> str | None:
    """ONNX Runtime, either of them, on the CPU."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if found.version(name)]
    if "CPUExecutionProvider" in found.onnxruntime.providers:
        return None
    if len(installed) == 2:
        return _one_runtime("cpu")
    return _reinstall(installed[0]) if installed else _pip("svcli[cpu]")


def _cuda_provider(found: Environment) -> str | None:
    if "CUDAExecutionProvider" in found.onnxruntime.providers:
        return None
    if found.version("onnxruntime"):  # beside the other one or not, it is in the way
        return _one_runtime("gpu")
    return _reinstall("onnxruntime-gpu") if found.version("onnxruntime-gpu") else _pip("svcli[gpu]")


def _torch_cuda(found: Environment) -> str | None:
    if missing := _extra(found, "torch", "torch", "safetensors"):
        return missing
    if found.torch.cuda is None:
        return (
            "pip install --force-reinstall torch  # from an index with builds for CUDA; this one is for the CPU alone"
        )
    return None


def _one_runtime(extra: str) -> str:
    return f"pip uninstall -y onnxruntime onnxruntime-gpu && {_pip(f'svcli[{extra}]')}"


def _model(found: Environment) -> str | None:
    if found.model.problem is None:
        return None
    path = Path(found.model.path)
    if path.parents[1].name == "svcli":  # inside the installed package
        return _reinstall("svcli")
    return f"git checkout -- {path}"


def _gpu(found: Environment) -> str | None:
    return None if found.cuda.problem is None else f"needs an NVIDIA GPU and its driver ({found.cuda.problem})"


def _tensorrt(found: Environment, flavour: TensorRT, *packages: str) -> str | None:
    """The flavour, and what else is needed with it."""
    missing = [name for name in packages if found.version(name) is None]
    usual = PACKAGES[flavour.name][0]
    if found.version(flavour.name) is None:
        missing.insert(0, usual)
    elif flavour.problem is not None:
        return " ".join(["pip install --force-reinstall", usual, *missing])
    return f"pip install {' '.join(missing)}" if missing else None


def _kernels(found: Environment) -> str | None:
    if found.plugins.problem is None:
        return None
    # A driver loads code of no newer CUDA than its own.
    old = (found.cuda.cuda or "").startswith("12.")
    return _pip("nvidia-cuda-nvrtc-cu12" if old else "nvidia-cuda-nvrtc>=13.0,<13.1")


def _pip(what: str) -> str:
    return f'pip install "{what}"'


def _reinstall(package: str) -> str:
    return f"pip install --force-reinstall --no-deps {package}"
