"""One request: what is noted of it, and what must end with it."""

from __future__ import annotations

import logging
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from urllib.parse import quote

from starlette.types import Scope

from svcli.server.page import PATHS as PAGE_PATHS
from svcli_engines.answer import Stats

PATHS = ("/v1/chat/completions", "/v1/models", "/v1/svcli/look", "/health", "/metrics", "/openapi.json", *PAGE_PATHS)
IDENTITY_KEY = "svcli.identity"
"""In the scope of a request that somebody else has taken, and may ask again elsewhere."""
GONE = 499
"""The status of a call whose client went away, in logs and counters alone."""
_LONGEST = 100
_log = logging.getLogger("svcli.server")


@dataclass(frozen=True)
class Identity:
    """What an answer has of its own beside the question: made again with the same, elsewhere, it is the same answer."""

    number: int = field(default_factory=lambda: uuid.uuid4().int)
    """128 bits: the answer's id, and the seed of one for which none is asked."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""
    begin: tuple[int, ...] = ()
    """Tokens of it that were told already: what is computed elsewhere may differ in its last bits, the text may not."""

    @property
    def seed(self) -> int:
        return self.number % (1 << 64)


@dataclass
class Call:
    """A request on its way."""

    method: str
    path: str
    identity: Identity = field(default_factory=Identity)
    status: int = 0
    """0 while nothing is answered."""
    complete: bool = False
    """Whether the answer is out as a whole."""
    stats: Stats | None = None
    problem: str = ""
    """What the status does not say."""
    said: list[int] = field(default_factory=list)
    """Tokens of the pieces that were streamed."""
    ends: ExitStack = field(default_factory=ExitStack)
    """Runs however the request ends, also where its client goes away."""
    started_at: float = field(default_factory=perf_counter)

    @staticmethod
    def of(scope: Scope) -> Call:
        return Call(scope["method"], scope["path"], scope.get(IDENTITY_KEY) or Identity())

    @property
    def route(self) -> str:
        """The path, as one of few."""
        if self.path.startswith("/v1/models/"):
            return "/v1/models/{id}"
        return self.path if self.path in PATHS else "other"

    def log(self) -> None:
        """One line, in which nothing that a client sent can begin another."""
        facts = [self.method, quote(self.path)[:_LONGEST], str(self.status)]
        if self.stats is not None:
            facts.append(f"{self.stats.num_rows_of_prompt}+{self.stats.num_tokens} tokens")
        facts.append(f"{perf_counter() - self.started_at:.3f} s")
        if self.problem:
            facts.append(f"({self.problem})")
        _log.info(" ".join(facts))
