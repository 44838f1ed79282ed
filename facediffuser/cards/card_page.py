"""The card as one self-contained HTML page: every picture is inside it, nothing is loaded from elsewhere."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from facediffuser.cards.card_facts import FLAG_TITLES, Card, added_lines, flag_lines
from facediffuser.cards.survey import FLAGS, Located
from facediffuser.evaluation.tables import METRICS, OVERALL, ScoreRow, metrics_of, title
from facediffuser.prompts import without_markers

THUMBNAIL, REFERENCE = 240, 104
STYLE = """
:root { color-scheme: light; --ink: #1c1e22; --pale: #6c727a; --rule: #dee1e5; --ip: #2166ac; --pc: #b45f06; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); max-width: 1180px; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem }
p.lead, figcaption, .note { color: var(--pale) }
img.wide { width: 100%; border: 1px solid var(--rule); border-radius: 6px }
.pair { display: grid; grid-template-columns: 1.6fr 1fr; gap: 1rem; align-items: start } .pair img { width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--rule); vertical-align: top }
th { color: var(--pale); font-weight: 500 } tr.all td { font-weight: 600 } td.n { text-align: right }
.bar { display: inline-block; height: .6em; border-radius: 2px; margin-right: .5em; background: var(--ip) }
.bar.pc { background: var(--pc) } .bar.other { background: #8a929c }
.facts { columns: 2; column-gap: 3rem } .facts table { width: 100% } .facts tr { break-inside: avoid }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1.2rem .9rem }
.tiles img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #f5f6f7; border-radius: 4px }
.shown { position: relative; display: block } .who { position: absolute; right: 5px; bottom: 10px; display: flex; gap: 4px }
.who i { width: 52px; height: 52px; border: 2px solid #fff; border-radius: 4px; background: #f5f6f7 center / cover }
figure { margin: 0; font-size: .82rem; line-height: 1.35 } b.ip { color: var(--ip) } b.pc { color: var(--pc) }
h3 { font-size: 1rem; margin: 1.4rem 0 .6rem } .flag { color: #a1260d; overflow-wrap: anywhere }
details { margin-top: 1.5rem } details td { word-break: break-all }
"""


def card_page(
    card: Card,
    pictures: Mapping[str, bytes],
    facts: Sequence[tuple[str, str]],
    settings: Sequence[tuple[str, str]],
    rights: str,
) -> str:
    """Return the HTML of a dataset's card with every picture inside it."""
    name = html.escape(card.name)
    failures = "".join(
        f"<tr><td class=n>{count:,}</td><td>{html.escape(error)}</td></tr>"
        for error, count in card.survey.failures.most_common(10)
    )
    names = ("contact_sheet", "score_histograms", "ip_pc_plane")
    sheet, histograms, plane = (_data_url(pictures[f"card/{key}.png"], "png") for key in names)
    faces = {name: f"ref{number}" for number, name in enumerate(sorted(card.references))}
    sections = [
        f"<h1>{name}</h1><p class=lead>Person-centric synthetic images with scores of identity preservation (IP) and "
        "prompt consistency (PC).</p>",
        f'<img class=wide alt="Subjects and images made of them" src="{sheet}">',
        f"<h2>Contents</h2><div class=facts>{_lines(facts)}</div>",
        f"<h2>Scores</h2><p class=note>Mean and 95% bootstrap interval over people and prompts.</p>{_score_table(card.table)}",
        '<h2>Distributions</h2><div class=pair><img alt="Histograms of IP and PC" '
        f'src="{histograms}"><img alt="IP against PC" src="{plane}"></div>',
        f"<h2>Highest IP</h2><p class=note>In the corner the reference.</p>{_tiles(card.survey.best, card, faces)}",
        f"<h2>Lowest IP</h2>{_tiles(card.survey.worst, card, faces)}",
    ]
    if card.added:
        sections.append(f"<h2>Other scores</h2>{_lines(added_lines(card))}")
    sections += _copies(card, faces)
    if failures:
        sections.append(f"<h2>Failed rows</h2><table>{failures}</table>")
    if settings:
        sections.append(f"<details><summary>Made with</summary>{_lines(settings)}</details>")
    sections.append(f"<h2>Rights</h2><p>{html.escape(rights).replace('`', '')}</p>")
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{_faces(card, faces)}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _copies(card: Card, faces: Mapping[str, str]) -> list[str]:
    if not card.survey.flags:
        return []
    sections = [f"<h2>Copies</h2>{_lines(flag_lines(card.survey))}"]
    for name, flagged in card.survey.flags.items():
        if flagged.shown:
            likeness, like = FLAGS[name]
            remarks = [_likeness(located.values, likeness, like) for located in flagged.shown]
            sections.append(f"<h3>Flagged: {FLAG_TITLES[name]}</h3>{_tiles(flagged.shown, card, faces, remarks)}")
    return sections


def _likeness(values: Mapping, likeness: str, like: str | None) -> str:
    whom = f" like {html.escape(str(values[like]))}" if like else ""
    return f"<span class=flag>{values[likeness]:.2f}{whom}</span><br>"


def _lines(lines: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in lines)
    return f"<table>{cells}</table>"


def _score_table(rows: Sequence[ScoreRow]) -> str:
    lines: dict[tuple[str, int, str], dict[str, ScoreRow]] = {}
    for row in rows:
        lines.setdefault((row.method, row.subjects, row.category), {})[row.metric] = row
    metrics_shown = metrics_of(rows)
    titles = "".join(f"<th>{html.escape(title(metric))}" for metric in metrics_shown)
    head = f"<tr><th>method<th>subjects<th>category<th>images{titles}</tr>"
    body = []
    for (method, subjects, category), metrics in lines.items():
        scores = "".join(f"<td>{_score(metrics.get(metric), metric)}</td>" for metric in metrics_shown)
        emphasis = " class=all" if category == OVERALL else ""
        count = max(row.n for row in metrics.values())
        body.append(
            f"<tr{emphasis}><td>{html.escape(method)}</td><td>{subjects}</td><td>{html.escape(category)}</td>"
            f"<td class=n>{count:,}</td>{scores}</tr>"
        )
    return f"<table>{head}{''.join(body)}</table>"


def _score(row: ScoreRow | None, metric: str) -> str:
    if row is None or row.n == 0:
        return "–"
    kind = metric if metric in METRICS else "other"
    bar = f'<span class="bar {kind}" style="width:{100 * max(0.0, min(1.0, row.mean)):.0f}px"></span>'
    interval = f" <span class=note>({row.low:.3f} to {row.high:.3f})</span>" if row.n > 1 else ""
    return f"{bar}{row.mean:.3f}{interval}"


def _tiles(rows: Sequence[Located], card: Card, faces: Mapping[str, str], remarks: Sequence[str] = ()) -> str:
    figures = []
    for located, remark in zip(rows, remarks or [""] * len(rows), strict=True):
        values = located.values
        prompt = html.escape(without_markers(values["prompt"]))
        who = html.escape(", ".join(located.subject_ids))
        corner = "".join(f"<i class={faces[name]}></i>" for name in located.subject_ids if name in faces)
        figures.append(
            f'<figure><span class=shown><img alt="{prompt}" src="{_thumbnail(card.images[values["sample_id"]])}">'
            f"<span class=who>{corner}</span></span>"
            f"{remark}<b class=ip>IP {values['ip']:.2f}</b> <b class=pc>PC {values['pc']:.2f}</b> {who}"
            f"<figcaption>{prompt}</figcaption></figure>"
        )
    return f"<div class=tiles>{''.join(figures)}</div>"


def _faces(card: Card, faces: Mapping[str, str]) -> str:
    """A style for each subject's reference, so that a picture shown many times is in the page once."""
    return "".join(
        f".who .{style} {{ background-image: url({_small(card.references[name], REFERENCE)}) }}\n"
        for name, style in faces.items()
    )


def _thumbnail(data: bytes) -> str:
    return _small(Image.open(io.BytesIO(data)), THUMBNAIL)


def _small(picture: Image.Image, side: int) -> str:
    picture = picture.convert("RGB")
    scale = side / max(picture.size)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "jpeg", quality=88)
    return _data_url(buffer.getvalue(), "jpeg")


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
