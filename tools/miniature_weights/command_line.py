"""What the commands of this folder share: their parser, and tables written as CSV."""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of `python -m tools.miniature_weights.NAME`; of the description the first paragraph is shown."""
    return argparse.ArgumentParser(
        prog=f"python -m tools.miniature_weights.{name}", description=description.split("\n\n")[0]
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, with the columns of the first one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
