"""Writes docs/commands/: what `--help` says of each command, as a page.

Run it from the root of the repository, with svcli importable: python docs/commands.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer
from typer.testing import CliRunner

from svcli.app import app
from svcli.examples import USAGES

FOLDER = Path(__file__).parent / "commands"
WIDTH = 80


def pages() -> dict[str, str]:
    """Text of each page by its file name."""
    listed = "\n".join(f"- [`svcli {words}`]({_file(words)}): {_summary(words)}" for words in _commands())
    first = (
        "# Commands\n\nThese pages are what `svcli COMMAND --help` prints, written by `docs/commands.py`.\n\n"
        f"{listed}\n\n{_block('')}"
    )
    return {"index.md": first} | {
        _file(words): f"# svcli {words}\n\n{_summary(words)}\n\n{_block(words)}" for words in _commands()
    }


def write(folder: Path = FOLDER) -> None:
    """Write the pages, and remove those of commands that are gone."""
    folder.mkdir(exist_ok=True)
    written = pages()
    for path in folder.glob("*.md"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")


def _commands() -> Iterator[str]:
    """Every command, those of groups too, as the words that call it."""
    for name, command in getattr(typer.main.get_command(app), "commands").items():  # noqa: B009
        inner = getattr(command, "commands", {})
        yield from (f"{name} {each}" for each in inner) if inner else (name,)


def _summary(words: str) -> str:
    return USAGES[words.split()[-1]].summary


def _file(words: str) -> str:
    return f"{words.replace(' ', '-')}.md"


def _block(words: str) -> str:
    shown = CliRunner().invoke(app, [*words.split(), "--help"], prog_name="svcli", terminal_width=WIDTH)
    return f"```text\n{shown.stdout.rstrip()}\n```\n"


if __name__ == "__main__":
    write()
    print(f"wrote {FOLDER}")
