"""A worker for the tests of the drivers, in a module that a Ray process imports quickly."""

import logging

from facediffuser.json_log import JsonFormatter

SECONDS = {"denoise": 3.0, "score": 1.0, "total": 4.0}


class Counting:
    """A worker that only counts; `wrong` says what goes wrong, by the unit's key."""

    def __init__(self, wrong=None, cannot_start=None):
        if cannot_start:
            raise cannot_start
        self.wrong = wrong or {}

    def __call__(self, unit):
        if unit.key in self.wrong:
            raise self.wrong[unit.key]
        counts = {"rows": unit.rows, "failed": 1, "bytes": 10, "retries": {"denoise": 1}, "seconds": SECONDS}
        return {**counts, "data": unit.data}


class LogFormat:
    """A worker that counts whether its log lines are JSON."""

    def __call__(self, unit):
        handlers = logging.getLogger("facediffuser").handlers
        return {"rows": 1, "json": sum(isinstance(one.formatter, JsonFormatter) for one in handlers)}
