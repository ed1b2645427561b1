"""log.jsonl of a run: what it told, one row of JSON each; steps that are done again have their rows once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from skipvision.training.events import BrokenEvent, DoneEvent, Event, StepEvent, ValidationEvent

_NAMES = {StepEvent: "step", ValidationEvent: "validation", BrokenEvent: "broken", DoneEvent: "done"}


class RunLog:
    """Of one run; only the first process has one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, step: int, facts: Mapping[str, object]) -> None:
        """Drops rows of what comes behind `step`; a run that begins has `facts` in its first row, if any."""
        rows = [row for row in self.rows() if row.get("step", 0) <= step and row.get("event") != "done"]
        if step == 0 and not rows and facts:
            rows.append(dict(facts))
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(map(_line, rows)), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, event: Event, step: int) -> None:
        """A row, if it is of an event that has one; `step` is how many are done."""
        name = _NAMES.get(type(event))
        if name is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"event": name, "step": step} | asdict(event)))

    def rows(self) -> list[dict[str, Any]]:
        """All that are whole: a kill may cut the last one."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [row for row in map(_row, lines) if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        return cast("dict[str, Any]", json.loads(line))
    except json.JSONDecodeError:
        return None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), default=str) + "\n"


def _plain(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
