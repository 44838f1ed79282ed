"""Images with their faces outlined and named: whom each was taken for, how like it is, and whom else it is like."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from facediffuser.cards.contact_sheet import GROUND, INK, PALE, font, wrap

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))
UNASKED = (110, 110, 110)
SIDE, LINE, TEXT = 380, 3, 15
GAP, COLUMNS = 22, 3


def draw_faces(image: Image.Image, faces: Sequence[Mapping[str, Any]], subject_ids: Sequence[str]) -> Image.Image:
    """Return an image with a box and a line of text for each face.

    Args:
        image: the picture, of any size.
        faces: as the column `faces` holds them.
        subject_ids: whom it should show; each has a colour of its own, by its place.

    Returns:
        RGB: the picture, its longer side of SIDE px, and below it a line per subject: name, similarity to it, and to the
        nearest other subject.
    """
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(subject_ids)}
    lines = [(colours[name], _line(name, faces)) for name in subject_ids]
    lines += [(UNASKED, "not asked for" + _like(face)) for face in faces if face["subject_id"] is None]
    drawn = Image.new("RGB", (SIDE, size[1] + 8 + (TEXT + 7) * len(lines)), GROUND)
    drawn.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), (0, 0))
    draw = ImageDraw.Draw(drawn)
    for face in faces:
        colour = colours.get(face["subject_id"], UNASKED)
        left, top, right, bottom = (value * scale for value in face["box"])
        box = (max(0.0, left), max(0.0, top), min(size[0] - 1.0, right), min(size[1] - 1.0, bottom))
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        draw.rectangle(box, outline=colour, width=LINE)
        for x, y in face["landmarks"]:
            draw.ellipse((x * scale - 2, y * scale - 2, x * scale + 2, y * scale + 2), fill=colour)
        label = wrap(face["subject_id"] or "?", font(TEXT, bold=True), size[0], 1)[0]
        _label(draw, label, box, colour, size)
    for number, (colour, text) in enumerate(lines):
        y = size[1] + 8 + number * (TEXT + 7)
        draw.rectangle((0, y + 3, 10, y + 13), fill=colour)
        draw.text((17, y), wrap(text, font(TEXT), SIDE - 17, 1)[0], INK, font(TEXT))
    return drawn


def named_faces_sheet(images: Sequence[tuple[Image.Image, Mapping[str, Any]]]) -> Image.Image:
    """Return images with their named faces side by side.

    Args:
        images: picture and row, with `faces`, `subject_ids` and `ip_margin`.
    """
    tiles = [draw_faces(image, row["faces"], row["subject_ids"]) for image, row in images]
    heads = ["ip_margin –" if row["ip_margin"] is None else f"ip_margin {row['ip_margin']:+.2f}" for _, row in images]
    columns = min(COLUMNS, len(tiles))
    rows = [list(zip(tiles, heads, strict=True))[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile, _ in row) + 30 for row in rows]
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1)), GROUND)
    draw, y = ImageDraw.Draw(sheet), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, (tile, head) in enumerate(row):
            x = GAP + column * (SIDE + GAP)
            draw.text((x, y), head, PALE, font(TEXT, bold=True))
            sheet.paste(tile, (x, y + 26))
        y += height + GAP
    return sheet


def _line(name: str, faces: Sequence[Mapping[str, Any]]) -> str:
    face = next((one for one in faces if one["subject_id"] == name), None)
    return f"{name}: no face" if face is None else f"{name} {face['similarity']:.2f}{_like(face)}"


def _like(face: Mapping[str, Any]) -> str:
    if face["other_subject_id"] is None:
        return ""
    return f"; next {face['other_subject_id']} {face['other_similarity']:.2f}"


def _label(draw: ImageDraw.ImageDraw, text: str, box: tuple, colour: tuple, size: tuple[int, int]) -> None:
    """A name on its box's colour, above the box where there is room, else inside its top."""
    width, height = font(TEXT, bold=True).getlength(text) + 8, TEXT + 6
    x = min(box[0], size[0] - width)
    y = box[1] - height if box[1] >= height else box[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 4, y + 1), text, GROUND, font(TEXT, bold=True))
