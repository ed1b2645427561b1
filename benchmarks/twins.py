"""Trains the twins of a recipe at one short, equal budget and judges them on unseen compositions.

    python -m benchmarks.twins recipes/skipvision-tiny.toml --assets build/assets --steps 1000 [--only dense blind]

dense: skipping off. skip: as the recipe says. skip-half: half as many retained. random-drop: as many rows in the KV
cache as `skip`, chosen blindly, the rest dropped. blind: no picture at all. Same pictures, questions, batches, steps
and seed for all, and at most half as many steps of alignment. A run that was stopped goes on; results are merged into
benchmarks/results/twins.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer

from skipvision.checkpoint import load_checkpoint
from skipvision.config import SkipConfig
from skipvision.data import assets as data_assets
from skipvision.training.evaluate import accuracy, answer_all
from skipvision.training.events import Event, StepEvent, ValidationEvent
from skipvision.training.feature_cache import FeatureCache, cache_key, encoded, scene_pictures
from skipvision.training.recipes import read_scratch_recipe
from skipvision.training.scratch import train
from skipvision.training.scratch_recipe import ScratchRecipe

RESULTS = Path(__file__).parent / "results" / "twins.json"
TEST_PICTURES, QUESTIONS = 400, 6


def variants(recipe: ScratchRecipe, steps: int) -> dict[str, ScratchRecipe]:
    """The recipe of each twin."""
    skip = recipe.model.skip
    if skip is None:
        raise SystemExit("the recipe does not skip: there is nothing to compare")
    align_steps = min(recipe.optim.align_steps, steps // 2)
    short = replace(recipe, optim=replace(recipe.optim, steps=steps, align_steps=align_steps))

    def with_skip(changed: SkipConfig | None) -> ScratchRecipe:
        return replace(short, model=replace(recipe.model, skip=changed))

    # One summary row is kept beside what is retained, two where tokens are skipped.
    random_drop = SkipConfig(num_retained=skip.num_retained + 1, num_skipped=0, selector="random")
    return {
        "skip": short,
        "dense": with_skip(None),
        "skip-half": with_skip(replace(skip, num_retained=skip.num_retained // 2)),
        "random-drop": with_skip(random_drop),
        "blind": replace(short, blind=True),
    }


def test_pictures(recipe: ScratchRecipe, encoder_from: Path, cache_root: Path) -> FeatureCache:
    """Encoded unseen compositions, with partly unseen wordings."""
    assets = data_assets.load(Path(recipe.assets))
    directory = cache_root / cache_key(recipe.model.vision, recipe.data) / f"test-{TEST_PICTURES}"
    pictures = scene_pictures(assets, "test", range(TEST_PICTURES), 1, QUESTIONS)
    return encoded(directory, pictures, load_checkpoint(encoder_from).vision, lambda _done, _new: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--assets", required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/features"))
    parser.add_argument("--runs", type=Path, default=Path("build/twins"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = replace(read_scratch_recipe(options.recipe), assets=options.assets)
    for name, twin in variants(recipe, options.steps).items():
        if options.only is not None and name not in options.only:
            continue
        started = time.monotonic()

        def report(event: Event, name: str = name) -> None:
            if isinstance(event, ValidationEvent) or (isinstance(event, StepEvent) and event.step % 50 == 0):
                print(name, event, flush=True)

        checkpoint = train(twin, options.runs / f"{name}-{options.steps}", report, cache_root=options.cache)
        minutes = (time.monotonic() - started) / 60
        cache = test_pictures(recipe, checkpoint, options.cache)
        asked = [(index, question) for index in range(len(cache)) for question in cache.questions[index][0]]
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        scores = accuracy(answer_all(load_checkpoint(checkpoint), tokenizer, cache, asked, blind=twin.blind))
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"twins": {}}
        results["machine"] = f"{platform.machine()}, torch {torch.__version__}"
        results["date"] = str(date.today())
        results["twins"][name] = {
            "steps": options.steps,
            "threads": options.threads,
            "minutes": round(minutes, 1),
            "pictures": TEST_PICTURES,
            "questions": len(asked),
            "accuracy": {task: round(share, 4) for task, share in scores.items()},
        }
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(name, scores, flush=True)


if __name__ == "__main__":
    main()
