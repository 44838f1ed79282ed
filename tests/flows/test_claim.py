"""The claim from one command, in the smallest: unseen people, all methods, tables, judgement, and again for nothing."""

import pytest

from facediffuser.flows.claim import ClaimSettings, set_of_person
from facediffuser.flows.cli import main
from facediffuser.storage import open_store

METHODS = ("face-diffuser", "fastcomposer", "sdm", "tdm")


@pytest.mark.parametrize(
    ("given", "window"),
    [({}, (3, 11)), ({"steps": 2}, (0, 2)), ({"steps": 24}, (6, 22)), ({"fusion_start": 0, "fusion_end": 12}, (0, 12))],
)
def test_the_window_of_fusion_follows_the_steps_unless_it_is_given(given, window):
    assert ClaimSettings(**given).fusion_window == window


def test_a_choice_gives_what_is_not_given_besides(tmp_path):
    path = tmp_path / "choice.json"
    path.write_text('{"steps": 24, "guidance_scale": 2.5, "fusion_start": 5, "fusion_end": 20, "why": "tried"}')
    chosen = ClaimSettings(choice=path).chosen()
    assert (chosen.steps, chosen.guidance_scale, chosen.fusion_window) == (24, 2.5, (5, 20))
    other = ClaimSettings(choice=path, guidance_scale=5, fusion_start=6).chosen()
    assert (other.guidance_scale, other.fusion_window) == (5, (6, 20))


@pytest.mark.parametrize("text", [None, "[]", '{"steps": 3}', "no"])
def test_a_choice_that_is_none_is_one_line_and_nothing_is_written(tmp_path, capfd, text):
    if text:
        (tmp_path / "choice.json").write_text(text)
    words = ["--choice", str(tmp_path / "choice.json"), "--output", str(tmp_path / "out")]
    assert main(["miniature", "claim", "--quiet", *words]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(said) == 1 and "choice.json" in said[0] and "tools.miniature_weights.choose" in said[0]
    assert not (tmp_path / "out").exists()


def test_people_of_a_set_stand_together():
    assert [set_of_person(name) for name in ("man_00", "woman_14", "man_15", "woman_44")] == [
        "people 1 to 15", "people 1 to 15", "people 16 to 30", "people 31 to 45",
    ]  # fmt: skip


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
