"""What a dataset's card says: counts, settings, scores that were added, copies that were found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from facediffuser.cards.survey import Survey
from facediffuser.dataset.spending import Spent
from facediffuser.evaluation.tables import OVERALL, ScoreRow, title, value_with_interval
from facediffuser.number_words import counted

FLAG_TITLES = {
    "training_copy": "faces like one of the training set",
    "pasted_reference": "faces with a reference's pixels",
    "duplicate": "images like another of the dataset",
}
IDENTITY, POSE, NAMED = "card/identity.png", "card/pose_and_size.png", "card/named_faces.png"
FACE_PICTURES = (
    (IDENTITY, "Whose face it is: to references, between images, margin"),
    (POSE, "How the heads are turned and how large the faces are"),
    (NAMED, "Images with their faces named: highest and lowest ip_margin"),
)
RIGHTS = (
    "Every image in `data/` is synthetic: it was made by diffusion models and shows no event that took place. It may "
    "show the likeness of the people in the reference pictures (`subjects.parquet`), whose consent and whose pictures' "
    "licences are for the publisher of this dataset to secure; the licences of the models used apply as well. Scores "
    "are recorded, not filtered on: choose your own thresholds."
)


@dataclass(frozen=True)
class Card:
    """What the card shows, in the forms that both the README and the page use."""

    name: str
    survey: Survey
    run: dict[str, Any]
    images: dict[str, bytes]
    spent: Spent | None
    references: dict[str, Image.Image]
    certificates: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many rows the dataset has."""
        return self.survey.rows

    @property
    def table(self) -> list[ScoreRow]:
        """The means of IP, PC and the share of right faces."""
        return [row for row in self.survey.table if row.metric not in self.survey.added]

    @property
    def added(self) -> list[ScoreRow]:
        """The means of columns that other scorers added."""
        return [row for row in self.survey.table if row.metric in self.survey.added]

    @property
    def failed(self) -> int:
        """How many rows failed."""
        return sum(self.survey.failures.values())

    @property
    def subjects(self) -> int:
        """How many subjects there are."""
        return self.survey.subjects


def shared_values(card: Card) -> dict[str, Any]:
    """Return what the templates of README and page have in common, by name."""
    survey = card.survey
    return {
        "card": card,
        "sheet_note": sheet_line(card),
        "added": added_lines(card),
        "certificates": certificate_tables(card),
        "flags": flag_lines(survey),
        "face_facts": face_lines(survey),
        "thresholds": [(words, _percent(share)) for words, share in survey.faces.kept] if survey.faces else [],
        "failures": survey.failures.most_common(10),
    }


def summary(card: Card) -> list[tuple[str, str]]:
    """Return the card's facts as (name, value) lines: counts, sizes, sampling settings."""
    survey, settings = card.survey, card.survey.settings
    methods = sorted({row.method for row in card.table})
    size = f"{survey.bytes / 1e9:.1f} GB" if survey.bytes >= 1e9 else f"{survey.bytes / 1e6:.1f} MB"
    sizes = [f"{width} × {height}" for width in settings.get("width", []) for height in settings.get("height", [])]
    facts = [
        ("images", f"{card.rows - card.failed:,}"),
        ("failed rows", f"{card.failed:,}"),
        ("subjects", f"{card.subjects:,}"),
        ("prompts", f"{survey.prompts:,}"),
        ("method", ", ".join(methods) or "–"),
        ("image size, px", ", ".join(sizes[:4]) or "–"),
        ("files (shards)", f"{survey.files:,} ({size})"),
        ("rows of a shard", _range(survey.shard_rows)),
    ]
    for name, label in (
        ("num_inference_steps", "denoising steps"),
        ("guidance_scale", "guidance scale"),
        ("fusion_start", "fusion starts at step"),
        ("fusion_end", "fusion ends before step"),
        ("scheduler", "scheduler"),
    ):
        if settings.get(name):
            facts.append((label, ", ".join(_word(value) for value in settings[name])))
    return facts + spent_lines(card.spent)


def sheet_line(card: Card) -> str:
    """Return in one line how many images the contact sheet shows and which rows it leaves out."""
    shown = sum(map(len, card.survey.sheet))
    further = card.rows - card.failed - shown
    kinds = ((further, "further image"), (card.failed, "failed row"))
    left_out = ", ".join(counted(count, noun) for count, noun in kinds if count)
    return f"shown: {counted(shown, 'image')}; not shown: {left_out}" if left_out else "every image is shown"


def spent_lines(spent: Spent | None) -> list[tuple[str, str]]:
    """Return what a dataset took as (name, value) lines; none where it is not known."""
    if spent is None:
        return []
    worker = {"gpu": "GPU", "cpu": "CPU worker"}.get(spent.workers, "worker")
    lines = [
        (f"{worker} hours", f"{spent.worker_hours:,.3g}"),
        (f"images per {worker} hour", f"{spent.images_per_hour:,.0f}"),
    ]
    if spent.energy_kwh is not None:
        lines.append(("energy of the GPUs, kWh", f"{spent.energy_kwh:,.3g}"))
    if spent.cost is not None:
        price = "" if spent.hour_price is None else f" at {spent.hour_price:g} an hour"
        lines.append(("cost", f"{spent.cost:,.2f}{price}"))
    return lines


def added_lines(card: Card) -> list[tuple[str, str]]:
    """Return the means of what other scorers added as (name, value) lines."""
    return [
        (f"{title(row.metric)} ({row.method}, {_people(row.subjects)})", value_with_interval(row))
        for row in card.added
        if row.category == OVERALL
    ]


def certificate_tables(card: Card) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (the shards it is of, lines) of each certificate; none for a dataset in exact mode.

    The shards are "" where the dataset was made at once.
    """
    several = len(card.certificates) > 1 or any(card.certificates)
    return [
        (f"data/shard-{f'{name}-' if name else '0'}*" if several else "", certificate_lines(found))
        for name, found in sorted(card.certificates.items())
    ]


def certificate_lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the certificate of a run in fast mode says as (name, value) lines."""
    allowed = f"at most {found['max_loss']:g} of IP and PC may be lost"
    verdicts = {
        "passed": f"passed: {allowed}, and the intervals show that no more is",
        "failed": f"failed: {allowed}, and an interval shows that more is",
        "undecided": f"undecided: {allowed}; the intervals are too wide to show it",
    }
    lines = [("verdict", verdicts.get(found["verdict"], found["verdict"]))]
    lines.append(("pairs", f"{found['pairs']:,} of {counted(found['sample'], 'row')} chosen by hash"))
    for name, change in found["differences"].items():
        if change["n"]:
            fast, exact = (found["means"][mode][name] for mode in ("fast", "exact"))
            lines.append((
                f"{title(name)}, fast − exact",
                f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f}); {fast:.3f} and {exact:.3f}",
            ))  # fmt: skip
    if found["mask_cells"] is not None:
        lines.append(("latent cells that another model decided", f"{100 * found['mask_cells']:.1f}%"))
    if found["ssim"] is not None:
        lines.append(("SSIM of the two images", f"{found['ssim']:.3f}"))
    for name, label in (("images_per_second", "images a second of a worker"), ("unet_rows", "UNet rows an image")):
        both = found.get(name) or {}
        if both.get("fast") and both.get("exact"):
            ratio = max(both["fast"], both["exact"]) / min(both["fast"], both["exact"])
            lines.append((label, f"{both['fast']:.4g} fast, {both['exact']:.4g} exact ({ratio:.1f} times)"))
    return lines


def face_lines(survey: Survey) -> list[tuple[str, str]]:
    """Return what is known of the faces as (name, value) lines; none for a dataset without the column `faces`."""
    facts = survey.faces
    if facts is None:
        return []
    lines = [
        ("faces", f"{facts.faces:,} in {counted(facts.images, 'image')}"),
        ("faces of nobody who was asked for", f"{facts.unasked:,}"),
        ("subjects without a face", f"{facts.missing:,}"),
        ("images whose ip_margin is below 0", f"{facts.wrong:,} ({_percent(facts.wrong / facts.images)})"),
    ]
    if facts.pairs is not None:
        pairs = facts.pairs
        lines += [
            (
                "equal error rate",
                f"{_percent(pairs.rate)} at cosine {pairs.threshold:.2f} ({counted(len(pairs.within), 'pair')} of images of one "
                f"subject, {len(pairs.between):,} of different ones)",
            ),
            ("median cosine, same subject", f"{np.median(pairs.within):.3f}"),
            ("median cosine, different subjects", f"{np.median(pairs.between):.3f}"),
        ]
    return lines


def flag_lines(survey: Survey) -> list[tuple[str, str]]:
    """Return what was found of copies as (check, result) lines."""
    return [
        (FLAG_TITLES[name], f"{flagged.count:,} of {counted(flagged.checked, 'image')} flagged")
        for name, flagged in survey.flags.items()
    ]


def run_lines(run: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return what the plan's metadata says of the run as (dotted name, value) lines.

    Args:
        run: a document, or a part of one.
        prefix: the dotted name of that part, with a dot at its end.
    """
    lines = []
    for name, value in run.items():
        if isinstance(value, dict):
            lines += run_lines(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            lines.append((f"{prefix}{name}", ", ".join(map(_word, value)) if isinstance(value, list) else _word(value)))
    return lines


def _people(count: int) -> str:
    return "one subject" if count == 1 else counted(count, "subject")


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts, default=0), max(counts, default=0)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
