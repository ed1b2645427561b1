"""A model that is opened while somebody types."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from svcli.chat.session import Session


class Opening:
    """The session that `open_session` makes, in a thread of its own."""

    def __init__(self, open_session: Callable[[], Session]) -> None:
        self._open = open_session
        self._future: Future[Session] | None = None

    def begin(self) -> Future[Session]:
        """Does so from now on."""
        if self._future is None:
            # Its thread is waited for when the process ends: one that runs on then may crash in what is torn down.
            pool = ThreadPoolExecutor(max_workers=1)
            self._future = pool.submit(self._open)
            pool.shutdown(wait=False)
        return self._future

    @property
    def is_done(self) -> bool:
        return self._future is not None and self._future.done()

    @property
    def session(self) -> Session | None:
        """None where it is not there yet, or never will be."""
        done = self._future if self.is_done else None
        return done.result() if done is not None and done.exception() is None else None

    def result(self) -> Session:
        """Waits. Raises what opening raised."""
        return self.begin().result()

    def when_failed(self, call: Callable[[BaseException], None]) -> None:
        """`call` is given what was raised, in whatever thread; at once where it is too late to wait."""

        def tell(future: Future[Session]) -> None:
            error = future.exception()
            if error is not None:
                call(error)

        self.begin().add_done_callback(tell)

    def close(self) -> None:
        """Waits, and frees what was opened."""
        if self._future is None:
            return
        self._future.cancel()
        with suppress(BaseException):  # whatever it was, it was told before, or nobody waits for it any more
            self._future.result().model.close()
