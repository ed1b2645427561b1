"""Asks a bundle about pictures it never saw, in ONNX Runtime as chat does, and judges what it says.

    python -m benchmarks.accuracy --assets build/assets [--selection]

test: unseen compositions of known art. test_style, test_font, test_photo: a drawing style, fonts and photographs that
training never showed. Half of the questions are in wordings that training never showed either. easy_vqa: the official
test questions. These are the tasks `bundled` and `easy-vqa` of `svcli eval`, which asks them here; killed and started
again, it goes on. Answers go to build/accuracy.

--selection also counts, in PyTorch, which share of the patches that show something is retained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import BUNDLED, RESULTS, surroundings, write_results
from skipvision.data import assets as data_assets
from skipvision.data.questions import TASKS as KINDS
from svcli.bench.cpu import available_cores
from svcli.engines import EngineName
from svcli.evaluation.askers import own_name
from svcli.evaluation.collect import results_path
from svcli.evaluation.results import Line, read
from svcli.evaluation.run import Shard
from svcli.evaluation.session import Session
from svcli.evaluation.tasks.bundled import DRAWN, PICTURES
from svcli.evaluation.tasks.registry import TASKS
from svcli_export.manifest import load_manifest

_ANSWERS = Path("build/accuracy")
_EASY = "easy_vqa"


def answered(task: str, split: str, options: argparse.Namespace) -> list[Line]:
    """Judged answers to all questions of a split."""
    name = own_name(load_manifest(options.bundle, quick=True))
    session = Session(
        bundle=options.bundle,
        task=TASKS[task],
        folder=options.assets,
        split=split,
        limit=None,
        shard=Shard(),
        engine=EngineName.ONNXRUNTIME,
        threads=options.threads,
        out=_ANSWERS / f"{task}-{split}",
        overwrite=options.overwrite,
        is_quiet=False,
    )
    session.run(only=[name], baselines=None)
    held = read(results_path(session.out, name, session.shard))
    assert held is not None
    return held[1]


def scores(lines: Sequence[Line], kinds: Sequence[str]) -> dict[str, Any]:
    """Right answers per kind of question, their mean over kinds, and their share over all questions."""
    tasks = {}
    for kind in kinds:
        rights = [bool(line.score) for line in lines if kind == _EASY or line.item.group == kind]
        if rights:
            tasks[kind] = {"questions": len(rights), "right": sum(rights), "share": sum(rights) / len(rights)}
    return {
        "pictures": len({line.pictures for line in lines}),
        "questions": len(lines),
        "tasks": tasks,
        "mean_over_tasks": sum(each["share"] for each in tasks.values()) / len(tasks),
        "share": sum(bool(line.score) for line in lines) / len(lines),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--assets", type=Path, required=True, help="folder that `svcli data fetch` filled")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "accuracy.json")
    parser.add_argument("--overwrite", action="store_true", help="ask anew what was answered before")
    parser.add_argument("--selection", action="store_true", help="also measure what it retains")
    parser.add_argument("--threads", type=int, default=available_cores())
    return parser.parse_args()


def main() -> None:
    """Asks everything and writes it down."""
    options = parse()
    results = surroundings(options.threads)
    precision = load_manifest(options.bundle, quick=True).contract.precision
    results |= {"engine": f"{EngineName.ONNXRUNTIME.value}-cpu", "precision": precision}
    results["splits"] = {split: scores(answered("bundled", split, options), KINDS) for split in DRAWN}
    results["splits"][_EASY] = scores(answered("easy-vqa", "test", options), [_EASY])
    if options.selection:
        from benchmarks.selection import measure_selection

        art = data_assets.load(options.assets)
        results["selection"] = measure_selection(options.bundle, art, PICTURES, options.threads)
    write_results(results, options.output)
    for split, found in results["splits"].items():
        tasks = ", ".join(f"{task} {each['share']:.1%}" for task, each in found["tasks"].items())
        print(f"{split}: {found['mean_over_tasks']:.1%} over tasks, {found['share']:.1%} of questions ({tasks})")
    if "selection" in results:
        print(json.dumps(results["selection"]))


if __name__ == "__main__":
    main()
