"""Choose the claim's guidance and fusion window, on people and prompts that are not the claim's.

    python -m tools.miniature_weights.choose out/choice.json [--models miniature] [--people 8] [--device auto]

For every guidance and window the images of unseen people and of PROMPTS are made and scored, and the choice is the one whose
geometric mean of IP and PC, over one person and over pairs, is highest: no other method's numbers are looked at. The file
has every candidate's means beside the choice, and what they were measured on; `miniature claim --choice` reads it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from facediffuser.devices import pick_device
from facediffuser.modelfolder import model_digests, resolve_model
from facediffuser.scoring.scorers import load_scorers
from tools.miniature_weights.command_line import command_parser
from tools.miniature_weights.methods import load_pipeline, unseen_people
from tools.miniature_weights.scored import (
    CLAIM,
    STEPS,
    Prompt,
    Sampler,
    kept_rows,
    made_prompt,
    require_same,
    score_images,
)

FIRST_PERSON = 87_000_000
"""Nobody of the claim, of a curve or of a training."""

GUIDANCES = (2.5, 3.5, 5.0, 7.5)
STARTS, ENDS = (2, 3, 4), (10, 11)
CRITERION = "geometric mean of IP and PC of face-diffuser, mean of one person and of pairs"

PROMPTS = tuple(
    made_prompt(f"chosen_{place:02d}", category, text)
    for place, (category, text) in enumerate(
        (
            ("accessory", "a {subject} wearing a green cap"),
            ("accessory", "a {subject} wearing a red beanie and a white shirt"),
            ("accessory", "a {subject} wearing a blue top hat"),
            ("context", "a {subject} wearing a yellow shirt in the desert"),
            ("context", "a photo of a {subject} in the forest"),
            ("context", "a {subject} wearing a white shirt in the city"),
            ("action", "a {subject} holding a cup on the beach"),
            ("action", "a {subject} reading a book in a room"),
            ("action", "a {subject} waving in the snow"),
            ("style", "a painting of a {subject} in the desert"),
            ("style", "a sketch of a {subject} in a room"),
            ("style", "a painting of a {subject} wearing a red shirt"),
            ("accessory", "a {subject_1} wearing a white shirt and a {subject_2} wearing a red shirt"),
            ("context", "a {subject_1} and a {subject_2} in the desert"),
            ("action", "a {subject_1} holding a cup and a {subject_2} waving in the forest"),
            ("style", "a painting of a {subject_1} and a {subject_2} on the beach"),
        )
    )
)
"""None of them is a prompt of the claim's."""


def measure(
    models: str,
    people: int,
    device: str,
    kept: Path,
    guidances: Sequence[float] = GUIDANCES,
    starts: Sequence[int] = STARTS,
    ends: Sequence[int] = ENDS,
    prompts: Sequence[Prompt] = PROMPTS,
    steps: int = STEPS,
    batch: int = CLAIM.batch,
) -> list[dict[str, Any]]:
    """Return a line for each candidate: guidance, window, IP and PC of one person and of pairs, and the criterion.

    The scores of each candidate are kept in `kept`, so that the same call goes on where it stopped.
    """
    made_from = {"models": model_digests(resolve_model(models)), "people": people, "steps": steps}
    require_same(kept, made_from | {"prompts": [prompt.text for prompt in prompts]})
    pipeline, scorers = load_pipeline(resolve_model(models), device), load_scorers("miniature", device)
    who = unseen_people(people, scorers, FIRST_PERSON)
    lines = []
    for guidance in guidances:
        for window in ((start, end) for start in starts for end in ends if start <= end):
            sampler = Sampler(steps, guidance, window, batch)

            def make(sampler: Sampler = sampler) -> list[dict[str, Any]]:
                return score_images(pipeline, scorers, who, prompts, "face-diffuser", sampler)

            rows = kept_rows(kept / f"{guidance}-{window[0]}-{window[1]}.json", make)
            lines.append(candidate_line(sampler, rows))
            print(json.dumps(lines[-1]), flush=True)
    return lines


def candidate_line(sampler: Sampler, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a candidate's guidance and window, its means of IP and PC of one person and of pairs, and the criterion."""
    start, end = sampler.window
    line: dict[str, Any] = {"guidance_scale": sampler.guidance, "fusion_start": start, "fusion_end": end}
    products = []
    for count, shown in ((1, "single"), (2, "pairs")):
        some = [row for row in rows if len(row["subject_ids"]) == count]
        ip, pc = (float(np.mean([row[metric] for row in some])) for metric in ("ip", "pc"))
        line |= {f"{shown}_ip": ip, f"{shown}_pc": pc}
        products.append(max(0.0, ip * pc) ** 0.5)
    return line | {"criterion": float(np.mean(products))}


def choice_of(lines: Sequence[dict[str, Any]], steps: int, made_from: dict[str, Any]) -> dict[str, Any]:
    """Return what the file says: the candidate with the highest criterion, why, on what, and all candidates."""
    best = max(lines, key=lambda line: line["criterion"])
    sampling = {name: best[name] for name in ("guidance_scale", "fusion_start", "fusion_end")}
    return {"steps": steps, **sampling, "criterion": CRITERION, "made_from": made_from, "candidates": list(lines)}


def main() -> None:
    """The command line."""
    parser = command_parser("choose", __doc__)
    parser.add_argument("file", type=Path, help="the JSON to write")
    parser.add_argument("--models", default="miniature", help="model folder (default: the shipped one)")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    choose(args.file, args.models, args.people, pick_device(args.device))


def choose(file: Path, models: str, people: int, device: str, **candidates) -> dict[str, Any]:
    """Measure the candidates, write the choice to `file` and return it; `candidates`: arguments of `measure`."""
    lines = measure(models, people, device, file.with_suffix(".kept"), **candidates)
    return write_choice(file, lines, models, people, candidates.get("steps", STEPS), candidates.get("prompts", PROMPTS))


def write_choice(
    file: Path,
    lines: Sequence[dict[str, Any]],
    models: str,
    people: int,
    steps: int,
    prompts: Sequence[Prompt] = PROMPTS,
) -> dict[str, Any]:
    """Write the choice among the candidates' lines, and what they were measured on, to `file`; return it."""
    made_from = {
        "models": model_digests(resolve_model(models)),
        "people": [FIRST_PERSON, people],
        "prompts": [prompt.text for prompt in prompts],
    }
    choice = choice_of(lines, steps, made_from)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(choice, indent=1) + "\n")
    return choice


if __name__ == "__main__":
    main()
