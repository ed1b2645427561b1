"""What a recipe's conversations hold, and what is wrong with them, before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skipvision.config import ModelConfig
from skipvision.training.conversation import Broken, broken_samples
from skipvision.training.index import Index, Scanned, scan
from skipvision.training.plan import PlanError
from skipvision.training.sources import open_sources
from skipvision.training.speaker import Speaker
from skipvision.training.tune import Shown, plan_of
from skipvision.training.tune_recipe import TuneRecipe


@dataclass(frozen=True)
class Spread:
    """Of a number that each sample has."""

    mean: float
    p50: int
    p95: int
    most: int

    @staticmethod
    def of(values: npt.NDArray[np.int64]) -> Spread:
        """All 0 where there are none."""
        if not len(values):
            return Spread(0, 0, 0, 0)
        p50, p95 = (int(each) for each in np.percentile(values, (50, 95), method="inverted_cdf"))
        return Spread(float(values.mean()), p50, p95, int(values.max()))


@dataclass(frozen=True)
class SourceFacts:
    """Of one source, or of all; broken samples count in `samples` and `broken` alone."""

    name: str
    samples: int
    with_pictures: int
    text_alone: int
    pictures: int
    rows: Spread
    """Of a sample, visual ones included, skipped ones too."""
    answer_tokens: Spread
    visual_kept: int
    """Rows of all pictures together that pass the FFN."""
    visual_skipped: int
    visual_plain: int
    """Those of the plain model."""
    broken: Mapping[str, int]
    """Samples by what is wrong with them."""

    @staticmethod
    def of(name: str, index: Index, start: int, stop: int) -> SourceFacts:
        """Of samples `start` to `stop`."""
        good = start + np.flatnonzero(index.rows[start:stop])
        pictures = index.pictures[good]
        kept = int(index.visual_kept[good].sum())
        kinds = Counter(each.kind for number, each in index.broken.items() if start <= number < stop)
        return SourceFacts(
            name=name,
            samples=stop - start,
            with_pictures=int((pictures > 0).sum()),
            text_alone=int((pictures == 0).sum()),
            pictures=int(pictures.sum()),
            rows=Spread.of(index.rows[good]),
            answer_tokens=Spread.of(index.answers[good]),
            visual_kept=kept,
            visual_skipped=int(index.visual[good].sum()) - kept,
            visual_plain=int(index.visual_plain[good].sum()),
            broken=dict(kinds.most_common()),
        )


@dataclass(frozen=True)
class DataFacts:
    """Of all sources of a recipe, those of validation last."""

    sources: tuple[SourceFacts, ...]
    whole: SourceFacts
    broken: tuple[Broken, ...]
    max_broken: int
    steps_per_epoch: int
    """0 where nothing is left to train on."""
    problem: str | None
    """Why a run would stop before its first step, in one sentence."""


def check_data(
    recipe: TuneRecipe, speaker: Speaker, config: ModelConfig, report: Scanned, workers: int = 0
) -> DataFacts:
    """Reads all samples, pictures to their ends, with `workers` processes or in this one.

    Raises DataSetError for a source that cannot be opened.
    """
    data = recipe.data
    sources = open_sources([*data.sources, *data.validation])
    index = scan(sources, speaker, config, data.max_length, decode=True, report=report, workers=workers)
    problem, steps = None, 0
    try:
        plan, _ = plan_of(recipe, Shown(sources, index, len(data.validation)))
        steps = plan.steps_of(0)
    except PlanError as error:
        problem = str(error)
    count, allowed = len(index.broken), data.max_broken
    if count > allowed:
        problem = f"{broken_samples(count, len(index))}, and data.max_broken allows {allowed:,}"
    spans = zip(sources, index.starts.tolist(), index.starts[1:].tolist(), strict=False)
    return DataFacts(
        sources=tuple(SourceFacts.of(source.name, index, start, stop) for source, start, stop in spans),
        whole=SourceFacts.of("all", index, 0, len(index)),
        broken=tuple(index.broken.values()),
        max_broken=data.max_broken,
        steps_per_epoch=steps,
        problem=problem,
    )
