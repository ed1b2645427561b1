"""Whether the patches that show something are the ones retained, counted on unseen compositions in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skipvision.data.assets import Assets
from skipvision.data.names import GLYPHS, LABEL_IDS
from skipvision.data.scenes import render
from skipvision.select import split_tokens, token_scores
from skipvision.training.feature_cache import to_pixels
from svcli_export.source import read_source

COVERED = 0.2
"""Share of a patch that something must cover for the patch to count; the one from which it gets a label."""

Flags = npt.NDArray[np.bool_]


def measure_selection(source: Path, assets: Assets, num_pictures: int, threads: int) -> dict[str, Any]:
    """Recall of covered patches and of patches with a glyph, against what a random choice of as many would get.

    `source`: a checkpoint or a bundle that skips.
    """
    torch.set_num_threads(threads)
    model = read_source(source).model.float()
    skip = model.config.skip
    if skip is None:
        raise SystemExit(f"{source} does not skip: it selects nothing")
    glyph_ids = [LABEL_IDS[glyph] for glyph in GLYPHS]
    truths: dict[str, list[Flags]] = {"covered": [], "glyph": []}
    retained = []
    for seed in range(num_pictures):
        scene = render(assets, seed, "test")
        with torch.no_grad():
            _, attention = model.vision(torch.from_numpy(to_pixels(scene.image, model.config.vision))[None])
        index, _ = split_tokens(token_scores(skip.selector, attention, skip.num_retained), skip.num_retained)
        chosen = np.zeros(model.config.vision.num_patches, np.bool_)
        chosen[index[0].numpy()] = True
        retained.append(chosen)
        truths["covered"].append((scene.cover >= COVERED).ravel())
        truths["glyph"].append(np.isin(scene.labels, glyph_ids).ravel())
    found: dict[str, Any] = {"pictures": num_pictures, "random": skip.num_retained / model.config.vision.num_patches}
    for name, flags in truths.items():
        found[name] = recall(np.stack(flags), np.stack(retained))
    return found


def recall(wanted: Flags, retained: Flags) -> dict[str, float]:
    """Share of the wanted patches [N, P] among the retained [N, P]; `best` is what any choice of as many can reach."""
    num_retained = int(retained[0].sum())
    best = np.minimum(wanted.sum(1), num_retained).sum()
    return {
        "patches": int(wanted.sum()),
        "recall": float((wanted & retained).sum() / wanted.sum()),
        "best": float(best / wanted.sum()),
    }
