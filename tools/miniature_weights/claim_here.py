"""The claim in this process, on one device: for a machine without Ray and Prefect, and for models that are still being tried.

    python -m tools.miniature_weights.claim_here out/claim [--models DIR] [--people 45] [--choice choice.json] [--device auto]

The people, prompts and methods of `facediffuser miniature claim`, with one reference picture of each person. Writes claim.md,
table.csv and scores.parquet; the scores of each method are kept in FOLDER/kept, so that the same command goes on where it stopped.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from facediffuser.devices import pick_device
from facediffuser.evaluation.claim import checks_by_set, claim_checks, markdown, sets_markdown
from facediffuser.evaluation.tables import markdown as table_markdown
from facediffuser.evaluation.tables import paper_markdown, score_table
from facediffuser.miniature.detector_gate import gate_markdown, rendered_gate
from facediffuser.modelfolder import model_digests, resolve_model
from facediffuser.scoring.scorers import load_scorers
from facediffuser.settings import Method
from tools.miniature_weights.command_line import command_parser, write_csv
from tools.miniature_weights.methods import Unseen, load_pipeline, unseen_people
from tools.miniature_weights.scored import (
    CLAIM,
    METHODS,
    Sampler,
    as_table,
    kept_rows,
    require_same,
    score_images,
    suite,
)

FIRST_PERSON = 80_000_000
"""The claim's people."""
SET_SIZE = 15
SUITES = ("miniature-30", "miniature-pairs-8")


def claim_here(
    output: Path,
    models: str,
    people: int,
    instances: int,
    sampler: Sampler,
    device: str,
    time_left: Callable[[], bool] = lambda: True,
) -> str | None:
    """Make and score the claim's images, write the tables and return them; None where there was no time for all methods.

    In sets of 15 people one after another, so that what is there when time is over is of whole sets.
    """
    made_from = {"models": model_digests(resolve_model(models)), "people": people, "instances": instances}
    require_same(output, made_from | {"sampler": asdict(sampler)})
    pipeline, scorers = load_pipeline(resolve_model(models), device), load_scorers("miniature", device)
    who = unseen_people(people, scorers, FIRST_PERSON)
    prompts = [prompt for name in SUITES for prompt in suite(name)]
    rows: list[dict[str, Any]] = []
    for first in range(0, people, SET_SIZE):
        some = who[first : first + SET_SIZE]
        for method in METHODS:
            if not time_left():
                return None
            path = output / "kept" / f"{first:04d}-{method}.json"

            def make(some: Sequence[Unseen] = tuple(some), method: Method = method) -> list[dict[str, Any]]:
                return score_images(pipeline, scorers, some, prompts, method, sampler, instances)

            made = kept_rows(path, make)
            rows += numbered_from(first, made)
    return write_claim(output, rows, people, sampler)


def numbered_from(first: int, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a set of people with their numbers among all people, of which the set's first is `first`."""
    return [row | {"subject_ids": [str(first + int(name)) for name in row["subject_ids"]]} for row in rows]


def write_claim(output: Path, rows: Sequence[dict[str, Any]], people: int, sampler: Sampler, gate: bool = True) -> str:
    """Write claim.md, table.csv and scores.parquet of scored images of all methods; return the former.

    gate: also count in how many renderings the face detector finds the people, which takes a while.
    """
    output.mkdir(parents=True, exist_ok=True)
    images = as_table(rows)
    table = score_table(images)
    pq.write_table(images, output / "scores.parquet")
    write_csv(output / "table.csv", [asdict(row) for row in table])
    parts = [
        f"{len(rows)} images of {people} people, {sampler.steps} steps, guidance {sampler.guidance}, window "
        f"{sampler.window[0]} to {sampler.window[1]}.\n",
        paper_markdown(table),
        markdown(claim_checks(table, images)),
    ]
    if people > SET_SIZE:
        parts.append(sets_markdown(checks_by_set(images, set_of)))
    if gate:
        parts.append(gate_markdown(rendered_gate(FIRST_PERSON, min(45, people))))
    parts.append(table_markdown(table))
    text = "\n".join(parts)
    (output / "claim.md").write_text(text)
    return text


def set_of(subject_id: str) -> str:
    """Return the name of a person's set of 15."""
    first = int(subject_id) // SET_SIZE * SET_SIZE
    return f"people {first + 1} to {first + SET_SIZE}"


def chosen_sampler(choice: Path | None) -> Sampler:
    """Return how the file of `tools.miniature_weights.choose` samples, the claim's way without one."""
    if choice is None:
        return CLAIM
    said = json.loads(choice.read_text())
    return Sampler(said["steps"], said["guidance_scale"], (said["fusion_start"], said["fusion_end"]))


def main() -> None:
    """The command line."""
    parser = command_parser("claim_here", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default="miniature", help="model folder (default: the shipped one)")
    parser.add_argument("--people", type=int, default=45)
    parser.add_argument("--instances", type=int, default=3, help="images of each person and prompt")
    parser.add_argument("--choice", type=Path, help="file of tools.miniature_weights.choose")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    sampler = chosen_sampler(args.choice)
    print(claim_here(args.folder, args.models, args.people, args.instances, sampler, pick_device(args.device)))


if __name__ == "__main__":
    main()
