"""The paper's claim: which tables it holds on, which it does not, and what is told."""

import pyarrow as pa
import pytest

from facediffuser.evaluation.claim import checks_by_set, claim_checks, markdown, ordering_holds, sets_markdown
from facediffuser.evaluation.tables import ScoreRow, score_table

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
    assert "**fails**" in markdown(checks) and "does not hold: 1 check failed" in markdown(checks)


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
    with pytest.raises(ValueError, match="no IP of fastcomposer with 1 subject "):
        claim_checks(rows)


def images(people: int = 4, prompts: int = 6, **changed: tuple[float, float, float]) -> pa.Table:
    """Scored rows of one person whose means are MEANS, each person and prompt a little above or below."""
    rows = []
    for method, (ip, pc, _) in (MEANS | changed).items():
        for who in range(people):
            for prompt in range(prompts):
                off = 0.01 * (who - (people - 1) / 2) + 0.002 * (prompt - (prompts - 1) / 2)
                rows.append(
                    {
                        "sample_id": f"{who}-{prompt}", "method": method, "subject_ids": [f"man_{who:02d}"],
                        "prompt_id": str(prompt), "category": "context", "ip": ip + off, "pc": pc + off, "face_count": 1,
                        "status": "ok",
                    }
                )  # fmt: skip
    return pa.Table.from_pylist(rows)


def test_a_margin_is_the_interval_of_what_was_found_minus_what_is_needed_on_the_same_rows():
    rows = images()
    checks = claim_checks(score_table(rows), rows)
    for check in checks:
        assert check.margin is not None and check.margin.low <= check.margin.mean <= check.margin.high
        assert check.margin.mean == pytest.approx(check.found - check.needed)
    above = next(check for check in checks if "IP of face-diffuser is above" in check.statement)
    # The people's and prompts' own ups and downs are the same in both methods: nothing of them is left.
    assert above.margin.high - above.margin.low == pytest.approx(0)
    kept = next(check for check in checks if "IP of face-diffuser is at least" in check.statement)
    assert 0 < kept.margin.high - kept.margin.low < 0.01
    assert "+0.080 (+0.080 to +0.080)" in markdown(checks)


def test_of_several_sets_each_is_judged_by_its_own_people():
    rows = pa.concat_tables([images(2), images(4, fastcomposer=(0.6, 0.2, 1.0)).slice(0, 96)])
    found = checks_by_set(rows, lambda name: "first" if name in ("man_00", "man_01") else "second")
    assert list(found) == ["first", "second"]
    ahead = {name: next(check for check in checks if "IP" in check.statement and "fastcomposer" in check.statement)
             for name, checks in found.items()}  # fmt: skip
    assert ahead["first"].margin.mean != ahead["second"].margin.mean and not ahead["second"].holds
    shown = sets_markdown(found)
    assert "| found minus needed | first | second |" in shown and "**-0.020" in shown
