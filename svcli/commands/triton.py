"""`svcli triton`: a bundle becomes a model of NVIDIA's Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svcli import ui
from svcli.engines import EngineName


def triton(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="REPOSITORY", help="Model repository, in which a folder is written."),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What Triton calls the model; the bundle's name if left out.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(metavar="NAME", help="What runs the bundle, as for `svcli serve`.")
    ] = EngineName.ONNXRUNTIME,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="A variant of the bundle instead of its own setting.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; one per core if left out.")] = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, max=1024, metavar="N", help="Answers at a time; as for `svcli serve` if left out."),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="N", help="Questions that may wait; more are refused.")
    ] = 64,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="For one answer, waiting included.")
    ] = 120.0,
    drain: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="For ending what was taken, when the model is unloaded.")
    ] = 30.0,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, whatever is asked for.")] = 1024,
    max_pixels: Annotated[float, typer.Option(min=0.01, max=100, metavar="MP", help="Largest picture.")] = 50.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that svcli wrote before.")] = False,
) -> None:
    """Write a bundle as a model for NVIDIA's Triton Inference Server.

    Its Python backend answers through the same scheduler as `svcli serve`: svcli must be installed where Triton runs.
    The model has the bundle in it, with the plans of the engine.
    """
    from svcli.triton.repository import write_model
    from svcli.triton.settings import Settings

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
    ui.show(str(write_model(bundle, output, name or bundle.resolve().name, settings, overwrite=overwrite)))
