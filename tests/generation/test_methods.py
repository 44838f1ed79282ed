"""`evaluate --benchmark`: the images of every method are made where missing, from the same rows, into one table."""

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from world import save_prompts

from facediffuser.errors import InputError
from facediffuser.evaluation.benchmark_runs import benchmark_runs
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.flows import evaluate as evaluate_flow
from facediffuser.flows.evaluate import evaluate
from facediffuser.generation.job import prepare
from facediffuser.generation.shard_generator import ShardGenerator
from facediffuser.storage import open_store


@pytest.fixture
def settings(world, tmp_path):
    """One prompt for one and one for two people, two methods."""
    single = save_prompts(tmp_path / "single.jsonl", [{"prompt": "a {subject} in the park", "prompt_id": "park"}])
    pairs = save_prompts(tmp_path / "pairs.jsonl", [{"prompt": "a {subject_1} and a {subject_2}", "prompt_id": "two"}])
    return EvaluateSettings(
        benchmark=f"{single},{pairs}", models=str(world.models), subjects=str(world.subjects), methods="sdm,tdm",
        scorers=str(world.scorers), output=str(tmp_path / "out"), steps=2, workers=1, device="cpu",
    )  # fmt: skip


@pytest.fixture
def without_ray(monkeypatch):
    """Let this process make the shards that Ray's workers would make: the flow `generate-dataset` has its own tests."""

    def generate(run):
        prepared = prepare(run)
        prepared.write()
        generator = ShardGenerator(prepared.job)
        for shard in range(prepared.job.layout.shards):
            generator(shard)
        return {"output": prepared.job.output}

    monkeypatch.setattr(evaluate_flow, "generate_dataset", generate)


def test_every_run_samples_as_asked(settings):
    told = {"scheduler": "dpm", "guidance_scale": 2.5, "fusion_start": 0, "fusion_end": 1, "steps": 2, "seed": 7}
    runs = benchmark_runs(settings.model_copy(update=told))
    assert len(runs) == 4
    assert all({name: getattr(run, name) for name in told} == told for run in runs)


def test_methods_make_the_same_rows_and_meet_in_one_table(settings, without_ray, prefect_harness):
    text = evaluate(settings)
    store = open_store(settings.output)
    scores = pq.read_table(f"{settings.output}/scores.parquet").to_pylist()
    of_method = {name: [row["sample_id"] for row in scores if row["method"] == name] for name in ("sdm", "tdm")}
    assert of_method["sdm"] == of_method["tdm"] == ["ada~park~0", "bob~park~0", "ada+bob~two~0"]
    seeds = [pq.read_table(f"{settings.output}/images/single/{name}/data", columns=["seed"]) for name in ("sdm", "tdm")]
    assert seeds[0] == seeds[1]
    assert "| method | single: images |" in text and "sdm − tdm" in text and "| ada | 2 |" in text
    assert {"table.md", "table.parquet", "per_subject.parquet", "differences.parquet", "plot.png"} <= {
        info.key for info in store.list()
    }
    store.delete("images/pairs/tdm/data/shard-00000-of-00001.parquet")
    kept = {info.key: info.version for info in store.list("images/single/") if "/data/" in info.key}
    assert evaluate(settings) == text
    assert {info.key: info.version for info in store.list("images/single/") if "/data/" in info.key} == kept


def test_every_suite_and_method_is_a_run_of_its_own(settings):
    runs = benchmark_runs(settings.model_copy(update={"subject_sets": 1}))
    places = [(run.output.rsplit("/", 2)[-2], run.method) for run in runs]
    assert places == [("single", "sdm"), ("single", "tdm"), ("pairs", "sdm"), ("pairs", "tdm")]
    assert len({run.output for run in runs}) == 4 and {run.subject_sets for run in runs} == {1}


def test_images_of_other_systems_are_scored_by_the_same_scorers(settings):
    given = settings.model_dump(exclude_unset=True, exclude={"scorers"})
    assert {run.scorers for run in benchmark_runs(EvaluateSettings(**given))} == {None}  # those of the models
    beside = EvaluateSettings(**given, images="theirs=out/theirs", prompts="single-30")
    assert {run.scorers for run in benchmark_runs(beside)} == {"paper"}


def test_more_subjects_than_there_are_is_reported_before_anything_is_made(settings, tmp_path):
    wanted = save_prompts(tmp_path / "three.jsonl", [{"prompt": "{subject_1}, {subject_2} and {subject_3}"}])
    with pytest.raises(InputError, match="2 subjects, and .*three.jsonl shows 3 in an image"):
        benchmark_runs(settings.model_copy(update={"benchmark": [str(wanted)]}))
    with pytest.raises(InputError, match="no such file"):
        benchmark_runs(settings.model_copy(update={"benchmark": [str(tmp_path / "none.jsonl")]}))


@pytest.mark.parametrize(("left_out", "says"), [("models", "--benchmark needs --models"), ("output", "needs --output")])
def test_a_benchmark_needs_models_and_an_output(settings, left_out, says):
    given = settings.model_dump()
    with pytest.raises(ValidationError, match=says):
        EvaluateSettings(**(given | {left_out: None}))
    with pytest.raises(ValidationError, match="methods.1\n  Input should be 'face-diffuser', 'tdm'"):
        EvaluateSettings(**(given | {"methods": "sdm,ours"}))
