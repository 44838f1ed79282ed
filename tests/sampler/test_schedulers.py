"""Which scheduler samples where none is named, what is said of it, and how a pipeline gets it."""

import logging
from pathlib import Path

import pytest
from diffusers import PNDMScheduler

from facediffuser.explain import explain
from facediffuser.explain_settings import ExplainSettings
from facediffuser.schedulers import SCHEDULER_CLASSES, choose_scheduler, log_once, set_scheduler

DPM, PNDM, DDIM = "DPMSolverMultistepScheduler", "PNDMScheduler", "DDIMScheduler"


@pytest.fixture(autouse=True)
def nothing_said_yet(caplog):
    log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="facediffuser")


@pytest.mark.parametrize(("own", "steps", "chosen"), [
    (PNDM, 12, DPM), (PNDM, 49, DPM), (PNDM, 50, PNDM), (PNDM, 100, PNDM), (DDIM, 12, DDIM), (DPM, 1, DPM),
])  # fmt: skip
def test_a_models_own_scheduler_gives_way_where_it_does_not_bear_so_few_steps(caplog, own, steps, chosen):
    assert choose_scheduler(None, own, steps) == chosen
    assert [record.levelname for record in caplog.records] == ["INFO"] * (chosen != own)
    assert ("--scheduler pndm keeps it" in caplog.text) == (chosen != own)


@pytest.mark.parametrize("named", SCHEDULER_CLASSES)
@pytest.mark.parametrize("steps", [12, 50])
def test_a_scheduler_that_is_named_is_kept(caplog, named, steps):
    assert choose_scheduler(named, PNDM, steps) == SCHEDULER_CLASSES[named]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (named == "pndm" and steps < 50)
    assert not warned or "12 steps are too few" in warned[0]


def test_a_pipeline_warns_once_of_too_few_steps_and_keeps_its_scheduler(pipeline, picture, caplog):
    how = {"num_inference_steps": 3, "fusion_start": 1, "fusion_end": 2, "output_type": "latent"}
    for _ in range(2):
        pipeline("a man <|image|>", [picture(0)], **how)
    assert type(pipeline.scheduler).__name__ == PNDM
    assert caplog.text.count("3 steps are too few") == 1
    set_scheduler(pipeline, DPM)
    pipeline("a man <|image|>", [picture(0)], **how | {"num_inference_steps": 4})
    assert caplog.text.count("too few") == 1


@pytest.mark.parametrize("kind", SCHEDULER_CLASSES.values())
def test_a_pipelines_scheduler_is_configured_as_its_own_was_and_does_not_clip_latents(pipeline, kind):
    before = pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    set_scheduler(pipeline, kind)
    assert type(pipeline.scheduler).__name__ == kind
    for name in ("beta_start", "beta_end", "beta_schedule", "timestep_spacing", "steps_offset"):
        assert pipeline.scheduler.config[name] == before.config[name]
    assert not pipeline.scheduler.config.get("clip_sample")
    assert (pipeline.scheduler is before) == (kind == PNDM)


def test_the_picture_of_the_method_is_sampled_as_generate_would(pipeline, picture, tmp_path, caplog):
    pipeline.save_pretrained(tmp_path / "model")
    picture(0).save(tmp_path / "face.png")
    given = {"models": str(tmp_path / "model"), "prompt": "a man <|image|> reading", "reference": [tmp_path / "face.png"],
             "steps": 4, "columns": 2, "device": "cpu"}  # fmt: skip
    pictures = {
        name: Path(explain(ExplainSettings(**given, scheduler=name, output=tmp_path / f"{name}.png"))).read_bytes()
        for name in (None, "dpm", "pndm")
    }
    assert pictures[None] == pictures["dpm"] != pictures["pndm"]
    assert f"scheduler: {DPM}, because" in caplog.text
