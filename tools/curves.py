"""Curves and samples of training runs as pictures.

    python -m tools.curves RUN [RUN ...] [--plot curves.png] [--samples samples.png]

RUN is what `facediffuser train` wrote to, a folder or s3:// URL; that of `train both` counts as two.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from facediffuser.errors import InputError
from facediffuser.picture_grid import picture_grid
from facediffuser.pictures import stored_picture
from facediffuser.storage import Store, open_store
from facediffuser.training.training_run import RUN

SMOOTH = 0.05
"""Share of the reports that a point of the smoothed curve is the mean of."""
PANELS = {"loss": "training loss", "validation_loss": "validation loss", "localization": "localization loss"}
MARGIN = 12


@dataclass
class Run:
    """A run's name, its numbers (by name, by step) and its sample grids, by step."""

    name: str
    numbers: dict[str, dict[int, float]]
    samples: dict[int, Image.Image] = field(default_factory=dict)


def read_runs(urls: Sequence[str]) -> list[Run]:
    """Return the runs at some URLs; InputError where there is none."""
    runs = []
    for url in urls:
        store = open_store(url)
        inside = [one for one in (store, store.child("tdm"), store.child("sdm")) if one.list("tensorboard/")]
        if not inside:
            raise InputError(f"{url}: no tensorboard/ there; give what `facediffuser train` wrote to")
        runs += [_read(one) for one in inside]
    return runs


def _read(store: Store) -> Run:
    role = json.loads(store.get(RUN))["content"]["role"] if store.exists(RUN) else store.url.rpartition("/")[2]
    samples = {
        int(Path(one.key).stem.removeprefix("step-")): stored_picture(store.get(one.key), one.key)
        for one in store.list("samples/")
    }
    return Run(role.upper(), _numbers(store), dict(sorted(samples.items())))


def _numbers(store: Store) -> dict[str, dict[int, float]]:
    """Return what the TensorBoard files say: of a run that was gone on with, each step as it was done last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    numbers: dict[str, dict[int, float]] = {}
    for one in store.list("tensorboard/"):
        with tempfile.TemporaryDirectory(prefix="facediffuser-curves-") as folder:
            path = Path(folder) / Path(one.key).name
            path.write_bytes(store.get(one.key))
            events = EventAccumulator(str(path), size_guidance={"scalars": 0})
            events.Reload()
        for name in events.Tags()["scalars"]:
            points = {event.step: event.value for event in events.Scalars(name)}
            earlier = {step: value for step, value in numbers.get(name, {}).items() if step < min(points)}
            numbers[name] = earlier | points
    return numbers


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw each run's losses, a row a run."""
    from matplotlib.figure import Figure

    panels = [name for name in PANELS if any(any(run.numbers.get(name, {}).values()) for run in runs)]
    figure = Figure(figsize=(3.6 * len(panels), 2.6 * len(runs)), dpi=130, layout="constrained")
    axes = figure.subplots(len(runs), len(panels), squeeze=False)
    for row, run in zip(axes, runs, strict=True):
        for axis, name in zip(row, panels, strict=True):
            points = run.numbers.get(name, {})
            if not any(points.values()):
                axis.set_visible(False)
                continue
            axis.set_title(f"{run.name}: {PANELS[name]}", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.set_xlabel("step", fontsize=8)
            steps, values = np.array(list(points)), np.array(list(points.values()))
            if name == "validation_loss":
                axis.plot(steps, values, marker="o", markersize=3, color="tab:red")
            else:
                axis.plot(steps, values, linewidth=0.5, alpha=0.35, color="tab:blue")
                axis.plot(steps, smooth(values), color="tab:blue")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean over SMOOTH of the values, ends included."""
    half = max(1, round(len(values) * SMOOTH / 2))
    return np.array([values[max(0, at - half) : at + half + 1].mean() for at in range(len(values))])


def sheet(runs: Sequence[Run], columns: int = 3) -> Image.Image:
    """Return sample grids of each run, a row a run: the first, the last, and some between."""
    rows = [_chosen_samples(run, columns) for run in runs if run.samples]
    if not rows:
        raise InputError("no sample grids in these runs; train with --sample-every")
    return picture_grid(rows, MARGIN)


def _chosen_samples(run: Run, columns: int) -> list[Image.Image]:
    steps = list(run.samples)
    chosen = sorted({round(place) for place in np.linspace(0, len(steps) - 1, min(columns, len(steps)))})
    return [_titled(run.samples[steps[place]], f"{run.name}, step {steps[place]}") for place in chosen]


def _titled(picture: Image.Image, title: str) -> Image.Image:
    page = Image.new("RGB", (picture.width, picture.height + 2 * MARGIN), "white")
    page.paste(picture, (0, 2 * MARGIN))
    ImageDraw.Draw(page).text((0, MARGIN // 2), title, fill="black")
    return page


def main(argv: list[str] | None = None) -> int:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="what `facediffuser train` wrote to")
    parser.add_argument("--plot", type=Path, help="picture of the losses to write")
    parser.add_argument("--samples", type=Path, help="picture of sample grids to write")
    options = parser.parse_args(argv)
    try:
        runs = read_runs(options.runs)
        if options.plot:
            plot(runs, options.plot)
        if options.samples:
            page = sheet(runs)
            options.samples.parent.mkdir(parents=True, exist_ok=True)
            page.save(options.samples)
    except InputError as error:
        print(f"curves: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
