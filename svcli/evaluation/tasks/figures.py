"""What summaries are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from svcli.evaluation.task import Judged


def percent(scores: Iterable[float]) -> float:
    """The mean of scores from 0 to 1; 0 of none."""
    found = list(scores)
    return 100 * sum(found) / len(found) if found else 0.0


def accuracy(judged: Sequence[Judged]) -> float:
    """In percent."""
    return percent(each.score for each in judged)


def grouped(judged: Iterable[Judged], name: Callable[[Judged], str] | None = None) -> dict[str, list[Judged]]:
    """By the item's group or by `name`, in the order of the names; those that are named "" are left out."""
    found: dict[str, list[Judged]] = {}
    for each in judged:
        found.setdefault(each.item.group if name is None else name(each), []).append(each)
    return {key: found[key] for key in sorted(found) if key}


def group_accuracies(judged: Iterable[Judged], name: Callable[[Judged], str] | None = None) -> dict[str, float]:
    """In percent, as a summary names groups."""
    return {f"group: {key}": accuracy(found) for key, found in grouped(judged, name).items()}
