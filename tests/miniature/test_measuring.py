"""Measurements on models in training: right images, curves from checkpoints, choices apart from what they are for."""

import json
import re

import numpy as np
import pytest

from facediffuser.errors import InputError
from facediffuser.miniature.looks import ACTIONS, COLOURS, EXPRESSIONS, HATS, SCENES, STYLES
from facediffuser.rehearsal.random_data import write_prepared
from facediffuser.scoring.scorers import load_scorers
from facediffuser.shipped import models_folder
from facediffuser.training.loop import train_model
from facediffuser.training.train_settings import TrainSettings
from tools.miniature_weights import checkpoint_models, choose, claim_here, forgetting, methods, own_words, worth
from tools.miniature_weights.scored import (
    Sampler,
    as_table,
    kept_rows,
    made_prompt,
    planned,
    require_same,
    score_images,
    suite,
)

QUICK = Sampler(steps=2, window=(0, 1), batch=8)
PROMPTS = [
    made_prompt("one", "context", "a {subject} on the beach"),
    made_prompt("two", "style", "a sketch of a {subject_1} and a {subject_2}"),
]


@pytest.fixture(scope="module")
def scorers():
    return load_scorers("miniature", "cpu")


@pytest.fixture(scope="module")
def people(scorers):
    return methods.unseen_people(2, scorers, 41_500_000)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, str]:
    """Two runs from the shipped base, of 2 and 4 steps, with checkpoints in the middle and at the end."""
    root = tmp_path_factory.mktemp("trained")
    data, runs = str(write_prepared(root, 8, 64)), {}
    for role, steps in (("tdm", 2), ("sdm", 4)):
        runs[role] = str(root / role)
        settings = TrainSettings(
            role=role, data=data, base="miniature", output=runs[role], steps=steps, batch_size=2, schedule="constant",
            checkpoint_every=steps // 2, keep_every=steps // 2, learning_rate=1e-2,
        )  # fmt: skip
        train_model(settings, lambda numbers: None)
    return runs


# --- images and scores ------------------------------------------------------------------------------------------------


def test_everybody_is_shown_with_every_prompt_and_in_pairs_with_the_next():
    plan = planned(3, PROMPTS, 2)
    assert [one.people for one in plan if one.prompt.subjects == 1] == [(0,), (0,), (1,), (1,), (2,), (2,)]
    assert {one.people for one in plan if one.prompt.subjects == 2} == {(0, 1), (1, 2), (2, 0)}
    assert len({one.seed for one in plan}) == len(plan) == 12


def test_the_rows_are_a_tables_and_the_same_again(people, scorers):
    pipeline = methods.load_pipeline(models_folder())
    rows = score_images(pipeline, scorers, people, PROMPTS, "face-diffuser", QUICK)
    assert [(row["subject_ids"], row["prompt_id"]) for row in rows] == [
        (["0"], "one"), (["1"], "one"), (["0", "1"], "two"), (["1", "0"], "two"),
    ]  # fmt: skip
    assert as_table(rows).num_rows == 4 and all(0 <= row["ip"] <= 1 and -1 <= row["pc"] <= 1 for row in rows)
    assert score_images(pipeline, scorers, people, PROMPTS, "face-diffuser", QUICK) == rows


def test_what_was_kept_is_not_made_again(tmp_path):
    made = []
    for _ in range(2):
        assert kept_rows(tmp_path / "a" / "rows.json", lambda: made.append(1) or [{"ip": 0.5}]) == [{"ip": 0.5}]
    assert len(made) == 1 and [path.name for path in (tmp_path / "a").iterdir()] == ["rows.json"]


def test_scores_of_other_models_people_or_sampling_are_not_taken_for_these(tmp_path):
    require_same(tmp_path / "kept", {"people": 2, "sampler": {"window": (0, 1)}})
    require_same(tmp_path / "kept", {"people": 2, "sampler": {"window": (0, 1)}})
    with pytest.raises(InputError, match="kept: holds scores with other people, sampler; give another folder"):
        require_same(tmp_path / "kept", {"people": 3, "sampler": {"window": (0, 2)}})


def test_every_measurement_refuses_a_folder_of_another(tmp_path, monkeypatch):
    class MeasuredError(Exception):
        """Nothing refused before the first image."""

    def measured(*given, **more):
        raise MeasuredError

    monkeypatch.setattr(
        forgetting, "run_settings", lambda url, role: TrainSettings(role=role, data="d", output=url, base="miniature")
    )
    monkeypatch.setattr(forgetting, "checkpoint_steps", lambda url: [0, 1])
    monkeypatch.setattr(worth, "write_subjects", measured)
    for module in (choose, claim_here, forgetting, own_words):
        monkeypatch.setattr(module, "load_scorers", measured)
        monkeypatch.setattr(module, "load_pipeline", measured)
    for name, measure in {
        "choose": lambda folder, n: choose.measure("miniature", n, "cpu", folder),
        "claim": lambda folder, n: claim_here.claim_here(folder, "miniature", n, 1, QUICK, "cpu"),
        "words": lambda folder, n: own_words.measure("miniature", n, "cpu", folder),
        "forgetting": lambda folder, n: forgetting.measure(folder, "tdm", "sdm", sampler=Sampler(steps=n)),
        "worth": lambda folder, n: worth.make_datasets(folder, n, 2, 2, "miniature"),
    }.items():
        for _ in range(2):
            with pytest.raises(MeasuredError):
                measure(tmp_path / name, 2)
        with pytest.raises(InputError, match="holds scores with other"):
            measure(tmp_path / name, 3)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_steps_are_paired_by_their_share_of_the_training():
    assert checkpoint_models.paired_steps([0, 100, 200], [0, 90, 180, 270, 360]) == [(0, 0), (100, 180), (200, 360)]
    with pytest.raises(InputError, match="after 50% of the TDM's training the SDM's has no checkpoint"):
        checkpoint_models.paired_steps([0, 100, 200], [0, 360])


def test_forgetting_goes_from_the_base_to_the_end_and_on_where_it_stopped(trained, tmp_path, monkeypatch):
    measured = []
    real = forgetting.score_images
    monkeypatch.setattr(forgetting, "score_images", lambda *given: measured.append(given[4]) or real(*given))
    given = dict(people=1, sampler=QUICK, prompts=PROMPTS[:1])
    cut = forgetting.measure(tmp_path, **trained, **given, time_left=lambda: len(measured) < 5)
    assert {row["share"] for row in cut} == {0} and len(measured) == 5
    rows = forgetting.measure(tmp_path, **trained, **given)
    assert len(measured) == 15 and sorted({row["share"] for row in rows}) == [0, 0.5, 1]
    assert {row["curve"] for row in rows} == {*forgetting.METHODS, *forgetting.PLAIN_CURVES}
    assert {(row["tdm_step"], row["sdm_step"]) for row in rows} == {(0, 0), (1, 2), (2, 4)}

    def pc(curve: str, share: float) -> float:
        found = [row for row in rows if (row["curve"], row["share"], row["metric"]) == (curve, share, "pc")]
        return found[0]["mean"]

    # Both are the base at first; afterwards each is its own training's.
    assert pc("TDM", 0) == pc(forgetting.PLAIN, 0) and pc("TDM", 0.5) != pc("TDM", 0)
    assert pc("TDM", 1) != pc(forgetting.PLAIN, 1) and pc("TDM", 1) == pc("tdm", 1)
    text = (tmp_path / "forgetting.csv").read_text().splitlines()
    assert text[0] == ",".join(rows[0]) and len(text) == len(rows) + 1
    assert (tmp_path / "forgetting.png").stat().st_size > 5000 and not list(tmp_path.rglob("models"))


def test_the_last_checkpoints_model_folder_has_the_trainings_results(trained, tmp_path):
    from safetensors.torch import load_file

    from facediffuser.modelfolder import assemble, resolve_base

    base = resolve_base("miniature")
    checkpoint_models.write_models(base, trained["tdm"], 2, trained["sdm"], 4, tmp_path / "last")
    assemble(base, trained["tdm"], trained["sdm"], tmp_path / "assembled")
    for part in ("unet", "unet_text", "image_encoder", "subject_fuser"):
        ours, theirs = (
            load_file(next((tmp_path / name / part).glob("*.safetensors"))) for name in ("last", "assembled")
        )
        assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


# --- choices and words ------------------------------------------------------------------------------------------------


def test_nothing_that_is_chosen_is_chosen_on_the_claims_people_or_prompts():
    claims = {prompt.text for name in claim_here.SUITES for prompt in suite(name)}
    assert len({prompt.text for prompt in choose.PROMPTS}) == 16 and not claims & {one.text for one in choose.PROMPTS}
    firsts = [module.FIRST_PERSON for module in (claim_here, choose, forgetting, own_words, methods)]
    assert min(np.diff(sorted(firsts))) >= 500_000


def test_the_choice_is_the_best_by_its_criterion_and_the_claim_reads_it(tmp_path, monkeypatch):
    from facediffuser.flows.flow_settings import ClaimSettings

    file = tmp_path / "choice.json"
    given = dict(guidances=(2.5,), starts=(0,), ends=(1, 2), steps=2, prompts=PROMPTS)
    choice = choose.choose(file, "miniature", 2, "cpu", **given)
    best = max(choice["candidates"], key=lambda line: line["criterion"])
    assert len(choice["candidates"]) == 2 and choice["fusion_end"] == best["fusion_end"]
    said = ClaimSettings(choice=file).chosen()
    assert (said.steps, said.guidance_scale, said.fusion_window) == (2, 2.5, (0, best["fusion_end"]))
    assert claim_here.chosen_sampler(file).window == (0, best["fusion_end"])
    assert json.loads(file.read_text())["made_from"]["prompts"] == [one.text for one in PROMPTS]


def test_every_prompt_in_peoples_own_words_has_one_that_no_caption_has():
    said = [*SCENES.values(), *ACTIONS.values(), *COLOURS, *HATS, *STYLES, *EXPRESSIONS]
    captions = set(" ".join([*said, "a an and of wearing shirt man woman person"]).split())
    for prompt in own_words.PROMPTS:
        words = re.findall(r"[a-z]+", prompt.text)
        assert set(words) - captions, prompt.text
        assert set(re.findall(r"[a-z]+", prompt.meaning)) <= captions


@pytest.mark.slow
def test_the_claim_is_measured_in_sets_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_here, "suite", lambda name: PROMPTS[:1] if name == "miniature-30" else PROMPTS[1:])
    monkeypatch.setattr(claim_here, "SET_SIZE", 2)
    monkeypatch.setattr(
        claim_here, "rendered_gate", lambda first, people: {("photo", 1): (9, 10), ("photo", 2): (8, 10)}
    )
    left = iter([True] * 3 + [False])
    assert claim_here.claim_here(tmp_path, "miniature", 4, 1, QUICK, "cpu", lambda: next(left)) is None
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(kept) == 3 and not (tmp_path / "claim.md").exists()
    text = claim_here.claim_here(tmp_path, "miniature", 4, 1, QUICK, "cpu")
    assert text == (tmp_path / "claim.md").read_text() and "people 3 to 4" in text and "0.900 of 10" in text
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(now) == 8 and kept.items() <= now.items()
