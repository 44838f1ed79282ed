"""What a command shows on the terminal: the product's own lines; those of Prefect, Ray and other libraries on request."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum

from facediffuser.json_log import JsonFormatter, json_requested

PRODUCT = "facediffuser"
_RAY_CORE = re.compile(rb"\[[-0-9]+ [:,0-9]+ [A-Z] \d+ \d+\] ")  # [2026-11-27 08:37:18,012 E 17541 17541]


class Verbosity(Enum):
    """How much a command says on stderr while it works."""

    QUIET = "warnings and errors"
    NORMAL = "what the product does"
    VERBOSE = "what its libraries say, too"


@contextmanager
def shown(verbosity: Verbosity) -> Iterator[None]:
    """Write log records to stderr as `verbosity` says for as long as the context lasts.

    To be entered before Prefect, Ray or transformers is imported: they read their settings from the environment. What
    the user has set there stays.
    """
    verbose = verbosity is Verbosity.VERBOSE
    for name, value in (_LIBRARIES | (_VERBOSE_LIBRARIES if verbose else _SILENT_LIBRARIES)).items():
        os.environ.setdefault(name, value)
    root, ours = logging.getLogger(), logging.getLogger(PRODUCT)
    before = root.level, ours.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json_requested() else _Formatter(verbose))
    handler.setLevel(logging.WARNING if verbosity is Verbosity.QUIET else logging.INFO)
    if not verbose:
        handler.addFilter(logging.Filter(PRODUCT))
    # Prefect adds no handler of its own to a root logger that has one.
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    if verbose:
        root.setLevel(logging.INFO)
    with warnings.catch_warnings(), nullcontext() if verbose else _ray_core_lines_dropped(handler):
        if not verbose and not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(before[0])
            ours.setLevel(before[1])


@contextmanager
def warnings_held_back() -> Iterator[None]:
    """Show no log lines: an input check runs once more in the flow, and its warnings are shown there."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _ray_core_lines_dropped(handler: logging.StreamHandler) -> Iterator[None]:
    """Drop the lines that Ray's C++ part writes to file descriptor 2, past all loggers and without a setting for it.

    `sys.stderr` and the handler go on writing to the terminal itself, so that progress bars know it.
    """
    stream = sys.stderr
    if stream is not sys.__stderr__ or stream is None:
        yield  # a caller has taken stderr for itself
        return
    terminal = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    unfiltered = os.fdopen(terminal, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False)
    sys.stderr = sys.__stderr__ = unfiltered  # type: ignore[misc]  # final, says typeshed
    handler.setStream(sys.stderr)

    def copy() -> None:
        with os.fdopen(reader, "rb") as lines:
            for line in lines:
                if not _RAY_CORE.match(line):
                    os.write(terminal, line)

    # Ray's and Prefect's processes have the pipe's other end, too, and may outlive this: no end of file is waited for.
    threading.Thread(target=copy, name="stderr", daemon=True).start()
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = sys.__stderr__ = stream  # type: ignore[misc]
        os.dup2(terminal, 2)


class _Formatter(logging.Formatter):
    """`08:15:00 text` with the level where it is a warning or worse, and with the logger's name in verbose mode."""

    def __init__(self, verbose: bool):
        super().__init__("%(asctime)s %(level)s%(message)s", datefmt="%H:%M:%S")
        self.verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        name = f"{record.name}: " if self.verbose else ""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        record.level = name + level
        return super().format(record)


_LIBRARIES = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": PRODUCT,
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_VERBOSE_LIBRARIES = {
    "RAY_LOGGER_LEVEL": "info",
    "RAY_LOG_TO_DRIVER": "1",
}
_SILENT_LIBRARIES = {
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # Errors of a run reach the terminal as exceptions; Ray's own lines say what it recovers from.
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_LOGGER_LEVEL": "critical",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # diffusers' and others' bars while models load and sample; `tasks.progress` asks for its own bar by itself.
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
