"""What whoever uses a model should know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipvision.config import ModelConfig


def remarks(config: ModelConfig) -> list[str]:
    """A sentence each."""
    if config.projector_trained:
        return []
    return ["the projector of this model is untrained: it makes nothing of pictures before it has been trained"]
