"""A model becomes a bundle: graphs, weights and manifest, checked against PyTorch and put in place in one move."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from PIL import Image, ImageOps

import skipvision
from skipvision.config import ModelConfig
from skipvision.folders import write_directory
from svcli_export.agreement import CHECK_QUESTION, NUM_TOKENS, drawn_cards
from svcli_export.chat import ChatTokenizer
from svcli_export.contract import CUSTOM_DOMAIN, Contract, GraphName, Precision, build_contract
from svcli_export.decoder_graphs import decode_graph, prefill_graph
from svcli_export.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    ExportCheck,
    GraphOps,
    Manifest,
    Variant,
    file_entry,
    required_files,
)
from svcli_export.quantize import num_blocks_read, stored_tensors
from svcli_export.samples import Skip, sample_of, setting_of
from svcli_export.source import Source, read_source
from svcli_export.variants import BundleSetting, ExportError, own_setting, variant_settings
from svcli_export.verify import verify, violations
from svcli_export.vision_graph import vision_graph
from svcli_export.weights import WEIGHTS_FILE, Piece, WeightFile

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the export that is done before it."""

_VARIANT_PICTURES = 3
"""That the check of a variant looks at, of those that are given."""
_GRAPHS = (vision_graph, prefill_graph, decode_graph)


def export_bundle(
    source: Path | Source,
    output: Path,
    *,
    precision: Precision = "int8",
    max_context: int | None = None,
    max_images: int | None = None,
    skip: Skip | None = None,
    variants: Mapping[str, Skip] | None = None,
    default_variants: bool = True,
    pictures: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress = lambda _what, _share: None,
    note: Callable[[str], None] = lambda _sentence: None,
    tower: Path | None = None,
    processor: Path | None = None,
) -> Manifest:
    """Writes the bundle `output` and returns its manifest.

    `source` is a checkpoint, a published model, or another bundle, whose rounding stays, or what was read from one
    (`tower` and `processor`: see `read_source`); limits that are None are the source's. `skip` overrides the source's
    setting. `pictures` are what the check looks at; test cards are drawn where there are none. An interrupted or
    refused export leaves an older bundle as it was. What else lies in its folder, such as plans or a README, stays.

    `variants` are further settings by name, for which there are graphs on the same weights. With `default_variants`
    there is `dense`, where the bundle skips, and what another bundle has; one of these that cannot be is left out with
    a `note`.

    Raises ExportError, or what the parts raise: CheckpointError, BundleError, SourceError, ConfigError, ContractError
    (all ValueError).
    """
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is a file; choose another folder")
    if output.exists() and not overwrite:
        raise ExportError(f"{output} exists; allow overwriting it (--overwrite), or choose another folder")
    if output.exists() and not (output / MANIFEST_FILE).is_file() and any(output.iterdir()):
        raise ExportError(f"{output} is not empty and holds no bundle; choose another folder")
    progress("reading the model", 0.0)
    if isinstance(source, Source):
        origin = source
    else:
        # A summary layer that the authors trained is read where anything skips.
        some = next((each for each in (variants or {}).values() if each != "off"), skip)
        reading = partial(setting_of, asked=some if skip == "off" else skip)
        origin = read_source(
            source, reading, lambda what, share: progress(what, 0.1 * share), tower=tower, processor=processor
        )
    images = origin.max_images if max_images is None else max_images
    context = origin.max_context(images) if max_context is None else max_context

    def contracts(config: ModelConfig) -> Contract:
        return build_contract(config, context, images, precision)

    own = own_setting(origin, skip, contracts)
    others = variant_settings(origin, own, variants or {}, contracts, defaults=default_variants, note=note)
    settings = [own, *others]
    looked_at = _check_pictures(pictures, own.model.config)
    written: list[Manifest] = []

    def write(folder: Path) -> None:
        progress("writing the weights", 0.1)
        _keep_others(output, folder)
        (folder / TOKENIZER_FILE).write_text(origin.tokenizer, encoding="utf-8")
        weights = WeightFile.write(_tensors(settings), folder / WEIGHTS_FILE)
        progress("writing the graphs", 0.3)
        ops = [_write_graphs(each, weights, folder) for each in settings]
        checks = []
        for number, each in enumerate(settings):
            shown = looked_at[:_VARIANT_PICTURES] if number else looked_at
            checks.append(_check(origin, each, folder, shown, progress, 0.35 + 0.6 * number / len(settings)))
        progress("hashing the files", 0.95)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            model=_as_json(own.model.config),
            contract=own.contract,
            image=origin.image,
            chat=origin.chat,
            graphs=ops[0],
            files={name: file_entry(folder / name) for name in required_files(*(each.contract for each in settings))},
            tools=_tools(),
            check=checks[0],
            variants={
                each.contract.variant: _variant(each, ops[number], checks[number])
                for number, each in enumerate(settings[1:], start=1)
            },
        )
        text = manifest.model_dump_json(indent=1, by_alias=True)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        written.append(manifest)

    write_directory(output, write)
    progress("done", 1.0)
    return written[0]


def _keep_others(old: Path, new: Path) -> None:
    """Takes over what is in the older bundle's folder and no part of it, without a copy where the disk can do that."""
    own = {path.name for path in old.glob("*.onnx")} | {MANIFEST_FILE, TOKENIZER_FILE, WEIGHTS_FILE}
    for path in old.iterdir() if old.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        elif path.name not in own:
            _link(path, new / path.name)


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _check(
    origin: Source,
    setting: BundleSetting,
    folder: Path,
    images: Sequence[Image.Image],
    progress: Progress,
    done: float,
) -> ExportCheck:
    """Of the graphs in `folder` for one setting; `done` is the share of the export that is. Raises ExportError."""
    config, contract = setting.model.config, setting.contract
    of_variant = f" of variant {contract.variant}" if contract.variant else ""
    progress(f"checking the graphs{of_variant} against PyTorch", done)
    tokenizer = ChatTokenizer.load(folder, origin.chat.template, origin.chat.published)
    samples = [sample_of(image, CHECK_QUESTION, config, tokenizer, origin.image, origin.chat) for image in images]
    rows = max(sample.layout.num_kept for sample in samples) + NUM_TOKENS
    if rows > contract.capacity:
        wanted = contract.max_context + rows - contract.capacity
        raise ExportError(f"max_context {contract.max_context} is too small for one question; ask for {wanted} or more")
    check = verify(setting.model, contract, folder, samples)
    if found := violations(check, contract.precision):
        problem = f"the exported graphs{of_variant} do not do what the model does ({'; '.join(found)})"
        raise ExportError(f"{problem}; nothing was written")
    return check


def _tools() -> dict[str, str]:
    return {
        "svcli": skipvision.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "onnx", "onnxruntime")},
    }


def _tensors(settings: Sequence[BundleSetting]) -> Iterator[Piece]:
    """What the graphs of any of them read."""
    skipping = (each.model for each in settings if each.skip is not None)
    num_blocks = max(num_blocks_read(each.model.config) for each in settings)
    num_positions = max(each.contract.max_positions for each in settings)
    return stored_tensors(next(skipping, settings[0].model), settings[0].contract, num_blocks, num_positions)


def _write_graphs(setting: BundleSetting, weights: WeightFile, folder: Path) -> dict[GraphName, GraphOps]:
    ops: dict[GraphName, GraphOps] = {}
    for build, spec in zip(_GRAPHS, setting.contract.graphs, strict=True):
        graph = build(setting.model.config, setting.contract, weights)
        onnx.save(graph, folder / spec.file)
        ops[spec.name] = _count_ops(graph)
    return ops


def _variant(setting: BundleSetting, ops: dict[GraphName, GraphOps], check: ExportCheck) -> Variant:
    described = _as_json(setting.model.config)
    return Variant(
        skip=described["skip"],
        skip_trained=described["skip_trained"],
        contract=setting.contract,
        graphs=ops,
        check=check,
    )


def _count_ops(graph: onnx.ModelProto) -> GraphOps:
    ops = Counter(node.op_type for node in graph.graph.node)
    custom = Counter(node.op_type for node in graph.graph.node if node.domain == CUSTOM_DOMAIN)
    return GraphOps(ops=dict(ops.most_common()), custom_ops=dict(custom.most_common()))


def _as_json(config: ModelConfig) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(config.to_json())
    return data


def _check_pictures(paths: Sequence[Path], config: ModelConfig) -> list[Image.Image]:
    """The pictures at `paths`, or drawn test cards, the first of them large enough for several tiles."""
    if paths:
        try:
            return [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]
        # An unknown format is an OSError, a damaged one may be any of these.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ExportError(f"a picture for the check cannot be read: {error}") from None
    first, *others = drawn_cards()
    if config.tiles is None:
        return [first, *others]
    side = config.vision.image_size
    return [first.resize((2 * side, side)), *others]
