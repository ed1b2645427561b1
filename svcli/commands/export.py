"""`svcli export`: a checkpoint, or another bundle, becomes a bundle."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from svcli import completions, ui
from svcli.errors import UsageError
from svcli.files import check_folder
from svcli.models import model_folder
from svcli.remarks import dense_remarks, remarks
from svcli.skip_option import parse_setting, parse_variants


class Precision(str, Enum):
    """How weights are stored."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Checkpoint folder, of `svcli train` or published, another bundle, or a model on the hub: owner/name,"
            " or owner/name@revision.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Bundle folder to write.")],
    precision: Annotated[
        Precision,
        typer.Option(metavar="KIND", help="How weights are stored: fp32, fp16, int8, or int4 in the decoder."),
    ] = Precision.INT8,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Rows of one conversation, as the plain model counts them; if left out the other bundle's, or 1024"
            " beside large pictures.",
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Pictures of one conversation; if left out the other bundle's, or 2, or 1 that is seen in tiles.",
        ),
    ] = None,
    skip: Annotated[
        str | None,
        typer.Option(
            metavar="R/S|off",
            help="Retained and skipped tokens of an image; what the model was trained with if left out.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Or one of the paper's settings, such as sv-llava-100.",
            autocompletion=completions.settings,
        ),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="R/S|NAME",
            help="Another setting that the bundle gets graphs for, on the same weights: R/S, dense, or one of the"
            " paper's; may be given several times. A bundle that skips has dense without being asked, and keeps those"
            " of the bundle that it is made of.",
            autocompletion=completions.variants,
        ),
    ] = None,
    no_variants: Annotated[bool, typer.Option("--no-variants", help="No graphs but those of the one setting.")] = False,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            metavar="TOWER", help="Folder or hub id of the CLIP model, for checkpoints of LLaVA's own code without it."
        ),
    ] = None,
    processor: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Published model whose tokenizer, chat template and picture processing are taken, likewise.",
        ),
    ] = None,
    pictures: Annotated[
        list[Path] | None,
        typer.Option("--picture", metavar="PATH", help="Picture for the check at the end; may be given several times."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is already there.")] = False,
) -> None:
    """Write a checkpoint, a published model, or another bundle, as a bundle for chat.

    Three ONNX graphs (vision, prefill, decode), one weight file and a manifest, checked against PyTorch at the end. So
    is the variant that skips nothing, on the same weights. What another bundle has rounded stays rounded.
    """
    if variants and no_variants:
        raise UsageError("--variant and --no-variants: name one of them")
    setting, asked = parse_setting(preset, skip), parse_variants(variants or ())
    check_folder(output.parent)
    folder = model_folder(source)
    tower = None if vision_tower is None else model_folder(vision_tower, check=_any_config)
    from svcli_export.bundle import export_bundle

    notes: list[str] = []
    with ui.Progress() as progress:
        manifest = export_bundle(
            folder,
            output,
            precision=precision.value,
            max_context=max_context,
            max_images=max_images,
            skip=setting,
            variants=asked,
            default_variants=not no_variants,
            pictures=pictures or (),
            overwrite=overwrite,
            progress=lambda what, share: progress.update(what, share, 1.0),
            note=notes.append,
            tower=tower,
            processor=processor,
        )
    check = manifest.check
    ui.note(
        f"{check.agreement:.1%} of {check.num_tokens} greedy tokens agree with PyTorch on {check.num_pictures} pictures"
    )
    for name in manifest.variants:
        own = manifest.variant(name).check
        ui.note(f"variant {name}: {own.agreement:.1%} of {own.num_tokens} on {own.num_pictures}")
    for sentence in notes:
        ui.note(sentence)
    if check.weight_error is not None:
        ui.note(f"rounding to 4 bits moved the weights by {check.weight_error:.1%} at most")
    for remark in remarks(manifest.config) + dense_remarks(manifest):
        ui.note(remark)
    ui.show(str(output))


def _any_config(_text: str) -> None:
    """A config.json that whoever reads it judges."""
