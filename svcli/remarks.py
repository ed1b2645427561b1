"""What whoever uses a model should know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipvision.config import ModelConfig


def remarks(config: ModelConfig) -> list[str]:
    """A sentence each."""
    found = []
    if not config.projector_trained:
        found.append(
            "the projector of this model is untrained: it makes nothing of pictures before it has been trained"
        )
    if config.skip is not None and not config.skip_trained:
        found.append(
            "this model was not trained to skip: expect it to miss details, small text first; `svcli export --skip off`"
            " keeps all it sees"
        )
    return found
