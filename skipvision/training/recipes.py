"""Recipes by name: a TOML file or a preset, with what the command line sets laid over it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from skipvision.config import ConfigError, from_mapping, require
from skipvision.presets import PRESETS as SETTINGS
from skipvision.training.scratch_recipe import ScratchRecipe
from skipvision.training.tune_presets import TUNE_PRESETS
from skipvision.training.tune_recipe import SourceRecipe, TuneRecipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _first_line(name: str, preset: object) -> str:
    text = (preset.func if isinstance(preset, partial) else preset).__doc__ or ""
    line, split = text.partition("\n")[0], SETTINGS.get(name)
    if split is None:
        return line
    return f"{line[:-1]}; {split.num_retained} retained and {split.num_skipped} skipped of {split.num_tokens:,}."


PRESETS: Mapping[str, str] = {name: _first_line(name, preset) for name, preset in TUNE_PRESETS.items()}
"""What each one is, in a line."""

_NEVER_BARE = frozenset("\"'[]{}=,#")
_UNNAMED = "unnamed"


def read_recipe(name: str, overrides: Sequence[str] = ()) -> ScratchRecipe | TuneRecipe:
    """`name` is a TOML file or a preset; each override is KEY=VALUE, such as `optim.steps=100`.

    A key has dots, and a number for a place in a list: `data.sources.0.weight`. A value is TOML, or a bare string that
    looks like none of it. An empty one takes the key out. Raises ConfigError with the name and the key that is wrong.
    """
    table = _table_of(name)
    for override in overrides:
        _lay(table, override)
    try:
        return from_mapping(_kind(table, is_preset=_is_preset(name)), table)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def read_scratch_recipe(path: Path) -> ScratchRecipe:
    """Raises ConfigError where it is one of the other kind, too."""
    recipe = read_recipe(str(path))
    if not isinstance(recipe, ScratchRecipe):
        raise ConfigError(f"{path}: needed is a recipe of a model from nothing, with a [model] table")
    return recipe


def as_toml(recipe: ScratchRecipe | TuneRecipe) -> str:
    """Every key of it; what is None is left out. Reads back equal. Needs tomli-w."""
    import tomli_w

    return tomli_w.dumps(_as_table(recipe))


def _as_table(value: object) -> Any:
    if is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {name: _as_table(each) for name, each in pairs if each is not None}
    return [_as_table(each) for each in value] if isinstance(value, tuple) else value


def _is_preset(name: str) -> bool:
    return name in TUNE_PRESETS and not Path(name).is_file()


def _table_of(name: str) -> dict[str, Any]:
    if _is_preset(name):
        table: dict[str, Any] = _as_table(TUNE_PRESETS[name](_UNNAMED, (SourceRecipe(_UNNAMED),)))
        del table["base"], table["data"]["sources"]
        return table
    try:
        return tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        close = difflib.get_close_matches(name, TUNE_PRESETS, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        presets = "" if name.endswith(".toml") else f", and no preset; presets: {', '.join(TUNE_PRESETS)}{meant}"
        raise ConfigError(f"{name}: no such recipe{presets}") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: is no TOML, since it is no UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: is no TOML ({error})") from None


def _kind(table: Mapping[str, Any], *, is_preset: bool) -> type[ScratchRecipe | TuneRecipe]:
    if is_preset:
        named = "base" in table and isinstance(table["data"], Mapping) and "sources" in table["data"]
        require(
            named,
            "a preset leaves the model and the conversations to you:"
            """ --set base=FOLDER --set 'data.sources=[{path="FILE"}]'""",
        )
    is_tune, is_scratch = "base" in table, "model" in table
    require(
        is_tune != is_scratch,
        f"a recipe has either base, the model that is trained, or [model], one from nothing; this one has"
        f" {'both' if is_tune else 'neither'}",
    )
    return TuneRecipe if is_tune else ScratchRecipe


def _lay(table: dict[str, Any], override: str) -> None:
    """Sets one key of `table`. Whether there is such a key is asked of the whole recipe, later."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    require(bool(equals) and all(path), f"{override}: what is set is KEY=VALUE, such as optim.steps=100")
    place: Any = table
    for number, part in enumerate(path[:-1]):
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[_index(place, part, path[:number])]
    if isinstance(place, dict):
        if text:
            place[path[-1]] = _value(key, text)
        else:
            place.pop(path[-1], None)
        return
    index = _index(place, path[-1], path[:-1])
    place[index : index + 1] = [_value(key, text)] if text else []


def _index(place: Any, part: str, path: list[str]) -> int:
    where = ".".join(path)
    require(isinstance(place, list), f"{where} is a value, and no table that has {part!r}")
    fits = part.isdecimal() and part.isascii() and len(part) < 9 and int(part) < len(place)
    require(fits, f"{where} is a list of {len(place)}, counted from 0; there is no {part!r}")
    return int(part)


def _value(key: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
        if list(parsed) == ["value"]:
            return parsed["value"]
    except (ValueError, RecursionError):
        if text.isprintable() and not _NEVER_BARE & set(text):
            return text.strip()
    raise ConfigError(f"""{key}: {text!r} is no TOML; a string with such letters is quoted: '{key}="..."'""")
