"""A bundle, and those of its variants that are asked for, each with a pool and a scheduler of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from svcli.engines import EngineName, open_pool
from svcli.server.served import Served
from svcli_engines.pictures import VisualCache
from svcli_engines.processor import Processor
from svcli_engines.schedule import Scheduler
from svcli_export.manifest import Manifest


def open_models(
    bundle: Path,
    manifest: Manifest,
    name: str,
    variants: Sequence[str],
    engine: EngineName,
    *,
    threads: int | None,
    parallel: int | None,
    max_waiting: int,
) -> dict[str, Served]:
    """By the names that requests call them: `name`, and `name:VARIANT`. Raises what manifest and engine raise."""
    manifests = {name: manifest} | {f"{name}:{variant}": manifest.variant(variant) for variant in variants}
    models: dict[str, Served] = {}
    try:
        for each, own in manifests.items():
            processor, visuals = Processor(bundle, own), VisualCache()
            pool = open_pool(engine, bundle, own, threads=threads, parallel=parallel)
            scheduler = Scheduler(pool, processor, max_waiting=max_waiting, visuals=visuals)
            models[each] = Served(each, processor, scheduler, visuals, int(time.time()))
    except BaseException:
        for model in models.values():
            model.scheduler.close()
        raise
    return models
