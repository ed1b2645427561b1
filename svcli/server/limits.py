"""What one caller may take of a server."""

from __future__ import annotations

from dataclasses import dataclass

MAX_NAME = 512
"""Letters of a model's name."""
MAX_MESSAGES = 1024
MAX_PARTS = 256
"""Of one message."""
MAX_TEXT = 1_000_000
"""Letters of one conversation."""
MAX_STOPS = 4
MAX_STOP_LETTERS = 256
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Limits:
    """What `svcli serve` was told."""

    max_body: int = 32 << 20
    """Bytes of one request."""
    max_pixels: int = 50_000_000
    """Of one picture, before it is decoded."""
    max_tokens: int = 1024
    """Of one answer, whatever is asked for."""
    seconds: float = 120.0
    """From the first byte of a question to the last of its answer, the upload aside."""
    upload_seconds: float = 60.0
    """In which a request must have come in whole."""
    max_calls: int = 68
    """Questions that are read, waiting or being answered at a time."""
    allow_urls: bool = False
    """Whether pictures are fetched from where a request says."""

    @property
    def fetch_seconds(self) -> float:
        """Of one picture."""
        return min(20.0, self.seconds)
