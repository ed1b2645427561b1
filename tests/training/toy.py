"""Two small tasks that say what they did: a few linear layers, and a real model in tiny. Run under torchrun, too.

python toy.py OUTPUT KIND [--steps 6 ...]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skipvision.config import ModelConfig, SkipConfig, TextConfig, VisionConfig
from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.training.conversation import Broken
from skipvision.training.distributed import joined
from skipvision.training.ending import end_at_once, is_one_of_several
from skipvision.training.loop import LoopSettings, run
from skipvision.training.task import Counts, Objective, Validation

VOCABULARY, LENGTH, BATCH, IMAGE = 11, 5, 8, 0


@dataclass(frozen=True)
class Sample:
    """Ids of one sequence, and a picture where there is one."""

    name: str
    ids: Tensor
    picture: Tensor | None = None


NOTHING = Sample("nothing", torch.ones(LENGTH, dtype=torch.long))
"""What a process computes that has no samples: it must not miss what the others exchange."""


@dataclass(frozen=True)
class Micro:
    """Some samples of a step."""

    samples: tuple[Sample, ...]
    broken: tuple[Broken, ...] = ()

    @property
    def counts(self) -> Counts:
        return Counts(samples=len(self.samples), rows=sum(len(each.ids) for each in self.samples))

    @property
    def names(self) -> Sequence[str]:
        return [each.name for each in self.samples]


class Toy(nn.Module):
    """An embedding tied to a head, dropout, and a part that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.seldom = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, micro: Micro) -> Objective:
        nothing = self.embed.weight.sum() * 0
        answer, seldom, weight = nothing, nothing, 0
        for sample in micro.samples:
            hidden = self.embed(sample.ids[:-1])
            if sample.name.endswith("0"):  # some processes see none of these
                hidden = hidden + self.seldom(hidden)
                seldom = seldom + hidden.square().mean()
            for layer in self.layers:
                hidden = hidden + self.dropout(layer(self.frozen(hidden)).tanh())
            answer = answer + nn.functional.cross_entropy(self.head(hidden), sample.ids[1:], reduction="sum")
            weight += len(sample.ids) - 1
        return Objective(answer + 0.1 * seldom, weight, answer, {"seldom": seldom})


class Tiny(nn.Module):
    """A model that skips; sees pictures where there are any."""

    def __init__(self) -> None:
        super().__init__()
        vision = VisionConfig(
            image_size=8,
            patch_size=2,
            hidden_size=8,
            intermediate_size=16,
            num_layers=1,
            num_heads=2,
            feature_layers=(1,),
            select_layer=1,
        )
        text = TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
        )
        self.model = SkipVisionModel(ModelConfig(vision, text, SkipConfig(num_retained=6, num_skipped=4)))
        self.model.vision.requires_grad_(False)

    def forward(self, micro: Micro) -> Objective:
        model = self.model
        answer, weight = model.decoder.embed.weight.sum() * 0, 0
        for sample in micro.samples or (NOTHING,):
            seen = sample.picture is not None
            ids = [*([IMAGE] if seen else []), *sample.ids.tolist()]
            pixels = sample.picture if sample.picture is not None else torch.zeros(0, 3, 8, 8)
            layout = BatchLayout.of([TokenLayout.of(ids, IMAGE, model.config)], len(ids))
            logits = model(torch.tensor([ids]), model.encode_images(pixels), layout)[0, -LENGTH:-1]
            counts = sample is not NOTHING
            answer = answer + nn.functional.cross_entropy(logits, sample.ids[1:], reduction="sum") * counts
            weight += (LENGTH - 1) * counts
        return Objective(answer, weight, answer)


@dataclass
class ToyTask:
    """Batches from (seed, step); what goes wrong, on demand."""

    module: nn.Module
    num_steps: int = 6
    accumulate: int = 1
    """Micro-batches of a step, over all processes."""
    learning_rate: float = 0.02
    validation: Sequence[float] = ()
    """The loss of each validation, in turn."""
    broken_at: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """Names of broken samples, by step."""
    broken_in_validation: Sequence[Broken] = ()
    empty_at: Sequence[int] = ()
    nan_at: int = -1

    def parameter_groups(self) -> list[dict[str, object]]:
        learning = [each for each in self.module.parameters() if each.requires_grad]
        matrices, others = [each for each in learning if each.dim() > 1], [each for each in learning if each.dim() < 2]
        return [
            {"params": matrices, "lr": self.learning_rate, "weight_decay": 0.1},
            {"params": others, "lr": self.learning_rate / 2, "weight_decay": 0.0},
        ]

    def batches(self, first_step: int, rank: int, world: int) -> Iterator[Sequence[Micro]]:
        for step in range(first_step, self.num_steps):
            generator = torch.Generator().manual_seed(1000 + step)
            samples = [self._sample(step, number, generator) for number in range(BATCH)]
            size = BATCH // self.accumulate
            micros = [Micro(tuple(samples[start : start + size])) for start in range(0, BATCH, size)]
            if step in self.empty_at:
                micros = [Micro(()) for _ in micros]
            broken = tuple(Broken(name, "cut") for name in self.broken_at.get(step, ()))
            micros[0] = Micro(micros[0].samples, broken)
            yield [*micros, *[Micro(())] * (-len(micros) % world)][rank::world]

    def _sample(self, step: int, number: int, generator: torch.Generator) -> Sample:
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        picture = torch.randn(1, 3, 8, 8, generator=generator) if number % 3 == 0 else None
        if step == self.nan_at and number == 5:
            with torch.no_grad():
                self.module.get_parameter("layers.0.bias").fill_(torch.nan)
        return Sample(f"sample {step}.{number}", ids, picture)

    def validate(self) -> Validation:
        if not self.validation:
            return Validation()
        self.module(Micro((NOTHING,)))
        self.asked = getattr(self, "asked", -1) + 1
        return Validation({"loss": self.validation[self.asked], "accuracy": 0.5}, self.broken_in_validation)

    def write_checkpoint(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        folder.mkdir(exist_ok=True)
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")


def toy_task(kind: str, **settings: object) -> ToyTask:
    torch.manual_seed(0)
    return ToyTask(Toy() if kind == "toy" else Tiny(), **settings)  # type: ignore[arg-type]


def toy_settings(**settings: object) -> LoopSettings:
    given: dict[str, object] = {"seed": 3, "identity": {"recipe": "toy"}, "save_every": 2}
    given |= {"precision": "fp32", "device": "cpu"}
    return LoopSettings(**(given | settings))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=json.loads, help="each {output, kind, task, settings}")
    parser.add_argument("--kill-at", type=int, default=-1, help="step in which one process is killed")
    parser.add_argument("--kill-rank", type=int, default=0)
    parser.add_argument("--fail-rank", type=int, default=-1, help="process that fails in the second step")
    options = parser.parse_args()
    torch.set_num_threads(1)

    class Watched(ToyTask):
        """Dies in the midst of a step."""

        def batches(self, first_step: int, rank: int, world: int) -> Iterator[Sequence[Micro]]:
            for step, each in enumerate(super().batches(first_step, rank, world), start=first_step):
                if step == options.kill_at and rank == options.kill_rank:
                    os.kill(os.getpid(), signal.SIGKILL)
                if step == 1 and rank == options.fail_rank:
                    raise ValueError(f"process {rank} cannot go on")
                yield each

    try:
        with joined("cpu"):
            for job in options.jobs:
                task = Watched(**vars(toy_task(job["kind"], **job["task"])))
                run(task, toy_settings(**job["settings"]), Path(job["output"]), lambda _event: None)
    except ValueError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if is_one_of_several():
            end_at_once(int(end.code or 0))
        raise
    if is_one_of_several():
        end_at_once(0)
