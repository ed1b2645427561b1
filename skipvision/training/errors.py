"""What ends a run; each message is one sentence that says what to do."""

from __future__ import annotations


class TrainError(ValueError):
    """A run that cannot start or go on."""


class StateError(TrainError):
    """A resumable state that cannot be read or written."""


class NoRoomError(StateError):
    """A disk too full for a state."""
