"""The paper's claim, judged on a table: both of what one model gives up for the other is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from facediffuser.evaluation.tables import FACES, ScoreRow, overall, title
from facediffuser.markup import Markdown, bold, markdown_table

FACE_DIFFUSER, SDM, TDM, FASTCOMPOSER = "face-diffuser", "sdm", "tdm", "fastcomposer"
KEPT = 0.95
FACES_GOAL = 0.9


@dataclass(frozen=True)
class Check:
    """One sentence of the claim with the two means it compares; `goal`: wished for, not part of the ordering."""

    statement: str
    found: float
    needed: float
    holds: bool
    goal: bool = False


def claim_checks(table: Sequence[ScoreRow]) -> list[Check]:
    """Return the checks of the paper's claim for each number of subjects in a table.

    The ordering, on means over all categories: face-diffuser keeps 95% of the SDM's IP and 95% of the TDM's PC (of
    nothing, 0, nothing is kept), and has more of both than FastComposer. The goal: MTCNN finds the right number of
    faces in 90% of its images.

    Args:
        table: rows of the methods face-diffuser, sdm, tdm and fastcomposer.

    Raises:
        ValueError: a method is missing.
    """
    values, checks = overall(table), []
    for count in sorted({row.subjects for row in table}):

        def mean(method: str, metric: str, count: int = count) -> float:
            row = values.get((method, count, metric))
            if row is None or row.n == 0:
                raise ValueError(f"no {title(metric)} of {method} with {count} subjects in the table; evaluate it too")
            return row.mean

        shown = "single" if count == 1 else f"{count} subjects"
        for metric, other in (("ip", SDM), ("pc", TDM)):
            ours, needed = mean(FACE_DIFFUSER, metric), KEPT * mean(other, metric)
            statement = f"{shown}: {title(metric)} of {FACE_DIFFUSER} is at least {KEPT:.0%} of {other}'s"
            checks.append(Check(statement, ours, needed, ours >= needed and ours > 0))
        for metric in ("ip", "pc"):
            ours, needed = mean(FACE_DIFFUSER, metric), mean(FASTCOMPOSER, metric)
            checks.append(
                Check(
                    f"{shown}: {title(metric)} of {FACE_DIFFUSER} is above {FASTCOMPOSER}'s",
                    ours,
                    needed,
                    ours > needed,
                )
            )
        share = mean(FACE_DIFFUSER, FACES)
        statement = f"{shown}: the right number of faces in at least {FACES_GOAL:.0%} of {FACE_DIFFUSER}'s images"
        checks.append(Check(statement, share, FACES_GOAL, share >= FACES_GOAL, goal=True))
    return checks


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
        rows.append([check.statement, f"{check.found:.3f}", f"{check.needed:.3f}", verdict])
    failed = sum(not check.holds for check in checks if not check.goal)
    ordering = f"does not hold: {failed} checks fail" if failed else "holds"
    table = markdown_table(["claim", "found", "needed", ""], rows, right=(1, 2))
    return Markdown(f"{table}\nThe paper's ordering {ordering}.\n")
