"""Pictures laid out: fitted into a box, in rows and columns, encoded as PNG."""

import io
from collections.abc import Sequence

from PIL import Image


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return a picture in RGB, as large as fits into a box, its aspect kept.

    Args:
        image: a picture of any size.
        width: of the box, px.
        height: of the box, px.
    """
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def picture_grid(rows: Sequence[Sequence[Image.Image]], gap: int = 0) -> Image.Image:
    """Return pictures side by side, row below row, on white.

    Args:
        rows: the pictures of each row. A column is as wide as the widest of all pictures, a row as high as its highest;
            each picture lies at the top left of its cell.
        gap: px between columns and between rows.
    """
    columns, width = max(map(len, rows)), max(picture.width for row in rows for picture in row)
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (columns * (width + gap) - gap, sum(heights) + gap * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * (width + gap), top))
        top += height + gap
    return sheet


def png_bytes(image: Image.Image, optimize: bool = False) -> bytes:
    """Return a picture's PNG file.

    Args:
        image: the picture.
        optimize: let Pillow look for the smallest file, which takes longer.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=optimize)
    return buffer.getvalue()
