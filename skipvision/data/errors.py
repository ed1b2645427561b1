"""The one error this package raises for the user to act on."""

from __future__ import annotations


class DataError(ValueError):
    """Something about the data assets is missing or wrong; the message says what to do."""
