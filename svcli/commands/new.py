"""`svcli new`: a vision tower and a text decoder become a model that is to be trained."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from svcli import completions, ui
from svcli.models import model_folder
from svcli.remarks import remarks
from svcli.skip_option import parse_setting


class Dtype(str, Enum):
    """How weights are stored."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


_TORCH_NAMES = {Dtype.FP32: "float32", Dtype.FP16: "float16", Dtype.BF16: "bfloat16"}


def new(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Checkpoint folder to write.")],
    vision: Annotated[
        str,
        typer.Option(
            metavar="TOWER",
            help="Folder or hub id of a CLIP or SigLIP model, or of a known vision-language model for its tower.",
        ),
    ],
    text: Annotated[
        str,
        typer.Option(
            metavar="DECODER",
            help="Folder or hub id of a Llama, Mistral or Qwen2 model, or of a known vision-language model for its"
            " decoder.",
        ),
    ],
    skip: Annotated[
        str | None,
        typer.Option(metavar="R/S", help="Retained and skipped tokens of a picture; it skips none if left out."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A setting of the paper instead, such as sv-llava-100.",
            autocompletion=completions.settings,
        ),
    ] = None,
    projector_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Hidden width of the projector; the decoder's width if left out."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed draws the same projector.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="How weights are stored.")] = Dtype.FP32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is already there.")] = False,
) -> None:
    """Join a vision tower and a text decoder to a new model.

    Its projector is fresh: it makes nothing of pictures before it has been trained.
    """
    split = parse_setting(preset, skip)
    from skipvision.assemble import assemble, check_output
    from skipvision.families import read_decoder, read_tower

    check_output(output, overwrite=overwrite)
    tower, decoder = model_folder(vision, check=read_tower), model_folder(text, check=read_decoder)
    import torch

    with ui.Progress() as progress:
        config = assemble(
            tower,
            decoder,
            output,
            skip=None if split == "off" else split,
            projector_size=projector_size,
            seed=seed,
            dtype=getattr(torch, _TORCH_NAMES[dtype]),
            overwrite=overwrite,
            progress=lambda what, share: progress.update(what, share, 1.0),
        )
    for remark in remarks(config):
        ui.note(remark)
    ui.show(str(output))
