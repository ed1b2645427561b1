"""One tiny bundle for all tests of the engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from skipvision.checkpoint import load_checkpoint
from skipvision.config import SkipConfig
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.processor import Processor
from svcli_engines.torch_engine import TorchEngine
from svcli_export.bundle import export_bundle
from svcli_export.contract import Precision
from svcli_export.manifest import Manifest, load_manifest
from tests.export.tiny import SKIP, tiny_checkpoint


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    bundle: Path
    manifest: Manifest

    @property
    def processor(self) -> Processor:
        return Processor(self.bundle, self.manifest)

    def onnx_engine(self) -> OnnxEngine:
        return OnnxEngine(self.bundle, self.manifest, num_threads=1)

    def torch_engine(self) -> TorchEngine:
        return self.engine_of_checkpoint()

    def engine_of_checkpoint(self, **options: Any) -> TorchEngine:
        return TorchEngine(load_checkpoint(self.checkpoint), capacity=self.manifest.contract.capacity, **options)


def export_tiny(folder: Path, skip: SkipConfig | None = SKIP, precision: Precision = "fp32") -> Exported:
    checkpoint = tiny_checkpoint(folder / "checkpoint", skip)
    bundle = folder / "bundle"
    export_bundle(checkpoint, bundle, precision=precision, max_context=96, max_images=2)
    return Exported(checkpoint, bundle, load_manifest(bundle))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def exported_plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("plain"), None)
