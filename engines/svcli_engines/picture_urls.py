"""What may be fetched from where a URL says, and what messages call it; fetching it is `picture_fetching`. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from skipvision.pictures import MAX_FILE_BYTES

_LONGEST_NAME = 120


@dataclass(frozen=True)
class FetchLimits:
    """What may be fetched, and how long that may take."""

    seconds: float = 20.0
    """For everything: the name, all redirects, the last byte."""
    num_bytes: int = MAX_FILE_BYTES
    num_redirects: int = 5
    allow_private: bool = False
    """Also from this machine, its network, and whatever else is no public address."""
    private_remedy: str = ""
    """How to allow that, for the message of a refusal; empty where whoever asks cannot."""


def url_name(url: str) -> str:
    """What messages call a URL: without its query, which may hold a key, and without a password."""
    bare = url.partition("#")[0].partition("?")[0]
    scheme, separator, rest = bare.partition("://")
    host, slash, path = rest.partition("/")
    named = f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
    return named if len(named) <= _LONGEST_NAME else named[: _LONGEST_NAME - 3] + "..."
