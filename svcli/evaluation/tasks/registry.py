"""All tasks, by name."""

from __future__ import annotations

from pathlib import Path

from svcli.evaluation.task import Task
from svcli.evaluation.tasks.bundled import Bundled
from svcli.evaluation.tasks.easy_vqa import EasyVqa
from svcli.evaluation.tasks.public import PUBLIC

_ALL: tuple[Task, ...] = (Bundled(), EasyVqa(), *PUBLIC)
TASKS: dict[str, Task] = {each.name: each for each in _ALL}
FETCHED = {"bundled": Path("build/assets"), "easy-vqa": Path("build/assets")}
"""Where `svcli data fetch` brings the files of a task, if nothing else is said."""
