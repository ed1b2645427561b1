"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svcli_engines.base import Logits


class SamplingError(ValueError):
    """A sampling setting out of range."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    temperature: float = 0.0
    """0: always the likeliest token."""
    top_k: int = 0
    """Draw among so many of the likeliest; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest that together have this probability."""
    seed: int | None = None
    """The same seed draws the same answer; None: another each time."""
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """The model does not end its answer before; for timing answers of one length."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer where they would begin."""
    begin: tuple[int, ...] = ()
    """Tokens that the answer begins with, whatever would be drawn: those that were told of it before it broke off."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told beside each that is said; None: tokens are not told."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise SamplingError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise SamplingError(f"top_k must be 0 or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and self.seed < 0:
            raise SamplingError(f"seed must be 0 or more, not {self.seed}")
        if self.max_new_tokens < 1:
            raise SamplingError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise SamplingError(f"min_new_tokens must be 0 to {self.max_new_tokens}, not {self.min_new_tokens}")
        if not all(self.stop):
            raise SamplingError("a text that ends the answer must not be empty")
        if self.logprobs is not None and self.logprobs < 0:
            raise SamplingError(f"logprobs must be 0 or more, not {self.logprobs}")


@dataclass(frozen=True)
class Token:
    """A token that was said, and how likely it was before temperature, top_k and top_p."""

    id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities, best first."""


class Sampler:
    """Draws tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature else None

    def pick(self, logits: Logits) -> int:
        """A token id from `logits` [vocab]."""
        if self._random is None:
            return int(logits.argmax())
        probabilities = distribution(logits, self._sampling)
        return int(self._random.choice(len(probabilities), p=probabilities))


def rated(token: int, logits: Logits, num_likeliest: int) -> Token:
    """The token among `logits` [vocab], with so many of the likeliest."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-logprobs, kind="stable")[:num_likeliest]
    return Token(token, float(logprobs[token]), tuple((int(each), float(logprobs[each])) for each in best))


def distribution(logits: Logits, sampling: Sampling) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """[vocab] probabilities at a temperature above 0, after top_k and then top_p."""
    order = np.argsort(-logits, kind="stable")
    scaled = (logits[order].astype(np.float64) - float(logits.max())) / sampling.temperature
    ranked = np.exp(scaled)
    if sampling.top_k:
        ranked[sampling.top_k :] = 0
    ranked /= ranked.sum()
    before = np.cumsum(ranked) - ranked
    ranked[before >= sampling.top_p] = 0  # the token that reaches top_p stays
    probabilities = np.zeros(len(logits))
    probabilities[order] = ranked / ranked.sum()
    return probabilities
