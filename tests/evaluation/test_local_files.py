"""Files that people have of tasks: found, read a little at a time, and refused with their place."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svcli.__main__ import MACHINE
from svcli.errors import USAGE, explain
from svcli.evaluation.task import Exports, Task, TaskError
from svcli.evaluation.tasks.local_files import Table, absent
from svcli.evaluation.tasks.parquet import parquet_files, rows
from svcli.evaluation.tasks.public import PUBLIC
from svcli.evaluation.tasks.records import Record
from tests.evaluation.task_files import asked, png, put, put_parquet, put_table

NAMES = ("pope", "mme", "gqa", "textvqa", "mmbench", "mmstar", "mmvet", "mmmu", "ocrbench", "scienceqa")
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=20)


def test_all_public_tasks_are_there() -> None:
    assert tuple(task.name for task in PUBLIC) == NAMES
    for task in PUBLIC:
        assert task.summary([]) == {} or task.metric in task.summary([])
        assert task.source.count("huggingface.co/datasets/") == 1
        assert task.max_new_tokens > 0
        assert not isinstance(task, Exports) or set(task.unscored) <= set(task.splits)


@pytest.mark.parametrize("task", PUBLIC, ids=lambda task: task.name)
def test_a_folder_without_files_and_a_split_that_there_is_not_are_told(task: Task, tmp_path: Path) -> None:
    for folder, what in ((tmp_path, "holds no files"), (tmp_path / "nowhere", "is no folder")):
        with pytest.raises(TaskError) as caught:
            asked(task, folder)
        message = str(caught.value)
        assert message.startswith(f"{folder} {what}")
        assert task.layout in message
        assert task.source in message
        assert explain(caught.value) == (message, USAGE)
    with pytest.raises(TaskError, match=f"{task.name} has no split nonsense; it has {task.splits[0]}"):
        asked(task, tmp_path, "nonsense")


@given(st.text(max_size=30), st.sampled_from(["", "../", "a/../../", "/", "C:/", "\\", "//host/"]))
def test_a_picture_never_comes_from_outside_its_folder(name: str, before: str) -> None:
    folder = Path("/nowhere/pictures")
    with pytest.raises(TaskError) as caught:
        Record({}, "a place").file(folder, before + name)
    if not str(caught.value).startswith("a place: the picture"):
        # It was looked for.
        assert Path(os.path.normpath(folder / (before + name))).is_relative_to(folder)


def test_links_that_people_made_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    assert Record({}, "x").file(tmp_path / "images", "a.png").read_bytes() == png()


@given(st.lists(st.tuples(CELLS, CELLS), max_size=8))
def test_a_table_gives_what_was_written_and_each_record_again(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    # The first cell is never empty, so that no line is blank, which would be no record.
    written = [{"name": f"x{first}", "image": second} for first, second in cells]
    path = tmp_path_factory.mktemp("table") / "a.tsv"
    put_table(path, written or [{"name": "x", "image": ""}])
    table = Table(path, ("image", "name"))
    found = list(table.records())
    assert [dict(record.fields) for _, record in found] == (written or [{"name": "x", "image": ""}])
    for begin, record in found:
        assert table.at(begin).fields == record.fields


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no column name"),
        (b"name\n", "no column image"),
        (b"name\timage\na\n", "line 2: 1 columns, not 2"),
        (b"\xff\xfen\x00a\x00", "line 1: no table of tabs"),
        (b"name\timage\na\tb\nc\xff\td\n", "line 3: no table of tabs"),
        (b'name\timage\na\t"b\n', "line 2: no table of tabs"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(TaskError, match=rf"a\.tsv[:,] {what}"):
        list(Table(put(tmp_path / "a.tsv", data), ("name", "image")).records())


def test_a_table_with_a_mark_of_its_encoding_is_read(tmp_path: Path) -> None:
    table = Table(put(tmp_path / "a.tsv", b"\xef\xbb\xbfname\timage\na\tb\n"), ("name", "image"))
    assert [dict(record.fields) for _, record in table.records()] == [{"name": "a", "image": "b"}]


def test_parquet_files_are_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    size, count = 2**20, 64
    many = [{"id": number, "image": bytes([number]) * size} for number in range(count)]
    put_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", many, row_group=16)
    paths = parquet_files(tmp_path, ("data/test-*.parquet",))
    del many
    tracemalloc.start()
    try:
        for number, record in enumerate(rows(paths, ("image", "id"))):
            assert record.picture("image")[0] == number
            assert len(record.picture("image")) == size
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < count * size / 2


def test_a_set_of_parquet_files_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    for number in (0, 2):
        put_parquet(tmp_path / "data" / f"test-0000{number}-of-00003-0a.parquet", [{"id": number}])
    with pytest.raises(TaskError, match="data: of 3 Parquet files, number 00001 is missing"):
        parquet_files(tmp_path, ("data/test-*.parquet",))
    put_parquet(tmp_path / "data" / "test-00001-of-00003-0a.parquet", [{"id": 1}])
    paths = parquet_files(tmp_path, ("other/*.parquet", "data/test-*.parquet"))
    assert [record.number("id") for record in rows(paths, ("id",))] == [0, 1, 2]


def test_parquet_files_that_are_none_or_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"a\.parquet: no Parquet file that can be read"):
        list(rows([put(tmp_path / "a.parquet", b"PAR1 and so on")], ("id",)))
    whole = put_parquet(tmp_path / "b.parquet", [{"id": number, "text": "x" * 100} for number in range(1000)])
    with pytest.raises(TaskError, match=r"b\.parquet: no column image"):
        list(rows([whole], ("id", "image")))
    data = bytearray(whole.read_bytes())
    data[4:40] = b"\xff" * 36
    with pytest.raises(TaskError, match=r"c\.parquet: no Parquet file that can be read"):
        list(rows([put(tmp_path / "c.parquet", bytes(data))], ("id", "text")))


def test_without_pyarrow_its_extra_is_named() -> None:
    sentence, code = explain(ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"))
    assert sentence == 'pyarrow is needed for this and not installed: pip install "svcli[eval]"'
    assert code == MACHINE


def test_an_unknown_split_is_told_before_the_folder(tmp_path: Path) -> None:
    assert "has no split x" in str(absent(PUBLIC[0], tmp_path, "x"))
