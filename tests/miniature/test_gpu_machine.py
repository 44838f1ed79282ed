"""The two worlds on machines without Ray and Prefect: tasks, clocks and archives, and both calls in the smallest."""

import csv
import json
import logging
import os
import subprocess
import sys
import tarfile
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from facediffuser.batch_stage import Unit
from facediffuser.training import latent_stage
from tools.miniature_weights import base, gpu, gpu_base, gpu_models, packing, photo_stream
from tools.miniature_weights.fitting import fit
from tools.miniature_weights.gpu_call import SMALL, Size, roles
from tools.miniature_weights.packing import below, pack
from tools.miniature_weights.paired_training import RATE, RATIO, TrainingFailedError, role_settings
from tools.miniature_weights.running_clock import RunningClock
from tools.miniature_weights.task_pool import FAILED, Task, TaskList, Worker, _take

REFUSES = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "prefect"):
            raise ModuleNotFoundError(f"{name} is not on the machine")
sys.meta_path.insert(0, Refused())
from tools.miniature_weights import gpu
gpu.main()
"""


def test_checkpoints_of_both_trainings_are_in_the_papers_ratio():
    for size in (Size(), SMALL):
        units = roles(size)
        assert units["tdm"] * RATIO["sdm"] == units["sdm"] * RATIO["tdm"]


def test_everything_that_is_trained_has_one_rate_a_tenth_of_the_bases(tmp_path):
    for role in RATIO:
        recipe = role_settings(role, tmp_path, 4, 5).recipe()
        rates = {recipe.learning_rate, recipe.subject_learning_rate, recipe.encoder_learning_rate} - {None}
        assert rates == {RATE} == {1.2e-4} and recipe.schedule == "constant"


def test_the_first_task_that_nobody_took_is_taken_and_urgent_ones_come_first(tmp_path):
    (tmp_path / "taken").mkdir()
    tasks = TaskList(tmp_path)
    tasks.put([Task("rows/late.json", window=(2, 10))])
    tasks.put([Task("rows/soon.json")], in_front=True)
    assert [_take(tmp_path), _take(tmp_path), _take(tmp_path)] == [
        Task("rows/soon.json"),
        Task("rows/late.json", window=(2, 10)),
        None,
    ]
    assert not tasks.done([Task("rows/soon.json")])


def test_an_archive_that_is_too_large_to_be_taken_home_is_left_out(tmp_path, monkeypatch, caplog):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "small").write_bytes(b"1")
    pack(below(tmp_path / "files") | {"made": b"2", "missing": tmp_path / "nothing"}, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == ["small", "made"]
    monkeypatch.setattr(packing, "MOST_BYTES", 5000)
    with caplog.at_level(logging.ERROR):
        pack({"large": os.urandom(9000)}, tmp_path / "b.tar", compress=True)
    assert not (tmp_path / "b.tar").exists() and "b.tar" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "files"]


def test_an_archive_of_files_that_are_being_written_is_whole(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    for name in ("there.json", ".half.json.123", "gone.json"):
        (tmp_path / "rows" / name).write_bytes(b"12")
    files = below(tmp_path / "rows")
    (tmp_path / "rows" / "gone.json").unlink()
    # Its size changes between the look at it and the reading.
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"1" if path.exists() else path.open("rb"))
    pack(files, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == ["there.json"] and archive.extractfile("there.json").read() == b"1"


def test_the_bases_archive_is_of_one_save_whatever_lies_in_the_folder_meanwhile(tmp_path, monkeypatch):
    def train(vae, photos, tokenizer, steps, keep, batch, device, progress, after_save):
        progress()
        for save in (b"1", b"2"):
            for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
                (keep / part / f"{name}.safetensors").write_bytes(save)
            after_save(int(save) * 250)
        (keep / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half of 3")
        raise RuntimeError("the time is over")

    monkeypatch.setattr(base, "train_base", train)
    monkeypatch.setattr(photo_stream, "load_photos", lambda *given, **more: None)
    with pytest.raises(RuntimeError, match="the time is over"):
        gpu_base.train_broad(tmp_path, SMALL, 1, "cpu", 100, time.time() + 100)
    with tarfile.open(tmp_path / gpu_base.BASE) as archive:
        weights = [one for one in archive.getmembers() if one.name.endswith(".safetensors")]
        assert [archive.extractfile(one).read() for one in weights] == [b"2", b"2"]
        assert json.load(archive.extractfile("broad.json"))["steps"] == 500
        assert {"unet/config.json", "text_encoder/config.json"} < set(archive.getnames())
    assert not (tmp_path / gpu_base.BROAD_DONE).exists()


def test_every_part_of_the_latents_is_some_tasks_though_the_list_of_what_is_missing_shrinks(tmp_path, monkeypatch):
    parts = [("pictures", part) for part in range(5)] + [("captions", part) for part in range(2)]
    made = []

    def stage(settings, pool):
        return SimpleNamespace(
            units=[Unit(f"{kind}/{part}", 1, (kind, part)) for kind, part in parts if (kind, part) not in made]
        )

    monkeypatch.setattr(latent_stage, "latent_stage", stage)
    monkeypatch.setattr(latent_stage, "LatentWorker", lambda settings, threads: lambda unit: made.append(unit.data))
    for start in range(3):
        Worker(tmp_path, "cpu").run(Task(f"latents/{start}", "latents", str(tmp_path), start=start, stop=3))
    assert sorted(made) == sorted(parts)


def test_too_little_memory_is_given_back_before_smaller_batches_are_tried(tmp_path, monkeypatch):
    held = []

    class Small(Worker):
        def _scores(self, task: Task) -> bytes:
            assert not held or held[-1]() is None
            images = torch.zeros(task.batch)
            held.append(weakref.ref(images))
            if task.batch > 32:
                raise torch.OutOfMemoryError
            return b"%d" % len(images)

    Small(tmp_path, "cpu").run(Task("rows.json", batch=128))
    assert len(held) == 3 and (tmp_path / "rows.json").read_bytes() == b"32"
    with pytest.raises(torch.OutOfMemoryError):
        monkeypatch.setattr(Small, "_scores", lambda self, task: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        Small(tmp_path, "cpu").run(Task("none.json", batch=16))


def small_call(folder) -> SimpleNamespace:
    """What a call is to those who plan measurements: its folder, size and tasks."""
    return SimpleNamespace(
        work=folder, out=folder, size=Size(), tasks=TaskList(folder / "measured"), logs=dict, device="cpu", cores=1
    )


def test_what_was_trained_before_a_training_failed_is_measured(tmp_path, monkeypatch):
    done = []

    class Training:
        def __init__(self, *given):
            self.start = self.let = self.stop = lambda role: None

    class Measuring:
        def __init__(self, call):
            self.add_point, self.trained, self.finished = (lambda units: None), done.append, None
            self.write = lambda last=False: None

    def wait(ready, name, meanwhile):
        if name == "training":
            raise TrainingFailedError("training sdm failed twice")
        done.append(name)

    for name in ("begin", "render_ffhq", "prepare", "encode"):
        monkeypatch.setattr(gpu_models, name, lambda *given: None)
    monkeypatch.setattr(gpu_models, "PairedTraining", Training)
    monkeypatch.setattr(gpu_models, "Measuring", Measuring)
    monkeypatch.setattr(gpu_models, "progressed", lambda *given: 7)
    call = small_call(tmp_path)
    call.wait, call.step = wait, lambda name, do: do()
    gpu_models.models_call(call, None, None)
    assert done == [7, "measuring"]


@pytest.mark.parametrize(("ended", "measured"), [(True, ["shipped", "broad"]), (False, ["shipped"])])
def test_a_base_whose_training_did_not_end_is_not_measured_and_failing_rates_keep_nothing_else(
    tmp_path, monkeypatch, ended, measured
):
    class Child:
        def __init__(self, target, args):
            self.start = self.kill = lambda: None
            pack({"unet/weights": b"1"}, tmp_path / gpu_base.BASE)
            if ended:
                (tmp_path / gpu_base.BROAD_DONE).touch()

        def is_alive(self):
            return False

    class Training:
        def __init__(self, *given):
            self.start = self.stop = lambda role: None

    def failing(*given):
        raise TrainingFailedError("training tdm failed twice")

    monkeypatch.setattr(gpu_base.multiprocessing, "get_context", lambda how: SimpleNamespace(Process=Child))
    for name in ("render_ffhq", "prepare", "encode"):
        monkeypatch.setattr(gpu_base, name, lambda *given: None)
    monkeypatch.setattr(gpu_base, "PairedTraining", Training)
    monkeypatch.setattr(gpu_base, "measure_rates", failing)
    monkeypatch.setattr(gpu_base, "models_of_base", lambda folder, base, size: folder)
    home = tmp_path / "home"
    home.mkdir()
    call = small_call(tmp_path)
    call.out, call.seconds, call.started, call.wall = home, 100, time.time(), 100
    call.wait, call.step, call.every = lambda *given: True, lambda name, do: do(), lambda seconds, do: None
    gpu_base.base_call(call)
    assert [task.name for task in call.tasks.tasks if task.kind == "scores"] == measured
    assert sum(task.kind == "base" for task in call.tasks.tasks) == ended
    assert sorted(path.name for path in home.iterdir()) == [
        "mini1-base.tar", "mini1-faces.tar.xz", "mini1-results.tar",
    ]  # fmt: skip


def test_the_claim_is_made_its_own_way_where_nothing_could_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_models, "final_models", lambda call, units: tmp_path)
    measuring = gpu_models.Measuring(small_call(tmp_path))
    measuring.trained(8)
    for task in measuring.candidates:
        failed = measuring.tasks.folder / FAILED / task.file
        failed.parent.mkdir(parents=True, exist_ok=True)
        failed.touch()
    assert not measuring.finished() and not measuring.choice.exists()
    assert {(task.guidance, task.window) for tasks in measuring.claims.values() for task in tasks} == {(5.0, (3, 11))}


def test_tables_are_written_beside_the_measuring_and_packed_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_models, "final_models", lambda call, units: tmp_path)
    call, slow = small_call(tmp_path), threading.Event()
    call.wall_end = time.time() + 100
    measuring = gpu_models.Measuring(call)
    measuring.add_point(0)
    wrote = []

    def write(out):
        slow.wait(30)
        wrote.append(1)
        (out / "claim.md").write_text(f"{len(wrote)}")

    monkeypatch.setattr(measuring, "_write_claim", write)
    (measuring.tasks.folder / "rows").mkdir()
    (measuring.tasks.folder / "rows" / "one.json").write_text("[]")
    for _ in range(2):
        measuring.write()

    def packed() -> list[str]:
        with tarfile.open(tmp_path / "mini2-results.tar") as archive:
            return archive.getnames()

    assert packed() == ["rows/one.json"] and not wrote
    threading.Timer(0.2, slow.set).start()
    measuring.write(last=True)
    # What was there at the end is in the tables: those that were being written were of earlier.
    assert packed() == ["claim.md", "rows/one.json"] and len(wrote) == 2
    assert (tmp_path / "results" / "claim.md").read_text() == "2"


def test_the_cores_are_those_that_the_container_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(gpu, "CPU_LIMIT", tmp_path / "cpu.max")
    found = [gpu.usable_cores()]
    for limit in ("max 100000", "1550000 100000"):
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
        found.append(gpu.usable_cores())
    assert found == [64, 64, 16]


@pytest.mark.parametrize("words", [["--work", "old"], ["--base", "nowhere.tar"], ["--faces", "nowhere.tar.xz"]])
def test_a_call_begins_in_a_new_folder_and_with_files_that_are_there(tmp_path, monkeypatch, words, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old" / "measured").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["gpu", "models", "out", *words])
    with pytest.raises(SystemExit) as error:
        gpu.main()
    assert error.value.code == 2 and words[1] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_clock_ends_by_the_time_of_day_too():
    assert RunningClock(1000, time.time() - 1).left() < 0 and RunningClock(1000, time.time() - 1).progress() == 1.0
    assert RunningClock(1000, time.time() + 50).has(40)


def test_a_training_of_so_much_time_ends_when_it_is_over_and_takes_gradients_that_are_there():
    weight, shares = torch.nn.Parameter(torch.ones(1)), iter([0.0, 0.2, 0.9, 1.0])

    def loss(step):
        weight.grad = torch.ones(1)
        return torch.tensor(2.0)

    assert fit("test", loss, [weight], 1000, 0.1, progress=lambda: next(shares)) == 3
    assert float(weight) < 1


# Minutes on two cores: renders, prepares, trains base, TDM and SDM, measures.
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_calls_train_and_measure_everything(tmp_path):
    def call(*words):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", REFUSES, *map(str, words), "--small", "--cores", "2", "--device", "cpu"]
        subprocess.run(command, check=True, env=environment, timeout=700)

    home = tmp_path / "home"
    call("base", home, "--work", tmp_path / "one", "--seconds", 150, "--wall", 600)
    call(
        "models", home, "--work", tmp_path / "two", "--seconds", 300, "--wall", 600,
        "--base", home / "mini1-base.tar", "--faces", home / "mini1-faces.tar.xz",
    )  # fmt: skip
    first, second = ([path for path in home.iterdir() if path.name.startswith(f"mini{n}")] for n in (1, 2))
    assert max(len(first), len(second)) <= 5
    with tarfile.open(home / "mini2-results.tar") as archive:
        archive.extractall(tmp_path / "results", filter="data")
    with open(tmp_path / "results" / "forgetting.csv") as file:
        points = {(int(row["tdm_step"]), int(row["sdm_step"])) for row in csv.DictReader(file)}
    assert (0, 0) in points and len(points) >= 2 and all(tdm * 9 == sdm * 5 for tdm, sdm in points)
    assert json.loads((tmp_path / "results" / "choice.json").read_text())["guidance_scale"] == 5.0
    assert "face-diffuser" in (tmp_path / "results" / "claim.md").read_text()
    for name, part in (("mini1-base", "unet/"), ("mini2-tdm", "unet_text/"), ("mini2-sdm", "subject_fuser/")):
        with tarfile.open(home / f"{name}.tar") as archive:
            assert any(member.startswith(part) and "safetensors" in member for member in archive.getnames())
