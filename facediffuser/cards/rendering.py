"""The templates of cards and of Prefect's artifacts, filled in; what users wrote is escaped by default."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import jinja2

from facediffuser.markup import Markdown, code_span, escape_markdown, markdown_table
from facediffuser.number_words import counted

TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, **values: object) -> str:
    """Return a template of `cards/templates` filled with values.

    Every value is escaped as its place asks: in `*.html.j2` as HTML unless it is `markupsafe.Markup`, in `*.md.j2` as
    one line of Markdown unless it is `facediffuser.markup.Markdown`.

    Args:
        name: the template's file name, such as `dataset_scores.md.j2`.
        values: what the template asks for.

    Raises:
        jinja2.UndefinedError: the template asks for a value that is not given.
        jinja2.TemplateNotFound: there is no such template.
    """
    return _environment(name.endswith(".html.j2")).get_template(name).render(**values)


@functools.cache
def _environment(html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=html,
        finalize=None if html else escape_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": code_span,
        "json": lambda value: Markdown(json.dumps(value)),
        "table": _two_columns,
        "counted": counted,
        "thousands": "{:,}".format,
    }
    return environment


def _two_columns(lines: Iterable[tuple[str, str]], right: bool = False) -> Markdown:
    return markdown_table(("", ""), lines, (1,) if right else ())
