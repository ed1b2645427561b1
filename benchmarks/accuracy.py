"""Asks a bundle about pictures it never saw, in ONNX Runtime as chat does, and judges what it says.

    python -m benchmarks.accuracy models/skipvision-tiny --assets build/assets [--selection runs/tiny/checkpoint]

test: unseen compositions of known art. test_style, test_font, test_photo: a drawing style, fonts and photographs that
training never showed. Half of the questions are in wordings that training never showed either. easy_vqa: the official
test questions. A picture is encoded once and asked all its questions. Wrong answers go to build/accuracy/wrong.jsonl.

--selection also counts, in PyTorch, which share of the patches that show something is retained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measuring import RESULTS, surroundings, write_results
from skipvision.data import assets as data_assets
from skipvision.data import easy_vqa
from skipvision.data.questions import TASKS, Question, ask, is_right
from skipvision.data.scenes import render
from skipvision.data.split import Split
from svcli.bench.cpu import available_cores
from svcli_engines.base import Engine, Visual
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.processor import Processor
from svcli_engines.sampling import Sampler, Sampling
from svcli_export.chat import Message
from svcli_export.manifest import load_manifest

TEST_SPLITS: tuple[Split, ...] = ("test", "test_style", "test_font", "test_photo")
QUESTIONS = 6
_MAX_NEW_TOKENS = 48
_WRONG = Path("build/accuracy/wrong.jsonl")
_ANY_TEXT = "Yes, there is some text."

Asked = tuple[Image.Image, list[Question]]


@dataclass(frozen=True)
class Outcome:
    """One judged answer."""

    split: str
    picture: int
    question: Question
    said: str

    @property
    def right(self) -> bool:
        return is_right(self.question, self.said)


def scene_questions(assets: data_assets.Assets, split: Split, num_pictures: int) -> Iterator[Asked]:
    """Composed pictures with their questions.

    Every picture of test_font has text, so that whether there is any is no question there: those are left out.
    """
    for seed in range(num_pictures):
        scene = render(assets, seed, split)
        questions = ask(scene, np.random.default_rng((seed, 0)), wordings="test", per_picture=QUESTIONS)
        yield (
            scene.image,
            [each for each in questions if split != "test_font" or each.answer != _ANY_TEXT],
        )


def answer(engine: Engine, processor: Processor, visual: Visual, question: str) -> str:
    """The greedy answer about a picture that is encoded already."""
    prompt = processor.prompt([Message("user", question, images=1)])
    sampler, ids = Sampler(Sampling()), list[int]()
    logits = engine.prefill(prompt.ids, visual, prompt.layout)
    for _ in range(_MAX_NEW_TOKENS):
        token = sampler.pick(logits)
        if token in processor.stop_ids:
            break
        ids.append(token)
        logits = engine.extend([token])
    return processor.decode(ids)


def judged(engine: Engine, processor: Processor, split: str, asked: Iterator[Asked]) -> list[Outcome]:
    """Answers to all questions of a split; progress on stderr."""
    outcomes: list[Outcome] = []
    for number, (image, questions) in enumerate(asked):
        visual = engine.encode(processor.pixels([image]))
        outcomes += [
            Outcome(split, number, question, answer(engine, processor, visual, question.question))
            for question in questions
        ]
        if (number + 1) % 50 == 0:
            share = sum(outcome.right for outcome in outcomes) / len(outcomes)
            print(f"{split}: {number + 1} pictures, {share:.1%} right so far", file=sys.stderr, flush=True)
    return outcomes


def scores(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Right answers per task, their mean over tasks, and their share over all questions."""
    tasks = {}
    for task in (*TASKS, "easy_vqa"):
        rights = [outcome.right for outcome in outcomes if outcome.question.task == task]
        if rights:
            tasks[task] = {"questions": len(rights), "right": sum(rights), "share": sum(rights) / len(rights)}
    return {
        "pictures": len({outcome.picture for outcome in outcomes}),
        "questions": len(outcomes),
        "tasks": tasks,
        "mean_over_tasks": sum(each["share"] for each in tasks.values()) / len(tasks),
        "share": sum(outcome.right for outcome in outcomes) / len(outcomes),
    }


def write_wrong(outcomes: Sequence[Outcome]) -> None:
    """What went wrong, one JSON object a line."""
    _WRONG.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"split": each.split, "picture": each.picture, **asdict(each.question), "said": each.said}
        for each in outcomes
        if not each.right
    ]
    _WRONG.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--assets", type=Path, required=True, help="folder that `svcli data fetch` filled")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "accuracy.json")
    parser.add_argument("--pictures", type=int, default=400, help="composed pictures of each split")
    parser.add_argument("--easy-pictures", type=int, default=None, help="easy-VQA pictures; all 1,000 if left out")
    parser.add_argument("--selection", type=Path, metavar="CHECKPOINT", help="also measure what it retains")
    parser.add_argument("--threads", type=int, default=available_cores())
    return parser.parse_args()


def main() -> None:
    """Asks everything and writes it down."""
    options = parse()
    results = surroundings(options.threads)
    manifest = load_manifest(options.bundle)
    engine = OnnxEngine(options.bundle, manifest, num_threads=options.threads)
    processor = Processor(options.bundle, manifest)
    assets = data_assets.load(options.assets)
    splits: dict[str, Iterator[Asked]] = {
        split: scene_questions(assets, split, options.pictures) for split in TEST_SPLITS
    }
    splits["easy_vqa"] = islice(easy_vqa.load(options.assets, "test"), options.easy_pictures)
    outcomes = {split: judged(engine, processor, split, asked) for split, asked in splits.items()}
    write_wrong([outcome for split in outcomes.values() for outcome in split])
    results |= {"engine": engine.name, "precision": engine.precision}
    results["splits"] = {split: scores(answers) for split, answers in outcomes.items()}
    if options.selection is not None:
        from benchmarks.selection import measure_selection

        results["selection"] = measure_selection(options.selection, assets, options.pictures, options.threads)
    write_results(results, options.output)
    for split, found in results["splits"].items():
        tasks = ", ".join(f"{task} {each['share']:.1%}" for task, each in found["tasks"].items())
        print(f"{split}: {found['mean_over_tasks']:.1%} over tasks, {found['share']:.1%} of questions ({tasks})")
    if "selection" in results:
        print(json.dumps(results["selection"]))


if __name__ == "__main__":
    main()
