"""Prompts for the miniature world, of the benchmark's four kinds; {subject} stands for the person."""

from facediffuser.dataset.suites import suite_prompts
from facediffuser.storage.reading import parse_json


def _rows(suite: str) -> tuple[dict[str, str], ...]:
    return tuple(parse_json(line) for line in suite_prompts(suite).read_text().splitlines())


PROMPTS = _rows("miniature-30")
"""30 prompts for one person: accessory, context, action, style."""

PAIR_PROMPTS = _rows("miniature-pairs-8")
"""8 prompts for two people, two of each kind."""
