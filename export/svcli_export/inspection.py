"""What is in a bundle, as values for `svcli inspect`. Needs neither torch nor onnx."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svcli_export.contract import Contract
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
    variants: dict[str, Manifest]
    """By name, each as a bundle of its own."""


def inspect_bundle(bundle: Path) -> BundleSummary:
    """Raises BundleError where the manifest is unusable; a damaged file is reported, not raised."""
    manifest = load_manifest(bundle, check_files=False)
    full, reduced = kv_sizes(manifest.contract)
    return BundleSummary(
        manifest=manifest,
        kv_full=full,
        kv_reduced=reduced,
        size=sum(entry.size for entry in manifest.files.values()),
        file_problems=file_problems(bundle, manifest),
        variants={name: manifest.variant(name) for name in manifest.variants},
    )


def kv_sizes(contract: Contract) -> tuple[KVSize, KVSize]:
    """As the plain model would need it, and as it is baked in."""
    per_row = contract.kv_bytes_per_row
    full, reduced = (
        KVSize(rows, rows * per_row // contract.num_layers, rows * per_row)
        for rows in (contract.capacity_full, contract.capacity)
    )
    return full, reduced
