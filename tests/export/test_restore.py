"""A bundle's weights become the model that they came from, but for what was rounded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from skipvision.checkpoint import load_checkpoint
from skipvision.config import SkipConfig
from svcli_export.bundle import export_bundle
from svcli_export.contract import Precision
from svcli_export.manifest import BundleError, load_manifest
from svcli_export.restore import original_model, restore_model
from tests.export.tiny import SKIP_SETTINGS, tiny_checkpoint


def exported(
    folder: Path, precision: Precision, skip: SkipConfig | None, *, tied: bool = True, clip: bool = False
) -> tuple[Path, Path]:
    checkpoint = tiny_checkpoint(folder / "checkpoint", skip, tied=tied, clip=clip)
    export_bundle(checkpoint, folder / "bundle", precision=precision, max_context=96, default_variants=False)
    return checkpoint, folder / "bundle"


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("skip", ["skip", "uniform", "plain"])
def test_fp32_comes_back_bit_by_bit(tmp_path: Path, skip: str, tied: bool, clip: bool) -> None:
    checkpoint, bundle = exported(tmp_path, "fp32", SKIP_SETTINGS[skip], tied=tied, clip=clip)
    manifest = load_manifest(bundle)
    restored, original = restore_model(bundle, manifest), load_checkpoint(checkpoint)
    assert restored.config == original.config
    assert not restored.training
    found, wanted = restored.state_dict(), original.state_dict()
    assert found.keys() == wanted.keys()
    unread = {name for name in wanted if name.startswith("vision.blocks.2.")}  # behind the last layer that is read
    assert unread
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], torch.zeros_like(tensor) if name in unread else tensor, rtol=0, atol=0)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    original = copy.deepcopy(original)  # kernels round otherwise on weights as they lie in a file, without alignment
    with torch.no_grad():
        torch.testing.assert_close(restored.encode_images(pixels), original.encode_images(pixels), rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "share"), [("fp16", 2**-11), ("int8", 0.5 / 127)])
def test_rounded_weights_are_off_by_half_a_step_at_most(tmp_path: Path, precision: Precision, share: float) -> None:
    """Of the largest weight of an output channel (int8), which is more than half a step of fp16."""
    checkpoint, bundle = exported(tmp_path, precision, SKIP_SETTINGS["skip"])
    found = restore_model(bundle, load_manifest(bundle)).state_dict()
    for name, tensor in load_checkpoint(checkpoint).state_dict().items():
        if not name.startswith("vision.blocks.2."):
            largest = tensor.abs().amax(-1, keepdim=True) if tensor.dim() > 1 else tensor.abs().max()
            assert ((found[name] - tensor).abs() <= 1.001 * share * largest).all(), name


def test_int4_weights_are_off_by_a_step_of_their_block_at_most(tmp_path: Path) -> None:
    checkpoint, bundle = exported(tmp_path, "int4", SKIP_SETTINGS["skip"])
    manifest = load_manifest(bundle)
    found = restore_model(bundle, manifest).state_dict()
    errors = []
    for name, tensor in load_checkpoint(checkpoint).state_dict().items():
        if name.startswith("decoder.layers.") and tensor.dim() > 1:
            for first in range(0, tensor.shape[1], 32):
                block, back = tensor[:, first : first + 32], found[name][:, first : first + 32]
                step = (block.amax(1).clamp(min=0) - block.amin(1).clamp(max=0)) / 15
                assert ((back - block).abs() <= 1.001 * step[:, None]).all(), name
            errors.append(float((found[name] - tensor).norm() / tensor.norm()))
    assert len(errors) == 2 * 7
    assert manifest.check.weight_error == pytest.approx(max(errors))
    assert 0.05 < max(errors) < 0.1  # of numbers that are spread as a normal distribution


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    _, bundle = exported(tmp_path, "fp32", SKIP_SETTINGS["skip"])
    manifest, path = load_manifest(bundle), bundle / "weights.safetensors"
    tensors = load_file(path)
    del tensors["summary.score.bias"]
    save_file(tensors, path)
    with pytest.raises(BundleError, match=r"do not fit its manifest \(Missing key.*re-export"):
        restore_model(bundle, manifest)
    path.write_bytes(b"cut")
    with pytest.raises(BundleError, match="unreadable"):
        restore_model(bundle, manifest)


def test_a_checkpoint_takes_the_skip_setting_of_the_bundle(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    for name, skip in (("other", SkipConfig(2, 3)), ("off", "off")):
        export_bundle(checkpoint, tmp_path / name, precision="fp32", max_context=96, skip=skip)  # type: ignore[arg-type]
        manifest = load_manifest(tmp_path / name)
        assert original_model(checkpoint, manifest).config == manifest.config


def test_another_model_is_no_original(tmp_path: Path) -> None:
    _, bundle = exported(tmp_path, "fp32", SKIP_SETTINGS["skip"])
    untied = tiny_checkpoint(tmp_path / "untied", SKIP_SETTINGS["skip"], tied=False)
    with pytest.raises(BundleError, match="not the model that the bundle was exported from"):
        original_model(untied, load_manifest(bundle))
    plain = tiny_checkpoint(tmp_path / "plain", None)
    with pytest.raises(BundleError, match=r"not the model .*summary"):
        original_model(plain, load_manifest(bundle))
