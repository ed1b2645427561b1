"""Plan sets for people and for programs, as `svcli build-engine` and `svcli inspect` show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from svcli import ui

if TYPE_CHECKING:
    from svcli_engines.plans import PlanRecord, PlanSet
    from svcli_export.contract import Contract


def render(plans: PlanSet, record: PlanRecord, contract: Contract, remarks: dict[str, str]) -> None:
    """Two lines and a table; `contract` is that of the bundle, `remarks` says something of each file."""
    from svcli_export.inspection import kv_sizes

    full, reduced = kv_sizes(contract)
    rows = [
        (
            name,
            str(plan.num_layers),
            ui.size(plan.weight_bytes),
            "unknown" if plan.scratch_bytes is None else ui.size(plan.scratch_bytes),
            ui.size(plan.size),
            ", ".join(plan.plugins) or "none",
            remarks[name],
        )
        for name, plan in record.plans.items()
    ]
    built = f"{record.backend} {record.backend_version} for {record.target}, {record.layout} layout, {record.precision}"
    per_layer = ui.size_change(full.bytes_per_layer, reduced.bytes_per_layer)
    memory = f"KV cache {per_layer} a layer, {full.rows}→{reduced.rows} rows; prompts up to {record.max_context} rows"
    memory += f"; {record.num_sequences} sequences at a time" if record.num_sequences > 1 else ""
    # A title would be folded to the width of its table.
    ui.say(f"{plans.folder}: {built}")
    ui.say(memory)
    ui.table("", ("plan", "layers", "weights", "scratch", "on disk", "plugins", ""), rows)


def facts(plans: PlanSet, record: PlanRecord) -> dict[str, Any]:
    """All of plan.json, where it is, and the memory that the set takes beside the KV cache."""
    scratch = [plan.scratch_bytes for plan in record.plans.values()]
    return {
        "path": str(plans.folder),
        "weight_bytes": sum(plan.weight_bytes for plan in record.plans.values()),
        # The phases run one after the other and share one block of scratch memory.
        "scratch_bytes": None if None in scratch else max(size for size in scratch if size is not None),
        "record": record.model_dump(mode="json"),
    }
