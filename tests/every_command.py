"""Every command of the command line, with its settings model, as cyclopts knows them."""

import inspect
from typing import get_args

from cyclopts import App

from facediffuser.flows.cli import app
from facediffuser.settings import Settings


def every_command(parent: App = app, words: tuple[str, ...] = ()) -> dict[str, type[Settings]]:
    """Return the commands, e.g. `miniature render`, and the settings model that each of them takes."""
    found: dict[str, type[Settings]] = {}
    for name in (name for name in parent if not name.startswith("-")):
        child = parent[name]
        if child.default_command:
            kind = inspect.signature(child.default_command).parameters["settings"].annotation.__origin__
            found[" ".join((*words, name))] = next(iter(get_args(kind)), kind)
        else:
            found |= every_command(child, (*words, name))
    return found
