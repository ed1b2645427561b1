"""A bundle is whole or refused: exporting, interrupting, damaging, inspecting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from skipvision.checkpoint import CheckpointError
from skipvision.config import ConfigError, SkipConfig
from skipvision.presets import PRESETS
from svcli_export import bundle as bundle_module
from svcli_export import manifest as manifest_module
from svcli_export.bundle import export_bundle
from svcli_export.contract import ContractError
from svcli_export.inspection import inspect_bundle
from svcli_export.manifest import BundleError, Manifest, load_manifest
from svcli_export.quantize import stored_tensors
from svcli_export.source import SourceError
from svcli_export.variants import ExportError
from svcli_export.vision_graph import vision_graph
from svcli_export.weights import Piece
from tests.export.tiny import NUM_PATCHES, SKIP, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    export(checkpoint, folder, default_variants=True)
    return folder


@pytest.fixture
def bundle(tmp_path: Path, pristine: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def export(checkpoint: Path, output: Path, **options: Any) -> Manifest:
    settings: dict[str, Any] = {"precision": "fp32", "max_context": 96, "default_variants": False} | options
    return export_bundle(checkpoint, output, **settings)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_manifest_says_what_was_exported(pristine: Path) -> None:
    manifest = load_manifest(pristine)
    assert manifest.config.skip == SKIP
    assert manifest.contract.max_images == 2
    assert manifest.chat.image_id == 1
    assert manifest.chat.stop_ids == (4,)
    assert set(manifest.tools) >= {"svcli", "torch", "onnx", "onnxruntime"}
    assert manifest.check.num_tokens == 16 * manifest.check.num_pictures
    assert manifest.check.agreement == 1
    written = {path.name for path in pristine.iterdir()}
    assert written == {*manifest.files, "manifest.json"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in pristine.iterdir())


def test_export_reports_progress_and_reads_pictures(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("L", (50, 20), 128).save(tmp_path / "grey.png")
    seen: list[tuple[str, float]] = []
    manifest = export(
        checkpoint,
        tmp_path / "out",
        pictures=[tmp_path / "grey.png"],
        progress=lambda what, share: seen.append((what, share)),
    )
    assert manifest.check.num_pictures == 1
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize(
    ("skip", "expected"),
    [(None, SKIP), ("off", None), (SkipConfig(2, 3), SkipConfig(2, 3)), (SkipConfig(8, 0), SkipConfig(8, 0))],
)
def test_skip_can_be_overridden(checkpoint: Path, tmp_path: Path, skip: Any, expected: SkipConfig | None) -> None:
    manifest = export(checkpoint, tmp_path / "out", skip=skip)
    assert manifest.config.skip == expected
    full = 96 - 2 * NUM_PATCHES
    kept = NUM_PATCHES if expected is None else expected.num_retained + (2 if expected.num_skipped else 1)
    assert manifest.contract.capacity == full + 2 * kept


def test_settings_that_cannot_be_exported_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for source, options, error, words in (
        (checkpoint, {"skip": SkipConfig(4, 6, selector="random")}, ExportError, "draws anew"),
        (checkpoint, {"skip": SkipConfig(40, 0)}, ConfigError, "num_retained"),
        (checkpoint, {"max_context": 20}, ContractError, "no room for text"),
        (checkpoint, {"max_context": 34}, ExportError, "too small for one question"),
        (checkpoint, {"skip": PRESETS["sv-llava-100"]}, ConfigError, "splits 576 visual tokens, and this model has 16"),
        (tmp_path / "absent", {}, CheckpointError, "no such checkpoint"),
    ):
        with pytest.raises(error, match=words) as caught:
            export(source, tmp_path / "out", **options)
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_plain_model_skips_with_a_summary_of_means_and_says_that_it_was_not_trained_to(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", None)
    manifest = export(plain, tmp_path / "out", skip=SKIP)
    assert (manifest.config.skip, manifest.config.skip_trained) == (SKIP, False)
    assert not load_file(tmp_path / "out" / "weights.safetensors")["summary.score.weight"].any()
    # It stays so in what is made of it, until it is plain again.
    again = export(tmp_path / "out", tmp_path / "again", skip=(3, 2))
    assert (again.config.skip, again.config.skip_trained) == (replace(SKIP, num_retained=3, num_skipped=2), False)
    assert export(tmp_path / "out", tmp_path / "off", skip="off").config.skip_trained
    # Counts alone: as the paper trains.
    assert export(plain, tmp_path / "counts", skip=(4, 6)).config.skip == SkipConfig(4, 6, visibility="all")


def test_what_cannot_be_read_is_named(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        broken = Path(shutil.copytree(checkpoint, tmp_path / f"without-{name}"))
        (broken / name).unlink()
        with pytest.raises(SourceError, match=f"{name}: cannot be read"):
            export(broken, tmp_path / "out")
    (tmp_path / "letter.png").write_text("no picture")
    with pytest.raises(ExportError, match=r"letter\.png"):
        export(checkpoint, tmp_path / "out", pictures=[tmp_path / "letter.png"])
    with pytest.raises(ExportError, match="is a file"):
        export(checkpoint, tmp_path / "letter.png", overwrite=True)
    assert not (tmp_path / "out").exists()


def test_the_context_that_is_asked_for_is_enough(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="ask for") as caught:
        export(checkpoint, tmp_path / "out", max_context=34)
    wanted = int(str(caught.value).split("ask for ")[1].split()[0])
    assert export(checkpoint, tmp_path / "out", max_context=wanted).contract.max_context == wanted
    with pytest.raises(ExportError):
        export(checkpoint, tmp_path / "less", max_context=wanted - 1)


def test_an_existing_folder_is_left_alone(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    before = snapshot(bundle)
    with pytest.raises(ExportError, match="exists"):
        export(checkpoint, bundle)
    assert snapshot(bundle) == before
    holiday = tmp_path / "holiday"
    holiday.mkdir()
    (holiday / "photo.jpg").touch()
    with pytest.raises(ExportError, match="holds no bundle"):
        export(checkpoint, holiday, overwrite=True)
    assert (holiday / "photo.jpg").exists()
    (bundle / "plans" / "set").mkdir(parents=True)
    (bundle / "plans" / "set" / "decode.plan").write_text("a plan")
    (bundle / "README.md").write_text("what it can do")
    (bundle / "README.txt").symlink_to("README.md")
    assert export(checkpoint, bundle, overwrite=True, skip="off").config.skip is None
    plain = load_manifest(bundle)
    assert (plain.config.skip, plain.variants) == (None, ())
    # What is none of the bundle's files stays.
    assert (bundle / "plans" / "set" / "decode.plan").read_text() == "a plan"
    assert (bundle / "README.txt").readlink() == Path("README.md")
    assert (bundle / "README.txt").read_text() == "what it can do"
    others = {"plans", "README.md", "README.txt"}
    assert {path.name for path in bundle.iterdir()} == {*plain.files, "manifest.json", *others}


@pytest.mark.parametrize("step", ["prefill_graph", "verify", "file_entry"])
def test_an_interrupted_export_leaves_the_old_bundle(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = snapshot(bundle)
    if step == "prefill_graph":
        monkeypatch.setattr(bundle_module, "_GRAPHS", (vision_graph, interrupt, interrupt))
    else:
        monkeypatch.setattr(bundle_module, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, bundle, overwrite=True, skip="off")
    assert snapshot(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from svcli_export import bundle

bundle.verify = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
bundle.export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), precision="fp32", max_context=96, skip="off", overwrite=True)
"""


def test_a_killed_export_leaves_the_old_bundle(checkpoint: Path, bundle: Path) -> None:
    before = snapshot(bundle)
    command = [sys.executable, "-c", _KILLED, str(checkpoint), str(bundle)]
    killed = subprocess.run(command, env={"PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert snapshot(bundle) == before
    assert load_manifest(bundle).config.skip == SKIP


def test_a_graph_that_differs_from_the_model_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision, name, problem in (
        ("fp32", "decoder.layers.0.ffn.down.weight.T", "prefill: error"),
        ("int4", "decoder.layers.0.ffn.down.weight.T.scale", "a matrix is 5.% off"),
    ):
        monkeypatch.setattr(bundle_module, "stored_tensors", partial(with_larger, name))
        with pytest.raises(ExportError, match=rf"{problem}.*nothing was written"):
            export(checkpoint, tmp_path / "out", precision=precision)
        assert list(tmp_path.iterdir()) == []


def with_larger(name: str, *arguments: Any) -> Iterator[Piece]:
    """What is stored, with one tensor half as large again."""

    def grown(piece: Piece) -> dict[str, Any]:
        return {each: value * 1.5 if each == name else value for each, value in piece.make().items()}

    for piece in stored_tensors(*arguments):
        yield Piece(piece.infos, partial(grown, piece)) if name in piece.infos else piece


@pytest.mark.parametrize(
    "name",
    ["vision.onnx", "prefill.onnx", "decode.onnx", "dense.prefill.onnx", "weights.safetensors", "tokenizer.json"],
)
def test_a_damaged_file_is_named(bundle: Path, name: str) -> None:
    path = bundle / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=f"{name} has {len(whole) - 1} bytes instead of {len(whole)}.*svcli export"):
        load_manifest(bundle)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name} was altered.*svcli export"):
        load_manifest(bundle)
    assert list(inspect_bundle(bundle).file_problems) == [name]
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing.*svcli export"):
        load_manifest(bundle)


def test_a_large_file_is_hashed_where_there_is_time(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle / "weights.safetensors"
    whole = path.read_bytes()
    monkeypatch.setattr(manifest_module, "LARGE_FILE", len(whole))
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    load_manifest(bundle, quick=True)
    with pytest.raises(BundleError, match=r"weights\.safetensors was altered"):
        load_manifest(bundle)
    assert list(inspect_bundle(bundle).file_problems) == ["weights.safetensors"]
    path.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=r"weights\.safetensors has"):
        load_manifest(bundle, quick=True)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setattr(manifest_module, "LARGE_FILE", len(whole) + 1)  # one byte short of large
    with pytest.raises(BundleError, match=r"weights\.safetensors was altered"):
        load_manifest(bundle, quick=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(format_version=99), "bundle format 99"),
        (lambda data: data.update(format_version=1), "bundle format 1 is not the 2"),
        (lambda data: data.pop("format_version"), "bundle format None"),
        (lambda data: data.pop("variants"), "at variants: Field required"),
        (lambda data: data["variants"]["dense"].pop("check"), r"at variants\.dense\.check"),
        (lambda data: data["variants"]["dense"].update(colour="red"), r"at variants\.dense\.colour"),
        (lambda data: data["variants"].update({"../evil": data["variants"]["dense"]}), r"at variants\.\.\./evil"),
        (lambda data: data["variants"].update(other=data["variants"]["dense"]), "contract of its variant other is not"),
        (lambda data: data["variants"]["dense"].update(skip=data["model"]["skip"]), "contract of its variant dense is"),
        (lambda data: data["variants"]["dense"].update(skip={"colour": 1}), "impossible model .*unknown key 'colour'"),
        (lambda data: data["variants"]["dense"]["contract"].update(capacity=12), "of its variant dense is not the one"),
        (lambda data: data["variants"]["dense"]["contract"].update(max_context=97), "of its variant dense is not"),
        (
            lambda data: data["variants"]["dense"]["contract"]["graphs"][0].update(variant="../evil"),
            "of its variant dense is not",
        ),
        (lambda data: data["contract"]["graphs"][0].update(variant="dense"), "its graph contract is not the one"),
        (lambda data: data["variants"].clear(), r"lists the unknown file dense\.decode\.onnx"),
        (lambda data: data["files"].pop("dense.vision.onnx"), r"does not list dense\.vision\.onnx"),
        (lambda data: data["contract"].update(capacity=12), "contract is not the one"),
        (lambda data: data["contract"]["graphs"][2]["inputs"].pop(), "contract is not the one"),
        (lambda data: data["model"]["skip"].update(num_retained=5), "contract is not the one"),
        (lambda data: data["model"]["skip"].update(num_retained=500), "impossible model"),
        (lambda data: data["model"].update(colour="red"), "unknown key 'colour'"),
        (lambda data: data.update(colour="red"), "colour"),
        (lambda data: data.pop("chat"), "chat"),
        (lambda data: data["files"].pop("decode.onnx"), "does not list decode.onnx"),
        (
            lambda data: data["files"].update({"../evil": data["files"]["decode.onnx"]}),
            "lists the unknown file ../evil",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit_manifest(bundle, change)
    with pytest.raises(BundleError, match=words) as caught:
        load_manifest(bundle)
    assert "re-export it with `svcli export`" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "nul\0l", "[" * 100_000])
def test_a_broken_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load_manifest(bundle)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        load_manifest(tmp_path / "absent")
    (tmp_path / "photo.png").touch()
    with pytest.raises(BundleError, match=r"photo\.png: a file, and a bundle is a folder"):
        load_manifest(tmp_path / "photo.png")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        load_manifest(tmp_path)


def test_inspection_shows_what_skipping_saves(pristine: Path) -> None:
    summary = inspect_bundle(pristine)
    contract = summary.manifest.contract
    assert summary.file_problems == {}
    assert (summary.kv_full.rows, summary.kv_reduced.rows) == (96, contract.capacity)
    assert summary.kv_reduced.bytes_total == 2 * summary.kv_reduced.bytes_per_layer
    assert summary.kv_reduced.bytes_total == contract.capacity * contract.kv_bytes_per_row
    assert summary.manifest.graphs["vision"].custom_ops == {"TokenGather": 6, "SummaryPool": 2}
    assert summary.manifest.graphs["prefill"].custom_ops == {
        "TokenGather": 1 + 2 * 2,
        "CacheWrite": 2 * 2,
        "CacheRead": 1 + 2 * 2,
    }
    assert summary.manifest.graphs["decode"].custom_ops == {"CacheWrite": 2 * 2, "CacheRead": 1 + 2 * 2}
    assert summary.size == sum(path.stat().st_size for path in pristine.iterdir() if path.name != "manifest.json")
