"""A skip setting as users write it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from svcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skipvision.presets import Setting


def parse_counts(text: str) -> tuple[int, int]:
    """Retained and skipped tokens of `64/64`. Raises UsageError."""
    counts = re.fullmatch(r"(\d+)/(\d+)", text)
    if counts is None:
        raise UsageError(f"--skip {text}: write RETAINED/SKIPPED, such as 64/64")
    return int(counts[1]), int(counts[2])


def parse_setting(preset: str | None, skip: str | None) -> Setting | tuple[int, int] | Literal["off"] | None:
    """What of both is given. Raises UsageError."""
    if preset is None:
        return parse_skip(skip)
    from skipvision.presets import PRESETS

    if skip is not None:
        raise UsageError("--preset and --skip: name one of them")
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: choose among {', '.join(PRESETS)}")
    return PRESETS[preset]


def parse_variants(
    texts: Sequence[str], option: str = "--variant"
) -> dict[str, Setting | tuple[int, int] | Literal["off"]]:
    """Skip settings by the names that they have in a bundle: of `dense`, `44/69`, or one of the paper's. `off` and
    44-69 are taken too. Raises UsageError, which names `option`."""
    from skipvision.presets import PRESETS
    from svcli_export.manifest import DENSE, variant_name

    found: dict[str, Setting | tuple[int, int] | Literal["off"]] = {}
    for text in texts:
        name = variant_name(text)
        counts = re.fullmatch(r"(\d+)-(\d+)", name)
        if name == DENSE:
            found[name] = "off"
        elif name in PRESETS:
            found[name] = PRESETS[name]
        elif counts is not None:
            found[name] = int(counts[1]), int(counts[2])
        else:
            raise UsageError(
                f"{option} {text}: choose dense, RETAINED/SKIPPED, such as 64/64, or one of {', '.join(PRESETS)}"
            )
    return found


def parse_skip(text: str | None) -> tuple[int, int] | Literal["off"] | None:
    """`64/64`, `off`, or None for what the source says."""
    if text is None or text == "off":
        return None if text is None else "off"
    return parse_counts(text)
