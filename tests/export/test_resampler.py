"""A model with a resampler goes through the graphs and into a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from skipvision.checkpoint import save_checkpoint
from skipvision.config import ModelConfig, ResamplerConfig, SkipConfig
from skipvision.tokenizer import train_tokenizer
from svcli_export.bundle import export_bundle
from svcli_export.contract import Precision, build_contract
from svcli_export.decoder_graphs import decode_graph, prefill_graph
from svcli_export.manifest import load_manifest
from svcli_export.quantize import stored_tensors
from svcli_export.restore import restore_model
from svcli_export.runtime import open_session
from svcli_export.verify import verify, violations
from svcli_export.vision_graph import vision_graph
from svcli_export.weights import WEIGHTS_FILE, WeightFile
from tests.export.tiny import VOCAB, asked, drawn, own_files, resampler_config

PROMPT = [2, 5, 1, 6, 7, 3]
SKIP = SkipConfig(num_retained=11, num_skipped=6, selector="first", num_unpooled=3)
SKIPS: dict[str, SkipConfig | None] = {
    "skip": SKIP,
    "all-pooled": replace(SKIP, num_unpooled=0),
    "no-merge": replace(SKIP, num_skipped=32),
    "drop": replace(SKIP, num_skipped=0),
    "coarsest-alone": SkipConfig(3, 6, "first", num_unpooled=1),
    "uniform": SkipConfig(11, 6, "uniform"),
    "all-retained": SkipConfig(43, 0, "first", num_unpooled=3),
    "plain": None,
}


def pictures() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)


def checked(config: ModelConfig, folder: Path, precision: Precision) -> list[str]:
    """Writes the graphs of a random model, and says what is out of tolerance."""
    model = drawn(config)
    contract = build_contract(config, 160, 2, precision)
    weights = WeightFile.write(stored_tensors(model, contract), folder / WEIGHTS_FILE)
    stored: set[str] = set()
    for spec, build in zip(contract.graphs, (vision_graph, prefill_graph, decode_graph), strict=True):
        proto = build(config, contract, weights)
        onnx.save(proto, folder / spec.file)
        onnx.checker.check_model(str(folder / spec.file), full_check=True)
        read = {name for node in proto.graph.node for name in node.input} | {each.name for each in proto.graph.output}
        assert [node.name for node in proto.graph.node if not read & set(node.output)] == []
        stored |= {tensor.name for tensor in proto.graph.initializer if tensor.external_data}
    assert {name for name in weights.names if name.startswith("projector.")} <= stored
    check = verify(model, contract, folder, asked(model, pictures(), PROMPT))
    if precision == "fp32":
        assert max(stage.max_error for stage in check.stages) < 1e-4  # other summation orders only
    return violations(check, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("skip", SKIPS)
def test_graphs_equal_torch(tmp_path: Path, skip: str, precision: Precision) -> None:
    assert checked(resampler_config(SKIPS[skip]), tmp_path, precision) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "resampler",
    [ResamplerConfig((8, 1), (2, 1), 2, 1), ResamplerConfig((4,), (3,), 8, 3)],
    ids=["windows-of-a-patch", "one-scale"],
)
def test_other_scales_and_one_layer_of_the_encoder(
    tmp_path: Path, resampler: ResamplerConfig, precision: Precision
) -> None:
    config = resampler_config()
    config = replace(config, vision=replace(config.vision, feature_layers=(2,)), resampler=resampler)
    assert checked(config, tmp_path, precision) == []


def test_several_pictures_are_each_as_if_alone(tmp_path: Path) -> None:
    assert checked(resampler_config(SKIP), tmp_path, "fp32") == []
    session = open_session(tmp_path / "vision.onnx")
    together = session.run(None, {"pixels": pictures()})[0]
    alone = [session.run(None, {"pixels": picture[None]})[0][0] for picture in pictures()]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_a_bundle_is_written_and_its_model_comes_back(tmp_path: Path) -> None:
    model = drawn(resampler_config(SKIP))
    tokenizer = train_tokenizer(["what is this? a red ball", "how many cats? three"], VOCAB)
    save_checkpoint(model, tmp_path / "cos", own_files(tokenizer))
    for precision in ("fp32", "fp16", "int8"):
        folder = tmp_path / precision
        manifest = export_bundle(tmp_path / "cos", folder, precision=precision, max_context=192)
        # 43 tokens, of which 11 and two summaries stay.
        assert (manifest.contract.capacity_full - manifest.contract.capacity) == 2 * (43 - 13)
        assert load_manifest(folder).config == model.config
    restored = restore_model(tmp_path / "fp32", load_manifest(tmp_path / "fp32"))
    pixels = torch.from_numpy(pictures())
    with torch.no_grad():
        assert torch.equal(restored.encode_images(pixels), model.encode_images(pixels))
    again = export_bundle(tmp_path / "fp32", tmp_path / "again", precision="fp16")
    assert again.config == model.config
