"""Text from users in Markdown and labels: escaped, so that it can neither end a cell nor carry markup, HTML or links."""

import re
from collections.abc import Collection, Iterable, Sequence

_LINE_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_ENTITY = re.compile(r"&(?=#?\w+;)")
# An underscore inside a word is no emphasis, and names such as `image_encoder` stay readable.
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")


class Markdown(str):
    """Text that is Markdown already: it is not escaped."""


def one_line(text: object) -> str:
    """Return `text` with a space in place of line breaks and control characters, which fonts cannot draw either."""
    return _LINE_BREAKS.sub(" ", str(text))


def escape_markdown(text: object) -> Markdown:
    """Return `text` as one line of Markdown that shows just that text, inside a table's cell too.

    `Markdown` is returned as it is. Line breaks and control characters become spaces; `<`, `>` and entities are written
    as HTML entities; what starts code, emphasis, a link, an image, mathematics or the next cell gets a backslash.
    """
    if isinstance(text, Markdown):
        return text
    line = one_line(text)
    line = _ENTITY.sub("&amp;", line).replace("<", "&lt;").replace(">", "&gt;")
    return Markdown(_SPECIAL.sub(r"\\\g<0>", line))


def code_span(text: object) -> Markdown:
    """Return `text` as inline code, whatever backticks it holds; not for the cells of a table."""
    line = one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{fence}{pad}{line}{pad}{fence}")


def bold(text: object) -> Markdown:
    """Return `text`, escaped, in bold."""
    return Markdown(f"**{escape_markdown(text)}**")


def link(text: object, url: str) -> Markdown:
    """Return a link with `text`, escaped, to a URL whose special characters are percent-encoded."""
    safe = url.translate({ord(char): f"%{ord(char):02X}" for char in " ()<>"})
    return Markdown(f"[{escape_markdown(text)}]({safe})")


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]], right: Collection[int] = ()) -> Markdown:
    """Return a Markdown table, its cells escaped unless they are `Markdown`.

    Args:
        head: the titles of the columns.
        rows: a sequence of cells for each row.
        right: the indices of the columns that are set flush right.
    """
    rules = "|".join("---:" if column in right else "---" for column in range(len(head)))
    lines = [f"| {' | '.join(map(escape_markdown, row))} |" for row in rows]
    titles = "|".join(f" {title} " if title else " " for title in map(escape_markdown, head))
    return Markdown("\n".join([f"|{titles}|", f"|{rules}|", *lines]) + "\n")
