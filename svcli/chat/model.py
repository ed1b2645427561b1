"""A bundle that is open: what makes prompts of words, and an engine for each of its variants that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svcli.engines import EngineName, open_engine
from svcli.errors import UsageError

if TYPE_CHECKING:
    from svcli_engines.base import Engine
    from svcli_engines.generate import Conversation
    from svcli_engines.processor import Processor
    from svcli_export.manifest import Manifest

SKIPPED = "skipped"
"""The graphs that a bundle always has, where they skip."""
DENSE = "dense"
"""The same weights, with nothing skipped; the manifest calls them so, too."""


@dataclass(frozen=True)
class Runner:
    """One variant of the bundle, ready to answer."""

    manifest: Manifest
    processor: Processor
    engine: Engine
    conversation: Conversation


class Model:
    """A bundle and how it is run."""

    def __init__(self, bundle: Path, manifest: Manifest, engine: EngineName, threads: int | None = None) -> None:
        """Opens nothing yet."""
        self.bundle, self.manifest = bundle, manifest
        self.own_variant = DENSE if manifest.config.skip is None else SKIPPED
        """The name here of what is no variant in the manifest."""
        self._engine, self._threads = engine, threads
        self._runners: dict[str, Runner] = {}

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of all that `runner` takes."""
        return (self.own_variant, *self.manifest.variants)

    def runner(self, variant: str) -> Runner:
        """Raises what opening the engine does, BundleError for a broken tokenizer or a variant that is not there."""
        if variant not in self._runners:
            from svcli_engines.generate import Conversation
            from svcli_engines.processor import Processor

            manifest = self._manifest(variant)
            processor = Processor(self.bundle, manifest)
            engine = open_engine(self._engine, self.bundle, manifest, threads=self._threads)
            self._runners[variant] = Runner(manifest, processor, engine, Conversation(engine, processor))
        return self._runners[variant]

    def close(self) -> None:
        """Frees what the engines hold."""
        while self._runners:
            self._runners.popitem()[1].engine.close()

    def _manifest(self, variant: str) -> Manifest:
        if variant == self.own_variant:
            return self.manifest
        if variant == SKIPPED:
            raise UsageError("the graphs of this bundle skip nothing, so there is nothing to switch on")
        return self.manifest.variant(variant)
