"""What every flow of the product has in common on Prefect's pages: a name that says what is made, its log, its end."""

import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

from prefect import Flow, flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler
from prefect.settings import get_current_settings

from facediffuser.flows.stopping import report_stop, watch_process
from facediffuser.flows.terminal import PRODUCT
from facediffuser.json_log import json_requested, log_json

LONGEST_NAME = 200
_INVENTED = re.compile(r"[a-z]+-[a-z]+")

Function = TypeVar("Function", bound=Callable[..., Any])


def product_flow(name: str, title: str) -> Callable[[Function], Function]:
    """Return a decorator that makes a function with one parameter, `settings`, a flow.

    Args:
        name: the flow's name.
        title: the name of its runs, a format string with `{settings.FIELD}` in it. A run that was given a name of its
            own keeps it; two words that a hyphen joins count as a name that Prefect invented.
    """

    def run_name() -> str:
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            return name
        given = context.flow_run.name
        if not _INVENTED.fullmatch(given):
            return given
        return title.format(**(context.parameters or {}))[:LONGEST_NAME]

    def decorate(function: Function) -> Function:
        made: Any = flow(
            function,
            name=name,
            flow_run_name=run_name,
            on_running=[watch_process, show_log],
            on_failure=[report_stop],
        )
        return made

    return decorate


def show_log(flow: Flow[..., Any], run: FlowRun, state: State) -> None:
    """Hook for `on_running`: the product's own log lines appear on the run's page.

    A command adds the handler by PREFECT_LOGGING_EXTRA_LOGGERS before Prefect is imported; a worker's process has none.
    """
    product = logging.getLogger(PRODUCT)
    if json_requested():
        log_json(product)
    if not get_current_settings().logging.to_api.enabled:
        return
    if not any(isinstance(handler, APILogHandler) for handler in product.handlers):
        product.addHandler(APILogHandler())
    if product.getEffectiveLevel() > logging.INFO:
        product.setLevel(logging.INFO)
