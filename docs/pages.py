"""Lays out what the site is built from: the documents of the repository as pages in build/site/pages.

Documents lie where people look for them, so links between them lead through the repository; here each leads to a page,
or to a copy of the file. Run it from the root of the repository: python docs/pages.py
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "site" / "pages"
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/REPORT.md": "report.md",
    "engines/README.md": "engines.md",
    "export/README.md": "bundle.md",
    "models/skipvision-tiny/README.md": "skipvision-tiny.md",
}
"""Documents outside docs/, and the page that each becomes."""
_LINK = re.compile(r'(?<=\]\()[^)\s]+(?=\))|(?<=src=")[^"]+(?=")')


class LinkError(ValueError):
    """A link that leads nowhere; the message says where it stands."""


def documents(root: Path = ROOT) -> dict[str, str]:
    """Path in the repository of every document, and the page that it becomes."""
    own = {path.relative_to(root).as_posix() for path in (root / "docs").rglob("*.md")}
    return {path: str(PurePosixPath(path).relative_to("docs")) for path in sorted(own)} | ELSEWHERE


def lay_out(target: Path = PAGES, root: Path = ROOT) -> None:
    """Write every page and what they show into `target`, in place of all that was there. Raises LinkError."""
    shutil.rmtree(target, ignore_errors=True)
    pages = documents(root)
    for source, page in pages.items():
        text, files = rewrite((root / source).read_text(encoding="utf-8"), source, pages, root)
        (target / page).parent.mkdir(parents=True, exist_ok=True)
        (target / page).write_text(text, encoding="utf-8")
        for file in files:
            (target / "files" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, target / "files" / file)


def rewrite(text: str, source: str, pages: dict[str, str], root: Path) -> tuple[str, set[str]]:
    """A document's text as a page, and the files that it leads to, which are no pages. Raises LinkError."""
    files: set[str] = set()
    here = PurePosixPath(pages[source]).parent

    def lead(found: re.Match[str]) -> str:
        target, mark, anchor = found[0].partition("#")
        if not target or ":" in target:
            return found[0]
        path = os.path.normpath(PurePosixPath(source).parent / target)
        if (root / path).is_dir():
            path = f"{path}/README.md"
        if path in pages:
            return os.path.relpath(pages[path], here) + mark + anchor
        if not (root / path).is_file():
            raise LinkError(f"{source}: {found[0]} leads nowhere")
        files.add(path)
        return os.path.relpath(f"files/{path}", here)

    # What stands in a fence is no link.
    parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.lstrip().startswith("```") else _LINK.sub(lead, part) for part in parts), files


if __name__ == "__main__":
    lay_out()
    print(f"wrote {PAGES}")
