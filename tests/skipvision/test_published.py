"""A published checkpoint computes here what it computes in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipvision.checkpoint import CheckpointError, NoCheckpointError
from skipvision.config import ConfigError
from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.published import load_published
from tests.optional import missing

IMAGE, VOCABULARY, PATCHES = 7, 120, 16
PROMPTS = {
    "image first": [[IMAGE, 1, 20, 30, 40]],
    "text only": [[1, 20, 30, 40]],
    "two images": [[1, IMAGE, 20, IMAGE, 30]],
    "unequal batch": [[1, IMAGE, 20, 30, 40, 50], [1, 20, IMAGE], [9, 10]],
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A tiny LLaVA-1.5 with weights that make its choices clear."""
    if find_spec("transformers") is None:
        missing("transformers")
    transformers = import_module("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    text = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        rope_theta=5000.0,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms around 1, so that one which is lost shows; the rest so large that no output is nearly constant.
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "llava"
    theirs.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> SkipVisionModel:
    return load_published(folder)


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(count))


def their_logits(model: Any, ids: Sequence[int], pictures: torch.Tensor) -> torch.Tensor:
    """[vocab] of the last of one prompt's rows; transformers wants a placeholder for each patch."""
    spelt = [each for token in ids for each in [token] * (PATCHES if token == IMAGE else 1)]
    given = {"pixel_values": pictures} if len(pictures) else {}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([spelt]), **given).logits[0, -1]
    return logits


def our_batch(
    model: SkipVisionModel, prompts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, BatchLayout]:
    """Padded ids, visual rows, layout."""
    width = max(map(len, prompts))
    layouts = [TokenLayout.of(ids, IMAGE, model.config) for ids in prompts]
    count = sum(len(layout.images) for layout in layouts)
    with torch.no_grad():
        visual = model.encode_images(pixels(count)) if count else torch.zeros(0, PATCHES, 32)
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts])
    return padded, visual, BatchLayout.of(layouts, width)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_transformers(theirs: Any, ours: SkipVisionModel, name: str) -> None:
    prompts = PROMPTS[name]
    padded, visual, batch = our_batch(ours, prompts)
    logits, _ = ours.prefill(padded, visual, batch, batch.num_kept)
    pictures, first = pixels(sum(ids.count(IMAGE) for ids in prompts)), 0
    for row, ids in enumerate(prompts):
        mine = pictures[first : (first := first + ids.count(IMAGE))]
        torch.testing.assert_close(logits[row], their_logits(theirs, ids, mine), atol=1e-4, rtol=0)


def test_64_greedy_tokens_are_those_of_transformers(theirs: Any, ours: SkipVisionModel) -> None:
    ids = PROMPTS["two images"][0]
    padded, visual, batch = our_batch(ours, [ids])
    (answer,) = ours.generate(padded.tolist(), visual, batch, 64, stop_id=-1)
    wanted: list[int] = []
    while len(wanted) < 64:
        wanted.append(int(their_logits(theirs, [*ids, *wanted], pixels(2)).argmax()))
    assert answer == wanted
    assert len(set(answer)) > 5  # or else it would say little


@pytest.mark.parametrize(("dtype", "cosine"), [(torch.float16, 0.9999), (torch.bfloat16, 0.999)])
def test_half_precision_is_close(folder: Path, ours: SkipVisionModel, dtype: torch.dtype, cosine: float) -> None:
    rough = load_published(folder, dtype)
    assert {parameter.dtype for parameter in rough.parameters()} == {dtype}
    both = []
    for model in (ours, rough):
        ids = torch.tensor(PROMPTS["text only"])
        batch = BatchLayout.of([TokenLayout.of(ids[0].tolist(), IMAGE, model.config)], ids.shape[1])
        visual = torch.zeros(0, PATCHES, 32, dtype=model.decoder.embed.weight.dtype)
        both.append(model.prefill(ids, visual, batch, batch.num_kept)[0][0].float())
    exact, rounded = both
    assert torch.cosine_similarity(exact, rounded, dim=0) > cosine
    assert float(rounded.norm() / exact.norm()) == pytest.approx(1, abs=0.02)


def test_shards_and_other_spellings_are_the_same_model(theirs: Any, ours: SkipVisionModel, copy: Path) -> None:
    sharded = copy.with_name("sharded")
    theirs.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    newer = copy.with_name("newer")
    shutil.copytree(copy, newer)
    save_file(
        {_newer(name): tensor for name, tensor in load_file(copy / "model.safetensors").items()},
        newer / "model.safetensors",
    )
    for folder in (sharded, newer):
        found, wanted = load_published(folder).state_dict(), ours.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _newer(name: str) -> str:
    """As transformers 5 names them in memory, with the tower as it was before."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.")
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("vision_tower.", "vision_tower.vision_model.")


def test_progress_is_told_with_every_tensor(theirs: Any, copy: Path) -> None:
    sharded = copy.with_name("sharded")
    theirs.save_pretrained(sharded, max_shard_size="20KB")
    shares: list[float] = []
    load_published(sharded, progress=lambda _what, share: shares.append(share))
    assert len(shares) == len(load_file(copy / "model.safetensors"))
    assert 0 < shares[0] < shares[-1] == 1
    assert shares == sorted(shares)


def test_weights_are_not_copied(folder: Path) -> None:
    """Those of the decoder lie in the file, which is mapped: memory holds what was read, and that once."""
    model = load_published(folder)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(folder / "model.safetensors"))]
    for parameter in model.decoder.parameters():
        assert any(int(low, 16) <= parameter.data_ptr() < int(high, 16) for low, high in ranges)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ("none", NoCheckpointError, "no such checkpoint folder"),
        ("config", NoCheckpointError, "config.json is missing"),
        ("family", ConfigError, "LLaVA-NeXT is not computed here yet"),
        ("scaling", ConfigError, "'linear' is not computed here, only 'default'"),
        ("activation", ConfigError, "hidden_act: 'gelu' is not computed here"),
        ("weights", CheckpointError, "model.safetensors is missing; download it again"),
        ("pickle", CheckpointError, "its weights are pickles, which are not read"),
        ("cut", CheckpointError, "unreadable"),
        ("unknown", CheckpointError, "unknown weight what.is.this"),
        ("lost", CheckpointError, "the weights do not fit config.json: Missing key"),
        ("index", CheckpointError, "index.json: unreadable"),
        ("outside", CheckpointError, "'../model.safetensors' is no file beside it"),
        ("shard", CheckpointError, "gone.safetensors is missing"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(copy: Path, damage: str, error: type[Exception], words: str) -> None:
    config, weights = copy / "config.json", copy / "model.safetensors"
    index = copy / "model.safetensors.index.json"
    data = json.loads(config.read_text())
    tensors = load_file(weights)
    match damage:
        case "none":
            shutil.rmtree(copy)
        case "config":
            config.unlink()
        case "family":
            config.write_text(json.dumps(data | {"model_type": "llava_next"}))
        case "scaling":
            data["text_config"]["rope_parameters"] = {"rope_type": "linear", "factor": 2.0}
            config.write_text(json.dumps(data))
        case "activation":
            data["vision_config"]["hidden_act"] = "gelu"
            config.write_text(json.dumps(data))
        case "weights":
            weights.unlink()
        case "pickle":
            weights.rename(copy / "pytorch_model.bin")
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "unknown":
            save_file(tensors | {"what.is.this": torch.zeros(1)}, weights)
        case "lost":
            del tensors["language_model.model.norm.weight"]
            save_file(tensors, weights)
        case "index":
            index.write_text("[]")
        case "outside":
            index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
        case "shard":
            index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(error, match=words) as refusal:
        load_published(copy)
    assert "\n" not in str(refusal.value)
