"""The paper's claim, judged on a table: both of what one model gives up for the other is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import pyarrow as pa
import pyarrow.compute as pc

from facediffuser.evaluation.compare import paired_values
from facediffuser.evaluation.statistics import Interval, paired_difference
from facediffuser.evaluation.tables import FACES, ScoreRow, overall, score_table, title
from facediffuser.markup import Markdown, bold, markdown_table
from facediffuser.number_words import counted

FACE_DIFFUSER, SDM, TDM, FASTCOMPOSER = "face-diffuser", "sdm", "tdm", "fastcomposer"
KEPT = 0.95
FACES_GOAL = 0.9


@dataclass(frozen=True)
class Check:
    """One sentence of the claim with the two means it compares; `goal`: wished for, not part of the ordering.

    margin: the 95% interval over people and prompts of what was found minus what is needed, on the same rows; None where the
    images are not at hand.
    """

    statement: str
    found: float
    needed: float
    holds: bool
    goal: bool = False
    margin: Interval | None = None


def claim_checks(table: Sequence[ScoreRow], images: pa.Table | None = None) -> list[Check]:
    """Return the checks of the paper's claim for each number of subjects in a table.

    The ordering, on means over all categories: face-diffuser keeps 95% of the SDM's IP and 95% of the TDM's PC (of
    nothing, 0, nothing is kept), and has more of both than FastComposer. The goal: MTCNN finds the right number of
    faces in 90% of its images.

    Args:
        table: rows of the methods face-diffuser, sdm, tdm and fastcomposer.
        images: the scored rows behind them, as `compare.differences` takes them: then each check has its margin.

    Raises:
        ValueError: a method is missing.
    """
    values, checks = overall(table), []
    rows = paired_values(images) if images is not None else {}
    for count in sorted({row.subjects for row in table}):

        def of(method: str, metric: str, count: int = count) -> ScoreRow:
            row = values.get((method, count, metric))
            if row is None or row.n == 0:
                raise ValueError(
                    f"no {title(metric)} of {method} with {counted(count, 'subject')} in the table; evaluate it too"
                )
            return row

        def margin(metric: str, other: str, share: float, count: int = count) -> Interval | None:
            if not rows:
                return None
            theirs = {key: share * value for key, value in rows.get((other, count, metric), {}).items()}
            ours = rows.get((FACE_DIFFUSER, count, metric), {})
            return paired_difference(ours, theirs, (itemgetter(0), itemgetter(1)))

        shown = "single" if count == 1 else counted(count, "subject")
        for metric, other in (("ip", SDM), ("pc", TDM)):
            ours, needed = of(FACE_DIFFUSER, metric).mean, KEPT * of(other, metric).mean
            statement = f"{shown}: {title(metric)} of {FACE_DIFFUSER} is at least {KEPT:.0%} of {other}'s"
            holds = ours >= needed and ours > 0
            checks.append(Check(statement, ours, needed, holds, margin=margin(metric, other, KEPT)))
        for metric in ("ip", "pc"):
            ours, needed = of(FACE_DIFFUSER, metric).mean, of(FASTCOMPOSER, metric).mean
            statement = f"{shown}: {title(metric)} of {FACE_DIFFUSER} is above {FASTCOMPOSER}'s"
            checks.append(Check(statement, ours, needed, ours > needed, margin=margin(metric, FASTCOMPOSER, 1.0)))
        right = of(FACE_DIFFUSER, FACES)
        statement = f"{shown}: the right number of faces in at least {FACES_GOAL:.0%} of {FACE_DIFFUSER}'s images"
        above = Interval(right.mean - FACES_GOAL, right.low - FACES_GOAL, right.high - FACES_GOAL, right.n)
        checks.append(Check(statement, right.mean, FACES_GOAL, right.mean >= FACES_GOAL, goal=True, margin=above))
    return checks


def checks_by_set(images: pa.Table, set_of: Callable[[str], str]) -> dict[str, list[Check]]:
    """Return the checks of each set of people alone, by the set's name, sorted.

    Args:
        images: scored rows, with face_count.
        set_of: the name of the set that a subject_id belongs to; an image belongs to the set of its first subject.
    """
    names = [set_of(subjects[0]) for subjects in images["subject_ids"].to_pylist()]
    column = pa.array(names, pa.string())
    found = {}
    for name in sorted(set(names)):
        some = images.filter(pc.equal(column, name))
        found[name] = claim_checks(score_table(some), some)
    return found


def ordering_holds(checks: Sequence[Check]) -> bool:
    """Return whether every check but the goals holds.

    Args:
        checks: of `claim_checks`.
    """
    return all(check.holds for check in checks if not check.goal)


def markdown(checks: Sequence[Check]) -> Markdown:
    """Return the checks as a Markdown table and, in one sentence, whether the paper's ordering holds.

    Args:
        checks: of `claim_checks`.
    """
    rows = []
    for check in checks:
        verdict = "holds" if check.holds else "goal missed" if check.goal else bold("fails")
        rows.append([check.statement, f"{check.found:.3f}", f"{check.needed:.3f}", _margin(check.margin), verdict])
    failed = sum(not check.holds for check in checks if not check.goal)
    ordering = f"does not hold: {counted(failed, 'check')} failed" if failed else "holds"
    table = markdown_table(["claim", "found", "needed", "found minus needed", ""], rows, right=(1, 2))
    return Markdown(f"{table}\nThe paper's ordering {ordering}.\n")


def sets_markdown(found: dict[str, list[Check]]) -> Markdown:
    """Return a Markdown table with a line per check and in a column per set of people its margin; bold where it fails."""
    statements = list(dict.fromkeys(check.statement for checks in found.values() for check in checks))
    lines = []
    for statement in statements:
        cells: list[object] = [statement]
        for checks in found.values():
            check = next((one for one in checks if one.statement == statement), None)
            if check is None:
                cells.append("–")
                continue
            shown = _margin(check.margin)
            cells.append(shown if check.holds else bold(shown))
        lines.append(cells)
    return markdown_table(["found minus needed", *found], lines)


def _margin(margin: Interval | None) -> str:
    return "–" if margin is None else f"{margin.mean:+.3f} ({margin.low:+.3f} to {margin.high:+.3f})"
