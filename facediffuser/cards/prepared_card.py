"""The card of prepared data: README.md, a contact sheet with boxes and masks drawn, histograms."""

import io
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

from facediffuser.cards.contact_sheet import font
from facediffuser.cards.rendering import render
from facediffuser.faces import turned_square
from facediffuser.markup import markdown_table
from facediffuser.picture_grid import fit, picture_grid, png_bytes
from facediffuser.pictures import stored_picture
from facediffuser.preprocess.prepared_schema import CROP_STEP
from facediffuser.preprocess.segment_maps import decode_map
from facediffuser.preprocess.splits import TEST, TRAIN
from facediffuser.storage import Store

CELL = 192
TEXT_LINES = 3
LINE = 12
# More of a caption than the lines hold; Pillow draws no text of a million characters.
MOST_CHARACTERS = 1000
CELLS = 24
COLUMNS = 6
BARS = 24
PAPER, INK, PALE = (238, 238, 238), (60, 60, 60), (150, 150, 150)
FACE, CROP = (255, 64, 64), (255, 210, 60)
SUBJECTS = ((64, 160, 255), (80, 220, 120), (230, 110, 230), (255, 150, 60))
TITLES = {
    "faces": "faces a picture",
    "subjects": "subjects a picture",
    "caption_words": "words a caption",
    "crop_px": "side of a face crop, px",
}


def write_card(store: Store, manifest: dict[str, Any]) -> None:
    """Write README.md, card/contact-sheet.png and card/histograms.png of prepared data.

    Args:
        store: the prepared data.
        manifest: its manifest.
    """
    rows = list(islice(_sample(store, manifest), CELLS))
    if rows:
        store.put("card/contact-sheet.png", png_bytes(contact_sheet(rows)))
    store.put("card/histograms.png", _histograms(manifest["facts"]))
    store.put("README.md", _readme(manifest, bool(rows)).encode())


def _sample(store: Store, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A few rows of each of some parts, spread over the set."""
    keys = [key for key in manifest["files"] if key.startswith((f"{TRAIN}/", f"{TEST}/"))]
    chosen = [keys[index] for index in np.unique(np.linspace(0, len(keys) - 1, min(len(keys), 6)).astype(int))]
    for position, key in enumerate(chosen):
        count = CELLS // len(chosen) + (position < CELLS % len(chosen))
        with store.open(key) as stream:
            batch = next(pq.ParquetFile(stream).iter_batches(batch_size=count), None)
            yield from batch.to_pylist()[:count] if batch is not None else ()


def contact_sheet(rows: list[dict[str, Any]]) -> Image.Image:
    """Return a grid of pictures: face boxes red, reference crops yellow, subjects outlined, captions below.

    Args:
        rows: dictionaries by column of PREPARED_SCHEMA.
    """
    cells = [_cell(row) for row in rows]
    return picture_grid([cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)])


def _cell(row: dict[str, Any]) -> Image.Image:
    image = stored_picture(row["image"]["bytes"], row["image_id"])
    if row["segmentation"]:
        ids = decode_map(row["segmentation"])
        pixels = np.asarray(image).astype(np.float32)
        for index, subject in enumerate(row["subjects"]):
            inside = ids == subject["segment_id"]
            # Its outline in full colour, 12% of it inside, so that the picture itself can still be seen.
            opacity = np.where(binary_erosion(inside, border_value=1), 0.12, 0.9) * inside
            pixels += opacity[..., None] * (np.asarray(SUBJECTS[index % len(SUBJECTS)], np.float32) - pixels)
        image = Image.fromarray(pixels.astype(np.uint8))
    scale = (CELL - 2) / max(image.size)
    image = fit(image, CELL - 2, CELL - 2)
    pen = ImageDraw.Draw(image)
    for face in row["faces"]:
        corners = turned_square(face["crop_box"], face["crop_turn"]) * scale
        pen.polygon([tuple(corner) for corner in corners.tolist()], outline=CROP)
        pen.rectangle([value * scale for value in face["box"]], outline=FACE)
        for x, y in face["landmarks"]:
            pen.ellipse((x * scale - 1, y * scale - 1, x * scale + 1, y * scale + 1), fill=FACE)
    cell = Image.new("RGB", (CELL, CELL + TEXT_LINES * LINE + 6), "white")
    cell.paste(PAPER, (0, 0, CELL - 2, CELL - 2))
    cell.paste(image, ((CELL - 2 - image.width) // 2, (CELL - 2 - image.height) // 2))
    _caption(ImageDraw.Draw(cell), row, 2, CELL + 2)
    return cell


def _caption(pen: ImageDraw.ImageDraw, row: dict[str, Any], left: int, top: int) -> None:
    """Write the caption word by word, the subjects' phrases in their colours."""
    x, y, position = float(left), top, 0
    caption = row["caption"][:MOST_CHARACTERS]
    if not caption:
        pen.text((x, y), "no caption", fill=PALE, font=font(10))
    for word in caption.split():
        start = caption.index(word, position)
        position = start + len(word)
        inside = [number for number, item in enumerate(row["subjects"]) if item["start"] <= start < item["end"]]
        colour = SUBJECTS[inside[0] % len(SUBJECTS)] if inside else INK
        width = pen.textlength(f"{word} ", font=font(10))
        last = y + LINE >= top + TEXT_LINES * LINE
        if last and x + width > left + CELL - 16 and caption[position:].strip():
            pen.text((x, y), "…", fill=INK, font=font(10))
            return
        if x > left and x + width > left + CELL - 4:
            x, y = left, y + LINE
        pen.text((x, y), word, fill=colour, font=font(10))
        x += width


def _histograms(facts: dict[str, dict[str, int]]) -> bytes:
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        places, counts, width = _bars({int(value): count for value, count in facts.get(name, {}).items()},
                                      CROP_STEP if name == "crop_px" else 1)  # fmt: skip
        axis.bar(places, counts, width=0.9 * width, align="edge" if width > 1 else "center")
        axis.set_xlabel(title)
        axis.set_ylabel("faces" if name == "crop_px" else "pictures")
        axis.set_xlim(min(places, default=0) - 0.6 * width, max(max(places, default=0), 2) + width)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _bars(table: dict[int, int], step: int) -> tuple[list[int], list[int], int]:
    """Left edges, heights and the width of at most some BARS bars, the width a multiple of the table's own step."""
    if not table:
        return [], [], step
    width = step * max(1, -(-(max(table) - min(table) + step) // (BARS * step)))
    bars: Counter[int] = Counter()
    for value, count in table.items():
        bars[value // width * width] += count
    return list(bars), list(bars.values()), width


def _readme(manifest: dict[str, Any], pictured: bool) -> str:
    counts, rejected = manifest["counts"], sorted(manifest["rejected"].items())
    table = markdown_table(("rejected because", "pictures"), [(why, f"{count:,}") for why, count in rejected], (1,))
    return render(
        "prepared_readme.md.j2",
        splits=[name for name in (TRAIN, TEST) if counts[name]],
        counts=counts,
        source=manifest["source"],
        pictured=pictured,
        rejected=table if rejected else None,
        schema=manifest["schema"],
        fingerprint=manifest["fingerprint"][:16],
        version=manifest["facediffuser"],
    )
