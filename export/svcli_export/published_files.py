"""The small files of a published model's folder. Imports no torch."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


class ProcessingError(ValueError):
    """A published model whose pictures or prompts cannot be made as its own processor makes them; one sentence."""


def read_text(folder: Path, name: str) -> str | None:
    """None where there is no such file. Raises ProcessingError for one that cannot be read."""
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ProcessingError(
            f"{folder / name}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """Empty where there is no such file. Raises ProcessingError for one that holds no JSON object."""
    text = read_text(folder, name)
    try:
        data = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProcessingError(f"{folder / name}: not JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise ProcessingError(f"{folder / name}: not a JSON object; download it again")
    return data


def is_published(folder: Path) -> bool:
    """Whether its config.json is that of a model that was published for transformers."""
    with suppress(OSError, UnicodeDecodeError):
        return '"model_type"' in (folder / "config.json").read_text(encoding="utf-8")
    return False
