"""`svcli triton`: a bundle becomes a model of NVIDIA's Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svcli import completions, ui
from svcli.answer_options import (
    BundleArgument,
    Drain,
    Engine,
    MaxPixels,
    MaxTokens,
    Parallel,
    Queue,
    Threads,
    Timeout,
)
from svcli.engines import EngineName
from svcli.files import check_folder
from svcli.settings import bundled_model


def triton(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="REPOSITORY", help="Model repository, in which a folder is written."),
    ],
    bundle: BundleArgument = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What Triton calls the model; the bundle's name if left out.")
    ] = None,
    engine: Engine = EngineName.ONNXRUNTIME,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A variant of the bundle instead of its own setting.",
            autocompletion=completions.bundle_variants,
        ),
    ] = None,
    threads: Threads = None,
    parallel: Parallel = None,
    queue: Queue = 64,
    timeout: Timeout = 120.0,
    drain: Drain = 30.0,
    max_tokens: MaxTokens = 1024,
    max_pixels: MaxPixels = 50.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that svcli wrote before.")] = False,
) -> None:
    """Write a bundle as a model for NVIDIA's Triton Inference Server.

    Its Python backend answers through the same scheduler as `svcli serve`: svcli must be installed where Triton runs.
    The model has the bundle in it, with the plans of the engine.
    """
    from svcli.triton.repository import write_model
    from svcli.triton.settings import Settings

    check_folder(output)
    settings = Settings(
        engine=engine.value,
        variant=variant,
        threads=threads,
        parallel=parallel,
        queue=queue,
        timeout=timeout,
        drain=drain,
        max_tokens=max_tokens,
        max_pixels=max_pixels,
    )
    source = bundle or bundled_model()
    ui.show(str(write_model(source, output, name or source.resolve().name, settings, overwrite=overwrite)))
