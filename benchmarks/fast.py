"""What fast sampling costs and what it loses: each means alone and stacked, against exact mode, on the miniature.

    python -m benchmarks.fast [--output out/fast] [--images 40] [--only NAME ...]
    python -m benchmarks.fast --pairs FAST EXACT
    python -m benchmarks.fast --full-size [--images 32] [--seconds 600] [--eager] [--small]

Exact mode is 50 steps of PNDM with the released window. Every way makes the same images from the same noise, of people and
prompts of its own: neither those of `miniature claim` nor any that the models were trained on. Writes `table.md`,
`quality.png` and, per way, `ways/<name>.json`; run again, it makes only what is missing. Cost is counted in evaluations of
one row by a whole UNet; a partial evaluation counts the share of its operations.

--pairs compares two datasets that `generate` made of the same rows, one with `--speed fast` and one without; shards that are
not there yet are left out.

--full-size says nothing of quality: models of Stable Diffusion v1-5's size with random weights, on a GPU, run by the compiled
engine, and the images a second of exact mode, of each means alone and of `--speed fast`. It prints a way as soon as it is
measured and leaves out those for which --seconds do not suffice. --small tries the same on small models.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.beside import quiet
from benchmarks.engines import RELEASED
from benchmarks.engines import Bench as EngineBench
from benchmarks.engines import Way as EngineWay
from benchmarks.gpu_load import GpuLoad
from benchmarks.sampler import full_size_pipeline, say, small_random_pipeline
from facediffuser.dataset.inputs import read_prompts, read_subjects
from facediffuser.dataset.plan import Plan, RowSettings
from facediffuser.dataset.reading import open_dataset
from facediffuser.engine_options import COMPILED, EAGER
from facediffuser.errors import InputError
from facediffuser.evaluation.statistics import Interval, coded, mean_interval
from facediffuser.fast_sampling import part_shares, plan_steps, row_equivalents
from facediffuser.generation.certify import similarity
from facediffuser.generation.conditions import ConditionCache
from facediffuser.generation.reference_pictures import prepare_references
from facediffuser.generation.speed_settings import FAST_MEANS, FAST_SCHEDULER, FAST_STEPS
from facediffuser.markup import Markdown, markdown_table
from facediffuser.means import NONE, Means
from facediffuser.miniature.render import write_subjects
from facediffuser.pictures import stored_picture
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.prompts import without_markers
from facediffuser.schedulers import SCHEDULER_CLASSES, set_scheduler
from facediffuser.scoring.scorers import Scorers, load_scorers
from facediffuser.stages import plan_stages
from facediffuser.storage import open_store
from facediffuser.unet_parts import decode, encode, last_layers
from facediffuser.window import default_fusion_window

FIRST_PERSON, PEOPLE = 84_000_000, 12
PAIRS_OF = 4  # a quarter of the images shows two people
METRICS = ("ip", "pc", "faces")
PROMPTS = (
    "a {subject} wearing a yellow top hat in the city",
    "a {subject} wearing a red beanie on the beach",
    "a {subject} wearing a green shirt",
    "a {subject} smiling in the forest",
    "a photo of a {subject} holding a cup in the snow",
    "a {subject} reading a book in the desert",
    "a painting of a {subject} in a room",
    "a sketch of a {subject} wearing a blue cap",
    "a {subject} waving in the snow",
    "a photo of a {subject} in the desert",
    "a {subject_1} wearing a white cap and a {subject_2} wearing a black shirt",
    "a {subject_1} and a {subject_2} in the city",
    "a painting of a {subject_1} and a {subject_2} on the beach",
)


@dataclass(frozen=True)
class Way:
    """One way of sampling: steps, scheduler, the fusion window as a share of the steps, and means."""

    name: str
    steps: int
    scheduler: str = "dpm"
    means: Means = NONE

    @property
    def window(self) -> tuple[int, int]:
        return default_fusion_window(self.steps)


EXACT = Way("exact", 50, "pndm")
ALONE_STEPS = 16
_STACKED = Means(guidance_every=2)
WAYS = (
    EXACT,
    *(Way(f"{steps} steps, {name}", steps, name) for name, steps in
      [("dpm", 25), ("dpm", 16), ("dpm", 12), ("dpm", 10), ("dpm", 8), ("dpm", 6), ("unipc", 10), ("unipc", 8), ("unipc", 6)]),
    *(Way(f"16 steps, {name}", ALONE_STEPS, "dpm", means) for name, means in {
        "guidance kept, every 2nd": Means(guidance_every=2),
        "guidance kept, every 4th": Means(guidance_every=4),
        "guidance kept, every 2nd, fused too": Means(guidance_every=2, in_fusion=True),
        "no guidance in the last half": Means(unguided_text=0.5, unguided_subject=0.5),
        "deep features, every 2nd": Means(deep_every=2),
        "deep features, every 3rd": Means(deep_every=3),
        "deep features, 2 layers, every 2nd": Means(deep_every=2, deep_layers=2),
        "deep features, every 2nd, fused too": Means(deep_every=2, in_fusion=True),
        "encoder, every 2nd": Means(encoder_every=2),
        "encoder, every 3rd": Means(encoder_every=3),
        "encoder, every 2nd, fused too": Means(encoder_every=2, in_fusion=True),
    }.items()),
    *(Way(f"{steps} steps, {name}", steps, "dpm", means)
      for steps in (10, 8, 6)
      for name, means in {
          "guidance kept": _STACKED,
          "no guidance in the last half": Means(unguided_text=0.5, unguided_subject=0.5),
          "guidance kept, deep features": Means(guidance_every=2, deep_every=2),
          "guidance kept, fused too": Means(guidance_every=2, in_fusion=True),
      }.items()),
    *(Way(f"{steps} steps, no guidance in {part}", steps, "dpm", Means(unguided_subject=share))
      for steps in (12, 10, 8, 7, 6)
      for part, share in {"the SDM's last half": 0.5, "the SDM's steps": 1.0}.items()),
    Way("10 steps, no guidance in the SDM's last half, deep features", 10, "dpm", Means(unguided_subject=0.5, deep_every=2)),
    Way("8 steps, no guidance in the SDM's last half, deep features", 8, "dpm", Means(unguided_subject=0.5, deep_every=2)),
    Way("8 steps, no guidance in the SDM's last half, kept in the TDM's", 8, "dpm",
        Means(unguided_subject=0.5, guidance_every=2)),
    Way("8 steps, no guidance in the SDM's last half, deep features of 2 layers", 8, "dpm",
        Means(unguided_subject=0.5, deep_every=2, deep_layers=2)),
)  # fmt: skip


class Bench:
    """The miniature with the images to make: rows of a plan, their conditions and references."""

    def __init__(self, folder: Path, images: int):
        torch.set_num_threads(1)
        people, prompts = folder / "people", folder / "prompts.jsonl"
        if not (people / "subjects.csv").exists():
            write_subjects(people, FIRST_PERSON, count=PEOPLE)
        lines = [json.dumps({"prompt_id": f"sweep_{n:02d}", "prompt": text}) for n, text in enumerate(PROMPTS)]
        prompts.write_text("\n".join(lines) + "\n")
        self.pipe = FaceDiffuserPipeline.from_pretrained("miniature")
        self.pipe.set_progress_bar_config(disable=True)
        self.scorers: Scorers = load_scorers("miniature")
        store = open_store(str(people))
        subjects = read_subjects(str(people))
        self.references = prepare_references(store, subjects, self.scorers, "face", 0.3)
        settings = RowSettings(
            method="face-diffuser", num_inference_steps=1, guidance_scale=5.0, fusion_start=0, fusion_end=0, scheduler="",
            height=64, width=64,
        )  # fmt: skip
        plan = Plan(tuple(subjects), tuple(read_prompts(str(prompts))), 1, 0, settings, PEOPLE)
        rows = [row for table in plan.tables(10_000) for row in table.to_pylist()]
        sizes = {count: [row for row in rows if len(row["subject_ids"]) == count] for count in (1, 2)}
        pairs = images // PAIRS_OF
        self.rows = _evenly(sizes[1], images - pairs) + _evenly(sizes[2], pairs)
        self.conditions = ConditionCache(self.pipe, store, "", with_subjects=True, references=self.references)
        self.conditions.open(self.rows)
        self.shares: dict[int, dict[str, float]] = {}

    def make(self, way: Way, batch: int = 40) -> dict[str, Any]:
        """Return what a way's images score, by row, with its masks, its cost and its seconds an image."""
        set_scheduler(self.pipe, SCHEDULER_CLASSES[way.scheduler])
        start, end = way.window
        made: dict[str, Any] = {"ip": [], "pc": [], "faces": [], "cells": []}
        seconds = 0.0
        for first in range(0, len(self.rows), batch):
            rows = self.rows[first : first + batch]
            text, fused, null = self.conditions.embeddings(rows)
            began = time.perf_counter()
            out = self.pipe(
                prompt_embeds=text, subject_prompt_embeds=fused, negative_prompt_embeds=null,
                num_inference_steps=way.steps, fusion_start=start, fusion_end=end, means=way.means,
                generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
            )  # fmt: skip
            seconds += time.perf_counter() - began
            scores = self.scorers.score(
                out.images, [self.conditions.identities(row["subject_ids"]) for row in rows],
                [without_markers(row["prompt"]) for row in rows],
            )  # fmt: skip
            made["ip"] += [score.ip for score in scores]
            made["pc"] += [score.pc for score in scores]
            made["faces"] += [
                float(score.face_count == len(row["subject_ids"])) for score, row in zip(scores, rows, strict=True)
            ]
            if out.subject_cells is not None:
                made["cells"] += (out.subject_cells > 0.5).flatten(1).int().tolist()
        stages = plan_stages("face-diffuser", self.pipe.num_timesteps, way.steps, start, end)
        cost = row_equivalents(plan_steps(stages, way.means), self.part_shares(way.means.deep_layers))
        return {**made, "cost": cost, "seconds": seconds / len(self.rows)}

    def part_shares(self, layers: int) -> dict[str, float]:
        """Return the share of operations of each part of the UNet."""
        if layers not in self.shares:
            self.shares[layers] = part_shares(self.pipe.unet, layers)
        return self.shares[layers]


def pairs_table(fast: str, exact: str) -> Markdown:
    """Return a Markdown table of paired differences of two datasets' rows, by number of subjects."""
    columns = ["sample_id", "prompt_id", "subject_ids", "ip", "pc", "face_count", "status", "image"]
    made = {}
    for name, url in (("fast", fast), ("exact", exact)):
        rows = open_dataset(url).to_table(columns).to_pylist()
        made[name] = {row["sample_id"]: row for row in rows if row["status"] == "ok"}
    shared = sorted(made["fast"].keys() & made["exact"].keys())
    if not shared:
        raise InputError(f"{fast}, {exact}: no row that both have")
    ssim = {
        one: similarity(*(np.asarray(stored_picture(made[mode][one]["image"]["bytes"])) for mode in ("fast", "exact")))
        for one in shared
    }
    counts = sorted({len(made["fast"][one]["subject_ids"]) for one in shared})
    groups = {
        f"{count} in an image": [one for one in shared if len(made["fast"][one]["subject_ids"]) == count]
        for count in counts
    }
    lines = []
    for group, names in {**groups, "all": shared}.items():
        rows = [made["fast"][one] for one in names]
        levels = [coded([tuple(row["subject_ids"]) for row in rows]), coded([row["prompt_id"] for row in rows])]
        for metric in METRICS:
            values = {
                mode: np.array(
                    [
                        float(found[one]["face_count"] == len(found[one]["subject_ids"]))
                        if metric == "faces"
                        else found[one][metric]
                        for one in names
                    ]
                )
                for mode, found in made.items()
            }
            change = mean_interval(values["fast"] - values["exact"], levels)
            base = float(values["exact"].mean())
            lines.append([
                group, len(names), metric, f"{base:.4f}", f"{values['fast'].mean():.4f}", _signed(change),
                f"{100 * change.mean / base:+.2f}% ({100 * change.low / base:+.2f} to {100 * change.high / base:+.2f})",
                f"{np.mean([ssim[one] for one in names]):.3f}",
            ])  # fmt: skip
    head = ["people", "pairs", "score", "exact", "fast", "fast − exact", "of exact", "SSIM"]
    return markdown_table(head, lines, right=(1, *range(3, len(head))))


LEAST_SECONDS = 5
WARM_UP_STEPS = 8
"""In which every function and every number of rows of a way at full size is met."""

FULL_SIZE = (
    Way("exact", 50, "pndm"),
    Way("fast", FAST_STEPS, FAST_SCHEDULER, FAST_MEANS),
    Way(f"{FAST_STEPS} steps", FAST_STEPS, FAST_SCHEDULER),
    Way("no guidance in the SDM's steps", 50, "pndm", Means(unguided_subject=1.0)),
    Way("guidance kept, every 2nd", 50, "pndm", Means(guidance_every=2)),
    Way("deep features, every 2nd", 50, "pndm", Means(deep_every=2)),
    Way("encoder, every 2nd", 50, "pndm", Means(encoder_every=2)),
    Way("encoder, every 2nd, merged", 50, "pndm", Means(encoder_every=2, merged=True)),
)


def full_size(
    images: int,
    left: Callable[[], float],
    eager: bool,
    bench: EngineBench,
    exact: FaceDiffuserPipeline | None = None,
    known: Mapping[str, float] | None = None,
) -> None:
    """Print what each means brings at full size, a line per way, and the released way to compare with.

    Args:
        images: made at once.
        left: says how many seconds are left; ways for which they do not suffice are left out.
        eager: without the compiled engine.
        bench: the models.
        exact: a pipeline of them that runs exact mode, where there is one already.
        known: seconds an image of exact mode and the released way, where they are known already.
    """
    models = bench.pipe
    conditions = bench.inputs(images)
    say(bench.header().splitlines()[0])
    say(f"{'way':<36}{'UNet rows':>10}{'first s':>9}{'s/image':>9}{'images/s':>10}{'of exact':>10}{'of released':>12}")
    spent = dict(known or {})
    for name, seconds in spent.items():
        say(f"{name:<36}{'':>19}{seconds:>9.3f}{1 / seconds:>10.2f}")
    for way in (Way(RELEASED, EXACT.steps, EXACT.scheduler), *FULL_SIZE):
        if way.name in spent:
            continue
        if left() <= LEAST_SECONDS:
            say(f"{way.name:<36} left out: the time is over")
            continue
        if way.name == RELEASED:
            pipe = bench.build(EngineWay(RELEASED, EAGER, images))
        else:
            exact = exact or bench.build(EngineWay(way.name, EAGER if eager else COMPILED, images))
            pipe = exact
        set_scheduler(pipe, SCHEDULER_CLASSES[way.scheduler])
        sample = _sampler(pipe, conditions, way)
        first = bench.seconds(lambda run=sample: run(True))  # compiles what is new
        with quiet(), GpuLoad() as load:
            spent[way.name] = bench.seconds(lambda run=sample: run(False)) / images
        start, stop = way.window
        stages = plan_stages("face-diffuser", pipe.num_timesteps, way.steps, start, stop)
        shares = part_shares(models.unet, way.means.deep_layers) if way.means.keeps_features else {"whole": 1.0}
        cost = row_equivalents(plan_steps(stages, way.means), shares)
        times = [f"{spent[name] / spent[way.name]:.2f}x" if name in spent else "" for name in (EXACT.name, RELEASED)]
        say(f"{way.name[:35]:<36}{cost:>10.1f}{first:>9.1f}{spent[way.name]:>9.3f}{1 / spent[way.name]:>10.2f}"
            f"{times[0]:>10}{times[1]:>12}")  # fmt: skip
        if way.name in (EXACT.name, "fast"):
            say(f"  {load.line()}")


def compile_function(name: str, images: int, bench: EngineBench) -> None:
    """Compile a function that some of `full_size`'s ways evaluate, so that its code is kept for another process.

    Args:
        name: `condition` (the whole UNet for the condition alone), `deep` or `encoder`.
        images: made at once.
        bench: the models.
    """
    pipe = bench.build(EngineWay(name, replace(COMPILED, compiled_decoder=False), images))
    engine, (null, text, _, noise) = pipe._engine, bench.inputs(images)
    t, rows, embeds = torch.tensor(500, device=bench.device), torch.cat([noise, noise]), torch.cat([null, text])
    if name == "condition":
        engine.denoise("unet_text", noise, t, text)
        return
    with torch.no_grad():
        encoded = engine.evaluate("unet_text", encode, rows, t, embeds)
        layers = int(name == "deep")
        _, deep = engine.evaluate("unet_text", decode, encoded, t, embeds, layers)
        if layers:
            engine.evaluate("unet_text", last_layers, rows, t, embeds, deep, layers)


def _sampler(pipe: FaceDiffuserPipeline, conditions: tuple[torch.Tensor, ...], way: Way) -> Callable[[bool], Any]:
    """Return what makes images in a way: all its steps or, where asked, a few in which every function and shape is met."""
    null, text, fused, noise = conditions

    def sample(few: bool) -> None:
        steps = min(way.steps, WARM_UP_STEPS) if few else way.steps
        start, stop = way.window if steps == way.steps else default_fusion_window(steps)
        pipe(
            prompt_embeds=text, subject_prompt_embeds=fused, negative_prompt_embeds=null, latents=noise,
            num_inference_steps=steps, fusion_start=start, fusion_end=stop, means=way.means,
        )  # fmt: skip

    return sample


def _evenly(rows: Sequence[dict], count: int) -> list[dict]:
    return [rows[number * len(rows) // count] for number in range(count)]


def compare(made: dict[str, Any], exact: dict[str, Any], rows: Sequence[dict]) -> dict[str, Interval]:
    """Return the paired differences to exact mode, and the share of cells that another model decides."""
    levels = [coded([tuple(row["subject_ids"]) for row in rows]), coded([row["prompt_id"] for row in rows])]
    found = {metric: mean_interval(np.array(made[metric]) - np.array(exact[metric]), levels) for metric in METRICS}
    if made["cells"]:
        flips = (np.array(made["cells"]) != np.array(exact["cells"])).mean(axis=1)
        found["flips"] = mean_interval(flips, levels)
    return found


def table(results: dict[str, dict[str, Any]], rows: Sequence[dict]) -> Markdown:
    """Return the Markdown table: a line per way."""
    exact = results[EXACT.name]
    lines = []
    for number, (name, made) in enumerate(results.items()):
        found = compare(made, exact, rows)
        flips = f"{100 * found['flips'].mean:.1f}%" if "flips" in found else "–"
        lines.append([
            number or "–", name, f"{made['cost']:.1f}", f"{exact['cost'] / made['cost']:.1f}",
            *(f"{np.mean(made[one]):.3f}" for one in METRICS),
            *(_signed(found[one]) if name != EXACT.name else "–" for one in METRICS), flips, f"{made['seconds']:.3f}",
        ])  # fmt: skip
    head = ["no.", "way", "UNet rows", "fewer", "IP", "PC", "right faces", "IP − exact", "PC − exact", "faces − exact",
            "mask cells", "s/image"]  # fmt: skip
    return markdown_table(head, lines, right=(0, *range(2, len(head))))


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def picture(results: dict[str, dict[str, Any]]) -> bytes:
    """Return a PNG of IP, PC, right faces and mask flips against cost; exact mode is the dashed line."""
    exact = results[EXACT.name]
    figure = Figure(figsize=(13, 9), layout="constrained")
    kinds = {
        "steps alone, dpm": ("o", "#0072B2"), "steps alone, unipc": ("s", "#56B4E9"), "guidance": ("^", "#E69F00"),
        "deep features": ("D", "#009E73"), "encoder": ("v", "#CC79A7"), "fused steps too": ("X", "#D55E00"),
    }  # fmt: skip
    titles = {"ip": "IP", "pc": "PC", "faces": "right faces", "flips": "mask cells that differ from exact"}
    for axis, (metric, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        for number, (name, made) in enumerate((pair for pair in results.items() if pair[0] != EXACT.name), 1):
            marker, colour = kinds[_kind(name)]
            if metric == "flips":
                value = float((np.array(made["cells"]) != np.array(exact["cells"])).mean())
            else:
                value = float(np.mean(made[metric]))
            axis.plot(made["cost"], value, marker, color=colour, markersize=7)
            axis.annotate(str(number), (made["cost"], value), xytext=(4, 4), textcoords="offset points", fontsize=7)
        if metric != "flips":
            level = float(np.mean(exact[metric]))
            axis.axhline(level, color="#333333", linestyle="--", linewidth=1)
            axis.annotate(f"exact, {exact['cost']:.0f} rows", (1, level), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", fontsize=9)  # fmt: skip
        axis.axvline(exact["cost"] / 8, color="#999999", linestyle=":", linewidth=1)
        axis.set_xlabel("UNet rows per image (dotted: an eighth of exact)")
        axis.set_ylabel(title)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.legend(
        handles=[figure.axes[0].plot([], [], marker, color=colour, label=name)[0] for name, (marker, colour) in kinds.items()],
        loc="outside upper center", ncols=6, frameon=False, fontsize=9,
    )  # fmt: skip
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _kind(name: str) -> str:
    for kind in ("fused too", "deep features", "encoder", "guidance"):
        if kind in name:
            return "fused steps too" if kind == "fused too" else kind
    return "steps alone, unipc" if "unipc" in name else "steps alone, dpm"


def main(argv: list[str] | None = None) -> None:
    """Make what is missing, then write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out/fast")
    parser.add_argument("--images", type=int, help="images of each way (default: 40; at full size 32, made at once)")
    parser.add_argument("--only", nargs="*", help="names of ways; exact is always among them (default: all)")
    parser.add_argument("--full-size", action="store_true", help="speed at full size instead, with random weights")
    parser.add_argument("--seconds", type=float, default=600, help="full size: time for all of it")
    parser.add_argument("--eager", action="store_true", help="full size: without the compiled engine")
    parser.add_argument("--small", action="store_true", help="full size: small models instead, to try it")
    parser.add_argument("--pairs", nargs=2, metavar=("FAST", "EXACT"), help="compare two datasets instead")
    options = parser.parse_args(argv)
    if options.pairs:
        sys.stdout.write(pairs_table(*options.pairs))
        return
    if options.full_size or options.small:
        end = time.monotonic() + options.seconds
        device = "cuda" if torch.cuda.is_available() else "cpu"
        models = small_random_pipeline() if options.small else full_size_pipeline(device)
        models.set_progress_bar_config(disable=True)
        bench = EngineBench(models, EXACT.steps)
        full_size(options.images or 32, lambda: end - time.monotonic(), options.eager, bench)
        return
    options.images = options.images or 40
    folder = Path(options.output)
    (folder / "ways").mkdir(parents=True, exist_ok=True)
    sweep = Bench(folder, options.images)
    results: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        if options.only and way is not EXACT and way.name not in options.only:
            continue
        file = folder / "ways" / f"{way.name.replace(', ', '_').replace(' ', '-').replace(chr(39), '')}.json"
        if not file.exists() or len(json.loads(file.read_text())["ip"]) != options.images:
            file.write_text(json.dumps(sweep.make(way)) + "\n")
        results[way.name] = json.loads(file.read_text())
        sys.stderr.write(
            f"{way.name}: {results[way.name]['cost']:.1f} rows, IP {np.mean(results[way.name]['ip']):.3f}\n"
        )
    text = table(results, bench.rows)
    (folder / "table.md").write_text(text)
    (folder / "quality.png").write_bytes(picture(results))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
