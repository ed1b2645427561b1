"""manifest.json of a bundle: what it is, what it needs, and whether its files are whole. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from skipvision.config import ConfigError, ModelConfig, SkipConfig, Transparency, from_mapping
from skipvision.presets import PRESETS
from svcli_export.contract import Contract, ContractError, GraphName, build_contract

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
LARGE_FILE = 256 << 20
"""Bytes from which on a file is not hashed where a quick look is enough: chat would wait for it, seconds a gigabyte."""
DENSE = "dense"
"""The variant that skips nothing."""
VARIANT_NAME = r"^[a-z0-9][a-z0-9-]{0,63}$"
"""It begins file names."""
_REMEDY = "re-export it with `svcli export`"

Fit = Literal["pad", "pad_first", "crop", "stretch"]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


class BundleError(ValueError):
    """A bundle that cannot be used; one sentence with what is wrong and what mends it."""


class NoBundleError(BundleError):
    """What is no bundle at all."""


class NoVariantError(BundleError):
    """A variant that a bundle does not have."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageProcessing(_Strict):
    """How a picture becomes pixels: made square, resized, normalised. How one is cut, the model's `tiles` say."""

    image_size: int
    """Side of one view in pixels."""
    mean: tuple[float, float, float]
    """Per channel, of values in 0..1; also the colour of the padding."""
    std: tuple[float, float, float]
    fit: Fit = "pad"
    """How a picture that is not cut becomes square: resized, then padded; `pad_first`, padded, then resized; `crop`,
    its shorter side resized, the middle of the longer kept; `stretch`, resized without regard to its proportions."""
    resample: Resample = "bicubic"
    """Pillow's filter."""
    transparency: Transparency = "white"
    """What is behind transparent parts: white, or, with transparency `dropped`, whatever colour they carry."""


class PublishedPrompt(_Strict):
    """How a model published for transformers is spoken to, beside its template."""

    variables: dict[str, str]
    """What the template may read beside the messages: `bos_token`, `eos_token` and the like."""
    image_token: str
    """What the template writes for one picture."""
    tags: bool
    """Whether each view has a placeholder of its own, tagged with its row and column (SmolVLM)."""


class ChatFormat(_Strict):
    """How messages become ids."""

    template: str
    """Jinja2, over `messages` of {role, images: int, content: str}, or as `published` models have them: {role,
    content}, content being parts of {type: image} and {type: text, text: str}."""
    image_id: int
    """Placeholder id of one run of visual rows."""
    stop_ids: tuple[int, ...]
    """Ids that end an answer."""
    published: PublishedPrompt | None = None


class FileEntry(_Strict):
    """A file of the bundle as it was written."""

    sha256: str
    size: int


class RowCheck(_Strict):
    """Visual rows that point where PyTorch's do."""

    num_rows: int
    """Of one picture."""
    agreement: float
    """Share of them, over all pictures."""


class StageCheck(_Strict):
    """How far one stage in ONNX Runtime is from PyTorch; worst over all pictures and steps."""

    name: str
    max_error: float
    """Largest difference, relative to the largest value of the reference."""
    cosine: float
    norm_ratio: float
    """The one furthest from 1."""
    rows: RowCheck | None = None
    """None for stages that do not hand on visual rows, and in bundles of older versions."""


class GraphOps(_Strict):
    """What a graph is made of."""

    ops: dict[str, int]
    """Op type to count, most frequent first."""
    custom_ops: dict[str, int]
    """Those of our own domain."""


class ExportCheck(_Strict):
    """Outcome of the check that ends an export."""

    stages: tuple[StageCheck, ...]
    num_pictures: int
    num_tokens: int
    """Greedy tokens compared, teacher-forced by PyTorch."""
    agreement: float
    """Share of them that are the same."""
    weight_error: float | None = None
    """int4: how far rounding moved the matrix that it moved most, relative to its norm; the graphs were then held
    against PyTorch with the rounded weights. None: against PyTorch with the weights as they were."""


class Variant(_Strict):
    """Graphs of the same weights for another skip setting."""

    skip: dict[str, Any] | None
    """None: nothing is skipped."""
    skip_trained: bool
    contract: Contract
    graphs: dict[GraphName, GraphOps]
    check: ExportCheck


class Manifest(_Strict):
    """Everything that chat must know of a model beside its graphs and its tokenizer."""

    format_version: int
    model: dict[str, Any]
    contract: Contract
    image: ImageProcessing
    chat: ChatFormat
    graphs: dict[GraphName, GraphOps]
    files: dict[str, FileEntry]
    tools: dict[str, str]
    """Versions of what wrote the bundle."""
    check: ExportCheck
    variant_table: dict[Annotated[str, StringConstraints(pattern=VARIANT_NAME)], Variant] = Field(alias="variants")
    """By name."""

    @property
    def config(self) -> ModelConfig:
        return from_mapping(ModelConfig, self.model, "model")

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the other skip settings that the bundle has graphs for."""
        return tuple(self.variant_table)

    def variant(self, name: str) -> Manifest:
        """The manifest of a variant as of a bundle that holds nothing else: engines and processors take it as they do
        the bundle's own. `name` as `variant_name` has it, or as users write it.

        Raises NoVariantError for one that is not there, with the command that adds it.
        """
        named = variant_name(name)
        if named not in self.variant_table:
            raise NoVariantError(self._without(name))
        found = self.variant_table[named]
        needed = required_files(found.contract)
        changes = {
            "model": self.model | {"skip": found.skip, "skip_trained": found.skip_trained},
            "contract": found.contract,
            "graphs": found.graphs,
            "files": {file: entry for file, entry in self.files.items() if file in needed},
            "check": found.check,
            "variant_table": {},
        }
        return self.model_copy(update=changes)

    def _without(self, name: str) -> str:
        own, named = self.config.skip, variant_name(name)
        if own is None and named == DENSE:
            return f"this bundle has no variant {name!r}: its own graphs skip nothing; leave the variant out"
        beside = f" and the variants {', '.join(self.variants)}" if self.variants else ""
        is_setting = named == DENSE or named in PRESETS or re.fullmatch(r"\d+-\d+", named)
        return (
            f"this bundle has no variant {name!r}, only its own graphs ({setting_text(own)}){beside};"
            f" `svcli export BUNDLE -o BUNDLE --overwrite --precision {self.contract.precision}"
            f" --variant {named if is_setting else 'R/S'}` adds one"
        )


def setting_text(skip: SkipConfig | None) -> str:
    """A skip setting as users write it."""
    return "off" if skip is None else f"{skip.num_retained}/{skip.num_skipped}"


def variant_name(text: str) -> str:
    """The name of a variant that users ask for by its setting: `off` is dense, and `44/69` is 44-69."""
    return DENSE if text == "off" else text.replace("/", "-")


def file_entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return FileEntry(sha256=digest.hexdigest(), size=path.stat().st_size)


def load_manifest(bundle: Path, *, check_files: bool = True, quick: bool = False) -> Manifest:
    """The manifest of a bundle folder, after every file of it was hashed (unless `check_files` is False).

    `quick`: of files from LARGE_FILE on, the size alone; `svcli inspect` and all that writes from a bundle hash them.

    Raises BundleError for a folder that is no bundle, a missing, cut or altered file, broken JSON, another format
    version, or a contract that does not belong to the model.
    """
    manifest = _parse(bundle, _read(bundle))
    for name in ("", *manifest.variants):
        _check_contract(bundle, manifest, name)
    variants = (variant.contract for variant in manifest.variant_table.values())
    needed = set(required_files(manifest.contract, *variants))
    if unlike := sorted(needed ^ manifest.files.keys()):
        problem = "does not list" if unlike[0] in needed else "lists the unknown file"
        raise BundleError(f"{bundle}: {MANIFEST_FILE} {problem} {unlike[0]}; {_REMEDY}")
    if check_files:
        for name, problem in file_problems(bundle, manifest, quick=quick).items():
            raise BundleError(f"{bundle}: {name} {problem}; {_REMEDY}")
    return manifest


def required_files(*contracts: Contract) -> tuple[str, ...]:
    """Files that a bundle with graphs of these contracts cannot do without, manifest.json aside."""
    graphs = (graph.file for contract in contracts for graph in contract.graphs)
    return (*graphs, "weights.safetensors", TOKENIZER_FILE)


def file_problems(bundle: Path, manifest: Manifest, *, quick: bool = False) -> dict[str, str]:
    """What is wrong with which file; empty where all are as they were written. `quick` as above."""
    problems = {}
    for name, entry in manifest.files.items():
        path = bundle / name
        if not path.is_file():
            problems[name] = "is missing"
        elif path.stat().st_size != entry.size:
            problems[name] = f"has {path.stat().st_size} bytes instead of {entry.size}"
        elif not (quick and entry.size >= LARGE_FILE) and file_entry(path) != entry:
            problems[name] = "was altered (its sha256 differs)"
    return problems


def _check_contract(bundle: Path, manifest: Manifest, variant: str) -> None:
    """Of a variant, or where `variant` is empty of the bundle's own graphs. The limits are those of the bundle."""
    limits = manifest.contract
    try:
        found = manifest.variant(variant) if variant else manifest
        contract = build_contract(found.config, limits.max_context, limits.max_images, limits.precision)
    except (ConfigError, ContractError) as error:
        raise BundleError(f"{bundle}: {MANIFEST_FILE} describes an impossible model ({error}); {_REMEDY}") from None
    if contract.of_variant(variant) != found.contract:
        whose = f" of its variant {variant}" if variant else ""
        raise BundleError(f"{bundle}: its graph contract{whose} is not the one this version of svcli uses; {_REMEDY}")


def _read(bundle: Path) -> dict[str, Any]:
    if bundle.is_file():
        raise NoBundleError(f"{bundle}: a file, and a bundle is a folder; write one with `svcli export`")
    if not bundle.is_dir():
        raise NoBundleError(f"{bundle}: no such bundle folder; write one with `svcli export`")
    try:
        data = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NoBundleError(
            f"{bundle}: has no {MANIFEST_FILE}, so it is no bundle; write one with `svcli export`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{bundle}: {MANIFEST_FILE} is unreadable ({error}); {_REMEDY}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{bundle}: {MANIFEST_FILE} is not a JSON object; {_REMEDY}")
    return data


def _parse(bundle: Path, data: dict[str, Any]) -> Manifest:
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{bundle}: bundle format {version!r} is not the {FORMAT_VERSION} that is read here; {_REMEDY}"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{bundle}: {MANIFEST_FILE} at {where}: {first['msg']}; {_REMEDY}") from None
