"""What a training refuses: one line that names the thing and the mend, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
from training.prepared_rows import write_prepared

from facediffuser.errors import InputError
from facediffuser.preprocess.prepared_schema import PREPARED_SCHEMA, SCHEMA_KEY
from facediffuser.storage import open_store
from facediffuser.training import training_run as runs
from facediffuser.training.loop import train_model
from facediffuser.training.train_check import check_train
from facediffuser.training.train_settings import TrainSettings


def refusal(settings: TrainSettings) -> str:
    """Return the one line a training is refused with; nothing may have been written."""
    with pytest.raises(InputError) as refused:
        train_model(settings, lambda numbers: None)
    assert not open_store(settings.output).list("")
    line = str(refused.value)
    assert line and "\n" not in line
    return line


@pytest.fixture
def changed(base, tmp_path):
    """A function that copies the base and changes a part's configuration."""

    def change(part: str, file: str = "config.json", **values) -> str:
        other = Path(shutil.copytree(base, tmp_path / "base"))
        config = json.loads((other / part / file).read_text())
        (other / part / file).write_text(json.dumps(config | values))
        return str(other)

    return change


def test_no_prepared_data(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "facediffuser preprocess" in refusal(settings("tdm", data=str(tmp_path / "empty")))
    assert "facediffuser preprocess" in refusal(settings("tdm", data=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", None, "no manifest.json there"),
        ("manifest.json", b"{", "manifest.json: not a manifest"),
        ("manifest.json", b"{}", "manifest.json: not a manifest"),
        ("train/part-00000.parquet", None, "train/part-00000.parquet: missing"),
        ("test/part-00000.parquet", None, "test/part-00000.parquet: missing"),
        ("train/part-00001.parquet", b"PAR1", "train/part-00001.parquet: 4 bytes, the manifest says"),
    ],
)
def test_prepared_data_that_is_not_whole(settings, prepared, tmp_path, name, content, words):
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    if content is None:
        (data / name).unlink()
    else:
        (data / name).write_bytes(content)
    chosen = settings("tdm", data=str(data))
    assert words in refusal(chosen)
    with pytest.raises(InputError, match=words):
        check_train(chosen)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_whose_weights_are_missing_or_cut_short(settings, base, tmp_path, part):
    other = Path(shutil.copytree(base, tmp_path / "base"))
    [weights] = (other / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    chosen = settings("tdm", base=str(other))
    assert str(weights) in refusal(chosen)
    weights.unlink()
    with pytest.raises(InputError, match=f"{weights.name}: missing"):
        check_train(chosen)


def test_prepared_data_of_another_schema_version(settings, prepared, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(prepared / "train" / "part-00000.parquet").to_pylist()
    old = pa.schema(PREPARED_SCHEMA).with_metadata({**PREPARED_SCHEMA.metadata, SCHEMA_KEY: b"0"})
    write_prepared(tmp_path / "old", rows, old)
    line = refusal(settings("tdm", data=str(tmp_path / "old")))
    assert "version 0" in line and "prepare it again" in line


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_base_without_one_of_its_parts(settings, base, tmp_path, part):
    other = Path(shutil.copytree(base, tmp_path / "base"))
    shutil.rmtree(other / part)
    assert f"has no {part}/" in refusal(settings("tdm", base=str(other)))


@pytest.mark.parametrize(
    ("part", "values", "told"),
    [
        ("unet", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ("unet", {"addition_embed_type": "text_time"}, "SDXL"),
        ("unet", {"cross_attention_dim": 40}, "width 40"),
        ("unet", {"in_channels": 9}, "9 channels"),
    ],
)
def test_a_base_that_is_not_shaped_like_stable_diffusion(settings, changed, part, values, told):
    line = refusal(settings("tdm", base=changed(part, **values)))
    assert told in line


def test_a_base_that_predicts_something_else_than_noise(settings, changed):
    other = changed("scheduler", "scheduler_config.json", prediction_type="v_prediction")
    assert "v_prediction" in refusal(settings("tdm", base=other))


def test_an_image_encoder_of_another_width(settings, base, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    other = Path(shutil.copytree(base, tmp_path / "base"))
    shutil.rmtree(other / "image_encoder")
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=40,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(other / "image_encoder")
    assert "projection_dim 40" in refusal(settings("sdm", base=str(other)))


def test_an_output_that_holds_another_run_is_refused_with_the_difference(settings):
    train_model(settings("tdm", steps=1), lambda numbers: None)
    store = open_store(settings("tdm").output)
    with pytest.raises(InputError, match="--resume"):
        runs.require_startable(store, settings("tdm"))
    for other, told in (({"seed": 3}, "seed 0 there, 3 here"), ({"batch_size": 1}, "batch_size 2 there, 1 here")):
        with pytest.raises(InputError, match=told):
            runs.require_startable(store, settings("tdm", resume=True, **other))
    with pytest.raises(InputError, match="role tdm there, sdm here"):
        runs.require_startable(store, settings("sdm", resume=True))


def test_a_run_without_a_checkpoint_yet_may_be_resumed_and_only_as_it_was(settings):
    chosen = settings("tdm", resume=True)
    runs.begin_or_resume_training(open_store(chosen.output), chosen)
    runs.require_startable(open_store(chosen.output), chosen)
    with pytest.raises(InputError, match="seed"):
        runs.require_startable(open_store(chosen.output), settings("tdm", resume=True, seed=1))


def test_other_inputs_are_another_run_and_a_run_of_an_earlier_version_does_not_say_its_inputs(settings):
    chosen = settings("tdm", resume=True)
    store = open_store(chosen.output)
    runs.begin_or_resume_training(store, chosen, {"data": "a", "base": {"vae": "1"}})
    runs.begin_or_resume_training(store, chosen, {"data": "a", "base": {"vae": "1"}})
    with pytest.raises(InputError, match="base.vae 1 there, 2 here; data a there, b here"):
        runs.begin_or_resume_training(store, chosen, {"data": "b", "base": {"vae": "2"}})
    record = json.loads(store.get(runs.RUN))
    del record["inputs"]
    store.put(runs.RUN, json.dumps(record).encode())
    runs.begin_or_resume_training(store, chosen, {"data": "b"})


@pytest.mark.parametrize("given", [None, 2])
def test_another_number_of_workers_is_another_run_whether_it_was_given_or_not(settings, given):
    chosen = settings("tdm", resume=True, workers=given)
    store = open_store(chosen.output)
    assert runs.recorded_workers(store) is None
    runs.begin_or_resume_training(store, chosen, workers=2)
    assert runs.recorded_workers(store) == 2
    for workers in (None, 2):
        runs.require_startable(store, settings("tdm", resume=True, workers=workers))
    runs.begin_or_resume_training(store, chosen, workers=2)
    with pytest.raises(InputError, match="workers 2 there, 4 here.*give --workers 2"):
        runs.require_startable(store, settings("tdm", resume=True, workers=4))
    with pytest.raises(InputError, match="workers 2 there, 1 here.*give --workers 2"):
        train_model(settings("tdm", resume=True), lambda numbers: None)


@pytest.mark.parametrize("given", [None, 2])
def test_a_run_of_an_earlier_version_says_its_workers_where_they_were_given_and_else_when_it_is_resumed(
    settings, given
):
    chosen = settings("tdm", resume=True, workers=given)
    store = open_store(chosen.output)
    runs.begin_or_resume_training(store, chosen, {"data": "a"}, workers=2)
    record = json.loads(store.get(runs.RUN))
    del record["workers"]
    store.put(runs.RUN, json.dumps(record).encode())
    assert runs.recorded_workers(store) == given
    runs.require_startable(store, settings("tdm", resume=True, workers=2))
    runs.begin_or_resume_training(store, chosen, {"data": "a"}, workers=2)
    assert runs.recorded_workers(store) == 2
    assert json.loads(store.get(runs.RUN)) == record | ({} if given else {"workers": 2})


def _other_weights(folder: Path) -> None:
    """Change one bit of a part's weights."""
    [weights] = folder.glob("*.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_another_image_encoder_is_another_run(settings, base, tmp_path):
    """Of a base that has none; the shape of the other one is the same."""
    bare, encoder = shutil.copytree(base, tmp_path / "base"), tmp_path / "encoder"
    shutil.move(bare / "image_encoder", encoder)
    index = json.loads((bare / "model_index.json").read_text())
    del index["image_encoder"]
    (bare / "model_index.json").write_text(json.dumps(index))
    chosen = settings("sdm", base=str(bare), image_encoder=str(encoder), steps=1, resume=True)
    train_model(chosen, lambda numbers: None)
    (encoder / "README.md").write_text("a note, which is not read")
    train_model(chosen, lambda numbers: None)
    _other_weights(encoder)
    with pytest.raises(InputError, match="holds another run .image_encoder .* there"):
        train_model(chosen, lambda numbers: None)
    record = json.loads(open_store(chosen.output).get(runs.RUN))
    del record["inputs"]["image_encoder"]
    open_store(chosen.output).put(runs.RUN, json.dumps(record).encode())
    train_model(chosen, lambda numbers: None)


def test_another_model_to_start_from_under_the_same_name_is_another_run(settings, base, tmp_path):
    start = shutil.copytree(base, tmp_path / "start")
    shutil.copytree(base / "unet", start / "unet_text")
    chosen = settings("tdm", start_from=str(start), steps=1, resume=True)
    train_model(chosen, lambda numbers: None)
    _other_weights(start / "unet")
    train_model(chosen, lambda numbers: None)
    _other_weights(start / "unet_text")
    with pytest.raises(InputError, match="holds another run .start_from.unet_text .* there"):
        train_model(chosen, lambda numbers: None)


def test_other_prepared_data_is_refused_before_anything_is_loaded(settings, prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    chosen = settings("tdm", data=str(data), resume=True)
    for fingerprint in ("a", "b"):
        (data / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": fingerprint}))
        if fingerprint == "a":
            runs.begin_or_resume_training(open_store(chosen.output), chosen, {"data": "a", "base": {"vae": "1"}})
            check_train(chosen)
    with pytest.raises(InputError, match="data a there, b here"):
        check_train(chosen)


def test_another_provenance_is_resumed_and_refused_where_the_exact_is_asked_for(settings, monkeypatch):
    train_model(settings("tdm", steps=1), lambda numbers: None)
    store = open_store(settings("tdm").output)
    [recorded] = runs.recorded_provenances(store)
    assert recorded["libraries"]["torch"] and recorded["hardware"] and recorded["threads"] == 1
    monkeypatch.setattr("facediffuser.runs.__version__", "99.0")
    runs.require_startable(store, settings("tdm", steps=1, resume=True))
    with pytest.raises(InputError, match="code .* there, 99.0 here.*leave --exact out"):
        runs.require_startable(store, settings("tdm", steps=1, resume=True, exact=True))


def test_an_output_that_holds_something_else(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        runs.require_startable(open_store(tmp_path / "run"), settings())


def test_a_preset_of_the_other_role():
    with pytest.raises(ValueError, match="paper-sdm is not for the tdm"):
        TrainSettings(role="tdm", data="d", base="b", output="o", preset="paper-sdm")
