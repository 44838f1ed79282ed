"""The card as one self-contained HTML page: every picture is inside it, nothing is loaded from elsewhere."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from facediffuser.cards.card_facts import (
    FACE_PICTURES,
    FLAG_TITLES,
    RIGHTS,
    Card,
    shared_values,
)
from facediffuser.cards.rendering import render
from facediffuser.cards.survey import FLAGS, LocatedRow
from facediffuser.dataset.column_meanings import column_lines
from facediffuser.evaluation.tables import METRICS, OVERALL, ScoreRow, metrics_of, title
from facediffuser.picture_grid import fit
from facediffuser.pictures import stored_picture
from facediffuser.prompts import without_markers

THUMBNAIL, REFERENCE = 240, 104


def card_page(
    card: Card, pictures: Mapping[str, bytes], facts: Sequence[tuple[str, str]], settings: Sequence[tuple[str, str]]
) -> str:
    """Return the HTML of a dataset's card with every picture inside it.

    Args:
        card: what the card shows.
        pictures: the PNG files of contact sheet, histograms and IP-PC plane, by their keys in the dataset.
        facts: (name, value) lines of the dataset.
        settings: (name, value) lines of the run that made it.
    """
    styles = {name: f"ref{number}" for number, name in enumerate(sorted(card.references))}
    return render(
        "card_page.html.j2",
        **shared_values(card),
        references=[
            {"style": style, "picture": _small(card.references[name], REFERENCE)} for name, style in styles.items()
        ],
        sheet=_data_url(pictures["card/contact_sheet.png"], "png"),
        histograms=_data_url(pictures["card/score_histograms.png"], "png"),
        plane=_data_url(pictures["card/ip_pc_plane.png"], "png"),
        faces=[
            {"title": words, "picture": _data_url(pictures[key], "png")}
            for key, words in FACE_PICTURES
            if key in pictures
        ],
        columns=column_lines(card.survey.schema) if card.survey.schema is not None else [],
        facts=facts,
        scores=_score_table(card.table),
        best=_tiles(card.survey.best, card, styles),
        worst=_tiles(card.survey.worst, card, styles),
        flagged_images=[
            {"title": FLAG_TITLES[name], "tiles": _tiles(flagged.shown, card, styles, *FLAGS[name])}
            for name, flagged in card.survey.flags.items()
            if flagged.shown
        ],
        settings=settings,
        rights=RIGHTS,
    )


def _score_table(rows: Sequence[ScoreRow]) -> dict[str, Any]:
    lines: dict[tuple[str, int, str], dict[str, ScoreRow]] = {}
    for row in rows:
        lines.setdefault((row.method, row.subjects, row.category), {})[row.metric] = row
    metrics = metrics_of(rows)
    return {
        "metrics": [title(metric) for metric in metrics],
        "rows": [
            {
                "method": method,
                "subjects": subjects,
                "category": category,
                "overall": category == OVERALL,
                "images": max(row.n for row in found.values()),
                "scores": [_score(found.get(metric)) for metric in metrics],
            }
            for (method, subjects, category), found in lines.items()
        ],
    }


def _score(row: ScoreRow | None) -> dict[str, Any] | None:
    if row is None or row.n == 0:
        return None
    return {
        "kind": row.metric if row.metric in METRICS else "other",
        "width": f"{100 * max(0.0, min(1.0, row.mean)):.0f}",
        "mean": f"{row.mean:.3f}",
        "interval": f"({row.low:.3f} to {row.high:.3f})" if row.n > 1 else "",
    }


def _tiles(
    rows: Sequence[LocatedRow],
    card: Card,
    styles: Mapping[str, str],
    similarity: str | None = None,
    similar_to: str | None = None,
) -> list[dict[str, Any]]:
    """Images with what stands below them; `similarity` and `similar_to` name the columns of a check for copies."""
    return [
        {
            "prompt": without_markers(located.values["prompt"]),
            "picture": _small(stored_picture(card.images[located.values["sample_id"]]), THUMBNAIL),
            "styles": [styles[name] for name in located.subject_ids if name in styles],
            "subjects": ", ".join(located.subject_ids),
            "ip": located.values["ip"],
            "pc": located.values["pc"],
            "similarity": located.values[similarity] if similarity else None,
            "similar_to": located.values[similar_to] if similar_to else None,
        }
        for located in rows
    ]


def _small(picture: Image.Image, side: int) -> str:
    """The picture as the data URL of a JPEG whose longer side is `side` px."""
    buffer = io.BytesIO()
    fit(picture, side, side).save(buffer, "jpeg", quality=88)
    return _data_url(buffer.getvalue(), "jpeg")


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
