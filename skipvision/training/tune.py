"""Trains a model that there is on conversations about pictures."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.checkpoint import save_weights
from skipvision.model import SkipVisionModel, attention_mask
from skipvision.training.base import Base
from skipvision.training.collate import Batch
from skipvision.training.conversation import Broken, Source, broken_samples
from skipvision.training.distributed import Processes, joined
from skipvision.training.errors import TrainError
from skipvision.training.events import Report, StageEvent
from skipvision.training.index import Index, scan_once
from skipvision.training.learning import parameter_groups, recompute_layers, set_learning
from skipvision.training.loop import STATES, LoopSettings, run
from skipvision.training.lora import merged_state, write_adapter
from skipvision.training.plan import Ints, MicroPlan, Plan, Samples, by_length, in_turn
from skipvision.training.reader import Reader
from skipvision.training.sources import open_sources
from skipvision.training.speaker import IGNORE
from skipvision.training.task import MicroBatch, Objective, Validation
from skipvision.training.tune_recipe import TuneRecipe

_INDEX = "index.safetensors"
_ASIDE = ("base", "save", "log", "checkpoint_activations", "data.num_workers", "data.max_broken")
"""Parts of a recipe that change nothing of what is learned; which base it is, its weights say."""


def tune(recipe: TuneRecipe, base: Base, output: Path, report: Report, *, fresh: bool = False) -> Path:
    """Trains `base` by `recipe` into `output`, and returns the finished checkpoint's folder.

    A run that was stopped goes on, unless `fresh`. Under torchrun all processes call this. Raises TrainError, PlanError
    and what reading raises.
    """
    with joined() as processes:
        if processes.is_first and (fresh or not any((output / STATES).glob("step-*"))):
            (output / _INDEX).unlink(missing_ok=True)  # pictures may have been mended since
        shown = look_at(recipe, base, output, report, processes)
        task = TuneTask(recipe, base, shown)
        optim, save = recipe.optim, recipe.save
        settings = LoopSettings(
            seed=recipe.seed,
            identity=_identity(recipe, base, shown),
            warmup_share=optim.warmup_share,
            min_learning_rate=optim.min_learning_rate,
            betas=optim.betas,
            max_grad_norm=optim.max_grad_norm,
            save_every=save.every,
            keep=save.keep,
            validate_every=save.validate_every,
            max_broken=recipe.data.max_broken,
            precision=recipe.precision,
            deterministic=recipe.deterministic,
        )
        return run(task, settings, output, report, fresh=fresh)


@dataclass(frozen=True)
class Shown:
    """Sources, those of validation last, and what is known of their samples."""

    sources: Sequence[Source]
    index: Index
    num_validation: int
    """Sources of validation."""

    @property
    def places(self) -> Ints:
        """[N, 2]: source of each sample, and its index there."""
        sizes = self.index.sizes
        inside = [np.arange(size) for size in sizes]
        return np.stack([np.repeat(np.arange(len(sizes)), sizes), np.concatenate(inside)], 1)


def look_at(recipe: TuneRecipe, base: Base, output: Path, report: Report, processes: Processes) -> Shown:
    """Opens all sources and measures their samples, the first process for all; once, and then from a file in `output`.

    Raises TrainError where more samples are broken than the recipe allows.
    """
    data, config = recipe.data, base.model.config
    sources = open_sources([*data.sources, *data.validation])

    def scanned(done: int, total: int) -> None:
        if processes.is_first:
            report(StageEvent("looking at samples", done, total))

    given = output / _INDEX, sources, base.speaker, config, data.max_length
    index = scan_once(*given, report=scanned, workers=data.num_workers) if processes.is_first else None
    processes.wait()
    index = index or scan_once(*given, report=scanned)
    if len(index.broken) > data.max_broken:
        first = next(iter(index.broken.values()))
        raise TrainError(
            f"{broken_samples(len(index.broken), len(index))}, and data.max_broken allows {data.max_broken};"
            f" the first: {first.name}: {first.reason}; `svcli data check` lists them all"
        )
    return Shown(sources, index, len(data.validation))


def _identity(recipe: TuneRecipe, base: Base, shown: Shown) -> dict[str, str]:
    settings = asdict(recipe)
    for name in _ASIDE:
        part, _, key = name.rpartition(".")
        del (settings[part] if part else settings)[key]
    # What a sample's pictures are is in no fingerprint, but decides which samples are shown when.
    rows = hashlib.sha256(shown.index.rows.tobytes()).hexdigest()
    said = {
        "recipe": settings,
        "data set": [rows, *([source.fingerprint, len(source)] for source in shown.sources)],
        "base": [base.identity, base.model.config.to_json(), dict(sorted(base.speaker.files().items()))],
    }
    return {name: hashlib.sha256(json.dumps(each).encode()).hexdigest() for name, each in said.items()}


class TuneModule(nn.Module):
    """A model with its loss."""

    def __init__(self, model: SkipVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> Objective:
        """Cross entropy of a `Batch`, summed over all rows that have something to say; no others reach the head.

        Dropout and the random selector draw from torch's own generator.
        """
        assert isinstance(batch, Batch)
        model, device = self.model, self.model.decoder.embed.weight.device
        if batch.cuts:
            visual = model.encode_pictures(batch.pixels.to(device), batch.cuts)
        else:
            visual = self._nothing().expand(1, 1, model.config.text.hidden_size)
        hidden = model.embed(batch.input_ids.to(device), visual, batch.source.to(device))
        seen = batch.order, batch.visible_until
        # Without a mask there are kernels that leave out half of the pairs.
        mask = None if batch.is_causal else attention_mask(*(each.to(device) for each in seen))
        hidden = model.decoder(hidden, batch.positions.to(device), mask, batch.num_kept)
        labels = batch.labels.to(device)
        answers = labels != IGNORE
        logits = model.decoder.logits(hidden[answers]).float()
        total = F.cross_entropy(logits, labels[answers], reduction="sum")
        return Objective(total, float(batch.counts.answer_tokens), total.detach())

    def _nothing(self) -> Tensor:
        """Zero, on which all that projects pictures has no influence, but takes part: processes that share layers must
        compute the same gradients, and where the projector alone learns, text alone would ask for none."""
        model = self.model
        parts = (*model.projector.parameters(), *(model.summary.parameters() if model.summary is not None else ()))
        taken = [*parts, *([model.newline] if model.newline is not None else [])]
        return torch.stack([each.sum() for each in taken]).sum() * 0


class TuneTask:
    """What a recipe asks of a base model, for the loop."""

    def __init__(self, recipe: TuneRecipe, base: Base, shown: Shown) -> None:
        """Takes the model of `base` and changes it. Raises PlanError where there is nothing to train on."""
        self.recipe, self.base = recipe, base
        self.config = base.model.config
        self.plan, self.validation = plan_of(recipe, shown)
        self.num_steps = recipe.optim.steps or self.plan.num_steps(recipe.optim.epochs)
        self.reader = Reader(shown.sources, shown.places, base.speaker, self.config, recipe.data.max_length)
        self._rows, self._broken = shown.index.rows, tuple(shown.index.broken.values())
        set_learning(base.model, recipe)
        if recipe.checkpoint_activations:
            recompute_layers(base.model)
        self.module: nn.Module = TuneModule(base.model)

    def parameter_groups(self) -> list[dict[str, object]]:
        """Of the module as it is now, sharded or whole."""
        return parameter_groups(self.base.model, self.recipe.optim)

    def batches(self, first_step: int, rank: int, world: int) -> Iterator[Sequence[MicroBatch]]:
        """Each process reads its own. What was broken before the first step is named in it."""
        sizes: deque[int] = deque()

        def micros() -> Iterator[MicroPlan]:
            for step in range(first_step, self.num_steps):
                share = self.plan.share(step, rank, world)
                sizes.append(len(share))
                yield from share

        batches = self.reader.batches(micros(), self.recipe.data.num_workers)
        known = self._broken if rank == 0 else ()
        for first in batches:
            step = [
                replace(first, broken=(*known, *first.broken)),
                *(next(batches) for _ in range(sizes.popleft() - 1)),
            ]
            known = ()
            yield step

    def validate(self) -> Validation:
        """Mean loss of the answers' tokens; processes share the samples."""
        if not len(self.validation):
            return Validation()
        with joined() as processes:
            micros = by_length(self.validation, self._rows, self.recipe.optim.micro_batch_size)
            share = in_turn(micros, processes.rank, processes.world)
            loss = weight = 0.0
            broken: list[Broken] = []
            for number, batch in enumerate(self.reader.batches(share, self.recipe.data.num_workers)):
                torch.manual_seed(number * processes.world + processes.rank)  # of the random selector
                objective: Objective = self.module(batch)
                loss, weight = loss + objective.total.item(), weight + objective.weight
                broken += batch.broken
            sums = np.array(processes.exchange([loss, weight])).sum(0)
        return Validation({"loss": float(sums[0] / sums[1])} if sums[1] else {}, broken)

    def write_checkpoint(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """A plain model: adapters are merged into its weights, and also written beside it as they are."""
        weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        if self.recipe.what == "lora":
            write_adapter(folder.parent / "adapter", weights, self.recipe.lora, self.base.identity)
            weights = merged_state(weights, self.recipe.lora)
        save_weights(self.config.as_trained(), weights, folder, self.base.speaker.files())


def plan_of(recipe: TuneRecipe, shown: Shown) -> tuple[Plan, Ints]:
    """Also the samples that are validated on. Raises PlanError where nothing is left to train on."""
    data, optim, index = recipe.data, recipe.optim, shown.index
    num_trained = sum(index.sizes[: len(index.sizes) - shown.num_validation])
    rows = index.rows.copy()
    rows[num_trained:] = 0
    weights = [source.weight for source in (*data.sources, *data.validation)]
    plan = Plan(
        Samples(rows, index.pictures > 0, np.repeat(weights, index.sizes)),
        batch_size=optim.batch_size,
        micro_batch_size=optim.micro_batch_size,
        max_length=data.max_length,
        pack=data.pack,
        group_by_length=data.group_by_length,
        held_out=data.validation_samples,
        seed=recipe.seed,
    )
    validation = num_trained + np.flatnonzero(index.rows[num_trained:])
    return plan, validation if data.validation else plan.held_out
