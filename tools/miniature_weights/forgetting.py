"""What fine-tuning makes a model forget, from the checkpoints of two trainings.

    python -m tools.miniature_weights.forgetting FOLDER --tdm RUN --sdm RUN [--people 8] [--instances 1] [--device auto]

PC by category of prompt of the base, the TDM and the SDM with plain text, over the share of fine-tuning, then IP and PC of every
method from the models of that share. Writes forgetting.csv and forgetting.png into FOLDER; what is measured of a share is kept
in FOLDER/points, so that the same command goes on where it stopped. The trainings need --keep-every in the same ratio.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from facediffuser.devices import pick_device
from facediffuser.evaluation.tables import OVERALL, score_table
from facediffuser.modelfolder import resolve_base
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.scoring.scorers import Scorers, load_scorers
from facediffuser.settings import Method
from tools.miniature_weights.checkpoint_models import checkpoint_steps, paired_steps, run_settings, write_models
from tools.miniature_weights.command_line import command_parser, write_csv
from tools.miniature_weights.methods import Unseen, load_pipeline, unseen_people
from tools.miniature_weights.scored import (
    CLAIM,
    METHODS,
    Prompt,
    Sampler,
    as_table,
    kept_rows,
    require_same,
    score_images,
    suite,
)

FIRST_PERSON = 86_000_000
"""Nobody of the claim, of the choice of windows, or of a training."""

TDM, PLAIN = "TDM", "SDM, plain text"
PLAIN_CURVES = (TDM, PLAIN)


def measure_point(
    pipeline: FaceDiffuserPipeline,
    scorers: Scorers,
    people: Sequence[Unseen],
    prompts: Sequence[Prompt],
    sampler: Sampler,
    instances: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """Return the scored images of all curves from one pair of models; those of each curve are kept in `folder`."""

    def curve(name: str, method: Method, pipe: FaceDiffuserPipeline) -> list[dict[str, Any]]:
        def make() -> list[dict[str, Any]]:
            return score_images(pipe, scorers, people, prompts, method, sampler, instances, name)

        return kept_rows(folder / f"{name.replace(', ', '-').replace(' ', '-').lower()}.json", make)

    rows: list[dict[str, Any]] = []
    for method in METHODS:
        rows += curve(method, method, pipeline)
    # The TDM's own images are those of the method; the SDM with plain text is its UNet in the TDM's place.
    rows += [row | {"method": TDM} for row in rows if row["method"] == "tdm"]
    plain = type(pipeline)(**pipeline.components | {"unet_text": pipeline.unet})
    plain.set_progress_bar_config(disable=True)
    return rows + curve(PLAIN, "tdm", plain)


def measure(
    output: Path,
    tdm: str,
    sdm: str,
    people: int = 8,
    instances: int = 1,
    sampler: Sampler = CLAIM,
    device: str = "cpu",
    most_points: int | None = None,
    time_left: Callable[[], bool] = lambda: True,
    prompts: Sequence[Prompt] | None = None,
) -> list[dict[str, Any]]:
    """Measure every checkpoint that both trainings have, or `most_points` of them, evenly; return the rows of the CSV.

    The prompts are the claim's, unless others are given.

    Where `time_left` says no before a point, the points so far are the result, and the next call goes on.
    """
    base = resolve_base(run_settings(tdm, "tdm").base)
    steps = paired_steps(checkpoint_steps(tdm), checkpoint_steps(sdm))
    if most_points and len(steps) > most_points:
        wanted = {round(place * (len(steps) - 1) / (most_points - 1)) for place in range(most_points)}
        steps = [pair for place, pair in enumerate(steps) if place in wanted]
    prompts = prompts or suite("miniature-30") + suite("miniature-pairs-8")
    made_from = {"tdm": tdm, "sdm": sdm, "sampler": asdict(sampler), "prompts": [prompt.text for prompt in prompts]}
    require_same(output / "points", made_from)
    scorers = load_scorers("miniature", device)
    who = unseen_people(people, scorers, FIRST_PERSON)
    found: list[dict[str, Any]] = []
    # The ends first: what a run that is cut short has to say.
    for tdm_step, sdm_step in sorted(steps, key=lambda pair: (pair != steps[0], pair != steps[-1], pair)):
        if not time_left():
            break
        points = output / "points" / f"{tdm_step:08d}-{sdm_step:08d}-{people}-{instances}"
        models = write_models(base, tdm, tdm_step, sdm, sdm_step, points / "models")
        pipeline, started = load_pipeline(models, device), time.monotonic()
        rows = measure_point(pipeline, scorers, who, prompts, sampler, instances, points)
        shutil.rmtree(models)
        found += point_rows(rows, tdm_step / steps[-1][0], tdm_step, sdm_step)
        print(f"TDM after {tdm_step}, SDM after {sdm_step} steps: {time.monotonic() - started:.0f} s", flush=True)
        found.sort(key=lambda row: row["share"])
        write_csv(output / "forgetting.csv", found)
    if found:
        plot(found).savefig(output / "forgetting.png", dpi=110)
    return found


def point_rows(rows: Sequence[dict[str, Any]], share: float, tdm_step: int, sdm_step: int) -> list[dict[str, Any]]:
    """Return the CSV's rows of one point from its scored images."""
    point = {"share": share, "tdm_step": tdm_step, "sdm_step": sdm_step}
    found = (asdict(row) for row in score_table(as_table(rows)))
    return [point | {"curve": fields.pop("method")} | fields for fields in found]


def plot(rows: Sequence[dict[str, Any]]):
    """Draw PC by category with plain text above, IP and PC of the methods below, over the share of fine-tuning."""
    from matplotlib.figure import Figure

    categories = [name for name in dict.fromkeys(row["category"] for row in rows) if name != OVERALL] + [OVERALL]
    figure = Figure(figsize=(3 * len(categories), 9), layout="constrained")
    panels = figure.subplots(3, len(categories), squeeze=False)
    for column, category in enumerate(categories):
        for line, (metric, curves) in enumerate((("pc", PLAIN_CURVES), ("ip", METHODS), ("pc", METHODS))):
            axes = panels[line][column]
            for curve in curves:
                points = [
                    row
                    for row in rows
                    if (row["curve"], row["category"], row["metric"], row["subjects"]) == (curve, category, metric, 1)
                ]
                shares = [row["share"] for row in points]
                (drawn,) = axes.plot(shares, [row["mean"] for row in points], marker="o", ms=3, label=curve)
                axes.fill_between(
                    shares,
                    [row["low"] for row in points],
                    [row["high"] for row in points],
                    alpha=0.12,
                    color=drawn.get_color(),
                )
            axes.grid(alpha=0.3)
            axes.set_title(f"{category}: {metric.upper()}{', plain text' if line == 0 else ''}", fontsize=9)
            axes.set_xlabel("share of fine-tuning (0: the base)", fontsize=8)
            if column == 0:
                axes.legend(fontsize=7)
    return figure


def main() -> None:
    """The command line."""
    parser = command_parser("forgetting", __doc__)
    parser.add_argument("folder", type=Path, help="where forgetting.csv and forgetting.png go")
    parser.add_argument("--tdm", required=True, help="folder or s3:// URL of the TDM's training")
    parser.add_argument("--sdm", required=True, help="folder or s3:// URL of the SDM's training")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--instances", type=int, default=1, help="images of each person and prompt")
    parser.add_argument("--points", type=int, help="measure so many checkpoints, evenly spread (default: all)")
    parser.add_argument("--steps", type=int, default=CLAIM.steps)
    parser.add_argument("--guidance", type=float, default=CLAIM.guidance)
    parser.add_argument("--window", type=int, nargs=2, default=CLAIM.window, metavar=("START", "END"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    sampler = Sampler(args.steps, args.guidance, tuple(args.window))
    measure(
        args.folder, args.tdm, args.sdm, args.people, args.instances, sampler, pick_device(args.device), args.points
    )


if __name__ == "__main__":
    main()
