"""Progress of long work, shown in three ways at once: a bar in a terminal, log lines, a Prefect progress artifact."""

import logging
import re
import sys
import time
from types import TracebackType

from tqdm import tqdm

from facediffuser.number_words import counted, duration
from facediffuser.tasks.run_page import ProgressBar, in_prefect_run

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
ARTIFACT_EVERY_S = 2.0


class Progress:
    """Count `total` units of work and tell people how far it is, how fast, and how long it will take.

    Used as a context manager; `advance(n, note)` after each finished piece. Outside a Prefect run there is no artifact,
    and without a terminal, or with --quiet, there is no bar; the log lines (at most one in ten seconds, and a last one) are always there.
    """

    def __init__(self, total: int, unit: str, title: str):
        self.total, self.unit, self.title = total, unit, title
        self.done = self._before = 0
        self._started = self._logged = self._shown = time.monotonic()
        self._bar: tqdm | None = None
        self._page: ProgressBar | None = None

    def __enter__(self) -> "Progress":
        if _lines_on_terminal():
            unit = f" {self.unit}"
            self._bar = tqdm(total=self.total, unit=unit, desc=self.title, dynamic_ncols=True, disable=False)
        if in_prefect_run():
            self._page = ProgressBar("progress-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-"))
            self._page.show(0.0, self._line(""))
        return self

    def advance(self, n: int = 1, note: str = "") -> None:
        """Add finished units.

        Args:
            n: how many.
            note: a short remark shown beside them (a loss, a count of failures).
        """
        self.done += n
        if self._bar:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.info(self._line(note))
        if self._page and now - self._shown >= ARTIFACT_EVERY_S:
            self._shown = now
            self._page.show(self._percent, self._line(note))

    def skip(self, n: int) -> None:
        """Count `n` units as finished before this began: they say nothing about how fast it is."""
        self._before += n
        self._started = time.monotonic()
        self.advance(n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()
        logger.info(self._line("" if error is None else f"stopped by {type(error).__name__}"))
        if self._page:
            self._page.close(self._percent, self._line("" if error is None else "stopped"))

    @property
    def _percent(self) -> float:
        return min(100.0, 100.0 * self.done / max(self.total, 1))

    def _line(self, note: str) -> str:
        seconds = time.monotonic() - self._started
        rate = (self.done - self._before) / seconds if seconds > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else float("nan")
        pace = (
            f"{rate:.2f} {self.unit}/s, {duration(left)} left" if self.done < self.total else f"in {duration(seconds)}"
        )
        done = f"{self.title}: {self.done:,}/{counted(self.total, self.unit.removesuffix('s'))}, {pace}"
        return f"{done} ({note})" if note else done


def _lines_on_terminal() -> bool:
    """Whether stderr is a terminal and log lines are shown on it; with --quiet there are none, and no bar either."""
    streams = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
    levels = [handler.level for handler in streams if handler.stream is sys.stderr]
    return sys.stderr.isatty() and (not levels or min(levels) <= logging.INFO)
