"""One sample of training: a conversation about pictures, however it was stored. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

Role = Literal["system", "user", "assistant"]


Kind = Literal[
    "unreadable",
    "unknown role",
    "marks differ",
    "no answer",
    "missing picture",
    "broken picture",
    "too long",
    "refused",
]
"""What is wrong with a sample, for counting."""


class BrokenSampleError(ValueError):
    """A sample that cannot be shown: a picture that is missing or broken, an unknown role, too many rows; one reason,
    without the sample's name. `refused` is what the chat template says no to."""

    def __init__(self, reason: str, kind: Kind = "refused") -> None:
        super().__init__(reason)
        self.kind: Kind = kind


def broken_samples(count: int, total: int | None = None) -> str:
    """How a sentence begins that counts them."""
    whole = count if total is None else total
    of = "" if total is None else f" of {total:,}"
    return f"{count:,}{of} {'sample' if whole == 1 else 'samples'} {'is' if count == 1 else 'are'} broken"


class DataSetError(ValueError):
    """A whole set of conversations that cannot be read; one sentence that names it."""


@dataclass(frozen=True)
class Turn:
    """What one side says; its pictures stand in front of it."""

    role: Role
    content: str
    images: int = 0


class Picture(Protocol):
    """A picture that is read when it is needed."""

    @property
    def name(self) -> str: ...

    def open(self) -> BinaryIO:
        """The encoded file, which can be sought. Raises BrokenSampleError."""


@dataclass(frozen=True)
class Conversation:
    """Turns, and the pictures that they show, in order."""

    name: str
    """What messages call it: file and place, and its id where it has one."""
    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...] = ()


class Source(Protocol):
    """A set of conversations that can be asked for any of them, so that their order is ours. It can be pickled, for
    processes that read pictures."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Another one where its files are others; pictures that lie beside them do not count."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation:
        """Raises BrokenSampleError; `name_of` says which."""

    def name_of(self, index: int) -> str:
        """Of a sample that may be broken."""


@dataclass(frozen=True)
class Broken:
    """A sample that is left out."""

    name: str
    reason: str
    kind: Kind = "refused"
