"""What can truthfully be said about a scene."""

from __future__ import annotations

from dataclasses import dataclass

from skipvision.data.canvas import Item
from skipvision.data.names import counted, with_article
from skipvision.data.scenes import Scene

MIN_GAP = 28  # pixels between centres for a direction to be clear
DOMINANCE = 1.6  # how much further apart along one axis than along the other

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PHRASES = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}


@dataclass(frozen=True)
class Group:
    """Things of one name, for shapes also of one colour; text stands alone."""

    phrase: str
    items: tuple[Item, ...]

    @property
    def said(self) -> str:
        """Return how a description names the group."""
        item = self.items[0]
        if item.text is not None:
            return f'the {item.name} "{item.text.upper()}"'
        return counted(len(self.items), self.phrase)

    @property
    def canonical(self) -> str:
        item = self.items[0]
        if item.text is not None:
            return f'1 "{item.text.upper()}"'
        return f"{len(self.items)} {self.phrase}"


def phrase(item: Item) -> str:
    """Return "dog", "red circle" or "word"."""
    return f"{item.colour} {item.name}" if item.category == "shape" else item.name


def said_alone(item: Item) -> str:
    if item.text is not None:
        return f'the {item.name} "{item.text.upper()}"'
    return with_article(phrase(item))


def groups(scene: Scene) -> tuple[Group, ...]:
    """Return all groups, the one that begins leftmost first."""
    members: dict[str, list[Item]] = {}
    for item in scene.items:
        members.setdefault(phrase(item), []).append(item)
    found = [Group(name, tuple(items)) for name, items in members.items()]
    return tuple(sorted(found, key=lambda group: min(i.centre[0] for i in group.items)))


def unique_names(scene: Scene) -> dict[str, Item]:
    """Return the things that one name, without a colour, singles out."""
    by_name: dict[str, list[Item]] = {}
    for item in scene.items:
        by_name.setdefault(item.name, []).append(item)
    return {name: items[0] for name, items in by_name.items() if len(items) == 1}


def direction(item: Item, other: Item) -> str | None:
    """Return where the item lies as seen from the other, or None where that is not clear."""
    dx = item.centre[0] - other.centre[0]
    dy = item.centre[1] - other.centre[1]
    if abs(dx) >= max(MIN_GAP, DOMINANCE * abs(dy)):
        return "left" if dx < 0 else "right"
    if abs(dy) >= max(MIN_GAP, DOMINANCE * abs(dx)):
        return "above" if dy < 0 else "below"
    return None


def extremes(scene: Scene) -> dict[str, Item]:
    """Return the thing at each side of the picture, where it is plainly one thing."""
    found: dict[str, Item] = {}
    if len(scene.items) < 2:
        return found
    for axis, low, high in ((0, "left", "right"), (1, "top", "bottom")):
        ordered = sorted(scene.items, key=lambda item: item.centre[axis])
        if _sticks_out(ordered[0], ordered[1], axis) and ordered[0].centre[axis] < 100:
            found[low] = ordered[0]
        if _sticks_out(ordered[-1], ordered[-2], axis) and ordered[-1].centre[axis] > 124:
            found[high] = ordered[-1]
    return found


def _sticks_out(item: Item, neighbour: Item, axis: int) -> bool:
    return abs(item.centre[axis] - neighbour.centre[axis]) >= MIN_GAP + 4
