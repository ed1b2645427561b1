"""`svcli sweep`: graphs of every setting, answers to go on with, and a choice by rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from PIL import Image
from typer.testing import CliRunner, Result

from svcli.app import app
from svcli.engines import EngineName
from svcli.evaluation.asker import Said
from svcli.evaluation.askers import BundleAsker
from svcli.evaluation.intervals import Interval
from svcli.evaluation.report import Report
from svcli.evaluation.results import Line
from svcli.evaluation.run import Work
from svcli.evaluation.sweep import Point, askable, asked, choose, first_tokens, front, points, remarks
from svcli.evaluation.task import Item
from svcli.evaluation.tasks.registry import TASKS
from svcli.plots import draw_sweep
from svcli_engines.base import EngineError
from svcli_export.manifest import load_manifest
from tests.export.tiny import tiny_checkpoint

SHAPES = ("bundled", "--split", "shapes", "--limit", "4", "--rounds", "0", "--threads", "1", "--precision", "fp32")


def point(setting: str, figure: float, flops: float, low: float | None = None, high: float = 0.0) -> Point:
    """`low` and `high`: of the difference to the best figure, which is 100 where they are given."""
    asker = "dense" if setting == "off" else setting.replace("/", "-")
    over = None if low is None else Interval(figure - 100, low, high, "bootstrap over pictures")
    return Point(setting, asker, figure, None, over, 0.0, 0.0, flops, None, True)


def sweep(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sweep") / "checkpoint")


@pytest.fixture(scope="module")
def swept(checkpoint: Path) -> Path:
    sweep(checkpoint, *SHAPES, "--settings", "2/3,8/4", "-o", checkpoint.with_name("out"))
    return checkpoint.with_name("out")


def test_the_cheapest_of_those_near_the_best_is_chosen() -> None:
    found = (point("8/4", 60.0, 1.0), point("16/8", 78.9, 2.0), point("32/8", 79.3, 3.0), point("off", 80.0, 4.0))
    assert choose(found, 0.01, "accuracy").setting == "32/8"
    assert choose(found, 0.02, "accuracy").setting == "16/8"
    assert choose(found, 0.0, "accuracy").setting == "off"
    assert choose(found, 1.0, "accuracy").setting == "8/4"
    reason = choose(found, 0.01, "accuracy").reason
    assert "at most 1.0% below the best accuracy, 79.3 to 80 of dense; it takes 75% of the FLOPs of dense" in reason
    assert choose(found[3:], 0.01, "accuracy").reason == "it has the best accuracy, and none has fewer FLOPs."
    best = choose((found[0], found[3]), 0.01, "accuracy")
    assert best.reason == "it has the best accuracy, and every setting with fewer FLOPs is more than 1.0% lower."


def test_what_few_items_leave_open_is_said() -> None:
    """Of the chosen setting, which may be worse, and of cheaper ones, which may be as good."""
    best = point("off", 100.0, 4.0)
    assert "leave open that it is 6.5 below: ask" in choose((point("32/8", 99.5, 3.0, -6.5), best), 0.01, "x").reason
    sure = point("32/8", 99.5, 3.0, low=-0.9)
    said = choose((sure, best), 0.01, "accuracy").reason
    assert "leave open" not in said
    assert "a difference of -0.5 (-0.9 to +0) on the same items" in said
    far, near = point("8/4", 90.0, 1.0, low=-14.0, high=-6.0), point("16/8", 97.0, 2.0, low=-7.0, high=0.5)
    choice = choose((far, near, sure, best), 0.01, "accuracy")
    assert choice.setting == "32/8"
    assert "leave open that 16/8 is no more than 1.0% below: ask" in choice.reason
    lower = replace(near, over_best=Interval(-3.0, -4.5, -1.5, "bootstrap over pictures"))
    assert "leave open" not in choose((far, lower, sure, best), 0.01, "accuracy").reason


def test_an_untrained_setting_is_said_to_be_one() -> None:
    found = (replace(point("32/8", 99.5, 3.0, low=-0.9), is_trained=False), point("off", 100.0, 4.0))
    assert "the model was not trained with it" in choose(found, 0.01, "accuracy").reason
    assert "not trained" not in choose(found[1:], 0.01, "accuracy").reason


def answered(right: Sequence[bool], flops: int, failed: Sequence[int] = ()) -> list[Line]:
    """A line of each item, of which those in `failed` could not be asked."""
    found = []
    for number, each in enumerate(right):
        item, key = Item(f"{number:04}", "?", (), None, "colour"), str(number)
        said = None if number in failed else Said("", 1, 1, flops, 1.0, ())
        found.append(Line(item, key, said, "", float(each and said is not None)))
    return found


def test_settings_are_held_against_the_best_one_on_the_same_items(swept: Path) -> None:
    """Of 100 items 2-3 has 30 wrong that the best one has right; 8-4 has 6 wrong, and 4 more right."""
    manifest = load_manifest(swept / "bundle")
    right = {
        "skipped": [number < 90 for number in range(100)],
        "2-3": [number < 60 for number in range(100)],
        "8-4": [6 <= number < 94 for number in range(100)],
        "dense": [False] * 100,
    }
    costs = {"2-3": 1, "8-4": 2, "skipped": 3, "dense": 4}
    report = Report.of(
        TASKS["bundled"],
        "shapes",
        {name: answered(each, costs[name], range(100) if name == "dense" else ()) for name, each in right.items()},
        100,
    )
    found = points(report, manifest, {})
    assert [each.asker for each in found] == ["2-3", "8-4", "skipped"], "what could not be asked has no cost"
    assert found[2].over_best is None
    lower, same = found[0].over_best, found[1].over_best
    assert lower is not None
    assert lower.high < -15
    assert same is not None
    assert same.low < 0 < same.high
    assert choose(found, 0.03, "accuracy").setting == "8/4"
    dearer = choose(found, 0.01, "accuracy")
    assert dearer.setting == found[2].setting
    assert "leave open that 8/4 is no more than 1.0% below" in dearer.reason


def test_first_tokens_are_timed_on_what_everybody_could_be_asked(tmp_path: Path) -> None:
    work = Work(TASKS["bundled"], tmp_path, "shapes", 5)
    items = [item for item, _ in work.items()]
    assert all(item.pictures for item in items)

    def lines(failed: Sequence[int]) -> list[Line]:
        said = Said("", 1, 1, 1, 1.0, ())
        return [
            Line(item, str(number), None if number in failed else said, "", 0.0) for number, item in enumerate(items)
        ]

    by_asker = {"skipped": lines([1]), "8-4": lines([3]), "dense": lines(range(5)), "blind": lines([4])}
    report = Report.of(TASKS["bundled"], "shapes", by_asker, 5)
    assert [each.name for each in asked(report)] == ["skipped", "8-4"]
    assert [item.id for item in askable(report, work)] == [items[number].id for number in (0, 2, 4)]


@pytest.mark.parametrize(("right", "is_useless"), [(2, True), (3, False)])
def test_a_task_that_needs_no_picture_is_said_to_tell_nothing(right: int, is_useless: bool) -> None:
    said = Said("", 1, 1, 1, 1.0, ())

    def lines(count: int) -> list[Line]:
        items = [Item(str(number), "?", (), None, "colour") for number in range(4)]
        return [Line(item, item.id, said, "", float(number < count)) for number, item in enumerate(items)]

    report = Report.of(TASKS["bundled"], "shapes", {"skipped": lines(right), "blind": lines(2)}, 4)
    told = remarks((point("8/4", 25.0 * right, 1.0),), report)
    assert any("tell nothing of settings" in each for each in told) is is_useless


def test_each_panel_of_the_plot_has_the_front_of_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has more FLOPs, and is quicker and better, beats the rest on the clock alone."""
    drawn = []
    plot = Axes.plot

    def noted(self: Axes, costs: Sequence[float], figures: Sequence[float], **style: Any) -> Any:
        drawn.append((tuple(costs), tuple(figures)))
        return plot(self, costs, figures, **style)

    monkeypatch.setattr(Axes, "plot", noted)
    slow, quick = (
        replace(point(*each), first_token=time) for each, time in ((("8/4", 1, 1e9), 2), (("off", 2, 2e9), 1))
    )
    draw_sweep(tmp_path / "plot.png", (slow, quick), "8/4", "title", "accuracy")
    assert drawn[1:] == [((1.0, 2.0), (1, 2)), ((1000.0,), (2,))]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=12))
def test_nobody_beats_what_is_on_the_front(figures: Sequence[tuple[int, int]]) -> None:
    found = sorted(
        (point(f"{number}/1", figure, flops) for number, (figure, flops) in enumerate(figures)),
        key=lambda each: (each.flops, -each.figure),
    )
    kept = front(found)

    def beaten(each: Point) -> bool:
        return any(
            other.figure >= each.figure
            and other.flops <= each.flops
            and (other.figure, other.flops) != (each.figure, each.flops)
            for other in found
        )

    assert all(not beaten(each) for each in kept)
    values = {(each.figure, each.flops) for each in kept}
    assert all(beaten(each) or (each.figure, each.flops) in values for each in found)


def test_every_setting_is_asked_beside_dense_and_blind(swept: Path) -> None:
    content = json.loads((swept / "sweep.json").read_text())
    # The checkpoint's own setting is 4/6, of 16 tokens.
    assert [each["setting"] for each in content["settings"]] == ["2/3", "4/6", "8/4", "off"]
    assert [each["visual_tokens"] for each in content["settings"]] == [7, 12, 14, 16]
    assert [each["is_trained"] for each in content["settings"]] == [False, True, False, False]
    assert {path.stem for path in (swept / "answers").glob("*.jsonl")} == {"skipped", "2-3", "8-4", "dense", "blind"}
    assert content["choice"]["setting"] in {each["setting"] for each in content["settings"]}
    assert any(sentence.startswith("Without a picture: ") for sentence in content["remarks"])
    with Image.open(swept / "sweep.png") as plot:
        assert plot.width > 1000


def test_it_goes_on_where_it_was(swept: Path, checkpoint: Path) -> None:
    answers = {path: path.read_bytes() for path in (swept / "answers").glob("*.jsonl")}
    weights = (swept / "bundle" / "weights.safetensors").stat().st_mtime_ns
    shown = sweep(checkpoint, *SHAPES, "--settings", "2/3,8/4", "-o", swept)
    assert "are used as they are" in shown.stderr
    assert "Choose " in shown.stdout
    assert {path: path.read_bytes() for path in answers} == answers
    assert (swept / "bundle" / "weights.safetensors").stat().st_mtime_ns == weights
    refused = sweep(checkpoint, *SHAPES, "--settings", "5/5", "-o", swept, code=2)
    assert "has no graphs for 5-5" in refused.stderr


def test_a_bundle_that_has_the_graphs_needs_no_export(swept: Path, tmp_path: Path) -> None:
    told = json.loads(sweep(swept / "bundle", *SHAPES, "-o", tmp_path, "--json").stdout)
    assert [each["setting"] for each in told["settings"]] == ["2/3", "4/6", "8/4", "off"]
    assert not (tmp_path / "bundle").exists()
    some = json.loads(sweep(swept / "bundle", *SHAPES, "--settings", "8/4", "-o", tmp_path / "b", "--json").stdout)
    assert [each["setting"] for each in some["settings"]] == ["4/6", "8/4", "off"]


def test_first_tokens_are_timed_in_turn_and_encode_each_time(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[str, int]] = []
    answer = BundleAsker.answer

    def noted(self: BundleAsker, question: str, images: Sequence[Image.Image], max_new_tokens: int) -> object:
        said = answer(self, question, images, max_new_tokens)
        timed.append((self.name, self._visuals.num_misses))
        return said

    monkeypatch.setattr(BundleAsker, "answer", noted)
    bundle = swept / "bundle"
    work = Work(TASKS["bundled"], tmp_path, "shapes", 1)
    items = [item for item, _ in work.items()]
    found = first_tokens(["skipped", "dense"], bundle, load_manifest(bundle), items, EngineName.ONNXRUNTIME, 1, 2)
    assert set(found) == {"skipped", "dense"}
    assert all(seconds > 0 for seconds in found.values())
    assert [name for name, _ in timed] == ["dense", "skipped", "skipped", "dense", "dense", "skipped"]
    assert max(count for _, count in timed) == 3, "a picture that is kept would be timed as none"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere", "bundled", "-o", "OUT"), "nowhere"),
        (("CHECKPOINT", "nothing", "-o", "OUT"), "no such task"),
        (("CHECKPOINT", "bundled", "-o", "OUT", "--settings", "x"), "--settings x: choose dense, RETAINED/SKIPPED"),
        (("CHECKPOINT", "bundled", "-o", "/dev/null"), "/dev/null is a file; name a folder"),
        (("CHECKPOINT", "bundled", "-o", "OUT", "--settings", "20/1"), "must be at most 16"),
    ],
)
def test_bad_arguments_end_in_a_sentence(
    arguments: tuple[str, ...], sentence: str, checkpoint: Path, tmp_path: Path
) -> None:
    words = [each.replace("CHECKPOINT", str(checkpoint)).replace("OUT", str(tmp_path / "out")) for each in arguments]
    done = CliRunner().invoke(app, ["sweep", *words, "--quiet"])
    assert done.exit_code == 2
    assert sentence in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_that_cannot_be_asked_ends_in_a_sentence(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EngineError("no")

    monkeypatch.setattr(BundleAsker, "answer", refuse)
    done = sweep(swept / "bundle", *SHAPES, "--quiet", "-o", tmp_path, code=1)
    assert "nothing could be asked" in done.stderr
    assert not (tmp_path / "sweep.json").exists()
