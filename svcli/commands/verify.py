"""`svcli verify`: whether every engine does what PyTorch does."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svcli import completions, ui
from svcli.answer_options import BundleArgument
from svcli.engines import EngineName, open_engine
from svcli.errors import UsageError, explain
from svcli.settings import bundled_model

if TYPE_CHECKING:
    from PIL import Image

    from skipvision.config import Transparency
    from svcli_engines.base import Engine
    from svcli_engines.compare import Comparison, Layer, Opener, Stage, Verification
    from svcli_export.agreement import Difference
    from svcli_export.manifest import Manifest

ENGINES = tuple(name.value for name in EngineName)
_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def verify(
    bundle: BundleArgument = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="What the bundle was exported from, as the reference; the bundle's own weights if left out.",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Variant of the bundle; its own graphs if left out.",
            autocompletion=completions.bundle_variants,
        ),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help=f"With commas between: {', '.join(ENGINES)}; all there are if left out."),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", metavar="PATH", help="Picture, or folder of pictures; may be given several times."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="K and V of each layer, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Hold every engine against PyTorch, stage by stage.

    On the same pictures, with PyTorch's visual rows and greedy tokens forced on each engine. Exit code 1 where one is
    off. A fault in the stored weights themselves shows only against the CHECKPOINT.
    """
    names = parse_engines(engines)
    from svcli_engines.compare import MismatchError, verify_engines
    from svcli_engines.processor import Processor
    from svcli_export.manifest import load_manifest

    folder = bundle or bundled_model()
    manifest = load_manifest(folder)
    if variant is not None:
        manifest = manifest.variant(variant)
    pictures = open_pictures(images or [], manifest.image.transparency)
    candidates = openers(folder, manifest, names, checkpoint)
    with ui.Progress() as progress:
        outcome = verify_engines(
            Processor(folder, manifest),
            lambda: _reference(folder, manifest, checkpoint),
            candidates,
            pictures,
            required=names is not None,
            same_weights=checkpoint is None,
            progress=progress.update,
        )
    if as_json:
        described = {
            "bundle": str(folder),
            "variant": manifest.contract.variant or None,
            "checkpoint": str(checkpoint) if checkpoint else None,
        }
        ui.show(json.dumps(described | facts(outcome), indent=2))
    else:
        what = f", variant {manifest.contract.variant}" if manifest.contract.variant else ""
        reference = f"{outcome.reference} on {checkpoint or 'the weights of the bundle'}{what}"
        for comparison in outcome.comparisons:
            _render(comparison, reference, layers=layers)
        ui.say(f"Pictures: {', '.join(outcome.pictures)}")
        for name, error in outcome.left_out.items():
            ui.note(f"{name} was left out: {explain(error)[0]}")
    for comparison in outcome.mismatches:
        off = f"{comparison.engine} does not do what PyTorch does; first off is {comparison.problems[0]}"
        doubt = f"; is {checkpoint} what the bundle was exported from?" if checkpoint else ""
        raise MismatchError(off + doubt)


def parse_engines(text: str | None) -> list[str] | None:
    """Names of engines without repeats; None for all there are."""
    if text is None:
        return None
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in ENGINES]
    if unknown or not names:
        raise UsageError(f"--engines {text}: choose among {', '.join(ENGINES)}")
    return names


def open_pictures(paths: list[Path], transparency: Transparency = "white") -> dict[str, Image.Image]:
    """RGB pictures by name: those at `paths`, else the examples of a checkout, else test cards."""
    from svcli_engines.images import open_image
    from svcli_export.agreement import drawn_cards

    is_checkout = (_EXAMPLES.parent / "pyproject.toml").is_file()
    files = [file for path in paths for file in _files(path)]
    if not paths and is_checkout and _EXAMPLES.is_dir():
        files = _files(_EXAMPLES)
    if not files:
        return {f"test card {number}": card for number, card in enumerate(drawn_cards(), start=1)}
    return {str(file): open_image(file, transparency).image for file in files}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in _PICTURES)
    if not found:
        raise UsageError(f"{path}: no pictures in this folder")
    return found


def openers(bundle: Path, manifest: Manifest, names: list[str] | None, checkpoint: Path | None) -> dict[str, Opener]:
    """How each engine is opened, by name. PyTorch on a GPU decodes as fast as it can there, compiled."""
    if names is not None and "torch" in names and checkpoint is None:
        raise UsageError("torch is what the others are held against; leave it out, or give --checkpoint too")
    wanted = [name for name in names or ENGINES if name != "torch" or checkpoint is not None]
    return {
        name: partial(open_engine, EngineName(name), bundle, manifest, compiled=name == EngineName.TORCH_CUDA)
        for name in wanted
    }


def _reference(bundle: Path, manifest: Manifest, checkpoint: Path | None) -> Engine:
    from svcli_engines.torch_engine import TorchEngine

    return TorchEngine.of_bundle(bundle, manifest, checkpoint=checkpoint)


def facts(outcome: Verification) -> dict[str, Any]:
    """Everything for programs. A figure that is not finite is null."""
    return {
        "reference": outcome.reference,
        "pictures": list(outcome.pictures),
        "agrees": not outcome.mismatches,
        "engines": [
            {
                "engine": comparison.engine,
                "precision": comparison.precision,
                "agrees": not comparison.problems,
                "agreement": comparison.agreement,
                "num_tokens": comparison.num_tokens,
                "reads_cache": comparison.reads_cache,
                "decode_mode": comparison.decode_mode,
                "problems": list(comparison.problems),
                "stages": [_stage_facts(stage) for stage in comparison.stages],
            }
            for comparison in outcome.comparisons
        ],
        "left_out": {name: explain(error)[0] for name, error in outcome.left_out.items()},
    }


def _stage_facts(stage: Stage) -> dict[str, Any]:
    layers = [
        {"layer": layer.layer, "part": layer.part, "picture": layer.picture, "row": layer.row}
        | _figures(layer.difference)
        | {"problems": list(layer.problems)}
        for layer in stage.layers
    ]
    named = {"stage": stage.name, "picture": stage.picture, "agreement": stage.agreement}
    return named | _figures(stage.difference) | {"problems": list(stage.problems), "layers": layers}


def _figures(difference: Difference) -> dict[str, float | None]:
    return {name: value if isfinite(value) else None for name, value in asdict(difference).items()}


def _render(comparison: Comparison, reference: str, *, layers: bool) -> None:
    rows = [
        (
            stage.name,
            *_shown(stage.difference),
            _agreement(stage),
            "off" if stage.problems else "ok",
        )
        for stage in comparison.stages
    ]
    verdict = "off" if comparison.problems else "ok"
    ui.table(
        f"{comparison.engine} {comparison.precision}{_mode(comparison)} against {reference}",
        ("stage", "max rel. error", "cosine", "norm ratio", "agree", ""),
        [*rows, ("all", "", "", "", f"{comparison.agreement:.1%} of {comparison.num_tokens} tokens", verdict)],
    )
    if layers and not comparison.reads_cache:
        ui.note(f"{comparison.engine} does not let its KV cache be read")
    for stage in comparison.stages:
        if layers and stage.layers:
            after = "after prefill" if stage.name == "prefill" else "after the last decode step"
            columns = ("layer", "", "max rel. error", "cosine", "norm ratio", "worst row", "")
            ui.table(f"{comparison.engine}: KV cache {after}", columns, [_layer(layer) for layer in stage.layers])


def _agreement(stage: Stage) -> str:
    if stage.agreement is None:
        return ""
    return f"{stage.agreement:.1%} of rows" if stage.name == "vision" else f"{stage.agreement:.0%} of tokens"


def _mode(comparison: Comparison) -> str:
    return "" if comparison.decode_mode is None else f", decoding: {comparison.decode_mode},"


def _layer(layer: Layer) -> tuple[str, ...]:
    verdict = "off" if layer.problems else "ok"
    return str(layer.layer), layer.part, *_shown(layer.difference), str(layer.row), verdict


def _shown(difference: Difference) -> tuple[str, str, str]:
    return f"{difference.max_error:.2g}", f"{difference.cosine:.6f}", f"{difference.norm_ratio:.6f}"
