"""`svcli cost`: what skipping saves on a model, from its sizes alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svcli import completions, ui
from svcli.errors import UsageError
from svcli.models import model_folder
from svcli.settings import bundled_model
from svcli.skip_option import parse_counts

if TYPE_CHECKING:
    from skipvision.config import ModelConfig
    from skipvision.estimate import Estimate, Side
    from skipvision.families import KnownModel
    from skipvision.presets import Setting
    from skipvision.roofline import Gpu

_LARGE = 672, 672
"""Height and width of the picture that tiles are counted for."""


@dataclass(frozen=True)
class Subject:
    """What is asked about."""

    name: str
    config: ModelConfig
    known: KnownModel | None
    """None for a model of our own."""


def cost(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder with a config.json, checkpoint, bundle, the name of a known model, or owner/name of one on the"
            " hub; the bundled one if left out.",
            autocompletion=completions.models,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of the paper's settings, such as sv-llava-100.",
            autocompletion=completions.settings,
        ),
    ] = None,
    skip: Annotated[
        str | None, typer.Option(metavar="R/S", help="Retained and skipped tokens of a picture, such as 100/156.")
    ] = None,
    num_text: Annotated[int, typer.Option("--text", min=0, metavar="N", help="Rows of text beside the picture.")] = 40,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Times at best on this one, such as h200.", autocompletion=completions.gpus),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show what one picture costs, dense against skipped.

    FLOPs, KV bytes and weights from sizes alone: nothing is run, and no weights are needed. Without a setting a known
    model is shown with all of the paper's.
    """
    from skipvision.estimate import estimate
    from skipvision.presets import PRESETS

    subject = find_model(model)
    card = find_gpu(gpu)
    setting = find_setting(subject, preset, skip)
    if setting is not None:
        found = estimate(subject.config, setting, num_text)
        described = facts(subject, {preset or "setting": setting}, {preset or "setting": found}, num_text, card)
        if as_json:
            ui.show(json.dumps(described, indent=2))
        else:
            _render(subject, setting, found, num_text, card)
        return
    if card is not None:
        raise UsageError(f"--gpu {gpu} goes with one setting; name it by --preset or --skip")
    every = {name: estimate(subject.config, each, num_text) for name, each in PRESETS.items()}
    if as_json:
        ui.show(json.dumps(facts(subject, dict(PRESETS), every, num_text, None), indent=2))
    else:
        _render_presets(subject, every, num_text)


def find_model(name: str | None) -> Subject:
    """Raises UsageError for what is neither folder nor known nor an id; ConfigError, BundleError for a broken one;
    HubError where config.json cannot be had.
    """
    from skipvision.hub import HubId
    from skipvision.known_models import KNOWN_MODELS, known_model

    folder = bundled_model() if name is None else Path(name)
    if folder.is_dir():
        return _of_folder(folder)
    known = known_model(str(name))
    if known is not None:
        return Subject(str(name), known.config, known)
    if HubId.of(str(name)) is not None:
        return replace(_of_folder(model_folder(str(name), with_weights=False)), name=str(name))
    names = ", ".join(KNOWN_MODELS)
    raise UsageError(f"{name}: no such folder, and no known model; known are {names}")


def _of_folder(folder: Path) -> Subject:
    from skipvision.config import ConfigError, ModelConfig
    from skipvision.families import picture_settings, read_model
    from svcli_export.manifest import MANIFEST_FILE, load_manifest

    if (folder / MANIFEST_FILE).is_file():
        return Subject(str(folder), load_manifest(folder, check_files=False).config, None)
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(f"{folder}: has neither {MANIFEST_FILE} nor config.json, so it is no model")
    try:
        text = file.read_text(encoding="utf-8")
        if '"model_type"' not in text:
            return Subject(str(folder), ModelConfig.from_json(text), None)
        known = read_model(text, picture_settings(folder))
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None
    return Subject(str(folder), known.config, known)


def find_gpu(name: str | None) -> Gpu | None:
    from skipvision.roofline import GPUS

    if name is None or name in GPUS:
        return None if name is None else GPUS[name]
    raise UsageError(f"--gpu {name}: choose among {', '.join(GPUS)}")


def find_setting(subject: Subject, preset: str | None, skip: str | None) -> Setting | None:
    """None where a known model is to be shown with all presets. Raises UsageError."""
    from skipvision.config import RANKED
    from skipvision.presets import PRESETS, Setting
    from skipvision.tiles import cut_picture, token_counts

    if preset is not None and skip is not None:
        raise UsageError("--preset and --skip: name one of them")
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"--preset {preset}: choose among {', '.join(PRESETS)}")
        return PRESETS[preset]
    config, own = subject.config, subject.config.skip
    if skip is not None:
        own = config.skip_of(*parse_counts(skip))
    if own is not None:
        title, cut = "its own" if skip is None else "as asked for", cut_picture(config, *_LARGE)
        counts = token_counts(config, cut)
        is_joined = config.tiles is not None and config.tiles.is_joined
        return Setting(
            title if config.tiles is None else f"{title}, of a picture of {_LARGE[0]} x {_LARGE[1]} in tiles",
            counts[0],
            own.num_retained,
            min(own.num_skipped, counts[0] - own.num_retained) if is_joined else own.num_skipped,
            num_views=cut.num_views,
            is_ranked=own.selector in RANKED,
            num_unpooled=own.num_unpooled,
            num_runs=len(counts),
            is_own=True,
        )
    if subject.known is None:
        raise UsageError(f"{subject.name} does not skip; name a setting by --skip, such as --skip 64/64")
    return None


def facts(
    subject: Subject,
    settings: dict[str, Setting],
    found: dict[str, Estimate],
    num_text: int,
    gpu: Gpu | None,
) -> dict[str, Any]:
    """Everything for programs."""
    known = subject.known
    described: dict[str, Any] = {
        "model": subject.name,
        "family": known.family.name if known else None,
        "parameters": known.num_parameters if known else None,
        "text_rows": num_text,
        "settings": {name: asdict(settings[name]) | asdict(each) for name, each in found.items()},
    }
    if gpu is not None:
        described["gpu"] = asdict(gpu)
        for name, each in found.items():
            described["settings"][name]["seconds_at_best"] = {
                side: dict(
                    zip(("prefill", "decode"), getattr(each, side).seconds(gpu, each.decoder_bytes), strict=True)
                )
                for side in ("dense", "skipped")
            }
    return described


def _head(subject: Subject) -> str:
    if subject.known is None:
        return subject.name
    count = subject.known.num_parameters
    number = f"{count / 1e9:.2f} billion" if count > 10**8 else f"{count:,}"
    return f"{subject.name}: {subject.known.family.name}, {number} weights, {ui.size(2 * count)} in fp16"


def _render_presets(subject: Subject, every: dict[str, Estimate], num_text: int) -> None:
    from skipvision.presets import PRESETS

    ui.say(_head(subject))
    rows = []
    for name, found in every.items():
        dense, skipped, printed = found.dense, found.skipped, PRESETS[name].printed.flops
        rows.append(
            (
                name,
                f"{dense.rows:,} → {skipped.rows:,}",
                f"{dense.kv_rows:,} → {skipped.kv_rows:,}",
                f"{ui.size(dense.picture_kv_bytes)} → {ui.size(skipped.picture_kv_bytes)}",
                _share(skipped.visual_flops, dense.visual_flops),
                _share(skipped.prefill_flops, dense.prefill_flops),
                "" if printed is None else f"{printed:.0%}",
            )
        )
    if subject.known is not None and subject.config.tiles is not None:
        height, width = _LARGE
        count = subject.known.visual_tokens(height, width)
        ui.say(
            f"In tiles, a picture of {height} x {width} takes {count:,} rows of the plain model; below is the paper's."
        )
    behind = f"+ {num_text} of text"
    ui.table("", ("preset", "rows", "KV rows", "KV cache", "prefill FLOPs", behind, "paper's 8B"), rows)
    ui.say("Shares of the plain model's. How the paper counts is not known; --preset NAME shows one in full.")


def _render(subject: Subject, setting: Setting, found: Estimate, num_text: int, gpu: Gpu | None) -> None:
    dense, skipped, printed = found.dense, found.skipped, setting.printed
    split = f"{setting.num_retained} retained and {setting.num_skipped} skipped of {setting.num_tokens}"
    if setting.num_runs > 1:
        split += f", in each of {setting.num_runs} views"
    ui.say(_head(subject))
    rows = [
        _rows("rows of the picture", dense.rows, skipped.rows),
        _rows("KV rows of the picture", dense.kv_rows, skipped.kv_rows),
        *_vision(dense, skipped),
        _flops("prefill, picture alone", dense.visual_flops, skipped.visual_flops, printed.flops),
        _flops(f"prefill, {num_text} rows of text", dense.prefill_flops, skipped.prefill_flops),
        _flops("decode, one token", dense.decode_flops, skipped.decode_flops),
        _bytes("KV cache of the picture", dense.picture_kv_bytes, skipped.picture_kv_bytes),
        _bytes("KV cache of the prompt", dense.kv_bytes, skipped.kv_bytes),
        _bytes("decoder weights, fp16", found.decoder_bytes, found.decoder_bytes),
    ]
    if gpu is not None:
        times = zip(("prefill", "decode, one token"), dense.seconds(gpu, found.decoder_bytes), strict=True)
        for (name, plain), ours in zip(times, skipped.seconds(gpu, found.decoder_bytes), strict=True):
            rows.append((f"{name}, at best", _milliseconds(plain), _milliseconds(ours), _share(ours, plain), ""))
    ui.table(f"{setting.title}: {split}", ("", "dense", "skipped", "of it", "paper's 8B"), rows)
    notes = []
    if dense.vision_flops is None:
        notes.append("The vision tower of this setting is another one; its cost is not worked out.")
    if gpu is not None:
        if found.decoder_bytes + dense.kv_bytes > gpu.memory_bytes:
            notes.append(f"{gpu.title} has {ui.size(gpu.memory_bytes)}: the decoder in fp16 does not fit.")
        notes.append(f"At best: peaks of {gpu.title} by its data sheet, everything read once; nothing was measured.")
    for note in notes:
        ui.say(note)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _rows(name: str, dense: int, skipped: int) -> tuple[str, ...]:
    return name, f"{dense:,}", f"{skipped:,}", _share(skipped, dense), ""


def _vision(dense: Side, skipped: Side) -> list[tuple[str, ...]]:
    """One row, or none where it is not worked out."""
    if dense.vision_flops is None or skipped.vision_flops is None:
        return []
    return [_flops("vision", dense.vision_flops, skipped.vision_flops)]


def _flops(name: str, dense: int, skipped: int, printed: float | None = None) -> tuple[str, ...]:
    return name, ui.flops(dense), ui.flops(skipped), _share(skipped, dense), "" if printed is None else f"{printed:.0%}"


def _bytes(name: str, dense: int, skipped: int) -> tuple[str, ...]:
    return name, ui.size(dense), ui.size(skipped), _share(skipped, dense), ""
