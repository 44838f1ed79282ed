"""The claim from one command, in the smallest: unseen people, all methods, tables, judgement, and again for nothing."""

import pytest

from facediffuser.storage import open_store
from flows.cli import main

METHODS = ("face-diffuser", "fastcomposer", "sdm", "tdm")


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
