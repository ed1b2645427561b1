"""Results files: what is written is read again, and nothing else is."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path

import pytest

from svcli.bench.report import COLUMNS, BenchError, as_csv, as_json, read_report
from svcli.errors import UsageError
from svcli.files import check_folder, check_targets, write
from tests.bench.reports import beside_a_pruner, report


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    written = as_json(report({"prefill": 0.5}))
    path.write_text(written)
    assert as_json(read_report(path)) == written
    assert read_report(path).stages["prefill"].verdict == "lower"


def test_the_csv_has_a_row_for_each_side_of_each_figure() -> None:
    found = report({"prefill": 0.5})
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * sum(1 for _ in found.parts()) == 2 * (6 + 1 + 2)
    prefill = next(
        row for row in rows if row["part"] == "stages" and row["stage"] == "prefill" and row["side"] == "skipped"
    )
    assert float(prefill["ratio"]) == pytest.approx(0.5)
    assert float(prefill["p50"]) == pytest.approx(0.501)
    # 10 ms of FLOPs at 1e11 a second, against 1 ms of bytes.
    assert float(prefill["roof_seconds"]) == pytest.approx(0.01)
    assert float(prefill["roof_share"]) == pytest.approx(0.01 / 0.501, rel=1e-4)
    picture = next(row for row in rows if row["stage"] == "picture")
    assert picture["flops"] == picture["roof_share"] == ""
    assert {(row["part"], row["at"]) for row in rows} == {("stages", ""), ("batch", "4"), ("context", "300")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "not what"),
        ('{"format": 0}', "not what"),
        ('{"format": 1}', "at date: Field required"),
    ],
)
def test_another_file_is_refused_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=said):
        read_report(path)
    with pytest.raises(BenchError, match="No such file"):
        read_report(tmp_path / "missing.json")


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(json.loads(as_json(report())) | {"surprise": 1}))
    with pytest.raises(BenchError, match="surprise"):
        read_report(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"prefill": {', '"surprise": {', "'surprise' is no stage; measure again"),
        ("0.501", "0.0", "a time of prefill is not above 0"),
        ("0.501", "-1", "a time of prefill is not above 0"),
        ('"p50": 0.501', '"p50": Infinity', "finite number"),
        ('"ratio": 0.5,', '"ratio": NaN,', "finite number"),
    ],
)
def test_what_no_run_can_have_measured_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    path, written = tmp_path / "a.json", as_json(report({"prefill": 0.5}))
    assert old in written
    path.write_text(written.replace(old, new))
    with pytest.raises(BenchError, match=said):
        read_report(path)


def test_targets_are_looked_at_first(tmp_path: Path) -> None:
    check_targets([tmp_path / "a.json"])
    for paths, said in (
        ([tmp_path], "is a folder"),
        ([tmp_path / "missing" / "a.json"], "no such folder"),
        ([tmp_path / "a", tmp_path / "a"], "a file of its own"),
    ):
        with pytest.raises(UsageError, match=said):
            check_targets(paths)


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_targets([pipe])
    write(pipe, "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_disk_that_is_full_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space") as told:
        write(path, "new")
    assert told.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_be_made_where_no_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "newer")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="file is a file"):
            check_folder(path)


def test_a_folder_that_is_not_written_to_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)
    for path in (tmp_path, tmp_path / "new" / "newer"):
        with pytest.raises(UsageError, match=f"^{tmp_path}: cannot be written to$"):
            check_folder(path)
    check_folder(tmp_path.parent / "new")


def test_an_older_file_stays_whole_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_peer_of_before_was_asked_about_text(tmp_path: Path) -> None:
    found = beside_a_pruner()
    path = tmp_path / "a.json"
    path.write_text(as_json(found), encoding="utf-8")
    assert [peer.what for peer in read_report(path).peers] == ["text", "a picture, dense", "a picture, CDPruner"]
    data = json.loads(path.read_text(encoding="utf-8"))
    for peer in data["peers"]:
        del peer["what"], peer["own_rows"]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert {(peer.what, peer.own_rows) for peer in read_report(path).peers} == {("text", None)}
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    places = [row["at"] for row in rows if row["part"] == "peer" and row["side"] == "ours"]
    assert places == ["openvino-genai", "openvino-genai on a picture, dense", "openvino-genai on a picture, CDPruner"]
