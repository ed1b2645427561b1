"""log.jsonl of a run: what it told, one row of JSON each; steps that are done again have their rows once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from skipvision.training.errors import not_written
from skipvision.training.events import (
    BrokenEvent,
    DoneEvent,
    Event,
    SavedEvent,
    StageEvent,
    StepEvent,
    ValidationEvent,
)

_NAMES: Mapping[type, str] = {
    StageEvent: "stage",
    StepEvent: "step",
    ValidationEvent: "validation",
    BrokenEvent: "broken",
    SavedEvent: "saved",
    DoneEvent: "done",
}
_PASSING = (StageEvent, SavedEvent)
"""What no log keeps."""


def row(event: Event) -> dict[str, Any]:
    """The event for programs: `event` names its kind; what is not finite is null."""
    return {"event": _NAMES[type(event)], **{key: _plain(value) for key, value in asdict(event).items()}}


class RunLog:
    """Of one run; only the first process has one. What writes raises StateError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, step: int, facts: Mapping[str, object]) -> None:
        """Drops rows of what comes behind `step`; a run that begins has `facts` in its first row, if any."""
        rows = [row for row in self.rows() if row.get("step", 0) <= step and row.get("event") != "done"]
        if step == 0 and not rows and facts:
            rows.append(dict(facts))
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_text("".join(map(_line, rows)), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise not_written(self.path, error) from None

    def write(self, event: Event, step: int) -> None:
        """A row, if it is of an event that has one; `step` is how many are done."""
        if not isinstance(event, _PASSING):
            told = row(event)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_line({"event": told["event"], "step": step} | told))
            except OSError as error:
                raise not_written(self.path, error) from None

    def rows(self) -> list[dict[str, Any]]:
        """All that are whole: a kill may cut the last one."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [found for found in map(_found, lines) if found is not None]


def _found(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _plain(value: Any) -> Any:
    """JSON knows no NaN, and no paths."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
