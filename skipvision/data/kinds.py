"""The hand-curated table of things a picture can show, and where their art lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Kind:
    """One nameable thing.

    `emoji` holds code points as the emoji packages name their files, `photo` tuxpaint stamps
    that are photographs, `clipart` openclipart drawings (or tuxpaint's, as `stamps/...`).
    """

    name: str
    plural: str
    emoji: tuple[str, ...]
    photo: tuple[str, ...] = ()
    clipart: tuple[str, ...] = ()


def _read() -> tuple[Kind, ...]:
    rows = json.loads(files("skipvision.data").joinpath("kinds.json").read_text(encoding="utf-8"))
    return tuple(
        Kind(
            row["name"],
            row["plural"],
            tuple(row["emoji"]),
            tuple(row.get("photo", ())),
            tuple(row.get("clipart", ())),
        )
        for row in rows
    )


KINDS: tuple[Kind, ...] = _read()
