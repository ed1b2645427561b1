"""Recipes of papers, complete but for the base and the conversations, which are the user's.

Batches are of all processes; the papers had 8 GPUs, and `micro_batch_size` is what each of those held. What Skip-Vision
(ICCV 2025) is known to have trained with is in its table of hours, and in its authors' scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from skipvision.training.tune_recipe import LoraRecipe, SourceRecipe, TuneData, TuneOptim, TuneRecipe, What

Sources = tuple[SourceRecipe, ...]


def llava_stage1(base: str, sources: Sources) -> TuneRecipe:
    """Stage 1 of LLaVA-1.5 and of Skip-Vision: the projector alone, nothing skipped.

    LLaVA-1.5, arXiv 2310.03744, table 9; Skip-Vision's authors keep it for their linear projector. Chain-of-Sight's
    starts from a pre-training that is not public.
    """
    return _recipe(
        base, sources, "projector", "off", TuneOptim(batch_size=256, micro_batch_size=32, learning_rate=1e-3)
    )


def llava_sft(base: str, sources: Sources) -> TuneRecipe:
    """Stage 2 of LLaVA-1.5: projector and decoder, nothing skipped.

    LLaVA-1.5, arXiv 2310.03744, table 9. Skip-Vision's authors train their dense models at 1e-5, six sequences a GPU:
    the dense twin of a `sv-` preset is that preset with `preset = "off"`.
    """
    return _recipe(base, sources, "full", "off", TuneOptim(batch_size=128, micro_batch_size=16, learning_rate=2e-5))


def llava_lora(base: str, sources: Sources) -> TuneRecipe:
    """Stage 2 of LLaVA-1.5 with adapters in place of the decoder, nothing skipped.

    LLaVA-1.5's published script for LoRA. Skip-Vision was not trained with adapters: with a skip `preset` this is ours.
    """
    optim = TuneOptim(batch_size=128, micro_batch_size=16, learning_rate=2e-4, projector_learning_rate=2e-5)
    return _recipe(base, sources, "lora", "off", optim)


def skip_vision(base: str, sources: Sources, *, preset: str) -> TuneRecipe:
    """Stage 2 of Skip-Vision: projector, summary and decoder.

    The authors' scripts: 1e-5, no weight decay, eight sequences on each of 8 GPUs, 2,048 rows. Of the runs on Vicuna
    the rate and the batch are not known; these are those of the others.
    """
    return _recipe(base, sources, "full", preset, TuneOptim(batch_size=64, micro_batch_size=8, learning_rate=1e-5))


def sv_cos(base: str, sources: Sources) -> TuneRecipe:
    """Stage 2 of Skip-Vision on Chain-of-Sight: vision tower, resampler, summary and decoder.

    As `skip_vision`. That the tower learns, each layer by 0.9 slower than the next, is known of the run on ten million
    samples alone; whether it does in the runs of table 1 is not known. `optim.vision_learning_rate = 0` freezes it.
    """
    optim = TuneOptim(
        batch_size=64, micro_batch_size=8, learning_rate=1e-5, vision_learning_rate=1e-5, vision_decay=0.9
    )
    return _recipe(base, sources, "full", "sv-cos-272", optim)


def _recipe(base: str, sources: Sources, what: What, preset: str, optim: TuneOptim) -> TuneRecipe:
    return TuneRecipe(
        base,
        TuneData(sources, max_length=2048, group_by_length=True),
        what,
        preset,
        optim=optim,
        lora=LoraRecipe(rank=128, alpha=256, dropout=0.05),
        checkpoint_activations=True,
    )


TUNE_PRESETS: Mapping[str, Callable[[str, Sources], TuneRecipe]] = {
    "llava-stage1": llava_stage1,
    "llava-sft": llava_sft,
    "llava-lora": llava_lora,
    "sv-llava-100": partial(skip_vision, preset="sv-llava-100"),
    "sv-llava-256": partial(skip_vision, preset="sv-llava-256"),
    "sv-llava-hd": partial(skip_vision, preset="sv-llava-hd"),
    "sv-cos-272": sv_cos,
    "sv-vicuna-64": partial(skip_vision, preset="sv-vicuna-64"),
}
