"""Numbers as a person reads them, wherever one is shown."""

import ast
import re
from pathlib import Path

import pytest

from facediffuser.number_words import counted, duration

ROOT = Path(__file__).resolve().parent.parent
NOUNS = "images|rows|shards|subjects|parts|pictures|photographs|prompts|problems|objects|references|pairs|units|pages"


def test_one_is_in_the_singular():
    assert [counted(count, "image") for count in (0, 1, 2, 2480)] == ["0 images", "1 image", "2 images", "2,480 images"]
    assert [counted(count, "person", "people") for count in (1, 2)] == ["1 person", "2 people"]


def test_durations_are_in_the_units_a_person_counts_in():
    assert [duration(seconds) for seconds in (0.4, 75, 3600, float("nan"))] == [
        "0 s", "1 min 15 s", "1 h 00 min", "unknown time",
    ]  # fmt: skip


def texts(tree: ast.AST) -> list[str]:
    """Each text of a program on one line, with ? for what is put into it."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "?" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | documentation:
            found.append(re.sub("%[ds]", "?", node.value))
    return found


@pytest.mark.parametrize("room", ["facediffuser", "flows", "tasks"])
def test_no_text_puts_a_number_before_a_plural(room):
    wrong = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in sorted((ROOT / room).rglob("*.py"))
        if not path.is_relative_to(ROOT / "facediffuser/flows") and not path.is_relative_to(ROOT / "facediffuser/tasks")
        for text in texts(ast.parse(path.read_text()))
        if re.search(rf"\? ({NOUNS})\b", text)
    ]
    assert wrong == []
