"""Log lines as JSON, one object a line, with the run, the shard and the worker that they are about."""

import contextvars
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from facediffuser.redaction import redacted

FORMAT_VARIABLE = "FACEDIFFUSER_LOG_FORMAT"
"""Set to `json`, it asks every process of a run for JSON; `--log-format json` sets it."""

_about: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("about", default={})  # noqa: B039  # never changed


@contextmanager
def about(**names: str) -> Iterator[None]:
    """Within it the lines of this thread carry these names, for example `run`, `shard`, `worker`."""
    token = _about.set(_about.get() | names)
    try:
        yield
    finally:
        _about.reset(token)


def json_requested() -> bool:
    """Return whether the environment asks for JSON."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


class JsonFormatter(logging.Formatter):
    """A record as JSON: time (UTC, ISO 8601), level, logger, message, traceback if any, and what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redacted(record.getMessage()),
            **_about.get(),
        }
        if record.exc_info:
            line["traceback"] = redacted(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def log_json(logger: logging.Logger) -> None:
    """Let a logger write JSON to stderr, where neither it nor one above it, to which its lines go, does so already."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in _handlers_of(logger)):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)


def _handlers_of(logger: logging.Logger) -> Iterator[logging.Handler]:
    """Yield all that a line of the logger reaches."""
    here: logging.Logger | None = logger
    while here is not None:
        yield from here.handlers
        here = here.parent if here.propagate else None
