"""`svcli profile`: what Skip-FFN rests on, measured on pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svcli import completions, ui
from svcli.errors import UsageError
from svcli.models import model_folder
from svcli.skip_option import parse_setting

if TYPE_CHECKING:
    from skipvision.profile import Floats, Profile, Spread
    from svcli_export.profiling import Measurement

_ASKERS = {"text": "text behind the picture", "summary": "the picture's last summary row"}


def profile(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint folder, bundle, or a model on the hub: owner/name.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Pictures, each measured by itself.")],
    question: Annotated[str, typer.Option(metavar="TEXT", help="What is asked about each.")] = "What is this?",
    skip: Annotated[
        str | None,
        typer.Option(
            metavar="R/S", help="Retained and skipped tokens of a picture; what the model was trained with if left out."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Or one of the paper's settings, such as sv-llava-100.",
            autocompletion=completions.settings,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for three figures as PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Measure on pictures why visual tokens may skip the FFN, and what skipping costs.

    Layer by layer: how much FFN and attention change rows of text, retained, summary and skipped tokens; who pays them
    attention; how far skipping takes the rows from where they would be, and how far it could at most. Runs PyTorch.
    """
    asked = parse_setting(preset, skip)
    if asked == "off":
        raise UsageError("--skip off: there is nothing to measure where nothing is skipped")
    if not question.strip():
        raise UsageError("the question is empty")
    if output is not None:
        from svcli.plots import check_folder

        check_folder(output)
    from svcli_engines.images import open_image
    from svcli_export.profiling import measure_pictures
    from svcli_export.samples import setting_of
    from svcli_export.source import read_source

    for path in images:  # before a large model is read
        for note in open_image(path).notes:
            ui.note(note)
    folder = model_folder(model)
    with ui.Progress() as progress:
        source = read_source(folder, partial(setting_of, asked=asked))
        found = measure_pictures(
            source,
            [open_image(path, source.image.transparency).image for path in images],
            question,
            asked,
            lambda done, total: progress.update("measuring pictures", done, total),
        )
    plots = []
    if output is not None:
        from svcli.plots import draw

        plots = draw(output, found.spread, len(images), str(model))
    if not found.is_trained:
        ui.note("the model was not trained with this setting; what it does with it says little about one that was")
    if as_json:
        given = {"model": str(model), "question": question, "pictures": [str(path) for path in images]}
        ui.show(json.dumps(given | facts(found) | {"plots": [str(path) for path in plots]}, indent=2))
    else:
        _render(str(model), [str(path) for path in images], found)
        for path in plots:
            ui.show(str(path))


def facts(found: Measurement) -> dict[str, Any]:
    """Everything for programs: each figure's mean over the pictures, its lowest and its highest.

    What is not finite, such as a figure of a group without rows, is null.
    """
    spread = found.spread
    return {
        "skip": asdict(found.skip) | {"trained": found.is_trained},
        "rows": _by_group(spread.mean.rows, int),
        "mean": _tree(spread.mean),
        "lowest": _tree(spread.lowest),
        "highest": _tree(spread.highest),
    }


def _tree(profile: Profile) -> dict[str, Any]:
    from skipvision.profile import ASKERS, STATISTICS

    def statistics(values: Floats) -> dict[str, float | None]:
        return {name: _finite(value) for name, value in zip(STATISTICS, values, strict=True)}

    def paid(shares: Floats) -> dict[str, Any]:
        return {"group": _by_group(shares, _finite), "row": _by_group(_per_row(shares, profile.rows), _finite)}

    by_layer = (
        *("size", "size_kept", "error", "error_kept", "injected"),
        *("attention_gain", "ffn_gain", "attention_constant", "ffn_constant", "bound_gains", "bound"),
        *("relative_error", "relative_error_kept", "relative_bound_gains", "relative_bound"),
    )
    layers = [
        {
            "layer": layer + 1,
            "ffn_update": _by_group(profile.ffn_update[layer], statistics),
            "attention_update": _by_group(profile.attention_update[layer], statistics),
            "attention_paid": {
                asker: paid(shares) for asker, shares in zip(ASKERS, profile.attention[layer], strict=True)
            },
            "skip_ffn": {name: _finite(getattr(profile, name)[layer]) for name in by_layer},
        }
        for layer in range(len(profile.size))
    ]
    return {"layers": layers, "next_token": {"kl": _finite(profile.kl), "same": float(profile.same_token)}}


def _by_group(values: Floats, convert: Callable[[Any], Any]) -> dict[str, Any]:
    from skipvision.profile import GROUPS

    return {group: convert(value) for group, value in zip(GROUPS, values, strict=True)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _per_row(shares: Floats, rows: Floats) -> Floats:
    """What one row of each group gets; NaN where the group has none."""
    import numpy as np

    return shares / np.where(rows > 0, rows, math.nan)


def _render(model: str, pictures: list[str], found: Measurement) -> None:
    from skipvision.profile import ASKERS, GROUPS

    spread, skip, count = found.spread, found.skip, len(pictures)
    rows = _by_group(spread.mean.rows, int)
    ui.say(f"{model}: {skip.num_retained} retained and {skip.num_skipped} skipped tokens of a picture")
    ui.say(f"Pictures: {', '.join(pictures)}; rows: {', '.join(f'{number} {group}' for group, number in rows.items())}")
    if count > 1:
        ui.say(f"Means of {count} pictures; in brackets the lowest..highest of any.")
    ui.show("")
    layers = range(len(spread.mean.size))
    for title, name in (
        ("What the FFN adds to a row, |FFN(y)| / |y|", "ffn_update"),
        ("What attention adds to a row, |attention(x)| / |x|", "attention_update"),
    ):
        ui.table(
            f"{title}, mean over rows, all passing the FFN",
            ("", *GROUPS),
            [
                (f"layer {layer + 1}", *(_cell(spread, name, (layer, kind, 0)) for kind in range(len(GROUPS))))
                for layer in layers
            ],
        )
    for number, asker in enumerate(ASKERS):
        ui.table(
            f"Attention that {_ASKERS[asker]} pays to a group / to one row of it",
            ("", *GROUPS),
            [
                (f"layer {layer + 1}", *(_paid(spread, (layer, number, kind)) for kind in range(len(GROUPS))))
                for layer in layers
            ],
        )
    shown = ("relative_error_kept", "relative_error", "relative_bound_gains", "relative_bound")
    ui.table(
        "Error of Skip-FFN as a share of the rows' norm; bounds on that of all rows, by measured gains and by proven"
        " constants",
        ("", "kept rows", "all rows", "by gains", "by constants"),
        [(f"layer {layer + 1}", *(_cell(spread, name, (layer,)) for name in shown)) for layer in layers],
    )
    same = round(count * float(spread.mean.same_token))
    ui.say(f"Next token: the same on {same} of {count}, KL {_cell(spread, 'kl', ())} nats")
    if skip.num_skipped and skip.visibility == "image":
        ui.say("Text does not see skipped rows in this model: what they say comes through the last summary row.")
    ui.say("Updates and bounds are defined by svcli, not by the paper: docs/profile.md")


def _cell(spread: Spread, name: str, place: tuple[int, ...], *, percent: bool = False) -> str:
    """`0.31 (0.29..0.33)`, or the mean alone where no picture differs."""
    mean, lowest, highest = (
        float(getattr(each, name)[place] if place else getattr(each, name))
        for each in (spread.mean, spread.lowest, spread.highest)
    )
    if math.isnan(mean):
        return ""
    told = f"{mean:.1%}" if percent else f"{mean:.3g}"
    if lowest == highest:
        return told
    return f"{told} ({100 * lowest:.1f}..{100 * highest:.1f}%)" if percent else f"{told} ({lowest:.2g}..{highest:.2g})"


def _paid(spread: Spread, place: tuple[int, int, int]) -> str:
    share = _cell(spread, "attention", place, percent=True)
    row = _per_row(spread.mean.attention[place[:2]], spread.mean.rows)[place[2]]
    return f"{share} / {row:.2%}" if share else ""
