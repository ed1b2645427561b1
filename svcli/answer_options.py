"""Options that several commands share: what runs a bundle, how answers are drawn, and what a server takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svcli import completions
from svcli.engines import EngineName

_BUNDLE = "Bundle folder; the bundled model if left out."
Bundle = Annotated[Path | None, typer.Option(metavar="BUNDLE", help=_BUNDLE, autocompletion=completions.bundles)]
BundleArgument = Annotated[
    Path | None, typer.Argument(metavar="BUNDLE", help=_BUNDLE, autocompletion=completions.bundles)
]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; one per core if left out.")]
Engine = Annotated[EngineName, typer.Option(metavar="NAME", help="What runs the bundle, as for `svcli chat`.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option(metavar="N", help="Draw among the N likeliest tokens; 0: all.")]
TopP = Annotated[
    float, typer.Option(metavar="P", help="Draw among the likeliest tokens that together have this probability.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The same seed draws the same answer.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Longest answer.")]
_PRIVATE_URLS = "--allow-private-urls"
PrivateUrls = Annotated[bool, typer.Option(_PRIVATE_URLS, help="Fetch pictures from this machine's own network, too.")]
PRIVATE_REMEDY = f"{_PRIVATE_URLS} allows it"

Parallel = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        metavar="N",
        help="Answers at a time, each with a KV cache of its own; up to 8, as fit 1 GiB, or what plans are for.",
    ),
]
Queue = Annotated[int, typer.Option(min=1, max=100_000, metavar="N", help="Questions that may wait; more are refused.")]
Timeout = Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="For one answer, waiting included.")]
Drain = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="For ending what was taken, when it is told to stop.")
]
MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, whatever is asked for.")]
MaxPixels = Annotated[float, typer.Option(min=0.01, max=100, metavar="MP", help="Largest picture.")]
