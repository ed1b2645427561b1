"""A training run for programs: one JSON object a line on stdout. A reader that goes, or a full disk, does not
end the run."""

from __future__ import annotations

import json
import sys

from skipvision.training.events import Event, StageEvent
from skipvision.training.run_log import row
from svcli import ui
from svcli.errors import silence_stdout


class JsonLines:
    """Writes each event but what is said beside the steps."""

    def __init__(self) -> None:
        self._is_read = True

    def __call__(self, event: Event) -> None:
        """Hours of training are worth more than a reader who was content with the first lines."""
        if not self._is_read or isinstance(event, StageEvent):
            return
        try:
            sys.stdout.write(json.dumps(row(event)) + "\n")
            sys.stdout.flush()
        except OSError as error:
            self._is_read = False
            silence_stdout()
            is_left = isinstance(error, BrokenPipeError)
            why = (
                "nobody reads these lines any more" if is_left else f"these lines cannot be written ({error.strerror})"
            )
            ui.note(f"{why}; training goes on, and log.jsonl in its folder has them")
