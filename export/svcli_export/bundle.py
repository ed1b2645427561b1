"""A model becomes a bundle: graphs, weights and manifest, checked against PyTorch and put in place in one move."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from PIL import Image

import skipvision
from skipvision.config import ModelConfig, SkipConfig
from skipvision.folders import write_directory
from skipvision.layout import TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.tokenizer import END, IMAGE
from svcli_export.agreement import CHECK_QUESTION, NUM_TOKENS, drawn_cards
from svcli_export.chat import ChatTokenizer, Message
from svcli_export.contract import CUSTOM_DOMAIN, Contract, GraphName, Precision, build_contract
from svcli_export.decoder_graphs import decode_graph, prefill_graph
from svcli_export.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    ChatFormat,
    GraphOps,
    ImageProcessing,
    Manifest,
    file_entry,
    required_files,
)
from svcli_export.pixels import to_pixels
from svcli_export.quantize import stored_tensors
from svcli_export.source import Source, read_source
from svcli_export.verify import verify, violations
from svcli_export.vision_graph import vision_graph
from svcli_export.weights import WEIGHTS_FILE, WeightFile

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the export that is done before it."""

Skip = SkipConfig | tuple[int, int] | Literal["off"]
"""A skip setting: whole, retained and skipped tokens alone with all else as it was trained, or the plain model."""

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
) -> Manifest:
    """Writes the bundle `output` and returns its manifest.

    `source` is a checkpoint or another bundle, whose rounding stays, or what was read from one; limits that are None
    are the source's. `skip` overrides the source's setting. `pictures` are what the check looks at; test cards are
    drawn where there are none. An interrupted or refused export leaves an older bundle as it was. What else lies in its
    folder, such as plans or a README, stays.

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
    origin = source if isinstance(source, Source) else read_source(source)
    model = _with_skip(origin.model, skip)
    origin.check(model.config)
    context = origin.max_context if max_context is None else max_context
    contract = build_contract(model.config, context, origin.max_images if max_images is None else max_images, precision)
    images = _check_pictures(pictures)
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
        manifest = _checked_manifest(model, contract, folder, origin.template, images, ops, progress)
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
    trained = model.config.skip
    override = _setting(trained, skip)
    if override is not None and override.selector == "random":
        raise ExportError("skip.selector random draws anew at each call; export with another selector")
    if override == trained:
        return model
    return model.with_skip(override)


def _setting(trained: SkipConfig | None, asked: Skip | None) -> SkipConfig | None:
    if isinstance(asked, tuple):
        return replace(trained or SkipConfig(), num_retained=asked[0], num_skipped=asked[1])
    if asked is None:
        return trained
    return None if asked == "off" else asked


def _checked_manifest(
    model: SkipVisionModel,
    contract: Contract,
    folder: Path,
    template: str,
    images: Sequence[Image.Image],
    ops: dict[GraphName, GraphOps],
    progress: Progress,
) -> Manifest:
    config = model.config
    image = ImageProcessing(
        image_size=config.vision.image_size, mean=config.vision.image_mean, std=config.vision.image_std
    )
    tokenizer = ChatTokenizer.load(folder, template)
    image_id, end_id = (tokenizer.tokenizer.token_to_id(token) for token in (IMAGE, END))
    if image_id is None or end_id is None:
        raise ExportError(f"the tokenizer has no {IMAGE if image_id is None else END} token, which chat needs")
    prompt = tokenizer.encode([Message("user", CHECK_QUESTION, images=1)])
    if prompt.count(image_id) != 1:
        raise ExportError(f"the chat template writes {prompt.count(image_id)} {IMAGE} tokens for one picture, not one")
    rows = TokenLayout.of(prompt, image_id, config).num_kept + NUM_TOKENS
    if rows > contract.capacity:
        wanted = contract.max_context + rows - contract.capacity
        raise ExportError(f"max_context {contract.max_context} is too small for one question; ask for {wanted} or more")
    pixels = np.stack([to_pixels(picture, image) for picture in images])
    progress("checking the graphs against PyTorch", 0.35)
    check = verify(model, contract, folder, pixels, prompt, image_id)
    if found := violations(check, contract.precision):
        raise ExportError(
            f"the exported graphs do not do what the model does ({'; '.join(found)}); nothing was written"
        )
    progress("hashing the files", 0.95)
    return Manifest(
        format_version=FORMAT_VERSION,
        model=_as_json(config),
        contract=contract,
        image=image,
        chat=ChatFormat(template=template, image_id=image_id, stop_ids=(end_id,)),
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


def _check_pictures(paths: Sequence[Path]) -> list[Image.Image]:
    """The pictures at `paths`, or drawn test cards."""
    if paths:
        try:
            return [Image.open(path).convert("RGB") for path in paths]
        except OSError as error:  # an unknown format is one too
            raise ExportError(f"a picture for the check cannot be read: {error}") from None
    return drawn_cards()
