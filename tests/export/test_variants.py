"""One bundle, several skip settings: further graphs on the same weights, each held against PyTorch as the main ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from skipvision.checkpoint import load_checkpoint, save_checkpoint
from skipvision.config import ConfigError, ModelConfig, SkipConfig
from skipvision.model import SkipVisionModel
from skipvision.presets import PRESETS, Setting
from svcli_export import bundle as bundle_module
from svcli_export.bundle import export_bundle
from svcli_export.contract import ContractError, build_contract
from svcli_export.inspection import inspect_bundle
from svcli_export.manifest import BundleError, Manifest, NoVariantError, load_manifest
from svcli_export.restore import original_model, restore_model
from svcli_export.variants import ExportError
from svcli_export.verify import verify, violations
from tests.export.test_graphs import PROMPT, pictures
from tests.export.tiny import NUM_PATCHES, SKIP, asked, drawn, tiny_checkpoint, tiny_config

OTHER = SkipConfig(2, 3)
ROPE = {"decoder.rope.cos", "decoder.rope.sin"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("variants") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    """Skips by itself, and has the variants dense and 2-3."""
    export(checkpoint, checkpoint.with_name("bundle"), variants={"2-3": (2, 3)})
    return checkpoint.with_name("bundle")


@pytest.fixture(scope="module")
def plain_bundle(checkpoint: Path) -> Path:
    """The same model with nothing skipped by itself, and the variant 4-6."""
    export(checkpoint, checkpoint.with_name("plain_bundle"), skip="off", variants={"4-6": (4, 6)})
    return checkpoint.with_name("plain_bundle")


def export(source: Path, output: Path, **options: Any) -> Manifest:
    settings: dict[str, Any] = {"precision": "fp32", "max_context": 96} | options
    return export_bundle(source, output, **settings)


def checkpoint_of(config: ModelConfig, folder: Path) -> Path:
    """Of random weights, beside the tokenizer of the other tests."""
    tokens = tiny_checkpoint(folder.with_name(f"{folder.name}-tokens"))
    files = {name: (tokens / name).read_text() for name in ("tokenizer.json", "chat_template.jinja")}
    save_checkpoint(drawn(config), folder, files)
    return folder


def without_skipping(model: SkipVisionModel) -> SkipVisionModel:
    """Its weights in a plain model, by name."""
    plain = SkipVisionModel(replace(model.config, skip=None))
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain.eval()


def contents(folder: Path) -> dict[str, bytes]:
    """All but the manifest, which has the outcome of the check."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_a_bundle_that_skips_has_a_dense_variant_and_what_is_asked_for(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert manifest.variants == ("dense", "2-3")
    assert (manifest.config.skip, manifest.contract.variant) == (SKIP, "")
    dense, other = map(manifest.variant, manifest.variants)
    assert (dense.config, other.config) == (replace(manifest.config, skip=None), replace(manifest.config, skip=OTHER))
    assert (dense.contract.capacity, dense.contract.max_positions) == (96, 96)
    assert manifest.contract.capacity == 96 - 2 * (NUM_PATCHES - 6)
    for each in (dense, other):
        assert each.check.agreement == 1
        assert each.check.num_tokens == manifest.check.num_tokens
        assert (each.chat, each.image, each.variants) == (manifest.chat, manifest.image, ())
    own, pooled = (each.graphs["vision"].custom_ops for each in (dense, other))
    assert (own.get("SummaryPool"), pooled["SummaryPool"]) == (None, 2)
    assert {path.name for path in bundle.iterdir()} == {*manifest.files, "manifest.json"}


def test_the_contract_of_a_variant_is_that_of_its_model_in_files_of_its_own(bundle: Path, plain_bundle: Path) -> None:
    for folder in (bundle, plain_bundle):
        manifest = load_manifest(folder)
        limits = manifest.contract
        seen = {graph.file for graph in limits.graphs}
        for name in manifest.variants:
            found = manifest.variant(name)
            built = build_contract(found.config, limits.max_context, limits.max_images, limits.precision)
            assert found.contract == built.of_variant(name)
            assert found.contract.graphs != built.graphs
            files = {f"{name}.{graph}.onnx" for graph in ("vision", "prefill", "decode")}
            assert {graph.file for graph in found.contract.graphs} == files
            assert set(found.files) == files | {"weights.safetensors", "tokenizer.json"}
            assert not files & seen
            seen |= files


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_dense_variant_is_pytorch_without_skipping(checkpoint: Path, tmp_path: Path, precision: Any) -> None:
    dense = export(checkpoint, tmp_path / "bundle", precision=precision).variant("dense")
    plain = without_skipping(load_checkpoint(checkpoint))
    samples = asked(plain, pictures(), PROMPT)
    assert all(sample.layout.num_kept == sample.layout.length for sample in samples)
    found = verify(plain, dense.contract, tmp_path / "bundle", samples)
    assert violations(found, precision) == []
    # The check sees it where PyTorch is another model.
    plain.get_parameter("decoder.layers.0.ffn.down.weight").data *= 1.5
    assert violations(verify(plain, dense.contract, tmp_path / "bundle", samples), precision)


def test_a_variant_costs_its_graphs_and_rows_of_the_rotary_tables_alone(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    alone = export(checkpoint, tmp_path / "alone", default_variants=False)
    assert alone.variants == ()
    few, many = (load_file(folder / "weights.safetensors") for folder in (tmp_path / "alone", bundle))
    assert few.keys() == many.keys()
    for name in few.keys() - ROPE:
        assert few[name].tobytes() == many[name].tobytes(), name
    for name in ROPE:
        assert few[name].tobytes() == many[name][: len(few[name])].tobytes()
        assert (len(few[name]), len(many[name])) == (alone.contract.max_positions, 96)
    assert inspect_bundle(bundle).variants.keys() == {"dense", "2-3"}


def test_weights_come_back_for_each_variant(checkpoint: Path, bundle: Path, plain_bundle: Path) -> None:
    original = load_checkpoint(checkpoint).state_dict()
    for folder in (bundle, plain_bundle):
        manifest = load_manifest(folder)
        for each in (manifest, *map(manifest.variant, manifest.variants)):
            model = restore_model(folder, each)
            assert model.config == each.config == original_model(checkpoint, each).config
            assert (model.summary is None) == (each.config.skip is None)
            for name, tensor in model.state_dict().items():
                if not name.startswith("vision.blocks.2."):  # which nothing reads
                    assert tensor.equal(original[name]), name


def test_from_a_bundle_come_its_variants_as_from_the_checkpoint(
    checkpoint: Path, bundle: Path, plain_bundle: Path, tmp_path: Path
) -> None:
    for source in (bundle, plain_bundle):
        export(source, tmp_path / source.name)
        assert contents(tmp_path / source.name) == contents(source)
    # Another setting of its own, and other limits: what it has now is no variant any more.
    notes: list[str] = []
    manifest = export(bundle, tmp_path / "other", skip=(2, 3), max_context=120, note=notes.append)
    assert (manifest.config.skip, manifest.variants) == (OTHER, ("dense",))
    assert manifest.variant("dense").contract.capacity == 120
    assert notes == ["variant 2-3 is left out: its skip setting is the one that the bundle itself has"]
    manifest = export(bundle, tmp_path / "off", skip="off")
    assert (manifest.config.skip, manifest.variants) == (None, ("2-3",))
    # With its summary layer, which a plain bundle without variants has lost.
    direct = export(checkpoint, tmp_path / "direct", skip="off", variants={"2-3": OTHER})
    assert manifest.variant("2-3").config == direct.variant("2-3").config
    assert contents(tmp_path / "off") == contents(tmp_path / "direct")
    assert export(plain_bundle, tmp_path / "skipping", skip=SKIP).config.skip_trained
    assert export(bundle, tmp_path / "none", default_variants=False).variants == ()


def test_layers_that_a_variant_alone_reads_are_stored(tmp_path: Path) -> None:
    config = tiny_config()
    deeper = replace(config, vision=replace(config.vision, select_layer=3))
    manifest = export(checkpoint_of(deeper, tmp_path / "deeper"), tmp_path / "b", skip="off", variants={"4-6": SKIP})
    assert any(name.startswith("vision.blocks.2.") for name in load_file(tmp_path / "b" / "weights.safetensors"))
    assert manifest.variant("4-6").check.agreement == 1
    assert export(tmp_path / "b", tmp_path / "again", skip=SKIP, variants={"dense": "off"}).variants == ("dense",)


def test_a_plain_model_gets_no_variant_unasked_and_one_that_skips_untrained(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", None)
    assert export(plain, tmp_path / "alone").variants == ()
    manifest = export(plain, tmp_path / "asked", variants={"4-6": (4, 6)})
    assert (manifest.config.skip_trained, manifest.variant("4-6").config.skip_trained) == (True, False)
    manifest = export(plain, tmp_path / "skipping", skip=(4, 6))
    assert (manifest.config.skip_trained, manifest.variant("dense").config.skip_trained) == (False, True)


def test_variants_that_cannot_be_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], type[ValueError], str], ...] = (
        ({"4-6": (4, 6)}, ExportError, "variant 4-6: its skip setting is the one that the bundle itself has"),
        ({"a": (2, 3), "b": (2, 3)}, ExportError, "variant b: its skip setting is the one that variant a has"),
        ({"../a": (2, 3)}, ExportError, "small letters, digits and -"),
        ({"": (2, 3)}, ExportError, "small letters, digits and -"),
        ({"a\n": (2, 3)}, ExportError, "small letters, digits and -"),
        ({"a": SkipConfig(2, 3, selector="random")}, ExportError, "variant a: .*draws anew"),
        ({"40-0": (40, 0)}, ConfigError, "num_retained"),
        ({"sv-llava-100": PRESETS["sv-llava-100"]}, ConfigError, "splits 576 visual tokens"),
    )
    for variants, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            export(checkpoint, tmp_path / "out", variants=variants)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_where_the_dense_model_has_too_few_positions_it_is_left_out_with_a_note_or_refused(tmp_path: Path) -> None:
    config = tiny_config()
    short = replace(config, text=replace(config.text, max_positions=90))
    source, notes = checkpoint_of(short, tmp_path / "short"), list[str]()
    why = "max_context 96 needs 96 positions, and the model was made for 90; ask for less"
    assert export(source, tmp_path / "out", note=notes.append).variants == ()
    assert notes == [f"variant dense is left out: {why}"]
    with pytest.raises(ContractError, match=f"variant dense: {why}"):
        export(source, tmp_path / "asked", variants={"dense": "off"})
    assert export(source, tmp_path / "less", max_context=90, variants={"dense": "off"}).variants == ("dense",)


def test_a_paper_setting_may_be_a_variant(tmp_path: Path) -> None:
    setting = Setting("of a test", NUM_PATCHES, 5, 4)
    manifest = export(tiny_checkpoint(tmp_path / "plain", None), tmp_path / "out", variants={"paper-5": setting})
    assert manifest.variant("paper-5").config.skip == SkipConfig(5, 4, visibility="all")


def test_progress_names_variants_and_many_pictures_are_looked_at_once(checkpoint: Path, tmp_path: Path) -> None:
    for number in range(5):
        Image.new("RGB", (30 + number, 20), (40 * number, 90, 0)).save(tmp_path / f"{number}.png")
    seen: list[tuple[str, float]] = []
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    manifest = export(
        checkpoint, tmp_path / "out", pictures=paths, progress=lambda what, share: seen.append((what, share))
    )
    assert (manifest.check.num_pictures, manifest.variant("dense").check.num_pictures) == (5, 3)
    shares = [share for _, share in seen]
    assert shares == sorted(set(shares))
    assert "checking the graphs of variant dense against PyTorch" in dict(seen)


def test_a_variant_that_differs_from_the_model_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build: Callable[..., Any] = bundle_module._GRAPHS[2]

    def wrong(config: ModelConfig, *arguments: Any) -> Any:
        text = replace(config.text, rms_norm_eps=0.5) if config.skip is None else config.text
        return build(replace(config, text=text), *arguments)

    monkeypatch.setattr(bundle_module, "_GRAPHS", (*bundle_module._GRAPHS[:2], wrong))
    with pytest.raises(ExportError, match=r"graphs of variant dense do not do .*decode: error.*nothing was written"):
        export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_check_of_a_variant_leaves_the_old_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(checkpoint, tmp_path / "bundle", default_variants=False)
    before = contents(tmp_path / "bundle")
    calls: list[str] = []

    def interrupt(model: SkipVisionModel, contract: Any, *arguments: Any) -> Any:
        calls.append(contract.variant)
        if contract.variant:
            raise KeyboardInterrupt
        return verify(model, contract, *arguments)

    monkeypatch.setattr(bundle_module, "verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "bundle", overwrite=True)
    assert calls == ["", "dense"]
    assert contents(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_unknown_variant_is_refused_with_what_there_is_and_what_adds_it(bundle: Path, plain_bundle: Path) -> None:
    manifest, plain = load_manifest(bundle), load_manifest(plain_bundle)
    assert manifest.variant("2/3") == manifest.variant("2-3")  # as users write them
    assert manifest.variant("off") == manifest.variant("dense")
    cases = (
        (manifest, "3/3", r"no variant '3/3', only its own graphs \(4/6\) and the variants dense, 2-3;", "3-3"),
        (manifest, "../x", r"no variant '../x', only", "R/S"),
        (manifest, "sv-llava-100", "no variant 'sv-llava-100'", "sv-llava-100"),
        (manifest.variant("2-3"), "dense", r"only its own graphs \(2/3\);", "dense"),
        (plain, "nope", r"only its own graphs \(off\) and the variants 4-6;", "R/S"),
    )
    for where, name, words, option in cases:
        with pytest.raises(NoVariantError, match=words) as caught:
            where.variant(name)
        assert isinstance(caught.value, BundleError)
        command = f"`svcli export BUNDLE -o BUNDLE --overwrite --precision fp32 --variant {option}` adds one"
        assert str(caught.value).endswith(command)
    with pytest.raises(NoVariantError, match=r"its own graphs skip nothing; leave the variant out$"):
        plain.variant("dense")
    assert re.fullmatch(r"[^\n]+", str(caught.value))
