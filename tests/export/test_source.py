"""A bundle is exported again as its checkpoint would be, but for what it has rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.loading import write_checkpoint
from skipvision.checkpoint import save_checkpoint
from skipvision.config import ConfigError, SkipConfig
from skipvision.known_models import known_model
from skipvision.model import SkipVisionModel
from skipvision.published import load_published
from svcli_export.bundle import export_bundle
from svcli_export.contract import Precision
from svcli_export.manifest import BundleError, load_manifest
from svcli_export.source import Source, SourceError, own_chat, own_image, read_source, stored_dtype
from tests.export.tiny import SKIP, tiny_checkpoint, tiny_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")


def made(source: Path, output: Path, precision: Any, **options: Any) -> Path:
    export_bundle(source, output, precision=precision, default_variants=False, **options)
    return output


def contents(bundle: Path) -> dict[str, bytes]:
    """All but the manifest, which names files' hashes and the outcome of the check."""
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("skip", [None, (2, 3), "off"], ids=["trained", "other", "off"])
def test_of_a_whole_bundle_comes_what_comes_of_its_checkpoint(
    checkpoint: Path, tmp_path: Path, precision: Any, skip: Any
) -> None:
    limits = {"max_context": 80, "max_images": 1}
    whole = made(checkpoint, tmp_path / "whole", "fp32", **limits)
    again = made(whole, tmp_path / "again", precision, skip=skip)
    assert contents(again) == contents(made(checkpoint, tmp_path / "direct", precision, skip=skip, **limits))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_was_rounded_stays_and_is_not_rounded_once_more(
    checkpoint: Path, tmp_path: Path, precision: Precision
) -> None:
    rounded = made(checkpoint, tmp_path / "rounded", precision, max_context=96)
    again = made(rounded, tmp_path / "again", precision)
    first, second = (load_file(bundle / "weights.safetensors") for bundle in (rounded, again))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name.endswith(".scale"):  # the largest weight, or the span of a block, divided by 127 or 15
            np.testing.assert_allclose(second[name], value, rtol=1e-6)
        else:
            np.testing.assert_array_equal(second[name], value)


def test_floats_of_a_bundle_stay_in_its_file(checkpoint: Path, tmp_path: Path) -> None:
    bundle = made(checkpoint, tmp_path / "bundle", "fp16", max_context=96)
    parameters = read_source(bundle).model.named_parameters()
    read = {name: each for name, each in parameters if not name.startswith("vision.blocks.2.")}
    assert {each.dtype for each in read.values()} == {torch.float16}
    assert contents(made(bundle, tmp_path / "again", "fp16")) == contents(bundle)


def test_limits_may_be_others_than_the_bundles(checkpoint: Path, tmp_path: Path) -> None:
    bundle = made(checkpoint, tmp_path / "bundle", "fp32", max_context=80, max_images=1)
    contract = export_bundle(bundle, tmp_path / "longer", max_context=200, max_images=3).contract
    assert (contract.max_context, contract.max_images) == (200, 3)


def test_a_bundle_may_replace_itself(checkpoint: Path, tmp_path: Path) -> None:
    bundle = made(checkpoint, tmp_path / "bundle", "fp32", max_context=96)
    direct = made(checkpoint, tmp_path / "direct", "fp16", max_context=96)
    assert contents(made(bundle, bundle, "fp16", overwrite=True)) == contents(direct)


def test_layers_that_a_bundle_has_not_are_not_made_up(tmp_path: Path) -> None:
    """The encoder of a uniform selector ends earlier than that of one which reads the attention of a later layer."""
    config = tiny_config(SkipConfig(4, 6, selector="uniform"))
    deeper = replace(config, vision=replace(config.vision, select_layer=3))
    tokens = tiny_checkpoint(tmp_path / "tokens")
    files = {name: (tokens / name).read_text() for name in ("tokenizer.json", "chat_template.jinja")}
    save_checkpoint(SkipVisionModel(deeper), tmp_path / "checkpoint", files)
    bundle = made(tmp_path / "checkpoint", tmp_path / "bundle", "fp32", max_context=96)
    with pytest.raises(SourceError, match="holds only those layers"):
        export_bundle(bundle, tmp_path / "other", skip=SKIP)
    assert not (tmp_path / "other").exists()
    export_bundle(tmp_path / "checkpoint", tmp_path / "other", skip=SKIP)


def test_a_plain_bundle_skips_untrained_and_a_damaged_one_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    plain = made(checkpoint, tmp_path / "plain", "fp32", max_context=96, skip="off")
    assert load_manifest(plain).config.skip_trained
    assert not load_manifest(made(plain, tmp_path / "skipping", "fp32", skip=(4, 6))).config.skip_trained
    (plain / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(BundleError, match=r"weights\.safetensors has 3 bytes"):
        export_bundle(plain, tmp_path / "other")


def test_a_model_for_transformers_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="unknown family model_type='bert'; known: llava"):
        export_bundle(tmp_path, tmp_path / "other")


def test_a_published_model_comes_in_its_own_dtype_and_is_exported_from_it(tmp_path: Path) -> None:
    known = known_model("llava-1.5-7b-hf")
    assert known is not None
    small = replace(known, config=tiny_config(None, tied=False, clip=True))
    write_checkpoint(small, tmp_path / "published")
    tokens = tiny_checkpoint(tmp_path / "tokens")
    tokenizer, template = ((tokens / name).read_text() for name in ("tokenizer.json", "chat_template.jinja"))
    folder = tmp_path / "published"
    model = load_published(folder, stored_dtype(folder))
    source = Source(model, tokenizer, own_chat(folder, tokenizer, template), own_image(model.config.vision))
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.float16}
    for precision in ("fp16", "int4"):
        output = tmp_path / precision
        check = export_bundle(source, output, precision=precision, max_context=96).check
        assert check.agreement >= 0.9
        stored = load_file(output / "weights.safetensors")
        matrix = load_published(tmp_path / "published").get_parameter("projector.fc2.weight").detach().numpy()
        whole = stored["projector.fc2.weight.T"] * stored.get("projector.fc2.weight.T.scale", np.float32(1))
        np.testing.assert_allclose(whole.T, matrix, atol=0 if precision == "fp16" else np.abs(matrix).max() / 200)
