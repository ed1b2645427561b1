"""What whoever uses a model should know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipvision.config import ModelConfig
    from svcli_export.manifest import Manifest


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


def dense_remarks(manifest: Manifest) -> list[str]:
    """The same on a bundle that has graphs which skip nothing beside those that skip, where skipping was trained."""
    configs = [manifest.config, *(manifest.variant(name).config for name in manifest.variants)]
    is_trained = any(config.skip is not None and config.skip_trained for config in configs)
    if not is_trained or all(config.skip is not None for config in configs):
        return []
    sentence = (
        "this model was trained with skipping alone: run dense it shows what skipping saves in time and memory, not"
        " what a model trained without it would answer"
    )
    return [sentence]
