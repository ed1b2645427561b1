"""`svcli inspect`: what a bundle and its plans are made of, and whether they are whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svcli import plan_tables, ui
from svcli.answer_options import BundleArgument
from svcli.remarks import dense_remarks
from svcli.settings import bundled_model

if TYPE_CHECKING:
    from skipvision.config import SkipConfig
    from svcli_engines.plans import PlanError, PlanRecord, PlanSet
    from svcli_export.contract import Contract, GraphSpec
    from svcli_export.inspection import BundleSummary
    from svcli_export.manifest import GraphOps, Manifest


def inspect(
    bundle: BundleArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show what a bundle is made of.

    Settings, KV rows and bytes full against reduced, graphs with their shapes, variants, hashes, the export's own
    check, and the plans that `svcli build-engine` made. Exit code 1 where a file is damaged, or a plan does not fit.
    """
    from svcli_export.inspection import inspect_bundle
    from svcli_export.manifest import BundleError

    folder = bundle or bundled_model()
    summary = inspect_bundle(folder)
    plan_sets = examine_plans(folder, summary.manifest)
    if as_json:
        plans = {"plans": [plan_facts(each) for each in plan_sets]}
        ui.show(json.dumps({"path": str(folder), **facts(summary), **plans}, indent=2))
    else:
        _render(folder, summary)
        for each in plan_sets:
            _render_plans(each, summary.manifest.contract)
    for name, problem in summary.file_problems.items():
        raise BundleError(f"{folder}: {name} {problem}; re-export it with `svcli export`")
    misfits = [each.problem for each in plan_sets if each.problem is not None]
    for misfit in misfits[1:]:
        ui.note(str(misfit))
    for misfit in misfits[:1]:
        raise misfit


@dataclass(frozen=True)
class ExaminedPlans:
    """A plan set, and what is wrong with it."""

    plans: PlanSet
    record: PlanRecord | None
    """None where it cannot be read."""
    problem: PlanError | None
    remarks: dict[str, str]
    """On each plan: `ok`, or what is wrong with it."""


def examine_plans(bundle: Path, manifest: Manifest) -> list[ExaminedPlans]:
    """Every plan set of a bundle, checked against it; neither GPU nor TensorRT is asked for."""
    from svcli_engines.plans import PlanError, check_record, find_plan_sets, load_record, plan_problems, refusal

    found = []
    for plans in find_plan_sets(bundle):
        try:
            record = load_record(plans)
        except PlanError as error:
            found.append(ExaminedPlans(plans, None, error, {}))
            continue
        problem = None
        try:
            check_record(plans, record, manifest)
        except PlanError as error:
            problem = error
        files = plan_problems(plans, record)
        whole = "ok" if problem is None else "does not fit"
        for name, what in files.items():
            problem = problem or refusal(plans.as_built(record, manifest.contract), f"{name} {what}")
        found.append(ExaminedPlans(plans, record, problem, {name: files.get(name, whole) for name in record.plans}))
    return found


def plan_facts(each: ExaminedPlans) -> dict[str, Any]:
    """The same for programs; what cannot be read is null."""
    unread: dict[str, Any] = {
        "path": str(each.plans.folder),
        "weight_bytes": None,
        "scratch_bytes": None,
        "record": None,
    }
    read = unread if each.record is None else plan_tables.facts(each.plans, each.record)
    return read | {"problem": None if each.problem is None else str(each.problem)}


def facts(summary: BundleSummary) -> dict[str, Any]:
    """The summary for programs: rows of one image by stage, KV rows and bytes, and the whole manifest."""
    from svcli_export.inspection import kv_sizes

    return {
        "rows_per_image": _rows_per_image(summary.manifest),
        "kv_bytes_per_row": summary.manifest.contract.kv_bytes_per_row,
        "kv_full": asdict(summary.kv_full),
        "kv_reduced": asdict(summary.kv_reduced),
        "size": summary.size,
        "file_problems": summary.file_problems,
        "variants": {
            name: {"rows_per_image": _rows_per_image(each), "kv_reduced": asdict(kv_sizes(each.contract)[1])}
            for name, each in summary.variants.items()
        },
        "manifest": summary.manifest.model_dump(mode="json", by_alias=True),
    }


def _rows_per_image(manifest: Manifest) -> dict[str, int]:
    """Of the largest, where pictures are seen in tiles."""
    from skipvision.layout import largest_spans
    from skipvision.tiles import most_tokens

    spans = largest_spans(manifest.config)
    kept = sum(span.num_kept for span in spans)
    attending = sum(span.length for span in spans)
    return {"tokens": most_tokens(manifest.config), "attention": attending, "feed_forward": kept, "kv_cache": kept}


def _render(folder: Path, summary: BundleSummary) -> None:
    manifest, contract, check = summary.manifest, summary.manifest.contract, summary.manifest.check
    rows, full, reduced = _rows_per_image(manifest), summary.kv_full, summary.kv_reduced
    ui.pairs(str(folder), _settings(manifest))
    title = "Rows of one image" if manifest.config.tiles is None else "Rows of the largest image, in tiles"
    ui.table(title, ("tokens", "attention", "feed-forward", "KV cache"), [list(map(str, rows.values()))])
    image_bytes = [ui.size(rows[stage] * contract.kv_bytes_per_row) for stage in ("tokens", "kv_cache")]
    shapes = [f"2 x [1, {contract.num_kv_heads}, {kv.rows}, {contract.head_dim}]" for kv in (full, reduced)]
    ui.table(
        "KV cache",
        ("", "full", "reduced", "bytes full", "bytes reduced"),
        [
            ("one image", str(rows["tokens"]), str(rows["kv_cache"]), *image_bytes),
            ("capacity", str(full.rows), str(reduced.rows), ui.size(full.bytes_total), ui.size(reduced.bytes_total)),
            ("  a layer", *shapes, ui.size(full.bytes_per_layer), ui.size(reduced.bytes_per_layer)),
        ],
    )
    tensors = [tensor for graph in contract.graphs for tensor in _tensors(graph)]
    ui.table("Graphs", ("graph", "", "name", "dtype", "shape"), tensors)
    ui.table("Nodes", ("graph", "nodes", "of our own"), [_nodes(name, ops) for name, ops in manifest.graphs.items()])
    if summary.variants:
        ui.table(
            "Variants: other settings on the same weights",
            ("variant", "skipping", "KV rows", "bytes", "nodes", "tokens that agree with PyTorch"),
            [_variant(name, each) for name, each in summary.variants.items()],
        )
        for remark in dense_remarks(manifest):
            ui.say(remark)
    files = manifest.files.items()
    ui.table(
        "Files",
        ("file", "bytes", "sha256", ""),
        [(name, f"{entry.size:,}", entry.sha256[:16], summary.file_problems.get(name, "ok")) for name, entry in files],
    )
    against = "Against PyTorch"
    if check.weight_error is not None:
        against += f" with the rounded weights, {check.weight_error:.1%} off at most"
    ui.table(
        f"{against}, on {check.num_pictures} pictures: {check.agreement:.1%} of {check.num_tokens} tokens agree",
        ("stage", "max rel. error", "cosine", "norm ratio"),
        [
            (stage.name, f"{stage.max_error:.2g}", f"{stage.cosine:.6f}", f"{stage.norm_ratio:.6f}")
            for stage in check.stages
        ],
    )


def _render_plans(each: ExaminedPlans, contract: Contract) -> None:
    if each.record is None:
        ui.show(f"{each.plans.folder}: unreadable")
        return
    plan_tables.render(each.plans, each.record, contract, each.remarks)


def _settings(manifest: Manifest) -> list[tuple[str, str]]:
    vision, text, contract = manifest.config.vision, manifest.config.text, manifest.contract
    return [
        ("vision", f"{vision.num_layers} layers of {vision.hidden_size}, {vision.num_patches} patches"),
        ("decoder", f"{text.num_layers} layers of {text.hidden_size}, {text.num_kv_heads} KV heads of {text.head_dim}"),
        ("skipping", _skipping(manifest.config.skip)),
        ("precision", f"{contract.precision} weights, {contract.compute_dtype} KV cache"),
        ("limits", f"{contract.max_images} images, {contract.max_context} rows as the plain model counts them"),
        ("written by", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
    ]


def _skipping(skip: SkipConfig | None) -> str:
    if skip is None:
        return "off"
    seen_by = "the same image" if skip.visibility == "image" else "all later rows"
    return f"{skip.num_retained} retained ({skip.selector}), {skip.num_skipped} skipped, visible to {seen_by}"


def _variant(name: str, manifest: Manifest) -> tuple[str, ...]:
    from svcli_export.inspection import kv_sizes
    from svcli_export.manifest import setting_text

    _, kv_cache = kv_sizes(manifest.contract)
    nodes = sum(count for graph in manifest.graphs.values() for count in graph.ops.values())
    agreeing = f"{manifest.check.agreement:.1%} of {manifest.check.num_tokens}"
    skipping = setting_text(manifest.config.skip)
    return name, skipping, str(kv_cache.rows), ui.size(kv_cache.bytes_total), str(nodes), agreeing


def _nodes(name: str, ops: GraphOps) -> tuple[str, str, str]:
    own = ", ".join(f"{count} {op}" for op, count in ops.custom_ops.items())
    return name, str(sum(ops.ops.values())), own or "none"


def _tensors(graph: GraphSpec) -> list[tuple[str, ...]]:
    """Inputs and outputs; what repeats with every layer is shown for the first, as layer N."""
    found: list[tuple[str, ...]] = []
    for direction, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        for tensor in tensors:
            if tensor.name.split(".")[1:2] not in ([], ["0"]):
                continue
            shape = ", ".join(map(str, tensor.shape))
            found.append((graph.name, direction, tensor.name.replace(".0.", ".N."), tensor.dtype, f"[{shape}]"))
    return found
