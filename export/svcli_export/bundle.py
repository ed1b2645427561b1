"""A model becomes a bundle: graphs, weights and manifest, checked against PyTorch and put in place in one move."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from PIL import Image, ImageOps

import skipvision
from skipvision.config import ModelConfig
from skipvision.folders import write_directory
from skipvision.model import SkipVisionModel
from svcli_export.agreement import CHECK_QUESTION, NUM_TOKENS, drawn_cards
from svcli_export.chat import ChatTokenizer
from svcli_export.contract import CUSTOM_DOMAIN, Contract, GraphName, Precision, build_contract
from svcli_export.decoder_graphs import decode_graph, prefill_graph
from svcli_export.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    GraphOps,
    Manifest,
    file_entry,
    required_files,
)
from svcli_export.quantize import stored_tensors
from svcli_export.samples import Skip, sample_of, setting_of
from svcli_export.source import Source, read_source
from svcli_export.verify import verify, violations
from svcli_export.vision_graph import vision_graph
from svcli_export.weights import WEIGHTS_FILE, WeightFile

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the export that is done before it."""

_GRAPHS = (vision_graph, prefill_graph, decode_graph)


class ExportError(ValueError):
    """An export that was refused; nothing was written."""


def export_bundle(
    source: Path | Source,
    output: Path,
    *,
    precision: Precision = "int8",
    max_context: int | None = None,
    max_images: int | None = None,
    skip: Skip | None = None,
    pictures: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress = lambda _what, _share: None,
    tower: Path | None = None,
    processor: Path | None = None,
) -> Manifest:
    """Writes the bundle `output` and returns its manifest.

    `source` is a checkpoint, a published model, or another bundle, whose rounding stays, or what was read from one
    (`tower` and `processor`: see `read_source`); limits that are None are the source's. `skip` overrides the source's
    setting. `pictures` are what the check looks at; test cards are drawn where there are none. An interrupted or
    refused export leaves an older bundle as it was. What else lies in its folder, such as plans or a README, stays.

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
        reading = partial(setting_of, asked=skip)
        origin = read_source(
            source, reading, lambda what, share: progress(what, 0.1 * share), tower=tower, processor=processor
        )
    model = _with_skip(origin.model, skip)
    origin.check(model.config)
    images = origin.max_images if max_images is None else max_images
    context = origin.max_context(images) if max_context is None else max_context
    contract = build_contract(model.config, context, images, precision)
    looked_at = _check_pictures(pictures, model.config)
    written: list[Manifest] = []

    def write(folder: Path) -> None:
        progress("writing the weights", 0.1)
        _keep_others(output, folder)
        (folder / TOKENIZER_FILE).write_text(origin.tokenizer, encoding="utf-8")
        weights = WeightFile.write(stored_tensors(model, contract), folder / WEIGHTS_FILE)
        progress("writing the graphs", 0.3)
        ops: dict[GraphName, GraphOps] = {}
        for build, spec in zip(_GRAPHS, contract.graphs, strict=True):
            graph = build(model.config, contract, weights)
            onnx.save(graph, folder / spec.file)
            ops[spec.name] = _count_ops(graph)
        manifest = _checked_manifest(origin, model, contract, folder, looked_at, ops, progress)
        (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
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


def _with_skip(model: SkipVisionModel, skip: Skip | None) -> SkipVisionModel:
    """The model with another skip setting: the same weights, but for the summary layer that the plain model lacks."""
    asked = setting_of(model.config, skip)
    override = None if asked == "off" else asked
    if override is not None and override.selector == "random":
        raise ExportError("skip.selector random draws anew at each call; export with another selector")
    return model if override == model.config.skip else model.with_skip(override)


def _checked_manifest(
    origin: Source,
    model: SkipVisionModel,
    contract: Contract,
    folder: Path,
    images: Sequence[Image.Image],
    ops: dict[GraphName, GraphOps],
    progress: Progress,
) -> Manifest:
    tokenizer = ChatTokenizer.load(folder, origin.chat.template, origin.chat.published)
    samples = [sample_of(image, CHECK_QUESTION, model.config, tokenizer, origin.image, origin.chat) for image in images]
    rows = max(sample.layout.num_kept for sample in samples) + NUM_TOKENS
    if rows > contract.capacity:
        wanted = contract.max_context + rows - contract.capacity
        raise ExportError(f"max_context {contract.max_context} is too small for one question; ask for {wanted} or more")
    progress("checking the graphs against PyTorch", 0.35)
    check = verify(model, contract, folder, samples)
    if found := violations(check, contract.precision):
        raise ExportError(
            f"the exported graphs do not do what the model does ({'; '.join(found)}); nothing was written"
        )
    progress("hashing the files", 0.95)
    return Manifest(
        format_version=FORMAT_VERSION,
        model=_as_json(model.config),
        contract=contract,
        image=origin.image,
        chat=origin.chat,
        graphs=ops,
        files={name: file_entry(folder / name) for name in required_files(contract)},
        tools={
            "svcli": skipvision.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "onnx", "onnxruntime")},
        },
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
