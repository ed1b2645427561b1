"""`svcli build-engine`: a bundle's TensorRT plans."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svcli import completions, plan_tables, ui

if TYPE_CHECKING:
    from svcli_engines.build import Outcome, Result


class BackendName(str, Enum):
    """What builds and runs the plans."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class Layout(str, Enum):
    """How phases are spread over plans."""

    SPLIT = "split"
    SHARED = "shared"


def build_engine(
    bundle: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE",
            help="Bundle folder, exported with --precision fp16.",
            autocompletion=completions.bundles,
        ),
    ],
    backend: Annotated[
        BackendName,
        typer.Option(metavar="NAME", help="tensorrt, which needs the GPU, or tensorrt-rtx, which needs none."),
    ] = BackendName.TENSORRT,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="SM",
            help="GPU that runs the plans, such as sm_89; the one here if left out. May be given several times.",
        ),
    ] = None,
    engine_layout: Annotated[
        Layout,
        typer.Option(
            metavar="NAME",
            help="split: one plan a phase. shared: prefill and decode in one plan, which holds the weights once.",
        ),
    ] = Layout.SPLIT,
    max_context: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Longest prompt, in rows of the plain model; the bundle's if left out."),
    ] = None,
    num_sequences: Annotated[
        int,
        typer.Option(
            "--sequences",
            min=1,
            max=1024,
            metavar="N",
            help="Answers that can be decoded in one step, as `svcli serve` does; each takes a KV cache.",
        ),
    ] = 1,
    workspace: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1 << 20,
            metavar="MIB",
            help="Scratch memory that a kernel may ask for; TensorRT's own limit if left out.",
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What tensorrt measured, kept for the next build; written if it is not there."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Build the TensorRT plans of a bundle.

    They go into BUNDLE/plans, one folder for each backend and GPU. What is up to date is not built again. Exit code 3
    where this machine lacks something: TensorRT, a GPU, a driver, memory, room on the disk.
    """
    from svcli_engines.build import build_plans
    from svcli_engines.build_options import Options

    options = Options(
        backend=backend.value,
        layout=engine_layout.value,
        max_context=max_context,
        workspace=None if workspace is None else workspace << 20,
        num_sequences=num_sequences,
        timing_cache=timing_cache,
    )
    with ui.Progress() as progress:
        result = build_plans(bundle, options, targets or (), progress.update)
    if as_json:
        ui.show(json.dumps({"bundle": str(bundle), **facts(result)}, indent=2))
        return
    for outcome in result.outcomes:
        plan_tables.render(outcome.plans, outcome.record, result.contract, _remarks(outcome))
    _render_memory(engine_layout.value, num_sequences, result)


def facts(result: Result) -> dict[str, Any]:
    """Everything for programs."""
    return {
        "kv_cache_bytes": result.contract.capacity * result.contract.kv_bytes_per_row,
        "weight_bytes_by_layout": result.weight_bytes,
        "plan_sets": [
            plan_tables.facts(outcome.plans, outcome.record)
            | {"built": list(outcome.built), "up_to_date": not outcome.built}
            for outcome in result.outcomes
        ],
    }


def _remarks(outcome: Outcome) -> dict[str, str]:
    return {
        name: f"built in {ui.duration(plan.build_seconds)}" if name in outcome.built else "up to date"
        for name, plan in outcome.record.plans.items()
    }


def _render_memory(layout: str, num_sequences: int, result: Result) -> None:
    """What either layout takes on the GPU."""
    meanings = {"split": "prefill and decode hold a copy each", "shared": "prefill and decode share one copy"}
    weights = [
        (f"weights, {name}", f"{ui.size(size)}: {meanings[name]}{', as built' if name == layout else ''}")
        for name, size in result.weight_bytes.items()
    ]
    rows, per_row = result.contract.capacity, result.contract.kv_bytes_per_row
    each = "" if num_sequences == 1 else f", for each of {num_sequences} sequences"
    cache = "KV cache", f"{ui.size(rows * per_row)}, {rows} rows{each}"
    ui.pairs("On the GPU, beside scratch memory", [*weights, cache])
