"""A run in fast mode and its certificate: what is made, what it says, how it resumes, how it fails."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from facediffuser.dataset.certificate import choose_sample, dataset_certificate, part_keys, sample_size
from facediffuser.dataset.manifest import read_manifest
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.evaluation.certificate_summary import failure, summarise
from facediffuser.generation.certify import CertificateWorker, certificate_parts, missing_parts, similarity
from facediffuser.generation.generate_settings import RemakeSettings
from facediffuser.generation.job import prepare
from facediffuser.generation.repair import remake
from facediffuser.means import Means
from facediffuser.storage import open_store
from facediffuser.tasks.generate import CertificateError, certify_dataset, finish_dataset, generate_shards, plan_dataset
from facediffuser.tasks.local_driver import LocalDriver

FAST = {
    "steps": 6, "fast_steps": 4, "guidance_every": 2, "unguided_subject": 0.5, "deep_every": 2, "images_per_prompt": 3,
    "scheduler": "pndm",
}  # fmt: skip


def run(settings):
    """Make a dataset in this process; return its job and what the flow's tasks returned."""
    job = plan_dataset.fn(settings, LocalDriver()).job
    generate_shards.fn(job, driver=LocalDriver())
    certificate = certify_dataset.fn(job, driver=LocalDriver())
    return job, certificate, finish_dataset.fn(job, certificate)


@pytest.fixture(scope="module")
def certified(world, tmp_path_factory):
    """(settings, job, certificate) of a finished run in fast mode: 18 rows, all of them in the sample, in two parts."""
    settings = world.settings(tmp_path_factory.mktemp("fast") / "dataset", max_loss=1.0, **FAST)
    job, certificate, _ = run(settings)
    return settings, job, certificate


def test_the_dataset_says_what_was_made_and_what_it_stands_for(certified):
    settings, job, certificate = certified
    row = pq.read_table(f"{settings.output}/data/shard-00000-of-00006.parquet").slice(0, 1).to_pylist()[0]
    assert (row["num_inference_steps"], row["scheduler"]) == (4, "DPMSolverMultistepScheduler")
    assert job.run["settings"]["speed"] == {
        "means": {"guidance_every": 2, "unguided_subject": 0.5, "deep_every": 2},
        "exact": {"num_inference_steps": 6, "fusion_start": 2, "fusion_end": 4, "scheduler": "PNDMScheduler"},
    }
    assert read_manifest(job.store()).certificate == certificate == dataset_certificate(job.store())
    assert (certificate["sample"], certificate["pairs"]) == (18, 18)
    assert certificate["unet_rows"]["fast"] < certificate["unet_rows"]["exact"] == 2 * 2 + 2 * 4 + 3 * 2
    assert certificate["images_per_second"]["fast"] > 0 and 0 <= certificate["mask_cells"] <= 1
    assert certificate["ssim"] < 0.999
    assert verify(settings.output) == []


def test_the_pairs_are_those_of_a_run_in_exact_mode(certified, world, tmp_path):
    settings, job, _ = certified
    others = {name: FAST[name] for name in ("steps", "images_per_prompt", "scheduler")}
    exact = prepare(world.settings(tmp_path / "exact", **others))
    exact.write()
    generate_shards.fn(exact.job, driver=LocalDriver())
    files = sorted((tmp_path / "exact" / "data").glob("*.parquet"))
    rows = {row["sample_id"]: row for file in files for row in pq.read_table(file).to_pylist()}
    pairs = [row for key in part_keys(18) for row in pq.read_table(f"{settings.output}/{key}").to_pylist()]
    assert {row["sample_id"] for row in pairs} == rows.keys()
    for pair in pairs:
        row = rows[pair["sample_id"]]
        assert pair["exact_pc"] == pytest.approx(row["pc"], abs=1e-5)
        # Batches are others, so last bits may differ; the images may not.
        assert similarity(*(_pixels(one["image"]["bytes"]) for one in (pair, row))) > 0.999
    made = {row["sample_id"]: row for n in range(6) for row in pq.read_table(
        f"{settings.output}/data/shard-0000{n}-of-00006.parquet").to_pylist()}  # fmt: skip
    assert all(pair["fast_pc"] == made[pair["sample_id"]]["pc"] for pair in pairs)


def _pixels(data: bytes) -> np.ndarray:
    from facediffuser.pictures import stored_picture

    return np.asarray(stored_picture(data))


def test_an_image_of_a_run_in_fast_mode_is_made_again_from_its_row(certified):
    settings, job, _ = certified
    name = pq.read_table(f"{settings.output}/data/shard-00002-of-00006.parquet")["sample_id"][1].as_py()
    assert remake(RemakeSettings(sample_id=name, dataset=str(settings.output)), gpu=False).equal


def test_the_card_shows_the_certificate(certified):
    settings, _, certificate = certified
    readme = open_store(settings.output).get("README.md").decode()
    page = open_store(settings.output).get("card/index.html").decode()
    for text in (readme, page):
        assert "Certificate" in text and "18 of 18 rows chosen by hash" in text
        assert f"{certificate['unet_rows']['fast']:.4g} fast, 18 exact" in text


def test_an_interrupted_certificate_resumes_to_the_same_bytes(certified, world, tmp_path):
    """Killed between two parts: only the missing one is made."""
    settings = world.settings(tmp_path / "dataset", max_loss=1.0, **FAST)
    job = plan_dataset.fn(settings, LocalDriver()).job
    generate_shards.fn(job, driver=LocalDriver())
    before = [made[1] for made in (certified, (None, job))]
    first, second = part_keys(18)

    class Killed(CertificateWorker):
        def __call__(self, unit):
            if unit.key == second:
                raise KeyboardInterrupt
            return super().__call__(unit)

    with pytest.raises(KeyboardInterrupt):
        certify_dataset.fn(job, Killed, LocalDriver())
    assert missing_parts(job, certificate_parts(job)) == [second]
    made: list[str] = []

    class Counted(CertificateWorker):
        def __call__(self, unit):
            made.append(unit.key)
            return super().__call__(unit)

    # The same command, on an output whose run is the same.
    assert plan_dataset.fn(settings, LocalDriver()).job.fingerprint == job.fingerprint
    certificate = certify_dataset.fn(job, Counted, LocalDriver())
    assert made == [second]
    finish_dataset.fn(job, certificate)
    for key in (first, second):
        assert before[0].store().get(key) == job.store().get(key)
    assert verify(settings.output) == []
    # Cut short by hand: it is made once more.
    job.store().put(first, job.store().get(first)[:-10])
    assert verify(settings.output)[0].startswith(f"{first}: sha256 differs")
    # Once it is removed, the same command makes it and nothing else.
    assert verify(settings.output)[0].endswith("remove it and let `generate`, with its options, make it again")
    job.store().delete(first)
    assert verify(settings.output)[0] == f"{first}: missing; let `generate`, with its options, make it again"
    made.clear()
    finish_dataset.fn(job, certify_dataset.fn(job, Counted, LocalDriver()))
    assert made == [first] and verify(settings.output) == []


def test_a_certificate_that_fails_fails_the_run_in_one_line(certified, world, tmp_path):
    class Worse(CertificateWorker):
        def _read(self, store, places):
            planned, made = super()._read(store, places)
            return planned, [row | {"pc": row["pc"] - 0.2} for row in made]

    settings, *_ = certified
    settings = world.settings(tmp_path / "dataset", **FAST)
    job = plan_dataset.fn(settings, LocalDriver()).job
    generate_shards.fn(job, driver=LocalDriver())
    certificate = certify_dataset.fn(job, Worse, LocalDriver())
    with pytest.raises(CertificateError) as raised:
        finish_dataset.fn(job, certificate)
    line = str(raised.value)
    assert "\n" not in line and "fast mode loses PC -0." in line
    assert "over 18 pairs, more than --max-loss 0.01; leave --speed fast out" in line
    # The dataset is whole all the same, and says so.
    assert verify(settings.output) == []
    assert read_manifest(job.store()).certificate["verdict"] == "failed"
    assert "failed: at most 0.01" in job.store().get("README.md").decode()


def test_a_certificate_on_s3_is_made_and_verified(world, s3_bucket):
    url = f"{s3_bucket.url}/fast"
    job, certificate, _ = run(world.settings(url, max_loss=1.0, **FAST | {"images_per_prompt": 1}))
    assert certificate["pairs"] == 6 and verify(url) == []
    store = open_store(url)
    assert store.exists(part_keys(6)[0])
    store.put("certificate/certificate.json", json.dumps(certificate | {"pairs": 7}).encode())
    assert verify(url)[0].startswith("certificate/certificate.json: sha256 differs")


def test_a_run_in_exact_mode_has_neither_certificate_nor_another_identity(made):
    job, _ = made
    assert "speed" not in job.run["settings"]
    assert certify_dataset.fn(job, driver=LocalDriver()) is None


@pytest.mark.parametrize("rows,expected", [(1, 1), (64, 64), (500, 64), (6_400, 64), (10_000, 100), (1_000_000, 1_000)])
def test_the_size_of_the_sample(rows, expected):
    assert sample_size(rows) == expected


def test_the_sample_is_the_same_for_the_same_plan_and_spread_over_it(certified):
    _, job, _ = certified
    everything = choose_sample(job.store(), job.layout)
    assert everything == [(shard, place) for shard in range(6) for place in range(3)]


def test_means_given_by_themselves_and_by_speed(world, tmp_path):
    def settings(**given):
        return world.settings(tmp_path, **({"steps": 50} | given))

    assert not settings().accelerated
    assert settings(guidance_every=3).means == Means(guidance_every=3)
    assert settings(guidance_every=3).sampled_steps == 50
    fast = settings(speed="fast")
    assert fast.accelerated and fast.sampled_steps < 50
    assert fast.means != Means()
    assert settings(speed="fast", unguided_subject=0).means == Means()
    assert settings(speed="fast", encoder_every=2).means.deep_every == 1
    # The window is that of exact mode, scaled.
    assert settings(fast_steps=10, fusion_start=20, fusion_end=40).sampled_window == (4, 8)


@pytest.mark.parametrize(
    "given,message",
    [
        ({"steps": 20, "fast_steps": 20}, "fast_steps 20: exact mode takes 20 steps; give fewer"),
        ({"steps": 20, "fast_scheduler": "unipc"}, "fast_scheduler unipc: of fewer steps"),
        ({"deep_every": 2, "encoder_every": 2}, "deep_every and encoder_every: both keep features"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(world, tmp_path, given, message):
    with pytest.raises(ValidationError, match=message):
        world.settings(tmp_path, **given)


def test_what_a_certificate_says():
    rows = [
        {"status": "ok", "subject_ids": [f"person{n % 8}"], "prompt_id": f"prompt{n % 5}", "exact_ip": 0.5, "fast_ip": 0.46,
         "exact_pc": 0.25, "fast_pc": 0.25, "exact_faces": 1, "fast_faces": 1 + (n == 0), "mask_cells": 0.1, "ssim": 0.8}
        for n in range(40)
    ]  # fmt: skip
    rows.append({name: None for name in rows[0]} | {"status": "failed", "subject_ids": ["person1"]})
    timings = [{"rows": 41, "seconds": {"fast": 2.0, "exact": 16.0}, "cost": {"fast": 16.5, "exact": 132.0}}]
    found = summarise(rows, timings, 0.01)
    assert (found["sample"], found["pairs"], found["verdict"]) == (41, 40, "failed")
    assert found["differences"]["ip"]["high"] == pytest.approx(-0.04)
    assert found["differences"]["faces"]["mean"] == pytest.approx(-1 / 40)
    assert found["images_per_second"] == {"fast": 20.5, "exact": 2.5625}
    assert failure(found).startswith("fast mode loses IP -0.040 (-0.040 to -0.040) against exact mode over 40 pairs")
    assert failure(summarise(rows, timings, 0.05)) is None
    assert summarise(rows, timings, 0.05)["verdict"] == "passed"
    # Nothing to compare decides nothing.
    assert summarise(rows[-1:], timings, 0.01)["verdict"] == "undecided"
    unsure = [row | {"fast_ip": 0.5 + (0.2 if int(row["prompt_id"][-1]) % 2 else -0.2)} for row in rows[:-1]]
    assert summarise(unsure, timings, 0.01)["verdict"] == "undecided"


def test_a_summary_that_cannot_be_read_is_one_line(tmp_path):
    store = open_store(str(tmp_path))
    store.put("certificate/certificate.json", b"[1")
    with pytest.raises(InputError, match=r"certificate\.json: not a certificate; remove it"):
        dataset_certificate(store)
