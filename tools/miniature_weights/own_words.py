"""What people write first: an evaluation in words that no training caption has.

    python -m tools.miniature_weights.own_words out/words [--models miniature] [--people 8] [--device auto]

Each prompt of PROMPTS is drawn as it stands and again in the captions' own words, with the class word `person` and with the
person's own; PC is always to the meaning in the captions' words, for the scorer knows no others. Writes words.csv: IP, PC and the
share of images with the right number of faces, of one person and of two.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from facediffuser.devices import pick_device
from facediffuser.evaluation.tables import OVERALL, score_table
from facediffuser.modelfolder import model_digests, resolve_model
from facediffuser.scoring.scorers import load_scorers
from tools.miniature_weights.command_line import command_parser, write_csv
from tools.miniature_weights.methods import load_pipeline, unseen_people
from tools.miniature_weights.scored import (
    CLAIM,
    Prompt,
    Sampler,
    as_table,
    kept_rows,
    made_prompt,
    require_same,
    score_images,
)

FIRST_PERSON = 88_000_000
"""Nobody of the claim, of a choice, of a curve or of a training."""

PROMPTS = tuple(
    made_prompt(f"words_{place:02d}", category, text, meaning)
    for place, (category, text, meaning) in enumerate(
        (
            ("context", "portrait of a {subject} at the seaside", "a photo of a {subject} on the beach"),
            ("context", "a {subject} downtown", "a {subject} in the city"),
            ("context", "a {subject} among the trees", "a {subject} in the forest"),
            ("context", "a {subject} in winter", "a {subject} in the snow"),
            ("context", "a {subject} at home", "a {subject} in a room"),
            ("accessory", "a {subject} with a woolly hat in red", "a {subject} wearing a red beanie"),
            ("accessory", "a {subject} in a blue sweater", "a {subject} wearing a blue shirt"),
            ("action", "a {subject} drinking coffee", "a {subject} holding a cup"),
            ("action", "a {subject} with a novel", "a {subject} reading a book"),
            ("action", "a happy {subject} saying hello", "a {subject} smiling and waving"),
            ("style", "pencil drawing of a {subject}", "a sketch of a {subject}"),
            ("style", "an oil picture of a {subject}", "a painting of a {subject}"),
            ("context", "{subject_1} with {subject_2} at the seaside", "a {subject_1} and a {subject_2} on the beach"),
            ("context", "a {subject_1} next to a {subject_2}", "a {subject_1} and a {subject_2}"),
            ("action", "a happy {subject_1} beside a {subject_2}", "a {subject_1} smiling and a {subject_2}"),
            ("style", "drawing of a {subject_1} and a {subject_2}", "a sketch of a {subject_1} and a {subject_2}"),
        )
    )
)


def measure(models: str, people: int, device: str, output: Path, sampler: Sampler = CLAIM) -> list[dict[str, Any]]:
    """Return the rows of words.csv; the scores of each way of saying it are kept in `output`, for another call."""
    made_from = {"models": model_digests(resolve_model(models)), "people": people, "sampler": asdict(sampler)}
    require_same(output, made_from)
    pipeline, scorers = load_pipeline(resolve_model(models), device), load_scorers("miniature", device)
    who = unseen_people(people, scorers, FIRST_PERSON)
    known = [replace(prompt, text=prompt.meaning) for prompt in PROMPTS]
    found: list[dict[str, Any]] = []
    for words, prompts in (("people's", PROMPTS), ("the captions'", known)):
        for class_word in ("person", None):
            shown = class_word or "man, woman"
            name = f"{words}-{shown}".replace("'", "").replace(", ", "-").replace(" ", "-")

            def make(
                prompts: tuple[Prompt, ...] = tuple(prompts), word: str | None = class_word
            ) -> list[dict[str, Any]]:
                sampled = replace(sampler, class_word=word)
                return score_images(pipeline, scorers, who, prompts, "face-diffuser", sampled)

            for row in score_table(as_table(kept_rows(output / "kept" / f"{name}.json", make))):
                values = asdict(row)
                del values["method"]
                found.append({"words": words, "class_word": shown} | values)
    write_csv(output / "words.csv", found)
    for row in found:
        if row["category"] == OVERALL:
            print(f"{row['words']:14s} {row['class_word']:11s} {row['subjects']} {row['metric']:5s} {row['mean']:.3f}")
    return found


def main() -> None:
    """The command line."""
    parser = command_parser("own_words", __doc__)
    parser.add_argument("folder", type=Path, help="where words.csv goes")
    parser.add_argument("--models", default="miniature", help="model folder (default: the shipped one)")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=CLAIM.guidance)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    sampler = replace(CLAIM, guidance=args.guidance)
    measure(args.models, args.people, pick_device(args.device), args.folder, sampler)


if __name__ == "__main__":
    main()
