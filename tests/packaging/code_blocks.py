"""Every fenced block of every document, and what is said of those that are not run."""

from __future__ import annotations

import re
import runpy
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = {"sh", "python", "console"}
"""Languages of what is run; a console's output is compared."""
SHOWN = {"text", "toml", "json"}
"""Languages of what is shown alone."""
_FENCE = re.compile(
    r"(?:^ *<!-- not run here: (?P<reason>[^\n]+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    document: str
    """Path in the repository."""
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run, where the comment above it says so."""

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.language in RUN and self.reason is None


def documents() -> list[str]:
    """Every page of the site."""
    return sorted(runpy.run_path(str(ROOT / "docs" / "pages.py"))["documents"]())


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        inner = textwrap.dedent(match["text"])
        found.append(Block(document, line, match["language"], inner, match["reason"]))
    fences = re.findall(r"^ *```", text, re.MULTILINE)
    assert len(fences) == 2 * len(found), f"{document}: a fence is not closed, or not read"
    return found


def commands(text: str) -> list[str]:
    """Lines that start svcli, by itself, under torchrun or in a pipe, each as one."""
    whole = re.sub(r" *\\\n *", " ", text)
    return [
        found[1].strip()
        for line in whole.splitlines()
        if (found := re.match(r"(?:\$ )?(?:torchrun .*? -m |.*\| |[A-Z_]+=\S+(?: \S+ \d+\))? )?(svcli .*)$", line))
    ]
