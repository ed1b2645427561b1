"""A checkpoint that the code of Skip-Vision's authors saved computes here what their code computes.

Held against a plain implementation of what they do, on the names that they give their weights: two streams that are
interleaved in front of each layer's attention, and parted again behind it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from skipvision.checkpoint import CheckpointError, NoCheckpointError
from skipvision.config import ConfigError, SkipConfig
from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.published import load_published, read_known

IMAGE, VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS = 7, 600, 32, 3, 4, 2
SIDE, PATCH, TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS = 28, 7, 24, 4, 2
RETAINED, SKIPPED = 5, 6
TRAINED = SkipConfig(RETAINED, SKIPPED, visibility="all")
TOWER = "model.vision_tower.vision_tower.vision_model."
Weights = Mapping[str, Tensor]

TOWER_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": TOWER_WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": TOWER_LAYERS,
    "num_attention_heads": TOWER_HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}
CONFIG = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": TOWER_WIDTH,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "somebody/a-small-tower",
}


# --- what they do --------------------------------------------------------------------------------------------------


def linear(weights: Weights, name: str, rows: Tensor) -> Tensor:
    return rows @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(1))


def layer_norm(weights: Weights, name: str, rows: Tensor) -> Tensor:
    centred = rows - rows.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(weights: Weights, name: str, rows: Tensor) -> Tensor:
    return rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]


def heads_of(rows: Tensor, count: int) -> Tensor:
    """[n, D] to [count, n, D / count]."""
    return rows.reshape(len(rows), count, -1).transpose(0, 1)


def look(weights: Weights, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Of a picture [3, S, S]: the last hidden state but one without CLS [P, D], and what CLS pays in that layer [P]."""
    name = TOWER + "embeddings."
    patches = F.conv2d(pixels[None], weights[name + "patch_embedding.weight"], stride=PATCH)[0].flatten(1).T
    hidden = torch.cat([weights[name + "class_embedding"][None], patches])
    hidden = layer_norm(weights, TOWER + "pre_layrnorm", hidden + weights[name + "position_embedding.weight"])
    states, paid = [hidden], []
    for layer in range(TOWER_LAYERS):
        name = f"{TOWER}encoder.layers.{layer}."
        normed = layer_norm(weights, name + "layer_norm1", hidden)
        query, key, value = (
            heads_of(linear(weights, f"{name}self_attn.{part}_proj", normed), TOWER_HEADS) for part in "qkv"
        )
        shares = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        hidden = hidden + linear(weights, name + "self_attn.out_proj", (shares @ value).transpose(0, 1).flatten(1))
        grown = linear(weights, name + "mlp.fc1", layer_norm(weights, name + "layer_norm2", hidden))
        hidden = hidden + linear(weights, name + "mlp.fc2", grown * (1.702 * grown).sigmoid())
        states.append(hidden)
        paid.append(shares[:, 0, 1:].sum(0))
    return states[-2][1:], paid[-2]


def merged(tokens: Tensor, count: int) -> Tensor:
    """The most redundant go into what is most like them, among the `count` least redundant."""
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    alike = unit @ unit.T
    order = (alike.sum(1) - alike.diagonal()).argsort(descending=True)
    gone, left = order[: len(tokens) - count], order[len(tokens) - count :]
    goes_to = alike[gone][:, left].argmax(1)
    groups = [torch.cat([left[place][None], gone[goes_to == place]]) for place in range(count)]
    return torch.stack([tokens[group].mean(0) for group in groups])


def summary(weights: Weights, group: Tensor) -> Tensor:
    scores = linear(weights, "model.ada.1", layer_norm(weights, "model.ada.0", group))
    return (scores.softmax(0) * group).sum(0, keepdim=True)


@dataclass
class Rows:
    """Of a prompt in attention order."""

    vectors: Tensor
    is_skipped: Tensor


def prompt_rows(weights: Weights, ids: Sequence[int], pictures: Sequence[Tensor]) -> Rows:
    parts, skipped, number = [], [], 0
    for token in ids:
        if token != IMAGE:
            parts.append(weights["model.embed_tokens.weight"][token][None])
            skipped.append(torch.zeros(1, dtype=torch.bool))
            continue
        features, paid = look(weights, pictures[number])
        number += 1
        best = torch.zeros(len(paid), dtype=torch.bool)
        best[paid.topk(RETAINED).indices] = True
        projected = linear(weights, "model.mm_projector.2", F.gelu(linear(weights, "model.mm_projector.0", features)))
        retained, rest = projected[best], merged(projected[~best], SKIPPED)
        parts += [retained, summary(weights, retained), rest, summary(weights, rest)]
        skipped += [torch.tensor([False] * (RETAINED + 1) + [True] * SKIPPED + [False])]
    return Rows(torch.cat(parts), torch.cat(skipped))


def rope(heads: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    angles = torch.arange(heads.shape[1])[:, None] * 500000.0 ** -(torch.arange(half) / half)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def their_logits(weights: Weights, rows: Rows, num_prompt: int) -> Tensor:
    """[n, vocabulary] of all rows but the skipped. What comes behind the prompt sees none that is skipped."""
    skipped, count = rows.is_skipped, len(rows.vectors)
    sees = torch.ones(count, count, dtype=torch.bool).tril()
    sees[num_prompt:, :] &= ~skipped
    hidden, aside = rows.vectors[~skipped], rows.vectors[skipped]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        joined = torch.empty_like(rows.vectors)
        joined[~skipped] = rms_norm(weights, name + "input_layernorm", hidden)
        joined[skipped] = rms_norm(weights, name + "input_layernorm", aside)
        query = rope(heads_of(linear(weights, name + "self_attn.q_proj", joined), HEADS))
        key = rope(heads_of(linear(weights, name + "self_attn.k_proj", joined), KV_HEADS))
        value = heads_of(linear(weights, name + "self_attn.v_proj", joined), KV_HEADS)
        key, value = (each.repeat_interleave(HEADS // KV_HEADS, 0) for each in (key, value))
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        mixed = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value
        out = linear(weights, name + "self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
        hidden, aside = hidden + out[~skipped], aside + out[skipped]
        normed = rms_norm(weights, name + "post_attention_layernorm", hidden)
        grown = F.silu(linear(weights, name + "mlp.gate_proj", normed)) * linear(weights, name + "mlp.up_proj", normed)
        hidden = hidden + linear(weights, name + "mlp.down_proj", grown)
    return linear(weights, "lm_head", rms_norm(weights, "model.norm", hidden))


# --- what they save ------------------------------------------------------------------------------------------------


def their_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.mm_projector.0.weight": (WIDTH, TOWER_WIDTH),
        "model.mm_projector.0.bias": (WIDTH,),
        "model.mm_projector.2.weight": (WIDTH, WIDTH),
        "model.mm_projector.2.bias": (WIDTH,),
        "model.ada.0.weight": (WIDTH,),
        "model.ada.0.bias": (WIDTH,),
        "model.ada.1.weight": (1, WIDTH),
        "model.ada.1.bias": (1,),
        TOWER + "embeddings.class_embedding": (TOWER_WIDTH,),
        TOWER + "embeddings.patch_embedding.weight": (TOWER_WIDTH, 3, PATCH, PATCH),
        TOWER + "embeddings.position_embedding.weight": (1 + (SIDE // PATCH) ** 2, TOWER_WIDTH),
    }
    of_key = WIDTH * KV_HEADS // HEADS
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        for part, outputs, inputs in (
            ("self_attn.q_proj", WIDTH, WIDTH),
            ("self_attn.k_proj", of_key, WIDTH),
            ("self_attn.v_proj", of_key, WIDTH),
            ("self_attn.o_proj", WIDTH, WIDTH),
            ("mlp.gate_proj", 48, WIDTH),
            ("mlp.up_proj", 48, WIDTH),
            ("mlp.down_proj", WIDTH, 48),
        ):
            shapes[f"{name}{part}.weight"] = (outputs, inputs)
        for part in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{name}{part}.weight"] = (WIDTH,)
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(TOWER_LAYERS):
        name = f"encoder.layers.{layer}."
        for part, outputs, inputs in (
            *((f"self_attn.{each}_proj", TOWER_WIDTH, TOWER_WIDTH) for each in ("q", "k", "v", "out")),
            ("mlp.fc1", 40, TOWER_WIDTH),
            ("mlp.fc2", TOWER_WIDTH, 40),
        ):
            shapes[f"{TOWER}{name}{part}.weight"] = (outputs, inputs)
            shapes[f"{TOWER}{name}{part}.bias"] = (outputs,)
        norms += [name + "layer_norm1", name + "layer_norm2"]
    for name in norms:
        shapes |= {f"{TOWER}{name}.{part}": (TOWER_WIDTH,) for part in ("weight", "bias")}
    return shapes


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Norms around 1, biases around 0, the rest as large as its inputs are many: whatever is lost shows."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, shape in their_shapes().items():
        noise = torch.randn(shape, generator=generator)
        is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ada.0.weight"))
        made[name] = 0.2 * noise + is_scale if len(shape) == 1 else noise * noise[0].numel() ** -0.5
    made["model.ada.1.weight"] *= 3  # or else a mean would do
    return made


@pytest.fixture
def folder(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    """With the tower inside."""
    return written(tmp_path / "whole", CONFIG, weights)


@pytest.fixture
def tower(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    """The tower alone, as transformers saves one."""
    tensors = {"vision_model." + name.removeprefix(TOWER): each for name, each in weights.items() if TOWER in name}
    return written(tmp_path / "tower", TOWER_CONFIG, tensors)


@pytest.fixture
def towerless(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    return written(tmp_path / "towerless", CONFIG, {name: each for name, each in weights.items() if TOWER not in name})


def written(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "model.safetensors")
    return path


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))


def our_prompt(model: SkipVisionModel, ids: Sequence[int]) -> tuple[Tensor, Tensor, BatchLayout]:
    layout = TokenLayout.of(ids, IMAGE, model.config)
    with torch.no_grad():
        visual = model.encode_images(pixels(len(layout.images)))
    return torch.tensor([ids]), visual, BatchLayout.of([layout], len(ids))


# --- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[1, IMAGE, 20, 30, 40], [IMAGE, 20], [1, 20, IMAGE, 30, IMAGE, 40, 50]])
def test_logits_are_those_of_the_authors_code(folder: Path, tower: Path, weights: Weights, ids: list[int]) -> None:
    model = load_published(folder, tower=tower, skip=TRAINED)
    rows = prompt_rows(weights, ids, list(pixels(2)))
    wanted = their_logits(weights, rows, len(rows.vectors))
    with torch.no_grad():
        found = model(*our_prompt(model, ids))[0]
    # Two implementations in fp32, through seven layers: their sums round differently.
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert wanted.std() > 0.3


def test_an_answer_goes_on_as_in_the_authors_code(folder: Path, tower: Path, weights: Weights) -> None:
    """What is generated no longer sees the skipped rows, and counts its position from all of them."""
    model, ids, said = load_published(folder, tower=tower, skip=TRAINED), [1, IMAGE, 20, 30], [11, 12, 13]
    rows = prompt_rows(weights, ids, list(pixels(1)))
    num_prompt = len(rows.vectors)
    embedded = weights["model.embed_tokens.weight"][said]
    longer = Rows(torch.cat([rows.vectors, embedded]), torch.cat([rows.is_skipped, torch.zeros(3, dtype=torch.bool)]))
    wanted = their_logits(weights, longer, num_prompt)[-4:]
    input_ids, visual, batch = our_prompt(model, ids)
    first, cache = model.prefill(input_ids, visual, batch, batch.num_kept + 3)
    found = torch.cat([first, *(model.decode(torch.tensor([[token]]), cache)[0] for token in said)])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    seeing = their_logits(weights, longer, num_prompt + 3)[-4:]
    assert (seeing - wanted).abs().max() > 1e-2  # or else it would say little


def test_a_tower_that_is_kept_elsewhere_is_the_same_model(folder: Path, towerless: Path, tower: Path) -> None:
    wanted = load_published(folder, tower=tower, skip=TRAINED).state_dict()
    found = load_published(towerless, tower=tower, skip=TRAINED).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    pair = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": pair}))
    tensors = load_file(tower / "model.safetensors")
    save_file(tensors | {"text_model.x": torch.ones(1), "logit_scale": torch.ones(1)}, tower / "model.safetensors")
    found = load_published(towerless, tower=tower, skip=TRAINED).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_plain_model_has_to_be_asked_for(folder: Path, tower: Path) -> None:
    plain = load_published(folder, tower=tower, skip="off")
    assert plain.config.skip is None
    assert plain.summary is None
    with pytest.raises(CheckpointError, match=r"--preset sv-llava-100 or --skip 100/156"):
        load_published(folder, tower=tower)


def test_numbers_alone_are_a_setting_as_the_authors_trained_it(folder: Path, tower: Path) -> None:
    assert read_known(folder, tower).config.skip_of(RETAINED, SKIPPED) == TRAINED


def test_a_model_without_a_summary_layer_is_as_it_was(folder: Path, tower: Path, weights: Weights) -> None:
    plain = {name: each for name, each in weights.items() if "ada" not in name}
    save_file(plain, folder / "model.safetensors")
    assert load_published(folder, tower=tower).config.skip is None
    skipping = load_published(folder, tower=tower, skip=TRAINED)
    assert skipping.summary is not None
    assert not skipping.summary.score.weight.any()  # the mean, until it is trained


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model.", "model.language_model."])
def test_a_summary_layer_loads_in_the_layout_of_transformers(
    weights: dict[str, Tensor], tmp_path: Path, prefix: str
) -> None:
    text = {name: value for name, value in CONFIG.items() if not name.startswith("mm_")} | {"model_type": "llama"}
    config = {"model_type": "llava", "vision_config": TOWER_CONFIG, "text_config": text}
    path = written(tmp_path / "model", config, {_as_transformers(name, prefix): each for name, each in weights.items()})
    model = load_published(path, skip=TRAINED)
    assert model.summary is not None
    assert torch.equal(model.summary.norm.bias, weights["model.ada.0.bias"])
    assert torch.equal(model.summary.score.weight, weights["model.ada.1.weight"])


def _as_transformers(name: str, prefix: str) -> str:
    if name.startswith("model.ada."):
        return prefix + name.removeprefix("model.")
    for theirs, other in (
        (TOWER, "vision_tower.vision_model."),
        ("model.mm_projector.0", "multi_modal_projector.linear_1"),
        ("model.mm_projector.2", "multi_modal_projector.linear_2"),
        ("lm_head", "language_model.lm_head"),
    ):
        name = name.replace(theirs, other)
    return name.replace("model.", "language_model.model.", 1) if name.startswith("model.") else name


def test_shards_and_tied_heads(folder: Path, tower: Path, weights: dict[str, Tensor]) -> None:
    wanted = load_published(folder, tower=tower, skip=TRAINED)
    names = sorted(set(weights) - {"lm_head.weight"})
    (folder / "model.safetensors").unlink()
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: weights[name] for name in part}, folder / file)
    index = {name: "ab"[place % 2] + ".safetensors" for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = load_published(folder, tower=tower, skip=TRAINED)
    assert found.config.text.tie_embeddings
    assert found.decoder.head.weight is found.decoder.embed.weight
    assert torch.equal(found.decoder.embed.weight, wanted.decoder.embed.weight)
    assert torch.equal(found.get_parameter("projector.fc2.weight"), wanted.get_parameter("projector.fc2.weight"))


def test_the_sizes_of_the_usual_towers_are_known(folder: Path) -> None:
    config = CONFIG | {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    vision = read_known(folder).config.vision
    assert (vision.image_size, vision.num_layers, vision.feature_layers) == (336, 24, (23,))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    assert read_known(folder).config.vision == vision


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mm_projector_type": "linear"}, ConfigError, "mm_projector_type: 'linear' is not computed here"),
        ({"mm_vision_select_feature": "cls_patch"}, ConfigError, "mm_vision_select_feature"),
        ({"image_aspect_ratio": "anyres"}, ConfigError, "image_aspect_ratio: 'anyres' is not computed here"),
        ({"mm_hidden_size": 99}, ConfigError, "mm_hidden_size 99 is not the width of the vision tower, 24"),
        ({"mm_vision_tower": None}, ConfigError, "mm_vision_tower is missing"),
        ({"hidden_act": "gelu"}, ConfigError, "hidden_act: 'gelu' is not computed here"),
        ({"num_hidden_layers": 4}, CheckpointError, "the weights do not fit config.json: Missing key"),
        ({"skip": SkipConfig(17, 0)}, ConfigError, "skip.num_retained must be at most 16"),
        ({"tower": "none"}, ConfigError, r"the sizes of mm_vision_tower somebody/a-small-tower .* \(--vision-tower\)"),
        ({"tower": "nowhere"}, NoCheckpointError, "no such checkpoint folder"),
        ({"tower": "siglip"}, ConfigError, "vision_config.model_type: unknown 'siglip_vision_model'"),
        ({"tower": "text"}, ConfigError, "the vision tower is no CLIP model"),
        ({"tower": "pickle"}, CheckpointError, "its weights are pickles, which are not read"),
        ({"weights": "pickle"}, CheckpointError, "its weights are pickles, which are not read"),
        ({"weights": "unknown"}, CheckpointError, "unknown weight model.adb.0.weight"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(
    towerless: Path, tower: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    given: Path | None = tower
    (towerless / "config.json").write_text(
        json.dumps(CONFIG | {name: value for name, value in change.items() if name not in ("tower", "weights", "skip")})
    )
    match change:
        case {"tower": "none"}:
            given = None
        case {"tower": "nowhere"}:
            shutil.rmtree(tower)
        case {"tower": "siglip"}:
            (tower / "config.json").write_text(json.dumps(TOWER_CONFIG | {"model_type": "siglip_vision_model"}))
        case {"tower": "text"}:
            (tower / "config.json").write_text(json.dumps(TOWER_CONFIG | {"model_type": "clip_text_model"}))
        case {"tower": "pickle"}:
            (tower / "model.safetensors").rename(tower / "pytorch_model.bin")
        case {"weights": "pickle"}:
            (towerless / "model.safetensors").rename(towerless / "pytorch_model.bin")
        case {"weights": "unknown"}:
            tensors = load_file(towerless / "model.safetensors")
            tensors["model.adb.0.weight"] = tensors.pop("model.ada.0.weight")
            save_file(tensors, towerless / "model.safetensors")
    with pytest.raises(error, match=words) as refusal:
        load_published(towerless, tower=given, skip=change.get("skip", TRAINED))
    assert "\n" not in str(refusal.value)


def test_weights_of_a_tower_that_are_nowhere_are_asked_for_by_name(towerless: Path) -> None:
    config = CONFIG | {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    (towerless / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"openai/clip-vit-large-patch14-336 are not in it.*--vision-tower"):
        load_published(towerless, skip=TRAINED)
