"""Benchmark suites: files of prompts that come with the package, in the format that anyone's prompts have.

`single-30` has the shape of the paper's benchmark (15 subjects x 30 prompts), `single-40` that of FastComposer's (15 x
40, ten prompts each of accessory, style, action and context), `pairs-20` is for all pairs of the subjects;
`miniature-30` and `miniature-pairs-8` say the same kinds of things in the words of the miniature world. The prompts are
our own; the subjects are the user's.
"""

import re
from pathlib import Path

from facediffuser.errors import InputError
from facediffuser.storage.reading import parse_json

FOLDER = Path(__file__).parent / "suites"
_PLACE = re.compile(r"\{subject(?:_\d+)?\}")


def suites() -> list[str]:
    """Return the names of the suites."""
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def suite_prompts(name: str) -> Path:
    """Return the prompts' file of a suite.

    Raises:
        InputError: there is no suite of that name; the error names those there are.
    """
    if name not in suites():
        raise InputError(f"{name}: no such benchmark; give one of {', '.join(suites())}, or a file of prompts")
    return FOLDER / f"{name}.jsonl"


def suite_subjects(name: str) -> int:
    """Return how many subjects an image of a suite shows.

    Raises:
        InputError: there is no suite of that name.
    """
    first = parse_json(suite_prompts(name).read_text().splitlines()[0])
    return len(_PLACE.findall(first["prompt"]))


def prompts_file(prompts: str) -> str:
    """Return what `--prompts` stands for: a suite's file where it is a suite's name, else the value itself."""
    return str(suite_prompts(prompts)) if prompts in suites() else prompts
