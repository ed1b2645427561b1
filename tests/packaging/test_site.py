"""The site: its pages are those of the code, its nav names them all, and it is built without asking anybody."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_pages_of_the_api_name_modules_that_there_are() -> None:
    names = [
        name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert len(names) > 25
    assert all(importlib.util.find_spec(name) is not None for name in names)


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


def test_every_document_is_a_page() -> None:
    listed = {path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")}
    assert listed <= set(documents())
