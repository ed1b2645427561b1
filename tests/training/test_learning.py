"""What learns, how fast, and what is computed again: the same numbers with less in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from skipvision.config import SkipConfig
from skipvision.decoder import DecoderLayer
from skipvision.model import SkipVisionModel
from skipvision.training.collate import Batch, collate
from skipvision.training.learning import parameter_groups, recompute_layers, set_learning
from skipvision.training.tune import TuneModule
from skipvision.training.tune_recipe import SourceRecipe, TuneData, TuneOptim, TuneRecipe, What
from tests.skipvision import tiny
from tests.training.shown import Part, sample_of

RECIPE = TuneRecipe(base="tiny", data=TuneData((SourceRecipe("a.json"),)))
SEEING = replace(RECIPE, optim=TuneOptim(learning_rate=1e-3, vision_learning_rate=1e-4, vision_decay=0.5))
PARTS: list[list[Part]] = [
    [(40, 50), 11, 12, -13, -20],
    [15, 16, 17, -18, -19, -20],
    [5, (20, 20), 9, (64, 20), 28, -29],
]


def model_of(skip: SkipConfig | None = tiny.MERGED, recipe: TuneRecipe = RECIPE) -> SkipVisionModel:
    model = tiny.tiny_model(tiny.tiny_config(skip), dtype=torch.float32)
    set_learning(model, recipe)
    return model


def batch_for(model: SkipVisionModel) -> Batch:
    samples = [sample_of(str(parts), parts, model.config, tiny.IMAGE) for parts in PARTS]
    return collate([samples[:2], samples[2:]], model.config)


def learning(model: SkipVisionModel) -> set[str]:
    return {name.split(".")[0] for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(
    ("what", "parts"), [("projector", {"projector", "summary"}), ("full", {"projector", "summary", "decoder"})]
)
def test_what_learns(what: What, parts: set[str]) -> None:
    assert learning(model_of(recipe=replace(RECIPE, what=what))) == parts
    assert learning(model_of(recipe=replace(SEEING, what=what))) == parts | {"vision"}
    assert learning(model_of(None, replace(RECIPE, what=what))) == parts - {"summary"}


@pytest.mark.parametrize("what", ["projector", "full"])
def test_what_is_frozen_keeps_its_bits_and_the_rest_moves(what: What) -> None:
    model = model_of(recipe=replace(RECIPE, what=what, optim=TuneOptim(weight_decay=0.1)))
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimiser = torch.optim.AdamW(parameter_groups(model, TuneOptim(learning_rate=1e-2, weight_decay=0.1)))
    for _ in range(2):
        TuneModule(model)(batch_for(model)).total.backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name]) != each.requires_grad, name


def test_layers_of_the_tower_learn_slower_the_deeper_they_lie() -> None:
    model = model_of(recipe=SEEING)
    rates = rates_of(model, SEEING.optim)
    assert rates["vision.blocks.2.fc1.weight"] == pytest.approx(1e-4)
    assert rates["vision.blocks.1.fc1.weight"] == pytest.approx(5e-5)
    assert rates["vision.blocks.0.norm1.bias"] == pytest.approx(2.5e-5)
    assert rates["vision.patch_embed.weight"] == rates["vision.position"] == pytest.approx(1.25e-5)
    assert rates["decoder.embed.weight"] == rates["projector.fc1.weight"] == rates["summary.score.weight"] == 1e-3


def rates_of(model: SkipVisionModel, optim: TuneOptim) -> dict[str, float]:
    names = {id(each): name for name, each in model.named_parameters()}
    groups = parameter_groups(model, optim)
    return {names[id(each)]: group["lr"] for group in groups for each in group["params"]}  # type: ignore[attr-defined, misc]


def test_layers_behind_the_last_that_is_read_stay_as_they_are() -> None:
    config = tiny.tiny_config()
    config = replace(config, vision=replace(config.vision, feature_layers=(1, 2), select_layer=3))
    model = tiny.tiny_model(config, dtype=torch.float32)
    set_learning(model, SEEING)
    names = {name for name, each in model.named_parameters() if each.requires_grad}
    assert "vision.blocks.1.fc2.weight" in names
    assert not any(name.startswith("vision.blocks.2.") for name in names)
    TuneModule(model)(batch_for(model)).total.backward()
    # All that learns has a gradient: a weight without one would be a layer that nothing reads.
    assert [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None] == []
    assert rates_of(model, SEEING.optim)["vision.blocks.1.fc2.weight"] == pytest.approx(1e-4)


def test_projector_and_summary_have_a_rate_of_their_own() -> None:
    optim = TuneOptim(learning_rate=1e-3, projector_learning_rate=5e-3)
    rates = rates_of(model_of(), optim)
    assert {rates["projector.fc1.weight"], rates["summary.norm.bias"]} == {5e-3}
    assert rates["decoder.norm.weight"] == 1e-3


def test_only_matrices_decay() -> None:
    model = model_of(recipe=SEEING)
    optim = replace(SEEING.optim, weight_decay=0.1)
    groups = parameter_groups(model, optim)
    decaying = {id(each) for group in groups if group["weight_decay"] for each in group["params"]}  # type: ignore[attr-defined]
    names = {name for name, each in model.named_parameters() if id(each) in decaying}
    assert {"decoder.embed.weight", "projector.fc1.weight", "vision.patch_embed.weight"} <= names
    places = {"vision.position", "projector.rows", "projector.columns"}
    assert not any(name.endswith(("bias", "norm.weight", "norm1.weight")) or name in places for name in names)
    learn = [each for each in model.parameters() if each.requires_grad]
    taken = Counter(id(each) for group in groups for each in group["params"])  # type: ignore[attr-defined]
    assert taken == Counter(map(id, learn))


def test_gradients_reach_what_is_merged_and_what_sums_up() -> None:
    model = model_of(recipe=replace(RECIPE, what="projector"))
    seen: list[Tensor] = []
    model.projector.register_forward_hook(lambda _module, _given, tokens: seen.append(tokens))
    objective = TuneModule(model)(batch_for(model))
    seen[0].retain_grad()
    objective.total.backward()
    assert seen[0].grad is not None
    assert (seen[0].grad.abs().amax(-1) > 1e-9).all()  # of every patch, retained or merged
    assert model.summary is not None
    assert model.summary.score.weight.grad is not None
    assert model.summary.score.weight.grad.abs().max() > 1e-6


def saved_bytes(module: TuneModule, batch: Batch) -> tuple[int, list[Tensor]]:
    """What is kept for the backward pass, each storage once, weights left out; and the gradients and the loss."""
    own = {each.untyped_storage().data_ptr() for each in module.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective = module(batch)
    objective.total.backward()
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    return sum(storages.values()), [objective.total.detach(), *gradients]


class _Dropped(nn.Module):
    """A linear layer with dropout in front, as adapters have it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.dropout = linear, nn.Dropout(0.3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(self.dropout(hidden))  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", [RECIPE, SEEING], ids=["frozen tower", "learning tower"])
@pytest.mark.parametrize("with_dropout", [False, True])
def test_computing_layers_again_changes_nothing_and_keeps_less(recipe: TuneRecipe, with_dropout: bool) -> None:
    def run(again: bool) -> tuple[int, Sequence[Tensor], list[str]]:
        model = model_of(recipe=recipe)
        if with_dropout:
            for layer in cast("Iterable[DecoderLayer]", model.decoder.layers):
                layer.ffn.down = cast("nn.Linear", _Dropped(layer.ffn.down))
        if again:
            recompute_layers(model)
        torch.manual_seed(5)
        return *saved_bytes(TuneModule(model).train(), batch_for(model)), list(model.state_dict())

    plain, again = run(False), run(True)
    # The very same operations on the same numbers.
    assert all(torch.equal(one, other) for one, other in zip(plain[1], again[1], strict=True))
    assert again[2] == plain[2]
    assert again[0] < 0.6 * plain[0]
