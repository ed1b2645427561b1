"""Wrong answers with their pictures, as one HTML file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from skipvision.layout import Ints, picture_spans
from skipvision.pictures import ImageError, open_image
from skipvision.tiles import cut_picture
from svcli.chat.model import DENSE
from svcli.evaluation.asker import Said
from svcli.evaluation.askers import BLIND
from svcli.evaluation.report import Report, figure
from svcli.evaluation.results import Line
from svcli.evaluation.run import Work
from svcli.evaluation.task import Item
from svcli.files import write
from svcli_engines.overlay import OverlayError, mark_retained
from svcli_export.manifest import Manifest, load_manifest

MAX_ITEMS = 150
MAX_BYTES = 12 << 20
"""Of all pictures together; behind that, items are shown without."""
MAX_PICTURES = 4
"""Of one item."""
SIDE = 256
"""Pixels of the longer side of a picture."""
_LONGEST = 2000
"""Letters of a question or an answer."""
_QUALITY = 80


@dataclass(frozen=True)
class _Picture:
    url: str
    width: int
    height: int


@dataclass(frozen=True)
class _Answer:
    name: str
    is_right: bool
    verdict: str
    said: str
    read: str
    """Empty where it is what was said."""
    shown: str
    """What it was shown of the pictures, where that is not to be marked in them."""
    pictures: Sequence[_Picture]
    """With what was retained of them; none where nothing was left out."""


@dataclass
class _Card:
    id: str
    group: str
    question: str
    truth: str
    lines: dict[str, Line]
    pictures: list[_Picture] = field(default_factory=list)
    more: int = 0
    """Pictures that are not shown."""
    answers: list[_Answer] = field(default_factory=list)

    @property
    def wrong(self) -> str:
        return json.dumps([name for name, line in self.lines.items() if line.score < 1])

    @property
    def right(self) -> str:
        return json.dumps([name for name, line in self.lines.items() if line.score >= 1])


def write_page(path: Path, report: Report, folder: Path, bundle: Path | None) -> None:
    """Items that somebody answered wrongly, MAX_ITEMS at most, in the order of the task.

    `folder` has the task's files; without `bundle`, nothing is marked. Raises TaskError where the files are gone.
    """
    answered = _by_item(report)
    chosen = _chosen(report, answered)
    manifest = None if bundle is None else load_manifest(bundle, quick=True)
    painter = _Painter(manifest)
    cards = [painter.card(item, answered[item.id], key) for item, key in _items(report, folder, chosen)]
    style, script = (_file(name) for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(_file("page.html")).render(
        title=f"{report.task.title}, {report.split}",
        metric=report.task.metric,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        cards=cards,
        groups=sorted({card.group for card in cards if card.group}),
        num_items=len(answered),
        num_wrong=sum(_is_wrong(lines) for lines in answered.values()),
        not_shown=len(cards) < sum(_is_wrong(lines) for lines in answered.values()),
        remark=painter.remark,
        is_marked=any(answer.pictures for card in cards for answer in card.answers),
        askers=[_facts(report, number) for number in range(len(report.answers))],
        sentences=report.sentences(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, page.encode("utf-8", "replace"))


class _Painter:
    """Pictures as data URLs, until there are too many."""

    def __init__(self, manifest: Manifest | None) -> None:
        self._manifest = manifest
        self._num_bytes = 0
        self.remark = "" if manifest is not None else "The bundle is not where it was, so nothing is marked."

    def card(self, item: Item, lines: dict[str, Line], key: str) -> _Card:
        card = _Card(item.id, item.group, _cut(item.question), _cut(_truth(item.truth)), lines)
        images = list(self._images(item)) if all(line.pictures == key for line in lines.values()) else []
        shown = images[:MAX_PICTURES]
        card.pictures, card.more = [self._picture(image) for image in shown], len(item.pictures) - len(shown)
        for name, line in lines.items():
            marked = list(self._marked(line, images))[:MAX_PICTURES] if line.said is not None else []
            card.answers.append(_answer(name, line, [self._picture(image) for image in marked]))
        return card

    def _images(self, item: Item) -> Iterator[Image.Image]:
        if self._num_bytes > MAX_BYTES:
            self.remark = "Pictures are left out behind the first of them, for the size of this page."
            return
        transparency = "white" if self._manifest is None else self._manifest.image.transparency
        with suppress(ImageError):  # that one is broken, the answers say
            for picture in item.pictures:
                yield open_image(picture, transparency).image

    def _marked(self, line: Line, images: Sequence[Image.Image]) -> Iterator[Image.Image]:
        """The pictures of which something was left out."""
        assert line.said is not None
        if self._manifest is None or len(line.said.retained) != len(images):
            return
        config = self._manifest.config
        for image, kept in zip(images, line.said.retained, strict=True):
            cut = cut_picture(config, image.height, image.width, len(images) == 1)
            spans = picture_spans(config, cut)
            if not kept or len(kept) == sum(span.num_tokens for span in spans):
                continue
            per_run = config.num_tokens if len(spans) > 1 else spans[0].num_tokens
            try:
                retained = _by_run(kept, per_run, len(spans))
                yield mark_retained(image, retained, config, self._manifest.image, cut)
            except OverlayError as error:
                self.remark = f"{error}."

    def _picture(self, image: Image.Image) -> _Picture:
        small = image.copy()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        small.save(file, "JPEG", quality=_QUALITY)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        self._num_bytes += len(url)
        return _Picture(url, small.width, small.height)


def _by_item(report: Report) -> dict[str, dict[str, Line]]:
    found = dict[str, dict[str, Line]]()
    for each in report.answers:
        for line in each.lines:
            found.setdefault(line.item.id, {})[each.name] = line
    return found


def _chosen(report: Report, answered: dict[str, dict[str, Line]]) -> frozenset[str]:
    """Ids of the items to show: those that the first asker has wrong, then others, from everywhere in the task."""
    own = report.answers[0].name
    wrong = [name for name, lines in answered.items() if _is_wrong(lines)]
    first = [name for name in wrong if own in answered[name] and answered[name][own].score < 1]
    others = sorted(set(wrong) - set(first))
    taken = _spread(first, MAX_ITEMS)
    return frozenset([*taken, *_spread(others, MAX_ITEMS - len(taken))])


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many, as far from each other as can be."""
    return [names[number * len(names) // most] for number in range(most)] if len(names) > most else list(names)


def _is_wrong(lines: dict[str, Line]) -> bool:
    return any(line.score < 1 for line in lines.values())


def _items(report: Report, folder: Path, chosen: frozenset[str]) -> Iterator[tuple[Item, str]]:
    left = set(chosen)
    for item, key in Work(report.task, folder, report.split).items() if left else ():
        if item.id in left:
            left.remove(item.id)
            yield item, key
        if not left:
            return


def _answer(name: str, line: Line, pictures: Sequence[_Picture]) -> _Answer:
    if line.said is None:
        return _Answer(name, False, "could not be asked", _cut(line.error), "", "", ())
    said, read = line.said.text, "" if line.answer == line.said.text.strip() else line.answer
    verdict = "right" if line.score >= 1 else "wrong" if line.score <= 0 else f"score {line.score:.2f}"
    shown = _shown(name, line.said) if not pictures else ""
    return _Answer(name, line.score >= 1, verdict, _cut(said) or "(nothing)", _cut(read), shown, pictures)


def _shown(name: str, said: Said) -> str:
    """In a few words; empty where that is not known."""
    kind, _, count = name.partition(":")
    if kind == BLIND:
        return "no picture"
    if kind == "pool":
        return f"{count} means of neighbours"
    return "all of the picture" if name == DENSE and said.visual_tokens else ""


def _facts(report: Report, number: int) -> dict[str, Any]:
    each = report.answers[number]
    around = "" if each.interval is None else f" ({figure(each.interval.low)} to {figure(each.interval.high)})"
    tokens = each.mean("visual_tokens")
    return {
        "name": each.name,
        "figure": figure(each.value) + around,
        "visual_tokens": "-" if tokens is None else f"{tokens:.0f}",
        "num_failed": each.num_failed,
    }


def _by_run(kept: Sequence[int], per_run: int, num_runs: int) -> Ints:
    """[I, R] as the overlay takes it, which knows no run of which nothing was retained. Raises OverlayError."""
    rows = [[number % per_run for number in kept if number // per_run == run] for run in range(num_runs)]
    if not all(rows):
        raise OverlayError("not everything is marked: of some parts of a picture nothing was retained")
    longest = max(map(len, rows))
    return np.array([row + [row[-1]] * (longest - len(row)) for row in rows], np.int64)


def _truth(truth: Any) -> str:
    if isinstance(truth, dict):
        if "answer" in truth:
            return _truth(truth["answer"])
        return "; ".join(f"{name}: {_truth(value)}" for name, value in truth.items())
    return ", ".join(map(_truth, truth)) if isinstance(truth, list) else str(truth)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _file(name: str) -> str:
    return (files("svcli.evaluation") / "browse" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
