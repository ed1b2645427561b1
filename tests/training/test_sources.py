"""Every format gives the same conversations; what is broken is named, one sample or the whole set."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipvision.training.conversation import BrokenSampleError, Conversation, DataSetError, Source, Turn
from skipvision.training.dataset_source import DatasetSource
from skipvision.training.picture_files import PictureFile, PictureFolder
from skipvision.training.sources import open_sources
from skipvision.training.tune_recipe import SourceRecipe
from tests.training.sets import asked, encoded, write_lines, write_tar

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opened(path: Path | str, **settings: Any) -> Source:
    (source,) = open_sources([SourceRecipe(str(path), **settings)])
    return source


def one(folder: Path, record: object) -> Conversation:
    return opened(write_lines(folder / "one.jsonl", [record]))[0]


def fault(source: Source, index: int = 0) -> tuple[str, str]:
    with pytest.raises(BrokenSampleError) as caught:
        source[index]
    assert "\n" not in str(caught.value)
    return caught.value.kind, str(caught.value)


def bytes_of(conversation: Conversation) -> list[bytes]:
    found = []
    for picture in conversation.pictures:
        with picture.open() as file:
            found.append(file.read())
    return found


RED, BLUE = encoded((30, 20)), encoded((8, 9))
TURNS = (Turn("user", "What?", 1), Turn("assistant", "a ball"), Turn("user", "And?", 1), Turn("assistant", "none"))
TALK = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "a ball"},
    {"from": "human", "value": "And?\n<image>"},
    {"from": "gpt", "value": "none"},
]
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "a ball"},
    {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "none"}]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/blue.png").write_bytes(BLUE)
    return tmp_path


def saved(folder: Path, form: str) -> Path | str:
    """The same two pictures and four turns, in each form."""
    record: dict[str, Any] = {"id": "a", "image": ["red.png", "sub/blue.png"], "conversations": TALK}
    if form == "json":
        path = folder / "set.json"
        path.write_text(json.dumps([record], indent=1))
        return path
    if form == "jsonl":
        return write_lines(folder / "set.jsonl", [record])
    if form == "messages":
        return write_lines(folder / "set.jsonl", [{"images": record["image"], "messages": MESSAGES}])
    if form == "tar":
        members = {"d/7.json": json.dumps(record).encode(), "d/7.1.png": BLUE, "d/7.0.png": RED}
        return write_tar(folder / "set-000.tar", members)
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
            "other": datasets.Value("int64"),
        }
    )
    rows = {
        "images": [[{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "x/blue.png"}]],
        "conversations": [TALK],
        "other": [3],
    }
    made = datasets.Dataset.from_dict(rows, features)
    if form == "parquet":
        made.to_parquet(str(folder / "set.parquet"))
        return folder / "set.parquet"
    made.save_to_disk(str(folder / "saved"))
    return folder / "saved" if form == "saved" else next((folder / "saved").glob("*.arrow"))


@pytest.mark.parametrize("form", ["json", "jsonl", "messages", "tar", "parquet", "saved", "arrow"])
def test_every_format_gives_the_same_conversation(folder: Path, form: str) -> None:
    path = saved(folder, form)
    source = opened(path)
    assert len(source) == 1
    conversation = pickle.loads(pickle.dumps(source))[0]
    assert conversation.turns == TURNS
    assert bytes_of(conversation) == [RED, BLUE]
    assert str(path) in source.name_of(0)
    assert conversation.name.startswith(source.name_of(0))
    assert opened(path).fingerprint == source.fingerprint


def test_several_sources_stay_apart(folder: Path) -> None:
    shards = [write_tar(folder / f"s-{number:03}.tar", {f"{number}.txt": b"a ball"}) for number in range(3)]
    lines = write_lines(folder / "lines.jsonl", [asked("a"), asked("b")])
    first, second, third = open_sources(
        [SourceRecipe(str(lines)), SourceRecipe(f"{folder}/s-{{000..001}}.tar"), SourceRecipe(f"{folder}/s-*.tar")]
    )
    assert [len(first), len(second), len(third)] == [2, 2, 3]
    assert third.name_of(2) == f"{shards[2]} 2"
    assert opened(f"{folder}/s-{{000,002}}.tar").name_of(1) == f"{shards[2]} 2"


def test_an_array_and_lines_of_the_same_records_are_the_same_set(tmp_path: Path) -> None:
    records = [asked(f"Wie heißt Nr. {number}? 🙂 ]}}", '\\"[{') for number in range(50)]
    array = tmp_path / "set.json"
    array.write_text(json.dumps(records, ensure_ascii=False, indent=2), encoding="utf-8")
    lines = opened(write_lines(tmp_path / "set.jsonl", records))
    for text in (array.read_bytes(), b"\xef\xbb\xbf \n" + array.read_bytes() + b"\n"):
        array.write_bytes(text)
        source = opened(array)
        assert [source[place].turns for place in range(50)] == [lines[place].turns for place in range(50)]
    assert source.name_of(7) == f"{array} record 8"


@QUICK
@given(st.lists(st.one_of(st.text(), st.none(), st.lists(st.integers())), min_size=1), st.booleans())
def test_any_array_is_cut_where_json_cuts_it(tmp_path: Path, records: list[Any], ascii_only: bool) -> None:
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=ascii_only), encoding="utf-8")
    source = opened(tmp_path / "a.json")
    data = (tmp_path / "a.json").read_bytes()
    starts, ends = source._starts, source._ends  # type: ignore[attr-defined]
    cut = [json.loads(data[start:end]) for start, end in zip(starts, ends, strict=True)]
    assert cut == records


def test_a_broken_line_in_the_middle_is_one_broken_sample(tmp_path: Path) -> None:
    good = json.dumps(asked("a")).encode()
    path = tmp_path / "set.jsonl"
    lines = [b"\xef\xbb\xbf" + good, b"", b"{broken", good, b"\xff\xfe", b"   ", b"[1]", b"3", b"[" * 90_000, good]
    path.write_bytes(b"\r\n".join(lines))
    source = opened(path)
    assert len(source) == 8
    assert source[0].turns == source[2].turns == source[7].turns
    assert source.name_of(1) == f"{path} line 3"
    assert fault(source, 1)[1].startswith("is no JSON (")
    assert fault(source, 3) == ("unreadable", "is no UTF-8")
    assert fault(source, 4) == fault(source, 5) == ("unreadable", "is no table of keys and values")
    assert fault(source, 6)[0] == "unreadable"


def test_a_large_record_is_not_read(tmp_path: Path) -> None:
    source = opened(write_lines(tmp_path / "set.jsonl", [asked("a " * (9 << 20)), asked("b")]))
    assert fault(source) == ("unreadable", "larger than 16 MB")
    assert source[1].turns[0].content == "b"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.json", b"", "the file is empty"),
        ("blank.jsonl", b" \n\n\t\n", "holds no samples"),
        ("array.json", b"[]", "holds no samples"),
        ("cut.json", b'[{"a": 1}, {"b"', "no JSON from record 2 on (byte 11)"),
        ("commas.json", b'[{"a": 1} {"b": 2}]', "no JSON from record 1 on (byte 10)"),
        ("open.json", b"[", "no JSON from record 1 on"),
        ("deep.json", b"[" * 200_000, "no JSON from record 1 on"),
        ("two.json", b"[{}]\n[{}]", "goes on behind the end of its array"),
        ("object.json", b'{\n "data": []}', "neither a JSON array nor one JSON object a line"),
        ("wide.json", "[{}]".encode("utf-16"), "neither a JSON array nor one JSON object a line"),
        ("csv.json", b"question,answer\n", "neither a JSON array nor one JSON object a line"),
        ("empty.tar", b"", "no whole tar"),
        ("text.tar", b"hello" * 300, "no whole tar"),
        ("packed.tar", gzip.compress(b"x"), "is compressed, and only plain tar can be read at any place"),
        ("set.csv", b"a,b", "its name tells no format"),
        ("empty.parquet", b"", "cannot be read as a data set"),
        ("text.arrow", b"hello" * 300, "cannot be read as a data set"),
    ],
)
def test_a_set_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataSetError) as caught:
        opened(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.json", "absent.json: no such file"),
        ("absent-{00..03}.tar", "absent-00.tar: no such file"),
        ("absent-*.tar", r"absent-\*.tar: no such file"),
        ("{0..999999}.tar", "more than 100,000 files"),
        ("{0..999}{0..999}.tar", "1,000,000 files"),
        ("nothing here", "nothing here: no such file, folder or data set"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataSetError, match=message):
        opened(path)


def test_a_folder_of_pictures_that_is_missing_is_named(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [asked("a")])
    with pytest.raises(DataSetError, match="no such folder; it is named as images of"):
        opened(lines, images=str(tmp_path / "absent"))
    other = write_lines(tmp_path / "b.jsonl", [asked("b")])
    with pytest.raises(DataSetError, match="2 files; name each as a source of its own"):
        opened(f"{tmp_path}/?.jsonl")
    assert other.exists()


# Records.


@pytest.mark.parametrize(
    ("question", "pictures", "said", "shown"),
    [
        ("<image>\nWhat?", 1, "What?", 1),
        ("What?\n<image>", 1, "What?", 1),
        ("Compare <image> and <image>.", 2, "Compare and.", 2),
        ("What?", 1, "What?", 1),
        ("What?", 3, "What?", 3),
        ("  kept as it is ", 0, "  kept as it is ", 0),
        ("<image>", 1, "", 1),
        ("<image>" * 10, 10, "", 10),
    ],
)
def test_marks_are_counted_and_taken_out(tmp_path: Path, question: str, pictures: int, said: str, shown: int) -> None:
    conversation = one(tmp_path, asked(question, image=[f"{number}.png" for number in range(pictures)]))
    assert conversation.turns[0] == Turn("user", said, shown)
    assert [picture.name for picture in conversation.pictures] == [f"{number}.png" for number in range(pictures)]


@QUICK
@given(st.lists(st.lists(st.sampled_from(["<image>", "a", " b ", "\n"]), min_size=1), min_size=1, max_size=5))
def test_each_turn_has_as_many_pictures_as_marks(tmp_path: Path, turns: list[list[str]]) -> None:
    marks = [words.count("<image>") for words in turns]
    talk = [
        {"role": role, "content": content}
        for words in turns
        for role, content in (("user", "".join(words) + "?"), ("assistant", "yes"))
    ]
    record = {"messages": talk, "images": ["x.png"] * sum(marks)}
    found = one(tmp_path, record).turns
    assert [turn.images for turn in found[::2]] == marks
    assert not any("<image>" in turn.content for turn in found)


@pytest.mark.parametrize(
    ("record", "kind", "reason"),
    [
        (asked("<image>\nWhat?"), "marks differ", "1 <image> for 0 pictures"),
        (asked("<image>\nWhat?", image=["a", "b"]), "marks differ", "1 <image> for 2 pictures"),
        (asked("What?", "<image>", image="a"), "marks differ", "<image> in a turn of the assistant"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "image": "a"}, "marks differ", "0 <image> for 1 pictures"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "unknown role", "unknown role 'bot'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role", "unknown role ['user']"),
        ({"conversations": []}, "unreadable", "its conversations are no list of turns, or an empty one"),
        ({"conversations": "hello"}, "unreadable", "its conversations are no list of turns, or an empty one"),
        ({"conversations": ["hello"]}, "unreadable", "a turn of its conversations is no table of keys and values"),
        ({"conversations": [{"from": "human"}]}, "unreadable", "a turn of the user has no text"),
        (asked("a \ud800"), "unreadable", "a turn of the user holds halves of characters"),
        (asked(" "), "unreadable", "an empty turn of the user"),
        (asked("What?", ""), "no answer", "an empty turn of the assistant"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no answer", "has no answer to learn from"),
        ({"question": "What?"}, "unreadable", "a turn of the assistant has no text"),
        ({"text": "a"}, "unreadable", "has none of conversations, messages, texts, question"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "unreadable",
            "a turn of the user has a part that is neither text nor image",
        ),
        (asked("What?", image=3), "missing picture", "names a picture by no file name"),
        (asked("What?", image="a\0b"), "missing picture", "names a picture by no file name"),
        (asked("What?", image="../a.png"), "missing picture", "../a.png: leads out of"),
        (asked("What?", image="b/../../a.png"), "missing picture", "b/../../a.png: leads out of"),
        (asked("What?", image="/etc/passwd"), "missing picture", "/etc/passwd: leads out of"),
        (asked("What?", image="."), "missing picture", ".: leads out of"),
        (asked("What?", image="https://a.b/c.png"), "missing picture", "https://a.b/c.png: a URL; download pictures"),
        (asked("What?", image="data:image/png;base64,AAAA"), "missing picture", "data:image/png;base64,AAAA: a URL"),
    ],
)
def test_a_record_that_cannot_be_shown_says_why(tmp_path: Path, record: object, kind: str, reason: str) -> None:
    found = fault(opened(write_lines(tmp_path / "one.jsonl", [record])))
    assert found[0] == kind
    assert found[1].startswith(reason)


def test_a_name_inside_the_folder_is_read_however_it_is_written(folder: Path) -> None:
    for name in ("red.png", "./red.png", "sub/../red.png", str(folder / "red.png")):
        assert bytes_of(one(folder, asked("What?", image=name))) == [RED]
    (folder / "link").symlink_to(folder / "sub")
    assert bytes_of(one(folder, asked("What?", image="link/blue.png"))) == [BLUE]
    other = opened(write_lines(folder / "a.jsonl", [asked("What?", image="blue.png")]), images=str(folder / "sub"))
    assert bytes_of(other[0]) == [BLUE]


@pytest.mark.parametrize(("name", "reason"), [("no.png", "no such file"), ("sub", "no file"), ("\ud800", "cannot be")])
def test_a_picture_that_is_no_file_is_found_when_it_is_opened(folder: Path, name: str, reason: str) -> None:
    os.mkfifo(folder / "pipe")
    for each in (name, "pipe"):
        (picture,) = one(folder, asked("What?", image=each)).pictures
        with pytest.raises(BrokenSampleError) as caught:
            picture.open()
        assert caught.value.kind == "missing picture"
        assert each == "pipe" or reason in str(caught.value)


def test_other_layouts_are_read(folder: Path) -> None:
    vqa = one(folder, {"image": "red.png", "question": "How many?", "answer": 3})
    assert vqa.turns == (Turn("user", "How many?", 1), Turn("assistant", "3"))
    texts = one(folder, {"images": ["red.png"], "texts": [{"user": "a", "assistant": "b"}] * 2})
    assert [turn.images for turn in texts.turns] == [1, 0, 0, 0]
    system = one(folder, {"messages": [{"role": "system", "content": "Be kind."}, *MESSAGES], "image": ["red.png"] * 2})
    assert system.turns == (Turn("system", "Be kind."), *TURNS)
    named = [{"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "<image>?"}]}]
    parts = one(folder, {"messages": [*named, {"role": "assistant", "content": "x"}]})
    assert parts.turns[0] == Turn("user", "<image>?", 1)  # in a part, a mark is a word
    assert bytes_of(parts) == [RED]


# Tar.


def test_members_of_a_shard_are_grouped_wherever_they_stand(tmp_path: Path) -> None:
    record = json.dumps(asked("<image>" * 3 + "What?", image=["a.jpg", "b.jpg", "c.jpg"])).encode()
    members = [(f"a.{number}.PNG", bytes([number])) for number in (10, 2, 1)]
    path = write_tar(
        tmp_path / "a.tar", [members[0], ("b/a.txt", b"a cat\n"), ("b/a.jpg", RED), *members[1:], ("a.json", record)]
    )
    source = opened(path)
    assert [source.name_of(place) for place in range(2)] == [f"{path} a", f"{path} b/a"]
    assert bytes_of(source[0]) == [b"\1", b"\2", b"\x0a"]
    assert source[1].turns[1] == Turn("assistant", "a cat")
    assert bytes_of(source[1]) == [RED]


@QUICK
@given(
    st.dictionaries(st.text("abc/", min_size=1, max_size=5).filter(lambda key: key[-1] != "/"), st.integers(1, 12)),
    st.randoms(),
)
def test_any_order_of_members_gives_each_sample_its_own(tmp_path: Path, sizes: dict[str, int], random: Any) -> None:
    members = [(f"{key}.txt", key.encode()) for key in sizes]
    members += [(f"{key}.{n}.png", f"{key} {n}".encode()) for key, count in sizes.items() for n in range(count)]
    random.shuffle(members)
    path = write_tar(tmp_path / "a.tar", members)
    if not sizes:
        with pytest.raises(DataSetError, match="holds no samples"):
            opened(path)
        return
    source = opened(path)
    assert len(source) == len(sizes)
    for place in range(len(source)):
        conversation = source[place]
        key = conversation.turns[1].content
        assert source.name_of(place) == f"{path} {key}"
        assert bytes_of(conversation) == [f"{key} {n}".encode() for n in range(sizes[key])]


def test_a_caption_stands_in_for_a_record_without_turns(tmp_path: Path) -> None:
    meta = json.dumps({"url": "https://a.b/c", "width": 3}).encode()
    members = {"0.jpg": RED, "0.json": meta, "0.txt": b"a cat", "1.jpg": RED, "1.json": meta, "2.jpg": RED}
    source = opened(write_tar(tmp_path / "a.tar", members))
    assert source[0].turns == (Turn("user", "", 1), Turn("assistant", "a cat"))
    assert fault(source, 1)[1].startswith("has none of")
    assert fault(source, 2) == ("unreadable", "has neither .json nor .txt")


def test_broken_samples_of_a_shard_are_named(tmp_path: Path) -> None:
    named = json.dumps(asked("What?", image="a.jpg")).encode()
    members = [
        ("../../evil.txt", b"x"),
        ("../../evil.png", RED),
        ("a.json", named),
        ("b.txt", b""),
        ("b.png", RED),
        ("c.txt", b"\xff"),
        ("d.txt", b"x"),
        ("d.txt", b"y"),
        ("e.json", b"{"),
        ("f.txt", b"x"),
    ]
    source = opened(write_tar(tmp_path / "a.tar", members))
    assert source[0].turns[1].content == "x"  # nothing is unpacked, so a name is but a name
    assert [fault(source, place) for place in range(1, 5)] == [
        ("missing picture", "names 1 pictures, and its shard has 0"),
        ("no answer", "an empty turn of the assistant"),
        ("unreadable", "its .txt is no UTF-8"),
        ("unreadable", "has two members .txt"),
    ]
    assert fault(source, 5)[1].startswith("is no JSON")
    assert fault(source, 6) == ("missing picture", "has a caption and no picture")
    assert source.name_of(4) == f"{tmp_path / 'a.tar'} d"
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(DataSetError, match=r"a\.txt is no plain file; pack the files themselves"):
        opened(path)


def test_folders_and_hidden_files_of_a_shard_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("d.x")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("d.x/._a.txt"))
        archive.addfile(tarfile.TarInfo("d.x/a.txt"))
    assert len(opened(path)) == 1
    with pytest.raises(DataSetError, match="README has no suffix"):
        opened(write_tar(path, {"README": b"x"}))


def test_a_shard_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.txt": b"x" * 5000, "1.txt": b"y" * 5000})
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DataSetError, match="no whole tar"):
        opened(path)


# The datasets library.


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "both"))
    assert opened(tmp_path / "both")[0].turns == opened(tmp_path / "both", split="test")[0].turns
    with pytest.raises(DataSetError, match="has no split dev, but train, test; name one by split"):
        opened(tmp_path / "both", split="dev")


def test_files_of_a_folder_are_a_split_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, name in enumerate(["test-0", "train-0", "train-1"]):
        made = datasets.Dataset.from_dict({"question": [f"{number}"], "answer": ["b"]})
        made.to_parquet(str(tmp_path / f"data/{name}.parquet"))
    source = opened(tmp_path)
    assert [source[place].turns[0].content for place in range(len(source))] == ["1", "2"]
    with pytest.raises(DataSetError, match=r"has no dev\*\.parquet, but test-0\.parquet"):
        opened(tmp_path, split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataSetError, match=r"holds no data set; name its files, or shards by a pattern such as .*tar"):
        opened(tmp_path / "empty")


def test_columns_that_are_not_known_are_listed(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(DataSetError, match=r"has none of the columns conversations, .*, but prompt"):
        opened(tmp_path / "odd")
    datasets.Dataset.from_dict({"question": [], "answer": []}).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(DataSetError, match=r"none\.parquet: .* no data"):
        opened(tmp_path / "none.parquet")
    empty = tmp_path / "none.arrow"
    with ArrowWriter(path=str(empty), features=datasets.Features({"question": datasets.Value("string")})) as writer:
        writer.finalize()
    with pytest.raises(DataSetError, match="holds no samples"):
        opened(empty)


def test_paths_in_a_table_stay_in_its_folder(folder: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    names = ["red.png", "/etc/passwd", "absent.png"]
    rows = {"image": [{"bytes": None, "path": name} for name in names], "question": ["a"] * 3, "answer": ["b"] * 3}
    source = DatasetSource("set", datasets.Dataset.from_dict(rows, features), PictureFolder(str(folder)))
    assert bytes_of(source[0]) == [RED]
    assert fault(source, 1)[1].startswith("/etc/passwd: leads out of")
    with pytest.raises(BrokenSampleError, match=r"absent\.png: no such file"):
        source[2].pictures[0].open()


def test_a_data_set_on_the_hub_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[object] = []

    def load(repo: str, **options: object) -> object:
        asked_for.append((repo, options))
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataSetError, match=r"^owner/name@v1: cannot be read as a data set \(Couldn't reach"):
        opened("owner/name@v1")
    assert asked_for == [("owner/name", {"split": "train", "revision": "v1"})]


@QUICK
@given(
    st.lists(st.sampled_from(["..", ".", "a", "/", "//", "\\", "~", "%2e%2e", "s", "\ud800"]), max_size=8).map("".join)
)
def test_no_name_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "pictures"
    try:
        picture = PictureFolder(str(folder))(name)
    except BrokenSampleError:
        return
    assert isinstance(picture, PictureFile)
    assert os.path.normpath(picture.path).startswith(f"{folder}/")
    assert ".." not in picture.path.split("/")
