"""What a run shows on its page in Prefect; a server that does not answer neither ends nor holds up the work.

Requests go out beside the work, in threads of their own: Prefect's client tries for about a minute.
"""

import contextvars
import logging
import sys
import threading
import time
from collections.abc import Callable
from uuid import UUID

logger = logging.getLogger(__name__)

ANSWER_S = 10.0
"""Seconds that the end of a stage or of a run waits for the server at most."""


def in_prefect_run() -> bool:
    """Return whether this code runs in a flow or a task of Prefect, and so has a page."""
    # The drivers work without Prefect, too; where nobody has imported it, there is no run of it.
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext, TaskRunContext

    return bool(FlowRunContext.get() or TaskRunContext.get())


def show_markdown(text: str, key: str, description: str | None = None, within_s: float = ANSWER_S) -> None:
    """Show a text on the run's page, if this is a run; where the server takes none, that is logged.

    Args:
        text: Markdown.
        key: the artifact's name: lowercase letters, digits and hyphens.
        description: one line on it.
        within_s: seconds after which the server is no longer waited for.
    """
    if not in_prefect_run():
        return
    from prefect.artifacts import create_markdown_artifact

    sender = _Sender(key)
    sender.send(lambda: create_markdown_artifact(text, key=key, description=description))
    sender.wait(within_s)


class ProgressBar:
    """A progress bar on the run's page.

    Args:
        key: the artifact's name: lowercase letters, digits and hyphens.
        within_s: seconds that `close` waits for the server at most.
    """

    def __init__(self, key: str, within_s: float = ANSWER_S):
        self.key, self.within_s = key, within_s
        self._sender = _Sender(key)
        self._id: UUID | None = None

    def show(self, percent: float, description: str) -> None:
        """Show a share of the work, 0 to 100. Returns at once; left out while an earlier request is under way."""
        if self._sender.ended(0.0):
            self._sender.send(lambda: self._send(percent, description))

    def close(self, percent: float, description: str) -> None:
        """Show the last state."""
        end = time.monotonic() + self.within_s
        if self._sender.wait(self.within_s):
            self._sender.send(lambda: self._send(percent, description))
            self._sender.wait(end - time.monotonic())

    def _send(self, percent: float, description: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._id is None:
            self._id = create_progress_artifact(percent, key=self.key, description=description)
        else:
            update_progress_artifact(self._id, percent, description=description)


class _Sender:
    """Sends requests beside this thread, one at a time; the first that fails is logged, and further ones are not."""

    def __init__(self, key: str):
        self.key, self.failed = key, False
        self._thread: threading.Thread | None = None

    def send(self, request: Callable[[], object]) -> None:
        """Begin a request with the run of this thread."""
        # A daemon: a process that ends does not wait for it.
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._do, request), daemon=True)
        self._thread.start()

    def ended(self, seconds: float) -> bool:
        """Return whether the last request has come back, well or not, within so many seconds."""
        if self._thread is not None:
            self._thread.join(max(0.0, seconds))
        return self._thread is None or not self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Return the same; what has not come back counts as failed."""
        ended = self.ended(seconds)
        if not ended:
            self._fail(f"no answer within {seconds:.3g} s")
        return ended

    def _do(self, request: Callable[[], object]) -> None:
        try:
            request()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _fail(self, why: str) -> None:
        if not self.failed:
            self.failed = True
            logger.warning("Prefect's server did not take the artifact %s (%s); the run goes on", self.key, why)
