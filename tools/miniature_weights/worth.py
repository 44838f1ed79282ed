"""What a generated dataset is worth: a recogniser trained on its faces, tested on renderings of people nobody was trained on.

    python -m tools.miniature_weights.worth out/worth [--people 40] [--prompts 20] [--steps 12] [--models miniature]

Makes a dataset of each method with `facediffuser generate` (the same people, prompts and seed), exports the aligned faces of so many
prompts with `facediffuser export --to faces`, of face-diffuser also of the images above thresholds of IP, and trains the same small
recogniser on each export, the same number of steps. Tested is who is who on aligned faces of renderings of other people: AUC, and true
accepts at 1% false accepts. Beside them stand as many renderings of the same people (the ceiling) and the TDM's images, which never saw
the person (the floor). Writes worth.csv and worth.png; datasets, exports and each training's result are kept in FOLDER.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from facediffuser.curation.curation_settings import ExportSettings
from facediffuser.curation.export import export_stage
from facediffuser.curation.selection import TRAIN
from facediffuser.faces import aligned_crop
from facediffuser.flows.cli import main as facediffuser
from facediffuser.miniature.looks import sample_outfit, sample_setting
from facediffuser.miniature.prompts import PROMPTS
from facediffuser.miniature.render import person, render, write_subjects
from facediffuser.pictures import stored_picture
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.scoring.miniature_embedder import SIDE, IdentityEmbedder
from facediffuser.tasks.local_driver import LocalDriver
from tools.miniature_weights.command_line import command_parser, write_csv
from tools.miniature_weights.fitting import fit
from tools.miniature_weights.measure import area_under_curve
from tools.miniature_weights.scored import METHODS, require_same
from tools.miniature_weights.train_scorers import MarginSoftmax, degrade

FIRST_PERSON, FIRST_TESTED = 89_000_000, 89_500_000
"""People of the datasets, and of the test: nobody of any other training or table."""

CEILING = "renderings"
THRESHOLDS = (0.5, 0.7, 0.8)
"""IP of the images of face-diffuser that are kept, each filter by itself."""
FALSE_ACCEPTS = 0.01
TAKES = 5


@dataclass(frozen=True)
class Worth:
    """A recogniser's result: trained on `faces` of `images` images, of which the filter left `kept`."""

    source: str
    filter: str
    images: int
    kept: int
    faces: int
    auc: float
    true_accepts: float


@dataclass(frozen=True)
class Faces:
    """Aligned faces (n, 3, 64, 64) in -1..1, and whose they are (n,), people counted from 0."""

    pixels: torch.Tensor
    who: torch.Tensor

    @property
    def people(self) -> int:
        """How many people there are."""
        return len(self.who.unique())


# --- faces ------------------------------------------------------------------------------------------------------------


def make_datasets(
    folder: Path, people: int, prompts: int, steps: int, models: str, options: Sequence[str] = ()
) -> None:
    """Make the subjects, the prompts and a dataset of each method, each as far as it is missing."""
    require_same(folder, {"people": people, "models": models, "steps": steps})
    subjects, file = folder / "subjects", folder / "prompts.jsonl"
    if not (subjects / "subjects.csv").exists():
        write_subjects(subjects, FIRST_PERSON, count=people)
    # Every category comes early: a smaller dataset is the first prompts of it.
    order = sorted(range(len(PROMPTS)), key=lambda place: (_place_in_category(place), place))
    rows = [dict(PROMPTS[place]) for place in order[:prompts]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start, end = round(steps * 3 / 12), round(steps * 11 / 12)
    for method in METHODS:
        words = f"generate --scorers miniature --method {method} --steps {steps} --workers 1 --scheduler dpm".split()
        words += ["--fusion-start", str(start), "--fusion-end", str(end), "--models", models]
        words += ["--subjects", str(subjects), "--prompts", str(file), "--output", str(folder / method)]
        if code := facediffuser([*words, *options]):
            raise SystemExit(code)


def _place_in_category(place: int) -> int:
    return sum(row["category"] == PROMPTS[place]["category"] for row in PROMPTS[:place])


def exported_faces(
    dataset: Path, output: Path, prompts: Sequence[str], threshold: float | None = None
) -> tuple[Faces, int]:
    """Export the aligned faces of a dataset's images of these prompts, above an IP; return them and how many images are kept."""
    among = ", ".join(f"'{name}'" for name in prompts)
    where = f"prompt_id in ({among})" + ("" if threshold is None else f" and ip > {threshold}")
    settings = ExportSettings(url=str(dataset), to="faces", output=str(output), where=where)
    manifest = LocalDriver().run(export_stage(settings))
    files = sorted((output / TRAIN).glob("*/*.png"))
    names = sorted({path.parent.name for path in files})
    crops = [stored_picture(path.read_bytes(), path.name) for path in files]
    return _faces(crops, [names.index(path.parent.name) for path in files]), manifest["counts"]["rows"]


def rendered_faces(first: int, people: int, takes: int) -> Faces:
    """Return the aligned faces that the detector finds on photographs of people, so many of each in other clothes and places."""
    detector, crops, who = FaceDetector(), [], []
    for number in range(people):
        pictures = []
        for take in range(takes):
            rng = np.random.default_rng((first + number, take, 43))
            drawn = render(
                [person(first + number)],
                int(rng.integers(2**31)),
                setting=sample_setting(rng, photo_share=1.0),
                outfits=[sample_outfit(rng)],
            )
            pictures.append(Image.fromarray(drawn.image))
        for picture, found in zip(pictures, detector.detect(pictures), strict=True):
            if len(found) == 1:
                crops.append(aligned_crop(picture, found[0].landmarks))
                who.append(number)
    return _faces(crops, who)


def _faces(crops: Sequence[Image.Image], who: Sequence[int]) -> Faces:
    arrays = [np.asarray(crop.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for crop in crops]
    if not arrays:
        return Faces(torch.zeros(0, 3, SIDE, SIDE), torch.zeros(0, dtype=torch.long))
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Faces(pixels, torch.tensor(who))


# --- the recogniser ---------------------------------------------------------------------------------------------------


def train_recogniser(faces: Faces, steps: int, batch: int = 64, seed: int = 0) -> IdentityEmbedder:
    """Train a small recogniser on faces with a margin softmax; mirrored, blurred and dimmed a little each time."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = IdentityEmbedder().train()
    _, who = faces.who.unique(return_inverse=True)
    head = MarginSoftmax(model.config["dim"], faces.people)

    def loss(step: int) -> torch.Tensor:
        index = torch.randint(len(who), (batch,), generator=generator)
        mirrored = torch.rand(batch, generator=generator) < 0.5
        pixels = faces.pixels[index]
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return head(model(degrade(pixels, generator)), who[index])

    fit("recogniser", loss, nn.ModuleList([model, head]).parameters(), steps, 2e-3, 1e-3)
    return model.eval()


@torch.no_grad()
def tested(model: nn.Module, test: Faces) -> tuple[float, float]:
    """Return AUC, and the share of pairs of one person that are accepted where 1% of pairs of different people are."""
    vectors = F.normalize(torch.cat([model(some) for some in test.pixels.split(128)]), dim=-1)
    rows, columns = np.triu_indices(len(test.who), 1)
    cosine, same = (vectors @ vectors.T)[rows, columns], (test.who[:, None] == test.who[None])[rows, columns]
    cut = torch.quantile(cosine[~same].double(), 1 - FALSE_ACCEPTS)
    return area_under_curve(vectors, test.who), float((cosine[same].double() > cut).double().mean())


# --- the table --------------------------------------------------------------------------------------------------------


def measure(folder: Path, people: int, prompts: int, train_steps: int, tested_people: int) -> list[Worth]:
    """Train and test on every source, size and filter, as far as `make_datasets` made it; return the results."""
    names = [json.loads(line)["prompt_id"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    test = rendered_faces(FIRST_TESTED, tested_people, TAKES)
    sizes = sorted({max(1, prompts // 4), max(1, prompts // 2), prompts})
    plan: list[tuple[str, int, float | None]] = [(name, size, None) for name in (*METHODS, CEILING) for size in sizes]
    plan += [("face-diffuser", prompts, threshold) for threshold in THRESHOLDS]
    found = []
    for source, size, threshold in plan:
        filtered = "all" if threshold is None else f"ip > {threshold}"
        kept = folder / "results" / f"{source}-{size}-{filtered.replace(' > ', '-')}-{train_steps}-{tested_people}.json"
        if not kept.exists():
            if source == CEILING:
                faces, images = rendered_faces(FIRST_PERSON, people, size), people * size
            else:
                exports = folder / "exports" / f"{source}-{size}-{filtered.replace(' > ', '-')}"
                faces, images = exported_faces(folder / source, exports, names[:size], threshold)
            result = (float("nan"), float("nan"))
            if faces.people > 1:
                result = tested(train_recogniser(faces, train_steps), test)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(asdict(Worth(source, filtered, people * size, images, len(faces.who), *result))))
        found.append(Worth(**json.loads(kept.read_text())))
        print(json.dumps(asdict(found[-1])), flush=True)
    return found


def plot(found: Sequence[Worth]):
    """Draw AUC and true accepts over the images that were used: a line a source, crosses for the filters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (name, shown) in zip(
        figure.subplots(1, 2),
        (("auc", "AUC on unseen people"), ("true_accepts", "true accepts at 1% false accepts")),
        strict=True,
    ):
        for source in dict.fromkeys(one.source for one in found):
            line = [one for one in found if one.source == source and one.filter == "all"]
            style = "--" if source in (CEILING, "tdm") else "-"
            label = {CEILING: "renderings (ceiling)", "tdm": "tdm (floor)"}.get(source, source)
            axes.plot([one.kept for one in line], [getattr(one, name) for one in line], style, marker="o", label=label)
        for one in found:
            if one.filter != "all":
                axes.plot([one.kept], [getattr(one, name)], "kx")
                axes.annotate(
                    one.filter, (one.kept, getattr(one, name)), fontsize=7, xytext=(4, -9), textcoords="offset points"
                )
        axes.set(xlabel="images used", ylabel=shown)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    """The command line."""
    parser = command_parser("worth", __doc__)
    parser.add_argument("folder", type=Path, help="where datasets, worth.csv and worth.png go")
    parser.add_argument("--models", default="miniature", help="model folder (default: the shipped one)")
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=20, help="images of each person, each of another prompt")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps")
    parser.add_argument("--train-steps", type=int, default=300, help="of the recogniser, 64 faces each")
    parser.add_argument("--tested", type=int, default=80, help="people of the test")
    parser.add_argument("generate", nargs="*", help="after --: further options of `facediffuser generate`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    make_datasets(args.folder, args.people, args.prompts, args.steps, args.models, args.generate)
    found = measure(args.folder, args.people, args.prompts, args.train_steps, args.tested)
    write_csv(args.folder / "worth.csv", [asdict(one) for one in found])
    plot(found).savefig(args.folder / "worth.png", dpi=110)


if __name__ == "__main__":
    main()
