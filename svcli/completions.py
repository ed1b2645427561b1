"""What a shell offers where an option takes a name. Of paths only bundles are offered; where there is nothing to offer,
the shell completes paths by itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

# Evaluated by typer, which tells by their types what completions are to be called with.
import typer

_LEVELS, _MOST_ENTRIES = 2, 500
"""How far bundles are looked for: Tab must not take long in any folder."""
_PLAIN = re.compile(r"[\w./+@%,-]+")
"""Paths that need no quotes in any shell; the scripts of completion set none."""


def settings() -> list[str]:
    """Of the papers, for `--preset`."""
    from skipvision.presets import PRESETS

    return list(PRESETS)


def variants() -> list[str]:
    """For `svcli export --variant`."""
    return ["dense", *settings()]


def models() -> list[str]:
    """Whose sizes are known, for `svcli cost`."""
    from skipvision.known_models import KNOWN_MODELS

    return list(KNOWN_MODELS)


def gpus() -> list[str]:
    """For `svcli cost --gpu`."""
    from skipvision.roofline import GPUS

    return list(GPUS)


def peers() -> list[str]:
    """For `svcli bench --peer`."""
    from svcli.bench.peers import PEERS

    return list(PEERS)


def recipes() -> list[str]:
    """Presets of `svcli train`."""
    from skipvision.training.recipes import PRESETS

    return list(PRESETS)


def bundles(incomplete: str) -> list[str]:
    """Folders that hold one, up to two levels below what is typed."""
    folder, slash, start = incomplete.rpartition("/")
    return sorted(filter(_PLAIN.fullmatch, _bundles(folder + slash, start, _LEVELS)))


def _bundles(folder: str, start: str, levels: int) -> Iterator[str]:
    with suppress(OSError), os.scandir(folder or ".") as entries:
        for entry in islice(entries, _MOST_ENTRIES):
            is_hidden = entry.name.startswith(".") and not start
            if is_hidden or not entry.name.startswith(start) or not entry.is_dir():
                continue
            path = f"{folder}{entry.name}"
            if all(os.path.isfile(f"{path}/{name}") for name in ("manifest.json", "weights.safetensors")):
                yield path
            elif levels > 1:
                yield from _bundles(f"{path}/", "", levels - 1)


def bundle_variants(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of the bundle that is named before, or the bundled model."""
    return _fitting(incomplete, _named_bundle(ctx)[1])


def differences(incomplete: str) -> list[str]:
    """For `svcli bench compare --across`."""
    from svcli.bench.compare import KINDS

    return _fitting(incomplete, KINDS)


def tasks(incomplete: str) -> list[str]:
    """For `svcli eval` and `svcli sweep`."""
    from svcli.evaluation.tasks.registry import TASKS

    return _fitting(incomplete, TASKS)


def bundles_and_tasks(ctx: typer.Context, incomplete: str) -> list[str]:
    """For `svcli eval [BUNDLE] TASK`."""
    return tasks(incomplete) if _words(ctx) else [*tasks(incomplete), *bundles(incomplete)]


def splits(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of the task that is named before."""
    from svcli.evaluation.tasks.registry import TASKS

    found = [word for word in _words(ctx) if word in TASKS]
    return _fitting(incomplete, TASKS[found[-1]].splits if found else ())


def askers(ctx: typer.Context, incomplete: str) -> list[str]:
    """For `--only` and `--baselines`, behind the last comma."""
    from svcli.chat.model import SKIPPED
    from svcli.evaluation.askers import BASELINES

    skips, variants = _named_bundle(ctx)
    before, comma, start = incomplete.rpartition(",")
    names = dict.fromkeys([*[SKIPPED] * skips, *BASELINES, *variants])
    return [f"{before}{comma}{name}" for name in names if name.startswith(start) and name not in before.split(",")]


def _named_bundle(ctx: typer.Context) -> tuple[bool, list[str]]:
    """Whether the bundle that is named, or the bundled one, skips, and its variants. What is broken, the command will
    tell."""
    from svcli.settings import bundled_model

    words = [ctx.params.get("model"), *_words(ctx)]
    bundle = next((word for word in words if word and os.path.isdir(word)), bundled_model())
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((Path(bundle) / "manifest.json").read_bytes())
        return found["model"]["skip"] is not None, list(found["variants"])
    return False, []


def _words(ctx: typer.Context) -> list[str]:
    """Of the command but its options. Behind an option that waits for its value, they are not yet anybody's."""
    given = (ctx.params.get(name) for name in ("bundle", "words", "source", "task"))
    named = [each if isinstance(each, list | tuple) else [each] for each in given if each]
    return [str(word) for each in (*named, ctx.args) for word in each]


def _fitting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
