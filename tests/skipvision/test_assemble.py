"""A model that is assembled sees as its tower sees, and speaks as its decoder speaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from skipvision.assemble import AssembleError, Split, assemble
from skipvision.checkpoint import CheckpointError, NoCheckpointError, load_checkpoint
from skipvision.config import ConfigError, SkipConfig
from skipvision.model import SkipVisionModel
from skipvision.presets import PRESETS
from skipvision.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, special_ids
from tests.skipvision.parts import DECODERS, PATCHES, SIDE, TOWERS, save_decoder, save_known, save_tower


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tower and a decoder."""
    folder = tmp_path_factory.mktemp("parts")
    save_tower("clip alone", folder / "tower")
    save_decoder("llama", folder / "decoder")
    return folder


@pytest.fixture
def copy(parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parts, tmp_path / "parts"))


def test_a_tower_sees_as_in_transformers(parts: Path, tmp_path: Path) -> None:
    for kind in TOWERS:
        theirs = save_tower(kind, tmp_path / kind)
        output = tmp_path / f"{kind} joined"
        assemble(tmp_path / kind, parts / "decoder", output)
        model = load_checkpoint(output)
        pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
            found = model.vision(pixels).features
        torch.testing.assert_close(found, wanted[:, -PATCHES:], atol=1e-4, rtol=0)
        assert found.std() > 0.3
        assert model.vision.config.image_mean[0] == (0.5 if "siglip" in kind else 0.48145466)


@pytest.mark.parametrize("more_rows", [0, 2, 20])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_speaks_as_in_transformers(parts: Path, tmp_path: Path, kind: str, more_rows: int) -> None:
    theirs = save_decoder(kind, tmp_path / "decoder", more_rows=more_rows)
    config = assemble(parts / "tower", tmp_path / "decoder", tmp_path / "joined")
    model = load_checkpoint(tmp_path / "joined")
    known = json.loads((tmp_path / "decoder" / "tokenizer.json").read_text())
    num_known = len(known["model"]["vocab"])
    assert config.text.vocab_size == num_known + max(more_rows, len(SPECIAL_TOKENS))
    ids = torch.randint(0, num_known, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits[0, :, :num_known]
        found = our_logits(model, ids)[:, :num_known]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert found.std() > 0.1
    tokenizer = Tokenizer.from_file(str(tmp_path / "joined" / "tokenizer.json"))
    for weight in {model.decoder.embed.weight, model.decoder.head.weight}:
        mean = weight[:num_known].mean(0)
        for number in special_ids(tokenizer).values():
            torch.testing.assert_close(weight[number], mean)


def our_logits(model: SkipVisionModel, ids: torch.Tensor) -> torch.Tensor:
    """[n, vocab] of one text."""
    cache = model.new_cache(1, ids.shape[1])
    return model.decode(ids, cache)[0]


def test_both_parts_may_come_from_known_models(tmp_path: Path) -> None:
    theirs = save_known(tmp_path / "llava")
    config = assemble(tmp_path / "llava", tmp_path / "llava", tmp_path / "joined")
    model = load_checkpoint(tmp_path / "joined")
    assert config.tiles is None
    weight = theirs.state_dict()
    assert torch.equal(model.vision.position, weight["model.vision_tower.embeddings.position_embedding.weight"])
    assert torch.equal(model.decoder.norm.weight, weight["model.language_model.norm.weight"])
    assert not torch.equal(
        model.get_parameter("projector.fc1.weight"), weight["model.multi_modal_projector.linear_1.weight"]
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "joined" / "tokenizer.json"))
    assert [special_ids(tokenizer)[token] for token in ("<pad>", "<image>", "<user>")] == [4, 5, 6]
    # A token that is there already keeps its row.
    assert torch.equal(model.decoder.embed.weight[5], weight["model.language_model.embed_tokens.weight"][5])


def test_the_projector_is_fresh_and_its_rows_are_as_large_as_text(parts: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = assemble(parts / "tower", parts / "decoder", tmp_path / name, projector_size=96, seed=seed)
    first, again, other = (load_checkpoint(tmp_path / name) for name in "abc")
    assert torch.equal(first.get_parameter("projector.fc1.weight"), again.get_parameter("projector.fc1.weight"))
    assert not torch.equal(first.get_parameter("projector.fc1.weight"), other.get_parameter("projector.fc1.weight"))
    assert first.get_parameter("projector.fc1.weight").shape == (96, 32)
    assert not config.projector_trained
    assert not first.get_parameter("projector.fc2.bias").any()
    pixels = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows, words = first.encode_images(pixels), first.decoder.embed.weight
        ratio = float(rows.pow(2).mean().sqrt() / words.pow(2).mean().sqrt())
    assert 0.2 < ratio < 3  # what gelu and the tower's own scale leave of it


@pytest.mark.parametrize(
    ("tower", "selector"), [("clip alone", "cls_attention"), ("siglip alone", "received_attention")]
)
def test_a_skipping_model_begins_with_the_mean(parts: Path, tmp_path: Path, tower: str, selector: str) -> None:
    save_tower(tower, tmp_path / "tower")
    config = assemble(tmp_path / "tower", parts / "decoder", tmp_path / "joined", skip=(4, 6))
    assert config.skip == SkipConfig(4, 6, selector=selector)  # type: ignore[arg-type]
    model = load_checkpoint(tmp_path / "joined")
    assert model.summary is not None
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = model.encode_images(pixels)[0]
    torch.testing.assert_close(rows[4], rows[:4].mean(0))
    torch.testing.assert_close(rows[-1], rows[5:11].mean(0))


def test_the_chat_begins_as_texts_of_the_decoder_begin(parts: Path, tmp_path: Path) -> None:
    assemble(parts / "tower", parts / "decoder", tmp_path / "joined")
    template = (tmp_path / "joined" / "chat_template.jinja").read_text()
    assert template == '{{ "<s>" }}' + CHAT_TEMPLATE
    tokenizer = json.loads((tmp_path / "joined" / "tokenizer.json").read_text())
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_stored_as_asked_and_a_tied_head_once(parts: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    save_decoder("qwen2, tied", tmp_path / "decoder")
    assemble(parts / "tower", tmp_path / "decoder", tmp_path / "joined", skip=(4, 6), dtype=dtype)
    stored = load_file(tmp_path / "joined" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert "decoder.head.weight" not in stored
    model = load_checkpoint(tmp_path / "joined")
    assert model.decoder.head.weight is model.decoder.embed.weight


def test_colours_are_those_that_the_tower_comes_with(copy: Path) -> None:
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (copy / "tower" / "preprocessor_config.json").write_text(json.dumps(colours))
    vision = assemble(copy / "tower", copy / "decoder", copy / "joined").vision
    assert (vision.image_mean, vision.image_std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_an_older_checkpoint_is_replaced_when_told_so_and_nothing_else(parts: Path, tmp_path: Path) -> None:
    output = tmp_path / "joined"
    assemble(parts / "tower", parts / "decoder", output)
    with pytest.raises(AssembleError, match="--overwrite"):
        assemble(parts / "tower", parts / "decoder", output)
    assemble(parts / "tower", parts / "decoder", output, seed=3, overwrite=True)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(AssembleError, match="holds more than a checkpoint"):
        assemble(parts / "tower", parts / "decoder", output, overwrite=True)
    with pytest.raises(AssembleError, match="is a file"):
        assemble(parts / "tower", parts / "decoder", output / "notes.txt", overwrite=True)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ("tower gone", NoCheckpointError, "tower: no such checkpoint folder"),
        ("tower type", ConfigError, "no vision tower: model_type='dinov2'; known: clip, siglip"),
        ("tower layers", CheckpointError, "tower: the weights do not fit config.json: Missing key"),
        ("tower pickle", CheckpointError, "its weights are pickles, which are not read"),
        ("tower unknown", CheckpointError, "unknown weight vision_model.x"),
        ("tower colours", ConfigError, "image_mean: expected three numbers"),
        ("decoder type", ConfigError, "no text decoder: model_type='gpt2'; known: llama, mistral, qwen2, llava"),
        ("decoder layers", CheckpointError, "decoder: the weights do not fit config.json: Missing key"),
        ("decoder embedding", CheckpointError, "decoder: the weights do not fit config.json: Missing key"),
        ("decoder rows", CheckpointError, "decoder: the weights do not fit config.json: size mismatch"),
        ("decoder pickle", CheckpointError, "its weights are pickles, which are not read"),
        ("no tokenizer", AssembleError, "tokenizer.json is missing; save the tokenizer with transformers"),
        ("broken tokenizer", AssembleError, "tokenizer.json: unreadable"),
        ("large tokenizer", AssembleError, "the tokenizer knows .* tokens, and the decoder"),
        ("preset", ConfigError, "splits 576 visual tokens, and this model has 16"),
        ("skip", ConfigError, "skip.num_retained must be at most 16"),
    ],
)
def test_what_makes_no_model_is_one_sentence(copy: Path, damage: str, error: type[Exception], words: str) -> None:
    part, _, what = damage.partition(" ")
    folder = copy / ("tower" if part == "tower" else "decoder")
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    skip: Split | None = {"preset": PRESETS["sv-llava-100"], "skip": (17, 0)}.get(damage)  # type: ignore[assignment]
    match what:
        case "gone":
            shutil.rmtree(folder)
        case "type":
            config["model_type"] = "dinov2" if part == "tower" else "gpt2"
        case "layers":
            config["num_hidden_layers"] += 1
        case "pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "unknown":
            save_file(load_file(weights) | {"vision_model.x": torch.zeros(1)}, weights)
        case "colours":
            (folder / "preprocessor_config.json").write_text('{"image_mean": 5}')
        case "embedding":
            tensors = load_file(weights)
            del tensors["model.embed_tokens.weight"]
            save_file(tensors, weights)
        case "rows":
            config["vocab_size"] += 1
        case "tokenizer" if part == "no":
            tokenizer.unlink()
        case "tokenizer" if part == "broken":
            tokenizer.write_text("{")
        case "tokenizer":
            larger = Tokenizer.from_file(str(tokenizer))
            larger.add_tokens(["one", "more"])
            larger.save(str(tokenizer))
    if folder.exists():
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words) as refusal:
        assemble(copy / "tower", copy / "decoder", copy / "joined", skip=skip)
    assert "\n" not in str(refusal.value)
    assert not (copy / "joined").exists()


def test_weights_are_not_copied_before_they_are_written(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored in the asked-for dtype comes out of the mapped files."""
    seen: list[SkipVisionModel] = []
    monkeypatch.setattr("skipvision.assemble.save_checkpoint", lambda model, *_: seen.append(model))
    assemble(copy / "tower", copy / "decoder", copy / "joined")
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    for part, file in ((seen[0].decoder.layers, "decoder"), (seen[0].vision.blocks, "tower")):
        path = str(copy / file / "model.safetensors")
        ranges = [line.split()[0].split("-") for line in lines if line.endswith(path)]
        for name, parameter in part.named_parameters():
            if "qkv" not in name:  # theirs are three
                assert any(int(low, 16) <= parameter.data_ptr() < int(high, 16) for low, high in ranges), name


def test_a_stored_name_is_a_name_of_the_model(parts: Path, tmp_path: Path) -> None:
    assemble(parts / "tower", parts / "decoder", tmp_path / "joined")
    with safe_open(tmp_path / "joined" / "model.safetensors", framework="pt") as stored:
        assert set(stored.keys()) == set(load_checkpoint(tmp_path / "joined").state_dict())
