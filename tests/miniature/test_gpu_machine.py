"""The two worlds on machines without Ray and Prefect: tasks, clocks and archives, and both calls in the smallest."""

import csv
import json
import logging
import os
import subprocess
import sys
import tarfile
import time

import pytest
import torch

from tools.miniature_weights import packing
from tools.miniature_weights.fitting import fit
from tools.miniature_weights.gpu_call import SMALL, Size, roles
from tools.miniature_weights.packing import below, pack
from tools.miniature_weights.paired_training import RATE, RATIO, role_settings
from tools.miniature_weights.running_clock import RunningClock
from tools.miniature_weights.task_pool import Task, TaskList, _take

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
