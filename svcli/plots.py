"""Figures of a profile, a training run and a sweep as PNG. The only file that knows matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svcli import ui
from svcli.errors import UsageError
from svcli.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from skipvision.profile import Floats, Spread
    from svcli.evaluation.sweep import Point
    from svcli.training.facts import History

_DPI = 150
# Okabe and Ito's colours, which colour-blind people tell apart; markers and hatches tell them apart in grey print.
_GROUP_STYLES: dict[str, dict[str, str]] = {
    "text": {"color": "#000000", "marker": "o"},
    "retained": {"color": "#0072B2", "marker": "s"},
    "summary": {"color": "#009E73", "marker": "D"},
    "skipped": {"color": "#D55E00", "marker": "^"},
}
_SETTING_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_SETTING_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = {"text": "", "retained": "///", "summary": "...", "skipped": "\\\\\\"}
_ERROR_STYLES: dict[str, dict[str, str]] = {
    "relative_error_kept": {"label": "error of kept rows", "color": "#0072B2", "marker": "s"},
    "relative_error": {"label": "error of all rows", "color": "#D55E00", "marker": "^"},
    "relative_bound_gains": {
        "label": "bound, measured gains",
        "color": "#000000",
        "marker": "v",
        "linestyle": "--",
    },
    "relative_bound": {"label": "bound, proven constants", "color": "#CC79A7", "marker": "x", "linestyle": ":"},
}


def check_folder(folder: Path) -> None:
    """Before anything is measured: raises ModuleNotFoundError without matplotlib, UsageError for a file."""
    import matplotlib.figure  # noqa: F401

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose another folder")


def draw(folder: Path, spread: Spread, num_pictures: int, model: str) -> list[Path]:
    """Writes the three figures, each in one move, in place of older ones. Raises OSError where that fails."""
    figures: dict[str, Callable[[Figure, Spread], str]] = {
        "ffn-update.png": _updates,
        "attention.png": _attention,
        "skip-error.png": _errors,
    }
    subject = f"{_in_font(Path(model).resolve().name)}, {_pictures(num_pictures)}"
    bands = "" if num_pictures == 1 else ", bands from the lowest to the highest"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, paint in figures.items():
        figure = _new_figure()
        title = f"{paint(figure, spread)}\n{subject}{'' if paint is _attention else bands}"
        figure.suptitle(title, parse_math=False, fontsize="medium")
        image = io.BytesIO()
        figure.savefig(image, format="png")
        write(folder / name, image.getvalue())
        paths.append(folder / name)
    return paths


def draw_losses(path: Path, history: History, title: str) -> None:
    """Training loss, validation and learning rate of a run, in one move. Raises OSError where that fails,
    ModuleNotFoundError without matplotlib."""
    import numpy as np

    figure = _new_figure()
    axes = figure.subplots()
    steps, losses = np.asarray(history.steps), np.asarray(history.losses)
    rates = axes.twinx()
    rates.plot(steps, history.learning_rates, color="#D55E00", linestyle=":", linewidth=1.2, label="learning rate")
    rates.set_ylabel("learning rate", color="#D55E00")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", scilimits=(-2, 2))
    # The losses in front of the learning rate.
    axes.set_zorder(rates.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot(steps, losses, color="#0072B2", alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(steps, _smoothed(losses), color="#0072B2", linewidth=2, label="training, smoothed")
    scored = [(step, scores["loss"]) for step, scores in history.validations if "loss" in scores]
    if scored:
        axes.plot(*zip(*scored, strict=True), color="#000000", marker="o", markersize=4, label="validation")
    _fit_losses(axes, losses, [loss for _, loss in scored])
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token of the answers, nats")
    axes.grid(axis="y", alpha=0.3)
    handles, labels = (
        mine + theirs
        for mine, theirs in zip(axes.get_legend_handles_labels(), rates.get_legend_handles_labels(), strict=True)
    )
    axes.legend(handles, labels, fontsize="small", loc="upper right")
    figure.suptitle(_in_font(title), parse_math=False, fontsize="medium")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write(path, image.getvalue())


def draw_sweep(path: Path, points: Sequence[Point], chosen: str, title: str, metric: str) -> None:
    """Figures of a task against visual tokens, FLOPs and time to first token, with their intervals and the front
    of each, in one move. Raises OSError where that fails, ModuleNotFoundError without matplotlib."""
    from svcli.evaluation.sweep import front

    costs: list[tuple[str, Callable[[Point], float | None]]] = [
        ("visual tokens in prefill", lambda point: point.visual_tokens),
        ("FLOPs of an answer, in 10⁹", lambda point: point.flops / 1e9),
        ("first token, ms", lambda point: None if point.first_token is None else 1e3 * point.first_token),
    ]
    shown = [(label, cost) for label, cost in costs if all(cost(point) is not None for point in points)]
    figure = _new_figure()
    for panel, (label, cost) in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        best = front(sorted(points, key=lambda point: (cost(point) or 0.0, -point.figure)))
        panel.plot(
            [cost(point) or 0.0 for point in best],
            [point.figure for point in best],
            color="#999999",
            linewidth=1,
            label="the front",
            zorder=0,
        )
        for number, point in enumerate(points):
            around = point.interval
            errors = None if around is None else [[point.figure - around.low], [around.high - point.figure]]
            style = {"color": _SETTING_COLOURS[number % 7], "fmt": _SETTING_MARKERS[number % 8], "markersize": 6}
            panel.errorbar([cost(point) or 0.0], [point.figure], yerr=errors, capsize=3, label=point.setting, **style)
            if point.setting == chosen:
                ring = {"s": 160, "facecolors": "none", "edgecolors": "#000000", "label": "chosen"}
                panel.scatter([cost(point) or 0.0], [point.figure], **ring)
        panel.set_xlabel(label)
        panel.margins(x=0.15)
        panel.grid(alpha=0.3)
    legend = figure.axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=8, fontsize="small")
    figure.axes[0].set_ylabel(_in_font(metric), parse_math=False)
    figure.suptitle(_in_font(title), parse_math=False, fontsize="medium")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write(path, image.getvalue())


def _smoothed(losses: Floats) -> Floats:
    """The mean over a thirtieth of the run around each step; what is not finite is left out."""
    import numpy as np

    window = np.ones(2 * (len(losses) // 60) + 1)
    known = np.isfinite(losses)
    sums, counts = (
        np.convolve(each, window)[len(window) // 2 :][: len(losses)]
        for each in (np.where(known, losses, 0.0), known.astype(np.float64))
    )
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _fit_losses(axes: Axes, losses: Floats, scores: Sequence[float]) -> None:
    """From 0 up to what almost all of the run stays below, so that its first steps do not press the rest flat."""
    import numpy as np

    finite = losses[np.isfinite(losses)]
    if len(finite):
        top = max(float(np.quantile(finite, 0.98)), *(score for score in scores if math.isfinite(score)), 0.0)
        axes.set_ylim(0, top * 1.1 or 1.0)


def _new_figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 3.8), dpi=_DPI, layout="constrained")


def _in_font(name: str) -> str:
    """The name in letters that the font of the figures has for sure."""
    return ui.printable(name).encode("latin-1", "replace").decode("latin-1")


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"mean of {count} pictures"


def _updates(figure: Figure, spread: Spread) -> str:
    from skipvision.profile import GROUPS

    left, right = figure.subplots(1, 2, sharey=True)
    for axes, field, what in (
        (left, "ffn_update", "|FFN(y)| / |y|"),
        (right, "attention_update", "|attention(x)| / |x|"),
    ):
        for kind, group in enumerate(GROUPS):
            values = [getattr(each, field)[:, kind, 0] for each in (spread.mean, spread.lowest, spread.highest)]
            _line(axes, values, label=group, **_GROUP_STYLES[group])
        axes.set_title(what, fontsize="medium")
        _finish(axes, len(spread.mean.size))
    left.set_ylabel("mean over the rows of a group")
    left.legend(fontsize="small")
    return "What the FFN and attention add to a row, all rows passing the FFN (definition ours)"


def _attention(figure: Figure, spread: Spread) -> str:
    import numpy as np

    from skipvision.profile import GROUPS

    titles = ("by the text behind the picture", "by the picture's last summary row")
    shares = spread.mean.attention
    layers = np.arange(1, len(shares) + 1)
    panels = figure.subplots(1, 2, sharey=True)
    for asker, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        bottom = np.zeros(len(layers))
        for kind, group in enumerate(GROUPS):
            heights = np.nan_to_num(shares[:, asker, kind])
            style: dict[str, Any] = {"color": _GROUP_STYLES[group]["color"], "hatch": _HATCHES[group]}
            axes.bar(layers, heights, 0.8, bottom, label=group, edgecolor="white", linewidth=0.5, **style)
            bottom += heights
        axes.set_title(title, fontsize="medium")
        axes.set_ylim(0, 1)
        _finish(axes, len(layers))
    panels[0].set_ylabel("share of the attention paid")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return "Who is looked at, mean over heads, as the model runs"


def _errors(figure: Figure, spread: Spread) -> str:
    left, right = figure.subplots(1, 2)
    names = list(_ERROR_STYLES)
    for axes, shown, title in (
        (left, names[:3], "with the bound by measured gains"),
        (right, names, "with the bound by proven constants"),
    ):
        for name in shown:
            values = [getattr(each, name) for each in (spread.mean, spread.lowest, spread.highest)]
            _line(axes, values, **_ERROR_STYLES[name])
        axes.set_title(title, fontsize="medium")
        _finish(axes, len(spread.mean.size))
    left.set_ylabel("of the rows' norm behind the layer")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return "Error of Skip-FFN by layer, and bounds on that of all rows (ours)"


def _line(axes: Axes, values: Sequence[Floats], **style: str) -> None:
    """Mean, and a band from lowest to highest. What is 0, or not finite, has no place on a logarithmic axis."""
    import numpy as np

    mean, lowest, highest = (np.where(np.isfinite(each) & (each > 0), each, math.nan) for each in values)
    layers = np.arange(1, len(mean) + 1)
    axes.plot(layers, mean, markersize=5, **style)  # type: ignore[arg-type]
    axes.fill_between(layers, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)


def _finish(axes: Axes, num_layers: int) -> None:
    """Axes that all figures share; those with lines are logarithmic, if there is anything to be seen on them."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    if any(np.isfinite(np.asarray(line.get_ydata(), np.float64)).any() for line in axes.lines):
        axes.set_yscale("log")
    elif axes.lines:
        axes.set_ylim(0, 1)
        axes.text(0.5, 0.5, "0 behind every layer", transform=axes.transAxes, ha="center")
    axes.set_xlim(0.4, num_layers + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("layer")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
