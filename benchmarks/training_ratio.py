"""Times optimiser steps of a plain model and of one that skips, at the paper's settings, in turn in one process.

    python -m benchmarks.training_ratio [--settings sv-llava-100 ...] [--batch-size N] [--layers N] [--steps N]
                                        [--device cuda --divisor 1]

Both have the same decoder, batch size, pictures and texts. The decoder's layers are those of LLaMA-3-8B with every
width divided by `--divisor` and heads of the same size: weights keep their proportions, and attention costs more beside
them than there. A step is forward, backward and AdamW's update, from what the projector hands out: selection, merge and
summaries count. Nothing flows through the encoder.

The plain model runs with the mask that a skipping one needs, and with a causal kernel that needs none; the faster of
them is what skipping is held against. Variants take turns, forwards and backwards; the first round does not count. Each
setting is written when it is done, beside those that the file holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_speed import TEXT
from benchmarks.measuring import RESULTS, compared, ratio, spread, surroundings, write_results
from skipvision.config import ModelConfig, ResamplerConfig, TextConfig, TilesConfig, Visibility, VisionConfig
from skipvision.cost import decoder_flops, head_flops, merge_flops
from skipvision.layout import BatchLayout, ImageSpan, TokenLayout
from skipvision.model import BatchTensors, SkipVisionModel, attention_mask
from skipvision.presets import PRESETS, Setting
from skipvision.training.precision import compute_dtype
from svcli.bench.cpu import available_cores

RESULT = RESULTS / "training_ratio.json"
TRUE = TEXT["llama-3-8b"]
SETTINGS = ("sv-llava-100", "sv-llava-256", "sv-cos-272", "sv-llava-hd")
PROMPT_ROWS, ANSWER_ROWS = 40, 60
STAGES = ("forward", "backward", "optimiser")
WORK = ("matmul", "attention", "copies", "optimiser", "rest")
"""What a step's time is spent on. Copies are those of weights and gradients between fp32 and bf16, above all."""
_PROFILED = 3
_VOCABULARY = 1024
_WARM_UP = 1
_TOWER = VisionConfig(336, 14, 16, 16, 1, 1, feature_layers=(1,), select_layer=1)
"""Says how many tokens there are, and never runs."""


def scaled(text: TextConfig, divisor: int, num_layers: int) -> TextConfig:
    """Every width divided by `divisor`, and heads of the same size; a small vocabulary, tied."""
    return replace(
        text,
        vocab_size=_VOCABULARY,
        hidden_size=text.hidden_size // divisor,
        intermediate_size=text.intermediate_size // divisor,
        num_layers=num_layers,
        num_heads=text.num_heads // divisor,
        num_kv_heads=text.num_kv_heads // divisor,
        tie_embeddings=True,
    )


def plain_config(setting: Setting, text: TextConfig) -> ModelConfig:
    """A model whose visual tokens are those of the setting: patches, five views of them, or a resampler's."""
    if setting.num_views > 1:
        size = 2 * _TOWER.image_size
        return ModelConfig(_TOWER, text, tiles=TilesConfig(sizes=((size, size),)))
    if setting.is_ranked:
        return ModelConfig(_TOWER, text)
    return ModelConfig(
        replace(_TOWER, image_size=448),
        text,
        projector="resampler",
        resampler=ResamplerConfig(),
        projector_norm=False,
        projector_position=False,
    )


def sequence(span: ImageSpan, visibility: Visibility) -> TokenLayout:
    """One picture inside of its prompt, and an answer."""
    return TokenLayout((PROMPT_ROWS // 2, span, PROMPT_ROWS - PROMPT_ROWS // 2 + ANSWER_ROWS), visibility)


def step_flops(text: TextConfig, setting: Setting, *, skips: bool) -> int:
    """One sequence's share of a step, from visual tokens on. Backward counts twice forward."""
    forward = decoder_flops(text, sequence(setting.skipped if skips else setting.plain, "all"))
    forward += ANSWER_ROWS * head_flops(text)
    if skips:
        split = setting.num_tokens, setting.num_retained, setting.num_skipped, setting.num_unpooled
        forward += merge_flops(text.hidden_size, *split)
    return 3 * forward


def flops_ratio(text: TextConfig, setting: Setting) -> dict[str, float]:
    """A step's FLOPs, dense and skipped, and what the second is of the first."""
    counts = {name: step_flops(text, setting, skips=name == "skipped") for name in ("dense", "skipped")}
    return counts | {"ratio": counts["skipped"] / counts["dense"]}


@dataclass(frozen=True)
class Examples:
    """One batch, the same for every variant."""

    tokens: Tensor
    """[B, T, D] as the projector hands them out."""
    attention: Tensor
    """[B, T] that ranks them."""
    input_ids: Tensor
    """[B, PROMPT_ROWS + ANSWER_ROWS + 1], the picture's placeholder among them."""
    labels: Tensor
    """[B, ANSWER_ROWS]."""

    @staticmethod
    def drawn(setting: Setting, text: TextConfig, batch_size: int, device: str, dtype: torch.dtype) -> Examples:
        """At random, and always the same."""
        source = torch.Generator().manual_seed(0)
        tokens = torch.randn(batch_size, setting.num_tokens, text.hidden_size, generator=source)
        attention = torch.rand(batch_size, setting.num_tokens, generator=source)
        shape = batch_size, PROMPT_ROWS + ANSWER_ROWS + 1
        ids = torch.randint(text.vocab_size, shape, generator=source)
        # The projector learns too, so that gradients are asked for.
        leaf = tokens.to(device, dtype).requires_grad_()
        return Examples(leaf, attention.to(device), ids.to(device), ids[:, -ANSWER_ROWS:].to(device))


@dataclass(frozen=True)
class Variant:
    """A model, how its rows stand, and whether its attention is told by a mask who looks at whom."""

    model: SkipVisionModel
    optimiser: torch.optim.Optimizer
    layout: TokenLayout
    batch: BatchTensors
    masked: bool

    @property
    def device(self) -> torch.device:
        return self.model.decoder.embed.weight.device

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _autocast(self, examples: Examples) -> torch.autocast:
        dtype = examples.tokens.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def loss(self, examples: Examples) -> tuple[Tensor, float]:
        """Mean over the answers, and the time when the visual rows were there."""
        model, batch = self.model, self.batch
        visual = model.split(examples.tokens, examples.attention)
        seen = self._now()
        hidden = model.embed(examples.input_ids, visual, batch.source)
        mask = attention_mask(batch.positions, batch.visible_until) if self.masked else None
        rows = model.decoder(hidden, batch.positions, mask, batch.num_kept)
        # Text stands behind the picture among the kept rows; each row predicts the next.
        logits = model.decoder.logits(rows[:, -ANSWER_ROWS - 1 : -1]).float()
        return F.cross_entropy(logits.flatten(0, 1), examples.labels.flatten()), seen

    def step(self, examples: Examples) -> dict[str, float]:
        """Seconds of a whole update and of its stages; `split` is a part of forward."""
        start = self._now()
        with self._autocast(examples):
            loss, seen = self.loss(examples)
        forward = self._now()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = self._now()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        examples.tokens.grad = None
        end = self._now()
        return {
            "step": end - start,
            "split": seen - start,
            "forward": forward - start,
            "backward": backward - forward,
            "optimiser": end - backward,
        }

    def saved_bytes(self, examples: Examples) -> int:
        """What a forward pass keeps for the backward pass, each piece of memory once; weights are left out, what
        autocast makes of them is not."""
        weights = {each.untyped_storage().data_ptr() for each in self.model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, self._autocast(examples):
            self.loss(examples)
        return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)

    def work(self, examples: Examples) -> dict[str, float]:
        """Seconds of one step by what they are spent on. A profiler slows what is small."""
        is_cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as found:
            self.step(examples)
        seconds = dict.fromkeys(WORK, 0.0)
        for event in found.key_averages():
            own = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            seconds[_kind(event.key)] += own / 1e6
        return seconds


def _kind(operation: str) -> str:
    if "attention" in operation:
        return "attention"
    if "adamw" in operation.lower():
        return "optimiser"
    kinds = dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"), "matmul") | {
        "aten::copy_": "copies"
    }
    return kinds.get(operation, "rest")


def variants(setting: Setting, text: TextConfig, batch_size: int, device: str) -> dict[str, Variant]:
    """`dense` and `skipped` are what is compared; of either there is another kind. Both begin with the same weights."""
    config = plain_config(setting, text)
    torch.manual_seed(0)
    with torch.device(device):
        plain = SkipVisionModel(config)
    skipping = SkipVisionModel(replace(config, skip=setting.skip_config(config))).to(device)
    skipping.load_state_dict(plain.state_dict(), strict=False)
    models = plain, skipping
    learning = [[*model.decoder.parameters(), *(model.summary or torch.nn.Module()).parameters()] for model in models]
    updates = [torch.optim.AdamW(parameters, lr=1e-5, fused=True) for parameters in learning]

    def variant(number: int, visibility: Visibility, *, masked: bool) -> Variant:
        layout = sequence((setting.plain, setting.skipped)[number], visibility)
        batch = BatchLayout.of([layout] * batch_size, layout.num_ids)
        rows = BatchTensors.of(batch, torch.device(device))
        return Variant(models[number].train(), updates[number], layout, rows, masked)

    return {
        "causal": variant(0, "all", masked=False),
        "masked": variant(0, "all", masked=True),
        "all": variant(1, "all", masked=True),
        "image": variant(1, "image", masked=True),
    }


def measure(setting: Setting, text: TextConfig, batch_size: int, steps: int, device: str) -> dict[str, Any]:
    """Times of `steps` steps of every variant, and what else tells them apart."""
    dtype = torch.bfloat16 if device == "cuda" else compute_dtype()
    runs = variants(setting, text, batch_size, device)
    examples = Examples.drawn(setting, text, batch_size, device, dtype)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for number in range(_WARM_UP + steps):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            rounds[name].append(runs[name].step(examples))
        print(f"{setting.title}: round {number + 1} of {_WARM_UP + steps}", file=sys.stderr)
    seconds = {
        name: {stage: [each[stage] for each in found[_WARM_UP:]] for stage in found[0]}
        for name, found in rounds.items()
    }
    baseline = min(("causal", "masked"), key=lambda name: spread(seconds[name]["step"])["median"])
    chosen = {"dense": baseline, "skipped": "all"}
    stages = {
        stage: compared({name: seconds[kind][stage] for name, kind in chosen.items()}) for stage in ("step", *STAGES)
    }
    flops = {"measured": flops_ratio(text, setting), "llama-3-8b": flops_ratio(TRUE, setting)}
    saved, real = 1 - flops["measured"]["ratio"], 1 - stages["step"]["ratio"]["ratio"]
    kept = {name: runs[kind].saved_bytes(examples) for name, kind in chosen.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "decoder": asdict(text),
        "rows": {name: runs[kind].layout.length for name, kind in chosen.items()},
        "baseline": baseline,
        **stages,
        "split": spread(seconds["all"]["split"]),
        "others": {
            name: spread(seconds[name]["step"])
            | {"to_baseline": ratio(seconds[name]["step"], seconds[baseline]["step"])}
            for name in runs
            if name not in chosen.values()
        },
        # The quickest of a few: one that something else came in the way of says nothing.
        "work": {
            name: min((runs[kind].work(examples) for _ in range(_PROFILED)), key=lambda found: sum(found.values()))
            for name, kind in chosen.items()
        },
        "saved_bytes": kept | {"ratio": kept["skipped"] / kept["dense"]},
        "flops": flops,
        "fall": {"flops": saved, "time": real, "quotient": real / saved},
    }


def add(name: str, found: Mapping[str, Any], path: Path) -> None:
    """Puts one setting beside those that the file holds."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_results({key: found if key == name else before[key] for key in SETTINGS if key in {*before, name}}, path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--divisor", type=int, default=4, choices=(1, 2, 4, 8), help="of the widths of LLaMA-3-8B")
    parser.add_argument("--batch-size", type=int, default=8, help="of both models")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="steps of each variant that count")
    parser.add_argument("--threads", type=int, default=available_cores())
    return parser.parse_args()


def main() -> None:
    """Measures and writes it down."""
    options = parse()
    torch.set_num_threads(options.threads)
    text = scaled(TRUE, options.divisor, options.layers)
    for name in options.settings:
        around = surroundings(options.threads)
        if options.device == "cuda":
            around["gpu"] = torch.cuda.get_device_name()
        found = around | measure(PRESETS[name], text, options.batch_size, options.steps, options.device)
        add(name, found, options.output)
        step, fall = found["step"], found["fall"]
        print(
            f"{name}: {step['dense']['median']:.2f} s dense ({found['baseline']}), {step['skipped']['median']:.2f} s"
            f" skipped; ratio {step['ratio']['ratio']:.3f} ({step['ratio']['low']:.3f} to {step['ratio']['high']:.3f});"
            f" FLOPs ratio {found['flops']['measured']['ratio']:.3f}, time falls by {fall['quotient']:.2f} of that"
        )


if __name__ == "__main__":
    main()
