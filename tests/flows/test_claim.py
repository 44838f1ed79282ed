"""The claim from one command, in the smallest: unseen people, all methods, tables, judgement, and again for nothing."""

import pytest

from facediffuser.flows.claim import ClaimSettings
from facediffuser.flows.cli import main
from facediffuser.storage import open_store

METHODS = ("face-diffuser", "fastcomposer", "sdm", "tdm")


@pytest.mark.parametrize(
    ("given", "window"),
    [({}, (3, 11)), ({"steps": 2}, (0, 2)), ({"steps": 24}, (6, 22)), ({"fusion_start": 0, "fusion_end": 12}, (0, 12))],
)
def test_the_window_of_fusion_follows_the_steps_unless_it_is_given(given, window):
    assert ClaimSettings(**given).fusion_window == window


@pytest.mark.parametrize(
    "command", [["miniature", "claim"], ["evaluate", "--benchmark", "miniature-30", "--models", "miniature"]]
)
def test_a_window_that_ends_before_it_begins_is_one_line_and_nothing_is_written(tmp_path, capfd, command):
    options = ["--steps", "12", "--fusion-start", "9", "--fusion-end", "3", "--output", str(tmp_path / "out")]
    more = ["--subjects", str(tmp_path)] if command[0] == "evaluate" else []
    assert main([*command, *options, *more]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(said) == 1 and "fusion window 9 to 3 of 12 steps; let it start before it ends" in said[0]
    assert not (tmp_path / "out").exists()


# Eight datasets through Ray, 272 images of the shipped models: minutes on two cores.
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_claim_ends_in_tables_of_every_method_and_says_whether_the_ordering_holds(
    tmp_path, capsys, prefect_harness, ray_session
):
    output = str(tmp_path / "claim")
    command = ["miniature", "claim", "--people", "2", "--images-per-prompt", "1", "--steps", "2", "--output", output]
    code = main(command)
    told = capsys.readouterr().out
    assert code == (0 if "The paper's ordering holds." in told else 1)
    assert all(f"| {method} | 60 |" in told for method in METHODS)
    store = open_store(output)
    assert store.get("claim.md").decode().strip() == told.strip()
    kept = {info.key: info.version for info in store.list("images/") if "/data/" in info.key}
    assert len(kept) == 4 * 3  # two shards of single images, one of pairs, for each method
    assert main(command) == code
    assert {info.key: info.version for info in store.list("images/") if "/data/" in info.key} == kept
