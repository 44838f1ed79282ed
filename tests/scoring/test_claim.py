"""The paper's claim: which tables it holds on, which it does not, and what is told."""

import pytest

from facediffuser.evaluation.claim import claim_checks, markdown, ordering_holds
from facediffuser.evaluation.tables import ScoreRow

MEANS = {  # (ip, pc, share with the right number of faces): a table on which everything holds
    "face-diffuser": (0.58, 0.29, 0.95),
    "sdm": (0.60, 0.22, 0.95),
    "tdm": (0.10, 0.30, 0.9),
    "fastcomposer": (0.50, 0.25, 0.9),
}


def table(counts=(1, 2), **changed: tuple[float, float, float]) -> list[ScoreRow]:
    means = MEANS | {name.replace("_", "-"): values for name, values in changed.items()}
    return [
        ScoreRow(method, count, "all", metric, value, value - 0.01, value + 0.01, 100)
        for method, values in means.items()
        for count in counts
        for metric, value in zip(("ip", "pc", "faces"), values, strict=True)
    ]


def test_a_table_with_the_papers_ordering_holds_in_every_line():
    checks = claim_checks(table())
    assert len(checks) == 10 and all(check.holds for check in checks) and ordering_holds(checks)
    assert "The paper's ordering holds." in markdown(checks)


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({"sdm": (0.62, 0.2, 0.9)}, "IP of face-diffuser is at least 95% of sdm's"),
        ({"tdm": (0.1, 0.31, 0.9)}, "PC of face-diffuser is at least 95% of tdm's"),
        ({"fastcomposer": (0.58, 0.2, 0.9)}, "IP of face-diffuser is above fastcomposer's"),
        ({"fastcomposer": (0.5, 0.3, 0.9)}, "PC of face-diffuser is above fastcomposer's"),
    ],
)
def test_each_part_of_the_ordering_can_fail_alone(changed, failing):
    checks = claim_checks(table(counts=(1,), **changed))
    assert [check.statement for check in checks if not check.holds] == [f"single: {failing}"]
    assert not ordering_holds(checks)
    assert "**fails**" in markdown(checks) and "does not hold: 1 checks" in markdown(checks)


def test_several_subjects_are_judged_too():
    rows = [*table(counts=(1,)), *table(counts=(2,), face_diffuser=(0.4, 0.29, 0.95))]
    assert {check.statement.split(":")[0] for check in claim_checks(rows) if not check.holds} == {"2 subjects"}


def test_where_no_model_shows_anybody_nothing_is_kept():
    nobody = {name.replace("-", "_"): (0.0, 0.3, 0.0) for name in MEANS}
    assert [check.holds for check in claim_checks(table(counts=(2,), **nobody)) if "IP" in check.statement] == [
        False,
        False,
    ]


def test_too_few_faces_miss_the_goal_and_leave_the_ordering_be():
    checks = claim_checks(table(face_diffuser=(0.58, 0.29, 0.7)))
    assert ordering_holds(checks) and "goal missed" in markdown(checks)


def test_a_method_that_was_not_evaluated_is_named():
    rows = [row for row in table() if row.method != "fastcomposer"]
    with pytest.raises(ValueError, match="no IP of fastcomposer with 1 subjects"):
        claim_checks(rows)
