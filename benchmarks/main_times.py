"""Times of the main table's variants, all in turn: training steps, and first tokens in PyTorch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.answering import visibility_of
from benchmarks.main_variants import TEXT_ROWS, Variant
from skipvision.config import RANKED
from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.training.distributed import Processes
from skipvision.training.scratch import ScratchTask, scratch_settings
from skipvision.training.update import Clock, Updater

_WARM_UP = 2


def step_seconds(tasks: Mapping[str, ScratchTask], steps: int) -> dict[str, list[float]]:
    """Times of `steps` updates of each, on the batches of the first."""
    updaters = {name: Updater(task, scratch_settings(task.recipe), Processes()) for name, task in tasks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for step in range(_WARM_UP + steps if tasks else 0):
        batch = next(iter(tasks.values())).batch(step)
        for name in list(tasks)[:: 1 if step % 2 else -1]:
            shown = [replace(batch, layout=tasks[name].layout)]
            start = time.perf_counter()
            clock = Clock(torch.device("cpu"))
            updaters[name].apply(step, updaters[name].gather(step, shown, clock), shown, clock)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[_WARM_UP:] for name, times in seconds.items()}


@torch.no_grad()
def first_token_seconds(
    models: Mapping[str, tuple[Variant, SkipVisionModel]], pixels: Tensor, rounds: int
) -> dict[str, list[float]]:
    """Times from pixels [1, 3, H, W] and ids to the logits of the first token."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(_WARM_UP + rounds):
        for name in list(models)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            first_token(*models[name], pixels)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[_WARM_UP:] for name, times in seconds.items()}


def first_token(variant: Variant, model: SkipVisionModel, pixels: Tensor) -> Tensor:
    """Logits [1, vocab] behind one picture and the text rows."""
    text = torch.zeros(1, TEXT_ROWS, dtype=torch.long)
    if variant.blind:
        batch = BatchLayout.of([TokenLayout((TEXT_ROWS,))], TEXT_ROWS)
        nothing = pixels.new_zeros(0, 1, model.config.text.hidden_size)
        return variant.prefill()(model, text, nothing, batch, TEXT_ROWS)[0]
    selector = model.config.skip.selector if model.config.skip is not None else None
    ranked_by = "cls_attention" if variant.ranked else selector if selector in RANKED else None
    visual = model.visual_rows(*model.vision(pixels, ranked_by))
    batch = BatchLayout.of([TokenLayout((model.span, TEXT_ROWS), visibility_of(model))], 1 + TEXT_ROWS)
    ids = torch.cat([text[:, :1], text], 1)
    return variant.prefill()(model, ids, visual, batch, batch.num_kept)[0]
