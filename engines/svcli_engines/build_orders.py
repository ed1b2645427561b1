"""What each plan of a bundle is built from, and which of those that are there may stay. Needs onnx."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from svcli_engines.build_options import Options
from svcli_engines.builder_process import Tools
from svcli_engines.plan_graphs import phases_of, plan_graph, plugin_nodes, weight_sizes
from svcli_engines.plans import (
    RECIPES_FILE,
    PlanError,
    PlanFile,
    PlanPhase,
    PlanRecord,
    PlanSet,
    ShapeRange,
    built_from,
    load_record,
    phase_ranges,
    plan_files,
)
from svcli_engines.plugins.compile import SOURCE
from svcli_export.contract import CACHE_PARTS, build_contract, past_name, present_name
from svcli_export.manifest import FileEntry, Manifest, file_entry


@dataclass(frozen=True)
class Part:
    """One plan to be, whatever the target."""

    file: str
    graph: ModelProto
    profiles: tuple[dict[str, ShapeRange], ...]
    caches: dict[str, str]
    """Input to output."""
    plugins: tuple[str, ...]
    num_plugins: int
    weight_bytes: int

    @property
    def kernel_sha256(self) -> str:
        """Of the source of the plugins' kernels; empty where the plan has none."""
        return file_entry(SOURCE).sha256 if self.plugins else ""


@dataclass(frozen=True)
class Order:
    """A plan set, before it is built."""

    plans: PlanSet
    recipes: dict[str, str]
    """A hash for each file, of everything that it is built from."""
    old: PlanRecord | None
    """Of the set that is there."""
    kept: dict[str, PlanFile]
    """Plans of that set that need not be built again."""
    missing: tuple[Part, ...]


def plan_parts(bundle: Path, manifest: Manifest, options: Options) -> list[Part]:
    """Every plan of the layout. Raises GraphError, or ContractError where a context leaves no room for pictures."""
    contract = manifest.contract
    each = [(layer, part) for layer in range(contract.num_layers) for part in CACHE_PARTS]
    caches = {past_name(layer, part): present_name(layer, part) for layer, part in each}
    parts = []
    for file in plan_files(options.layout):
        phases = phases_of(options.layout, file, options.num_sequences)
        graph = plan_graph(bundle, manifest, options.layout, file, options.backend, options.num_sequences)
        nodes = plugin_nodes(graph)
        parts.append(
            Part(
                file=file,
                graph=graph,
                profiles=tuple(_ranges(manifest, options, phase) for phase in phases),
                caches={} if "vision" in phases else caches,
                plugins=tuple(sorted(nodes)),
                num_plugins=nodes.total(),
                weight_bytes=sum(weight_sizes(graph).values()),
            )
        )
    return parts


def plan_order(plans: PlanSet, manifest: Manifest, options: Options, parts: Sequence[Part], tools: Tools) -> Order:
    """What has to be built for one target."""
    old, old_recipes = _old_set(plans)
    recipes = {part.file: _recipe(part, manifest, options, plans.target, tools) for part in parts}
    kept = {}
    for file, recipe in recipes.items():
        plan = None if old is None else old.plans.get(file)
        if plan is not None and old_recipes.get(file) == recipe and _is_whole(plans.folder / file, plan):
            kept[file] = plan
    return Order(plans, recipes, old, kept, tuple(part for part in parts if part.file not in kept))


def _ranges(manifest: Manifest, options: Options, phase: PlanPhase) -> dict[str, ShapeRange]:
    """Range of every input of a phase; a smaller --max-context bounds the rows, not the cache, which is baked in."""
    contract = manifest.contract
    whole = phase_ranges(contract, options.layout, phase, options.num_sequences)
    if options.max_context is None:
        return whole
    shorter = build_contract(manifest.config, options.max_context, contract.max_images, contract.precision)
    bounded = phase_ranges(shorter, options.layout, phase, options.num_sequences)
    return {name: each if each.min == each.max else bounded[name] for name, each in whole.items()}


def _old_set(plans: PlanSet) -> tuple[PlanRecord | None, dict[str, str]]:
    """The record and the recipes of what is there; None and none where nothing is, or nothing readable."""
    with suppress(PlanError, OSError, ValueError):
        record = load_record(plans)
        recipes = json.loads((plans.folder / RECIPES_FILE).read_text(encoding="utf-8"))
        if isinstance(recipes, dict):
            return record, recipes
    return None, {}


def _recipe(part: Part, manifest: Manifest, options: Options, target: str, tools: Tools) -> str:
    sources = built_from(manifest)
    everything = {
        "graph": hashlib.sha256(part.graph.SerializeToString(deterministic=True)).hexdigest(),
        "weights": {name: digest for name, digest in sources.items() if not name.endswith(".onnx")},
        "profiles": [{name: each.model_dump() for name, each in ranges.items()} for ranges in part.profiles],
        "backend": [options.backend, tools.version],
        "target": target,
        "workspace": options.workspace,
        "code": {path.name: file_entry(path).sha256 for path in _code(part)},
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _code(part: Part) -> list[Path]:
    """What of svcli decides how a graph becomes a plan."""
    plugins = SOURCE.parent
    return [Path(__file__).with_name("plan_builder.py"), *([*plugins.glob("*.py"), SOURCE] if part.plugins else [])]


def _is_whole(path: Path, plan: PlanFile) -> bool:
    return path.is_file() and file_entry(path) == FileEntry(sha256=plan.sha256, size=plan.size)
