"""Plan sets for people and for programs, as `svcli build-engine` and `svcli inspect` show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from svcli import ui

if TYPE_CHECKING:
    from svcli_engines.plans import PlanRecord, PlanSet


def render(plans: PlanSet, record: PlanRecord, remarks: dict[str, str]) -> None:
    """A line and a table; `remarks` says something of each file."""
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
    built += f", prompts up to {record.max_context} rows"
    # A title would be folded to the width of its table.
    ui.show(f"{plans.folder}: {built}")
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
