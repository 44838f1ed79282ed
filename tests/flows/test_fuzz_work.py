"""Damaged datasets that pass the first look: the work on them ends in one line too, and leaves them as they were."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import DAMAGES, Damage, Tried, contents, make_templates, run, words, world_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.generation.generate_settings import RepairSettings, RetrySettings
from facediffuser.tasks.add_columns import add_scores, flag_copies, update_card
from facediffuser.tasks.repair import find_damage, repair_damage, retry_failed_rows
from facediffuser.tasks.score_images import score_and_tabulate

pytestmark = pytest.mark.usefixtures("local_driver", "plain_plots")


def repair(given: RepairSettings) -> dict[str, list[str]]:
    manifest, problems = find_damage.fn(given)
    left = repair_damage.fn(given, manifest, problems) if problems else []
    return {"found": list(map(str, problems)), "left": left}


def retry(given: RetrySettings) -> dict[str, int]:
    return retry_failed_rows.fn(given).counts.model_dump()


def score(given: ScoreSettings) -> list[str]:
    keys = add_scores.fn(given)
    update_card.fn(given.url, keys)
    return keys


def copies(given: CopySettings) -> dict[str, int]:
    key, found = flag_copies.fn(given)
    update_card.fn(given.url, [key])
    return found


FLOWS = {
    "facediffuser.flows.score.score": score,
    "facediffuser.flows.score.copies": copies,
    "facediffuser.flows.repair_dataset.repair_dataset": repair,
    "facediffuser.flows.repair_dataset.retry_failed": retry,
    "facediffuser.flows.evaluate.evaluate": lambda given: score_and_tabulate.fn(given).markdown,
}
GIVEN = {
    "card": {}, "verify": {}, "repair": {}, "retry-failed": {}, "remake": {},
    "score": {}, "copies": {},
    "evaluate": {"images": "", "index": "", "prompts": "", "subjects": ""},
}  # fmt: skip


def foreign(how: str) -> bytes:
    """Return Parquet that no dataset holds."""
    sink = io.BytesIO()
    table = {
        "other columns": pa.table({"a": [1]}),
        "no columns": pa.table({}),
        "no rows": pa.table({"sample_id": pa.array([], pa.string())}),
        "other types": pa.table(
            {name: [1, 2] for name in ("sample_id", "subject_id", "image", "prompt", "ip", "status")}
        ),
        "nulls": pa.table(
            {name: pa.nulls(2) for name in ("sample_id", "subject_id", "image", "subject_ids", "prompt")}
        ),
    }[how]
    pq.write_table(table, sink)
    return sink.getvalue()


FOREIGN = ("other columns", "no columns", "no rows", "other types", "nulls")


class Foreign(Damage):
    """A Parquet file of a dataset replaced by another."""

    def do(self, root: Path, names: list[str]) -> str:
        files = sorted((root / "dataset").rglob("*.parquet"))
        path = files[self.which % len(files)]
        path.write_bytes(foreign(FOREIGN[self.at % len(FOREIGN)]))
        return f"{path.relative_to(root)} {FOREIGN[self.at % len(FOREIGN)]}"


PLACES = st.builds(Foreign, st.integers(0, 10), st.just("foreign"), st.integers(0, 4), st.just(0))


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("templates")
    make_templates(root)
    return root


def dataset_contents(root: Path) -> dict[str, tuple]:
    """Return what a folder holds, but for what `score` keeps of the whole shards to go on with once the others are repaired."""
    return {
        name: state
        for name, state in contents(root).items()
        if not name.endswith("/dataset/stats") and "/dataset/stats/scores-" not in name
    }


def require_work_promise(command: str, root: Path, what: str, tried: Tried) -> None:
    """Run a command with its work; it does it, or refuses in one line and leaves the dataset as it was."""
    line = [word for word in words(command, root, GIVEN[command]) if not word.endswith("=")]
    before = dataset_contents(root)
    code, err = run(line, root)
    if code in (0, 1):
        tried.accepted += 1
        return
    assert code == 2, (what, line, code, err)
    assert err.splitlines()[-1].startswith(f"facediffuser {command}: ") and "Traceback" not in err, (what, err)
    assert dataset_contents(root) == before, (what, err)
    tried.refused += 1


def try_damages(command: str, templates: Path, monkeypatch, count: int) -> Tried:
    for name, work in FLOWS.items():
        monkeypatch.setattr(name, work)
    tried = Tried()

    @settings(max_examples=count, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck), report_multiple_bugs=False)  # fmt: skip
    @given(st.one_of(PLACES, DAMAGES))
    @example(Foreign(0, "foreign", 3, 0))
    @example(Foreign(2, "foreign", 4, 0))
    def with_damage(damage: Damage) -> None:
        with world_of(templates, ["dataset"]) as root:
            what = damage.do(root, ["dataset"])
            require_work_promise(command, root, what, tried)

    with_damage()
    return tried


@pytest.mark.parametrize("command", sorted(GIVEN))
def test_work_on_a_damaged_dataset_ends_in_one_line_and_changes_nothing(command, templates, monkeypatch):
    try_damages(command, templates, monkeypatch, 4)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(GIVEN))
def test_much_work_on_damaged_datasets_ends_in_one_line_and_changes_nothing(
    command, templates, monkeypatch, summary_line
):
    tried = try_damages(command, templates, monkeypatch, 300)
    summary_line("work on damaged datasets", f"{command}: {tried.refused} refused, {tried.accepted} worked on")
