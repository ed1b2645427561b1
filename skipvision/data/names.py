"""Names that pictures, questions and labels share."""

from __future__ import annotations

from skipvision.data.kinds import KINDS

SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "rectangle",
    "star",
    "heart",
    "hexagon",
    "diamond",
    "cross",
    "oval",
)
COLOURS: tuple[str, ...] = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "gray",
)
GLYPHS: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
TEXT_NAMES: tuple[str, ...] = ("word", "number")

PLURALS: dict[str, str] = {kind.name: kind.plural for kind in KINDS} | {
    shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES
}

# The class of a patch: background, then what the thing on it is called, then the glyph.
LABELS: tuple[str, ...] = ("", *(kind.name for kind in KINDS), *SHAPES, *GLYPHS)
LABEL_IDS: dict[str, int] = {name: i for i, name in enumerate(LABELS)}
COLOUR_IDS: dict[str, int] = {name: i + 1 for i, name in enumerate(COLOURS)}


def article(phrase: str) -> str:
    """Return "a" or "an", whichever goes before the phrase."""
    return "an" if phrase[0] in "aeiou" else "a"


def with_article(phrase: str) -> str:
    return f"{article(phrase)} {phrase}"


def counted(number: int, phrase: str) -> str:
    """Return "a red circle" for one, "3 red circles" for more."""
    if number == 1:
        return with_article(phrase)
    colour, _, name = phrase.rpartition(" ") if phrase not in PLURALS else ("", "", phrase)
    plural = f"{colour} {PLURALS[name]}" if colour else PLURALS[name]
    return f"{number} {plural}"
