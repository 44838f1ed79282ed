"""The documentation's pictures of the sampler's methods on people nobody was trained on.

`python -m tools.miniature_weights.methods samples|sweep FOLDER [--models DIR]`: a sheet with a row per person and a column
per method, and heat maps of IP and PC over where fusion begins and ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from facediffuser.faces import crop_square, face_crop_box
from facediffuser.miniature.looks import Outfit, Setting
from facediffuser.miniature.render import person, render
from facediffuser.modelfolder import resolve_model
from facediffuser.picture_grid import fit, picture_grid
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.prompts import IMAGE_MARKER, without_markers
from facediffuser.schedulers import SCHEDULER_CLASSES, SchedulerName, set_scheduler
from facediffuser.scoring.identity import subject_embedding
from facediffuser.scoring.scorers import Scorers, load_scorers
from facediffuser.window import default_fusion_window
from tools.miniature_weights.command_line import command_parser, write_csv
from tools.miniature_weights.measure import REFERENCE_MARGIN

FIRST_PERSON = 85_000_000
METHODS = ("tdm", "sdm", "fastcomposer", "face-diffuser")
SHOWN = (
    "a {} on the beach",
    "a {} wearing a red cap in the city",
    "a {} wearing a green shirt, reading a book in the forest",
    "a painting of a {} in the snow",
)
SWEPT = (
    "a {} wearing a red cap",
    "a {} wearing a blue beanie and a yellow shirt",
    "a {} in the desert",
    "a {} on the beach",
    "a sketch of a {}",
    "a painting of a {} in the city",
    "a {} smiling, holding a balloon",
    "a {} reading a book",
)
# Of 12 steps the last is number 11: fusion to 12 leaves the SDM none alone.
STARTS, ENDS = (0, 1, 2, 4, 6), (2, 4, 6, 8, 10, 12)
CELL, TITLE = 128, 22


@dataclass(frozen=True)
class Unseen:
    """A person nobody was trained on: the word for them, the reference picture's face square, and its embedding (d,)."""

    word: str
    face: Image.Image
    embedding: np.ndarray


def unseen_people(count: int, scorers: Scorers, first: int = FIRST_PERSON) -> list[Unseen]:
    """Return people, numbered from `first` on, with a bare-headed photograph in which one face is found."""
    found, number = [], first
    while len(found) < count:
        who, number = person(number), number + 1
        photo = Image.fromarray(render([who], number, 64, Setting("room"), [Outfit(shirt="white")]).image)
        faces = scorers.identity.embed_faces([photo])[0]
        if len(faces.faces) == 1:
            square = crop_square(photo, face_crop_box(faces.faces[0].box, REFERENCE_MARGIN))
            found.append(Unseen(who.class_word, square, subject_embedding(faces.vectors[:1])))
    return found


@dataclass(frozen=True)
class Trial:
    """A model folder under trial with how its images are made."""

    pipeline: FaceDiffuserPipeline
    steps: int
    guidance: float

    def images(self, people: Sequence[Unseen], prompts: Sequence[str], **how) -> list[Image.Image]:
        """Every prompt of every person, person after person, from the same first noise in every call."""
        made = []
        for number, one in enumerate(people):
            texts = [prompt.format(f"{one.word} {IMAGE_MARKER}") for prompt in prompts]
            seeds = [torch.Generator().manual_seed(1000 * number + place) for place in range(len(texts))]
            made += self.pipeline(
                texts,
                [[one.face]] * len(texts),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=seeds,
                **how,
            ).images
        return made


def load_pipeline(models: str | Path, device: str = "cpu", scheduler: SchedulerName = "dpm") -> FaceDiffuserPipeline:
    """Return a model folder's pipeline on a device, with the claim's scheduler if no other is named."""
    pipeline = FaceDiffuserPipeline.from_pretrained(models).to(device)
    pipeline.set_progress_bar_config(disable=True)
    set_scheduler(pipeline, SCHEDULER_CLASSES[scheduler])
    return pipeline


def load_trial(models: str, steps: int, guidance: float, scheduler: SchedulerName = "dpm") -> Trial:
    """Return the model folder (or `miniature`) under trial, with the claim's scheduler if no other is named."""
    return Trial(load_pipeline(resolve_model(models), scheduler=scheduler), steps, guidance)


def samples(trial: Trial, people: Sequence[Unseen], window: tuple[int, int] | None = None) -> Image.Image:
    """A row per person: the reference, then for each method the prompts of SHOWN; fusion in the window, or the released one."""
    start, end = window or default_fusion_window(trial.steps)
    columns = {name: trial.images(people, SHOWN, method=name, fusion_start=start, fusion_end=end) for name in METHODS}
    per_row = {"reference": 1} | dict.fromkeys(METHODS, len(SHOWN))
    columns = {"reference": [one.face for one in people]} | columns
    paper = Image.new("RGB", (CELL * sum(per_row.values()) + 8 * len(METHODS), TITLE + CELL * len(people)), "white")
    pen, font, left = ImageDraw.Draw(paper), ImageFont.load_default(14), 0
    for name, images in columns.items():
        cells, count = [fit(image, CELL, CELL) for image in images], per_row[name]
        pen.text((left + 4, 3), name, fill="black", font=font)
        paper.paste(picture_grid([cells[i : i + count] for i in range(0, len(cells), count)]), (left, TITLE))
        left += CELL * count + 8
    return paper


def sweep(trial: Trial, people: Sequence[Unseen], scorers: Scorers) -> list[dict[str, float]]:
    """IP and PC, means over the prompts of SWEPT, for every start and end of fusion (in steps)."""
    references = [[one.embedding] for one in people for _ in SWEPT]
    texts = [without_markers(prompt.format(f"{one.word} {IMAGE_MARKER}")) for one in people for prompt in SWEPT]
    rows = []
    for start in STARTS:
        for end in (end for end in ENDS if start <= end):
            images = trial.images(people, SWEPT, fusion_start=start, fusion_end=end)
            scores = scorers.score(images, references, texts)
            ip, pc = (float(np.mean([getattr(score, name) for score in scores])) for name in ("ip", "pc"))
            rows.append({"fusion_start": start, "fusion_end": end, "images": len(images), "ip": ip, "pc": pc})
            print(f"fusion from step {start} to {end}: IP {ip:.3f}, PC {pc:.3f}", flush=True)
    return rows


def heat_maps(rows: Sequence[dict[str, float]], steps: int):
    """The sweep as a figure: one map of IP and one of PC."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2), (("ip", "IP (identity)"), ("pc", "PC (prompt)")), strict=True
    ):
        values = np.full((len(STARTS), len(ENDS)), np.nan)
        for row in rows:
            values[STARTS.index(row["fusion_start"]), ENDS.index(row["fusion_end"])] = row[name]
        axes.imshow(values, cmap="viridis", aspect="auto")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < middle else "k")
        axes.set_xticks(range(len(ENDS)), ENDS)
        axes.set_yticks(range(len(STARTS)), STARTS)
        axes.set(title=title, xlabel=f"fusion ends before step (of {steps})", ylabel="fusion begins at step")
    return figure


def main() -> None:
    """The command line."""
    parser = command_parser("methods", __doc__)
    parser.add_argument("what", choices=["samples", "sweep"])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--models", default="miniature", help="model folder (default: the shipped one)")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--steps", type=int, help="denoising steps (default: 25 for samples, 12 for the sweep)")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--scheduler", choices=SCHEDULER_CLASSES, default="dpm")
    args = parser.parse_args()
    steps = args.steps or (25 if args.what == "samples" else 12)
    trial = load_trial(args.models, steps, args.guidance, args.scheduler)
    scorers = load_scorers("miniature", "cpu")
    people = unseen_people(args.people, scorers)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "samples":
        sheet = samples(trial, people).quantize(256, dither=Image.Dither.NONE)
        sheet.save(args.folder / "miniature-methods.png", optimize=True)
        return
    rows = sweep(trial, people, scorers)
    write_csv(args.folder / "miniature-sweep.csv", rows)
    heat_maps(rows, trial.steps).savefig(args.folder / "miniature-sweep.png", dpi=110)


if __name__ == "__main__":
    main()
