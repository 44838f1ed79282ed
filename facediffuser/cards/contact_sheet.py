"""The contact sheet: for some subjects their reference pictures and images made of them, with prompts and scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from facediffuser.markup import one_line
from facediffuser.picture_grid import fit

TILE = 208
GAP = 14
MARGIN = 28
REFERENCE_WIDTH = 156
CAPTION_LINES = 3
CAPTION_HEIGHT = 92
NOTE_LINES, NOTE_HEIGHT = 3, 18
INK, PALE, RULE, GROUND = (28, 30, 34), (108, 114, 122), (222, 225, 229), (255, 255, 255)
IP_COLOUR, PC_COLOUR = (33, 102, 172), (217, 119, 6)


@dataclass(frozen=True)
class Tile:
    """One image of the sheet with what is written beneath it; scores are None when there are none."""

    image: Image.Image | None
    prompt: str
    category: str = ""
    ip: float | None = None
    pc: float | None = None


@dataclass(frozen=True)
class SheetRow:
    """One or several subjects in one row: (name, reference picture or None) each, and the images showing them."""

    subjects: Sequence[tuple[str, Image.Image | None]]
    tiles: Sequence[Tile] = field(default_factory=tuple)


def contact_sheet(rows: Sequence[SheetRow], title: str, remark: str = "", note: str = "") -> Image.Image:
    """Return the sheet as an RGB picture: a line per `SheetRow`, its references at the left, its images beside them.

    Args:
        rows: the lines.
        title: the text above them.
        remark: smaller text below the title.
        note: what the sheet leaves out, on as many lines below the remark as it takes.
    """
    columns = max([len(row.tiles) for row in rows] or [1])
    width = 2 * MARGIN + REFERENCE_WIDTH + columns * (TILE + GAP)
    notes = wrap(note, font(14), width - 2 * MARGIN, NOTE_LINES) if note else []
    top = MARGIN + 62 + NOTE_HEIGHT * len(notes)
    height = top + len(rows) * (TILE + CAPTION_HEIGHT) + MARGIN // 2
    sheet = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), one_line(title), INK, font(24, bold=True))
    for line, words in enumerate([remark, *notes]):
        draw.text((MARGIN, MARGIN + 26 + NOTE_HEIGHT * line), words, PALE, font(14))
    for index, row in enumerate(rows):
        y = top + index * (TILE + CAPTION_HEIGHT)
        draw.line((MARGIN, y - 10, width - MARGIN, y - 10), RULE)
        _references(sheet, draw, row, y)
        for column, tile in enumerate(row.tiles):
            _tile(sheet, draw, tile, MARGIN + REFERENCE_WIDTH + GAP + column * (TILE + GAP), y)
    return sheet


def _references(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: SheetRow, y: int) -> None:
    step = (TILE + CAPTION_HEIGHT - 34) / max(len(row.subjects), 1)
    side = min(REFERENCE_WIDTH - 12, int(step) - 28)
    for index, (name, picture) in enumerate(row.subjects):
        place = (MARGIN, round(y + index * step))
        if picture is None:
            draw.rectangle((*place, place[0] + side, place[1] + side), outline=RULE)
            shown_height = side
        else:
            shown = fit(picture, side, side)
            sheet.paste(shown, place)
            shown_height = shown.height
        label = wrap(name, font(14, bold=True), REFERENCE_WIDTH - 10, 1)
        draw.text((MARGIN, place[1] + shown_height + 5), label[0], INK, font(14, bold=True))


def _tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    if tile.image is None:
        draw.rectangle((x, y, x + TILE, y + TILE), fill=(245, 246, 247))
        draw.text((x + TILE / 2, y + TILE / 2), "failed", PALE, font(14), anchor="mm")
    else:
        shown = fit(tile.image, TILE, TILE)
        sheet.paste(shown, (x + (TILE - shown.width) // 2, y + (TILE - shown.height) // 2))
    below = y + TILE + 6
    if tile.ip is not None:
        draw.text((x, below), f"IP {tile.ip:.2f}", IP_COLOUR, font(13, bold=True))
    if tile.pc is not None:
        draw.text((x + 62, below), f"PC {tile.pc:.2f}", PC_COLOUR, font(13, bold=True))
    if tile.category:
        draw.text((x + TILE, below), one_line(tile.category), PALE, font(12), anchor="ra")
    for line, words in enumerate(wrap(tile.prompt, font(13), TILE, CAPTION_LINES)):
        draw.text((x, below + 18 + 16 * line), words, INK, font(13))


def wrap(text: str, face: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """Return text broken into lines; what does not fit ends in an ellipsis.

    Args:
        text: the text; its own line breaks count as spaces.
        face: the font.
        width: that of a line, in px.
        lines: how many there may be.
    """
    broken: list[str] = []
    rest = one_line(text).split()
    while rest and len(broken) < lines:
        count = 1
        while count < len(rest) and face.getlength(" ".join(rest[: count + 1])) <= width:
            count += 1
        broken.append(" ".join(rest[:count]))
        rest = rest[count:]
    broken = broken or [""]
    if rest or face.getlength(broken[-1]) > width:
        last = broken[-1]
        while last and face.getlength(last + "…") > width:
            last = last[:-1]
        broken[-1] = last.rstrip(" ,;.") + "…"
    return broken


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which matplotlib brings, so that the sheet looks the same on every machine; `size` is in px."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)
