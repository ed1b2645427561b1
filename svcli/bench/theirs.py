"""What others do in a run of ours: where it fails, it costs them their figures, and nobody else."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from svcli.errors import explain
from svcli.settings import debugging


class PeerError(ValueError):
    """A peer that cannot be measured; the message is a sentence."""


@contextmanager
def theirs() -> Iterator[None]:
    """Around what a peer does, which may be anything. Raises PeerError alone."""
    try:
        yield
    except Exception as error:
        if debugging():
            traceback.print_exc()
        raise PeerError(explain(error)[0]) from error
