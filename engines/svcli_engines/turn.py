"""One answer in the making: logits in, text out. Computing logits is somebody else's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from svcli_engines.base import Logits
from svcli_engines.processor import Processor, TextStream
from svcli_engines.sampling import Sampler, Sampling, Token, rated
from svcli_export.chat import Message

StopReason = Literal["end", "stop", "length", "context"]


@dataclass(frozen=True)
class Piece:
    """A piece of the answer's text."""

    text: str
    tokens: tuple[Token, ...] = ()
    """Those that were said since the piece before, where the sampling asks for them."""
    ids: tuple[int, ...] = ()
    """Of what was said since the piece before, asked for or not; last the one that ended the answer, if one did."""


class Turn:
    """Takes the logits of one row after another, until it is over."""

    def __init__(self, processor: Processor, sampling: Sampling) -> None:
        self.ids: list[int] = []
        self.text = ""
        """What was handed out."""
        self.stop_reason: StopReason | None = None
        """None while the answer goes on."""
        self._processor, self._sampling = processor, sampling
        self._sampler, self._stream = Sampler(sampling), TextStream(processor)
        self._held = ""
        """May turn out to be the beginning of a stop text."""
        self._tokens: list[Token] = []
        self._num_told = 0
        """Of `ids`."""

    def take(self, logits: Logits, *, is_full: bool = False) -> Piece:
        """The piece of text that the row with these logits [vocab] completes; may be empty.

        `is_full`: behind this token there is no room in the KV cache.
        """
        said = self._processor.sayable(logits, may_end=len(self.ids) >= self._sampling.min_new_tokens)
        token = self._sampler.pick(said)  # also where it is known, so that what is drawn behind it is the same
        if len(self.ids) < len(self._sampling.begin):
            token = self._sampling.begin[len(self.ids)]
        if token in self._processor.stop_ids:
            last = self._end("end")
            return replace(last, ids=(*last.ids, token))
        self.ids.append(token)
        if self._sampling.logprobs is not None:
            self._tokens.append(rated(token, said, self._sampling.logprobs))
        self._held += self._stream.push(token)
        if self._found() is not None or len(self.ids) == self._sampling.max_new_tokens or is_full:
            return self._end("length" if len(self.ids) == self._sampling.max_new_tokens else "context")
        ready = len(self._held) - self._num_uncertain()
        text, self._held = self._held[:ready], self._held[ready:]
        return self._piece(text)

    def message(self) -> Message:
        """What was said so far, for the conversation."""
        if self.stop_reason == "stop":
            return Message("assistant", self.text)  # the ids say more than the text
        return Message("assistant", self._processor.decode(self.ids), ids=tuple(self.ids))

    def _end(self, reason: StopReason) -> Piece:
        self._held += self._stream.flush()
        at = self._found()
        self.stop_reason = reason if at is None else "stop"
        return self._piece(self._held[:at])

    def _piece(self, text: str) -> Piece:
        # Tokens wait for their text, or for the end.
        told: tuple[Token, ...] = ()
        ids: tuple[int, ...] = ()
        if text or self.stop_reason:
            told, self._tokens = tuple(self._tokens), []
            ids, self._num_told = tuple(self.ids[self._num_told :]), len(self.ids)
        self.text += text
        return Piece(text, told, ids)

    def _found(self) -> int | None:
        """Where the first stop text begins in what is held."""
        places = [at for stop in self._sampling.stop if (at := self._held.find(stop)) >= 0]
        return min(places, default=None)

    def _num_uncertain(self) -> int:
        """Letters at the end of what is held that may be the beginning of a stop text."""
        most = max((len(stop) - 1 for stop in self._sampling.stop), default=0)
        for count in range(min(most, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._sampling.stop):
                return count
        return 0
