"""What is in a bundle, as values for `svcli inspect`. Needs neither torch nor onnx."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svcli_export.manifest import Manifest, file_problems, load_manifest


@dataclass(frozen=True)
class KVSize:
    """The KV cache of one conversation."""

    rows: int
    bytes_per_layer: int
    bytes_total: int


@dataclass(frozen=True)
class BundleSummary:
    """A bundle at a glance; its shapes, settings and ops are in the manifest."""

    manifest: Manifest
    kv_full: KVSize
    """As the plain model would need it."""
    kv_reduced: KVSize
    """As it is baked in."""
    size: int
    """Bytes of all files together."""
    file_problems: dict[str, str]
    """File to what is wrong with it; empty where all hashes fit."""


def inspect_bundle(bundle: Path) -> BundleSummary:
    """Raises BundleError where the manifest is unusable; a damaged file is reported, not raised."""
    manifest = load_manifest(bundle, check_files=False)
    contract = manifest.contract
    return BundleSummary(
        manifest=manifest,
        kv_full=_kv_size(contract.capacity_full, contract.kv_bytes_per_row, contract.num_layers),
        kv_reduced=_kv_size(contract.capacity, contract.kv_bytes_per_row, contract.num_layers),
        size=sum(entry.size for entry in manifest.files.values()),
        file_problems=file_problems(bundle, manifest),
    )


def _kv_size(rows: int, bytes_per_row: int, num_layers: int) -> KVSize:
    return KVSize(rows, rows * bytes_per_row // num_layers, rows * bytes_per_row)
