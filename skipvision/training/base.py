"""What a run starts from."""

from __future__ import annotations

from dataclasses import dataclass

from skipvision.model import SkipVisionModel
from skipvision.training.speaker import Speaker


@dataclass(frozen=True)
class Base:
    """A model that there is, and how it is spoken to."""

    model: SkipVisionModel
    """In fp32, on the CPU, with the skip setting that is to be trained."""
    speaker: Speaker
    identity: str
    """Tells these weights from others: what is trained on them fits no others."""
