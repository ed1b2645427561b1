"""`svcli bench` on a tiny bundle: what it measures, writes and refuses, however fast it is."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from svcli.app import app
from svcli.bench import measure as measuring
from svcli.bench.contestants import Asked, Graphs, ask, full_rows, sides
from svcli.bench.memory import peaks
from svcli.bench.report import STAGES, FailedPeer, Report, as_json, read_report
from svcli.engines import EngineName
from svcli.settings import bundled_model
from svcli_export.bundle import export_bundle

QUICK = ["--rounds", "2", "--warm-up", "1", "--tokens", "4", "-q"]
ONNX = EngineName.ONNXRUNTIME


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products, and no process that measures memory but where one is looked at."""
    monkeypatch.setattr("svcli.bench.roofs._SIDE", 64)
    monkeypatch.setattr("svcli.bench.roofs._MOST_BYTES", 1 << 16)
    monkeypatch.setattr("svcli.bench.roofs._LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(measuring, "peaks", lambda *_: (None, None))
    # Whatever else the machine of the tests is doing.
    monkeypatch.setattr("svcli.bench.others.Others.cores", lambda _self: None)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def asked(picture: Path) -> Asked:
    return ask("What is this?", [picture])


def test_both_sides_are_measured_and_every_file_is_written(
    bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "peaks", peaks)
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.html")]
    options = ["--json", files[0], "--csv", files[1], "--html", files[2], "--batch", "1,3", "--context", "40"]
    shown = invoke(bundle, picture, *QUICK, *options)
    assert shown.exit_code == 0, shown.output
    found = read_report(files[0])
    assert tuple(found.stages) == STAGES
    assert list(found.sides) == ["dense", "skipped"]
    assert {len(figure.values) for *_, stage in found.parts() for figure in stage.sides.values()} == {2}
    assert [point.at for point in found.batch] == [1, 3]
    # 16 patches dense; 4 retained and two summaries stay of them.
    dense, skipped = found.sides["dense"], found.sides["skipped"]
    assert dense.kv_rows - skipped.kv_rows == 10
    assert found.context[0].rows == {"dense": 40, "skipped": 30}
    assert skipped.kv_bytes_end - skipped.kv_bytes == 3 * skipped.kv_bytes // skipped.kv_rows
    assert dense.peak_bytes is not None
    assert dense.peak_bytes > 20 << 20
    for name, stage in found.stages.items():
        for figure in stage.sides.values():
            assert min(figure.values) > 0
            assert (figure.roof_share is None) == (name == "picture")
    for side in found.sides:
        rounds = {name: stage.sides[side].values for name, stage in found.stages.items()}
        for vision, prefill, first, end in zip(
            rounds["vision"], rounds["prefill"], rounds["first_token"], rounds["end_to_end"], strict=True
        ):
            assert first == pytest.approx(vision + prefill, rel=1e-4)
            assert end > first
    assert len(list(csv.DictReader(files[1].read_text().splitlines()))) == 2 * sum(1 for _ in found.parts())
    assert files[2].read_text().startswith("<!doctype html>")
    assert "rounds are too few" in shown.stdout
    for title in ("Time", "Work, and the time", "Several sequences", "Longer prompts", "Memory and energy"):
        assert title in shown.stdout


def test_the_stages_are_the_parts_of_an_answer_by_the_clock(bundle: Path, picture: Path) -> None:
    contestant = Graphs("skipped", bundle, "", ONNX, None).open(asked(picture))
    ticks = map(float, count())
    try:
        found = contestant.answer(5, clock=lambda: next(ticks))
        assert contestant.engine.length == contestant.prompt.layout.num_kept + 4
    finally:
        contestant.close()
    # The clock goes on by one whenever it is read: start, read, ready, seen, first, end.
    assert found == {
        "picture": 1, "vision": 1, "prefill": 1, "first_token": 2, "decode": 1 / 4, "end_to_end": 5,
    }  # fmt: skip


def test_longer_prompts_have_the_rows_that_were_asked_for_on_both_sides(bundle: Path, picture: Path) -> None:
    for graphs in sides(bundle, ONNX):
        contestant = graphs.open(asked(picture))
        ids, layout = contestant.longer(60)
        assert full_rows(layout) == 60
        assert ids[-1] == contestant.prompt.ids[-1]
        assert ids.count(contestant.processor.image_id) == 1
        contestant.engine.prefill(ids, contestant.visual, layout)
        assert contestant.engine.length == layout.num_kept
        contestant.close()


def test_steps_side_by_side_are_taken_back(bundle: Path, picture: Path) -> None:
    from svcli.bench.sweeps import TOKENS, Sweeps
    from svcli.bench.work import Weights

    graphs = sides(bundle, ONNX)
    opened = {each.name: each.open(asked(picture)) for each in graphs}
    swept = Sweeps(
        opened,
        dict.fromkeys(opened, Weights(1, 1)),
        None,
        rounds=12,
        warm_up=1,
        progress=lambda *_: None,
    )
    # Many more steps than the cache has rows: none of them stays.
    assert max(each.engine.capacity for each in opened.values()) < 13 * TOKENS
    swept.over_batch(graphs, (1, 2))
    assert [point.at for point in swept.batch] == [1, 2]
    for each in opened.values():
        each.close()


def test_ctrl_c_keeps_the_rounds_that_are_done(
    bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 10)
    path = tmp_path / "a.json"
    shown = invoke(bundle, picture, "--rounds", 30, "--warm-up", 1, "--tokens", 2, "-q", "--batch", 2, "--json", path)
    assert shown.exit_code == 130
    found = read_report(path)
    # Ten answers: four whole rounds after one of warm-up.
    assert found.num_rounds == 3
    assert found.batch == ()
    assert "stopped by Ctrl-C: 3 of 30 rounds" in shown.stderr


def test_ctrl_c_before_there_is_anything_leaves_files_as_they_were(
    bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 3)
    path = tmp_path / "a.json"
    path.write_text("old")
    shown = invoke(bundle, picture, "--rounds", 30, "--warm-up", 1, "--tokens", 2, "-q", "--json", path)
    assert shown.exit_code == 130
    assert "nothing was written" in shown.stderr
    assert path.read_text() == "old"


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C comes in the answer of this number."""
    answers, real = count(1), measuring._metered

    def metered(*arguments: Any) -> dict[str, float]:
        if next(answers) == number:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measuring, "_metered", metered)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch", "0"], "--batch 0: write whole numbers"),
        (["--batch", "1,,2"], "write whole numbers"),
        (["--batch", "4096"], "1024 is the most"),
        (["--tokens", "999"], "--tokens 999: the KV cache of the dense graphs has room for"),
        (["--context", "5"], "--context 5: the prompt alone has"),
        (["--context", "90"], "has room for 80"),
        (["--context", "9" * 18], "has room for 80"),
        (["--alone", "--dense", "x"], "name one of them"),
        (["--variant", "7/7"], "no variant '7/7'"),
        (["--json", "missing/a.json"], "no such folder"),
        (["--engine", "tensorrt"], "name a bundle that `svcli export --skip off` wrote by --dense"),
        (["missing.png"], "missing.png: No such file"),
        (["--peer", "nobody"], "--peer nobody: choose among"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(bundle: Path, picture: Path, options: list[str], said: str) -> None:
    shown = invoke(bundle, picture, *QUICK, *options)
    assert shown.exit_code == 2, shown.output
    assert said in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_a_bundle_without_a_dense_twin_says_how_to_get_one(long_bundle: Path, picture: Path) -> None:
    shown = invoke(long_bundle, picture, *QUICK)
    assert shown.exit_code == 2
    assert "--variant dense` adds one" in shown.stderr
    shown = invoke(long_bundle, picture, *QUICK, "--alone")
    assert shown.exit_code == 0, shown.output
    assert "skipped / dense" not in shown.stdout


def test_a_dense_bundle_of_its_own_takes_the_other_side(
    checkpoint: Path, bundle: Path, long_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    export_bundle(checkpoint, tmp_path / "dense", precision="fp32", max_context=96, max_images=1, skip="off")
    shown = invoke(tmp_path / "dense", picture, *QUICK)
    assert shown.exit_code == 2
    assert (
        "these graphs skip nothing, so there is nothing to compare; measure it by itself with --alone" in shown.stderr
    )
    path = tmp_path / "a.json"
    shown = invoke(long_bundle, picture, *QUICK, "--dense", tmp_path / "dense", "--json", path)
    assert shown.exit_code == 0, shown.output
    found = read_report(path)
    assert found.sides["dense"].kv_rows - found.sides["skipped"].kv_rows == 10
    shown = invoke(long_bundle, picture, *QUICK, "--dense", bundle)
    assert "skips; name a bundle that `svcli export --skip off` wrote" in shown.stderr
    shown = invoke(bundled_model(), picture, *QUICK, "--dense", tmp_path / "dense")
    assert "not the same model in the same precision" in shown.stderr


def test_pytorch_is_measured_alike(bundle: Path, picture: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    shown = invoke(bundle, picture, *QUICK, "--engine", "torch", "--json", path)
    assert shown.exit_code == 0, shown.output
    assert read_report(path).settings.engine.startswith("torch")


def test_two_runs_are_held_against_each_other(
    bundle: Path, picture: Path, tmp_path: Path, written: Callable[[str, Report], Path]
) -> None:
    path = tmp_path / "a.json"
    assert invoke(bundle, picture, *QUICK, "--json", path).exit_code == 0
    shown = invoke("compare", path, path)
    assert shown.exit_code == 0, shown.output
    assert "No difference between A and B is shown." in shown.stdout
    assert "open: fewer than 10 rounds" in shown.stdout
    found = read_report(path)
    other = written("b.json", found.model_copy(update={"versions": found.versions | {"numpy": "0"}}))
    shown = invoke("compare", path, other)
    assert shown.exit_code == 2
    assert "A and B were not measured alike (versions: numpy" in shown.stderr
    shown = invoke("compare", path, other, "--across", "versions")
    assert shown.exit_code == 0
    assert "versions differs: numpy" in shown.stderr
    shown = invoke("compare", path, tmp_path / "missing.json")
    assert shown.exit_code == 2


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, Report], Path]:

    def write(name: str, report: Report) -> Path:
        (tmp_path / name).write_text(as_json(report))
        return tmp_path / name

    return write


def test_a_peer_that_fails_is_told_everywhere_and_costs_no_finished_figure(
    bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "transformers ended: <out of luck>"

    def fail(*_: Any, **__: Any) -> Any:
        yield FailedPeer(name="transformers", why=why)

    monkeypatch.setattr(measuring, "measure_peers", fail)
    monkeypatch.setattr(measuring, "check_peers", lambda *_: None)
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.html")]
    options = ["--json", files[0], "--csv", files[1], "--html", files[2]]
    shown = invoke(bundle, picture, *QUICK, "--peer", "transformers", *options)
    assert shown.exit_code == 1, shown.output
    assert shown.stderr.endswith(f"Error: transformers was not measured: {why}\n")
    table = shown.stdout.partition("Peers that could not be measured")[2].partition("Memory and energy")[0]
    assert table.split() == ["why", "transformers", *why.split()]
    found = read_report(files[0])
    assert found.peers == ()
    assert found.failed_peers == (FailedPeer(name="transformers", why=why),)
    assert tuple(found.stages) == STAGES
    row = list(csv.DictReader(files[1].read_text().splitlines()))[-1]
    assert {key: value for key, value in row.items() if value} == {
        "part": "peer", "at": "transformers", "rounds": "0", "failed": why,
    }  # fmt: skip
    text = files[2].read_text()
    assert "<h2>Peers that could not be measured</h2>" in text
    assert "transformers ended: &lt;out of luck&gt;" in text


def test_a_file_that_cannot_be_written_costs_neither_the_others_nor_what_is_shown(
    bundle: Path, picture: Path, tmp_path: Path
) -> None:
    shown = invoke(bundle, picture, *QUICK, "--json", "/dev/full", "--csv", tmp_path / "a.csv")
    assert shown.exit_code == 3
    assert shown.stderr.endswith("Error: /dev/full: No space left on device\n")
    assert "Memory and energy" in shown.stdout
    assert (tmp_path / "a.csv").read_text().startswith("part,")


def test_steps_side_by_side_that_have_no_room_are_refused_before_anything_is_measured(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svcli.bench.sweeps.TOKENS", 1000)
    monkeypatch.setattr(measuring, "_metered", None)
    shown = invoke(bundled_model(), picture, *QUICK, "--batch", "2")
    assert shown.exit_code == 2
    assert "--batch: the dense KV cache has no room for 1000 steps behind the prompt" in shown.stderr


def test_a_narrow_window_gets_lists_and_not_broken_tables(
    bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from svcli import ui

    monkeypatch.setattr(ui, "stdout", lambda: Console(width=40, highlight=False, markup=False))
    shown = invoke(bundle, picture, *QUICK)
    assert shown.exit_code == 0
    table = shown.stdout.partition("Time\n")[2].partition("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 40
    assert "skipped p95" in table


@pytest.mark.slow
def test_the_bundled_model_is_measured_without_torch(tmp_path: Path, command: list[str]) -> None:
    """In processes of their own, as users run it, and where torch cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be imported')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); " + command[2]
    done = subprocess.run(
        [sys.executable, "-c", program, "bench", *QUICK, "--json", str(tmp_path / "a.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = read_report(tmp_path / "a.json")
    assert found.model.precision == "int8"
    assert found.roof is not None
    assert "8 bit" in found.roof.source
