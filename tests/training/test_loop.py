"""The loop on one worker: what it leaves behind, what it refuses, and that a killed run ends as an undisturbed one."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.prepared_rows import read_prepared, write_prepared

from facediffuser.errors import InputError
from facediffuser.storage import open_store
from facediffuser.training import training_run as runs
from facediffuser.training.loop import DivergedError, train_model
from facediffuser.training.train_settings import TrainSettings


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's result."""
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted((output / "final").rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("role", "parts"), [("tdm", ["unet"]), ("sdm", ["image_encoder", "subject_fuser", "unet"])])
def test_a_run_leaves_its_parts_and_says_what_it_was(settings, tmp_path, role, parts):
    told = []
    result = train_model(settings(role), told.append)
    final = tmp_path / "run" / "final"
    assert sorted(path.name for path in final.iterdir() if path.is_dir()) == parts
    training = json.loads((final / "training.json").read_text())
    assert (training["role"], training["step"]) == (role, 3) == (result["role"], result["step"])
    assert {"unet", "vae", "text_encoder", "tokenizer"} <= training["base_digests"].keys()
    assert [numbers["step"] for numbers in told][:3] == [1, 2, 3]
    assert all({"loss", "localization", "learning_rate", "images_per_second"} <= numbers.keys() for numbers in told[:3])


def test_two_trained_runs_and_their_base_make_a_pipeline(settings, base, tmp_path):
    from facediffuser import FaceDiffuserPipeline
    from facediffuser.modelfolder import assemble

    for role in ("tdm", "sdm"):
        train_model(settings(role, steps=1, output=str(tmp_path / role)), lambda numbers: None)
    models = assemble(base, str(tmp_path / "tdm"), str(tmp_path / "sdm"), tmp_path / "models")
    pipeline = FaceDiffuserPipeline.from_pretrained(models)
    assert pipeline.unet is not None and pipeline.unet_text is not None


def test_the_miniatures_model_folder_is_made_from_two_runs_in_half_precision(settings, base, tmp_path):
    from facediffuser import FaceDiffuserPipeline
    from tools.miniature_weights.make import make_models

    for role in ("tdm", "sdm"):
        train_model(settings(role, steps=1, output=str(tmp_path / role)), lambda numbers: None)
    shutil.copytree(base, tmp_path / "parts" / "base")
    models = make_models(tmp_path / "parts", str(tmp_path / "tdm"), str(tmp_path / "sdm"))
    pipeline = FaceDiffuserPipeline.from_pretrained(models)
    for run, name, module in (("tdm", "unet", pipeline.unet_text), ("sdm", "unet", pipeline.unet)):
        trained = load_file(tmp_path / run / "final" / name / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(trained[key].half().float(), value) for key, value in module.state_dict().items())
    links = {path for path in models.rglob("*.safetensors") if path.is_symlink()}
    assert {path.parent.name for path in links} == {"vae", "text_encoder"}
    assert all(path.resolve().is_relative_to(tmp_path / "parts" / "base") for path in links)
    own = [path for path in models.rglob("*.safetensors") if path not in links]
    assert len(own) == 4 and all(value.dtype == torch.float16 for path in own for value in load_file(path).values())


def test_making_the_miniatures_model_folder_of_an_unfinished_run_is_refused_in_one_line(base, tmp_path, monkeypatch):
    from tools.miniature_weights import make

    shutil.copytree(base, tmp_path / "parts" / "base")
    (tmp_path / "run").mkdir()
    run = str(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["make", "models", "--output", str(tmp_path / "parts"), "--tdm", run, "--sdm", run])
    with pytest.raises(SystemExit, match="run/final: no such file or folder; check the path"):
        make.main()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["base"]


def test_training_starts_from_a_model_folder_and_refuses_one_of_another_base(settings, base, tmp_path):
    from facediffuser.modelfolder import assemble

    for role in ("tdm", "sdm"):
        train_model(settings(role, learning_rate=1e-2, output=str(tmp_path / role)), lambda numbers: None)
    models = assemble(base, str(tmp_path / "tdm"), str(tmp_path / "sdm"), tmp_path / "models")
    for role in ("tdm", "sdm"):
        output = tmp_path / f"{role}-on"
        still = dict(learning_rate=1e-12, subject_learning_rate=1e-12, encoder_learning_rate=1e-12)
        train_model(settings(role, steps=1, start_from=str(models), output=str(output), **still), lambda numbers: None)
        before, after = weights(tmp_path / role), weights(output)
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    other = Path(shutil.copytree(base, tmp_path / "base"))
    (other / "vae" / "note.txt").write_text("another autoencoder")
    with pytest.raises(InputError, match="trained from another base .* \\(vae differs\\)"):
        train_model(settings(base=str(other), start_from=str(models)), lambda numbers: None)


def test_the_result_does_not_say_where_its_base_lay(settings, base, tmp_path):
    train_model(settings("sdm", steps=1), lambda numbers: None)
    configs = [path.read_text() for path in (tmp_path / "run" / "final").rglob("config.json")]
    assert len(configs) == 3 and not [text for text in configs if str(base.parent) in text]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(settings, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_model(settings("sdm", seed=seed, output=str(tmp_path / name)), lambda numbers: None)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def _train_until_killed(settings: TrainSettings, after: int) -> None:
    torch.set_num_threads(1)

    def report(numbers: dict[str, float]) -> None:
        if numbers["step"] == after:
            os.kill(os.getpid(), signal.SIGKILL)

    train_model(settings, report)


@pytest.mark.parametrize("role", ["sdm"])
def test_a_run_killed_with_sigkill_and_resumed_ends_with_the_same_weights(settings, tmp_path, role):
    given = dict(steps=6, checkpoint_every=2, ema=0.9, resume=True)
    train_model(settings(role, output=str(tmp_path / "whole"), **given), lambda numbers: None)
    killed = settings(role, output=str(tmp_path / "killed"), **given)
    process = multiprocessing.get_context("spawn").Process(target=_train_until_killed, args=(killed, 5))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store = open_store(killed.output)
    assert runs.checkpoint_steps(store)[-1] == 4 and runs.finished_step(store) is None
    steps = []
    train_model(killed, lambda numbers: steps.append(numbers["step"]))
    assert steps[0] == 5
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_a_checkpoint_in_many_parts_reads_back_whole_and_leftovers_of_a_broken_one_are_no_checkpoint(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "PART_BYTES", 10_000)
    store, state = open_store(tmp_path), {"step": 2, "trained": [torch.randn(100, 100), torch.randn(7)]}
    store.put("checkpoints/step-00000001/part-00000", b"of a write that was broken off")
    store.put("checkpoints/notes.json", b"{}")
    assert runs.checkpoint_steps(store) == []
    runs.save_checkpoint(store, 2, state, keep_last=1)
    assert runs.checkpoint_steps(store) == [2]
    assert len(store.list("checkpoints/step-00000002/")) > 3 and not store.list("checkpoints/step-00000001/")
    again = runs.load_checkpoint(store, 2)
    assert again["step"] == 2 and same(dict(enumerate(state["trained"])), dict(enumerate(again["trained"])))


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "noise"])
def test_a_damaged_part_of_a_checkpoint_is_named_with_what_to_do(tmp_path, monkeypatch, damage, earlier):
    """Marks of earlier versions do not say what the parts hold: there a changed number cannot be noticed."""
    monkeypatch.setattr(runs, "PART_BYTES", 10_000)
    store = open_store(tmp_path)
    runs.save_checkpoint(store, 2, {"step": 2, "trained": [torch.randn(100, 100)]}, keep_last=1)
    mark, part = "checkpoints/step-00000002.json", "checkpoints/step-00000002/part-00001"
    if earlier:
        content = json.loads(store.get(mark))
        del content["files"]
        store.put(mark, json.dumps(content).encode())
        assert runs.load_checkpoint(store, 2)["step"] == 2
    data = store.get(part)
    if damage == "missing":
        store.delete(part)
    else:
        store.put(part, {"bit": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-9], "noise": b"noise"}[damage])
    if earlier and damage == "bit":
        assert runs.load_checkpoint(store, 2)["step"] == 2
        return
    with pytest.raises(InputError, match="checkpoints/step-00000002") as refused:
        runs.load_checkpoint(store, 2)
    line = str(refused.value)
    assert f"or remove {mark} to go on from the checkpoint before" in line and "\n" not in line
    assert earlier or part in line


@pytest.mark.parametrize("mark", [{"parts": 0}, {"parts": -1}, {"parts": 1, "files": 3}, {"parts": 2, "files": [{}]}])
def test_a_mark_that_is_none_is_refused(tmp_path, mark):
    store = open_store(tmp_path)
    runs.save_checkpoint(store, 2, {"step": 2}, keep_last=1)
    store.put("checkpoints/step-00000002.json", json.dumps(mark).encode())
    with pytest.raises(InputError, match="checkpoints/step-00000002.*or remove"):
        runs.load_checkpoint(store, 2)


def test_the_last_checkpoints_are_kept_and_those_of_every_so_many_steps(settings):
    chosen = settings(steps=7, checkpoint_every=1, keep_last=2, keep_every=3)
    train_model(chosen, lambda numbers: None)
    assert runs.checkpoint_steps(open_store(chosen.output)) == [3, 6, 7]


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_good_checkpoint(settings):
    chosen = settings("tdm", steps=40, learning_rate=1e30, warmup_steps=0, max_grad_norm=1e30, checkpoint_every=1)
    with pytest.raises(DivergedError, match="last good checkpoint"):
        train_model(chosen, lambda numbers: None)
    store = open_store(chosen.output)
    assert runs.finished_step(store) is None
    for step in runs.checkpoint_steps(store):
        state = runs.load_checkpoint(store, step)
        assert all(torch.isfinite(tensor).all() for tensor in state["trained"])


def test_a_loss_far_beyond_a_guess_for_long_stops_the_run_before_more_is_spoilt(settings, monkeypatch):
    from facediffuser.training import loop

    monkeypatch.setattr(loop, "HIGH_LOSS", 0.0)
    monkeypatch.setattr(loop, "HIGH_STEPS", 3)
    chosen = settings("tdm", steps=9, checkpoint_every=1)
    with pytest.raises(DivergedError, match="step 2; the last good checkpoint is that of step 2"):
        train_model(chosen, lambda numbers: None)
    assert runs.checkpoint_steps(open_store(chosen.output)) == [1, 2]


def test_two_workers_learn_from_what_one_with_the_doubled_batch_learns_from(settings):
    """The images of a step, and all chance about them, do not depend on how many workers share them."""
    from facediffuser.training.batches import image_seed
    from facediffuser.training.data_loading import split_batches
    from facediffuser.training.denoisers import load_parts

    chosen = settings("sdm", batch_size=2)
    batches = split_batches(chosen, load_parts(chosen), "train")
    seeds = [image_seed(0, place) for place in range(4)]
    whole = batches.collate(batches.rows(0, 4), seeds)
    halves = [batches.collate(batches.rows(first, 2), seeds[first : first + 2]) for first in (0, 2)]
    for name in ("moments", "text", "draw", "noise", "times", "masked", "references"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    assert torch.equal(whole.tokens.input_ids, torch.cat([half.tokens.input_ids for half in halves]))


def test_validation_losses_samples_and_tensorboard_files_are_written_beside_the_checkpoints(settings, tmp_path):
    from PIL import Image

    told = []
    chosen = settings("sdm", steps=2, ema=0.9, validate_every=1, sample_every=2, sample_images=2, validation_images=2)
    train_model(chosen, told.append)
    losses = [numbers["validation_loss"] for numbers in told if "validation_loss" in numbers]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    run = tmp_path / "run"
    assert Image.open(run / "samples" / "step-00000002.png").width == 2 * 64 + 4
    assert list((run / "tensorboard").glob("events*"))


def test_a_sample_leaves_out_the_subjects_that_training_leaves_out(settings, prepared, tmp_path):
    """Behind the end of the text encoder's input: the only one of the first row, the second one of the next."""
    from facediffuser.training.denoisers import load_parts
    from facediffuser.training.monitoring import sample_grid
    from facediffuser.training.records import Records

    rows, long = read_prepared(prepared), "a photo of a man" + ", in the park" * 40 + " and a woman"
    for row, ends in ((rows[0], [len(long)]), (rows[1], [16, len(long)])):
        row["caption"], one = long, row["subjects"][0]
        row["subjects"] = [one | {"end": end, "start": end - 3} for end in ends]
    write_prepared(tmp_path / "data", rows[:3])
    chosen = settings("sdm", data=str(tmp_path / "data"), sample_images=2)
    sheet = sample_grid(Records(chosen.data, "train"), load_parts(chosen), chosen)
    # A row of samples, and one of references: of the first picture there is none.
    assert sheet.size == (2 * 64 + 4, 2 * 64 + 4)
    assert sheet.crop((0, 68, 64, 132)).getcolors() == [(64 * 64, (255, 255, 255))]


@pytest.mark.parametrize("role", ["tdm", "sdm"])
def test_looking_at_a_run_does_not_change_what_it_learns(settings, tmp_path, role):
    train_model(settings(role, output=str(tmp_path / "plain")), lambda numbers: None)
    watched = settings(role, output=str(tmp_path / "watched"), validate_every=1, validation_images=2, sample_images=1)
    train_model(watched, lambda numbers: None)
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "watched"))


def test_accumulated_batches_make_the_step_of_one_large_batch(settings, tmp_path):
    given = dict(steps=1, warmup_steps=0, masked_loss=0.0)
    train_model(settings("tdm", output=str(tmp_path / "a"), batch_size=4, **given), lambda numbers: None)
    train_model(settings("tdm", output=str(tmp_path / "b"), batch_size=2, accumulate=2, **given), lambda numbers: None)
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    close = [torch.isclose(ours[name], theirs[name], atol=1e-6).float().mean() for name in ours]
    assert torch.stack(close).mean() > 0.99
