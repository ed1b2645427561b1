"""The page stands alone, and shows what it is given as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svcli.bench.page import page
from svcli.bench.svg import ticks
from tests.bench.reports import beside_a_pruner, report


class Reader(HTMLParser):
    """Tags that are open, every tag, and every attribute."""

    VOID = ("meta", "br", "rect", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_asks_nothing_of_anybody_and_is_closed_as_it_was_opened() -> None:
    text = page(report({"prefill": 0.5, "vision": 1.2}))
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not {name for name, _ in reader.attributes} & {"src", "href", "srcset", "xlink:href", "onload"}
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text


def test_what_is_shown_is_text() -> None:
    nasty = '<script>alert("x")</script>&\'"'
    found = report(name=nasty)
    found = found.model_copy(
        update={"remarks": (nasty,), "settings": found.settings.model_copy(update={"question": nasty})}
    )
    text = page(found)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4


def test_every_plot_is_well_formed_and_says_what_it_is() -> None:
    drawn = re.findall(r"<svg.*?</svg>", page(report({"prefill": 0.5})), re.DOTALL)
    labels = [ElementTree.fromstring(each).attrib["aria-label"] for each in drawn]
    assert labels == [
        "Time of an answer by stage",
        "Ratios",
        "Share of the roofline",
        "A token of each of several sequences",
        "Prefill of longer prompts",
        "A token behind longer prompts",
    ]


def test_a_crowded_run_colours_no_interval() -> None:
    quiet, crowded = page(report({"prefill": 0.5})), page(report({"prefill": 0.5}, others=0.6))
    assert '<circle class="lower"' in quiet
    assert '<circle class="lower"' not in crowded


def test_one_side_alone_is_drawn_too() -> None:
    both = report()
    stages = {
        name: each.model_copy(update={"sides": {"skipped": each.sides["skipped"]}, "ratio": None})
        for name, each in both.stages.items()
    }
    alone = both.model_copy(
        update={"sides": {"skipped": both.sides["skipped"]}, "stages": stages, "batch": (), "context": (), "roof": None}
    )
    text = page(alone)
    assert "skipped / dense" not in text
    assert text.count("<svg") == 2


@given(st.floats(0, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_inside_and_not_too_many(low: float, size: float, most: int) -> None:
    high = low + size
    if high - low < 1e-6 * high:
        return
    found = ticks(low, high, most)
    assert len(found) <= most + 1
    assert all(low - 1e-6 * size <= each <= high + 1e-6 * size for each in found)


def test_ticks_of_known_ranges() -> None:
    assert ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(0.9, 1.1, 4) == pytest.approx([0.9, 0.95, 1.0, 1.05, 1.1])


def test_what_a_peer_was_asked_stands_above_its_table() -> None:
    text = page(beside_a_pruner())
    for title in (
        "openvino-genai 1 on 264 rows of text",
        "openvino-genai 1 on a picture, dense: 266 rows in its KV cache, 264 in ours",
        "openvino-genai 1 on a picture, CDPruner: 107 rows in its KV cache, 106 in ours",
    ):
        assert f"<h2>{title}</h2>" in text
