"""Options that `chat`, `ask` and `serve` share: what runs a bundle, and how answers are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svcli.engines import EngineName

Bundle = Annotated[Path | None, typer.Option(metavar="BUNDLE", help="Bundle folder; the bundled model if left out.")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; one per core if left out.")]
Engine = Annotated[EngineName, typer.Option(metavar="NAME", help="What runs the bundle, as for `svcli chat`.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option(metavar="N", help="Draw among the N likeliest tokens; 0: all.")]
TopP = Annotated[
    float, typer.Option(metavar="P", help="Draw among the likeliest tokens that together have this probability.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The same seed draws the same answer.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Longest answer.")]
PrivateUrls = Annotated[
    bool, typer.Option("--allow-private-urls", help="Fetch pictures from this machine's own network, too.")
]
