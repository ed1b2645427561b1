"""What ends a run; each message is one sentence that says what to do."""

from __future__ import annotations


class TrainError(ValueError):
    """A run that cannot start or go on."""


class StateError(TrainError):
    """A resumable state that cannot be read or written."""


class NotFiniteError(TrainError):
    """A loss or a gradient that is no finite number."""


class NoMemoryError(TrainError):
    """A batch that memory does not hold."""


class NoRoomError(StateError):
    """A disk too full for a state."""
