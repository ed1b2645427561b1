"""Writes measured figures into the documents, between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.

python -m benchmarks.tables            # after measuring
python -m benchmarks.tables --check    # exit 1 where a document does not say what was measured
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from benchmarks import blocks, tool_blocks
from benchmarks.blocks import NotMeasuredError
from benchmarks.main_blocks import main_table

ROOT = Path(__file__).parents[1]
BLOCKS = blocks.BLOCKS | tool_blocks.BLOCKS | {"main_table": main_table}
DOCUMENTS = tuple(
    ROOT / name
    for name in (
        "README.md",
        "benchmarks/README.md",
        "docs/bench.md",
        "docs/eval.md",
        "docs/models.md",
        "docs/plugins.md",
        "docs/profile.md",
        "docs/serve.md",
        "docs/training.md",
        "models/skipvision-tiny/README.md",
    )
)
_BLOCK = re.compile(r"(<!-- begin: (\S+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
_WIDTH = 120
NOT_MEASURED = "*Not measured yet.*"


def filled(text: str) -> tuple[str, list[str]]:
    """The document with every block made anew, and what was missing: those blocks say so."""
    missing: list[str] = []

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in BLOCKS:
            raise SystemExit(f"there is no block {name!r}; known: {', '.join(BLOCKS)}")
        try:
            return f"{begin}\n{wrapped(BLOCKS[name]())}\n\n{end}"
        except NotMeasuredError as error:
            missing.append(str(error))
            return f"{begin}\n{NOT_MEASURED}\n\n{end}"

    return _BLOCK.sub(fill, text), missing


def wrapped(text: str) -> str:
    """Lines of prose cut to the width of the documents; tables as they are."""
    lines = text.split("\n")
    return "\n".join(
        line
        if line.startswith("|")
        else textwrap.fill(line, _WIDTH, subsequent_indent="  " * line.startswith("- "), break_on_hyphens=False)
        for line in lines
    )


def stale() -> list[str]:
    """The documents that do not say what was measured."""
    texts = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
    return [str(document.relative_to(ROOT)) for document, text in texts.items() if filled(text)[0] != text]


def write() -> None:
    """Writes every document, and says what is missing."""
    for document in DOCUMENTS:
        text, missing = filled(document.read_text(encoding="utf-8"))
        document.write_text(text, encoding="utf-8")
        for what in dict.fromkeys(missing):
            print(what)


def main() -> None:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args().check:
        if found := stale():
            raise SystemExit(f"{', '.join(found)}: out of date, run `python -m benchmarks.tables`")
        return
    write()


if __name__ == "__main__":
    main()
