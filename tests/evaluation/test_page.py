"""The page of wrong answers: one file, bounded, that loads nothing and believes nothing it shows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from typer.testing import CliRunner

from svcli.app import app
from svcli.evaluation import page
from tests.browsers import chromium

EVIL = """</q></script><script>document.title = "evil"</script><img src="https://example.com/x.png" onerror="x()">'"&"""


class Parts(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def evaluate(*arguments: str | Path | int) -> None:
    done = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty items, one of whose answers is not to be believed; dense is asked the same."""
    out = tmp_path_factory.mktemp("out")
    evaluate("bundled", "--split", "shapes", "--baselines", "dense", "--limit", 40, "--out", out)
    path = out / "dense.jsonl"
    header, first, *rest = path.read_text(encoding="utf-8").splitlines()
    changed = json.loads(first) | {"text": EVIL, "answer": EVIL + "!", "score": 0.0, "group": EVIL, "question": EVIL}
    path.write_text("\n".join([header, json.dumps(changed), *rest]) + "\n", encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def written(results: Path) -> Path:
    evaluate("--merge", results, "--html", results / "wrong.html")
    return results / "wrong.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


def items(out: Path) -> dict[str, dict[str, float]]:
    """Score by asker and id."""
    found = {}
    for name in ("skipped", "dense"):
        told = (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        found[name] = {line["id"]: line["score"] for line in map(json.loads, told)}
    return found


def test_every_wrong_answer_is_there_and_what_was_retained_is_marked(results: Path, written: Path) -> None:
    scores, text = items(results), written.read_text(encoding="utf-8")
    wrong = {name for each in scores.values() for name, score in each.items() if score < 1}
    assert set(re.findall(r'class="id">([^<]*)<', text)) == wrong
    images = [attributes for tag, attributes in Parts(text).tags if tag == "img"]
    assert [each["alt"] for each in images] == ["picture 1", "what skipped retained"] * len(wrong)
    assert images[0]["src"] != images[1]["src"]
    assert "Behind a veil" in text


def test_it_loads_nothing_and_what_it_shows_is_text(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    tags = Parts(text).tags
    assert {tag for tag, _ in tags} & {"link", "iframe", "object", "base"} == set()
    assert sum(tag == "script" for tag, _ in tags) == 1
    for _, attributes in tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "<script>document.title" not in text
    assert text.count("&lt;script&gt;document.title") >= 2


def test_it_is_bounded(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, path = items(results), results / "few.html"
    own = {name for name, score in scores["skipped"].items() if score < 1}
    monkeypatch.setattr(page, "MAX_ITEMS", 3)
    monkeypatch.setattr(page, "MAX_BYTES", 1)
    evaluate("--merge", results, "--html", path)
    text = path.read_text(encoding="utf-8")
    shown = set(re.findall(r'class="id">([^<]*)<', text))
    assert len(shown) == 3
    assert shown <= own, "the bundle's own mistakes come first"
    assert "The rest are in the JSON lines." in text
    assert "Pictures are left out" in text
    assert text.count("<img") == 2


def test_what_is_not_marked_is_said(tmp_path: Path) -> None:
    evaluate("bundled", "--split", "shapes", "--limit", 2, "--out", tmp_path, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    cards = text.count("<article")
    assert cards > 0
    for shown in ("no picture", "81 means of neighbours", "all of the picture"):
        assert text.count(f"shown: {shown}<") == cards
    assert text.count("shown: ") == 3 * cards, "the bundle and random:98 are marked"
    assert text.count('alt="what random:98 retained"') == text.count('alt="what skipped retained"') == cards


def test_without_the_bundle_nothing_is_marked_and_that_is_said(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "moved")
    for path in (tmp_path / "moved").glob("*.jsonl"):
        header, *rest = path.read_text(encoding="utf-8").splitlines(keepends=True)
        told = json.loads(header)
        told["told"]["bundle"] = str(tmp_path / "gone")
        path.write_text("".join([json.dumps(told) + "\n", *rest]), encoding="utf-8")
    evaluate("--merge", tmp_path / "moved", "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "nothing is marked" in text
    assert "what skipped retained" not in text
    assert "Behind a veil" not in text


def test_a_browser_filters_it_and_obeys_its_policy(results: Path, written: Path, browser: Chrome) -> None:
    browser.get(written.as_uri())
    scores = items(results)
    cards = browser.find_elements(By.CSS_SELECTOR, "article")

    def shown() -> list[str]:
        return [card.find_element(By.CSS_SELECTOR, ".id").text for card in cards if card.is_displayed()]

    assert len(shown()) == len(cards) > 3
    Select(browser.find_element(By.ID, "wrong")).select_by_visible_text("skipped")
    assert set(shown()) == {name for name, score in scores["skipped"].items() if score < 1}
    Select(browser.find_element(By.ID, "wrong")).select_by_visible_text("dense")
    Select(browser.find_element(By.ID, "right")).select_by_visible_text("skipped")
    only = {name for name, score in scores["dense"].items() if score < 1 and scores["skipped"][name] == 1}
    assert set(shown()) == only != set()
    assert browser.find_element(By.ID, "count").text == f"{len(only)} of {len(cards)}"
    Select(browser.find_element(By.ID, "group")).select_by_visible_text("describe")
    groups = {card.find_element(By.CSS_SELECTOR, ".group").text for card in cards if card.is_displayed()}
    assert groups <= {"describe"}
    assert browser.title != "evil"
    told = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
    asked = [each["params"]["request"]["url"] for each in told if each["method"] == "Network.requestWillBeSent"]
    assert not [url for url in asked if url.startswith(("http", "ws"))]
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
