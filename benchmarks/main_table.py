"""The paper's main table in small: every variant from one dense base, at one further budget, on the same batches.

    python -m benchmarks.main_table recipes/skipvision-tiny.toml --assets build/assets --runs build/main-table
    python -m benchmarks.main_table recipes/skipvision-tiny.toml --assets build/assets --runs build/main-table --time

As in the paper, skipping comes in the second stage. The base is the recipe without skipping, trained first where
RUNS/base/checkpoint is not there. Then each variant goes on from it, on a schedule of its own, with other questions
than the base was asked; a seed changes which pictures make a batch, their order and their questions, for all variants
alike. What is only applied uses the weights that the second stage gave another variant of the same seed. Judged as
`twins` are. All variants of the first seed come first.

Start it as often as there are cores: each takes what no other is at. A run that was stopped goes on, and a finished
one is merged into the results at once. --time measures steps and first tokens instead, all variants in turn, and wants
a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.answering import answers_by_picture, answers_by_question, visibility_of
from benchmarks.main_times import first_token_seconds, step_seconds
from benchmarks.main_variants import VARIANTS, Variant
from benchmarks.measuring import RESULTS, spread, surroundings, write_results
from benchmarks.received import Images, Received
from benchmarks.twins import QUESTIONS, TEST_PICTURES
from skipvision.checkpoint import load_checkpoint, save_tensors
from skipvision.data import assets as data_assets
from skipvision.data.scenes import render
from skipvision.data.split import Split
from skipvision.layout import TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.training.evaluate import Outcome, accuracy, answer_all
from skipvision.training.feature_cache import (
    FeatureCache,
    cache_key,
    easy_vqa_pictures,
    encoded,
    scene_pictures,
    to_pixels,
)
from skipvision.training.loop import run
from skipvision.training.recipes import read_scratch_recipe
from skipvision.training.scratch import Batches, ScratchBatch, ScratchTask, scratch_settings, train
from skipvision.training.scratch_recipe import ScratchRecipe

_WAIT = 20.0
"""Seconds between looks at what another worker is at."""
_SAVE_EVERY = 50
_WEIGHTS = "weights.safetensors"
_HEADS = ("patch_head.", "place_head.")


@dataclass(frozen=True)
class Plan:
    """What all variants share."""

    recipe: ScratchRecipe
    """Of the second stage; its seed is replaced."""
    seeds: tuple[int, ...]
    runs: Path
    cache: Path
    """Root of the encoded pictures."""
    results: Path
    threads: int
    base_steps: int

    @property
    def design(self) -> dict[str, Any]:
        """What results of different runs must agree in."""
        optim = self.recipe.optim
        return {
            "base_steps": self.base_steps,
            "steps": optim.steps,
            "batch_size": optim.batch_size,
            "learning_rate": optim.learning_rate,
            "warmup_steps": optim.warmup_steps,
            "test_pictures": TEST_PICTURES,
            "questions_per_picture": QUESTIONS,
        }

    @property
    def features(self) -> Path:
        return self.cache / cache_key(self.recipe.model.vision, self.recipe.data)

    def folder(self, name: str, seed: int) -> Path:
        return self.runs / f"seed-{seed}" / name


class Bench:
    """Base, tokenizer and pictures, and what is done with them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        checkpoint = plan.runs / "base" / "checkpoint"
        self.base = load_checkpoint(checkpoint)
        self.heads = read_heads(plan.runs / "base")
        self.tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self.assets = data_assets.load(Path(plan.recipe.assets))
        data = plan.recipe.data
        training = scene_pictures(
            self.assets, "train", range(data.num_scenes), data.question_draws, data.questions_per_draw
        )
        self.training = encoded(plan.features / "train", training, self.base.vision, _quiet)
        if data.easy_vqa:
            official = easy_vqa_pictures(Path(plan.recipe.assets), "train", plan.recipe.model.vision.num_patches)
            folder = plan.features / "easy_vqa"
            self.training.extend(encoded(folder, islice(official, data.easy_vqa), self.base.vision, _quiet))
        test = scene_pictures(self.assets, "test", range(TEST_PICTURES), 1, QUESTIONS)
        self.test = encoded(plan.features / f"test-{TEST_PICTURES}", test, self.base.vision, _quiet)

    def pictures(self, variant: Variant, split: Split) -> FeatureCache:
        """Encoded, with the scores that the variant ranks patches by."""
        cache = self.training if split == "train" else self.test
        if not variant.received:
            return cache
        return Received(cache, self.fresh(variant).vision, Images(self.plan.recipe, self.assets, split))

    def fresh(self, variant: Variant) -> SkipVisionModel:
        """The variant before the second stage."""
        return variant.make(self.base)

    def trained(self, name: str, seed: int) -> SkipVisionModel:
        """The variant behind the second stage. Goes on where it was stopped."""
        variant, folder = VARIANTS[name], self.plan.folder(name, seed)
        weights = self.plan.folder(variant.weights_of or name, seed) / "checkpoint" / _WEIGHTS
        model = self.fresh(variant)
        if not weights.exists():
            self.train(variant, model, seed, folder)
        model.load_state_dict(load_file(weights), strict=False)
        return model.eval()

    def task(self, variant: Variant, model: SkipVisionModel, seed: int) -> SecondStage:
        """The second stage of `model`, on the batches of the seed."""
        recipe = replace(self.plan.recipe, seed=seed, blind=variant.blind)
        batches = Batches(recipe, self.pictures(variant, "train"), self.tokenizer)
        return SecondStage(recipe, model, self.tokenizer, batches, self.heads, self.first_step)

    def train(self, variant: Variant, model: SkipVisionModel, seed: int, folder: Path) -> None:
        """The second stage, into folder/checkpoint. Goes on where it was stopped."""
        task = self.task(variant, model, seed)
        run(task, scratch_settings(task.recipe), folder, lambda _event: None)
        shutil.rmtree(folder / "states")

    @property
    def first_step(self) -> int:
        """Where the second draw of questions begins: the base was asked the first."""
        return len(self.training) // self.plan.recipe.optim.batch_size

    def judged(self, variant: Variant, model: SkipVisionModel, seed: int) -> list[Outcome]:
        """Answers to all questions of the test."""
        cache = self.pictures(variant, "test")
        indices, generator = range(len(cache)), torch.Generator().manual_seed(seed)
        if variant.blind:
            asked = [(index, question) for index in indices for question in cache.questions[index][0]]
            return answer_all(model, self.tokenizer, cache, asked, blind=True)
        if variant.fastv:
            return answers_by_question(model, self.tokenizer, cache, indices, variant.prefill())
        return answers_by_picture(model, self.tokenizer, cache, indices, evicts=variant.evicts, generator=generator)

    def finish(self, name: str, seed: int) -> None:
        """Trains where that is wanted, judges, and merges what was found."""
        variant, started = VARIANTS[name], time.monotonic()
        model = self.trained(name, seed)
        outcomes = self.judged(variant, model, seed)
        scores = accuracy(outcomes)
        said = [outcome.answer for outcome in outcomes]
        folder = self.plan.folder(name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "answers.json").write_text(json.dumps(said), encoding="utf-8")
        found: dict[str, Any] = {"accuracy": scores}
        twin = self.plan.folder(variant.weights_of, seed) / "answers.json"
        if variant.weights_of and twin.exists():
            pairs = zip(said, json.loads(twin.read_text(encoding="utf-8")), strict=True)
            found["same_answers"] = sum(ours == theirs for ours, theirs in pairs) / len(said)
        self.merge(name, seed, found, model)
        print(f"{name}, seed {seed}: {scores['all']:.4f}, {time.monotonic() - started:.0f} s", flush=True)

    def merge(self, name: str, seed: int, found: dict[str, Any], model: SkipVisionModel) -> None:
        """Into the results, which other workers write too."""
        variant = VARIANTS[name]
        with locked(self.plan.runs / "results.lock"):
            results = read_results(self.plan)
            prefill, cache = variant.rows(model)
            row = results["variants"].setdefault(name, {"seeds": {}})
            row |= {"title": variant.title, "group": variant.group, "trained": not variant.weights_of}
            row |= {"prefill_rows": prefill, "cache_rows": cache, "flops": variant.flops(model)}
            row["seeds"][str(seed)] = found
            results["variants"] = {each: results["variants"][each] for each in VARIANTS if each in results["variants"]}
            replace_results(results, self.plan.results)


class SecondStage(ScratchTask):
    """Further steps of a base, in whatever way its visual rows are spent."""

    def __init__(
        self,
        recipe: ScratchRecipe,
        model: SkipVisionModel,
        tokenizer: Tokenizer,
        batches: Batches,
        heads: Mapping[str, Tensor],
        first_step: int,
    ) -> None:
        """`heads` are those of the auxiliary losses; `first_step` is the step of `batches` that comes first."""
        super().__init__(recipe, model, tokenizer, batches)
        self.module.load_state_dict(heads, strict=False)
        self.layout = TokenLayout(() if recipe.blind else (model.span,), visibility_of(model))
        self.first_step = first_step

    def batch(self, step: int) -> ScratchBatch:
        return super().batch(self.first_step + step)

    def write_checkpoint(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """What the model has that the base has not: no encoder, no heads."""
        folder.mkdir(exist_ok=True)
        learned = {name: each.clone() for name, each in state.items() if not name.startswith(_HEADS)}
        save_tensors(learned, folder / _WEIGHTS)


def read_heads(base: Path) -> dict[str, Tensor]:
    """What the auxiliary losses learned with the base, from its last state: its checkpoint leaves it out."""
    shard = max(base.glob("states/step-*/shard-00001-of-00001.safetensors"))
    weights = {name.removeprefix("weight."): each for name, each in load_file(shard).items()}
    return {name: each for name, each in weights.items() if name.startswith(_HEADS)}


def read_results(plan: Plan) -> dict[str, Any]:
    """What is there already. SystemExit where it was found in another way."""
    if not plan.results.exists():
        return surroundings(plan.threads) | {"design": plan.design, "variants": {}}
    results: dict[str, Any] = json.loads(plan.results.read_text(encoding="utf-8"))
    if results["design"] != plan.design:
        raise SystemExit(f"{plan.results} was made by another plan, {results['design']}; move it away, or use -o")
    return results


def replace_results(results: dict[str, Any], path: Path) -> None:
    """In one move."""
    partial = path.with_suffix(".partial")
    write_results(results, partial)
    os.replace(partial, path)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether this process has the lock; it goes with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def work(bench: Bench, names: Sequence[str]) -> None:
    """Everything that is left, in order; what another worker is at, or waits for, is looked at again later."""
    plan = bench.plan
    while left := [(name, seed) for seed in plan.seeds for name in names if not is_done(plan, name, seed)]:
        for name, seed in left:
            if is_ready(plan, name, seed):
                with locked(plan.folder(name, seed) / "lock", wait=False) as ours:
                    if ours and not is_done(plan, name, seed):
                        bench.finish(name, seed)
                        break  # what became ready, and stands further in front, comes next
        else:
            time.sleep(_WAIT)


def is_done(plan: Plan, name: str, seed: int) -> bool:
    """Whether the results have it."""
    return str(seed) in read_results(plan)["variants"].get(name, {"seeds": {}})["seeds"]


def is_ready(plan: Plan, name: str, seed: int) -> bool:
    """Whether the weights that it only uses are there."""
    source = VARIANTS[name].weights_of
    return not source or is_done(plan, source, seed)


def measure(bench: Bench, names: Sequence[str], steps: int, rounds: int) -> None:
    """Adds times to the results."""
    found = surroundings(bench.plan.threads)
    chosen = {name: VARIANTS[name] for name in names}
    pixels = torch.from_numpy(to_pixels(render(bench.assets, 0, "test").image, bench.base.config.vision))[None]
    models = {name: (variant, bench.fresh(variant).eval()) for name, variant in chosen.items()}
    first = first_token_seconds(models, pixels, rounds)
    trained = {name: variant for name, variant in chosen.items() if not variant.weights_of}
    seed = bench.plan.seeds[0]
    tasks = {name: bench.task(variant, bench.fresh(variant), seed) for name, variant in trained.items()}
    found["step"] = {name: spread(times) for name, times in step_seconds(tasks, steps).items()}
    found["first_token"] = {name: spread(times) for name, times in first.items()}
    with locked(bench.plan.runs / "results.lock"):
        replace_results(read_results(bench.plan) | {"times": found}, bench.plan.results)
    print(
        json.dumps(
            {part: {name: each["median"] for name, each in found[part].items()} for part in ("step", "first_token")}
        )
    )


def make_base(recipe: ScratchRecipe, plan: Plan) -> None:
    """Trains RUNS/base where it is not there."""
    with locked(plan.runs / "base.lock"):
        if not (plan.runs / "base" / "checkpoint").exists():
            train(recipe, plan.runs / "base", lambda _event: None, cache_root=plan.cache)


def _quiet(_done: int, _new: int) -> None:
    pass


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--assets", required=True, help="folder that `svcli data fetch` filled")
    parser.add_argument("--runs", type=Path, default=Path("build/main-table"))
    parser.add_argument("--cache", type=Path, default=Path("build/features"), help="encoded pictures")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "main_table.json")
    parser.add_argument("--base-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=400, help="of the second stage")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="highest of the second stage")
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time", action="store_true", help="measure times instead")
    parser.add_argument("--timed-steps", type=int, default=6, help="training steps of each variant that count")
    parser.add_argument("--timed-rounds", type=int, default=25, help="first tokens of each variant that count")
    return parser.parse_args()


def main() -> None:
    """Runs what is left, or measures."""
    options = parse()
    torch.set_num_threads(options.threads)
    recipe = read_scratch_recipe(options.recipe)
    recipe = replace(recipe, assets=options.assets, model=replace(recipe.model, skip=None))
    optim = replace(
        recipe.optim,
        steps=options.steps,
        align_steps=0,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
    )
    plan = Plan(
        replace(recipe, optim=optim, save_every=_SAVE_EVERY),
        tuple(options.seeds),
        options.runs,
        options.cache,
        options.output,
        options.threads,
        options.base_steps,
    )
    make_base(replace(recipe, optim=replace(recipe.optim, steps=options.base_steps)), plan)
    bench = Bench(plan)
    if options.time:
        measure(bench, options.only, options.timed_steps, options.timed_rounds)
    else:
        work(bench, options.only)


if __name__ == "__main__":
    main()
