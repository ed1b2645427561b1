"""Adapters: nothing changes before training, nothing but them learns, and what is merged says the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from skipvision.model import SkipVisionModel
from skipvision.training.lora import adapter_state, add_adapters, merged_state, write_adapter
from skipvision.training.tune_recipe import LoraRecipe
from tests.skipvision.tiny import IMAGE, batch_of, tiny_config, tiny_model

RECIPE = LoraRecipe(rank=3, alpha=7, dropout=0.5)
ROOT = Path(__file__).parents[2]


def logits(model: SkipVisionModel, plain: SkipVisionModel) -> Tensor:
    """Of a prompt with a picture, whose layout and rows come from `plain`."""
    shown = batch_of(plain, [[5, IMAGE, 7, 8], [9, 10, 11]])
    return model(shown.input_ids, shown.visual, shown.batch)  # type: ignore[no-any-return]


def adapted(recipe: LoraRecipe = RECIPE, *, trained: bool = True) -> tuple[SkipVisionModel, SkipVisionModel]:
    """A model, and the same one with adapters, which are random on both sides where they are `trained`."""
    plain, model = (tiny_model(dtype=torch.float32) for _ in range(2))
    add_adapters(model.decoder, recipe)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return plain, model


def test_before_training_an_adapted_model_is_the_base_bit_for_bit() -> None:
    plain, model = adapted(trained=False)
    assert torch.equal(logits(model, plain), logits(plain, plain))
    merged = merged_state(model.state_dict(), RECIPE)
    assert merged.keys() == plain.state_dict().keys()
    assert all(torch.equal(merged[name], each) for name, each in plain.state_dict().items())


@pytest.mark.parametrize("targets", [LoraRecipe().targets, ("q", "down"), ("gate",)])
def test_only_adapters_of_the_layers_that_are_named_learn(targets: tuple[str, ...]) -> None:
    _, model = adapted(replace(RECIPE, targets=targets), trained=False)
    learning = {name for name, each in model.decoder.named_parameters() if each.requires_grad}
    places = {"q": "attention", "k": "attention", "v": "attention", "o": "attention"}
    assert learning == {
        f"layers.{layer}.{places.get(target, 'ffn')}.{target}.lora_{side}.default.weight"
        for layer in range(2)
        for target in targets
        for side in "AB"
    }
    assert all(each.dtype == torch.float32 for each in model.parameters())


def test_the_first_weights_of_adapters_come_from_the_seed_alone() -> None:
    first, second, other = (tiny_model(dtype=torch.float32) for _ in range(3))
    for model, drawn, seed in ((first, 3, 0), (second, 4, 0), (other, 3, 1)):
        torch.manual_seed(drawn)
        state = torch.get_rng_state()
        add_adapters(model.decoder, RECIPE, seed)
        assert torch.equal(torch.get_rng_state(), state)
    a = "decoder.layers.1.ffn.up.lora_A.default.weight"
    assert torch.equal(first.state_dict()[a], second.state_dict()[a])
    assert not torch.equal(first.state_dict()[a], other.state_dict()[a])


def test_a_merged_model_answers_as_the_adapted_one_and_as_peft_merges() -> None:
    plain, model = adapted()
    changed = logits(model, plain)
    assert not torch.allclose(changed, logits(plain, plain), atol=0.1)
    merged = merged_state(model.state_dict(), RECIPE)
    again = tiny_model(dtype=torch.float32)
    again.load_state_dict(merged)
    # fp32 sums of up to 48 products, through two layers: see TOLERANCE in tiny.py.
    torch.testing.assert_close(logits(again, plain), changed, rtol=1e-4, atol=1e-4)

    from peft.tuners.lora import LoraLayer

    for name, layer in model.decoder.named_modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            theirs = layer.get_base_layer().weight
            torch.testing.assert_close(merged[f"decoder.{name}.weight"], theirs, rtol=1e-6, atol=1e-6)


def test_biases_of_adapted_layers_and_names_in_a_module_around_them_are_kept() -> None:
    config = tiny_config()
    config = replace(config, text=replace(config.text, qkv_bias=True))
    plain, model = (tiny_model(config, dtype=torch.float32) for _ in range(2))
    add_adapters(model.decoder, RECIPE)
    held = {f"model.{name}": each for name, each in model.state_dict().items()}
    merged = merged_state(held, RECIPE)
    assert merged.keys() == {f"model.{name}" for name in plain.state_dict()}
    bias = "decoder.layers.0.attention.k.bias"
    assert torch.equal(merged[f"model.{bias}"], plain.state_dict()[bias])


def test_dropout_is_drawn_in_training_alone() -> None:
    plain, model = adapted()
    assert torch.equal(logits(model.eval(), plain), logits(model, plain))
    model.train()
    assert not torch.equal(logits(model, plain), logits(model, plain))


def test_gradients_reach_adapters_and_what_is_in_front_of_the_decoder() -> None:
    plain, model = adapted(replace(RECIPE, dropout=0.0), trained=False)
    model.projector.requires_grad_(True)
    shown = batch_of(plain, [[5, IMAGE, 7, 8]])
    visual = model.encode_images(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    model(shown.input_ids, visual, shown.batch).square().mean().backward()
    moved = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.abs().sum() > 0}
    # B is zero, so that the first step moves it alone.
    assert any(name.startswith("projector.") for name in moved)
    assert {name for name in moved if "lora_" in name} == {
        name for name, _ in model.named_parameters() if "lora_B" in name
    }
    assert not any("base_layer" in name for name in moved)


def test_peft_itself_reads_the_adapters_that_are_written(tmp_path: Path) -> None:
    from peft import PeftModel

    plain, model = adapted()
    write_adapter(tmp_path / "adapter", model.state_dict(), RECIPE, "base-1")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["base"] == "base-1"
        assert set(file.keys()) == set(adapter_state(model.state_dict()))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 7, "LORA")
    theirs = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path / "adapter").eval()
    assert torch.equal(logits(theirs.get_base_model(), plain), logits(model, plain))  # type: ignore[arg-type]


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from skipvision.checkpoint import save_tensors
from skipvision.training.ending import end_at_once
from skipvision.training.lora import add_adapters, merged_state
from tests.training.test_lora import RECIPE, Path, few_steps, replace, tiny_model
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = tiny_model(dtype=torch.float32)
recipe = replace(RECIPE, dropout=0.0)
add_adapters(model.decoder, recipe)
mesh = init_device_mesh("cpu", (2,))
for layer in model.decoder.layers:
    fully_shard(layer, mesh=mesh)
few_steps(model)
state = model.state_dict()
whole = {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in state.items()}
if dist.get_rank() == 0:
    save_tensors(merged_state(whole, recipe), Path(sys.argv[1]))
dist.destroy_process_group()
end_at_once(0)
"""


def few_steps(model: SkipVisionModel) -> None:
    """Three steps of what learns in the decoder, on the same rows everywhere."""
    shown = batch_of(tiny_model(dtype=torch.float32), [[5, IMAGE, 7, 8], [9, 10, 11]])
    learning = [each for each in model.decoder.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-2)
    for _ in range(3):
        model(shown.input_ids, shown.visual, shown.batch).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.slow
def test_two_processes_with_shards_of_every_layer_learn_the_same(tmp_path: Path) -> None:
    _, model = adapted(replace(RECIPE, dropout=0.0), trained=False)
    before = merged_state(model.state_dict(), RECIPE)
    few_steps(model)
    alone = merged_state(model.state_dict(), RECIPE)
    script, result = tmp_path / "sharded.py", tmp_path / "state.safetensors"
    script.write_text(SHARDED)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(script), str(result)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sharded = load_file(result)
    assert sharded.keys() == alone.keys()
    q = "decoder.layers.0.attention.q.weight"
    assert not torch.allclose(before[q], alone[q], atol=1e-3)
    for name, tensor in alone.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-5, atol=1e-5)
