"""A skip setting as users write it."""

from __future__ import annotations

import re

from svcli.errors import UsageError


def parse_counts(text: str) -> tuple[int, int]:
    """Retained and skipped tokens of `64/64`. Raises UsageError."""
    counts = re.fullmatch(r"(\d+)/(\d+)", text)
    if counts is None:
        raise UsageError(f"--skip {text}: write RETAINED/SKIPPED, such as 64/64")
    return int(counts[1]), int(counts[2])
