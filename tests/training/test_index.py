"""What a set holds is known to the row before it is shown, and whatever cannot be shown is named."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skipvision.config import ModelConfig
from skipvision.training.conversation import Broken, BrokenSampleError, Source
from skipvision.training.index import Index, index_key, scan, scan_once
from skipvision.training.samples import measure_sample, read_sample
from skipvision.training.sources import open_sources
from skipvision.training.speaker import IGNORE
from skipvision.training.tune_recipe import SourceRecipe
from tests.training.fake_speaker import END, PLAIN, SKIPPING, TILED, WordSpeaker
from tests.training.sets import asked, encoded, write_lines, write_tar

SPEAKER = WordSpeaker()


def lines(folder: Path, *records: object) -> Source:
    (source,) = open_sources([SourceRecipe(str(write_lines(folder / "set.jsonl", records)))])
    return source


def shown(folder: Path, data: bytes, name: str = "a.png") -> Source:
    (folder / name).write_bytes(data)
    return lines(folder, asked("<image>\nWhat is this?", image=name))


def found(source: Source, config: ModelConfig = PLAIN, *, decode: bool = True, speaker: Any = SPEAKER) -> Index:
    return scan([source], speaker, config, 64, decode=decode)


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_rows_and_labels_are_those_of_the_conversation(tmp_path: Path) -> None:
    source = shown(tmp_path, encoded())
    sample = read_sample(source, 0, SPEAKER, SKIPPING, 64)
    # Role, picture, three words; role, three words, end.
    assert (len(sample.spoken.ids), sample.layout.length) == (10, 9 + 5)
    assert [label for label in sample.spoken.labels if label != IGNORE] == sample.spoken.ids[6:10]
    assert sample.spoken.labels[8:] == [END, IGNORE]
    (pixels, cut), *others = sample.views
    assert (others, pixels.shape, cut.num_views) == ([], (1, 3, 28, 28), 1)
    index = found(source, SKIPPING)
    assert (index.rows[0], index.kept[0], index.answers[0], index.pictures[0]) == (14, 12, 4, 1)
    assert (index.visual[0], index.visual_kept[0], index.visual_plain[0]) == (5, 3, 4)


@pytest.mark.parametrize("decode", [False, True])
def test_a_scan_says_what_reading_finds(tmp_path: Path, decode: bool) -> None:
    records: list[object] = []
    for number, size in enumerate([(30, 20), (200, 20), (20, 200), (84, 84), (10, 10)]):
        turned = Image.Exif()
        turned[0x0112] = 6
        (tmp_path / f"{number}.jpg").write_bytes(encoded(size, file_format="JPEG", exif=turned))
        records += [asked("What?", image=f"{number}.jpg"), asked("What?", image=[f"{number}.jpg"] * 2), asked("What?")]
    source, speaker = lines(tmp_path, *records), WordSpeaker(tiled=True)
    index = scan([source], speaker, TILED, 4096, decode=decode)
    for place in range(len(source)):
        sample = read_sample(source, place, speaker, TILED, 4096)
        assert index.rows[place] == sample.layout.length
        assert index.visual[place] == sum(4 * len(pixels) for pixels, _ in sample.views)
        assert all(len(pixels) == cut.num_views for pixels, cut in sample.views)
    assert len({*index.visual.tolist()}) > 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"Dear reader, this is no picture.", "not a picture that can be read"),
        (bomb(30_000, 30_000), "more than 100 megapixels"),
        (encoded((300, 200), file_format="JPEG")[:400], "damaged"),
    ],
)
def test_a_picture_that_cannot_be_decoded_is_a_broken_sample(tmp_path: Path, data: bytes, reason: str) -> None:
    source = shown(tmp_path, data)
    (broken,) = found(source).broken.values()
    assert broken == Broken(source.name_of(0), broken.reason, "broken picture")
    assert broken.reason.startswith(f"a.png: {reason}")
    with pytest.raises(BrokenSampleError) as caught:
        read_sample(source, 0, SPEAKER, PLAIN, 64)
    assert str(caught.value) == broken.reason


def test_what_a_header_tells_is_found_without_decoding(tmp_path: Path) -> None:
    speaker = WordSpeaker(tiled=True)
    for data, is_broken in ((b"", 1), (b"hello", 1), (bomb(30_000, 30_000), 1), (encoded(), 0)):
        source = shown(tmp_path, data)
        assert len(found(source, TILED, decode=False, speaker=speaker).broken) == is_broken
    # Seen once, only an empty or a missing file is found.
    assert not found(shown(tmp_path, b"hello"), decode=False).broken
    assert found(shown(tmp_path, b""), decode=False).broken[0].kind == "broken picture"
    (tmp_path / "a.png").unlink()
    (broken,) = found(lines(tmp_path, asked("What?", image="a.png")), decode=False).broken.values()
    assert (broken.kind, broken.reason) == ("missing picture", "a.png: no such file")


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("CMYK", "JPEG"), ("I;16", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("1", "TIFF"), ("L", "PPM")],
)
def test_pictures_of_every_mode_are_seen(tmp_path: Path, mode: str, file_format: str) -> None:
    source = shown(tmp_path, encoded(mode=mode, file_format=file_format))
    assert not found(source).broken
    assert read_sample(source, 0, SPEAKER, PLAIN, 64).views[0][0].shape == (1, 3, 28, 28)


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    pixels, _ = read_sample(lines(tmp_path, asked("What?", image="a.gif")), 0, SPEAKER, PLAIN, 64).views[0]
    assert pixels[0, :, 9, 9].tolist() == [1, 0, 0]


def test_what_is_behind_transparent_parts_is_the_speakers_to_say(tmp_path: Path) -> None:
    Image.new("RGBA", (28, 28), (255, 0, 0, 0)).save(tmp_path / "a.png")
    source = lines(tmp_path, asked("What?", image="a.png"))
    white, dropped = (
        read_sample(source, 0, WordSpeaker(transparency=each), PLAIN, 64).views[0][0][0, :, 9, 9].tolist()
        for each in ("white", "dropped")
    )
    assert (white, dropped) == ([1, 1, 1], [1, 0, 0])


def test_samples_that_are_too_long_are_broken(tmp_path: Path) -> None:
    source = lines(
        tmp_path,
        asked("word " * 30_000),
        asked("What?", image=["a.png"] * 70),
        asked("word " * 56, "word"),  # role, 56 words; role, one word, end: 60
        asked("word " * 61, "word"),
    )
    index = found(source)
    assert index.rows.tolist() == [0, 0, 60, 0]
    assert [(place, each.kind) for place, each in index.broken.items()] == [(n, "too long") for n in (0, 1, 3)]
    assert index.broken[0].reason == "30,006 rows, and at most 64 are allowed"
    assert index.broken[1].reason == "70 pictures, and at most 64 rows are allowed"


def test_ten_pictures_are_shown_in_order(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (28, 28), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    record = asked("<image>" * 10 + "Which is the reddest?", "the last", image=[f"{n}.png" for n in range(10)])
    sample = read_sample(lines(tmp_path, record), 0, SPEAKER, PLAIN, 64)
    assert [round(255 * float(pixels[0, 0, 0, 0])) for pixels, _ in sample.views] == [20 * n for n in range(10)]
    assert sum(span.length for span in sample.layout.images) == 40


def test_what_the_template_refuses_is_named(tmp_path: Path) -> None:
    twice = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}
    index = found(lines(tmp_path, asked("a"), twice))
    assert index.broken == {1: Broken(f"{tmp_path}/set.jsonl line 2", "user and assistant must alternate", "refused")}


def test_sources_stand_one_behind_the_other(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [asked("a"), {}, asked("a b")])
    write_tar(tmp_path / "b.tar", {"x.txt": b"a b c", "x.png": encoded(), "y.txt": b"a", "y.png": b"no"})
    write_lines(tmp_path / "c.jsonl", [{}])
    sources = open_sources([SourceRecipe(str(tmp_path / name)) for name in ("a.jsonl", "b.tar", "c.jsonl")])
    seen: list[tuple[int, int]] = []
    index = scan(sources, SPEAKER, PLAIN, 64, decode=True, report=lambda done, total: seen.append((done, total)))
    assert (index.sizes, len(index), index.rows.nonzero()[0].tolist()) == ((3, 2, 1), 6, [0, 2, 3])
    assert index.rows.tolist() == [7, 0, 8, 10, 0, 0]
    assert index.starts.tolist() == [0, 3, 5, 6]
    assert [each.name.rpartition("/")[2] for each in index.broken.values()] == [
        "a.jsonl line 2",
        "b.tar y",
        "c.jsonl line 1",
    ]
    assert seen[-1] == (6, 6)


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    records = [asked("word " * number, image=["a.png"] * (number % 3)) for number in range(1, 70)]
    source, other = lines(tmp_path, *records), write_tar(tmp_path / "b.tar", {"x.txt": b"a", "x.png": b"no"})
    sources = [source, *open_sources([SourceRecipe(str(other))])]
    first, second = (scan(sources, SPEAKER, SKIPPING, 64, decode=True, workers=workers) for workers in (0, 2))
    assert first.broken == second.broken
    assert {each.kind for each in first.broken.values()} == {"too long", "broken picture"}
    for name in ("rows", "kept", "visual", "visual_kept", "visual_plain", "answers", "pictures"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


def test_an_index_is_written_whole_and_read_again(tmp_path: Path) -> None:
    source = lines(tmp_path, asked("a"), {"id": "\ud800"}, asked("What?", image="\ud800.png"))
    index, path = found(source), tmp_path / "run/index.safetensors"
    index.save(path, "key")
    again = Index.load(path, "key")
    assert again is not None
    assert (again.sizes, again.broken) == (index.sizes, index.broken)
    for name in ("rows", "kept", "visual", "visual_kept", "visual_plain", "answers", "pictures"):
        assert np.array_equal(getattr(again, name), getattr(index, name))
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert Index.load(path, "other") is None
    assert Index.load(tmp_path / "absent", "key") is None
    for count in (0, 5, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:count])
        assert Index.load(path, "key") is None


def test_a_set_is_scanned_once_until_something_changes(tmp_path: Path) -> None:
    path, scans = tmp_path / "index.safetensors", list[int]()

    def look(source: Source, config: ModelConfig = PLAIN, speaker: WordSpeaker = SPEAKER, length: int = 64) -> Index:
        return scan_once(path, [source], speaker, config, length, report=lambda done, _total: scans.append(done))

    source = lines(tmp_path, asked("a"))
    first = look(source)
    assert np.array_equal(look(source).rows, first.rows)
    assert scans == [1]
    changes: list[Callable[[], Index]] = [
        lambda: look(source, config=SKIPPING),
        lambda: look(source, length=65),
        lambda: look(source, speaker=WordSpeaker(tiled=True)),
        lambda: look(lines(tmp_path, asked("a"), asked("b"))),
    ]
    for change in changes:
        scans.clear()
        change()
        assert scans
    assert index_key([source], SPEAKER, PLAIN, 64) == index_key([source], WordSpeaker(), PLAIN, 64)


def test_ten_thousand_rows_of_text_take_seconds(tmp_path: Path) -> None:
    source = lines(tmp_path, *[asked(f"What is {number}?", "a ball " * 20) for number in range(10_000)])
    began = time.process_time()
    index = scan([source], SPEAKER, PLAIN, 64, decode=False)
    assert index.rows.all()
    assert len(index) == 10_000
    assert time.process_time() - began < 10


def test_a_measure_is_made_of_plain_numbers(tmp_path: Path) -> None:
    measure = measure_sample(shown(tmp_path, encoded()), 0, SPEAKER, SKIPPING, 64)
    assert json.loads(json.dumps(vars(measure)))["rows"] == 14
