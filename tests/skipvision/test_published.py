"""A published checkpoint of any family computes here what it computes in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipvision.checkpoint import CheckpointError, NoCheckpointError
from skipvision.config import ConfigError, ModelConfig
from skipvision.model import SkipVisionModel
from skipvision.published import load_published
from tests.skipvision import zoo

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@dataclass(frozen=True)
class Case:
    """One model of the zoo in a folder, theirs and ours."""

    kind: zoo.Kind
    theirs: Any
    folder: Path
    ours: SkipVisionModel

    @property
    def config(self) -> ModelConfig:
        return self.ours.config


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """By name, each made once."""
    root, made = tmp_path_factory.mktemp("published"), dict[str, Case]()
    kinds = {kind.name: kind for kind in zoo.KINDS}

    def case(name: str) -> Case:
        if name not in made:
            theirs, folder = zoo.made(kinds[name]), root / name
            theirs.save_pretrained(folder)
            made[name] = Case(kinds[name], theirs, folder, load_published(folder))
        return made[name]

    return case


@pytest.fixture(params=[kind.name for kind in zoo.KINDS])
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture
def llava(cases: Callable[[str], Case], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(cases("llava").folder, tmp_path / "copy"))


def same_weights(folder: Path, wanted: SkipVisionModel) -> bool:
    found, expected = load_published(folder).state_dict(), wanted.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def last_logits(model: SkipVisionModel, prompts: list[zoo.Prompt]) -> torch.Tensor:
    padded, table, batch = zoo.our_batch(model, prompts)
    return model.prefill(padded, table, batch, batch.num_kept)[0].float()


@pytest.mark.parametrize("prompts", zoo.PROMPTS.values(), ids=zoo.PROMPTS.keys())
def test_logits_are_those_of_transformers(case: Case, prompts: list[zoo.Prompt]) -> None:
    ours = last_logits(case.ours, prompts)
    for row, prompt in enumerate(prompts):
        theirs = zoo.their_logits(case.kind, case.theirs, case.config, prompt)
        torch.testing.assert_close(ours[row], theirs, atol=1e-4, rtol=0)


def test_64_greedy_tokens_are_those_of_transformers(case: Case) -> None:
    (prompt,) = zoo.PROMPTS["two images"]
    padded, table, batch = zoo.our_batch(case.ours, [prompt])
    (answer,) = case.ours.generate(padded.tolist(), table, batch, 64, stop_id=-1)
    wanted: list[int] = []
    while len(wanted) < 64:
        wanted.append(int(zoo.their_logits(case.kind, case.theirs, case.config, [*prompt, *wanted]).argmax()))
    assert answer == wanted
    assert len(set(answer)) > 5  # or else it would say little


@pytest.mark.parametrize(("dtype", "cosine"), [(torch.float16, 0.9999), (torch.bfloat16, 0.999)], ids=str)
def test_half_precision_is_close_with_pictures_and_without(case: Case, dtype: torch.dtype, cosine: float) -> None:
    rough = load_published(case.folder, dtype)
    assert {parameter.dtype for parameter in rough.parameters()} == {dtype}
    for prompts in zoo.PROMPTS.values():
        exact, rounded = (last_logits(model, prompts) for model in (case.ours, rough))
        assert torch.cosine_similarity(exact, rounded).min() > cosine
        ratios = rounded.norm(dim=1) / exact.norm(dim=1)
        torch.testing.assert_close(ratios, torch.ones_like(ratios), atol=0.02, rtol=0)


def test_shards_are_the_same_model(case: Case, tmp_path: Path) -> None:
    case.theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_weights(tmp_path, case.ours)


def test_progress_is_told_with_every_tensor(case: Case, tmp_path: Path) -> None:
    case.theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shares: list[float] = []
    load_published(tmp_path, progress=lambda _what, share: shares.append(share))
    assert len(shares) == len(load_file(case.folder / "model.safetensors"))
    assert 0 < shares[0] < shares[-1] == 1
    assert shares == sorted(shares)


def in_memory(name: str) -> str:
    """As transformers 5 names it while it runs."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.")
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return name if name.startswith(("model.", "lm_head")) else f"model.{name}"


def with_old_tower(name: str) -> str:
    """As transformers 4 wrapped the tower."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize(
    "spelt",
    [in_memory, with_old_tower, lambda name: with_old_tower(in_memory(name))],
    ids=["in memory", "old tower", "both"],
)
def test_other_spellings_are_the_same_model(case: Case, tmp_path: Path, spelt: Callable[[str], str]) -> None:
    copy = shutil.copytree(case.folder, tmp_path / "spelt")
    stored = load_file(copy / "model.safetensors")
    renamed = {spelt(name): tensor for name, tensor in stored.items()}
    is_smol = case.kind.family in ("smolvlm", "idefics3")  # which has had one spelling
    assert (renamed.keys() == stored.keys()) == is_smol
    save_file(renamed, copy / "model.safetensors")
    assert same_weights(copy, case.ours)


def test_what_nothing_reads_is_passed_over(case: Case, tmp_path: Path) -> None:
    """Buffers of old files, SigLIP's pooling head, the rotary frequencies of old Llamas."""
    copy = shutil.copytree(case.folder, tmp_path / "more")
    stored = load_file(copy / "model.safetensors")
    tower = next(name for name in stored if "vision" in name).split("embeddings.")[0].split("encoder.")[0]
    text = next(name for name in stored if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    for name in (
        f"{tower}embeddings.position_ids",
        f"{tower}head.probe",
        f"{text}layers.0.self_attn.rotary_emb.inv_freq",
    ):
        stored[name] = torch.zeros(3)
    save_file(stored, copy / "model.safetensors")
    assert same_weights(copy, case.ours)


def test_weights_are_not_copied(case: Case) -> None:
    """Those of the decoder lie in the file, which is mapped: memory holds what was read, and that once."""
    model = load_published(case.folder)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(case.folder / "model.safetensors"))]
    for parameter in model.decoder.parameters():
        assert any(int(low, 16) <= parameter.data_ptr() < int(high, 16) for low, high in ranges)


def test_the_head_is_tied_where_theirs_is(case: Case) -> None:
    is_tied = case.kind.family == "llava_onevision"
    assert (case.theirs.lm_head.weight is case.theirs.get_input_embeddings().weight) == is_tied
    assert (case.ours.decoder.head.weight is case.ours.decoder.embed.weight) == is_tied
    assert case.config.text.tie_embeddings == is_tied


def test_a_file_without_a_head_has_it_tied_whatever_its_config_says(llava: Path) -> None:
    stored = load_file(llava / "model.safetensors")
    del stored[HEAD]
    save_file(stored, llava / "model.safetensors")
    model = load_published(llava)
    assert model.decoder.head.weight is model.decoder.embed.weight
    assert model.config.text.tie_embeddings


@pytest.mark.parametrize("differs", [True, False], ids=["another", "the same"])
def test_a_head_that_is_stored_counts_even_where_config_says_tied(
    cases: Callable[[str], Case], tmp_path: Path, differs: bool
) -> None:
    """As in transformers, which then ties what is equal alone."""
    case = cases("llava-onevision")
    copy = shutil.copytree(case.folder, tmp_path / "headed")
    stored = load_file(copy / "model.safetensors")
    stored[HEAD] = stored[EMBEDDING].flip(0) if differs else stored[EMBEDDING].clone()
    save_file(stored, copy / "model.safetensors")
    ours, prompts = load_published(copy), zoo.PROMPTS["text only"]
    theirs = type(case.theirs).from_pretrained(copy).eval()
    assert torch.equal(theirs.lm_head.weight, stored[HEAD])
    assert torch.equal(ours.decoder.head.weight, stored[HEAD])
    assert torch.equal(ours.decoder.embed.weight, stored[EMBEDDING])
    expected = zoo.their_logits(case.kind, theirs, ours.config, prompts[0])
    torch.testing.assert_close(last_logits(ours, prompts)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ("none", NoCheckpointError, "no such checkpoint folder"),
        ("config", NoCheckpointError, "config.json is missing"),
        ("family", ConfigError, "unknown family model_type='qwen2_vl'; known: llava"),
        ("other family", CheckpointError, 'the weights do not fit config.json: Missing key.*"newline"'),
        ("scaling", ConfigError, "'linear' is not computed here, only 'default'"),
        ("activation", ConfigError, "hidden_act: 'gelu' is not computed here"),
        ("weights", CheckpointError, "model.safetensors is missing; download it again"),
        ("pickle", CheckpointError, "its weights are pickles, which are not read"),
        ("cut", CheckpointError, "unreadable"),
        ("unknown", CheckpointError, "unknown weight what.is.this"),
        ("lost", CheckpointError, "the weights do not fit config.json: Missing key"),
        ("bias", CheckpointError, "the weights do not fit config.json: Unexpected key.*attention.k.bias"),
        ("part", CheckpointError, "the weights do not fit config.json: Missing key.*qkv.weight"),
        ("embedding", CheckpointError, "the weights do not fit config.json: Missing key.*embed.weight"),
        ("shape", CheckpointError, "the weights do not fit config.json: size mismatch for decoder.norm.weight"),
        ("index", CheckpointError, "index.json: unreadable"),
        ("outside", CheckpointError, "'../model.safetensors' is no file beside it"),
        ("shard", CheckpointError, "gone.safetensors is missing"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(llava: Path, damage: str, error: type[Exception], words: str) -> None:
    config, weights = llava / "config.json", llava / "model.safetensors"
    index = llava / "model.safetensors.index.json"
    data = json.loads(config.read_text())
    tensors = load_file(weights)
    match damage:
        case "none":
            shutil.rmtree(llava)
        case "config":
            config.unlink()
        case "family":
            config.write_text(json.dumps(data | {"model_type": "qwen2_vl"}))
        case "other family":
            sizes = [[zoo.SIDE, 2 * zoo.SIDE]]
            config.write_text(json.dumps(data | {"model_type": "llava_next", "image_grid_pinpoints": sizes}))
        case "scaling":
            data["text_config"]["rope_parameters"] = {"rope_type": "linear", "factor": 2.0}
            config.write_text(json.dumps(data))
        case "activation":
            data["vision_config"]["hidden_act"] = "gelu"
            config.write_text(json.dumps(data))
        case "weights":
            weights.unlink()
        case "pickle":
            weights.rename(llava / "pytorch_model.bin")
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "unknown":
            save_file(tensors | {"what.is.this": torch.zeros(1)}, weights)
        case "lost":
            del tensors["language_model.model.norm.weight"]
            save_file(tensors, weights)
        case "bias":
            save_file(tensors | {"language_model.model.layers.0.self_attn.k_proj.bias": torch.zeros(16)}, weights)
        case "part":
            del tensors["vision_tower.encoder.layers.1.self_attn.k_proj.weight"]
            save_file(tensors, weights)
        case "embedding":
            del tensors[EMBEDDING], tensors[HEAD]
            save_file(tensors, weights)
        case "shape":
            save_file(tensors | {"language_model.model.norm.weight": torch.ones(31)}, weights)
        case "index":
            index.write_text("[]")
        case "outside":
            index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
        case "shard":
            index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(error, match=words) as refusal:
        load_published(llava)
    assert "\n" not in str(refusal.value)


def test_a_norm_that_smolvlm_reads_must_be_there(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """LLaVA does without the one behind its tower."""
    for name, is_read in (("smolvlm", True), ("llava", False)):
        copy = shutil.copytree(cases(name).folder, tmp_path / name)
        stored = load_file(copy / "model.safetensors")
        kept = {each: tensor for each, tensor in stored.items() if "post_layernorm" not in each}
        assert len(kept) == len(stored) - 2
        save_file(kept, copy / "model.safetensors")
        if is_read:
            with pytest.raises(CheckpointError, match=r"Missing key.*vision\.output_norm\.weight"):
                load_published(copy)
        else:
            assert same_weights(copy, cases(name).ours)
