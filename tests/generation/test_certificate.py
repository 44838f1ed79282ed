"""A run in fast mode and its certificate: what is made, what it says, how it resumes, how it fails."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from world import save_prompts

from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.curation.curation_settings import MergeSettings, RetractSettings
from facediffuser.curation.merge import merge_stage
from facediffuser.curation.retract import retract_stage
from facediffuser.dataset.certificate import (
    certified_part,
    choose_sample,
    dataset_certificate,
    dataset_certificates,
    encode_rows,
    part_keys,
    renamed_key,
    sample_size,
    stats_key,
    summary_bytes,
    summary_key,
)
from facediffuser.dataset.extension import finished_part
from facediffuser.dataset.manifest import read_manifest
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.evaluation.certificate_summary import failure, summarise
from facediffuser.generation.certify import CertificateWorker, certificate_parts, missing_parts, similarity
from facediffuser.generation.estimate import estimate
from facediffuser.generation.generate_settings import RemakeSettings, RepairSettings
from facediffuser.generation.job import prepare
from facediffuser.generation.measured_rate import Rate, rate_of_dataset
from facediffuser.generation.repair import remake
from facediffuser.means import Means
from facediffuser.storage import open_store
from facediffuser.storage.local import LocalStore
from facediffuser.tasks.generate import (
    CertificateError,
    certify_dataset,
    estimate_run,
    finish_dataset,
    generate_shards,
    plan_dataset,
)
from facediffuser.tasks.local_driver import LocalDriver
from facediffuser.tasks.repair import find_damage, repair_damage, update_manifest

pytestmark = pytest.mark.usefixtures("local_driver")

FAST = {
    "steps": 4, "fast_steps": 3, "guidance_every": 2, "unguided_subject": 0.5, "deep_every": 2, "images_per_prompt": 3,
    "scheduler": "pndm", "batch_size": 3,
}  # fmt: skip


def run(settings):
    """Make a dataset in this process; return its job and what the flow's tasks returned."""
    job = plan_dataset.fn(settings).job
    generate_shards.fn(job)
    certificate = certify_dataset.fn(job)
    return job, certificate, finish_dataset.fn(job, certificate)


@pytest.fixture(scope="module")
def certified(world, tmp_path_factory):
    """(settings, job, certificate) of a finished run in fast mode: 18 rows, all of them in the sample, in two parts."""
    settings = world.settings(tmp_path_factory.mktemp("fast") / "dataset", max_loss=1.0, **FAST)
    job, certificate, _ = run(settings)
    return settings, job, certificate


@pytest.fixture
def copied(certified, tmp_path):
    """(settings, job) of a copy of the finished run."""
    settings, job, _ = certified
    shutil.copytree(settings.output, tmp_path / "copy")
    settings = settings.model_copy(update={"output": str(tmp_path / "copy")})
    return settings, replace(job, output=settings.output)


def stop_before_the_end(store) -> None:
    """Take away what is made after the first part of the certificate."""
    key = part_keys(18)[1]
    for prefix in (key, stats_key(key), summary_key(), "manifest.json", "README.md", "card/"):
        for info in store.list(prefix):
            store.delete(info.key)


def contents(store) -> dict[str, bytes]:
    """The objects of a dataset but for the workers' timings."""
    return {info.key: store.get(info.key) for info in store.list() if not info.key.startswith("stats/")}


def repair(url) -> list[str]:
    settings = RepairSettings(url=str(url))
    return repair_damage.fn(settings, *find_damage.fn(settings))


def test_the_dataset_says_what_was_made_and_what_it_stands_for(certified):
    settings, job, certificate = certified
    row = pq.read_table(f"{settings.output}/data/shard-00000-of-00006.parquet").slice(0, 1).to_pylist()[0]
    assert (row["num_inference_steps"], row["scheduler"]) == (3, "DPMSolverMultistepScheduler")
    assert job.run["settings"]["speed"] == {
        "means": {"guidance_every": 2, "unguided_subject": 0.5, "deep_every": 2},
        "exact": {"num_inference_steps": 4, "fusion_start": 1, "fusion_end": 2, "scheduler": "PNDMScheduler"},
    }
    assert read_manifest(job.store()).certificate == certificate == dataset_certificate(job.store())
    assert (certificate["sample"], certificate["pairs"]) == (18, 18)
    assert certificate["unet_rows"]["fast"] < certificate["unet_rows"]["exact"] == 1 * 2 + 1 * 4 + 3 * 2
    assert certificate["images_per_second"]["fast"] > 0 and 0 <= certificate["mask_cells"] <= 1
    assert certificate["ssim"] < 0.999
    assert verify(settings.output) == []


def test_the_pairs_are_those_of_a_run_in_exact_mode(certified, world, tmp_path):
    settings, job, _ = certified
    others = {name: FAST[name] for name in ("steps", "scheduler")}
    exact = prepare(world.settings(tmp_path / "exact", images_per_prompt=1, **others))
    exact.write()
    generate_shards.fn(exact.job)
    files = sorted((tmp_path / "exact" / "data").glob("*.parquet"))
    rows = {row["sample_id"]: row for file in files for row in pq.read_table(file).to_pylist()}
    pairs = [row for key in part_keys(18) for row in pq.read_table(f"{settings.output}/{key}").to_pylist()]
    assert len(rows) == 6 and {row["sample_id"] for row in pairs} >= rows.keys()
    for pair in (pair for pair in pairs if pair["sample_id"] in rows):
        row = rows[pair["sample_id"]]
        assert pair["exact_pc"] == pytest.approx(row["pc"], abs=1e-3)
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
        assert f"{certificate['unet_rows']['fast']:.4g} fast, 12 exact" in text


def test_an_interrupted_certificate_resumes_to_the_same_bytes(certified, copied):
    """Stopped between two parts: only the missing one is made."""
    settings, job = copied
    stop_before_the_end(job.store())
    first, second = part_keys(18)
    assert missing_parts(job, certificate_parts(job)) == [second]
    made: list[str] = []

    class Counted(CertificateWorker):
        def __call__(self, unit):
            made.append(unit.key)
            return super().__call__(unit)

    # The same command, on an output whose run is the same.
    assert plan_dataset.fn(settings).job.fingerprint == job.fingerprint
    finish_dataset.fn(job, certify_dataset.fn(job, Counted))
    assert made == [second]
    for key in (first, second):
        assert certified[1].store().get(key) == job.store().get(key)
    assert verify(settings.output) == []


def test_repair_makes_what_is_lost_of_a_certificate_to_the_same_bytes_and_nothing_else(copied):
    settings, job = copied
    store, before = job.store(), contents(job.store())
    first, second = part_keys(18)
    store.put(first, before[first][:-10])
    store.delete(second)
    store.put(summary_key(), b"{}")
    lines = verify(settings.output)
    assert [line.partition(": ")[0] for line in lines] == [summary_key(), first, second]
    assert lines[1].startswith(f"{first}: sha256 differs") and lines[2].startswith(f"{second}: missing")
    assert all(line.endswith("; `facediffuser repair` makes it again") for line in lines)
    store.put(first, before[first])
    assert repair(settings.output) == [] and contents(store) == before
    assert verify(settings.output) == []


def test_a_manifest_keeps_the_certificate_when_a_shard_is_listed_anew(copied):
    settings, job = copied
    store, manifest = job.store(), read_manifest(job.store())
    stats = json.loads(store.get(job.layout.stats_key(0)))
    update_manifest(settings.output, manifest, {0: {0: stats}})
    assert read_manifest(store).certificate == manifest.certificate is not None
    assert all("`facediffuser card` lists it" in line for line in verify(settings.output))
    rewrite_card(store)
    assert verify(settings.output) == []


def test_rows_that_are_added_have_a_certificate_of_their_own(copied, tmp_path):
    settings, job = copied
    before = {key: data for key, data in contents(job.store()).items() if key.startswith(("certificate/", "data/"))}
    rows = [json.loads(line) for line in open(settings.prompts)]
    more = save_prompts(tmp_path / "more.jsonl", [*rows, {"prompt": "{subject} at night", "prompt_id": "night"}])
    settings = settings.model_copy(update={"prompts": str(more), "extend": True})
    added = plan_dataset.fn(settings).job
    generate_shards.fn(added)
    certificate = certify_dataset.fn(added)
    [begun] = verify(settings.output)
    assert "rows are being added, and that is not finished" in begun
    finish_dataset.fn(added, certificate)
    assert added.layout.name == "p0002" and certificate["pairs"] == 6 == certificate["sample"]
    manifest = read_manifest(added.store())
    assert [part.certificate["sample"] for part in manifest.parts] == [18, 6]
    assert dataset_certificates(added.store()) == {part.name: part.certificate for part in manifest.parts}
    after = contents(added.store())
    assert {key: after[key] for key in before} == before
    assert [key for key in after if key.startswith("certificate/") and key not in before] == [
        summary_key("p0002"), *part_keys(6, name="p0002")
    ]  # fmt: skip
    assert verify(settings.output) == []
    readme, page = after["README.md"].decode(), after["card/index.html"].decode()
    for text in (readme, page):
        assert "data/shard-0*" in text and "data/shard-p0002-*" in text and "6 of 6 rows chosen by hash" in text
    # Repeated it adds nothing, and what is lost of the added part is made again.
    again = plan_dataset.fn(settings).job
    assert certify_dataset.fn(again) is None
    added.store().delete(part_keys(6, name="p0002")[0])
    assert repair(settings.output) == [] and contents(added.store()) == after
    # Where the manifest is lost, it is written again of what lies there.
    assert [finished_part(added.store(), part.name).certificate for part in manifest.parts] == [
        part.certificate for part in manifest.parts
    ]


def test_a_merged_dataset_keeps_its_certificates_also_when_people_are_taken_out(certified, world, tmp_path):
    settings, job, certificate = certified
    night = save_prompts(tmp_path / "night.jsonl", [{"prompt": "{subject} at night", "prompt_id": "night"}])
    other, _, _ = run(world.settings(tmp_path / "other", prompts=str(night), images_per_prompt=1))
    both = tmp_path / "both"
    LocalDriver().run(merge_stage(MergeSettings(urls=[other.output, str(settings.output)], output=str(both))))
    manifest = read_manifest(open_store(both))
    assert [part.certificate for part in manifest.parts] == [None, certificate] and verify(str(both)) == []
    store, keys = open_store(both), part_keys(18, name="p0002")
    for key, there in zip(keys, part_keys(18), strict=True):
        assert store.get(key) == job.store().get(there)
    before = contents(store)
    store.put(keys[1], before[keys[1]][:-10])
    store.delete(summary_key("p0002"))
    assert repair(both) == [] and contents(store) == before
    # Their images in exact mode go, too; what was measured stays.
    LocalDriver().run(retract_stage(RetractSettings(url=str(both), subject="ada")))
    assert verify(str(both)) == []
    left = [row for key in keys for row in pq.read_table(both / key).to_pylist()]
    assert len(left) == 9 and all(row["subject_ids"] == ["bob"] for row in left)
    assert read_manifest(store).parts[1].certificate == certificate
    store.delete(keys[1])
    assert repair(both) == [
        f"{keys[1]}: of rows that were there before people were taken out, and cannot be made again; put it back, or let "
        "`facediffuser card` list the others"
    ]


def test_two_drivers_whose_certificates_took_other_times_both_end_well(copied, monkeypatch):
    job = copied[1]
    store, put, waiting = job.store(), LocalStore.put, ["README.md"]
    mine = certify_dataset.fn(job)
    theirs = mine | {"images_per_second": {name: 2 * rate for name, rate in mine["images_per_second"].items()}}
    for prefix in ("manifest.json", "README.md", "card/"):
        for info in store.list(prefix):
            store.delete(info.key)

    def watched(self, key, *given, **options):
        if key in waiting:
            waiting.remove(key)
            put(self, summary_key(), summary_bytes(theirs))
            finish_dataset.fn(job, theirs)
        return put(self, key, *given, **options)

    monkeypatch.setattr(LocalStore, "put", watched)
    assert finish_dataset.fn(job, mine).certificate == mine and not waiting
    assert read_manifest(store).certificate == dataset_certificate(store) == mine
    assert verify(store.url) == []


def test_the_keys_of_a_certificate_say_of_which_part_it_is():
    for name in ("", "p0002", "p1000000"[:6]):
        keys = [*part_keys(40, name=name), summary_key(name)]
        assert [certified_part(key) for key in keys] == [name] * 4
        for other in ("", "p0003"):
            assert [renamed_key(key, other) for key in keys] == [*part_keys(40, name=other), summary_key(other)]
    for key in ("certificate/notes.txt", "certificate/part-p2.parquet", "data/shard-00000-of-00001.parquet"):
        assert certified_part(key) is None


def test_a_certificate_that_fails_fails_the_run_in_one_line(copied):
    settings = copied[0].model_copy(update={"max_loss": 0.01})
    job = plan_dataset.fn(settings).job
    for key in part_keys(18):
        with job.store().open(key) as file:
            table = pq.read_table(file)
        rows = [row | {"fast_pc": row["exact_pc"] - 0.2} for row in table.to_pylist()]
        job.store().put(key, encode_rows(rows, table.schema))
    job.store().delete("manifest.json")  # it lists the parts as they were
    certificate = certify_dataset.fn(job)
    with pytest.raises(CertificateError) as raised:
        finish_dataset.fn(job, certificate)
    line = str(raised.value)
    assert "\n" not in line and "fast mode loses PC -0.200 (-0.200 to -0.200)" in line
    assert line.endswith(
        "over 18 pairs, more than --max-loss 0.01; leave --fast-steps 3 and --guidance-every 2 and --unguided-subject 0.5 "
        "and --deep-every 2 out, or give more --fast-steps"
    )
    # The dataset is whole all the same, and says so.
    assert verify(settings.output) == []
    assert read_manifest(job.store()).certificate["verdict"] == "failed"
    assert "failed: at most 0.01" in job.store().get("README.md").decode()


def test_a_certificate_on_s3_is_made_and_verified(world, s3_bucket, tmp_path):
    night = save_prompts(tmp_path / "night.jsonl", [{"prompt": "{subject} at night", "prompt_id": "night"}])
    given = {"prompts": str(night), "images_per_prompt": 1, "max_loss": 1.0}
    job, certificate, _ = run(world.settings(f"{s3_bucket.url}/fast", **FAST | given))
    assert certificate["pairs"] == 2 and verify(job.output) == []
    job.store().put(summary_key(), json.dumps(certificate | {"pairs": 7}).encode())
    assert verify(job.output)[0].startswith("certificate/certificate.json: sha256 differs")


def test_a_run_in_exact_mode_has_neither_certificate_nor_another_identity(made):
    job, _ = made
    assert "speed" not in job.run["settings"]
    assert certify_dataset.fn(job) is None


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


@pytest.mark.parametrize(
    "given,options",
    [
        ({"speed": "fast"}, ("--speed fast",)),
        ({"speed": "fast", "fast_steps": 9, "in_fusion": True}, ("--speed fast", "--fast-steps 9", "--in-fusion")),
        ({"speed": "fast", "unguided_subject": 0, "deep_every": 1}, ("--speed fast",)),
        ({"encoder_every": 2, "merged": True}, ("--encoder-every 2",)),
        ({"unguided_text": 0.25, "deep_every": 3, "deep_layers": 2}, ("--unguided-text 0.25", "--deep-every 3")),
        ({}, ()),
    ],
)
def test_a_failure_names_the_options_that_were_given(world, tmp_path, given, options):
    assert world.settings(tmp_path, steps=50, **given).faster_options == options
    lost = {"mean": -0.1, "low": -0.2, "high": -0.05, "n": 64}
    found = {
        "verdict": "failed",
        "pairs": 64,
        "max_loss": 0.01,
        "differences": {"ip": lost, "pc": lost | {"high": 0.0}},
    }
    line = failure(found, options)
    assert "fast mode loses IP -0.100 (-0.200 to -0.050) against exact mode over 64 pairs" in line and "PC" not in line
    assert f"; leave {' and '.join(options) or 'fast mode'} out" in line
    assert line.endswith("or give more --fast-steps") == any("--speed" in one or "steps" in one for one in options)


def test_a_dry_run_counts_the_hours_of_the_certificate(certified, world, tmp_path):
    settings, job, _ = certified
    dry = world.settings(tmp_path / "dry", dry_run=True, **FAST)
    found = estimate_run.fn(dry, plan_dataset.fn(dry))
    assert 0 < found["certificate_hours"] < found["worker_hours"]
    # Of a dataset's own timings: both modes, a row.
    seconds = [json.loads(job.store().get(f"stats/certificate-000{n}-of-0002.json"))["seconds"] for n in range(2)]
    rate = rate_of_dataset(str(settings.output))
    assert rate.certificate_seconds == pytest.approx(sum(sum(one.values()) for one in seconds) / 18)
    known = Rate(0.5, 100.0, "cpu", "a test", 4.0)
    assert estimate(7_200, known, 3.0, 72)["worker_hours"] == 1.0 + 0.08
    assert (
        estimate(7_200, known, 3.0, 72)["certificate_hours"] == 0.08 and estimate(7_200, known, 3.0, 72)["cost"] == 3.24
    )
    assert "certificate_hours" not in estimate(7_200, known, None)
    unknown = estimate(7_200, Rate(0.5, 100.0, "cpu", "a test"), None, 72)
    assert unknown["certificate_hours"] is None and unknown["worker_hours"] == 1.0


def test_a_summary_that_cannot_be_read_is_one_line(tmp_path):
    store = open_store(str(tmp_path))
    store.put("certificate/certificate.json", b"[1")
    with pytest.raises(InputError, match=r"certificate\.json: not a certificate; remove it"):
        dataset_certificate(store)
