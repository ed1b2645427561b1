"""Who answers: a bundle as it is, or one of the baselines that keep its score honest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Said:
    """An answer, and what it took."""

    text: str
    visual_tokens: int
    """Rows of the pictures that the decoder read, skipped ones with them."""
    cached_rows: int
    """Rows in the KV cache behind the prompt."""
    flops: int
    """Of vision, prefill and decoding, as `svcli cost` counts them."""
    first_token: float
    """Seconds from pixels to the first token's logits, 0 of it for a picture that was encoded before."""
    retained: tuple[tuple[int, ...], ...]
    """Patches that were kept of each picture, in the numbers of the overlay; all of them where none is left out,
    none where the engine does not say, or the picture was not shown."""


class Asker(Protocol):
    """One sequence at a time; the same question gets the same answer."""

    name: str
    """As the command line says it: `skipped`, `dense`, `random:44`, `pool:49`, `blind`."""
    looks: bool
    """Whether it is to be shown pictures."""

    def answer(self, question: str, images: Sequence[Image.Image], max_new_tokens: int) -> Said:
        """A greedy answer. Raises EngineError or PromptError for what cannot be asked."""
        ...

    def close(self) -> None:
        """Gives the engine back."""
        ...
