"""The site: its pages are those of the code, its nav names them all, and it is built without asking anybody."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.support.expected_conditions import presence_of_element_located
from selenium.webdriver.support.ui import WebDriverWait

from svcli_engines.base import Engine
from tests.browsers import chromium
from tests.optional import missing
from tests.packaging.code_blocks import ROOT, documents

DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
SITE = runpy.run_path(str(DOCS / "pages.py"))
GAP = "…"


def test_pages_of_commands_are_what_help_says() -> None:
    written = runpy.run_path(str(DOCS / "commands.py"))["pages"]()
    there = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "commands").glob("*.md")}
    assert there == written, "write them anew: python docs/commands.py"


def test_every_page_is_in_the_nav_and_every_entry_is_a_page() -> None:
    named = re.findall(r"([\w/-]+\.md)$", CONFIG.partition("\nnav:\n")[2], re.MULTILINE)
    assert sorted(named) == sorted(SITE["documents"]().values()), "mend `nav` in mkdocs.yml"


def api() -> list[str]:
    """The modules that are public."""
    pages = sorted((DOCS / "api").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)]


def test_pages_of_the_api_name_modules_that_there_are() -> None:
    names = api()
    assert len(names) > 25
    assert all(importlib.util.find_spec(name) is not None for name in names)


def functions(module: ModuleType) -> Iterator[Any]:
    """Every public function of a module's own, and of its classes."""
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            members = vars(value).items() if inspect.isclass(value) else [(name, value)]
            found = [getattr(each, "fget", getattr(each, "func", each)) for key, each in members if key[0] != "_"]
            yield from filter(inspect.isfunction, map(inspect.unwrap, filter(callable, found)))


def test_docstrings_of_the_api_name_what_is_raised() -> None:
    untold = []
    for function in (each for name in api() for each in functions(importlib.import_module(name))):
        # An engine's methods may leave it to those of the protocol.
        told = inspect.getdoc(function) or inspect.getdoc(getattr(Engine, function.__name__, None)) or ""
        for name in re.findall(r"^ +raise (\w+)\(", inspect.getsource(function), re.MULTILINE):
            error = function.__globals__.get(name) or getattr(builtins, name)
            is_told = any(kind.__name__ in told for kind in error.__mro__)
            if not is_told and not re.search(r"[Rr]aises\s+what|errors\s+are\s+those", told):
                untold.append(f"{function.__module__}.{function.__qualname__}: {name}")
    assert untold == []


def sentences(tree: ast.AST) -> Iterator[str]:
    """Every text of a module, with a gap for what is put into it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    folders = (ROOT / "skipvision", ROOT / "export", ROOT / "engines", ROOT / "svcli")
    files = [path for folder in folders for path in folder.rglob("*.py")]
    said = [text for path in files for text in sentences(ast.parse(path.read_text(encoding="utf-8")))]
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+?)`(?: in a note)?$", page, re.MULTILINE)
    assert len(quoted) == page.count("\n### ") > 25
    patterns = {message: ".*".join(re.escape(piece) for piece in message.split(GAP)) for message in quoted}
    assert [m for m, pattern in patterns.items() if not any(re.search(pattern, text, re.DOTALL) for text in said)] == []


def test_links_lead_to_pages_or_to_copies_of_files(tmp_path: Path) -> None:
    pages = {"docs/a.md": "a.md", "docs/deep/b.md": "deep/b.md", "export/README.md": "bundle.md"}
    text = "[b](deep/b.md#x) [e](../export) [f](../LICENSE) [w](https://x.y) [h](#here)\n```sh\n[n](no)\n```\n"
    (tmp_path / "export").mkdir()
    (tmp_path / "LICENSE").touch()
    found, files = SITE["rewrite"](text, "docs/a.md", pages, tmp_path)
    assert found == (
        "[b](deep/b.md#x) [e](bundle.md) [f](files/LICENSE) [w](https://x.y) [h](#here)\n```sh\n[n](no)\n```\n"
    )
    assert files == {"LICENSE"}
    assert SITE["rewrite"]("[a](../a.md)", "docs/deep/b.md", pages, tmp_path)[0] == "[a](../a.md)"
    with pytest.raises(SITE["LinkError"], match=r"docs/a\.md: gone\.md leads nowhere"):
        SITE["rewrite"]("[g](gone.md)", "docs/a.md", pages, tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, from a copy of what it is made of."""
    tool = shutil.which("zensical", path=str(Path(sys.executable).parent)) or shutil.which("zensical")
    if tool is None:
        missing("zensical")
    folder: Path = tmp_path_factory.mktemp("site")
    SITE["lay_out"](folder / "build" / "site" / "pages")
    (folder / "mkdocs.yml").write_text(CONFIG)
    for name in ("skipvision", "export", "engines"):
        (folder / name).symlink_to(ROOT / name)
    done = subprocess.run([tool, "build", "--strict"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "site" / "html"


def test_the_site_has_every_page_with_its_title(built: Path) -> None:
    for document, page in SITE["documents"]().items():
        title = re.match(r"# (.+)", (ROOT / document).read_text(encoding="utf-8"))
        assert title is not None, document
        shown = said(built / page)
        assert f"{title[1].replace('`', '')} ¶" in shown.replace("¶", " ¶").replace("  ", " "), page
    assert "Whether append is there" in said(built / "api" / "svcli_engines.md")


def said(page: Path) -> str:
    """The text of a page."""
    html = page.with_suffix(".html").read_text(encoding="utf-8").replace("&para;", "¶")
    return re.sub(r"<[^>]+>", "", html)


def test_no_page_asks_another_host_for_anything(built: Path) -> None:
    for page in built.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:link|script|img|iframe|source)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"', text)
        assert not loaded, page
    for sheet in built.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.slow
def test_pages_are_dark_where_the_system_is_and_turn_when_it_does(built: Path, browser: Chrome) -> None:
    for scheme, shown in (("light", "default"), ("dark", "slate"), ("light", "default")):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get((built / "index.html").as_uri())
        found = f"body[data-md-color-scheme={shown}]"
        WebDriverWait(browser, 120).until(presence_of_element_located(("css selector", found)))


def test_the_site_shows_what_is_public_and_needs_no_words(built: Path) -> None:
    for page, name in (("skipvision", "layout.TokenLayout.num_visual"), ("svcli_export", "manifest.Manifest.config")):
        assert f'id="{page}.{name}"' in (built / "api" / f"{page}.html").read_text(encoding="utf-8")


def test_every_document_is_a_page() -> None:
    listed = {path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")}
    assert listed <= set(documents())
