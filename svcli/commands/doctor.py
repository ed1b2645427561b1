"""`svcli doctor`: what this machine has, what of svcli works here, and what mends the rest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svcli import __version__, ui
from svcli.errors import FAILURE
from svcli.settings import bundled_model

if TYPE_CHECKING:
    from svcli_engines.abilities import Ability
    from svcli_engines.environment import Cuda, Environment, Gpu


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show what this machine has, and what of svcli works on it.

    Each thing that does not work comes with the command that mends it. Exit code 1 where no engine runs at all.
    """
    from svcli_engines.abilities import abilities, runs_anything, warnings
    from svcli_engines.environment import look

    found = look(bundled_model(), places())
    able, remarks = abilities(found), warnings(found)
    if as_json:
        ui.show(json.dumps(facts(found, able, remarks), indent=2))
    else:
        _render(found, able)
        for remark in remarks:
            ui.note(remark)
    if not runs_anything(able):
        raise typer.Exit(FAILURE)


def places() -> dict[str, Path]:
    """Folders that svcli reads or writes where it is not told others."""
    import tempfile

    from svcli_engines.plugins.compile import cache_folder

    return {
        "working folder": Path(),
        "training assets": Path("build/assets"),
        "training cache": Path("build/features"),
        "compiled kernels": cache_folder(),
        "temporary files": Path(tempfile.gettempdir()),
    }


def facts(found: Environment, able: tuple[Ability, ...], remarks: tuple[str, ...]) -> dict[str, Any]:
    """Everything for programs; keys stay as they are."""
    works = {
        ability.name: {"works": ability.works, "command": ability.command, "remedy": ability.remedy} for ability in able
    }
    return {"svcli": __version__} | asdict(found) | {"warnings": list(remarks), "works": works}


def _render(found: Environment, able: tuple[Ability, ...]) -> None:
    machine, model = found.machine, found.model
    memory = _size(machine.memory_bytes)
    ui.pairs(
        f"svcli {__version__}",
        [
            ("Python", f"{found.python}, {found.executable}"),
            ("platform", machine.platform),
            ("machine", f"{machine.cores} cores, {memory}, {_size(machine.memory_available_bytes)} of it free"),
            ("bundled model", f"{model.path}: {model.problem or f'{model.precision}, all hashes good'}"),
        ],
    )
    ui.pairs("Packages", [(package.name, package.version or "not installed") for package in found.packages])
    runtime = found.onnxruntime
    ui.pairs(
        "Run times",
        [
            ("ONNX Runtime", runtime.problem or f"{runtime.version}: {', '.join(runtime.providers)}"),
            ("PyTorch", _torch(found)),
            *((flavour.name, flavour.problem or f"{flavour.version}") for flavour in found.tensorrt),
            ("plugins", found.plugins.problem or f"kernels are compiled by {found.plugins.compiler}"),
            ("NVIDIA driver", _driver(found.cuda)),
            *((f"GPU {number}", _gpu(gpu)) for number, gpu in enumerate(found.cuda.gpus)),
        ],
    )
    ui.pairs(
        "Places",
        [
            (place.name, f"{place.path}{'' if place.exists else ' (not there yet)'}: {ui.size(place.free_bytes)} free")
            for place in found.places
        ],
    )
    ui.show("What works")
    for ability in able:
        ui.show(f"{'yes' if ability.works else 'no':4} {ability.command}")
        if ability.remedy is not None:
            ui.show(f"     {ability.remedy}")


def _torch(found: Environment) -> str:
    version = found.version("torch")
    if version is None:
        return "not installed"
    return f"{version}, for the CPU alone" if found.torch.cuda is None else f"{version}, for CUDA {found.torch.cuda}"


def _driver(cuda: Cuda) -> str:
    parts = [cuda.driver, cuda.cuda and f"CUDA up to {cuda.cuda}", cuda.problem]
    return ", ".join(part for part in parts if part) or "of an unknown version"


def _gpu(gpu: Gpu) -> str:
    return f"{gpu.name}, compute capability {gpu.compute_capability or 'unknown'}, {_size(gpu.memory_bytes)}"


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else ui.size(num_bytes)
