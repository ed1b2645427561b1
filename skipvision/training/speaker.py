"""How a model is spoken to and shown pictures in training, for whoever knows its prompts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt
from PIL import Image

from skipvision.config import ModelConfig, Transparency
from skipvision.tiles import Cut
from skipvision.training.conversation import Turn

IGNORE = -100


@dataclass(frozen=True)
class Spoken:
    """A conversation as ids; one placeholder for each run of visual rows."""

    ids: list[int]
    labels: list[int]
    """As many: the id that each row must say next, where it is of an answer or ends one; else IGNORE."""


class Speaker(Protocol):
    """Of one model. It can be pickled, for processes that read pictures."""

    @property
    def image_id(self) -> int:
        """The placeholder."""

    @property
    def transparency(self) -> Transparency:
        """What it wants behind transparent parts of a picture."""

    def speak(self, turns: Sequence[Turn], cuts: Sequence[Cut]) -> Spoken:
        """`cuts` of all pictures, in order. Raises BrokenSampleError for what the chat template refuses."""

    def views(self, image: Image.Image, config: ModelConfig, is_alone: bool) -> npt.NDArray[Any]:
        """[I, 3, S, S] of an RGB picture; `is_alone` where no other picture is in the conversation."""

    def files(self) -> Mapping[str, str]:
        """What belongs beside the weights of a checkpoint: file names and texts."""
