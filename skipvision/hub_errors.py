"""What can go wrong between here and the hub, each in one sentence with the next step. No torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class HubError(ValueError):
    """What the hub, or the way to it, refuses."""


class NoModelError(HubError):
    """A name with no model behind it, or none that can be loaded."""


class NoRoomError(HubError):
    """A disk that is too small."""


class UnreachableError(HubError):
    """No answer from the hub, or none that is one."""

    def __init__(self, sentence: str, is_wanted: bool = False) -> None:
        super().__init__(sentence)
        self.is_wanted = is_wanted
        """Whether the user has forbidden to ask."""


@contextmanager
def explained(repo: str, revision: str) -> Iterator[None]:
    """Turns whatever huggingface_hub raises inside into HubError or one of its kinds."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_CACHE

    # Of httpx, or of httpx2 since huggingface_hub 2, which lets it through.
    client_error = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{repo} is gated: accept its terms on the model's page on the hub, and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NoModelError(
            f"{repo}: no such folder here, and no such model on the hub, or it is private: check the name, or log in"
            " with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise NoModelError(f"{repo} on the hub has no revision {revision}; check the name behind the @") from None
    except errors.OfflineModeIsEnabled:
        raise UnreachableError("HF_HUB_OFFLINE forbids asking the hub", is_wanted=True) from None
    except errors.HfHubHTTPError as error:
        raise _refusal(repo, error.response.status_code) from None
    except (errors.LocalEntryNotFoundError, client_error) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refusal(repo, error.__cause__.response.status_code) from None
        raise UnreachableError("the hub cannot be reached: check the network and try again") from None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        number = getattr(error, "errno", None)
        # hf_xet says it in words alone.
        if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            raise NoRoomError(f"the disk of {HF_HUB_CACHE} is full; free some room and run the command again") from None
        if isinstance(error, OSError) and number is not None:
            raise
        # Sizes that differ, headers that are missing, an answer that is no JSON.
        raise HubError(f"{repo}: the download is broken ({_first_line(error)}); run the command again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refusal(repo: str, status: int) -> HubError:
    if status == 401:
        return HubError(f"{repo}: the hub does not accept your token; log in again with `hf auth login`")
    if status == 403:
        return HubError(f"{repo}: the hub denies access to it; check what your token may read")
    if status == 429:
        return UnreachableError("the hub asks to wait, too many requests were made: try again in some minutes")
    if status >= 500:
        return UnreachableError(f"the hub is out of order (status {status}): try again later")
    return HubError(f"{repo}: the hub refuses with status {status}")
